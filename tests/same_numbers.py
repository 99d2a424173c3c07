"""Compare two checkouts to the bit, in losses, weights, pictures and texts: the check of a refactor.

    python -m tests.same_numbers OLD NEW [--work DIR] [--only NAME ...] [--checkpoint DIR]

A refactor changes no number, and this says whether one did. OLD and NEW are checkouts of the project, and each setting
below is a command that both run, in a process of its own with one thread. The two must log equal records (all that OLD
records of a step but what the clock says), save equal tensors, draw equal pictures and print equal text. NEW also has
to read what OLD saved: both draw, go on and fine-tune from checkpoints that OLD made.

With --work, DIR keeps what OLD gave, and it is not computed again. --checkpoint is what is drawn from: by default OLD's
finished demo (runs/digits) if it is there, or else what the first setting trained. The exit status is 1 where anything
differs or a command fails.
"""
import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file

from tests.transfusion.model.test_from_language_model import language_model
from transfusion.train.log import CLOCKED

DIGITS = "train digits --out {out} --optim.steps 12 --optim.rows 2 --model.hidden 32 --model.layers 2 --model.mlp 64"
TUNE = "train digits --out {out} --optim.steps 8 --optim.rows 2 --tune.start {old}/init"
JUDGE = "--out {out} --settings.steps 6 --settings.batch 16 --settings.width 8"
CODES = """import VQSettings, train_autoencoder; from pathlib import Path; from torch import linspace
train_autoencoder(linspace(-1, 1, 40 * 64).view(40, 1, 8, 8), Path('{out}'), VQSettings(steps=9, batch=4, codes=4))" """
DRAW = "sample --model {checkpoint} --out {out}/drawn.png --steps 8 --guidance 2 --seed 3"


class Setting(NamedTuple):
    """A verb of `transfusion` or Python's own arguments: {out} is the folder written to, {old} holds OLD's folders."""

    name: str
    command: str
    old: str = ""  # how the command ends in OLD
    new: str | None = None  # how it ends in NEW, where that differs
    copy_of: str | None = None  # the setting whose folder, as OLD left it, this one starts with


SETTINGS = (
    Setting("digits", f"{DIGITS} --model.image-layers dit"),
    Setting("linear", f"{DIGITS} --model.image-layers linear --model.objective eps"),
    Setting("unet", f"{DIGITS} --model.image-layers unet --model.unet-channels 8 16 --model.unet-blocks 1"),
    Setting("adaln", f"{DIGITS} --model.backbone adaln --model.positions 2d --model.objective x0"),
    Setting("experts", f"{DIGITS} --model.backbone experts --model.positions 2d --model.objective v"),
    Setting("causal-images", f"{DIGITS} --model.image-attention causal --optim.times logit-normal"),
    Setting("shifted-times", f"{DIGITS} --model.time-shift-tokens 8"),
    Setting("clean-copies", f"{DIGITS}", "--data.context clean"),
    Setting("ema-0", f"{DIGITS} --optim.ema 0"),
    Setting("digits-paper", f"{DIGITS.replace('digits', 'digits-paper', 1)} --seed 7"),
    Setting("stopped", f"{DIGITS} --save-every 3 --stop-after 6"),
    Setting("resumed", f"{DIGITS} --save-every 3 --resume", copy_of="stopped"),
    Setting("init", "init --llm {old}/llm --out {out} --image-channels 1 --image-size 8 8 --backbone adaln"),
    Setting("lora", f"{TUNE} --tune.trained lora --tune.lora-rank 4"),
    Setting("images-alone", f"{TUNE} --tune.trained images"),
    Setting("emoji", f"{DIGITS.replace('digits', 'emoji', 1)} --optim.steps 4"),
    Setting("vae", "vae train small --out {out} --optim.steps 6 --optim.batch 4 --losses.adversarial-from 3"),
    Setting("latents", "vae encode --vae {old}/vae --out {out} --batch 512", "--data.name emoji-lively",
            "data:emoji --data.lively"),
    Setting("on-latents", f"{DIGITS.replace('digits', 'emoji', 1)} --optim.steps 4", "--data.latents {old}/latents"),
    Setting("classifier", "-m", f"transfusion.eval.classifier {JUDGE} --data.name digits",
            f"transfusion.train.classifier {JUDGE} data:digits"),
    Setting("vq", '-c "from', f"transfusion.studies.vq {CODES}", f"transfusion.recipes.studies.vq {CODES}"),
    Setting("draw", f"{DRAW} --prompt 'a handwritten seven'"),
    Setting("draw-dpm++", f"{DRAW} --prompt 'a handwritten two' --sampler dpm++ --size 8 16"),
    Setting("write", f"{DRAW} --prompt 'a' --no-draw --temperature 0.8 --top-p 0.9 --max-new-tokens 32 --max-images 4"),
    Setting("caption", "caption --model {checkpoint} --images {old}/draw/drawn.png {old}/draw/drawn.png"),
)


