"""Settings: what does not fit is refused by the name that the command line has, before anything runs."""
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from transfusion.cli import main
from transfusion.data.latents import EncodeSettings
from transfusion.data.picture_files import PictureFolderSettings
from transfusion.device import choose_device
from transfusion.eval.autoencoder import VAEEvalSettings
from transfusion.eval.images import ImagesSettings
from transfusion.model.lora import TuneSettings
from transfusion.recipes.command_line import AUTOENCODER_PRESETS, PRESETS
from transfusion.recipes.digits import DigitsSettings
from transfusion.recipes.emoji import EmojiSettings
from transfusion.recipes.showcase import ShowcaseSettings, showcase
from transfusion.recipes.studies.arms import Measuring
from transfusion.recipes.studies.command import StudySettings, run_studies
from transfusion.recipes.studies.vq import VQSettings
from transfusion.settings import Count, Decay, NotNegative, OneOf, Positive, Range, Share, WholeNumber, check, nearest
from transfusion.train.autoencoder import AutoencoderSettings, LossSettings, VAEOptimSettings, VAETrainConfig
from transfusion.train.autoencoder import train as train_vae
from transfusion.train.classifier import ClassifierSettings, JudgeConfig
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig, check_settings, train

SETTINGS = (TrainConfig(), VAETrainConfig(), JudgeConfig(), ShowcaseSettings(), Measuring(), VQSettings(),
            StudySettings("all"), VAEEvalSettings(Path("vae")), EncodeSettings(Path("vae"), Path("out")),
            ImagesSettings(Path("drawn")))


@dataclass(frozen=True)
class Inner:
    """Settings in a field of others."""

    share: Share = 0.5
    decays: tuple[Decay, Decay] = (0.9, 0.99)
    widths: tuple[Count, ...] = (8, 16)
    kind: Annotated[str, OneOf({"flow": 1, "eps": 2})] = "flow"


@dataclass(frozen=True)
class Outer:
    """Settings of each kind."""

    steps: Count = 10
    warmup: WholeNumber = 0
    lr: Positive = 1.0
    weight: NotNegative = 0
    free: float = 0.0
    limit: Annotated[float, Range(above=1, high=2)] = 1.5
    stop: Count | None = None
    out: Path | None = None
    on: bool = False
    mode: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)


def _with(settings, name, value):
    return dataclasses.replace(settings, **{name: value})


