"""Latents encoded ahead: what is kept, kills at any moment, changed files, and how training draws from them."""
import functools
import json
import multiprocessing
import os
import pickle
import signal

import pytest
import torch
from diffusers import AutoencoderKL

from tests.transfusion.data.memory import kind_of, picture, tokenizer_of_words
from tests.transfusion.train.kills import in_a_child
from transfusion.cli import main
from transfusion.data import posteriors
from transfusion.data.loader import Failure, Loader, packed_rows
from transfusion.data.mixture import open_mixture, read_mixture
from transfusion.data.posteriors import PosteriorSettings, RoundingError, encode_mixture
from transfusion.data.sources.record import PictureFile, PictureRef
from transfusion.data.stored_latents import PosteriorStore, shard_paths
from transfusion.model.vae import VAE

SIZE = (16, 16)


def autoencoder_in(path, seed=0):
    torch.manual_seed(seed)
    model = AutoencoderKL(in_channels=3, out_channels=3, latent_channels=2, block_out_channels=(4, 4),
                          layers_per_block=1, norm_num_groups=2, scaling_factor=0.7,
                          down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.1, mid_block_add_attention=False)
    VAE(model).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return autoencoder_in(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def mixture_file(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.png").write_bytes(picture(i, 16, 16).file)
        (folder / f"{i}.txt").write_text(f"the red dog {i}")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:120])    # its header can be read
    return write_mixture(tmp_path)


def write_mixture(folder, **settings):
    file = folder / "mix.json"
    file.write_text(json.dumps({"pictures": {"side": 16}, "held_out": 0.0, **settings,
                                "sources": [{"format": "imagefolder", "path": "pictures"}]}))
    return file


def settings_of(vae, out, **options):
    defaults = dict(workers=0, shard=3, batch=2, device="cpu", dtype="float32")
    return PosteriorSettings(vae, out, **{**defaults, **options})


def reference(path):
    return PictureRef(PictureFile(str(path)), True)


def opened(file, **options):
    tokenizer = tokenizer_of_words()
    kind = kind_of(tokenizer, channels=2, patch_size=2)
    return open_mixture(read_mixture(file), tokenizer, kind, folder=file.parent, factor=2, workers=0, **options)


def test_what_is_kept_is_the_autoencoder_s_posterior(mixture_file, vae, tmp_path, capsys):
    out = encode_mixture(mixture_file, settings_of(vae, tmp_path / "latents"))
    said = capsys.readouterr().out
    assert "6 entries encoded, 0 were there" in said and "skipped, unreadable picture: 1" in said and "5.png" in said
    store, model = PosteriorStore(out, tmp_path), VAE.from_pretrained(vae).autoencoder
    grids = opened(mixture_file).documents.grids
    assert len(store) == 6 and len(shard_paths(out)) == 2
    for i in (0, 1, 2, 3, 4, 6):
        found = reference(tmp_path / "pictures" / f"{i}.png")
        with torch.inference_mode():
            expected = model.encode(grids.pixels(found, (4, 4))[None]).latent_dist
        mean, log_variance = store.posterior(found, SIZE, "crop", False)
        torch.testing.assert_close(mean, expected.mean[0])
        torch.testing.assert_close(log_variance, expected.logvar[0])
    assert store.posterior(reference(tmp_path / "pictures" / "5.png"), SIZE, "crop", False) is None
    assert store.posterior(found, SIZE, "crop", True) is None and store.posterior(found, (8, 8), "crop", False) is None


def test_mirrored_pictures_are_entries_of_their_own(mixture_file, vae, tmp_path):
    file = write_mixture(tmp_path, flip=0.5)
    out = encode_mixture(file, settings_of(vae, tmp_path / "latents"))
    store, found = PosteriorStore(out, tmp_path), reference(tmp_path / "pictures" / "3.png")
    straight, mirrored = (store.posterior(found, SIZE, "crop", flipped) for flipped in (False, True))
    assert len(store) == 12 and not torch.allclose(mirrored, straight.flip(-1), atol=1e-3)
    pixels = opened(file).documents.grids.pixels(found, (4, 4), flipped=True)
    mean, _ = VAE.from_pretrained(vae).autoencoder.encode(pixels[None]).latent_dist.mean, None
    torch.testing.assert_close(mirrored[0], mean[0].detach())


