"""Questions of benchmarks, asked by lmms-eval: `transfusion eval vqa --model DIR --data PREPARED --out DIR`.

    OUT/results/NAME-METRIC.json   a result of each metric; without a score where a server or a judge gives it
    OUT/answers/NAME.jsonl         the answers as LLaVA's scripts write them
    OUT/upload/NAME...             what a server wants, as LLaVA's scripts write it
    OUT/kept/                      answers as they come: the same command goes on after a stop
    OUT/tasks/                     lmms-eval's tasks, as `transfusion eval prepare` writes them

    torchrun --nproc-per-node 8 -m transfusion.cli eval vqa ...    asks in eight processes
"""
import math
import os
import time
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
from tyro.conf import arg

from transfusion.command import claim
from transfusion.device import PATIENCE, launched
from transfusion.eval.asking import AskingSettings
from transfusion.eval.benchmarks import GROUP, Benchmark, chosen
from transfusion.eval.prepare import ABOUT, ROWS, TASKS, prepared, write_tasks
from transfusion.eval.results import Result, remove_results, result_name, version_of, write_result
from transfusion.eval.settings import ModelSettings
from transfusion.eval.uploads import write_answers, write_upload
from transfusion.files import read_json, read_json_lines
from transfusion.settings import Count, check

INSTALL = 'pip install "tfkernels[eval]", then pip install --no-deps lmms-eval tenacity "filelock<4"'
PROMPTS = "the texts of LLaVA's question files"
NAMES = {(name, "gpt_eval_score"): "accuracy" for name in ("mmbench", "mmbench_cn")}
"""what a result is called where lmms-eval's name says what is not so: no GPT scores MMBench here"""
RULE = {"mmbench": "options are matched by rule, without a language model",
        "mmbench_cn": "options are matched by rule, without a language model"}


@dataclass(frozen=True)
class VQASettings:
    """Ask a model the questions of benchmarks that `transfusion eval prepare` has prepared, and score its answers."""

    model: Path
    """directory of a checkpoint or of an adapter"""
    data: Path
    """directory that `transfusion eval prepare` wrote"""
    out: Path
    """directory for results/, answers/ and upload/"""
    tasks: tuple[str, ...] = (GROUP,)
    """names of benchmarks; llava12: those of the twelve that are prepared"""
    batch: Count = 8
    """questions asked at once by a process"""
    limit: Count | None = None
    """questions of each benchmark at most: a try-out, whose results say so"""
    judge: str | None = None
    """a model of OpenAI's that scores LLaVA-Wild and MM-Vet, with OPENAI_API_KEY; None: their answers are written"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    loading: Annotated[ModelSettings, arg(name="")] = field(default_factory=ModelSettings)
    asking: Annotated[AskingSettings, arg(name="")] = field(default_factory=AskingSettings)


def evaluate_vqa(settings: VQASettings) -> None:
    """Run `transfusion eval vqa`.

    Raises:
        ValueError: settings that do not fit, a benchmark that is not prepared, or no lmms-eval.
    """
    check("eval vqa", settings)
    asked = _prepared(settings)
    if settings.judge is not None and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(f"eval vqa: judge is {settings.judge!r} and OPENAI_API_KEY is not set; a key fits, or no "
                         "judge: the answers are then written for another one")
    rank, size = launched()
    if rank > 0:
        _ask(settings, asked, rank, size)
        return
    with claim("eval vqa", settings.out, {"model": settings.model, "data": settings.data}, alone=False):
        for line in _ask(settings, asked, rank, size):
            print(line, flush=True)


def _prepared(settings: VQASettings) -> list[Benchmark]:
    """The benchmarks that are asked for and there."""
    there, wanted = list(prepared(settings.data)), chosen("eval vqa", settings.tasks)
    for benchmark in wanted:
        if benchmark.name in settings.tasks and benchmark not in there:
            raise ValueError(f"eval vqa: {benchmark.title} is not in {str(settings.data / benchmark.name)!r}; "
                             f"transfusion eval prepare --tasks {benchmark.name} writes it there")
    if not there:
        raise ValueError(f"eval vqa: data is {str(settings.data)!r}, which holds no prepared benchmark; a directory "
                         "that transfusion eval prepare wrote fits")
    return [benchmark for benchmark in wanted if benchmark in there]


def _ask(settings: VQASettings, asked: list[Benchmark], rank: int, size: int) -> list[str]:
    """Ask each benchmark's questions and write what came; return a line for each result."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
                      **({} if settings.judge is None else {"MODEL_VERSION": settings.judge}))
    try:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        from transfusion.eval.lmms_model import TransfusionModel
    except ImportError as error:
        raise ValueError(f"eval vqa: lmms-eval cannot be imported ({error}); {INSTALL}") from error
    if rank == 0:
        write_tasks(settings.data, settings.out / TASKS, judge=settings.judge is not None)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
        torch.distributed.barrier()                    # the tasks are written
    model = TransfusionModel(
        str(settings.model), settings.batch, settings.device, str(settings.out / "kept"),
        **vars(settings.loading), **vars(settings.asking))
    manager, lines = TaskManager(include_path=str(settings.out / TASKS), include_defaults=False), []
    for benchmark in asked:
        began = time.perf_counter()
        rows = [row for _, row in read_json_lines(settings.data / benchmark.name / ROWS)]
        found = simple_evaluate(
            model, tasks=[f"{benchmark.name}_local"], task_manager=manager,
            limit=limit_of(benchmark, settings.limit, [row["id"] for row in rows]),
            bootstrap_iters=0,
            distributed_executor_backend="torchrun" if size > 1 else "accelerate", log_samples=True,
            cli_args=SimpleNamespace(output_path=str(settings.out / "lmms-eval"), process_with_media=False,
                                     reasoning_tags=None))
        too_long = torch.tensor(model.too_long)
        if size > 1:
            torch.distributed.reduce(too_long, 0)
        if rank == 0:
            lines += _write(settings, benchmark, rows, found, model, int(too_long), time.perf_counter() - began)
    if size > 1:
        torch.distributed.destroy_process_group()
    return lines