def numbers(settings, prefix=""):
    """Every number of settings, also in tuples, as (dotted name, settings with another value there)."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            yield from ((name, lambda bad, change=change, f=f: _with(settings, f.name, change(bad)))
                        for name, change in numbers(value, f"{prefix}{f.name}."))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + f.name, lambda bad, f=f: _with(settings, f.name, bad)
        elif isinstance(value, tuple) and not isinstance(value[0], str):
            yield prefix + f.name, lambda bad, f=f, first=value[:-1]: _with(settings, f.name, (*first, bad))


NUMBERS = [(name, change) for settings in SETTINGS for name, change in numbers(settings)]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: type(settings).__name__)
def test_what_is_set_by_default_fits(settings):
    check("op", settings)


@pytest.mark.parametrize(
    "preset", [*PRESETS.values(), *AUTOENCODER_PRESETS.values()], ids=lambda preset: preset.__name__
)
def test_presets_fit(preset):
    check("op", preset())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, True, "3", -1], ids=str)
@pytest.mark.parametrize("name,change", NUMBERS, ids=[name for name, _ in NUMBERS])
def test_no_number_of_any_settings_may_be_nan_infinite_negative_or_no_number(name, change, bad):
    with pytest.raises(ValueError, match=rf"^op: {name} is .* fits"):
        check("op", change(bad))


@pytest.mark.parametrize("changes,message", [
    ({"steps": 0}, "op: steps is 0; a whole number of at least 1 fits"),
    ({"steps": 2.0}, "op: steps is 2.0; a whole number of at least 1 fits"),
    ({"warmup": -1}, "op: warmup is -1; a whole number of at least 0 fits"),
    ({"lr": 0.0}, "op: lr is 0.0; a number above 0 fits"),
    ({"free": math.nan}, "op: free is nan; a number fits"),
    ({"free": -math.inf}, "op: free is -inf; a number fits"),
    ({"limit": 10**400}, r"op: limit is 10{199}\.\.\.; a number above 1 and at most 2 fits"),
    ({"limit": 1.0}, "op: limit is 1.0; a number above 1 and at most 2 fits"),
    ({"stop": 0}, "op: stop is 0; a whole number of at least 1 or None fits"),
    ({"out": "runs"}, "op: out is 'runs'; a pathlib.Path or None fits"),
    ({"on": "no"}, "op: on is 'no'; True or False fits"),
    ({"mode": "c"}, "op: mode is 'c'; one of 'a', 'b' fits"),
    ({"inner": Inner(share=1.5)}, "op: inner.share is 1.5; a number of at least 0 and at most 1 fits"),
    ({"inner": Inner(decays=(0.9, 1.0))},
     r"op: inner.decays is \(0.9, 1.0\); a number of at least 0 and below 1 fits at each"),
    ({"inner": Inner(decays=(0.9,))}, r"op: inner.decays is \(0.9,\); a tuple of 2 fits"),
    ({"inner": Inner(widths=())}, r"op: inner.widths is \(\); a tuple of one or more fits"),
    ({"inner": Inner(widths=(8, 0))}, r"op: inner.widths is \(8, 0\); a whole number of at least 1 fits at each place"),
    ({"inner": Inner(kind="flw")}, "op: inner.kind is 'flw'; one of 'flow', 'eps' fits; did you mean 'flow'?"),
    ({"inner": None}, "op: inner is None; settings of class Inner fit"),
    ({"inner": Inner(kind=["flow"])}, r"op: inner.kind is \['flow'\]; one of 'flow', 'eps' fits"),
])
def test_what_does_not_fit_is_named_with_what_does(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check("op", Outer(**changes))
    check("op", Outer(stop=1, out=Path("runs"), weight=1, inner=Inner(decays=[0.0, 0.5], widths=[1])))


MODEL = ModelSettings(hidden=32, layers=1, heads=2, kv_heads=2, mlp=32)


@pytest.mark.parametrize("changes,name", [
    ({"save_every": 0}, "save_every"),
    ({"stop_after": 0}, "stop_after"),
    ({"seed": -1}, "seed"),
    ({"device": "cudo"}, "device"),
    ({"optim": OptimSettings(clip=-1.0)}, "optim.clip"),
    ({"optim": OptimSettings(ema=math.nan)}, "optim.ema"),
    ({"optim": OptimSettings(steps=0)}, "optim.steps"),
    ({"optim": OptimSettings(warmup=-1)}, "optim.warmup"),
    ({"optim": OptimSettings(ema=1.0)}, "optim.ema"),
    ({"optim": OptimSettings(betas=(1.0, 0.9))}, "optim.betas"),
    ({"optim": OptimSettings(times="logit")}, "optim.times"),
    ({"data": DigitsSettings(caption_first=2.0)}, "data.caption_first"),
    ({"data": DigitsSettings(noise_limit=-1.0)}, "data.noise_limit"),
    ({"data": DigitsSettings(context="claen")}, "data.context"),
    ({"data": DigitsSettings(story=1.5)}, "data.story"),
    ({"data": EmojiSettings(size=48)}, "data.size"),
    ({"tune": TuneSettings(lora_rank=0)}, "tune.lora_rank"),
    ({"model": dataclasses.replace(MODEL, heads=3)}, "model.heads"),
    ({"model": dataclasses.replace(MODEL, kv_heads=3)}, "model.kv_heads"),
    ({"model": dataclasses.replace(MODEL, heads=32, kv_heads=32)}, "model.heads"),
    ({"model": dataclasses.replace(MODEL, layers=0)}, "model.layers"),
    ({"model": dataclasses.replace(MODEL, vocabulary=100)}, "model.vocabulary"),
    ({"model": dataclasses.replace(MODEL, objective="flw")}, "model.objective"),
    ({"model": dataclasses.replace(MODEL, diffusion_weight=math.inf)}, "model.diffusion_weight"),
])
def test_a_run_that_cannot_be_meant_does_not_begin(tmp_path, changes, name):
    with pytest.raises(ValueError, match=rf"\b{name} is .* fit"):
        train(dataclasses.replace(TrainConfig(out=tmp_path / "run", model=MODEL, data=DigitsSettings()), **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes,name", [
    ({"save_every": 0}, "save_every"),
    ({"optim": VAEOptimSettings(batch=0)}, "optim.batch"),
    ({"optim": VAEOptimSettings(flip=1.5)}, "optim.flip"),
    ({"losses": LossSettings(kl=-1.0)}, "losses.kl"),
    ({"losses": LossSettings(adversarial_from=-1)}, "losses.adversarial_from"),
    ({"model": AutoencoderSettings(widths=())}, "model.widths"),
    ({"model": AutoencoderSettings(widths=(8, 12))}, "model.groups"),
    ({"data": PictureFolderSettings(size=0)}, "data.size"),
    ({"device": "cudo"}, "device"),
])
def test_an_autoencoder_that_cannot_be_meant_is_not_trained(tmp_path, changes, name):
    with pytest.raises(ValueError, match=rf"\b{name} is .* fit"):
        train_vae(dataclasses.replace(VAETrainConfig(out=tmp_path / "vae", data=DigitsSettings()), **changes))
    assert not (tmp_path / "vae").exists()


def test_a_long_value_is_cut_and_has_no_nearest_name():
    assert nearest("flw", ["flow"]) == "; did you mean flow?" and nearest("a" * 65, ["a" * 64]) == ""
    with pytest.raises(ValueError, match=r"^op: inner.kind is 'a{199}\.\.\.; one of 'flow', 'eps' fits$"):
        check("op", Outer(inner=Inner(kind="a" * 2**20)))


def test_what_holds_other_settings_names_theirs_as_they_are_typed(tmp_path):
    config = TrainConfig(out=tmp_path / "run", optim=OptimSettings(lr=-1.0))
    with pytest.raises(ValueError, match="^showcase: train.optim.lr is -1.0; a number above 0 fits"):
        showcase(ShowcaseSettings(train=config))
    with pytest.raises(ValueError, match="^showcase: judge.depths is"):
        showcase(ShowcaseSettings(judge=ClassifierSettings(depths=(1, 0))))
    with pytest.raises(ValueError, match="^showcase: train.model.heads is 5 and train.model.hidden 256"):
        showcase(ShowcaseSettings(train=TrainConfig(out=tmp_path / "run", model=ModelSettings(hidden=256, heads=5))))
    with pytest.raises(ValueError, match=r"^studies: seeds is \(\)"):
        run_studies(StudySettings("all", seeds=(), out=tmp_path))
    check_settings("train", TrainConfig())


def test_a_command_answers_in_one_line(tmp_path):
    for args, line in ((["train", "digits", "--optim.clip", "-1"],
                        "train: optim.clip is -1.0; a number above 0 or None fits"),
                       (["vae", "train", "small", "--optim.ema", "nan"],
                        "vae train: optim.ema is nan; a number of at least 0 and below 1 fits")):
        with pytest.raises(SystemExit) as stop:
            main([*args, "--out", str(tmp_path / "run")])
        assert str(stop.value) == f"error: {line}" and not (tmp_path / "run").exists()


def test_devices_are_those_of_the_machine():
    assert choose_device("cpu").type == "cpu" and choose_device("auto") is not None
    for name in ("gpu", "cuda:99", "meta", "cpuu", ""):
        with pytest.raises(ValueError, match=f"device is {name!r}, which this machine does not have; auto, cpu.* fit"):
            choose_device(name)
