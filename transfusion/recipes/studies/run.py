"""Runs of a study: what they cost, trained once, measured once, kept under the hash of their settings."""
import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from transfusion.command import claim
from transfusion.data.batches import DATASETS
from transfusion.eval.features import Features
from transfusion.files import LOCK, current, locked, read_json, write_text, written
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.studies.arms import Arm, StudyData
from transfusion.recipes.studies.measure import Yardstick, caption_accuracy, flops, text_loss
from transfusion.recipes.studies.pictures import Codes, Patches
from transfusion.recipes.studies.vq import from_codes, holds_autoencoder, load_autoencoder, to_codes, train_autoencoder
from transfusion.sequence import Text, encode, pack
from transfusion.train.classifier import train_classifier
from transfusion.train.log import logged_seconds, read_log
from transfusion.train.transfusion import train, train_to_end

SHOWN = 8  # pictures of each class that a run keeps


def key(*settings) -> str:
    """Hash of dataclasses: what a result was made with."""
    text = json.dumps([dataclasses.asdict(x) for x in settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Bench:
    """What all runs of a data set share: its pictures, the classifier and, made when first asked for, the VQ autoencoder; in `out`, once."""

    def __init__(self, data: StudyData, out: Path):
        self.data, self.out = data, out / data.name
        self.train, self.held_out = (DATASETS[data.base.data.name](split) for split in ("train", "held-out"))
        self.yardstick = Yardstick(self.train, self.held_out, self.classifier())
        self.autoencoder = None

    def classifier(self) -> Features:
        """The classifier, trained on real training pictures."""
        path = self.out / f"classifier-{key(self.data.classifier)}"
        if not current(path, "model.safetensors").is_file():
            with locked(path, wait=True):  # two processes may share a study's work
                train_classifier(self.train.images, self.train.labels, list(self.data.titles), path, self.data.classifier)
        return Features.from_pretrained(path)

    def pictures(self, arm: Arm) -> Patches | Codes:
        """What stands for pictures in the arm's documents."""
        return {"patches": Patches, "codes": self.codes}[arm.pictures]()

    def codes(self) -> Codes:
        """Codes of the autoencoder, which is trained where it is not there yet."""
        if self.autoencoder is None:
            path = self.out / f"autoencoder-{key(self.data.autoencoder)}"
            with locked(path, wait=True) if not holds_autoencoder(path) else contextlib.nullcontext():
                self.autoencoder = load_autoencoder(path) if holds_autoencoder(path) else train_autoencoder(self.train.images, path, self.data.autoencoder)
        return Codes(self.autoencoder)

    def real(self) -> dict[str, dict[str, float]]:
        """Measurements of real held-out pictures and, where an autoencoder was made, of real pictures decoded from their codes."""
        floor = {"real, held out": self.yardstick.floor(), "real, of the drawn classes": self.yardstick.perfect(asked(self.data))}
        if self.autoencoder is None:
            return floor
        images, labels = (torch.cat([getattr(self.train, name), getattr(self.held_out, name)]) for name in ("images", "labels"))
        decoded = torch.cat([from_codes(self.autoencoder, to_codes(self.autoencoder, part)) for part in images.split(256)])
        return floor | {"real, as codes": self.yardstick.pictures(decoded, labels)}


def settings_key(bench: Bench, arm: Arm, seed: int) -> str:
    """Hash of all that a run's result depends on."""
    data = bench.data
    config = arm.config(data.base, Path(), seed)
    shared = [config, data.measuring, data.classifier]
    return key(*shared, data.autoencoder) if arm.pictures == "codes" else key(*shared)


def finished(bench: Bench, arm: Arm, seed: int) -> dict | None:
    """The result of a run with these settings, if there is one."""
    path = bench.out / f"{arm.name}-{seed}" / "metrics.json"
    result = read_json(path, "delete it, and the same command measures the run again") if path.is_file() else {}
    return result if result.get("key") == settings_key(bench, arm, seed) else None


def run(bench: Bench, arm: Arm, seed: int) -> dict:
    """Train and measure one arm with one seed; what an interrupted run left is gone on from, what other settings left is put aside."""
    out, settings = bench.out / f"{arm.name}-{seed}", settings_key(bench, arm, seed)
    put_aside(out, settings)
    with claim("studies", out):
        write_text(out / "settings", settings)
        return _run(bench, arm, seed, out, settings)


def put_aside(out: Path, settings: str) -> None:
    """Move a run of other settings out of the way; one that another process works on stays."""
    mark = out / "settings"
    if not out.exists() or (mark.is_file() and mark.read_text() == settings):
        return
    with claim("studies", out):
        aside = out.with_name(f"{out.name}-{mark.read_text() if mark.is_file() else 'unknown'}")
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
        (aside / LOCK).unlink(missing_ok=True)


def _run(bench: Bench, arm: Arm, seed: int, out: Path, settings: str) -> dict:
    config, pictures = arm.config(bench.data.base, out, seed), bench.pictures(arm)
    train_to_end(pictures.prepare(config))
    began = time.perf_counter()
    model = Transfusion.from_pretrained(out).eval()
    metrics, drawn = measure(bench, model, pictures, seed)
    document = encode([Text(bench.data.captions[0]), *pictures.parts(bench.train.images[:1])], model.tokenizer, model.config)
    example = pack([document], len(document.tokens), model.config.patch_dim)
    result = {
        "key": settings, "arm": arm.name, "seed": seed, "metrics": metrics, "parameters": sum(p.numel() for p in model.parameters()),
        "document_tokens": len(document.tokens), "document_flops": flops(model, example),
        "seconds": {"train": logged_seconds(out / "log.jsonl"), "measure": time.perf_counter() - began}}
    with written(out / "drawn.safetensors") as aside:
        save_file({"drawn": drawn}, aside)
    write_text(out / "metrics.json", json.dumps(result, indent=2) + "\n")
    return result


def asked(data: StudyData) -> torch.Tensor:
    """The class of each picture that is drawn."""
    return torch.arange(data.measuring.draws) % len(data.captions)


def measure(bench: Bench, model: Transfusion, pictures: Patches | Codes, seed: int) -> tuple[dict[str, float], torch.Tensor]:
    """Return a trained model's measurements and the first pictures that it drew of each class, (classes * SHOWN, C, H, W)."""
    data, classes, held_out = bench.data, asked(bench.data), bench.held_out
    drawn = pictures.draw(model, [data.captions[i] for i in classes], data.measuring.steps, data.measuring.guidance, seed)
    captions, prompts = [data.captions[i] for i in held_out.labels], [[part] for part in pictures.parts(held_out.images)]
    found = bench.yardstick.pictures(drawn, classes) | {
        "caption_accuracy": caption_accuracy(model, prompts, captions), "caption_loss": text_loss(model, prompts, captions),
        "text_loss": text_loss(model, [[] for _ in captions], captions)}
    return found, drawn[:SHOWN * len(data.captions)].contiguous()


def cost(bench: Bench, arm: Arm, steps: int = 4) -> float:
    """Estimate an arm's seconds for one seed: a few timed training steps, and a tenth of its drawing by what they leave."""
    base, pictures = bench.data.base, bench.pictures(arm)
    with tempfile.TemporaryDirectory() as directory:
        config = dataclasses.replace(pictures.prepare(arm.config(base, Path(directory) / "run", 0)), stop_after=min(steps, base.optim.steps))
        train(config)
        seconds = [record["seconds"] for record in read_log(config.out / "log.jsonl")]
        model = Transfusion.from_pretrained(config.out).eval()
    few = asked(bench.data)[:max(1, bench.data.measuring.draws // 10)]
    began = time.perf_counter()
    pictures.draw(model, [bench.data.captions[i] for i in few], bench.data.measuring.steps, bench.data.measuring.guidance, 0)
    drawing = (time.perf_counter() - began) * bench.data.measuring.draws / len(few)
    return (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1) * base.optim.steps + drawing


def run_all(bench: Bench, arms: list[Arm], seeds: tuple[int, ...]) -> list[dict]:
    """Every run of these arms; those that are there are read, the cost of the others is printed before the first of them starts."""
    results = {(arm.name, seed): finished(bench, arm, seed) for arm in arms for seed in seeds}
    missing = [(arm, seed) for seed in seeds for arm in arms if results[arm.name, seed] is None]
    if missing:
        print(f"{len(results) - len(missing)} of {len(results)} runs are there; timing a few steps of the others ...", flush=True)
        seconds = {name: cost(bench, arm) for name, arm in {arm.name: arm for arm, _ in missing}.items()}
        lines = [f"  {name:<20}{sum(arm.name == name for arm, _ in missing)} x {cost:.0f} s" for name, cost in seconds.items()]
        print("\n".join([*lines, f"about {sum(seconds[arm.name] for arm, _ in missing) / 60:.0f} minutes in all"]), flush=True)
    for arm, seed in tqdm(missing, desc=f"runs on {bench.data.name}", unit="run", dynamic_ncols=True):
        results[arm.name, seed] = run(bench, arm, seed)
    return list(results.values())
