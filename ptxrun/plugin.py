"""pytest -p ptxrun.plugin --emulate sm_90: tests on a machine without a GPU run the kernels' compiled PTX.

The driver is in place before any conftest.py is imported. Operators of `torch.library.custom_op` run their CUDA
implementation on CPU tensors. At the end each kernel's launches are listed. With `--results FILE` each test leaves a
line of JSON as it ends, and what has one is not run again, so that a run that was stopped goes on where it was.
"""
import collections
import contextlib
import json
import signal
from pathlib import Path

import pytest

SESSION = pytest.StashKey()


def pytest_addoption(parser):
    """The options of the command line."""
    group = parser.getgroup("ptxrun", "compiled Triton kernels without a GPU")
    group.addoption("--emulate", metavar="sm_90", help="run compiled kernels for this architecture in an emulator")
    group.addoption("--races", action="store_true", help="with --emulate: look for races")
    group.addoption("--schedule", default="late", choices=("early", "late", "random"),
                    help="with --emulate: when asynchronous copies and products are done")
    group.addoption("--seed", type=int, default=0, help="with --schedule random: which order")
    group.addoption("--copies-fenced", action="store_true",
                    help="with --races: none where only the proxy fence behind cp.async is missing (Triton before 3.7)")
    group.addoption("--results", type=Path, metavar="FILE",
                    help="with --emulate: a line of JSON for each test; tests that FILE holds are left out")
    group.addoption("--limit", type=float, default=0.0, metavar="SECONDS",
                    help="with --emulate: skip the rest of a test that takes more of the processor's time")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    """Put the driver in place."""
    options = early_config.known_args_namespace
    if options.emulate is None:
        names = ("races", "copies-fenced", "results", "limit", "seed")
        given = [f"--{name}" for name in names if getattr(options, name.replace("-", "_"))]
        if given:
            raise pytest.UsageError(f"{', '.join(given)}: nothing is emulated; --emulate sm_90 fits beside it")
        return
    from ptxrun import emulate
    stack = contextlib.ExitStack()
    try:
        emulation = stack.enter_context(
            emulate(options.emulate, races=options.races, schedule=options.schedule, seed=options.seed,
                    copies_fenced=options.copies_fenced))
    except ValueError as error:
        raise pytest.UsageError(f"--{error}") from None
    early_config.stash[SESSION] = stack, emulation


def pytest_configure(config):
    """Add what `--results` and `--limit` ask for."""
    if SESSION in config.stash:
        if config.option.results:
            config.pluginmanager.register(Results(config, config.stash[SESSION][1]))
        if config.option.limit:
            config.pluginmanager.register(Limit(config.option.limit))


def pytest_collection_finish(session):
    """Let operators run their CUDA implementation, now that all are registered."""
    if SESSION in session.config.stash:
        from ptxrun import operators_on_cpu
        operators_on_cpu()


def pytest_unconfigure(config):
    """Give Triton its own driver back."""
    if SESSION in config.stash:
        config.stash[SESSION][0].close()


def pytest_terminal_summary(terminalreporter, config):
    """List the kernels."""
    if SESSION not in config.stash or not config.stash[SESSION][1].kernels:
        return
    emulation = config.stash[SESSION][1]
    terminalreporter.section(f"kernels emulated on sm_{emulation.architecture}")
    for name, counts in sorted(emulation.kernels.items()):
        terminalreporter.write_line(f"{name}: {counts.launches} launches, {emulation.seconds.get(name, 0):.1f} s")


class Limit:
    """A test that takes too much of the processor's time is skipped, and says so."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """Let the test run until the alarm."""
        def stop(number, frame):
            pytest.skip(f"longer than {self.seconds:g} seconds of the processor")
        before = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


class Results:
    """The file of `--results`: of each test its name, outcome, seconds, launches by kernel, its error or reason, and
    what it gives to pytest's `record_property`."""

    def __init__(self, config, emulation):
        self.path, self.emulation = config.option.results, emulation
        self.writes = not hasattr(config, "workerinput")  # as pytest-xdist's workers have: this one hears of all tests
        self.before, self.current = {}, {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        """Leave out the tests that have a line, and let one case of each test come before its second one."""
        if self.writes:
            self._write({"collected": len(items)})
        done, turns, turn_of = {line["test"] for line in lines(self.path)}, collections.Counter(), {}
        for item in reversed(items):  # a test's last case first: it tends to be the richest
            test = item.nodeid.partition("[")[0]
            turns[test] += 1
            turn_of[item] = turns[test]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = sorted((item for item in items if item.nodeid not in done), key=turn_of.get)

    def _launches(self) -> dict[str, int]:
        return {name: counts.launches for name, counts in self.emulation.kernels.items()}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        """Remember what was launched before a test."""
        self.before = self._launches()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item):
        """Give the launches of a test to its report, which may be read in another process."""
        launches = {name: n - self.before.get(name, 0) for name, n in self._launches().items()}
        item.user_properties.append(("launches", {name: n for name, n in launches.items() if n}))

    def pytest_runtest_logreport(self, report):
        """Gather the reports of a test's setup, call and teardown; write its line with the last."""
        line = self.current.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0})
        line["seconds"] = round(line["seconds"] + report.duration, 2)
        if report.outcome != "passed" and line["outcome"] != "failed":
            line |= {"outcome": report.outcome, "why": why(report)}
        if report.when == "teardown" and self.writes:
            self._write(self.current.pop(report.nodeid) | {"launches": {}} | dict(report.user_properties))

    def _write(self, line: dict):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"\n{json.dumps(line)}")  # so that a line that a kill cut short does not reach into the next


def why(report) -> str:
    """The reason of a skip, or the error in a few lines."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr))[:2000]


def _read(path: Path) -> list[dict]:
    """What a file of `--results` holds; a line that a kill cut short counts as none."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def lines(path: Path) -> list[dict]:
    """The tests that a file of `--results` holds."""
    return [line for line in _read(path) if "test" in line]


def collected(path: Path) -> int:
    """How many tests there were to run when a file of `--results` was last written to."""
    return next((line["collected"] for line in reversed(_read(path)) if "collected" in line), 0)
