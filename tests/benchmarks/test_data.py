"""The benchmark of data: all stages run, each with a number, and wrong answers are not recorded."""
import json

import numpy as np
import pytest

from benchmarks import data
from transfusion.data.sources import LLaVASettings


def test_the_command_runs_every_stage_and_writes_its_numbers(tmp_path, capsys):
    assert data.main(["--quick", "--out", str(tmp_path)]) == 0
    path, = tmp_path.glob("data-cpu-*.json")
    report = json.loads(path.read_text())
    rows = {row["stage"]: row for row in report["rows"]}
    assert set(rows) == {"json index", "json open", "json records", "tar index", "tar open", "tar records", "lengths",
                         "plan", "loader"}
    assert len(report["rows"]) == 11 and all(row["checked"] for row in report["rows"])
    assert rows["plan"]["fill"] > 0.95 and 1 <= rows["plan"]["slowest_over_mean"] < 2
    assert rows["lengths"]["records_per_second"] > 0 and rows["json records"]["record_ms_p50"] > 0
    assert all(0 <= row["share_waited"] <= 1 for row in report["rows"] if row["stage"] == "loader")
    assert len(report["settings"]["load_average"]) == 3
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in rows)


@pytest.mark.parametrize("given", [["--members", "1"], ["--rows", "0"], ["--seconds", "1"]])
def test_sizes_that_leave_nothing_to_measure_and_a_limit_that_nothing_keeps_are_refused(tmp_path, capsys, given):
    with pytest.raises(SystemExit):
        data.main(["--out", str(tmp_path), *given])
    assert given[0] in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_index_with_another_number_of_records_is_refused(tmp_path):
    path = data.write_llava(tmp_path / "chat", 20)
    data.opened(LLaVASettings(path), 20)
    with pytest.raises(AssertionError):
        data.opened(LLaVASettings(path), 21)


def test_synthetic_documents_are_the_same_each_time_and_fit_a_row():
    stream, again = data.synthetic_stream(1000), data.synthetic_stream(1000)
    assert np.array_equal(stream.lengths, again.lengths) and stream.lengths.max() <= data.SEQ_LEN
