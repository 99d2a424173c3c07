"""Data at size: indices, lengths, plans and the loader on a synthetic LLaVA json and tars, in a temporary folder.

Each stage is checked before its numbers are recorded: an index against the file, a plan against its documents, rows
against what was planned. Memory is what a process of its own holds beyond what it held before, as `ru_maxrss` and
/proc/self/smaps say (private bytes: pages of mapped files are the system's). The file of results also says how loaded
the machine was.

    python -m benchmarks.data --out benchmarks/results [--rows 665000] [--members 100000] [--samples 1000000] [--quick]
"""
import argparse
import io
import json
import multiprocessing
import os
import random
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image as Picture

from benchmarks.command_line import common_parser, short_commit
from benchmarks.environment import environment
from benchmarks.harness import Result
from benchmarks.report import Report
from transfusion.data.chat import ChatSettings
from transfusion.data.documents import Documents, Kind
from transfusion.data.grids import Grids, GridSettings
from transfusion.data.lengths import count_lengths
from transfusion.data.loader import Loader, packed_rows
from transfusion.data.mixture import Chat, make_mixture, open_mixture
from transfusion.data.plan import Stream, make_plan
from transfusion.data.sources import LLaVASettings, WebDatasetSettings
from transfusion.sequence.tokenizer import BOI, EOI, train_tokenizer

WORDS = (
    "the", "picture", "shows", "a", "red", "bus", "in", "front", "of", "an", "old", "house", "while", "two", "people",
    "wait", "beside", "the", "road", "and", "a", "dog", "sleeps", "under", "the", "tree", "what", "colour", "is", "it",
    "how", "many", "are", "there", "can", "you", "describe", "why", "they", "are", "standing", "here")
WORDS_IN_TURN = 75         # of an answer, so that 665,000 rows make about 1 GB, as LLaVA's file is
PICTURES = 64              # different files; rows name one of them each
SEQ_LEN = 8192
MEAN_LENGTHS = (5.0, 1.0)  # of the logarithm of synthetic documents' tokens, and its standard deviation


def write_llava(folder: Path, rows: int) -> Path:
    """Write a json list of conversations as LLaVA's; three rows in four have a picture."""
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    for i in range(PICTURES):
        pixels = np.random.default_rng(i).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Picture.fromarray(pixels).resize((640, 480 if i % 3 else 640)).save(folder / "images" / f"{i}.jpg", quality=90)
    path = folder / "llava.json"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            turns = []
            for turn in range(draw.randint(1, 5)):
                picture = "<image>\n" if turn == 0 and i % 4 else ""
                turns += [{"from": "human", "value": f"{picture}{' '.join(draw.choices(WORDS, k=12))}?"},
                          {"from": "gpt", "value": " ".join(draw.choices(WORDS, k=WORDS_IN_TURN))}]
            image = {"image": f"images/{i % PICTURES}.jpg"} if i % 4 else {}
            row = json.dumps({"id": f"{i:09d}", **image, "conversations": turns})
            file.write(("[\n" if i == 0 else ",\n") + row)
        file.write("\n]\n")
    return path


