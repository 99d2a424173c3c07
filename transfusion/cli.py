"""The `transfusion` command: a table of its verbs, each of which imports what it needs when it is called."""
import sys
from dataclasses import make_dataclass
from pathlib import Path

import tyro

from transfusion import __version__
from transfusion.command import plain_errors
from transfusion.settings import nearest


def _init(args: list[str]) -> None:
    from transfusion.model.from_language_model import InitSettings, init
    init(tyro.cli(InitSettings, args=args, prog="transfusion init"))


def _export(args: list[str]) -> None:
    from transfusion.model.export import ExportSettings, export
    export(tyro.cli(ExportSettings, args=args, prog="transfusion export"))


def _sample(args: list[str]) -> None:
    from transfusion.sample import Sample, sample
    sample(tyro.cli(Sample, args=args, prog="transfusion sample", config=(tyro.conf.AvoidSubcommands,)))


def _caption(args: list[str]) -> None:
    from transfusion.sample import Caption, caption
    caption(tyro.cli(Caption, args=args, prog="transfusion caption"))


def _serve(args: list[str]) -> None:
    from transfusion.serve.command_line import ServeSettings, serve
    serve(tyro.cli(ServeSettings, args=args, prog="transfusion serve"))


def _app(args: list[str]) -> None:
    from transfusion.serve.command_line import AppSettings, app
    app(tyro.cli(AppSettings, args=args, prog="transfusion app"))


def _train(args: list[str]) -> None:
    from transfusion.recipes.command_line import train_main
    train_main(args)


def _plan(args: list[str]) -> None:
    from transfusion.recipes.command_line import plan_main
    plan_main(args)


def _report(args: list[str]) -> None:
    from transfusion.recipes.command_line import report_main
    report_main(args)


def _vae_train(args: list[str]) -> None:
    from transfusion.recipes.command_line import vae_train_main
    vae_train_main(args)


def _vae_eval(args: list[str]) -> None:
    from transfusion.recipes.command_line import vae_eval_main
    vae_eval_main(args)


def _vae_encode(args: list[str]) -> None:
    from transfusion.recipes.command_line import vae_encode_main
    vae_encode_main(args)


def _eval_draw(args: list[str]) -> None:
    from transfusion.eval.draw import DrawSettings, draw
    draw(tyro.cli(DrawSettings, args=args, prog="transfusion eval draw", config=(tyro.conf.AvoidSubcommands,)))


def _eval_images(args: list[str]) -> None:
    from transfusion.eval.images import ImagesSettings, images
    images(tyro.cli(ImagesSettings, args=args, prog="transfusion eval images"))


def _eval_geneval(args: list[str]) -> None:
    from transfusion.eval.geneval import GenevalSettings, geneval
    geneval(tyro.cli(GenevalSettings, args=args, prog="transfusion eval geneval"))


def _eval_captions(args: list[str]) -> None:
    from transfusion.eval.captions import CaptionsSettings, captions
    captions(tyro.cli(CaptionsSettings, args=args, prog="transfusion eval captions"))


def _eval_report(args: list[str]) -> None:
    from transfusion.eval.report import ReportSettings, report
    report(tyro.cli(ReportSettings, args=args, prog="transfusion eval report"))


def _eval_questions(args: list[str]) -> None:
    from transfusion.eval.questions import QuestionsSettings, evaluate_questions
    evaluate_questions(tyro.cli(QuestionsSettings, args=args, prog="transfusion eval questions"))


def _chat(args: list[str]) -> None:
    from transfusion.serve.chat import TalkSettings, chat
    chat(tyro.cli(TalkSettings, args=args, prog="transfusion chat", config=(tyro.conf.AvoidSubcommands,)))


def _data_check(args: list[str]) -> None:
    from transfusion.data.check import CheckSettings, check_mixture
    path, settings = _mixture_and_settings("transfusion data check", CheckSettings, args)
    if not check_mixture(path, settings):
        raise SystemExit(1)


def _data_encode(args: list[str]) -> None:
    from transfusion.data.posteriors import PosteriorSettings, encode_mixture
    path, settings = _mixture_and_settings("transfusion data encode", PosteriorSettings, args)
    encode_mixture(path, settings)


