"""Autoencoders: training and resuming, measuring and caches of latents.

And what a Transfusion carries that is trained on one's latents.
"""
import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import load_file

import transfusion.train.autoencoder as vae_train
from tests.transfusion.train.test_autoencoder_losses import classifier
from transfusion import Transfusion
from transfusion.cli import main
from transfusion.command import saved_run
from transfusion.data.batches import step_generator
from transfusion.data.dataset import DatasetSettings
from transfusion.data.latents import EncodeSettings, encode_dataset, open_dataset
from transfusion.data.picture_files import PictureFolder, PictureFolderSettings
from transfusion.eval.autoencoder import LinearCodec, VAEEvalSettings, evaluate, patch_pca, picture_pca
from transfusion.locks import locked
from transfusion.model.lora import TuneSettings
from transfusion.model.vae import VAE
from transfusion.recipes.command_line import AUTOENCODER_PRESETS
from transfusion.recipes.digits import Digits, DigitsSettings
from transfusion.recipes.emoji import EmojiSettings
from transfusion.recipes.paper import paper_autoencoder
from transfusion.train.autoencoder import (
    AutoencoderSettings,
    LossSettings,
    Terms,
    VAEOptimSettings,
    VAETrainConfig,
    build_autoencoder,
    draw_pictures,
    latent_statistics,
    reconstruct,
    train,
)
from transfusion.train.autoencoder_losses import PatchDiscriminator, discriminator_loss
from transfusion.train.log import CLOCKED
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig
from transfusion.train.transfusion import train as train_transfusion


def tiny(out, **changes):
    base = VAETrainConfig(
        out=out, model=AutoencoderSettings(latent_channels=2, widths=(8, 16)), device="cpu", data=DigitsSettings(),
        losses=LossSettings(adversarial_from=4, discriminator_width=8, discriminator_layers=1),
        optim=VAEOptimSettings(steps=10, batch=8, lr=3e-3, warmup=2, ema=0.8))
    return dataclasses.replace(base, **changes)


def log(out):
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKED}
            for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tiny(tmp_path_factory.mktemp("vae") / "vae"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("classifier"))


