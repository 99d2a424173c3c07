"""What the journal of a save may name: places inside of its directory, for it may come from somebody else."""
import json

import pytest

from tests.transfusion.conftest import tiny_model
from transfusion import Transfusion
from transfusion.files import settle


@pytest.fixture
def planted(tmp_path):
    """A function that gives a checkpoint a journal, and the directory above it."""
    def plant(**journal):
        out = tmp_path / "model"
        tiny_model().save_pretrained(out)
        (out / ".saved").mkdir()
        names = [path.name for path in out.iterdir() if path.is_file()]
        said = {"files": names, "obsolete": [], "keep": None} | journal
        (out / ".saved" / "journal.json").write_text(json.dumps(said))
        (tmp_path / "victim.txt").write_text("mine")
        return out
    return plant


@pytest.mark.parametrize("journal", [
    {"files": ["config.json", "../planted.json"]}, {"files": ["a/../../planted.json"]}, {"files": ["/planted.json"]},
    {"obsolete": ["../victim.txt"]}, {"keep": "../kept"}, {"keep": ""}, {"files": [""]}])
def test_a_journal_that_names_a_place_outside_is_refused_and_nothing_is_touched(planted, tmp_path, journal):
    out = planted(**journal)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for use in (Transfusion.from_pretrained, settle):
        with pytest.raises(ValueError, match="journal.json names a place outside of its directory"):
            use(out)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "victim.txt").read_text() == "mine"


@pytest.mark.parametrize("journal", [{"files": 3}, {"files": [3]}, {"obsolete": None}])
def test_a_journal_that_is_none_is_named(planted, journal):
    with pytest.raises(ValueError, match="journal.json is damaged"):
        settle(planted(**journal))


def test_a_save_that_waits_is_still_finished(planted):
    out = planted(obsolete=["gone.safetensors"], keep=None)
    Transfusion.from_pretrained(out)
    settle(out)
    assert not (out / ".saved").exists()
    Transfusion.from_pretrained(out)