def limit_of(benchmark: Benchmark, limit: int | None, ids: list) -> int | None:
    """How many rows are asked at most: of those that are scored together, all or none.

    Raises:
        ValueError: these do not stand together, as an older version prepared them.
    """
    if limit is not None and benchmark.group is not None:
        groups = [benchmark.group(one) for one in ids]
        if len(list(groupby(groups))) > len(set(groups)):
            raise ValueError(f"eval vqa: limit is {limit}, and rows of {benchmark.title} that are scored together "
                             "stand apart; transfusion eval prepare writes them side by side")
        while limit < len(groups) and groups[limit] == groups[limit - 1]:
            limit += 1
    return limit


def _write(settings: VQASettings, benchmark: Benchmark, rows: list[dict], found: dict, model, too_long: int,
           seconds: float) -> list[str]:
    """Write one benchmark's answers, what its server wants, and its results."""
    samples = found["samples"][f"{benchmark.name}_local"]
    answers = [(rows[sample["doc_id"]], _text(sample)) for sample in sorted(samples, key=lambda one: one["doc_id"])]
    about = read_json(settings.data / benchmark.name / ABOUT, "transfusion eval prepare writes it anew")
    write_answers(settings.out, benchmark.name, answers, settings.model.name)
    upload, missing = None, []
    try:
        upload = write_upload(settings.out, benchmark.name, answers, Path(about["folder"]))
    except ValueError as error:  # of what was asked, nothing is lost: answers are kept, and scores are written
        missing.append(f"no file for its server: {str(error).removeprefix('eval vqa: ')}")
    metrics = found["results"][f"{benchmark.name}_local"]
    scores = {name.split(",")[0]: score for name, score in metrics.items()
              if "," in name and isinstance(score, int | float) and not name.startswith("bypass")
              and not name.split(",")[0].endswith(("_stderr", "_stderr_clustered", "_stderr_clt"))}
    notes = _notes(settings, benchmark, about, upload, len(samples)) + missing
    notes += [f"{too_long:,} questions fill the model's positions: empty answers"] if too_long else []
    lines = []
    remove_results(settings.out, benchmark.name)  # a judge's score beside answers that nobody scored would be stale
    for metric, score in (scores or {"score": None}).items():
        name = NAMES.get((benchmark.name, metric), metric)
        counted = [sample for sample in samples if metric in sample or not scores]
        count = len(counted)
        if _counts_groups(benchmark):
            count = len({benchmark.group(rows[sample["doc_id"]]["id"]) for sample in counted})
        failed = isinstance(score, float) and math.isnan(score)
        note = "; ".join([*(["the judge failed at an answer or more: no score"] if failed else []), *notes])
        result = Result(
            task=benchmark.name, metric=name, value=None if failed or score is None else float(score), n=count,
            library="lmms-eval", version=version_of("lmms-eval"), seconds=seconds, model=str(settings.model),
            weights_hash=model.weights_hash, **model.asker.asking.about(PROMPTS),
            judge=settings.judge if benchmark.judge else None, note=note,
            details={"skipped": about["skipped"]})
        write_result(settings.out, result, result_name(benchmark.name, name))
        shown = "no score" if result.value is None else f"{result.value:.4f}"
        lines.append(f"{benchmark.title}: {name} {shown} of {count:,}" + (f" ({note})" if note else ""))
    return lines


def _counts_groups(benchmark: Benchmark) -> bool:
    """Whether rows that are scored together are one question, as one with its options in several orders is."""
    return benchmark.group is not None and not benchmark.pairs


def _notes(settings: VQASettings, benchmark: Benchmark, about: dict, upload: Path | None, asked: int) -> list[str]:
    """What a reader must know beside the numbers of a benchmark."""
    notes = [RULE[benchmark.name]] if benchmark.name in RULE else []
    if benchmark.judge and settings.judge is None:
        notes.append(f"a judge scores it, and none was asked: its answers are in answers/{benchmark.name}.jsonl")
    if upload is not None:
        notes.append(f"{benchmark.server} scores {upload.relative_to(settings.out)}")
    rows = "rows" if _counts_groups(benchmark) else "questions"
    if asked < about["rows"]:
        notes.append(f"the first {asked:,} of {about['rows']:,} {rows} alone")
    notes += [f"{count:,} {rows} left out: {kind}" for kind, count in about["skipped"].items()]
    return notes


def _text(sample: dict) -> str:
    """The answer of one of lmms-eval's samples."""
    held = sample["filtered_resps"]
    while isinstance(held, list | tuple):
        held = held[0]
    return held
