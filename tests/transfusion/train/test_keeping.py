"""Saves that stay beside the newest: which ones, what room they take, what a kill leaves, and how a run goes on."""
import dataclasses
import errno
import json
import os
import shutil

import pytest

from tests.transfusion.train.kills import in_a_child
from tests.transfusion.train.test_transfusion import losses, small
from transfusion import Transfusion
from transfusion.command import saved_step
from transfusion.files import settle, verify
from transfusion.train.keeping import kept_steps, save_place
from transfusion.train.transfusion import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 steps, saved every 2, whose two newest saves stay, and every 6th for good."""
    out = tmp_path_factory.mktemp("run")
    train(small(out, save_every=2, keep_last=2, keep_every=6))
    return out


def test_saves_that_never_come_cannot_stay(tmp_path):
    with pytest.raises(ValueError, match="keep_every is 3; a multiple of save_every, 2, fits"):
        train(small(tmp_path, save_every=2, keep_every=3))


def test_the_last_saves_stay_and_every_nth_for_good(run):
    assert kept_steps(run) == [6, 10, 12]
    assert sorted(path.name for path in (run / "steps").iterdir()) == ["00000006", "00000010", "00000012"]


def test_each_is_a_checkpoint_and_the_newest_takes_no_room_of_its_own(run):
    heads = [Transfusion.from_pretrained(path).image_head.linear.weight.mean().item()
             for path in (run, run / "steps" / "00000012", run / "steps" / "00000006")]
    assert heads[0] == heads[1] != heads[2]
    for step in kept_steps(run):
        place = run / "steps" / f"{step:08d}"
        verify(place)
        assert saved_step(place) == step
        same = [os.path.samefile(path, run / path.relative_to(place)) for path in place.rglob("*") if path.is_file()]
        assert all(same) if step == 12 else not any(same)


def test_a_run_goes_on_from_an_older_save_as_it_did_before(run):
    config = small(run / "steps" / "00000006", save_every=2, resume=True)
    before = (run / "model.safetensors").read_bytes()
    train(config)
    assert losses(config.out) == losses(run)[6:]
    assert (config.out / "model.safetensors").read_bytes() == before == (run / "model.safetensors").read_bytes()


def test_a_save_that_cannot_be_removed_whole_ends_no_run(tmp_path, monkeypatch):
    """NFS keeps the files of a directory that somebody reads, and so the directory."""
    rmdir = os.rmdir

    def kept(path, *arguments, **options):
        if os.path.basename(os.fspath(path)).startswith(".new-"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        return rmdir(path, *arguments, **options)

    monkeypatch.setattr(os, "rmdir", kept)
    train(small(tmp_path, save_every=2, keep_last=1, stop_after=8))
    assert kept_steps(tmp_path) == [8] and saved_step(tmp_path) == 8
    assert list((tmp_path / "steps").glob(".new-*"))
    monkeypatch.undo()
    train(small(tmp_path, save_every=2, keep_last=1, resume=True, stop_after=10))
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["00000010"]


def test_a_run_that_went_on_from_a_save_is_never_removed_with_it(tmp_path, capsys):
    train(small(tmp_path, save_every=2, keep_last=2, stop_after=6))
    branch = tmp_path / "steps" / "00000004"
    train(small(branch, save_every=2, resume=True, stop_after=8))
    train(small(tmp_path, save_every=2, keep_last=1, resume=True, stop_after=8))
    assert saved_step(branch) == 8 and len(losses(branch)) == 4 and kept_steps(tmp_path) == [4, 8]
    with save_place(small(tmp_path, save_every=2, keep_last=1), 4) as fresh:
        (fresh / "config.json").write_text("{}")
    assert saved_step(branch) == 8 and "holds another run, which stays" in capsys.readouterr().out


def test_a_run_that_was_put_back_to_an_older_save_keeps_its_own_saves(tmp_path):
    train(small(tmp_path, save_every=3, keep_every=3))
    before = {step: (tmp_path / "steps" / f"{step:08d}" / "model.safetensors").read_bytes() for step in (6, 9)}
    shutil.copytree(tmp_path / "steps" / "00000006", tmp_path, dirs_exist_ok=True)
    config = small(tmp_path, save_every=3, keep_every=3, resume=True, stop_after=9)
    train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-2)))
    newest = (tmp_path / "model.safetensors").read_bytes()
    kept = {step: (tmp_path / "steps" / f"{step:08d}" / "model.safetensors").read_bytes() for step in (6, 9)}
    assert kept == {6: before[6], 9: newest} and newest != before[9]


def test_saves_behind_the_one_that_a_run_was_put_back_to_are_not_its_own(tmp_path):
    for step in (8, 10, 12, 11):
        with save_place(small(tmp_path, keep_last=2), step) as fresh:
            (fresh / "config.json").write_text("{}")
    assert kept_steps(tmp_path) == [10, 11, 12]


def test_without_the_flags_nothing_but_the_newest_save_stays(tmp_path):
    train(small(tmp_path, save_every=6))
    assert not (tmp_path / "steps").exists()


def test_a_kill_at_any_call_leaves_whole_saves_alone_and_the_next_one_clears_up(tmp_path):
    config = small(tmp_path, keep_last=2)

    def save(step, out):
        with save_place(dataclasses.replace(config, out=out), step) as fresh:
            (fresh / "resume").mkdir()
            (fresh / "resume" / "run.json").write_text(json.dumps({"step": step}))
            (fresh / "config.json").write_text(str(step))

    kill_at, ended, seen = 0, False, []
    while not ended:
        out = tmp_path / str(kill_at)
        for step in (1, 2):
            save(step, out)
        ended = in_a_child(lambda: save(3, out), kill_at) == 0  # noqa: B023
        settle(out)
        steps = kept_steps(out)
        assert all((out / "steps" / f"{step:08d}" / "config.json").read_text() == str(step) == str(
            saved_step(out / "steps" / f"{step:08d}")) for step in steps)
        assert set(steps) >= {2, saved_step(out)} and str(saved_step(out)) == (out / "config.json").read_text()
        seen.append(saved_step(out))
        save(4, out)
        assert kept_steps(out)[-1] == 4 and len(kept_steps(out)) == 2
        assert not [path for path in (out / "steps").iterdir() if not path.name.isdigit()]
        kill_at += 3
    assert seen == sorted(seen) and set(seen) == {2, 3}
