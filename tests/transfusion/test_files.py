"""Saves: whole after a kill at any file call, one writer at a time, damage named, modes as umask says."""
import copy
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.transfusion.conftest import tiny_model
from tests.transfusion.model.test_from_language_model import language_model
from tests.transfusion.train.kills import in_a_child
from tests.transfusion.train.test_transfusion import small
from transfusion import Transfusion
from transfusion.eval.features import Features
from transfusion.files import (
    check_writable,
    checksum,
    checksums,
    current,
    load_tensors,
    read_json,
    read_json_lines,
    replacing,
    settle,
    verify,
    whole,
    written,
)
from transfusion.locks import locked
from transfusion.model.from_language_model import InitSettings, init
from transfusion.model.lora import TuneSettings, prepare
from transfusion.model.vae import VAE
from transfusion.recipes.studies.vq import VQRun, VQSettings, VQTask, load_autoencoder, to_codes
from transfusion.train import loop
from transfusion.train.average import trained_parameters
from transfusion.train.classifier import ClassifierRun, ClassifierSettings, ClassifierTask, build_network
from transfusion.train.transfusion import TransfusionTask


def autoencoder(scale=1.0):
    torch.manual_seed(int(10 * scale))
    return VAE(AutoencoderKL(in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(4,),
                             layers_per_block=1, norm_num_groups=2, sample_size=8,
                             down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
                             scaling_factor=scale))


