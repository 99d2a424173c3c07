"""Saves of several processes: written by all, read by any number, whole after whatever fails."""
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.gloo_processes import needs_gloo, run_together
from tests.transfusion.train.kills import start_child
from tests.transfusion.train.saving_processes import (
    ADAPTERS,
    MODELS,
    STEPS,
    contents,
    fill,
    four,
    random_model,
    resumed,
    save_and_go_on,
    save_step_2,
    small_task,
    train,
)
from transfusion import Transfusion
from transfusion.command import saved_step
from transfusion.files import verify, whole
from transfusion.train import loop
from transfusion.train.transfusion import TrainConfig

pytestmark = needs_gloo
models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saves of one process and of two."""
    folder = tmp_path_factory.mktemp("saves")
    for name, options in MODELS.items():
        task = small_task(folder / f"one {name}", random_model(**options))
        train(task, (0, 1, 2, 3), STEPS)
        loop.save("train", task.config, task, STEPS)
    run_together(2, save_and_go_on, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What two processes found."""
    return torch.load(folder / "found.pt")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, x in found.items() if not torch.equal(x, expected[name])] == []


@models
def test_two_processes_go_on_to_the_bit_while_the_save_was_written_behind_their_backs(found, name):
    assert_equal(found[name, "loaded"], found[name, "saved"])
    assert found[name, "losses again"] == found[name, "losses"] and len(set(found[name, "losses"])) == 2


@models
def test_one_process_goes_on_from_what_two_saved(folder, found, name):
    task = resumed(folder / name, random_model(**MODELS[name]))
    assert_equal(contents(task), found[name, "saved"])
    assert train(task, (0, 1, 2, 3), 2) == pytest.approx(found[name, "losses"], rel=1e-5)


@models
def test_two_processes_go_on_from_what_one_saved(folder, found, name):
    assert_equal(found[name, "from one"], load_file(folder / f"one {name}" / "resume" / "state.safetensors"))


@models
def test_the_checkpoint_of_two_processes_is_that_of_one_with_averaged_weights(folder, found, name):
    ours, theirs = (load_file(folder / path / "model.safetensors") for path in (name, f"one {name}"))
    assert ours.keys() == theirs.keys() and {x.dtype for x in ours.values()} == {torch.float32}
    saved = found[name, "saved"]
    for kept, x in Transfusion.from_pretrained(folder / name).named_parameters():
        assert torch.equal(x, saved[f"averaged.{kept}" if f"averaged.{kept}" in saved else f"model.{kept}"])
        assert (f"averaged.{kept}" in saved) != kept.startswith(MODELS[name].get("frozen") or "nothing")
    for path in folder.joinpath(name).glob("*.json"):
        if path.name != "checksums.json":
            assert path.read_text() == (folder / f"one {name}" / path.name).read_text(), path.name


@pytest.mark.parametrize("name", [*MODELS, *ADAPTERS])
def test_one_process_writes_the_same_checkpoint_to_the_byte_of_what_two_saved(folder, tmp_path, name):
    task = resumed(folder / name, random_model(**(MODELS | ADAPTERS)[name]))
    task.config = TrainConfig(out=tmp_path / "run")
    loop.save("train", task.config, task, STEPS)
    files = {path.name for path in folder.joinpath(name).iterdir() if path.suffix == ".safetensors"}
    assert files == {"adapter_model.safetensors" if name in ADAPTERS else "model.safetensors"}
    for file in files:
        assert (folder / name / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_a_full_disk_of_one_process_is_said_in_a_line_by_the_main_one_and_the_older_save_stands(folder, found):
    assert found["full disk"].startswith("SaveError: the save of 2 steps failed: ")
    said = (folder / "said 0").read_text().split("\n")
    assert [line for line in said if line] == [
        found["full disk"].removeprefix("SaveError: ") + "; that of 1 steps stands"]
    assert "No space left on device" in found["full disk"] and not (folder / "said 1").read_text()
    assert saved_step(folder / "full") == 1 and not list(folder.joinpath("full").glob(".sav*"))
    Transfusion.from_pretrained(folder / "full")


def test_shards_that_the_main_process_cannot_read_back_fail_the_save_in_all(found, folder):
    """`found` is of the main process; the other one would wait for it in the next save."""
    assert found["unreadable"].startswith("SaveError: the save of 2 steps failed: __1_0.distcp")
    assert (folder / "unread 0").read_text().strip().endswith("that of 1 steps stands")
    assert not (folder / "unread 1").read_text()


def test_what_is_not_finite_in_one_process_is_saved_by_none(found, folder):
    assert "tensors are not finite (averaged." in found["not finite"] and saved_step(folder / "full") == 1


def test_a_damaged_shard_is_refused_by_name(folder, tmp_path):
    shutil.copytree(folder / "tied", tmp_path / "run")
    path = tmp_path / "run" / "resume" / "state" / "__1_0.distcp"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="__1_0.distcp is damaged"):
        resumed(tmp_path / "run", random_model(**MODELS["tied"]))


