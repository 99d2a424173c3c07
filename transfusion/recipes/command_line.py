"""The commands that begin from a preset or read a data set: what `transfusion train` and its like understand.

    transfusion train digits --optim.steps 100                      the preset's own data set
    transfusion train digits data:emoji --data.lively               another one; --data.* are the flags of its settings
    transfusion train paper --size 0.76B data:digits                a preset's parameters are flags, too
    transfusion train own --data mix.yaml                           data:mixture --data.file mix.yaml: one's own files
"""
import dataclasses
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import tyro

import transfusion.train.autoencoder as autoencoder
import transfusion.train.classifier as classifier
import transfusion.train.plan as plan
import transfusion.train.transfusion as trainer
from transfusion.command import plain_errors
from transfusion.data.dataset import DatasetSettings, DataSettings
from transfusion.data.latents import EncodeSettings, encode_dataset
from transfusion.data.mixture_data import MixtureFileSettings
from transfusion.data.picture_files import PictureFolderSettings
from transfusion.recipes.digits import DigitsSettings, digits, digits_paper
from transfusion.recipes.emoji import EmojiSettings, emoji, emoji_autoencoder
from transfusion.recipes.llava import is_llava, read_llava
from transfusion.recipes.own import own
from transfusion.recipes.paper import paper, paper_autoencoder
from transfusion.settings import nearest
from transfusion.train.processes import said_once

DATA_SETS = {"digits": DigitsSettings, "emoji": EmojiSettings, "folder": PictureFolderSettings}
"""What data:NAME may name on the command line. A program of one's own gives `TrainConfig` any settings."""
TRAINED_ON = DATA_SETS | {"mixture": MixtureFileSettings}
"""What it may name behind `transfusion train`; the other commands read pictures alone."""
PRESETS = {"digits": digits, "digits-paper": digits_paper, "emoji": emoji, "paper": paper, "own": own}
AUTOENCODER_PRESETS = {"small": emoji_autoencoder, "paper": paper_autoencoder}
WORD = "data:"


def train_main(args: list[str] | None = None) -> None:
    """Entry point of `transfusion train` and `python -m transfusion.train`."""
    args = _preset_first(sys.argv[1:] if args is None else list(args))
    with plain_errors():
        with said_once():
            config = read_llava(args) if is_llava(args) else read_preset(
                "transfusion train", trainer.__doc__, PRESETS, args, TRAINED_ON)
        trainer.train(config)


def plan_main(args: list[str] | None = None) -> None:
    """Entry point of `transfusion plan`: flags of `PlanSettings`, and all that `transfusion train` takes."""
    args = sys.argv[1:] if args is None else list(args)
    if any(arg in ("-h", "--help") for arg in args):
        tyro.cli(plan.PlanSettings, prog="transfusion plan PRESET", args=["--help"],
                 description=f"{plan.__doc__}\nFlags of `transfusion train PRESET` fit, too.")
    with plain_errors():
        settings, args = tyro.cli(plan.PlanSettings, prog="transfusion plan", args=args, return_unknown_args=True,
                                  add_help=False)
        config = read_preset("transfusion plan", plan.__doc__, PRESETS, _preset_first(args), TRAINED_ON)
        plan.print_plan(config, settings)


def report_main(args: list[str] | None = None) -> None:
    """Entry point of `transfusion report`."""
    from transfusion.train import report
    settings = tyro.cli(report.ReportSettings, prog="transfusion report", description=report.__doc__, args=args)
    presets = {name: preset() for name, preset in PRESETS.items()}
    presets |= {f"{name} (autoencoder)": preset() for name, preset in AUTOENCODER_PRESETS.items()}
    with plain_errors():
        report.report(settings, report.flat_presets(presets))


def vae_train_main(args: list[str] | None = None) -> None:
    """Entry point of `transfusion vae train`."""
    config = read_preset("transfusion vae train", autoencoder.__doc__, AUTOENCODER_PRESETS, args)
    with plain_errors():
        autoencoder.train(config)


def vae_eval_main(args: list[str] | None = None) -> None:
    """Entry point of `transfusion vae eval`."""
    from transfusion.eval.autoencoder import VAEEvalSettings, evaluate
    settings = read_settings("transfusion vae eval", VAEEvalSettings, args)
    with plain_errors():
        evaluate(settings)


def vae_encode_main(args: list[str] | None = None) -> None:
    """Entry point of `transfusion vae encode`."""
    settings = read_settings("transfusion vae encode", EncodeSettings, args)
    with plain_errors():
        encode_dataset(settings)


def judge_main(args: list[str] | None = None) -> None:
    """Entry point of `python -m transfusion.train.classifier`."""
    settings = read_settings("python -m transfusion.train.classifier", classifier.JudgeConfig, args)
    with plain_errors(resumes=True):
        classifier.judge(settings)


def read_preset(prog: str, description: str, presets: Mapping[str, Callable], args: list[str] | None = None,
                data_sets: Mapping[str, type] = DATA_SETS):
    """Return the settings that a command line describes: a preset's name, data:NAME, and flags.

    Raises:
        SystemExit: after --help, or with one line that says what does not fit.
    """
    kind, args = take_data_set(args, data_sets)
    name, *args = args or ["--help"]
    if name in ("-h", "--help"):
        print(_overview(prog, description, presets, data_sets))
        raise SystemExit(0)
    if name.startswith("-"):
        raise SystemExit(f"error: {name} stands where the preset's name fits: `{prog} PRESET {name} ...`, of presets "
                         f"{', '.join(presets)}")
    if name not in presets:
        raise SystemExit(f"error: {name!r} is no preset; {', '.join(presets)} fit{nearest(name, presets)}")
    preset, command = presets[name], f"{prog} {name}"
    with plain_errors():
        config, args = _call(command, preset, args)
    if kind not in (None, type(config.data)):
        fields = {field.name for field in dataclasses.fields(kind)}
        shared = {name: value for name, value in config.data.shared().items() if name in fields}
        config = dataclasses.replace(config, data=kind(**shared))  # what every data set has stays the preset's
    words = "\n\n".join([inspect.getdoc(preset).partition("\n\nArgs:")[0], _data_sets(data_sets)])
    return tyro.cli(type(config), default=config, prog=command, description=words, args=args)


