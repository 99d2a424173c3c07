"""benchmarks.emulate: which runs there are, and the page of what they found."""
import json
import os
import subprocess
import sys

import pytest
import torch
import triton

from benchmarks import emulate
from tests.tfkernels.emulated.rows import rows
from tests.tfkernels.emulated.test_every_dtype import FITS


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """A configuration of another Triton, whose tests are recorded in a folder of their own."""
    monkeypatch.setattr(emulate, "BUILD", tmp_path)
    folder = tmp_path / "triton" / "9.7.1"
    (folder / "triton").mkdir(parents=True)
    (folder / "triton" / "__init__.py").write_text("\"\"\"Triton.\"\"\"\n__version__ = '9.7.1'\n")
    return emulate.Configuration("random-3", "float16", "sm_80", "9.7.1", folder)


def record(configuration, *tests, commit="abc"):
    """Write the file of a configuration's tests."""
    path = configuration.file(commit)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in ({"collected": 5}, *tests)))


def test_a_configuration_is_one_run_of_pytest_with_its_own_triton_first(configuration, monkeypatch):
    seen = {}
    monkeypatch.setattr(emulate.subprocess, "run", lambda command, **named: seen.update(named, command=command))
    configuration.run("abc", 2)
    command = " ".join(seen["command"])
    assert command.startswith(f"{sys.executable} -m pytest")
    assert "--emulate sm_80 --races --schedule random --seed 3" in command and "-k torch.float16" in command
    assert seen["env"]["PYTHONPATH"].startswith(str(configuration.folder)) and seen["timeout"] == 120


def test_a_triton_that_is_there_is_not_installed_again(configuration, monkeypatch):
    commands = []
    monkeypatch.setattr(emulate.subprocess, "run", lambda command, **named: commands.append(command))
    assert emulate.folder_of(triton.__version__) is None
    assert emulate.folder_of("9.7.1") == emulate.folder_of(str(configuration.folder)) == configuration.folder
    assert commands == [] and emulate.version_in(configuration.folder) == "9.7.1"
    emulate.folder_of("9.6.0")
    assert commands[0][-1] == "triton==9.6.0"


def test_the_page_counts_what_ran_and_names_what_failed(configuration):
    test = {"outcome": "passed", "seconds": 90.0, "launches": {"_norm_fwd": 2, "_norm_bwd": 1},
            "rows": ["_norm_fwd 64"]}
    record(configuration, {"test": "a", **test}, {"test": "b", **test, "rows": ["_norm_fwd 64", "_norm_bwd 64"]},
           {"test": "c", **test, "outcome": "failed", "why": "Race: byte 3\n...", "rows": ["_norm_fwd 128"]})
    text = emulate.page([configuration, configuration._replace(schedule="early")], "abc")
    every = len({(row.kernel, *row.named.items()) for row in rows(80, torch.float16)})
    assert f"| random-3 | float16 | sm_80 | 9.7.1 | abc | 2 | 1 | 2 | 2 | 2 of {every} | 6 | 4.5 |" in text
    assert "| early |" not in text and "Tests that failed: 1." in text
    assert "- `c` on (random-3, float16, sm_80, Triton 9.7.1): Race: byte 3\n" in text


def test_what_the_last_commit_has_not_run_is_shown_of_the_newest_that_has(configuration):
    test = {"test": "a", "outcome": "passed", "seconds": 60.0, "launches": {}, "rows": []}
    record(configuration, test, commit="old")
    for commit, minutes in (("old", 1), ("new", 2)):
        if commit == "new":
            record(configuration, test, test | {"test": "b"}, commit="new")
        os.utime(configuration.file(commit), (1000 * minutes, 1000 * minutes))
        assert f"| 9.7.1 | {commit} | {minutes} | 0 |" in emulate.page([configuration], "abc")
    os.utime(configuration.file("old"), (9000, 9000))
    assert configuration.latest("abc") == "old" and configuration.latest("new") == "new"


def test_clean_lines_of_a_page_stay_and_are_not_run_again(configuration, monkeypatch, tmp_path):
    test = {"seconds": 60.0, "launches": {}, "rows": [], "why": "no"}
    others = [configuration._replace(schedule="late", architecture=name) for name in ("sm_80", "sm_90")]
    for one, outcome in zip(others, ("passed", "failed")):
        record(one, *({**test, "test": name, "outcome": outcome} for name in "abcde"))
    before = emulate.page(others, "abc")
    for one in others:
        one.file("abc").unlink()
    record(configuration, {**test, "test": "a", "outcome": "passed"})
    lines = emulate.clean_lines(emulate.page([*others, configuration], "abc", before))
    assert list(lines) == [others[0][:4]]
    text = emulate.page([configuration], "abc", before)
    assert text.index("| late | float16 | sm_80 |") < text.index("| random-3 |") and "| sm_90 |" not in text

    out, ran = tmp_path / "page.md", []
    out.write_text(before)
    monkeypatch.setattr(emulate, "output", lambda *command: "abc" if "log" in command else "")
    monkeypatch.setattr(emulate.Configuration, "run", lambda one, commit, minutes: ran.append(one.architecture))
    emulate.main(["--out", str(out), "--schedule", "late", "--dtype", "float16", "--triton", str(configuration.folder)])
    assert ran == ["sm_90"] and "| late | float16 | sm_80 | 9.7.1 | abc | 5 | 0 | 0 |" in out.read_text()


def test_the_tests_of_float16_are_all_of_them_and_none_of_bfloat16(configuration):
    command = configuration._replace(triton=triton.__version__, folder=None).command("abc")
    found = subprocess.run([*command, "--collect-only"], cwd=emulate.ROOT, capture_output=True, text=True).stdout
    names = {line.partition("[")[2] for line in found.splitlines() if "::" in line}
    assert names == {f"{name}-torch.float16]" for name, dtype in FITS if dtype == torch.float16}
