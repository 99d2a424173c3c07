"""What tests/remembered.py remembers of tests that have passed."""
import shutil
from types import SimpleNamespace

import pytest

from tests import remembered


@pytest.fixture
def passes(monkeypatch, tmp_path):
    """A function that says whether a test with some body is run where the tests `known` have passed."""
    monkeypatch.setattr(remembered, "ASKED", tmp_path / "asked")
    monkeypatch.setattr(remembered, "sources", lambda: "sources")

    def run(name: str, known: set[str], one_in: int = 16, fails: bool = False) -> bool:
        monkeypatch.setattr(remembered, "known", lambda: {key(one) for one in known})
        monkeypatch.setattr(remembered, "RUN", one_in)
        try:
            with remembered.unless_known(name):
                assert not fails, "fails"
                return True
        except pytest.skip.Exception:
            return False
    return run


def key(name: str) -> str:
    return remembered.key_of(name, "sources", remembered.versions())


NAME = next(name for name in map(str, range(99)) if int(key(name), 16) % 16)
SEVENTEENTH = next(name for name in map(str, range(999)) if not int(key(name), 16) % 16)


def test_what_is_known_to_pass_is_not_run_and_one_in_sixteen_is(passes):
    assert passes(NAME, known=set()) and not passes(NAME, known={NAME}) and passes(NAME, known={"another"})
    assert passes(SEVENTEENTH, known={SEVENTEENTH}) and passes(NAME, known={NAME}, one_in=1)


def test_a_pass_is_noted_and_a_failure_is_not(passes):
    passes(NAME, known=set())
    assert [(file.name, file.read_text()) for file in remembered.ASKED.iterdir()] == [(key(NAME), NAME)]
    shutil.rmtree(remembered.ASKED)
    with pytest.raises(AssertionError, match="fails"):
        passes(NAME, known=set(), fails=True)
    assert not remembered.ASKED.exists()
    passes(NAME, known={NAME}, fails=True)
    assert [file.name for file in remembered.ASKED.iterdir()] == [key(NAME)], "what is known stays known"


def test_what_has_passed_as_the_sources_are_is_written_and_what_passed_before_they_changed_is_not(
        passes, monkeypatch, tmp_path):
    monkeypatch.setattr(remembered, "PASSED", tmp_path / "passed.txt")
    with pytest.raises(SystemExit, match="no test that has passed with these sources; run make test"):
        remembered.renew()
    passes("b c", known=set())
    passes("a", known={"gone"})
    remembered.note("0123", "of other sources")
    assert remembered.renew().endswith("2 tests, 2 of them new; 1 have gone")
    assert remembered.PASSED.read_text() == f"{key('a')} a\n{key('b c')} b c\n" and not remembered.ASKED.exists()


def test_what_triton_compiles_by_is_seen(monkeypatch):
    found = set()
    for value in ("0", "1"):
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", value)
        found.add(remembered.versions())
    assert len(found) == 2


def test_a_change_of_any_source_is_seen(tmp_path):
    for source in ("tfkernels/a.py", "tfkernels/b/c.py", "ptxrun/d.py", "tests/tfkernels/e.py", "tests/ptxrun/f.py"):
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source).write_text(source)
    for source in remembered.SOURCES:
        if source.endswith(".py"):
            (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / source).write_text(source)
    found = [remembered.sources(tmp_path)]
    for source in tmp_path.rglob("*.py"):
        source.write_text("changed")
        remembered.sources.cache_clear()
        found.append(remembered.sources(tmp_path))
    (tmp_path / "tfkernels" / "a.py").rename(tmp_path / "tfkernels" / "z.py")
    remembered.sources.cache_clear()
    assert len({*found, remembered.sources(tmp_path)}) == len(found) + 1 == len(list(tmp_path.rglob("*.py"))) + 2 == 15
    before = remembered.sources(tmp_path)
    (tmp_path / "tests/tfkernels/integrations").mkdir()
    (tmp_path / "tests/tfkernels/integrations/test_others.py").write_text("new")
    remembered.sources.cache_clear()
    assert remembered.sources(tmp_path) == before, "none of these tests looks into it"
    remembered.sources.cache_clear()


FILE = "tests/tfkernels/test_names.py"


@pytest.fixture
def left_out(monkeypatch, tmp_path):
    """A function that runs a file's tests under the plugin, and returns which it leaves out."""
    monkeypatch.setattr(remembered, "ASKED", tmp_path / "asked")
    monkeypatch.setattr(remembered, "sources", lambda: "sources")

    def run(known: list[str], file: str = FILE, exitstatus: int = 0, args: tuple = ("tests/tfkernels",), worker=False,
            interpreted=True, **options) -> list[str]:
        plugin, left = remembered.RememberedFiles(interpreted), []
        monkeypatch.setattr(remembered, "known", lambda: {plugin.key(one) for one in known})
        items = [SimpleNamespace(nodeid=f"{file}::test_{i}") for i in range(160)]
        for item in items:
            item.add_marker = lambda marker, nodeid=item.nodeid: left.append(nodeid)
        plugin.pytest_collection_modifyitems(items)
        for item in items:
            plugin.pytest_runtest_logreport(item)
        asked = {"keyword": "", "markexpr": "", "deselect": None, "lf": False, "stepwise": False, **options}
        config = SimpleNamespace(getoption=asked.get, args=args, **{"workerinput": {}} if worker else {})
        plugin.pytest_sessionfinish(SimpleNamespace(config=config), exitstatus)
        return left
    return run


def test_tests_of_a_file_that_passed_are_left_out_but_for_one_in_sixteen(left_out):
    assert left_out(known=[]) == []
    left = left_out(known=[FILE])
    assert 140 <= len(left) == len(set(left)) < 160 and left == left_out(known=[FILE])
    assert left_out(known=["tests/tfkernels/test_grids.py"]) == []


@pytest.mark.parametrize("file,interpreted", [
    ("tests/tfkernels/integrations/test_transformers.py", True), ("tests/transfusion/test_cli.py", True),
    ("tests/tfkernels/losses/test_diffusion_loss.py", True), (FILE, False)])
def test_files_that_look_at_more_than_the_kernels_are_not_remembered(left_out, file, interpreted):
    assert left_out(known=[], file=file, interpreted=interpreted) == []
    assert remembered.RememberedFiles(interpreted).key(file) is None and not remembered.ASKED.exists()


def test_files_of_the_emulator_are_remembered_whether_kernels_are_interpreted_or_not(left_out):
    for file in remembered.EMULATOR:
        assert left_out(known=[file], file=file, interpreted=False) and (remembered.ROOT / file).is_file()
        keys = {remembered.RememberedFiles(interpreted).key(file) for interpreted in (True, False)}
        assert len(keys) == 2 and None not in keys


def test_a_file_has_passed_once_all_of_it_has(left_out):
    for part in (dict(exitstatus=1), dict(keyword="softcap"), dict(markexpr="slow"), dict(deselect=["x"]),
                 dict(lf=True), dict(stepwise=True), dict(worker=True), dict(args=(f"{FILE}::test_1",))):
        left_out(known=[], **part)
        assert not remembered.ASKED.exists(), part
    left_out(known=[])
    names = [file.read_text() for file in remembered.ASKED.iterdir()]
    assert names == [f"interpreted, {FILE}"]
    shutil.rmtree(remembered.ASKED)
    left_out(known=[FILE])
    assert [file.read_text() for file in remembered.ASKED.iterdir()] == names, "what is known stays known"