def run(checkout: Path, command: str, out: Path) -> dict:
    """Run a command in a checkout, and return what it gave."""
    command = command if command.startswith("-") else f"-m transfusion.cli {command}"
    variables = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=checkout,
                          env=os.environ | variables, capture_output=True, text=True)
    found = {f"weights {path.relative_to(out)}": tensors_hash(path) for path in files(out, "*.safetensors")}
    for path in files(out, "*.png"):
        found[f"picture {path.relative_to(out)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for log in files(out, "log.jsonl"):
        for record in map(json.loads, log.read_text().splitlines()):
            found |= {f"step {record['step']} {key}": value for key, value in record.items() if key not in CLOCKED}
    if " sample " in command or " caption " in command:
        found["text"] = done.stdout.replace(str(out), "")
    return found if done.returncode == 0 else {"failed": done.stderr[-2000:]}


def files(out: Path, pattern: str) -> list[Path]:
    """What a command wrote, except for plots and for what only resuming reads, which may take another form."""
    return sorted(p for p in out.rglob(pattern) if p.name != "loss.png" and "resume" not in p.parts)


def tensors_hash(path: Path) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of a file's tensors."""
    digest = hashlib.sha256()
    for name, x in sorted(load_file(path).items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode() + x.contiguous().numpy().tobytes())
    return digest.hexdigest()


def differences(found: list[dict]) -> list[str]:
    """What differs between OLD's and NEW's, a line each; a command that failed or gave nothing differs too."""
    for side, one in zip(("OLD", "NEW"), found):
        if not one or "failed" in one:
            return [f"{side} failed: {one['failed']}" if one else f"{side} gave nothing to compare"]
    old, new = found
    keys = [key for key in old | new if key in old or not key.startswith("step")]  # NEW may record more of a step
    return [f"{key}: {old.get(key)!r} and {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def run_both(setting: Setting, old: Path, new: Path, work: Path, checkpoint: Path) -> list[dict]:
    """What a setting gives in OLD, unless an earlier run has kept it, and in NEW."""
    found = []
    for side, checkout in (("old", old), ("new", new)):
        out, kept = work / side / setting.name, work / side / f"{setting.name}.json"
        end = setting.old if side == "old" or setting.new is None else setting.new
        command = f"{setting.command} {end}".format(out=out, old=work / "old", checkpoint=checkpoint)
        before = json.loads(kept.read_text()) if kept.is_file() else {}
        if before.get("command") != command:
            shutil.rmtree(out, ignore_errors=True)
            if setting.copy_of:
                shutil.copytree(work / "old" / setting.copy_of, out)
            before = {"command": command, "result": run(checkout, command, out)}
            if "failed" not in before["result"]:
                kept.write_text(json.dumps(before))
        found.append(before["result"])
    return found


def main() -> int:
    """Run every setting in both checkouts and print a table."""
    names = [setting.name for setting in SETTINGS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, help="a folder that keeps what OLD gave")
    parser.add_argument("--checkpoint", type=Path, help="what is drawn from")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    options = parser.parse_args()
    work, old, new = (Path(p).resolve() for p in (options.work or tempfile.mkdtemp(), options.old, options.new))
    demo = old / "runs/digits"
    checkpoint = options.checkpoint or (demo if (demo / "config.json").is_file() else work / "old/digits")
    language_model(work / "old/llm", "llama")
    shutil.rmtree(work / "new", ignore_errors=True)
    different = 0
    for setting in (s for s in SETTINGS if s.name in options.only):
        began = time.perf_counter()
        found = run_both(setting, old, new, work, checkpoint.resolve())
        lines = differences(found)
        different += bool(lines)
        said = f"DIFFERS in {len(lines)}: {lines[0]}" if lines else f"equal: {len(found[1])} numbers, files and texts"
        print(f"{setting.name:14} {time.perf_counter() - began:5.1f} s  {said}", flush=True)
    return int(different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