def test_a_resumed_run_has_the_losses_and_weights_of_one_that_never_stopped(trained, tmp_path, capsys):
    """Stopped before the discriminator plays and after."""
    train(tiny(tmp_path, stop_after=2))
    assert "add --resume to the same command" in capsys.readouterr().err
    train(tiny(tmp_path, stop_after=6, resume=True))
    assert len(log(tmp_path)) == 6
    train(tiny(tmp_path, resume=True))
    assert log(tmp_path) == log(trained)
    for name in ("diffusion_pytorch_model.safetensors", "resume/state.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(trained / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(ValueError, match="losses.kl is 1.0 and was 1e-06, optim.batch is 4 and was 8"):
        train(tiny(tmp_path, resume=True, losses=dataclasses.replace(tiny(tmp_path).losses, kl=1.0),
                   optim=dataclasses.replace(tiny(tmp_path).optim, batch=4)))
    capsys.readouterr()
    train(tiny(tmp_path, resume=True, optim=dataclasses.replace(tiny(tmp_path).optim, lr=1e-4, steps=12)))
    assert ("going on with optim.steps 12 (was 10), optim.lr 0.0001 (was 0.003)" in capsys.readouterr().out
            and len(log(tmp_path)) == 12)


@pytest.mark.parametrize("where", ["reconstruction_loss", "discriminator_loss"])
def test_a_step_that_is_not_finite_reaches_neither_network(tmp_path, monkeypatch, where):
    real, calls = getattr(vae_train, where), []

    def spoilt(*given):
        calls.append(where)
        return real(*given) * (float("nan") if len(calls) == 6 else 1.0)  # two calls say what the run costs

    monkeypatch.setattr(vae_train, where, spoilt)
    step = 3 if where == "reconstruction_loss" else 7
    said = rf"vae train: in step {step} .*nan.*the save of {step - step % 2} steps in .* stands|holds the very weights"
    with pytest.raises(FloatingPointError, match=said):
        train(tiny(tmp_path, save_every=2))
    VAE.from_pretrained(tmp_path)
    assert (all(torch.isfinite(x).all() for x in load_file(tmp_path / "resume" / "state.safetensors").values())
            and len(log(tmp_path)) == step)
    monkeypatch.setattr(vae_train, where, real)
    train(tiny(tmp_path, resume=True))
    assert [record["step"] for record in log(tmp_path)] == list(range(10))


def test_an_out_that_does_not_fit_is_refused_before_anything_is_built(tmp_path, trained, judge, monkeypatch):
    monkeypatch.setattr(vae_train, "build_autoencoder", lambda *_: pytest.fail("built"))
    (tmp_path / "file").write_text("")
    for config, message in ((tiny(tmp_path / "file"), "which is a file"), (tiny(trained), "holds a run of 10 steps"),
                            (tiny(judge, losses=LossSettings(perceptual_model=judge)),
                             "what is read would be written over"),
                            (tiny(judge), "holds config.json of something else"),
                            (tiny(tmp_path / "new", device="foo"), "device is 'foo'")):
        with pytest.raises(ValueError, match=message):
            train(config)
    with pytest.raises(ValueError, match="vae encode: out is .* what is read would be written over"):
        encode_dataset(EncodeSettings(vae=trained, out=trained, device="cpu"))
    with locked(tmp_path / "new"), ThreadPoolExecutor(1) as other, pytest.raises(
        ValueError, match="vae train: .* is in use by process"
    ):
        other.submit(train, tiny(tmp_path / "new")).result()


def test_a_flipped_bit_in_cached_latents_is_refused_by_the_files_name(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "copy")
    data = bytearray((copy / "train.safetensors").read_bytes())
    data[-3] ^= 4
    (copy / "train.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="train.safetensors is damaged"):
        open_dataset(DigitsSettings(latents=copy))


def test_the_discriminator_does_not_play_before_its_step_and_plays_from_it(trained, tmp_path):
    records = log(trained)
    assert [("adversarial" in record, "discriminator" in record) for record in records] == [(step >= 4, step >= 4)
                                                                                            for step in range(10)]
    never = dataclasses.replace(
        tiny(tmp_path), losses=dataclasses.replace(tiny(tmp_path).losses, adversarial_from=None)
    )
    train(dataclasses.replace(never, stop_after=5))
    without = log(tmp_path)
    assert without[:4] == records[:4] and without[4]["loss"] != records[4]["loss"]
    assert records[4]["loss"] == pytest.approx(records[4]["l1"] + 0.5 * records[4]["adversarial"]
                                               + 1e-6 * records[4]["kl"], rel=1e-5)

    def discriminator(out):
        return {key: x
                for key, x in load_file(out / "resume" / "state.safetensors").items()
                if key.startswith("discriminator.")}
    before, after = discriminator(tmp_path), discriminator(trained)
    assert not any("optimizer" in key for key in before) and any("optimizer" in key for key in after)
    assert all(not torch.equal(x, after[key]) for key, x in before.items() if key.endswith("weight"))


def test_the_loss_is_the_papers_sum_of_terms_and_says_which_are_left_out(judge, tmp_path):
    settings = LossSettings(perceptual_model=judge, identity_model=judge, adversarial_from=3)
    terms = Terms(settings, PatchDiscriminator(3, 8, 1), torch.device("cpu"))
    assert terms.weights(2) == {"l1": 1.0, "perceptual": 1.0, "identity": 0.2, "kl": 1e-6}
    assert terms.weights(3) == {"l1": 1.0, "perceptual": 1.0, "identity": 0.2, "adversarial": 0.5, "kl": 1e-6}
    assert f"resnet ({judge})" in terms.table() and "from step 3" in terms.table() and "left out" not in terms.table()
    alone = Terms(LossSettings(), PatchDiscriminator(3, 8, 1), torch.device("cpu"))
    assert alone.weights(10**9) == {"l1": 1.0, "kl": 1e-6}
    assert [line.split()[0] for line in alone.table().splitlines() if "left out" in line] == [
        "perceptual", "identity", "adversarial"
    ]
    config = tiny(tmp_path, losses=dataclasses.replace(settings, discriminator_width=8, discriminator_layers=1),
                  stop_after=4)
    train(config)
    for record, step in zip(log(tmp_path), range(4)):
        assert record["loss"] == pytest.approx(
            sum(weight * record[name] for name, weight in terms.weights(step).items()), rel=1e-4
        )


def test_training_pictures_have_latents_of_mean_0_and_standard_deviation_1(trained):
    latents = VAE.from_pretrained(trained).encode(Digits().pictures)
    assert latents.shape == (1437, 2, 4, 4)
    assert abs(latents.mean().item()) < 1e-4 and latents.std().item() == pytest.approx(1, abs=1e-4)
    assert VAE.from_pretrained(trained).scale != 1.0


def test_what_is_saved_is_the_average_of_the_weights(trained):
    state, saved = (load_file(trained / "resume" / "state.safetensors"),
                    load_file(trained / "diffusion_pytorch_model.safetensors"))
    name = "encoder.conv_in.weight"
    assert torch.equal(saved[name], state[f"averaged.{name}"]) and not torch.equal(saved[name], state[f"model.{name}"])


def test_the_papers_autoencoder_has_the_shape_it_says():
    config = paper_autoencoder()
    with torch.device("meta"):
        autoencoder = build_autoencoder(config.model, (3, 256, 256), 0)
    assert round(sum(p.numel() for p in autoencoder.parameters()) / 1e6, 1) == 83.7
    vae = VAE(autoencoder)
    assert (vae.channels, vae.factor) == (8, 8)
    losses = config.losses
    assert (
        losses.perceptual, losses.adversarial, losses.identity, losses.kl, losses.adversarial_from
    ) == (1.0, 0.5, 0.2, 1e-6, 50_000)
    assert config.optim.steps == 1_000_000 and set(AUTOENCODER_PRESETS) == {"small", "paper"}


def test_a_picture_that_breaks_during_training_is_replaced_by_the_next(folder, tmp_path):
    settings = PictureFolderSettings(folder=folder, size=8)
    pictures = PictureFolder(settings)
    pictures.paths[1].write_bytes(b"gone bad")
    pictures.paths[2].unlink()
    assert torch.equal(pictures[torch.tensor([1])][0], pictures.read(3))
    config = tiny(tmp_path / "vae", data=settings)
    train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=3)))
    assert len(log(tmp_path / "vae")) == 3