def test_a_kill_at_any_moment_leaves_whole_shards_and_the_next_run_ends_it(mixture_file, vae, tmp_path):
    whole = PosteriorStore(encode_mixture(mixture_file, settings_of(vae, tmp_path / "whole")), tmp_path)
    kill, kept = 0, []
    while True:
        out = tmp_path / f"out-{kill}"
        settings = settings_of(vae, out, shard=2)
        status = in_a_child(functools.partial(encode_mixture, mixture_file, settings), kill_at=kill)
        if status == 0:
            break
        assert status == 9
        kept.append(sum(1 for _ in shard_paths(out)))
        store = PosteriorStore(encode_mixture(mixture_file, settings), tmp_path)
        assert len(store) == 6 and sorted(path.name for path in out.iterdir()) == [
            "000000.safetensors", "000001.safetensors", "000002.safetensors", "latents.json"]
        for i in (0, 6):
            found = reference(tmp_path / "pictures" / f"{i}.png")
            torch.testing.assert_close(*(one.posterior(found, SIZE, "crop", False) for one in (store, whole)))
        kill += 1
    assert set(kept) == {0, 1, 2, 3} and kill > 10


def sending(monkeypatch, number):
    """Have the process that reads the fourth picture send itself a signal."""
    whole = posteriors._Unread.entries

    def entries(self, picture):
        if picture.file.path.endswith("3.png"):
            os.kill(os.getpid(), number)
        return whole(self, picture)

    monkeypatch.setattr(posteriors._Unread, "entries", entries)


def test_a_process_that_reads_and_is_killed_is_told_in_one_line_and_the_next_run_goes_on(
        mixture_file, vae, tmp_path, monkeypatch):
    others = set(multiprocessing.active_children())
    words = ["data", "encode", str(mixture_file), "--vae", str(vae), "--out", str(tmp_path / "latents"), "--workers"]
    with monkeypatch.context() as here:
        sending(here, signal.SIGKILL)
        with pytest.raises(SystemExit, match="^error: data encode: one of 1 processes that read ahead was killed, .*; "
                                             "the same command goes on; fewer --workers take less$"):
            main([*words, "1"])
    assert not set(multiprocessing.active_children()) - others
    main([*words, "0"])
    assert len(PosteriorStore(tmp_path / "latents", tmp_path)) == 6


def test_processes_that_read_leave_an_interrupt_to_the_command(mixture_file, vae, tmp_path, monkeypatch):
    sending(monkeypatch, signal.SIGINT)
    out = encode_mixture(mixture_file, settings_of(vae, tmp_path / "latents", workers=1))
    assert len(PosteriorStore(out, tmp_path)) == 6


def test_a_finished_store_is_left_as_it_is(mixture_file, vae, tmp_path, capsys):
    out = encode_mixture(mixture_file, settings_of(vae, tmp_path / "latents"))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    encode_mixture(mixture_file, settings_of(vae, out))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "0 entries encoded, 6 were there" in capsys.readouterr().out


def test_a_changed_file_is_refused_by_training_and_encoded_again(mixture_file, vae, tmp_path, capsys):
    out, path = encode_mixture(mixture_file, settings_of(vae, tmp_path / "latents")), tmp_path / "pictures" / "2.png"
    old = PosteriorStore(out, tmp_path).posterior(reference(path), SIZE, "crop", False)
    path.write_bytes(picture(77, 16, 16).file)
    rows = packed_rows(opened(write_mixture(tmp_path, latents="latents")), rows=1, seq_len=64)
    failure = rows.read(0, 2, 0)
    assert isinstance(failure, Failure) and failure.kind == "changed picture" and "encode` again" in failure.reason
    encode_mixture(mixture_file, settings_of(vae, out))
    assert "1 entries encoded, 6 were there, 1 of them of files that changed" in capsys.readouterr().out
    new = PosteriorStore(out, tmp_path).posterior(reference(path), SIZE, "crop", False)
    assert not torch.allclose(new, old)


def test_another_autoencoder_is_refused_by_name(mixture_file, vae, tmp_path):
    out = encode_mixture(mixture_file, settings_of(vae, tmp_path / "latents"))
    other = autoencoder_in(tmp_path / "other", 1)
    with pytest.raises(ValueError, match="holds latents of another autoencoder or dtype: vae "):
        encode_mixture(mixture_file, settings_of(other, out))
    with pytest.raises(ValueError, match="dtype float32 .now bfloat16."):
        encode_mixture(mixture_file, settings_of(vae, out, dtype="bfloat16"))
    file = write_mixture(tmp_path, latents="latents")
    with pytest.raises(ValueError, match="was made by the autoencoder"):
        opened(file, autoencoder=VAE.from_pretrained(other).fingerprint())
    opened(file, autoencoder=VAE.from_pretrained(vae).fingerprint())