def test_a_shard_that_is_gone_is_named(folder, tmp_path):
    shutil.copytree(folder / "tied", tmp_path / "run")
    (tmp_path / "run" / "resume" / "state" / "__1_0.distcp").unlink()
    with pytest.raises(OSError, match="__1_0.distcp"):
        resumed(tmp_path / "run", random_model(**MODELS["tied"]))


def test_a_save_of_one_process_takes_the_place_of_one_in_shards(folder, tmp_path):
    shutil.copytree(folder / "tied", tmp_path / "run")
    task = resumed(tmp_path / "run", random_model(**MODELS["tied"]))
    loop.save("train", task.config, task, STEPS)
    assert sorted(path.name for path in (tmp_path / "run" / "resume").iterdir()) == ["checksums.json", "run.json",
                                                                                   "state.safetensors"]
    assert_equal(contents(resumed(tmp_path / "run", random_model(**MODELS["tied"]))), contents(task))


def test_four_processes_go_on_from_what_two_saved_and_one_from_what_they_save(folder, found):
    run_together(4, four, folder)
    ours = torch.load(folder / "found-4.pt")
    for name in MODELS:
        assert_equal(ours[name, "loaded"], found[name, "saved"])
    assert ours["losses"] == pytest.approx(found["tied", "losses"], rel=1e-5)
    assert_equal(contents(resumed(folder / "of four", random_model(**MODELS["tied"]))), found["tied", "saved"])


def outcome(children):
    """Exit statuses of processes; what waits longer than it may for one that died is killed, too."""
    status, since = {}, time.monotonic() + 270  # when the first died; none of them may take five minutes
    while len(status) < len(children):
        for pid in set(children) - set(status):
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                status[pid], since = os.waitstatus_to_exitcode(code), min(since, time.monotonic())
            elif time.monotonic() - since > 30:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [status[pid] for pid in children]


def read(out):
    """The step of a save and what all its weights are, in hundredths, for resuming and for `from_pretrained`."""
    task = small_task(out, random_model())
    step = loop.restore(task.config, task.players, ())
    weights = {round(100 * x.mean().item()) for name, x in contents(task).items() if name.startswith("averaged.")}
    return step, weights | {round(100 * p.mean().item()) for p in Transfusion.from_pretrained(out).parameters()}


@pytest.mark.parametrize("rank,every", [(0, 15), (1, 1)])
def test_a_kill_of_either_process_at_any_call_of_a_save_leaves_a_whole_older_or_newer_one(tmp_path, rank, every):
    model = random_model()
    task = small_task(tmp_path / "first", model)
    fill(task, 1)
    loop.save("train", task.config, task, 1)
    steps, kill_at, ended = [], 0, False
    while not ended:
        place = tmp_path / str(kill_at)
        shutil.copytree(tmp_path / "first", place / "run")
        codes = outcome([start_child(lambda one=one, at=place: save_step_2(one, at, model),
                                     kill_at if one == rank else None) for one in range(2)])
        ended = codes == [0, 0]
        assert ended or codes[rank] == 9
        step, weights = read(place / "run")
        assert weights == {step}
        with whole(place / "run") as directory:
            verify(directory)
        steps.append(step)
        kill_at += every
    assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 2 and len(steps) > 3
