"""A model's language: suites of lm-eval on its decoder, and perplexity on a file: `transfusion eval text --model DIR`.

    perplexity        exp(-sum_i log p(token_i | tokens before it) / tokens)
    word perplexity   the same sum over the number of words, which no tokenizer changes
    bits per byte     the same sum in bits over the file's bytes, but for a byte-order mark

The file is read in windows of the model's positions (or `--window`), as lm-eval's rolling log-likelihood does: each
window's first token is predicted from the one token before it, that of the first window from BOS. The last window is
as long as the others: it begins further in front, and only its new tokens count.
"""
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from tqdm import tqdm
from tyro.conf import arg

from transfusion.command import claim
from transfusion.eval.results import Result, check_same_data, version_of, weights_hash, write_result
from transfusion.eval.settings import ModelSettings
from transfusion.generate.row import check_finite
from transfusion.model.loading import load_model
from transfusion.settings import Count, check

INSTALL = 'pip install "tfkernels[eval]"'
SUITES = {"llama2": ("hellaswag", "piqa", "social_iqa", "winogrande", "arc_easy", "arc_challenge", "boolq")}
"""names of several tasks: the Llama 2 evaluation suite of the Transfusion paper (arXiv:2408.11039), without examples"""

RESAMPLED = 1000
"""times that lm-eval draws the answers anew for the error of a metric that has no formula for it"""
POSITIONS = 4096
"""of a text whose logits are held at once: of 49,152 tokens 0.8 GB in float32"""


@dataclass(frozen=True)
class TextSettings:
    """Measure a model's language by suites of lm-eval, whose data must be at hand, and by a text file."""

    model: Path
    """directory of a checkpoint or of an adapter"""
    out: Path
    """directory for results/"""
    tasks: tuple[str, ...] | None = None
    """names of lm-eval's tasks; llama2: hellaswag, piqa, social_iqa, winogrande, arc_easy, arc_challenge, boolq"""
    file: Path | None = None
    """a UTF-8 text file: perplexity, word perplexity and bits per byte"""
    window: Count | None = None
    """tokens of the file that are read at once; None: the model's positions"""
    include: Path | None = None
    """a folder with tasks of one's own, as lm-eval reads them"""
    shots: int | None = None
    """examples before each question; None: as the task says"""
    batch: Count = 8
    """sequences at once"""
    limit: Count | None = None
    """questions of each task at most: a try-out, whose results say so"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    loading: Annotated[ModelSettings, arg(name="")] = field(default_factory=ModelSettings)


class Perplexity(NamedTuple):
    """Of a text: three ways to divide one sum of log-probabilities, and what it is of."""

    perplexity: float
    word_perplexity: float  # inf where the words are too few for a number, as in a script without spaces
    bits_per_byte: float
    tokens: int
    log_probability: float


def evaluate_text(settings: TextSettings) -> None:
    """Run `transfusion eval text`.

    Raises:
        ValueError: settings that do not fit, a text file that cannot be read, or no lm-eval.
    """
    check("eval text", settings)
    if not settings.tasks and settings.file is None:
        raise ValueError("eval text: there are no tasks and no file; one of them fits, such as --tasks llama2")
    text = None if settings.file is None else _text(settings.file)
    manager = _task_manager(settings) if settings.tasks else None
    with claim("eval text", settings.out, {"model": settings.model}):
        if settings.file is not None:
            check_same_data("eval text", settings.out, f"text {settings.file.name}", settings.file)
        model, hashed = settings.loading.cast(load_model(settings.model, settings.device)), weights_hash(settings.model)
        if text is not None:
            _write(settings, _of_file(settings, model, text), hashed)
        for task in _names(settings) if manager is not None else ():
            _write(settings, _of_task(settings, model, manager, task), hashed)


@torch.inference_mode()
def perplexity(model, text: str, window: int | None = None, batch: int = 8, without: Sequence[int] = ()) -> Perplexity:
    """Return how well a model's decoder predicts a text.

    Ids of `without` have no probability: without those of BOI and EOI it is the perplexity of the language model that a
    model was made of.

    Raises:
        ValueError: the text is empty, the window wider than the model's positions, or a log-probability not finite.
    """
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if not ids or not text.split():
        raise ValueError("eval text: the text is empty; at least one word fits")
    positions = model.config.text_config.get_text_config().max_position_embeddings
    window = window or positions
    if window > positions:
        raise ValueError(f"eval text: window is {window:,} and the model has {positions:,} positions; at most as many "
                         "tokens fit")
    tokens = torch.tensor([model.tokenizer.bos_token_id, *ids], device=model.device)
    whole, rest, total = len(ids) // window, len(ids) % window, 0.0
    groups = [(list(range(at, min(at + batch, whole))), window) for at in range(0, whole, batch)]
    for group, counted in tqdm([*groups, *([([whole], rest)] if rest else [])], desc="windows", disable=None):
        ends = [min((number + 1) * window, len(ids)) for number in group]
        rows = torch.stack([tokens[max(0, end - window):end + 1] for end in ends])
        hidden = model.text_hidden(rows[:, :-1])[:, -counted:].flatten(0, 1)
        for states, targets in zip(hidden.split(POSITIONS), rows[:, -counted:].flatten().split(POSITIONS)):
            logits = model.backbone.logits(states).float()
            logits[:, list(without)] = -math.inf
            total += float(logits.log_softmax(-1).gather(1, targets[:, None]).double().sum())
    check_finite("eval text", total)
    words, size = len(text.split()), len(text.encode())
    return Perplexity(math.exp(-total / len(ids)), math.exp(-total / words) if -total / words < 700 else math.inf,
                      -total / math.log(2) / size, len(ids), total)


def _write(settings: TextSettings, results: Iterable[Result], hashed: str | None) -> None:
    for result in results:
        write_result(settings.out, replace(result, model=str(settings.model), weights_hash=hashed))
        said = f"no score ({result.note})" if result.value is None else f"{result.value:.6g}"
        print(f"{result.task}: {result.metric} {said} of {result.n:,}", flush=True)


def _of_file(settings: TextSettings, model, text: str) -> list[Result]:
    began = time.perf_counter()
    found = perplexity(model, text, settings.window, settings.batch)
    common = dict(task=f"text {settings.file.name}", n=found.tokens, library="transfusion",
                  version=version_of("transfusion"), seconds=time.perf_counter() - began,
                  details={"window": settings.window, "data": str(settings.file.resolve())})
    few = {"value": None, "note": "the text has too few words between spaces for a word perplexity"}
    return [Result(metric=name.replace("_", " "), **common,
                   **({"value": value} if math.isfinite(value := getattr(found, name)) else few))
            for name in ("perplexity", "word_perplexity", "bits_per_byte")]


def _names(settings: TextSettings) -> list[str]:
    """The tasks' names in lm-eval, each once."""
    return list(dict.fromkeys(one for name in settings.tasks for one in SUITES.get(name, (name,))))