def write_tar(folder: Path, members: int) -> Path:
    """Write a tar of so many members, a picture and a caption in turn."""
    folder.mkdir(parents=True)
    data = io.BytesIO()
    Picture.new("RGB", (64, 64), "red").save(data, "JPEG")
    path = folder / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(members // 2):
            for suffix, content in (("jpg", data.getvalue()), ("txt", f"a red square, number {i}".encode())):
                about = tarfile.TarInfo(f"{i:08d}.{suffix}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    return path


def apart(work: Callable, *arguments) -> dict:
    """Run `work` in a process of its own; return what it returns, with the seconds and megabytes that it took."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        before, private, began = _peak_mb(), _private_mb(), time.perf_counter()
        found = work(*arguments)
        seconds = time.perf_counter() - began
        memory = {"private_mb": _private_mb() - private, "peak_mb": _peak_mb() - before}
        theirs.send({"seconds": seconds, **memory, **found})

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _private_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def opened(settings, count: int) -> dict:
    """Open a source, which writes its index or finds it, and check that it has `count` records."""
    source = settings.open()
    assert len(source) == count, (len(source), count)
    return {}


def random_records(settings, count: int) -> dict:
    """Read records at random numbers; milliseconds of each at the median and at 99 of 100."""
    source, numbers, times = settings.open(), random.Random(0), []
    for number in (numbers.randrange(len(source)) for _ in range(count)):
        began = time.perf_counter()
        record = source[number]
        times.append(1000 * (time.perf_counter() - began))
        assert str(number) in record.where or f"{number:08d}" in record.where, record.where
    return {"record_ms_p50": float(np.median(times)), "record_ms_p99": float(np.quantile(times, 0.99))}


def documents() -> Documents:
    """How records become documents: patches of 16 pixels, pictures of about 256x256, LLaVA's template."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 512)
    names = (("boi_token_id", BOI), ("eoi_token_id", EOI))
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names}
    kind = Kind.of(SimpleNamespace(**ids, image_channels=3, patch_size=16))
    return Documents(tokenizer, kind, Grids(GridSettings(), 16), template=Chat(tokenizer, ChatSettings()))


class _First:
    """The first records of a source."""

    def __init__(self, source, count: int):
        self.source, self.count, self.name = source, min(count, len(source)), source.name

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int):
        return self.source[number]

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()}-{self.count}"


def lengths(settings, count: int, cache: Path) -> dict:
    """Count tokens of records with one process."""
    source = _First(settings.open(), count)
    began = time.perf_counter()
    found = count_lengths(source, documents(), cache, workers=0)
    assert not found.failures(), found.failures()
    return {"records_per_second": len(source) / (time.perf_counter() - began)}


