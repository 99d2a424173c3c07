"""Data at scale: planning a million samples, opening and counting a LLaVA json, loading packed rows.

    python -m benchmarks.data --out DIR [--quick]

Everything is made in a temporary folder. Times are of one thread, seconds of the clock and of the processor, which a
loaded machine does not lengthen. Memory of a plan is what the process's peak rises by; memory of a worker is what it
shares with no other process. Before a number is written, what it is of is checked: rows are no longer than they may be,
each sample is in one of them, and documents are as long as they were counted.
"""
import argparse
import json
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image as Picture

from benchmarks.environment import environment
from transfusion.data.choices import source_key
from transfusion.data.loader import Loader, packed_rows
from transfusion.data.mixture import Mixture, make_mixture, open_mixture
from transfusion.data.plan import Stream, make_plan
from transfusion.sequence.tokenizer import BOI, EOI, train_tokenizer

STEP_SECONDS = 1.0  # of the step that a loader is waited for by


def make_streams(samples: int) -> list[Stream]:
    """Make half of them text of 20 to 2,000 tokens, the others pairs and conversations with 256 to 1,024 patches."""
    numbers = np.random.default_rng(0)
    kinds = {"text": samples // 2, "pairs": samples * 3 // 10, "conversations": samples // 5}
    streams = []
    for name, count in kinds.items():
        patches = numbers.choice([256, 480, 512, 1024], count) if name != "text" else np.zeros(count, np.int64)
        text = np.exp(numbers.normal(5.5, 1.0, count)).clip(20, 2000).astype(np.int64)
        text = numbers.integers(10, 80, count) if name == "pairs" else text
        bare = patches + 4 if name == "pairs" else np.zeros(count, np.int64)
        streams.append(Stream(
            source_key(name), np.arange(count), np.arange(count + 1), (patches + text).astype(np.int32),
            bare.astype(np.int32), patches * (patches - 1) // 2))
    return streams


def measure_plan(samples: int, seq_len: int) -> dict:
    """Plan an epoch of `samples` samples in rows of `seq_len` tokens."""
    streams = make_streams(samples)
    Path("/proc/self/clear_refs").write_text("5")      # the peak begins anew
    before, began, spent = memory("VmHWM"), time.perf_counter(), time.process_time()
    plan = make_plan(streams, seed=0, number=0, seq_len=seq_len, step_rows=8, epochs=1)
    found = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent,
             "peak_mb": memory("VmHWM") - before}
    at = [(plan.sources == i, stream) for i, stream in enumerate(streams)]
    lengths = np.zeros(len(plan.records), np.int64)
    for mine, stream in at:
        lengths[mine] = stream.chosen_lengths(0, plan.passes[mine], plan.records[mine])
        assert len(np.unique(plan.records[mine])) == mine.sum()
    assert np.add.reduceat(lengths, plan.offsets[:-1]).max() <= seq_len
    assert len(plan.records) + sum(plan.report.too_long) == sum(len(stream.records) for stream in streams)
    report = plan.report
    return {"samples": samples, "seq_len": seq_len, **found, "rows": report.rows, "fill": report.fill,
            "slowest_over_mean": report.slowest, "before_balancing": report.slowest_before}


def write_llava(folder: Path, rows: int) -> None:
    """Write a LLaVA json of `rows` conversations, 15 in 16 with one of 200 pictures of usual sizes."""
    choose, numbers = random.Random(0), np.random.default_rng(0)
    for i in range(200):
        width, height = ((640, 480), (480, 640), (500, 375), (612, 612), (1024, 768))[i % 5]
        small = Picture.fromarray(numbers.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8))
        small.resize((width, height)).save(folder / f"{i}.jpg", quality=90)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(2, 9))) for _ in range(3000)]
    (folder / "words.txt").write_text(" ".join(words))
    texts = [" ".join(choose.choices(words, k=choose.randint(3, 40))) for _ in range(3000)]
    with open(folder / "mix.json", "w") as file:
        for i in range(rows):
            said = [{"from": who, "value": choose.choice(texts)} for _ in range(choose.choice((1, 1, 2, 3, 5)))
                    for who in ("human", "gpt")]
            row = {"id": f"{i:09d}", "conversations": said}
            if i % 16:
                said[0]["value"] = "<image>\n" + said[0]["value"]
                row["image"] = f"{choose.randrange(200)}.jpg"
            file.write(("[" if i == 0 else ",\n") + json.dumps(row))
        file.write("]")