def test_linear_codecs_are_the_projections_on_the_leading_components():
    from sklearn.decomposition import PCA

    train_set, held_out = Digits().pictures, Digits("held-out").pictures
    plain = PCA(5).fit(train_set.flatten(1).double().numpy())
    expected = torch.tensor(
        plain.inverse_transform(plain.transform(held_out.flatten(1).double().numpy()))
    ).float().view_as(held_out).clamp(-1, 1)
    torch.testing.assert_close(picture_pca(train_set, 5)(held_out), expected, rtol=0, atol=1e-5)
    patches = [x.view(-1, 1, 4, 2, 4, 2).transpose(3, 4).reshape(-1, 4) for x in (train_set, held_out)]
    plain = PCA(3).fit(patches[0].double().numpy())
    expected = torch.tensor(plain.inverse_transform(plain.transform(patches[1].double().numpy()))).float()
    expected = expected.view(-1, 1, 4, 4, 2, 2).transpose(3, 4).reshape_as(held_out).clamp(-1, 1)
    torch.testing.assert_close(patch_pca(train_set, 2, 3)(held_out), expected, rtol=0, atol=1e-5)
    few = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    assert LinearCodec(few, 100).basis.shape == (40, 5)  # six rows span five directions
    torch.testing.assert_close(LinearCodec(few, 100)(few), few, rtol=0, atol=1e-5)


def test_an_evaluation_writes_numbers_of_every_codec_and_a_grid(trained, judge, tmp_path, capsys):
    main(["vae", "eval", "--vae", str(trained), "--classifier", str(judge), "--out", str(tmp_path),
          "data:digits", "--device", "cpu"])
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert (results["pictures"] == 360 and results["latent"] == [2, 4, 4]
            and set(results["codecs"]) == {"vae", "patch PCA", "picture PCA"})
    assert all(set(numbers) == {"psnr", "ssim", "frechet_distance"} for numbers in results["codecs"].values())
    real = Digits("held-out").pictures
    kept = patch_pca(Digits().pictures, 2, 2)(real)
    psnr = (10 * (4 / (real - kept).square().mean((1, 2, 3))).log10()).mean().item()
    assert results["codecs"]["patch PCA"]["psnr"] == pytest.approx(psnr, abs=1e-3)
    # ten steps make no good autoencoder
    assert results["codecs"]["picture PCA"]["frechet_distance"] < results["codecs"]["vae"]["frechet_distance"]
    with Picture.open(tmp_path / "reconstructions.png") as grid:
        assert grid.size[0] > grid.size[1]
    printed = capsys.readouterr().out
    assert f"Frechet distance: in resnet ({judge})" in printed and "FID" not in printed and "fid" not in printed


@pytest.fixture(scope="module")
def cache(trained, tmp_path_factory):
    return encode_dataset(EncodeSettings(vae=trained, out=tmp_path_factory.mktemp("cache") / "latents",
                                         data=DigitsSettings(), device="cpu"))


