"""Runs of a study: what they cost, trained once, measured once, kept under the hash of their settings."""
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
from transfusion.data.dataset import SPLITS
from transfusion.eval.features import Features
from transfusion.files import current, read_json, write_text, written
from transfusion.locks import LOCK, locked
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.studies.arms import Arm, StudyData
from transfusion.recipes.studies.measure import Yardstick, caption_accuracy, flops, text_loss
from transfusion.recipes.studies.representations import Codes, Patches
from transfusion.recipes.studies.vq import from_codes, holds_autoencoder, to_codes, train_autoencoder
from transfusion.sequence import Text, encode, pack
from transfusion.train.classifier import train_classifier
from transfusion.train.log import logged_seconds, read_log
from transfusion.train.transfusion import train, train_to_end

SHOWN = 8  # pictures of each class that a run keeps


def key(*settings) -> str:
    """Hash of dataclasses: what a result was made with; without an option that is younger than results that stand."""
    told = [{name: value for name, value in dataclasses.asdict(x).items() if name != "auto_resume"} for x in settings]
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Bench:
    """What all runs of a data set share, kept in `out`: its pictures, the classifier and the VQ autoencoder.

    The autoencoder is made when it is first asked for.
    """

    def __init__(self, data: StudyData, out: Path):
        self.data, self.out = data, out / data.name
        self.train, self.held_out = (data.base.data.open(split) for split in SPLITS)
        self.yardstick = Yardstick(self.train, self.held_out, self.classifier())
        self.made_codes: Codes | None = None

    def classifier(self) -> Features:
        """The classifier, trained on real training pictures."""
        path = self.out / f"classifier-{key(self.data.classifier)}"
        if not current(path, "model.safetensors").is_file():
            with locked(path, wait=True):  # two processes may share a study's work
                train_classifier(self.train.pictures, self.train.labels, list(self.data.titles), path,
                                 self.data.classifier)
        return Features.from_pretrained(path)

    def representation(self, arm: Arm) -> Patches | Codes:
        """What stands for pictures in the arm's documents."""
        return {"patches": Patches, "codes": self.codes}[arm.pictures]()

    def codes(self) -> Codes:
        """Codes of the autoencoder, which is trained where it is not there yet."""
        if self.made_codes is None:
            path = self.out / f"autoencoder-{key(self.data.autoencoder)}"
            if not holds_autoencoder(path):
                with locked(path, wait=True):
                    if not holds_autoencoder(path):  # another process may have made it
                        train_autoencoder(self.train.pictures, path, self.data.autoencoder)
            self.made_codes = Codes(path)
        return self.made_codes

    def real(self, as_codes: bool) -> dict[str, dict[str, float]]:
        """Measurements of real held-out pictures and, `as_codes`, of real pictures decoded from codes."""
        floor = {"real, held out": self.yardstick.floor(),
                 "real, of the drawn classes": self.yardstick.perfect(asked(self.data))}
        if not as_codes:
            return floor
        autoencoder = self.codes().autoencoder
        both = (self.train, self.held_out)
        pictures, labels = (torch.cat([getattr(split, name) for split in both]) for name in ("pictures", "labels"))
        decoded = torch.cat([from_codes(autoencoder, to_codes(autoencoder, part)) for part in pictures.split(256)])
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
    """Train and measure one arm with one seed.

    What an interrupted run left is gone on from; what other settings left is put aside.
    """
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
    representation = bench.representation(arm)
    train_to_end(representation.prepare(arm.config(bench.data.base, out, seed)))
    began = time.perf_counter()
    model = Transfusion.from_pretrained(out).eval()
    metrics, drawn = measure(bench, model, representation, seed)
    parts = [Text(bench.data.captions[0]), *representation.parts(bench.train.pictures[:1])]
    document = encode(parts, model.tokenizer, model.config)
    example = pack([document], len(document.tokens), model.config.patch_dim)
    seconds = {"train": logged_seconds(out / "log.jsonl"), "measure": time.perf_counter() - began}
    result = {
        "key": settings, "arm": arm.name, "seed": seed, "metrics": metrics,
        "parameters": sum(p.numel() for p in model.parameters()), "document_tokens": len(document.tokens),
        "document_flops": flops(model, example), "seconds": seconds}
    with written(out / "drawn.safetensors") as aside:
        save_file({"drawn": drawn}, aside)
    write_text(out / "metrics.json", json.dumps(result, indent=2) + "\n")
    return result