def test_training_draws_from_the_posterior_anew_in_each_pass_and_again_after_a_resume(mixture_file, vae, tmp_path):
    encode_mixture(mixture_file, settings_of(vae, tmp_path / "latents"))
    mixture = opened(write_mixture(tmp_path, latents="latents"))
    rows = packed_rows(mixture, rows=2, seq_len=64, epochs=1)
    draws = torch.stack([torch.as_tensor(rows.read(0, 3, n).document.images[0][1]) for n in range(300)])
    assert torch.equal(draws[7], pickle.loads(pickle.dumps(rows)).read(0, 3, 7).document.images[0][1])
    mean, log_variance = PosteriorStore(tmp_path / "latents", tmp_path).posterior(
        reference(tmp_path / "pictures" / "3.png"), SIZE, "crop", False)
    deviation = (log_variance / 2).exp() * 0.7
    expected = (torch.nn.functional.pixel_unshuffle(x, 2).flatten(1).T for x in ((mean - 0.1) * 0.7, deviation))
    for found, wanted, width in zip((draws.mean(0), draws.std(0)), expected, (5 / 300**0.5, 0.3)):
        assert (found - wanted).abs().max() < width * deviation.max()
    batch = rows[0] if rows.planned.ensure(2) is None else None
    assert not len(batch.pixels) and set(batch.picture.tolist()) == {-1} and not batch.failures
    assert torch.equal(batch.with_latents([], 2).patches, batch.sequence.patches)
    with_workers = next(iter(Loader(rows, 0, 1, workers=1)))
    assert torch.equal(with_workers.sequence.patches, batch.sequence.patches)


def test_pictures_that_the_store_lacks_are_left_to_the_trainer(mixture_file, vae, tmp_path):
    encode_mixture(mixture_file, settings_of(vae, tmp_path / "latents"))
    for i in (7, 8, 9):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i, 16, 16).file)
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"the blue cat {i}")
    rows = packed_rows(opened(write_mixture(tmp_path, latents="latents")), rows=2, seq_len=128, epochs=1)
    rows.planned.ensure(2)
    batch = rows[0]
    pictures = batch.pictures()
    assert 0 < len(pictures) < len(batch.picture)
    assert sorted(set(batch.picture.tolist())) == list(range(-1, len(pictures)))
    latents = [torch.full((2, 8, 8), float(n + 100)) for n in range(len(pictures))]
    filled, sizes = batch.with_latents(latents, 2).patches, [16] * len(batch.picture)
    images = zip(batch.picture.tolist(), batch.sequence.patches.split(sizes), filled.split(sizes))
    for number, before, after in images:
        assert torch.equal(after, before) if number < 0 else (after == number + 100).all()


def test_a_model_of_pixels_refuses_latents(mixture_file, vae, tmp_path):
    encode_mixture(mixture_file, settings_of(vae, tmp_path / "latents"))
    tokenizer = tokenizer_of_words()
    with pytest.raises(ValueError, match="and the model draws pixels; leave latents out"):
        open_mixture(read_mixture(write_mixture(tmp_path, latents="latents")), tokenizer, kind_of(tokenizer),
                     folder=tmp_path, workers=0)


@pytest.mark.parametrize("dtype, of_mean, of_width", [
    ("float16", 2**-11, 0.008), ("bfloat16", 2**-8, 0.07), ("float32", 0, 0)])
def test_rounding_is_told_and_small(dtype, of_mean, of_width):
    errors, random = RoundingError(), torch.Generator().manual_seed(0)
    mean = torch.randn(50, 4, 8, 8, generator=random)
    log_variance = torch.rand(mean.shape, generator=random) * -20
    errors.rounded(mean, log_variance, getattr(torch, dtype))
    assert (errors.lost / errors.of) ** 0.5 <= of_mean and errors.width <= of_width and dtype in errors.words(dtype)


def test_latents_that_float16_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="dtype is float16 and a latent is 100000"):
        RoundingError().rounded(torch.full((1, 1, 2, 2), 1e5), torch.zeros(1, 1, 2, 2), torch.float16)


def test_a_damaged_shard_is_named(mixture_file, vae, tmp_path):
    out = encode_mixture(mixture_file, settings_of(vae, tmp_path / "latents"))
    shard = shard_paths(out)[1]
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match="000001.safetensors is damaged"):
        PosteriorStore(out, tmp_path)


def test_the_command_encodes_and_says_what_does_not_fit(mixture_file, vae, tmp_path, capsys):
    words = ["data", "encode", str(mixture_file), "--vae", str(vae), "--workers", "1", "--out"]
    main([*words, str(tmp_path / "latents")])
    assert "6 entries encoded" in capsys.readouterr().out
    assert len(PosteriorStore(tmp_path / "latents", tmp_path)) == 6
    with pytest.raises(SystemExit, match="error: data encode: out is .* and vae"):
        main([*words, str(vae)])
    main(["data", "--help"])
    said = capsys.readouterr().out
    assert "usage: transfusion data VERB" in said and "check" in said and "encode" in said