def test_cached_latents_are_the_autoencoders_and_stand_in_for_the_pictures(trained, cache, capsys):
    for split in ("train", "held-out"):
        plain, (dataset, vae) = Digits(split), open_dataset(DigitsSettings(latents=cache), split)
        torch.testing.assert_close(dataset.pictures, VAE.from_pretrained(trained).encode(plain.pictures), rtol=0,
                                   atol=1e-5)
        assert (torch.equal(dataset.labels, plain.labels) and dataset.image_shape == (2, 4, 4)
                and plain.image_shape == (1, 8, 8))
        assert vae.fingerprint() == VAE.from_pretrained(trained).fingerprint()
    assert encode_dataset(EncodeSettings(vae=trained, out=cache, data=DigitsSettings(), device="cpu")) == cache
    assert "holds these latents already" in capsys.readouterr().out
    assert open_dataset(DigitsSettings())[1] is None


def test_a_transfusion_trained_on_latents_draws_pictures(cache, tmp_path):
    config = TrainConfig(out=tmp_path / "model", model=ModelSettings(hidden=32, layers=1, heads=2, kv_heads=2, mlp=64),
                         data=DigitsSettings(latents=cache),
                         optim=OptimSettings(steps=2, rows=2, seq_len=64, warmup=1, ema=0.5), device="cpu")
    train_transfusion(config)
    model = Transfusion.from_pretrained(tmp_path / "model")
    assert (model.config.image_channels, tuple(model.config.image_size)) == (2, (4, 4))
    assert model.vae.fingerprint() == VAE.from_pretrained(cache / "vae").fingerprint()
    main(["sample", "--model", str(tmp_path / "model"), "--prompt", "a handwritten seven", "--out",
          str(tmp_path / "seven.png"), "--steps", "1"])
    with Picture.open(tmp_path / "seven.png") as picture:
        assert picture.size == (8, 8) and picture.mode == "L"
    other = encode_dataset(EncodeSettings(
        vae=train(tiny(tmp_path / "vae", stop_after=1)), out=tmp_path / "latents", data=DigitsSettings(), device="cpu"))
    started = dataclasses.replace(config, out=tmp_path / "more", tune=TuneSettings(start=tmp_path / "model"),
                                  data=DigitsSettings(latents=other))
    with pytest.raises(ValueError, match="tune.start a model of another autoencoder"):
        train_transfusion(started)
    shutil.rmtree(tmp_path / "model" / "vae")
    with pytest.raises(ValueError, match="tune.start a model of pictures"):
        train_transfusion(dataclasses.replace(started, data=config.data))


def test_a_cache_of_something_else_is_refused(trained, cache, folder, tmp_path):
    with pytest.raises(ValueError, match="jitter is 1.0 .* 0 fits latents"):
        open_dataset(DigitsSettings(latents=cache, jitter=1.0))
    with pytest.raises(ValueError, match="holds no cache.json"):
        open_dataset(DigitsSettings(latents=tmp_path))
    with pytest.raises(ValueError, match="which holds something else"):
        encode_dataset(EncodeSettings(
            vae=train(tiny(tmp_path / "other", stop_after=1)), out=cache, data=DigitsSettings(), device="cpu"))
    with pytest.raises(
        ValueError, match="data is 'folder': the data set has pictures and no captions.*; a data set with captions fits"
    ):
        encode_dataset(EncodeSettings(vae=trained, out=tmp_path / "new", data=PictureFolderSettings(folder=folder)))

    copy = shutil.copytree(cache, tmp_path / "copy")
    about = json.loads((copy / "cache.json").read_text())
    for key, wrong in (("data", "emoji"), ("pictures", [3, 1, 8, 8]), ("checksum", 1)):
        splits = [{**kept, key: wrong} for kept in about["splits"]]
        (copy / "cache.json").write_text(json.dumps({**about, "splits": splits}))
        with pytest.raises(ValueError, match=rf"made of other pictures: {key} "):
            open_dataset(DigitsSettings(latents=copy))
    (copy / "cache.json").write_text(json.dumps(about))
    VAE.from_pretrained(tmp_path / "other").save_pretrained(copy / "vae")
    with pytest.raises(ValueError, match="whose vae is not the one that made them"):
        open_dataset(DigitsSettings(latents=copy))


