"""Triton's cache with a lock: one process compiles, the others read what it wrote; no death and no failure keeps anyone
waiting for ever."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import compile_once
from benchmarks.compile_once import WaitingCacheManager

ROOT = Path(compile_once.__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(key, compile):
    """What Triton does for a kernel."""
    manager = WaitingCacheManager(key)
    found = manager.get_group("kernel.json")
    if found is None:
        text = compile()
        found = {"kernel.json": manager.put(text, "kernel.json", binary=False)}
        manager.put_group("kernel.json", found)
    return Path(found["kernel.json"]).read_text()


def test_of_many_that_want_a_kernel_at_once_one_compiles():
    compiling, results = [], []

    def slow():
        compiling.append(1)
        time.sleep(0.3)
        return "code"

    threads = [threading.Thread(target=lambda: results.append(compiled("KEY", slow))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiling) == 1 and results == ["code"] * 6
    assert compiled("OTHER", lambda: "other") == "other"


def test_a_compilation_that_fails_lets_the_next_one_try():
    def fails():
        raise RuntimeError("does not compile")

    with pytest.raises(RuntimeError):
        compiled("KEY", fails)
    begin = time.monotonic()
    assert compiled("KEY", lambda: "code") == "code" and time.monotonic() - begin < 5


def test_a_lock_that_is_kept_is_waited_for_so_long_and_no_longer(monkeypatch):
    monkeypatch.setattr(compile_once, "WAIT", 0.3)
    keeper = WaitingCacheManager("KEY")
    assert keeper.get_group("kernel.json") is None
    begin = time.monotonic()
    assert compiled("KEY", lambda: "code") == "code" and 0.3 <= time.monotonic() - begin < 10


def test_a_process_that_dies_gives_its_lock_back(tmp_path):
    code = (
        "import os; from benchmarks.compile_once import WaitingCacheManager\n"
        "manager = WaitingCacheManager('KEY'); manager.get_group('kernel.json'); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)})
    begin = time.monotonic()
    assert done.returncode == 9 and compiled("KEY", lambda: "code") == "code" and time.monotonic() - begin < 5


def test_triton_takes_it_by_its_name():
    code = "from triton import knobs; print(knobs.cache.manager_class.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_MANAGER": "benchmarks.compile_once:WaitingCacheManager"},
    )
    assert done.stdout.strip() == "WaitingCacheManager", done.stderr
