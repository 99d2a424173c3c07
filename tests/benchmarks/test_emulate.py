"""benchmarks.emulate: which runs there are, and the page of what they found."""
import json
import sys

import pytest
import triton

from benchmarks import emulate


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """A configuration of another Triton, whose tests are recorded in a folder of their own."""
    monkeypatch.setattr(emulate, "BUILD", tmp_path)
    folder = tmp_path / "triton" / "3.7.1"
    (folder / "triton").mkdir(parents=True)
    (folder / "triton-3.7.1.dist-info").mkdir()
    return emulate.Configuration("3.7.1", folder, "sm_80", "random-3")


def record(configuration, *tests):
    """Write the file of a configuration's tests."""
    path = configuration.file("abc")
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(json.dumps(line) for line in ({"collected": 5}, *tests)))


def test_a_configuration_is_one_run_of_pytest_with_its_own_triton_first(configuration, monkeypatch):
    seen = {}
    monkeypatch.setattr(emulate.subprocess, "run", lambda command, **named: seen.update(named, command=command))
    configuration.run("abc", 2)
    command = " ".join(seen["command"])
    assert command.startswith(f"{sys.executable} -m pytest")
    assert "--emulate sm_80 --races --schedule random --seed 3" in command
    assert seen["env"]["PYTHONPATH"].startswith(str(configuration.folder)) and seen["timeout"] == 120


def test_a_triton_that_is_there_is_not_installed_again(configuration, monkeypatch):
    commands = []
    monkeypatch.setattr(emulate.subprocess, "run", lambda command, **named: commands.append(command))
    assert emulate.folder_of(triton.__version__) is None
    assert emulate.folder_of("3.7.1") == emulate.folder_of(str(configuration.folder)) == configuration.folder
    assert commands == [] and emulate.version_in(configuration.folder) == "3.7.1"
    emulate.folder_of("3.6.0")
    assert commands[0][-1] == "triton==3.6.0"


def test_the_page_counts_what_ran_and_names_what_failed(configuration):
    test = {"outcome": "passed", "seconds": 90.0, "launches": {"_norm_fwd": 2, "_norm_bwd": 1}}
    record(configuration, {"test": "a", **test}, {"test": "b", **test, "outcome": "failed", "why": "Race: byte 3\n..."},
           {"test": "c", **test, "outcome": "skipped", "why": "longer than 60 seconds"})
    text = emulate.page([configuration, configuration._replace(schedule="early")], "abc")
    assert "| 3.7.1 | sm_80 | random-3 | 1 | 1 | 1 | 0 | 2 | 9 | 2 | 4 |" in text and "| early |" not in text
    assert "Tests that failed: 1." in text and "- `b` on 3.7.1 sm_80 random-3: Race: byte 3\n" in text