def asked(data: StudyData) -> torch.Tensor:
    """The class of each picture that is drawn."""
    return torch.arange(data.measuring.draws) % len(data.captions)


def measure(bench: Bench, model: Transfusion, representation: Patches | Codes,
            seed: int) -> tuple[dict[str, float], torch.Tensor]:
    """Return a trained model's measurements and its first pictures of each class, (classes * SHOWN, C, H, W)."""
    data, classes, held_out = bench.data, asked(bench.data), bench.held_out
    said = [data.captions[i] for i in classes]
    drawn = representation.draw(model, said, data.measuring.steps, data.measuring.guidance, seed)
    captions = [data.captions[i] for i in held_out.labels]
    prompts = [[part] for part in representation.parts(held_out.pictures)]
    found = bench.yardstick.pictures(drawn, classes) | {
        "caption_accuracy": caption_accuracy(model, prompts, captions),
        "caption_loss": text_loss(model, prompts, captions),
        "text_loss": text_loss(model, [[] for _ in captions], captions)}
    return found, drawn[:SHOWN * len(data.captions)].contiguous()


def cost(bench: Bench, arm: Arm, steps: int = 4) -> float:
    """Estimate an arm's seconds for one seed by a few timed training steps and a tenth of its drawing."""
    base, measuring, representation = bench.data.base, bench.data.measuring, bench.representation(arm)
    with tempfile.TemporaryDirectory() as directory:
        config = representation.prepare(arm.config(base, Path(directory) / "run", 0))
        config = dataclasses.replace(config, stop_after=min(steps, base.optim.steps))
        train(config)
        seconds = [record["seconds"] for record in read_log(config.out / "log.jsonl")]
        model = Transfusion.from_pretrained(config.out).eval()
    few = asked(bench.data)[:max(1, measuring.draws // 10)]
    began = time.perf_counter()
    representation.draw(model, [bench.data.captions[i] for i in few], measuring.steps, measuring.guidance, 0)
    drawing = (time.perf_counter() - began) * measuring.draws / len(few)
    return (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1) * base.optim.steps + drawing


def run_all(bench: Bench, arms: list[Arm], seeds: tuple[int, ...]) -> list[dict]:
    """Return the result of every run of these arms; those that are there are read, the others are made.

    What the others cost is printed before the first of them starts.
    """
    results = {(arm.name, seed): finished(bench, arm, seed) for arm in arms for seed in seeds}
    missing = [(arm, seed) for seed in seeds for arm in arms if results[arm.name, seed] is None]
    if missing:
        print(f"{len(results) - len(missing)} of {len(results)} runs are there; timing a few steps of the others "
              "...", flush=True)
        seconds = {name: cost(bench, arm) for name, arm in {arm.name: arm for arm, _ in missing}.items()}
        lines = [f"  {name:<20}{sum(arm.name == name for arm, _ in missing)} x {cost:.0f} "
                 "s" for name, cost in seconds.items()]
        minutes = sum(seconds[arm.name] for arm, _ in missing) / 60
        print("\n".join([*lines, f"about {minutes:.0f} minutes in all"]), flush=True)
    for arm, seed in tqdm(missing, desc=f"runs on {bench.data.name}", unit="run", dynamic_ncols=True):
        results[arm.name, seed] = run(bench, arm, seed)
    return list(results.values())