def measure_index(folder: Path, rows: int) -> dict:
    """Open a json twice: its index is made, then found."""
    write_llava(folder, rows)
    settings = make_mixture({"sources": [{"format": "llava", "path": "mix.json"}]}, folder).sources[0].source
    found = {"rows": rows, "file_mb": (folder / "mix.json").stat().st_size / 2**20}
    for name in ("make_index_seconds", "open_seconds"):
        before, began = memory("VmRSS"), time.perf_counter()
        source = settings.open()
        assert len(source) == rows and source[rows - 1].turns
        found |= {name: time.perf_counter() - began, "open_mb": memory("VmRSS") - before}
    began = time.perf_counter()
    for number in np.random.default_rng(0).integers(0, rows, 1000).tolist():
        source[number]
    return found | {"row_microseconds": (time.perf_counter() - began) * 1000}


def open_counted(folder: Path, rows: int) -> tuple[Mixture, dict]:
    """Count the lengths of a json in this process."""
    write_llava(folder, rows)
    tokenizer = train_tokenizer([(folder / "words.txt").read_text()], 4000)
    boi, eoi = (tokenizer.convert_tokens_to_ids(name) for name in (BOI, EOI))
    config = SimpleNamespace(boi_token_id=boi, eoi_token_id=eoi, image_channels=3, patch_size=16)
    settings = make_mixture({"sources": [{"format": "llava", "path": "mix.json"}], "held_out": 0.0}, folder)
    spent = time.process_time()
    mixture = open_mixture(settings, tokenizer, config, folder=folder, workers=0)
    return mixture, {"rows": rows, "rows_per_cpu_second": rows / (time.process_time() - spent)}


def measure_loader(mixture: Mixture, seq_len: int, steps: int) -> dict:
    """Load rows in this process, then with two workers beside a step that takes `STEP_SECONDS` and no processor."""
    rows = packed_rows(mixture, rows=1, seq_len=seq_len)
    rows[0]
    spent, batches = time.process_time(), [rows[step] for step in range(1, 1 + steps)]
    spent = time.process_time() - spent
    assert not any(batch.failures for batch in batches)
    loader, memories = Loader(rows, 0, steps, workers=2), []
    began = None
    for batch in loader:
        began = began or (time.perf_counter(), loader.waited_in_all)  # the workers' start is not waited for again
        memories.append(max((private_memory(worker.pid) for worker in multiprocessing.active_children()), default=0))
        assert batch.sequence.tokens.shape == (1, seq_len)
        time.sleep(STEP_SECONDS)
    waited = (loader.waited_in_all - began[1]) / (time.perf_counter() - began[0])
    return {"seq_len": seq_len, "cpu_seconds_a_row": spent / steps,
            "documents_per_cpu_second": sum(batch.documents for batch in batches) / spent,
            "pictures_per_cpu_second": sum(batch.sequence.image_count for batch in batches) / spent,
            "tokens_per_cpu_second": steps * seq_len / spent, "step_seconds": STEP_SECONDS, "share_waited": waited,
            "worker_private_mb": max(memories)}


def memory(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def private_memory(process: int) -> float:
    """What a process shares with no other, in MB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Private"))


def main(arguments: list[str] | None = None) -> int:
    """Measure everything and write DIR/data.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a hundredth of everything")
    given = parser.parse_args(arguments)
    part = 100 if given.quick else 1
    plans = [measure_plan(1_000_000 // part, seq_len) for seq_len in (8192, 2048)]
    found: dict = {"environment": environment("cpu"), "plan": plans}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        found["llava"] = measure_index(Path(folder), 665_000 // part)
        mixture, found["lengths"] = open_counted(Path(other), 4000 // min(part, 10))
        found["loader"] = measure_loader(mixture, 8192, 24 if part == 1 else 3)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "data.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "environment"}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
