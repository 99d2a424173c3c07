"""The CPU suite: what it compares, its page and its plot."""
import json
import re
from pathlib import Path

import pytest

from benchmarks import cpu
from benchmarks.cpu import Comparison, comparisons


def row(contender, **phases):
    times = {phase: {"p50": milliseconds} for phase, milliseconds in phases.items()}
    return {"op": "rotary", "tokens": 256, "heads": 4, "kv_heads": 2, "dim": 64, "contender": contender,
            "milliseconds": times}


def test_ours_is_compared_with_each_peer_in_the_phases_that_both_have():
    rows = [row("device copy", forward=0.1), row("tfkernels", build=1.0, forward=2.0, backward=5.0, optimizer=1.0),
            row("tfkernels, paged", forward=9.0), row("plain", forward=6.0, backward=12.0), row("half", forward=1.5),
            row("broken"), row("ceiling", forward=1.0) | {"mask": cpu.ANOTHER}]
    plain, half = comparisons("rotary", rows)
    assert plain == Comparison("rotary", "rotary, tokens 256, heads 4, kv_heads 2, dim 64", "plain",
                               {"forward": 3.0, "backward": 6.0}, {"forward": 6.0, "backward": 12.0})
    assert plain.times_as_fast == 2 and half.ours == {"forward": 3.0} and half.times_as_fast == 0.5


def test_a_problem_that_ours_has_no_numbers_for_is_left_out_as_are_rows_of_other_columns():
    assert not list(comparisons("rotary", [row("tfkernels"), row("plain", forward=1.0)]))
    assert not list(comparisons("rotary", [{"seq_len": 5, "contender": "tfkernels", "milliseconds": {"build": 1}}]))


def test_the_suite_leaves_a_table_and_a_plot_beside_the_files_they_come_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "BENCHMARKS", {"rotary": cpu.BENCHMARKS["rotary"]})
    assert cpu.main(["--quick", "--out", str(tmp_path), "--commit", "0123456789abc"]) == 0
    page = (tmp_path / "cpu-0123456789.md").read_text()
    rows = json.loads((tmp_path / "rotary-cpu-0123456789.json").read_text())["rows"]
    ours = next(r for r in rows if r["contender"] == "tfkernels" and r["op"] == "rotary")
    assert f"| {ours['milliseconds']['forward']['p50']:,.4g} + " in page and page in capsys.readouterr().out
    assert page.count("| reference, eager |") == 2
    pytest.importorskip("matplotlib")
    assert (tmp_path / "cpu-0123456789.png").stat().st_size > 1000


def test_every_benchmark_of_the_suite_has_a_cpu_run():
    for name in cpu.BENCHMARKS:
        module = __import__(f"benchmarks.{name}", fromlist=["main"])
        with pytest.raises(SystemExit) as ended:
            module.main(["--cpu", "--help"])
        assert ended.value.code == 0


def test_the_readme_says_what_the_page_that_it_links_measured():
    root = Path(cpu.__file__).parents[1]
    said = re.search(r"are ([\d.]+) to ([\d.]+) times as fast as SDPA .*?\]\((.*?)\)",
                     " ".join((root / "README.md").read_text().split()))
    rows = [row.split("|") for row in (root / said[3]).read_text().splitlines() if row.startswith("| attention")]
    found = [float(row[-2]) for row in rows if "SDPA, dense mask" in row[4]]
    assert [f"{min(found):.1f}", f"{max(found):.0f}"] == [said[1], said[2]] and len(found) == 3
