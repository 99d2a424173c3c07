"""Slow tests of what has not changed since they passed are not run again, but for one in sixteen.

They are those that run compiled kernels in the emulator, some of the emulator's own, and under `TRITON_INTERPRET=1`
every file of tests/tfkernels that looks at nothing else. What they passed with stands in passed.txt as hashes of all
that they depend on: the sources of the library, of the emulator and of the tests themselves, the versions of Python,
numpy, torch and Triton, and what Triton compiles by. After a whole `make test` on kernels that are to stay,
`python -m tests.remembered` writes that file anew, of what has passed or was known.
"""
import functools
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars

ROOT = Path(__file__).parents[1]
SOURCES = ("tfkernels", "ptxrun", "tests/tfkernels", "tests/compare.py", "tests/conftest.py", "tests/launches.py",
           "tests/resources.py", "tests/gloo_processes.py", "tests/step_counts.py", "tests/in_flight.py",
           "tests/schedule.py", "tests/ptxrun")
EMULATOR = ("tests/ptxrun/test_mutations.py", "tests/ptxrun/test_plugin.py")  # whole files of its own tests
UNRELATED = ("tests/tfkernels/integrations",)  # which none of these tests looks into
LOOKS_ELSEWHERE = re.compile(r"^\s*(from|import) (transfusion|tests\.transfusion)\b", re.MULTILINE)
PASSED = Path(__file__).with_name("passed.txt")
ASKED = ROOT / "build" / "passed"  # what has passed or was known since passed.txt was written, a file each
RUN = 16  # one in so many of what is known is run all the same


@contextmanager
def unless_known(name: str) -> Iterator[None]:
    """Skip the test `name` where it is known to pass; else remember that it does, where the block raises nothing."""
    key = key_of(name, sources(), versions())
    if key in known() and int(key, 16) % RUN:
        note(key, name)
        pytest.skip("it passed with the same sources and versions: tests/passed.txt")
    yield
    note(key, name)


class RememberedFiles:
    """A plugin of pytest for whole files of tests: see above.

    A file has passed when a run that asked for whole files ends well. Of xdist's processes the main one says so.
    """

    def __init__(self, interpreted: bool):
        self.interpreted, self.ran = interpreted, set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        skipped = pytest.mark.skip(reason="its file passed with the same sources and versions: tests/passed.txt")
        for item in items:
            key = self.key(item.nodeid.partition("::")[0])
            if key in known() and int(key_of(item.nodeid, key), 16) % RUN:
                item.add_marker(skipped)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran.add(report.nodeid.partition("::")[0])

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        config = session.config
        left_out = any(config.getoption(name, None) for name in ("keyword", "markexpr", "deselect", "lf", "stepwise"))
        if exitstatus or left_out or hasattr(config, "workerinput") or any("::" in one for one in config.args):
            return
        for file in self.ran:
            if key := self.key(file):
                note(key, self.name(file))

    def name(self, file: str) -> str:
        return f"{'interpreted' if self.interpreted else 'emulator'}, {file}"

    def key(self, file: str) -> str | None:
        """The hash of what a file of tests passes with; None of one that is not remembered."""
        kernels_alone = file.startswith("tests/tfkernels/") and not file.startswith(UNRELATED)
        if file in EMULATOR or self.interpreted and kernels_alone and not looks_elsewhere(file):
            return key_of(self.name(file), sources(), versions())
        return None


@functools.cache
def looks_elsewhere(file: str) -> bool:
    """Whether a file of tests depends on more than `SOURCES`."""
    return LOOKS_ELSEWHERE.search((ROOT / file).read_text()) is not None


def key_of(*parts: str) -> str:
    """A hash of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@functools.cache
def sources(root: Path = ROOT) -> str:
    """A hash of every source that the tests depend on, by its path."""
    places = [root / source for source in SOURCES]
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*.py")))
             if not any(file.is_relative_to(root / one) for one in UNRELATED)]
    return key_of(*(text for file in files for text in (str(file.relative_to(root)), file.read_text())))


def versions() -> str:
    """Of what runs the tests, with the environment's settings of Triton."""
    return (f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, "
            f"Triton {triton.__version__}, {sorted(get_cache_invalidating_env_vars().items())}")


@functools.cache
def known() -> set[str]:
    """The hashes of what has passed."""
    return {line.split(maxsplit=1)[0] for line in PASSED.read_text().splitlines()} if PASSED.is_file() else set()


def note(key: str, name: str) -> None:
    """Note what has passed or is known to, which passed.txt shall hold."""
    ASKED.mkdir(parents=True, exist_ok=True)
    (ASKED / key).write_text(name)


def renew() -> str:
    """Write passed.txt anew, of what has passed as sources and versions are now; return what changed."""
    names = {file.name: file.read_text() for file in ASKED.iterdir()} if ASKED.is_dir() else {}
    passed = {key: name for key, name in names.items() if key == key_of(name, sources(), versions())}
    if not passed:
        raise SystemExit(f"{ASKED} holds no test that has passed with these sources; run make test")
    said = (f"{PASSED}: {len(passed)} tests, {len(passed.keys() - known())} of them new; "
            f"{len(known() - passed.keys())} have gone")
    PASSED.write_text("".join(f"{key} {name}\n" for key, name in sorted(passed.items(), key=lambda one: one[1])))
    shutil.rmtree(ASKED)
    return said


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as in conftest.py
    print(renew())