def test_settings_that_do_not_fit_are_answered_by_name(folder, tmp_path, trained):
    with pytest.raises(ValueError, match=r"sides that 16 divides fit"):
        train(tiny(tmp_path / "out", model=AutoencoderSettings(widths=(8,) * 5)))
    with pytest.raises(ValueError, match="discriminator_layers is 3 .* sides of at least 24 fit"):
        train(tiny(tmp_path / "out", losses=LossSettings(adversarial_from=0)))
    with pytest.raises(ValueError, match="holds no saved run"):
        train(tiny(tmp_path / "out", resume=True))
    with pytest.raises(ValueError, match="names no data set"):
        train(tiny(tmp_path / "out", data=DatasetSettings()))
    for settings in (DigitsSettings(), EmojiSettings(), PictureFolderSettings(folder=folder)):
        with pytest.raises(ValueError, match="split is 'test'"):
            settings.open("test")
    with pytest.raises(ValueError, match="which is no directory"):
        PictureFolderSettings(folder=tmp_path / "none").open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no train picture of 0 can be read"):
        PictureFolderSettings(folder=tmp_path / "empty").open()
    with pytest.raises(ValueError, match="channels is 2; 1 .grey. or 3"):
        PictureFolderSettings(folder=folder, channels=2).open()
    with pytest.raises(ValueError, match="pictures have 3 channels and the autoencoder of .* takes 1"):
        evaluate(VAEEvalSettings(vae=trained, out=tmp_path, data=PictureFolderSettings(folder=folder, size=8),
                                 device="cpu"))
    with pytest.raises(ValueError, match="which holds no config.json"):
        evaluate(VAEEvalSettings(vae=tmp_path / "none", data=DigitsSettings(), device="cpu"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit, match="'trian' is not a verb; train, eval, encode fit; did you mean train"):
        main(["vae", "trian"])


def test_a_real_autoencoder_keeps_unseen_digits_better_than_a_pca_of_the_same_latent(tmp_path):
    """Digits of 8x8 as latents of 4x4x1, a quarter of their numbers.

    That is more than 1 dB above the 16 principal components of whole digits, the best linear codec of this size, and
    more than 5 above the first one of patches of 2x2, the best that is as local.
    """
    train(VAETrainConfig(out=tmp_path, save_every=10_000, device="cpu", data=DigitsSettings(),
                         model=AutoencoderSettings(latent_channels=1, widths=(16, 48)),
                         optim=VAEOptimSettings(steps=400, batch=32, lr=4e-3, warmup=20, flip=0.0)))
    codecs = evaluate(VAEEvalSettings(vae=tmp_path, data=DigitsSettings(), device="cpu"))["codecs"]
    assert codecs["vae"]["psnr"] > codecs["picture PCA"]["psnr"] + 1
    assert codecs["vae"]["psnr"] > codecs["patch PCA"]["psnr"] + 5
    assert codecs["vae"]["ssim"] > codecs["picture PCA"]["ssim"] > codecs["patch PCA"]["ssim"]


def test_statistics_of_latents_are_those_of_all_numbers():
    autoencoder = build_autoencoder(AutoencoderSettings(widths=(8, 16)), (1, 8, 8), seed=0)
    pictures = Digits().pictures[:30]
    with torch.no_grad():
        latents = autoencoder.encode(pictures).latent_dist.mean.double().numpy()
    mean, std = latent_statistics(autoencoder, pictures, batch=7)
    assert mean == pytest.approx(latents.mean(), abs=1e-6) and std == pytest.approx(latents.std(ddof=1), rel=1e-5)


def test_the_discriminator_learns_from_its_own_loss_alone(tmp_path):
    """Its first moment after one step is a tenth of that loss's gradient, without the adversarial term's."""
    config = tiny(tmp_path, stop_after=4)
    train(config)
    state, run = load_file(config.out / "resume" / "state.safetensors"), saved_run(config.out)
    autoencoder, discriminator = build_autoencoder(config.model, (1, 8, 8), 0), PatchDiscriminator(1, 8, 1)
    for module, prefix in ((autoencoder, "model."), (discriminator, "discriminator.model.")):
        for name, p in module.named_parameters():
            p.data.copy_(state[prefix + name])
    generator = step_generator(config.seed, run["step"])
    given = draw_pictures(Digits().pictures, config.optim, generator)
    discriminator_loss(discriminator, given, reconstruct(autoencoder, given, generator)[0]).backward()
    torch.nn.utils.clip_grad_norm_(discriminator.parameters(), config.optim.clip)
    train(tiny(tmp_path, stop_after=5, resume=True))
    moments = load_file(tmp_path / "resume" / "state.safetensors")
    for name, p in discriminator.named_parameters():
        torch.testing.assert_close(moments[f"discriminator.optimizer.{name}.exp_avg"], 0.1 * p.grad, rtol=1e-3,
                                   atol=1e-7)


def test_what_an_autoencoder_cannot_use_is_refused_by_name(tmp_path):
    config = tiny(tmp_path / "run")
    with pytest.raises(ValueError, match="losses.discriminator_width is 3; a multiple of 4"):
        train(dataclasses.replace(config, losses=dataclasses.replace(config.losses, discriminator_width=3)))
    with pytest.raises(ValueError, match="vae train: data.latents is .*; leave it out"):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, latents=tmp_path / "cache")))