def _eval_vqa(args: list[str]) -> None:
    from transfusion.eval.vqa import VQASettings, evaluate_vqa
    evaluate_vqa(tyro.cli(VQASettings, args=args, prog="transfusion eval vqa"))


def _eval_prepare(args: list[str]) -> None:
    from transfusion.eval.prepare import PrepareSettings, prepare
    prepare(tyro.cli(PrepareSettings, args=args, prog="transfusion eval prepare"))


def _eval_text(args: list[str]) -> None:
    from transfusion.eval.text import TextSettings, evaluate_text
    evaluate_text(tyro.cli(TextSettings, args=args, prog="transfusion eval text"))


def _mixture_and_settings(prog: str, settings: type, args: list[str]) -> tuple[Path, object]:
    """Return the mixture's file, which `args` begin with, and the settings behind it."""
    line = make_dataclass("Line", [("mixture", tyro.conf.Positional[Path]),
                                   ("settings", tyro.conf.OmitArgPrefixes[settings])],
                          namespace={"__doc__": settings.__doc__})
    read = tyro.cli(line, args=args, prog=prog)
    return read.mixture, read.settings


DATA_VERBS = {
    "check": ("count what a mixture holds, say what would fail, draw samples", _data_check),
    "encode": ("compute the latents of a mixture's pictures ahead of training", _data_encode),
}
EVAL_VERBS = {
    "draw": ("draw a picture for each of many prompts", _eval_draw),
    "images": ("compare drawn pictures with real ones and with their prompts", _eval_images),
    "geneval": ("score pictures of GenEval's prompts", _eval_geneval),
    "captions": ("score captions against references", _eval_captions),
    "questions": ("ask questions of one's own about pictures, whose answers are known", _eval_questions),
    "prepare": ("write benchmarks in LLaVA's folders as lmms-eval reads them offline", _eval_prepare),
    "vqa": ("ask a model a benchmark's questions about pictures, with lmms-eval", _eval_vqa),
    "text": ("measure a model's language: suites of lm-eval, perplexity", _eval_text),
    "report": ("put all results into one table", _eval_report),
}
VAE_VERBS = {
    "train": ("train an autoencoder from a preset", _vae_train),
    "eval": ("measure an autoencoder on held-out pictures", _vae_eval),
    "encode": ("compute the latents of a data set and keep them", _vae_encode),
}
VERBS = {
    "init": ("make a model from a pretrained language model", _init),
    "export": ("write a plain checkpoint of an adapter, or the decoder alone", _export),
    "train": ("train a model from a preset", _train),
    "plan": ("say what a training run would need: memory, time, GPUs", _plan),
    "report": ("make a page of what runs logged: curves, numbers, samples", _report),
    "sample": ("draw or write from a prompt or a file of prompts", _sample),
    "caption": ("write what follows an image", _caption),
    "serve": ("answer over HTTP with OpenAI's interface", _serve),
    "app": ("talk and draw on a page in the browser", _app),
    "chat": ("talk with a model in the terminal, with pictures", _chat),
    "data": ("check a mixture of one's own data, compute its latents",
             lambda args: run_verb("transfusion data", DATA_VERBS, args)),
    "eval": ("measure what a model draws, sees and knows",
             lambda args: run_verb("transfusion eval", EVAL_VERBS, args)),
    "vae": ("train an autoencoder, measure it, cache latents",
            lambda args: run_verb("transfusion vae", VAE_VERBS, args)),
}


def run_verb(prog: str, verbs: dict, args: list[str]) -> None:
    """Run the verb that `args` begin with, or say which there are."""
    if not args or args[0] in ("-h", "--help"):
        lines = "".join(f"  {name:<10}{summary}\n" for name, (summary, _) in verbs.items())
        print(f"usage: {prog} VERB ...\n\n{lines}\n`{prog} VERB --help` tells more")
        return
    if args[0] not in verbs:
        raise SystemExit(f"error: {args[0]!r} is not a verb; {', '.join(verbs)} fit{nearest(args[0], verbs)}")
    with plain_errors():
        verbs[args[0]][1](args[1:])


def main(args: list[str] | None = None) -> None:
    """Entry point of the `transfusion` command."""
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(f"transfusion {__version__}")
        return
    run_verb("transfusion", VERBS, args)


if __name__ == "__main__":
    main()
