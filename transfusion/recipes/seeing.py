"""A language model learns to see: `python -m transfusion.recipes.seeing --llm FILE --out DIR` runs it all.

    DIR/styles      emoji in nine styles                 python -m transfusion.recipes.emoji_styles
    DIR/init        the language model, as a Transfusion transfusion init
    DIR/aligned     image layers that write captions     python -m transfusion.recipes.align_pictures
    DIR/questions   questions to train on and held out   python -m transfusion.recipes.picture_questions
    DIR/tuned       patches learn to be read             transfusion train
    DIR/eval        what it sees, and what became of its language

DIR/settings.json has what the first four were made with; other settings are refused.

The model is a mixture of transformers: patches go through weights of their own, which are trained, and text through the
language model's, which are frozen. So what it says without a picture is, to the bit, what it said before.

What stands is kept, so that the same command goes on after a stop. DIR/eval holds results/, questions.jsonl and
questions.png of the held-out pictures (`transfusion eval questions --blind`), text.json, the perplexity of plain text
before and after (`transfusion eval text` takes others), and prompts.md, twenty prompts without a picture and how they
are answered before and after.
"""
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from transfusion.command import plain_errors
from transfusion.data.chat import TEMPLATES, ChatSettings
from transfusion.data.grids import GridSettings
from transfusion.data.mixture_data import MixtureFileSettings
from transfusion.eval.asking import Asker, Asking, AskingSettings, Question
from transfusion.eval.questions import QuestionsSettings, evaluate_questions
from transfusion.eval.text import perplexity
from transfusion.files import read_json, settle, unfinished, write_text
from transfusion.locks import locked
from transfusion.model.from_language_model import InitSettings, init, was_made_of
from transfusion.model.lora import TuneSettings
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.align_pictures import AlignOptimSettings, AlignSettings, align
from transfusion.recipes.emoji_styles import FetchStyles, fetch_styles
from transfusion.recipes.picture_questions import PictureQuestionSettings, write
from transfusion.recipes.showcase import read_plain_text
from transfusion.settings import Count, OneOf, Seed, check
from transfusion.train.transfusion import OptimSettings, TrainConfig, train_to_end

PROMPTS = (
    "What is the capital of France?", "Name three colours.", "Write one sentence about the sea.",
    "What do bees make?", "How many days are in a week?", "What is the opposite of hot?",
    "Give me a word that rhymes with cat.", "What is water made of?", "Who wrote Romeo and Juliet?",
    "What is two plus three?", "Translate 'good morning' into French.", "Name an animal that can fly.",
    "Why is the sky blue?", "What is the largest planet?", "Finish the sentence: The dog ran after the",
    "What is a noun?", "Name a fruit that is yellow.", "In which season does it snow?",
    "What do you use an umbrella for?", "Write a short greeting.")
MEASURED = 60_000  # characters of plain text
SETTINGS = "settings.json"
FIXED = "align", "scenes", "pairs", "held_out", "seed"  # what the stages before training are made with


@dataclass(frozen=True)
class SeeingSettings:
    """Fetch pictures, make a Transfusion of a language model, teach it to see, and measure it."""

    llm: Path
    """directory of a causal language model in transformers' format, or a GGUF file with its tokenizer"""
    out: Path = Path("runs/seeing")
    """directory for everything"""
    align: AlignOptimSettings = field(default_factory=AlignOptimSettings)
    """of the image layers, before the language model runs"""
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(
        steps=2050, rows=2, seq_len=256, lr=3e-4, min_lr=1e-5, warmup=20, ema=0.0, weight_decay=0.0))
    """of what patches go through in the decoder, on questions; the image layers stay as they are"""
    autocast: bool = False
    """compute the last stage in bfloat16: quicker where the processor has instructions for it"""
    scenes: Count = 5000
    """scenes to ask about in training"""
    pairs: Count = 6000
    """pairs to ask about in training"""
    held_out: Count = 400
    """held-out scenes, and as many pairs"""
    template: Annotated[str, OneOf(TEMPLATES)] = "chatml"
    """the chat template of questions; chatml is SmolLM2's, without what the system says"""
    plain_text: Path | None = None
    """text whose first 60,000 characters the language is measured on; None: Python's reference manual"""
    save_every: Count = 200
    """steps between saves of both trainings"""
    seed: Seed = 0
    """of all that is random"""