def _task_manager(settings: TextSettings):
    """lm-eval's list of tasks, which holds those that are asked for.

    Raises:
        ValueError: lm-eval is not installed, or a name is no task of it.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"eval text: lm-eval cannot be imported ({error}); {INSTALL}") from error
    names = _names(settings)
    own = None if settings.include is None else str(settings.include)
    manager = TaskManager(include_path=own, include_defaults=False)  # to read all of lm-eval's takes half a minute
    if own is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=own)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"eval text: {unknown[0]!r} is no task of lm-eval; {', '.join(SUITES)} and what "
                         "`lm_eval ls tasks` lists fit")
    return manager


def _of_task(settings: TextSettings, model, manager, task: str) -> list[Result]:
    """Run a task of lm-eval on the decoder, which is a model of transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork a process with threads to draw samples
    began = time.perf_counter()
    found = simple_evaluate(
        HFLM(pretrained=model.backbone.decoder, tokenizer=model.tokenizer, batch_size=settings.batch), tasks=[task],
        num_fewshot=settings.shots, limit=settings.limit, task_manager=manager,
        bootstrap_iters=RESAMPLED)
    results, seconds = [], time.perf_counter() - began
    for task, metrics in found["results"].items():
        for key, score in metrics.items():
            name, _, chosen = key.partition(",")
            if not chosen or name.endswith("_stderr") or not isinstance(score, int | float):
                continue
            error, own = metrics.get(f"{name}_stderr,{chosen}"), found["n-samples"].get(task)
            count = metrics.get("sample_len", 0) if own is None else own["effective"]  # of a group, of all its tasks
            results.append(Result(
                task=task, metric=name, value=float(score), n=count, library="lm-eval", version=version_of("lm-eval"),
                seconds=seconds, standard_error=error if isinstance(error, float) else None, seed=1234,
                prompts=f"lm-eval's, {found['n-shot'].get(task, 0)} examples",
                note="" if settings.limit is None else f"the first {settings.limit:,} questions alone"))
    return results


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # its ends of lines as they are
    except UnicodeDecodeError as error:
        raise ValueError(f"eval text: file is {str(path)!r}, which is no UTF-8 text (byte {error.start}); a text file "
                         "fits") from error