def read_settings(prog: str, settings: type, args: list[str] | None = None):
    """Return the settings, a dataclass, that a command line describes: data:NAME, and flags.

    Raises:
        SystemExit: after --help, or with one line that says what does not fit.
    """
    kind, args = take_data_set(args)
    required = {field.name: tyro.MISSING for field in dataclasses.fields(settings)
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING}
    default = settings(**required, data=DatasetSettings() if kind is None else kind())
    words = "\n\n".join([inspect.getdoc(settings), _data_sets(DATA_SETS)])
    return tyro.cli(settings, default=default, prog=prog, description=words, args=args)


def shell_line(*words) -> str:
    """Return the line that runs `transfusion WORDS` in a shell here, whether or not `transfusion` is on the PATH."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = os.path.join(".", python.relative_to(Path.cwd()))  # a shell looks for a bare name on the PATH
    return shlex.join(map(str, (python, "-m", "transfusion.cli", *words)))


def take_data_set(args: list[str] | None, data_sets: Mapping[str, type] = DATA_SETS
                  ) -> tuple[type[DataSettings] | None, list[str]]:
    """Return the settings' class that data:NAME among the arguments names, or None, and the other arguments.

    `--data mix.yaml` is short for `data:mixture --data.file mix.yaml`.

    Raises:
        SystemExit: a data set that does not exist, or more than one.
    """
    args = _spell_out(sys.argv[1:] if args is None else list(args), "mixture" in data_sets)
    words = [arg for arg in args if re.fullmatch(rf"{WORD}[\w-]*", arg)]  # a prompt may begin alike
    names = [word.removeprefix(WORD) for word in words]
    if len(names) > 1:
        raise SystemExit(f"error: {' and '.join(WORD + name for name in names)} name several data sets; one fits")
    for name in names:
        if name not in data_sets:
            known = [WORD + other for other in data_sets]
            raise SystemExit(f"error: {WORD}{name} names no data set; {', '.join(known)} "
                             f"fit{nearest(WORD + name, known)}")
    return data_sets[names[0]] if names else None, [arg for arg in args if arg not in words]


def _preset_first(args: list[str]) -> list[str]:
    """Arguments that begin with a mixture's file, with their preset before it: the one that they name, or `own`."""
    if not args or is_llava(args) or not args[0].startswith(("--data", f"{WORD}mixture")):
        return args
    switches = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(trainer.TrainConfig)
                if field.type is bool}

    def takes_a_value(arg: str) -> bool:
        return arg.startswith("--") and "=" not in arg and arg not in switches

    at = next((i for i, arg in enumerate(args) if arg in PRESETS and not takes_a_value(args[i - 1])), None)
    return ["own", *args] if at is None else [args[at], *args[:at], *args[at + 1:]]


def _spell_out(args: list[str], is_known: bool) -> list[str]:
    """Arguments with `--data FILE` written out."""
    at = next((i for i, arg in enumerate(args) if arg == "--data" or arg.startswith("--data=")), None)
    if at is None:
        return args
    if not is_known:
        raise SystemExit("error: --data names a mixture, which `transfusion train` reads; here data:folder "
                         "--data.folder DIRECTORY fits")
    file, rest = args[at].removeprefix("--data").removeprefix("="), args[at + 1:]
    if args[at] == "--data":
        file, *rest = rest or [""]
    if not file or file.startswith("-"):
        raise SystemExit("error: --data has no value; the path of a mixture fits, such as --data mix.yaml")
    named = [] if f"{WORD}mixture" in args else [f"{WORD}mixture"]
    return [*args[:at], *named, "--data.file", file, *rest]


def _call(prog: str, preset: Callable, args: list[str]):
    """Return what a preset returns for the flags among `args` that are its own parameters, and the other arguments."""
    if not inspect.signature(preset).parameters:
        return preset(), args
    return tyro.cli(preset, prog=prog, args=args, return_unknown_args=True, add_help=False)


def _overview(prog: str, description: str, presets: Mapping[str, Callable], data_sets: Mapping[str, type]) -> str:
    """What a command with presets says of itself."""
    width = max(map(len, presets)) + 2
    lines = [f"  {name:<{width}}{inspect.getdoc(preset).splitlines()[0]}" for name, preset in presets.items()]
    return "\n".join([f"usage: {prog} PRESET [data:NAME] [flags]", "", description.strip(), "", "presets:", *lines, "",
                      _data_sets(data_sets), "", f"`{prog} PRESET --help` lists the flags"])


def _data_sets(data_sets: Mapping[str, type]) -> str:
    """What --help says of data sets."""
    width = max(map(len, data_sets)) + len(WORD) + 2
    lines = [f"  {WORD + name:<{width}}{inspect.getdoc(kind).splitlines()[0]}" for name, kind in data_sets.items()]
    return "\n".join(["data sets (each has --data flags of its own, which --help behind its name lists):", *lines])