def seeing(settings: SeeingSettings) -> dict:
    """Run every stage that is not done yet; return accuracies of the questions' kinds and perplexities of text.

    Raises:
        ValueError: settings that do not fit, or others than the stages that stand were made with, or a stage's own.
    """
    check("seeing", settings)
    out = settings.out
    keep_settings(settings)
    stage(out / "styles", "names.json", lambda: fetch_styles(FetchStyles(out=out / "styles")))
    stage(out / "init", "config.json", lambda: init(InitSettings(
        llm=settings.llm, out=out / "init", image_layers="unet", patch_size=8, unet_channels=(16, 64, 128, 256),
        unet_blocks=1, objective="x0", backbone="mixture_of_transformers",
        seed=settings.seed)))
    stage(out / "aligned", "align.json", lambda: align(AlignSettings(
        model=out / "init", drawings=out / "styles", out=out / "aligned", optim=settings.align, seed=settings.seed,
        save_every=settings.save_every, auto_resume=True)))
    stage(out / "questions", "mix.yaml", lambda: write(PictureQuestionSettings(
        out=out / "questions", drawings=out / "styles", scenes=settings.scenes, pairs=settings.pairs,
        held_out=settings.held_out, seed=settings.seed)))
    write_text(out / "mix.yaml", mixture(settings.template))
    train_to_end(TrainConfig(
        out=out / "tuned", data=MixtureFileSettings(file=out / "mix.yaml", workers=0), optim=settings.optim,
        tune=TuneSettings(start=out / "aligned", trained="images", frozen=("patch_embedding", "timestep")),
        autocast=settings.autocast, save_every=settings.save_every, seed=settings.seed))
    return measure(out, settings.template, read_plain_text(settings.plain_text)[:MEASURED])


def keep_settings(settings: SeeingSettings) -> None:
    """Write down what the stages are made with, and refuse other settings than those that are written down."""
    file, start = settings.out / SETTINGS, settings.out / "init"
    now = json.loads(json.dumps({name: dataclasses.asdict(settings)[name] for name in FIXED}))
    before = read_json(file) if file.is_file() and start.is_dir() else now  # without it none of the others stands
    differ = [f"{name} {before.get(name)} (now {now[name]})" for name in FIXED if before.get(name) != now[name]]
    if start.is_dir() and not was_made_of(start, settings.llm):
        differ.append("another llm")
    if differ:
        raise ValueError(f"seeing: out is {str(settings.out)!r}, whose stages were made with {', '.join(differ)}; the "
                         "same settings, or another --out, fit")
    settings.out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(now, indent=2) + "\n")


def stage(out: Path, mark: str, run: Callable[[], object]) -> None:
    """Run what makes `out`, unless a file of the finished stage is there."""
    if unfinished(out):  # a kill left it in two places
        with locked(out):
            settle(out)
    if not (out / mark).is_file():
        print(f"making {out}", flush=True)
        run()


def mixture(template: str) -> str:
    """The questions' mixture, of one template."""
    return "\n".join((
        "pictures: {sizes: [[32, 32], [64, 64]]}",
        f'chat: {{template: {template}, system: "", image_position: keep}}',
        "held_out: 0.0",
        "sources:",
        "  - {format: llava, path: questions/train.json, images: questions/pictures, drawn: none, name: questions}")
    ) + "\n"


def measure(out: Path, template: str, text: str) -> dict:
    """Ask about held-out pictures and measure language, before and after; what is in DIR/eval is not asked again."""
    scores = evaluate_questions(QuestionsSettings(
        model=out / "tuned", data=out / "questions" / "held-out.json", out=out / "eval",
        images=out / "questions" / "pictures", train=out / "questions" / "train.json", blind=True,
        asking=AskingSettings(mixture=out / "mix.yaml", max_new_tokens=12)))
    found = {}
    for name, place in (("before", out / "init"), ("after", out / "tuned")):
        model = Transfusion.from_pretrained(place).eval()
        images = (model.config.boi_token_id, model.config.eoi_token_id)  # words that the language model does not have
        found[name] = {"perplexity": perplexity(model, text, window=512, without=images).perplexity,
                       "answers": answers(model, template)}
    write_text(out / "eval" / "text.json", json.dumps(
        {name: one["perplexity"] for name, one in found.items()}, indent=2) + "\n")
    lines = ["| Prompt | Before | After |", "|---|---|---|"]
    lines += [f"| {prompt} | {_cell(before)} | {_cell(after)} |" for prompt, before, after in
              zip(PROMPTS, found["before"]["answers"], found["after"]["answers"])]
    write_text(out / "eval" / "prompts.md", "\n".join(lines) + "\n")
    return {"questions": scores, "perplexity": {name: one["perplexity"] for name, one in found.items()}}


@torch.no_grad()
def answers(model: Transfusion, template: str) -> list[str]:
    """Answers to PROMPTS, greedily, each as a conversation of one turn."""
    asking = Asking(ChatSettings(template=template, system=""), GridSettings(side=model.config.image_size[0]))
    asker = Asker(model, asking)
    return [said or "" for said in asker.answers([Question(prompt) for prompt in PROMPTS], max_new_tokens=40)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def main() -> None:
    """Entry point of `python -m transfusion.recipes.seeing`."""
    with plain_errors():
        found = seeing(tyro.cli(SeeingSettings, prog="python -m transfusion.recipes.seeing"))
        print(json.dumps(found["perplexity"], indent=2))


if __name__ == "__main__":
    main()