def changed(model, weight=7.0):
    """Another model of the same shape: other weights, another setting, another vocabulary."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.config.diffusion_weight = weight
    other.tokenizer.add_tokens(["another"])
    return other


def kill_everywhere(out, save, read, older, newer, every=1):
    """Kill `save` into `out` at every call: what `read` finds is the older or the newer save, and nothing is left over.

    Once it is the newer one, it stays so.
    """
    kept, clean, found, kill_at = out.with_name("kept"), out.with_name("clean"), [], 0
    shutil.copytree(out, kept)
    shutil.copytree(out, clean)
    save(clean)
    names = {str(path.relative_to(clean)) for path in clean.rglob("*")}
    while True:
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        ended = in_a_child(lambda: save(out), kill_at) == 0
        found.append(read(out))
        assert found[-1] in (older, newer), f"killed at call {kill_at}"
        if ended:
            break
        save(out)
        assert {str(path.relative_to(out)) for path in out.rglob("*")} == names, f"killed at call {kill_at}"
        kill_at += every
    assert (found == [older] * found.count(older) + [newer] * found.count(newer) and found[0] == older
            and found[-1] == newer)
    assert len(found) * every > 25 and found.count(newer) > 2


def contents(model):
    """What a model is made of, comparable."""
    return (model.config.diffusion_weight, len(model.tokenizer), model.vae and model.vae.scale,
            {name: p.double().sum().item() for name, p in model.named_parameters()})


def read_model(path):
    return contents(Transfusion.from_pretrained(path))


@pytest.mark.parametrize("shards", ["", "older", "newer"])
def test_a_kill_at_any_call_of_a_save_leaves_the_older_or_the_newer_model(tmp_path, shards):
    older, out = tiny_model(), tmp_path / "model"
    newer = changed(older)
    if not shards:
        older.vae, newer.vae = autoencoder(1.0), autoencoder(2.0)
    sizes = {name: {"max_shard_size": "40KB"} if shards == name else {} for name in ("older", "newer")}
    older.save_pretrained(out, **sizes["older"])
    assert (len(list(out.glob("model-*-of-*.safetensors"))) > 1) == (shards == "older")
    kill_everywhere(out, lambda path: newer.save_pretrained(path, **sizes["newer"]), read_model, contents(older),
                    contents(newer), 4 if shards else 2)
    assert ((len(list(out.glob("model-*-of-*.safetensors"))) > 1) == (shards == "newer")
            and (out / "model.safetensors").exists() != (shards == "newer"))
    assert contents(AutoModel.from_pretrained(out)) == contents(newer)


def test_a_kill_at_any_call_of_a_first_save_leaves_nothing_or_the_model(tmp_path):
    model, kill_at, found = tiny_model(), 0, []
    while True:
        out = tmp_path / str(kill_at)
        ended = in_a_child(lambda: model.save_pretrained(out), kill_at) == 0  # noqa: B023
        try:
            found.append(read_model(out) == contents(model))
        except ValueError as error:
            assert "holds no config.json" in str(error)
            found.append(None)
        if ended:
            break
        kill_at += 4
    assert found == [None] * found.count(None) + [True] * found.count(True) and None in found and found[-1]


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_a_kill_at_any_call_of_a_runs_save_leaves_checkpoint_and_resume_state_of_one_step(tmp_path, trained):
    start = init(InitSettings(llm=language_model(tmp_path / "llm", "llama"), out=tmp_path / "start", image_channels=1,
                              image_size=(8, 8)))
    config = small(tmp_path / "run", tune=TuneSettings(start=start, trained=trained, lora_rank=2))
    model = prepare(Transfusion.from_pretrained(start), config.tune)
    task = TransfusionTask(config, None, model, model)

    def save(step, out):
        with torch.no_grad():
            for x in (*trained_parameters(model).values(), *task.player.averaged.tensors.values()):
                x.fill_(step / 100)
        loop.save("train", dataclasses.replace(config, out=out), task, step)

    def read(out):
        with whole(out) as directory:
            tensors = load_tensors(directory / "resume" / "state.safetensors")
            state = next(x
                         for name, x in tensors.items()
                         if name.startswith("model.") and "image_head" in name and name.endswith("linear.weight"))
            step = read_json(directory / "resume" / "run.json")["step"]
        head = Transfusion.from_pretrained(out).image_head.linear.weight
        return step, round(100 * state.mean().item()), round(100 * head.mean().item())

    save(1, config.out)
    kill_everywhere(config.out, lambda out: save(2, out), read, (1, 1, 1), (2, 2, 2), every=5)


def test_a_kill_at_any_call_of_a_save_leaves_the_older_or_the_newer_autoencoder_and_classifier(tmp_path):
    autoencoder(1.0).save_pretrained(tmp_path / "vae" / "out")
    kill_everywhere(tmp_path / "vae" / "out", autoencoder(2.0).save_pretrained,
                    lambda path: VAE.from_pretrained(path).fingerprint(), autoencoder(1.0).fingerprint(),
                    autoencoder(2.0).fingerprint(), every=2)
    autoencoders = [(VQRun(settings=VQSettings(channels=(8,), codes=4, batch=1, steps=3), seed=seed), VQTask)
                    for seed in (0, 1)]
    judges = [(ClassifierRun(settings=ClassifierSettings(size=8, width=4, depths=(1,), batch=1, steps=3, seed=seed),
                             labels=("a", "b"), pictures=(seed,)),
               lambda run, images: ClassifierTask(run, images, torch.zeros(1).long(),
                                                  build_network(1, run.labels, run.settings))) for seed in (0, 1)]
    picture = torch.zeros(1, 1, 8, 8)
    for name, runs, read in (("vq", autoencoders, lambda path: to_codes(load_autoencoder(path), picture).tolist()),
                             ("judge", judges, lambda path: Features.from_pretrained(path).logits(picture).tolist())):
        out, tasks = tmp_path / name / "out", [build(run, picture) for run, build in runs]

        def save(number, out, runs=runs, tasks=tasks):
            loop.save("train", dataclasses.replace(runs[number][0], out=out), tasks[number], 3)

        save(0, out)
        save(1, tmp_path / name / "other")
        older, newer = (read(path) for path in (out, tmp_path / name / "other"))
        assert older != newer
        kill_everywhere(out, lambda path, save=save: save(1, path), read, older, newer, every=4)


def test_an_interrupted_replacement_is_read_without_writing_and_finished_by_the_next_writer(tmp_path):
    older, newer = tiny_model(), changed(tiny_model())
    older.save_pretrained(tmp_path)
    kill_at = 0
    while not (tmp_path / ".saved" / "journal.json").exists():
        kill_at += 1
        in_a_child(lambda: newer.save_pretrained(tmp_path), kill_at)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    assert read_model(tmp_path) == contents(newer)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes())
                      for path in tmp_path.rglob("*") if path.is_file()}
    assert json.loads(current(tmp_path, "config.json").read_text())["diffusion_weight"] == 7.0
    settle(tmp_path)
    assert not (tmp_path / ".saved").exists() and contents(AutoModel.from_pretrained(tmp_path)) == contents(newer)


def test_a_save_that_fails_leaves_the_older_one_and_no_file_of_its_own(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="no weights"), replacing(tmp_path) as fresh:
        (fresh / "config.json").write_text("{}")
        raise RuntimeError("no weights")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with replacing(tmp_path):
        pass  # nothing was written: nothing is replaced
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_save_leaves_the_file_that_a_living_process_is_writing_beside_it_and_takes_that_of_a_dead_one(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".new-{dead.pid}@{socket.gethostname()}-page.html").touch()
    theirs, old = (tmp_path / f".new-{dead.pid}@{host}-page.html" for host in ("another", "older"))
    theirs.touch()
    old.touch()
    os.utime(old, (0, 0))
    drawing = tmp_path / ".new-drawing-0-report.html"
    drawing.mkdir()
    os.utime(drawing, (0, 0))
    with written(tmp_path / "report.html") as aside:
        aside.write_text("a report")
        with replacing(tmp_path) as fresh:
            (fresh / "config.json").write_text("{}")
    assert (tmp_path / "report.html").read_text() == "a report"
    drawing.rmdir()
    assert list(tmp_path.glob(".new-*")) == [theirs]  # it may be writing still: its processes are not seen from here


def test_files_of_other_names_stay_and_those_of_the_older_save_go(tmp_path):
    older, newer = tiny_model(), tiny_model()
    older.vae = autoencoder()
    older.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "notes.txt").write_text("kept")
    newer.save_pretrained(tmp_path, variant="half")
    assert (tmp_path / "model.safetensors.index.json").exists() and (tmp_path / "model.half.safetensors").exists()
    assert checksums(tmp_path) == {path.name: checksum(path) for path in tmp_path.glob("*.safetensors")}  # of both
    newer.save_pretrained(tmp_path)
    assert Transfusion.from_pretrained(tmp_path).vae is None and (tmp_path / "notes.txt").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {
        "checksums.json", "config.json", "generation_config.json", "model.safetensors", "notes.txt", "tokenizer.json",
        "tokenizer_config.json"}


def test_options_of_transformers_keep_working(tmp_path, monkeypatch):
    model, pushed = tiny_model(), []
    model.save_pretrained(tmp_path / "given", state_dict={name: x + 1 for name, x in model.state_dict().items()},
                          safe_serialization=True)
    assert torch.equal(Transfusion.from_pretrained(tmp_path / "given").timestep.mlp[0].weight,
                       model.timestep.mlp[0].weight + 1)
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()
    monkeypatch.setattr(Transfusion, "push_to_hub", lambda self, repo_id, **options: pushed.append((repo_id, options)))
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True, token="t")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/other")
    assert pushed == [("mine", {"private": True, "token": "t"}), ("me/other", {})]


def test_a_path_that_is_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="save_pretrained: path is .*file', which is a file; a directory fits"):
        tiny_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("mask,mode", [(0o022, 0o644), (0o027, 0o640)])
def test_saved_files_can_be_read_as_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        model = tiny_model()
        model.vae = autoencoder()
        model.save_pretrained(tmp_path / "model")
        with written(tmp_path / "one.safetensors") as aside:
            save_file({"x": torch.ones(2)}, aside)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777)
            for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_mode & 0o777 != mode} == {}


def test_files_and_directories_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    calls, fsync, rename, replace = [], os.fsync, os.rename, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (calls.append(("sync", os.readlink(f"/proc/self/fd/{handle}"))), fsync(handle))[1]
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(("rename", str(a))), rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("rename", str(a))), replace(a, b))[1])
    tiny_model().save_pretrained(tmp_path)
    fresh = str(tmp_path / ".saving")
    before = calls[:calls.index(("rename", fresh))]
    assert {("sync", fresh),
            *(("sync", f"{fresh}/{name}")
              for name in ("config.json", "model.safetensors", "tokenizer.json", "journal.json"))} <= set(before)
    assert ("sync", str(tmp_path)) in calls[len(before):]
    calls.clear()
    with written(tmp_path / "x.json") as aside:
        aside.write_text("{}")
    assert [kind for kind, _ in calls] == ["sync", "rename", "sync"] and calls[-1][1] == str(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_a_flipped_bit_is_refused_by_the_files_name_and_other_programs_weights_load_unchecked(tmp_path, name):
    model = tiny_model()
    model.vae = autoencoder()
    model.save_pretrained(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-5] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is damaged .its checksum is"):
        Transfusion.from_pretrained(tmp_path)
    (tmp_path / name).with_name("checksums.json").unlink()
    Transfusion.from_pretrained(tmp_path)


@pytest.mark.parametrize("name,damage",
                         [("model.safetensors", lambda data: data[:len(data) // 2]),
                          ("model.safetensors", lambda data: b""), ("config.json", lambda data: data[:40]),
                          ("config.json", lambda data: b"[1]"), ("config.json", lambda data: b"\xff\xfe\x00"),
                          ("tokenizer.json", lambda data: data[:-100]),
                          ("tokenizer.json", lambda data: b'{"version": "1.0", "model": {"type": "none"}}'),
                          ("checksums.json", lambda data: b"{")])
def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path, name, damage):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"{tmp_path / name} (is damaged|cannot be read)") as refused:
        Transfusion.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_checksums_are_crc32_of_the_files_that_stand_there(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert checksums(tmp_path) == {
        "model.safetensors": f"{zlib.crc32((tmp_path / 'model.safetensors').read_bytes()):08x}"
    }
    verify(tmp_path)
    assert set(load_tensors(tmp_path / "model.safetensors")) == set(load_file(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="none.safetensors is missing"):
        load_tensors(tmp_path / "none.safetensors")


def test_a_lock_names_its_holder_dies_with_it_and_leaves_nothing(tmp_path):
    out = tmp_path / "new" / "run"
    code = ("import sys, time\nfrom transfusion.locks import locked\n"
            "with locked(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(300)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"run' is in use by process {holder.pid} on "), locked(out):
            pass
        with pytest.raises(ValueError, match="is in use by process"):
            tiny_model().save_pretrained(out)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(out), locked(out):  # its holder may take it again
        assert (out / ".lock").exists()
    assert not (out / ".lock").exists()
    shutil.rmtree(tmp_path / "new")
    with locked(out):
        pass
    assert not (tmp_path / "new").exists()  # a directory made for nothing


def test_a_lock_is_not_held_by_the_children_of_its_holder(tmp_path):
    code = ("import os, sys, time\nfrom transfusion.locks import locked\nwith locked(sys.argv[1]):\n"
            "    if not os.fork():\n        print(os.getpid(), flush=True)\n    time.sleep(300)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match="is in use by process"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives
        with locked(tmp_path):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_who_waits_for_a_lock_gets_it(tmp_path):
    began, waiting = (time.monotonic(),
                      "from transfusion.locks import locked\nimport sys\nwith locked(sys.argv[1], wait=True):\n    "
                      "print('got it')")
    with locked(tmp_path):
        process = subprocess.Popen([sys.executable, "-c", waiting, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
        except BaseException:
            process.kill()
            raise
    assert process.communicate(timeout=120)[0] == "got it\n" and time.monotonic() - began > 0.5


def test_a_directory_that_cannot_be_made_or_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "inside", "/proc/none"):
        with pytest.raises(ValueError, match="sample: .* cannot be written into"):
            check_writable("sample", path)


def test_json_lines_end_where_a_new_line_stands_and_nowhere_else(tmp_path):
    """U+2028 ends a line of text for Python, and stands unescaped in strings of JSON."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\u2028two"}\n\n{"prompt": "three"}\n', encoding="utf-8")
    assert list(read_json_lines(tmp_path / "a.jsonl")) == [
        (f"{tmp_path / 'a.jsonl'}, line 1", {"prompt": "one\u2028two"}),
        (f"{tmp_path / 'a.jsonl'}, line 3", {"prompt": "three"})]


def test_lines_of_json_may_begin_with_a_byte_order_mark_and_what_is_not_utf_8_is_named_with_its_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": "\xe4"}\n')
    lines = read_json_lines(path)
    assert next(lines)[1] == {"a": 1}
    with pytest.raises(ValueError, match=r"lines.jsonl, line 2 is not UTF-8; save the file as UTF-8"):
        next(lines)