def synthetic_stream(samples: int) -> Stream:
    """Lengths of so many documents, log-normal, half of them with a picture of 256 patches."""
    draw = np.random.default_rng(0)
    tokens = np.exp(draw.normal(*MEAN_LENGTHS, samples)).clip(4, SEQ_LEN - 300).astype(np.int32)
    pictures = draw.random(samples) < 0.5
    tokens += (258 * pictures).astype(np.int32)
    starts = np.arange(samples + 1, dtype=np.int64)
    extra = pictures * np.int64(256 * 255 // 2)
    return Stream(7, starts[:-1], starts, tokens, np.zeros(samples, np.int32), extra)


def plan(stream: Stream) -> dict:
    """Plan an epoch; every document must be in one row, once, and none in a row that is too full."""
    began = time.perf_counter()
    made = make_plan([stream], seed=0, number=0, seq_len=SEQ_LEN, step_rows=8, epochs=1)
    seconds, peak = time.perf_counter() - began, _peak_mb()
    assert np.array_equal(np.sort(made.records), stream.records)
    assert np.add.reduceat(stream.lengths[made.records], made.offsets[:-1]).max() <= SEQ_LEN
    return {"plan_seconds": seconds, "fill": made.report.fill, "slowest_over_mean": made.report.slowest,
            "slowest_over_mean_unbalanced": made.report.slowest_before, "peak_at_plan_mb": peak}


def loading(folder: Path, rows: int, workers: int, steps: int, step_seconds: float) -> dict:
    """Read batches while a step of `step_seconds` is slept through; the share of time that is waited."""
    mixture = make_mixture({"sources": [{"format": "llava", "path": "llava.json"}], "held_out": 0.0, "seed": 1}, folder)
    made = documents()
    config = SimpleNamespace(**vars(made.kind))
    opened_mixture = open_mixture(mixture, made.tokenizer, config, folder=folder, workers=0)
    packed = packed_rows(opened_mixture, rows=rows, seq_len=2048)
    packed.planned.ensure(steps * rows)
    loader, tokens, waited, began = Loader(packed, 0, steps, workers=workers), 0, 0.0, time.perf_counter()
    for number, batch in enumerate(loader):
        assert not batch.failures, batch.failures
        if number:
            tokens, waited = tokens + batch.sequence.tokens.numel(), waited + loader.waited
        else:
            began = time.perf_counter()                # the first batch is waited for, whatever comes
        time.sleep(step_seconds)
    seconds = time.perf_counter() - began
    return {"tokens_per_second": tokens / seconds, "share_waited": waited / seconds}


def record(report: Report, stage: str, found: dict, **sizes) -> None:
    """Add a stage, which has passed its checks, to the file, and print it."""
    seconds = found.pop("seconds")
    ms = {"p20": 1000 * seconds, "p50": 1000 * seconds, "p80": 1000 * seconds, "repetitions": 1}
    result = Result(f"transfusion.data {stage}", checked=True, milliseconds={stage: ms}, timing={stage: "wall"})
    report.record({"stage": stage, **sizes}, result, load_average=os.getloadavg()[0], **found)
    words = "  ".join(f"{name} {value:,.4g}" for name, value in found.items())
    sized = " ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in sizes.values())
    print(f"{stage:<14}{sized:>12}  {seconds:9.3f} s  {words}", flush=True)


def run(report: Report, folder: Path, options: argparse.Namespace) -> None:
    """Run every stage in turn."""
    path = write_llava(folder / "chat", options.rows)
    size = path.stat().st_size / 1e6
    settings = LLaVASettings(path)
    record(report, "json index", apart(opened, settings, options.rows), rows=options.rows, megabytes=round(size))
    record(report, "json open", apart(opened, settings, options.rows), rows=options.rows, megabytes=round(size))
    record(report, "json records", apart(random_records, settings, options.reads), reads=options.reads)

    tars = WebDatasetSettings(write_tar(folder / "tar", options.members))
    record(report, "tar index", apart(opened, tars, options.members // 2), members=options.members)
    record(report, "tar open", apart(opened, tars, options.members // 2), members=options.members)
    record(report, "tar records", apart(random_records, tars, options.reads), reads=options.reads)

    record(report, "lengths", apart(lengths, settings, options.counted, folder / "lengths"), records=options.counted)
    record(report, "plan", apart(plan, synthetic_stream(options.samples)), samples=options.samples)
    small = write_llava(folder / "small", options.counted)
    for workers, seconds in ((0, 0.0), (1, 0.0), (1, options.step)):
        found = apart(loading, small.parent, 2, workers, options.steps, seconds)
        record(report, "loader", found, workers=workers, step_seconds=seconds)


def main(arguments: list[str] | None = None) -> int:
    """Run all stages, print a line for each, and write them."""
    parser = common_parser(__doc__.splitlines()[0], "a few hundred rows, for the test", seconds=None)
    for name, default, words in (
            ("rows", 665_000, "rows of the json"), ("members", 100_000, "members of the tar"),
            ("samples", 1_000_000, "documents that are planned"), ("counted", 4000, "records whose tokens are counted"),
            ("reads", 1000, "records read at random"), ("steps", 30, "batches that the loader reads")):
        parser.add_argument(f"--{name}", type=int, default=default, help=words)
    parser.add_argument("--step", type=float, default=0.5, help="seconds of a step that the loader reads ahead of")
    options = parser.parse_args(arguments)
    for name in ("rows", "members", "samples", "counted", "reads", "steps"):
        if getattr(options, name) < 2:
            parser.error(f"--{name} is {getattr(options, name)}; 2 or more fits")
    if options.quick:
        options.rows, options.members, options.samples, options.counted = 300, 200, 3000, 100
        options.reads, options.steps, options.step = 50, 3, 0.05
    torch.set_num_threads(1)
    names = "rows", "members", "samples", "counted", "reads", "steps", "step"
    sizes = {name: getattr(options, name) for name in names}
    loaded = {"load_average": os.getloadavg(), "processors": os.cpu_count()}
    report = Report("data", {"quick": options.quick, "seq_len": SEQ_LEN, **sizes, **loaded},
                    environment("cpu", options.commit))
    with tempfile.TemporaryDirectory() as folder:
        run(report, Path(folder), options)
    report.save(options.out / f"data-cpu-{short_commit(report)}.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
