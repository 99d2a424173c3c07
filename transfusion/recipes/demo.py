"""The whole road in one command: `python -m transfusion.demo` trains on handwritten digits, draws, reads and measures.

The same command goes on where it was interrupted. It leaves in runs/digits the checkpoint, samples.png, loss.png and
metrics.json.
"""
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from transfusion.command import claim, plain_errors, saved_step
from transfusion.eval.picture_grids import sample_grid
from transfusion.files import write_text
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.command_line import shell_line
from transfusion.recipes.digits import DIGIT_NAMES, Digits, digits
from transfusion.recipes.digits_judge import draw_digits, evaluate, tell_story
from transfusion.sequence import Image
from transfusion.train.log import logged_seconds
from transfusion.train.plots import loss_curves
from transfusion.train.transfusion import TrainConfig, train_to_end

STEPS, GUIDANCE = 30, 2.0


def demo(config: TrainConfig) -> dict:
    """Train, sample and measure; return what metrics.json holds."""
    inputs = {"tune.start": config.tune.start, "data.latents": config.data.latents}
    with claim("demo", config.out, inputs, resume=saved_step(config.out) is not None):
        return _demo(config)


def _demo(config: TrainConfig) -> dict:
    began = time.perf_counter()
    out = train_to_end(config)
    model = Transfusion.from_pretrained(out).eval()

    print("drawing 500 digits and reading 360 held-out ones ...", flush=True)
    asked = torch.arange(500) % 10
    drawn = draw_digits(model, asked, steps=STEPS, guidance=GUIDANCE, seed=config.seed)
    metrics = evaluate(model, drawn, asked)
    story = tell_story(model, "a handwritten seven")
    metrics["interleaved"] = "".join("<image>" if isinstance(part, Image) else part.text for part in story)
    metrics |= {"guidance": GUIDANCE, "sampling_steps": STEPS, "train_seconds": logged_seconds(out / "log.jsonl"),
                "total_seconds": time.perf_counter() - began}

    held_out = Digits("held-out")
    real = torch.stack([held_out.pictures[held_out.labels == label][:10] for label in range(10)])
    by_digit = torch.stack([drawn[asked == label][:10] for label in range(10)])
    sample_grid(out / "samples.png", by_digit, real, list(DIGIT_NAMES), ("generated from captions", "real, held out"))
    loss_curves(out / "loss.png", out / "log.jsonl")
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def report(metrics: dict, out: Path) -> None:
    """Print the measurements and where everything lies."""
    print(f"\n{'measurement':<32}value")
    for name, value in metrics.items():
        print(f"{name:<32}{value if isinstance(value, str) else f'{value:.4g}'}")
    print(f"\ncheckpoint   {out}\npictures     {out}/samples.png {out}/loss.png\nnumbers      {out}/metrics.json")
    line = shell_line("sample", "--model", out, "--prompt", "a handwritten five", "--out", "five.png")
    print(f"\ntry          {line}")


def main(args: list[str] | None = None) -> None:
    """Entry point of `python -m transfusion.demo` and `make demo`."""
    config = tyro.cli(TrainConfig, default=replace(digits(), device="auto"), prog="python -m transfusion.demo",
                      description=__doc__, args=args)
    with plain_errors(resumes=True):
        report(demo(config), config.out)


if __name__ == "__main__":
    main()
