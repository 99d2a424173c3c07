"""Pytest plugin: each test's outcome and reason in a file as soon as it is known, so that a run that is killed leaves
all it learned.

    python -m pytest -p benchmarks.outcomes --outcomes FILE

FILE holds a line of JSON per event and is added to. A test that passed, or was skipped, in an earlier run into the same
file is not run again, and neither is one that any run after the last "run" line has ended. Tests whose name says
"spill" are left out: they compile for GPUs that need not be there, which any machine can do. Attention's tests come
first. A test that loses the device, or takes longer than `--test-seconds`, ends its process: under pytest-xdist another
takes its place and the other tests go on; without, the status is LOST or 1 and whoever started the run starts it again.
"""

import faulthandler
import json
import os
import re
import sys
from pathlib import Path

import pytest

LOST = 70  # exit status: the device answers nothing any more
FIRST = ("tests/tfkernels/attention/", "tests/tfkernels/mask/", "tests/tfkernels/")
LEFT_OUT = "spill"
KEPT_BYTES = 2**30
DONE = ("passed", "skipped", "xfailed")
FAILED = ("failed", "error", "xpassed")


def pytest_addoption(parser):
    """Add the two options."""
    parser.addoption("--outcomes", help="file to which each test's outcome is added as it comes")
    parser.addoption("--test-seconds", type=float, default=150.0, help="a test that takes longer ends its process")


def pytest_configure(config):
    """Start what this process needs: the one that hears of all tests writes, those that run them watch the device."""
    path = config.getoption("--outcomes")
    if path is None:
        return
    given = getattr(config, "workerinput", None)
    alone = given is None and not getattr(config.option, "numprocesses", None)
    path = Path(path)
    done = frozenset(given["done"] if given else finished(path))
    if given is not None or alone:
        config.pluginmanager.register(Watch(done, config.getoption("--test-seconds")))
    if given is None:
        config.pluginmanager.register(Writer(path, done))


class Writer:
    """Writes the file."""

    def __init__(self, path: Path, done: frozenset[str]):
        self.path, self.done, self.failed, self.counted = path, sorted(done), set(), False

    def write(self, **event) -> None:
        """Add a line; one call of the system, so that no reader sees half of it."""
        handle = os.open(self.path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            os.write(handle, (json.dumps(event) + "\n").encode())
        finally:
            os.close(handle)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        """Every worker leaves out the same tests, also one that starts later."""
        node.workerinput["done"] = self.done

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        """Count the tests once."""
        self.count(len(ids))

    def pytest_collection_finish(self, session):
        """Count the tests of a run without workers."""
        if session.items:
            self.count(len(session.items))

    def count(self, number: int) -> None:
        """Write how many tests there are to run."""
        if not self.counted:
            self.counted = True
            self.write(collected=number)

    def pytest_runtest_logstart(self, nodeid):
        """A test begins."""
        self.write(test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report):
        """A phase of a test has ended: its call says how it went, setup and teardown count where they do not pass."""
        call = report.when not in ("setup", "teardown")
        if report.outcome == "passed" and not call or report.nodeid in self.failed:
            return
        if hasattr(report, "wasxfail"):
            outcome = "xpassed" if report.outcome == "passed" else "xfailed"
        else:
            outcome = "error" if report.outcome == "failed" and not call else report.outcome
        if outcome in FAILED:
            self.failed.add(report.nodeid)
        seconds = round(getattr(report, "duration", 0.0), 2)
        self.write(test=report.nodeid, outcome=outcome, seconds=seconds, **reason(report))

    def pytest_collectreport(self, report):
        """A file could not be imported."""
        if report.failed:
            self.write(file=report.nodeid, outcome="not collected", **reason(report))


class Watch:
    """Chooses and orders the tests, and ends a process that is of no more use."""

    def __init__(self, done: frozenset[str], seconds: float):
        self.done, self.seconds, self.lost = done, seconds, False
        self.stderr = os.dup(2)  # while pytest catches no output

    def pytest_collection_modifyitems(self, config, items):
        """Leave out, and put attention first."""
        left_out = [item for item in items if LEFT_OUT in item.name or item.nodeid in self.done]
        chosen = sorted((item for item in items if item not in set(left_out)), key=lambda item: place(item.nodeid))
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        """Run a test under the clock; where it has lost the device, end the process once its reports are out."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self.lost:
                os._exit(LOST)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Wait for the device after each test: what its kernels broke is its own failure and no later test's."""
        report = yield
        error = None if self.lost else device_error()
        if error:
            self.lost = True
            report.longrepr = f"the device was lost in this test: {error}\n{report.longreprtext}"
            report.outcome = "failed"
        return report


def device_error() -> str | None:
    """What the device answers where it answers nothing any more."""
    torch = sys.modules.get("torch")  # a suite that has not imported it has no device
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > KEPT_BYTES:  # the other workers need memory too
            torch.cuda.empty_cache()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def place(nodeid: str) -> int:
    """Where a test comes: by the first of FIRST that its name begins with."""
    return next((number for number, prefix in enumerate(FIRST) if nodeid.startswith(prefix)), len(FIRST))


def reason(report) -> dict[str, str]:
    """A report's reason in a line, and more of its text."""
    if report.outcome == "passed" or report.longrepr is None:
        return {}
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return {"reason": report.longrepr[2]}
    text = getattr(report, "longreprtext", "") or str(report.longrepr)
    text = re.sub(r"^\[gw\d+\] .*\n", "", text)  # pytest-xdist's head
    crash, errors = getattr(report.longrepr, "reprcrash", None), re.findall(r"^E +(.*)", text, re.MULTILINE)
    if crash:
        text_of_one_line = crash.message
    elif errors and report.when == "collect":
        text_of_one_line = errors[-1]
    else:
        text_of_one_line = text
    return {"reason": text_of_one_line[:400], "text": text[-3000:]}


def read(path: Path) -> dict:
    """Counts; failing tests and files that could not be imported, with reasons; tests that had begun and not ended."""
    tests, files, collected = {}, {}, None
    for event in events(path):
        collected = event.get("collected", collected)
        if "run" in event:
            tests = {name: test for name, test in tests.items() if test["outcome"] != "begun"}
        if "file" in event:
            files[event["file"]] = event.get("reason", "")
        test = event.get("test")
        if test and (event["outcome"] != "begun" or tests.get(test, {}).get("outcome") not in FAILED):
            tests[test] = event
    names = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    counts = {outcome: sum(test["outcome"] == outcome for test in tests.values()) for outcome in names}
    failing = {name: test for name, test in tests.items() if test["outcome"] in FAILED}
    reasons = {name: {key: test.get(key, "") for key in ("reason", "text")} for name, test in failing.items()}
    begun = [name for name, test in tests.items() if test["outcome"] == "begun"]
    return {"collected": collected, "counts": counts, "failing": reasons, "not_collected": files, "begun": begun}


def finished(path: Path) -> set[str]:
    """The tests that need not run: those that passed, and those that ended since the last "run" line."""
    done, now = set(), set()
    for event in events(path):
        if "run" in event:
            now = set()
        if "test" in event and event["outcome"] != "begun":
            now.add(event["test"])
            (done.add if event["outcome"] in DONE else done.discard)(event["test"])
    return done | now


def add(path: Path, **event) -> None:
    """Add a line to the file."""
    Writer(path, frozenset()).write(**event)


def events(path: Path) -> list[dict]:
    """The file's lines; one that was cut is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
