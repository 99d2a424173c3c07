"""Benchmarks in LLaVA's folders as lmms-eval reads them offline: `transfusion eval prepare --data DIR --out DIR`.

    OUT/NAME/               a DatasetDict of `datasets` with the split "test", whose pictures stay where they are
    OUT/NAME/rows.jsonl     for each of its rows the id, the prompt, and what a server wants beside the answer
    OUT/NAME/benchmark.json where it was read, how many rows it has, which were left out and why
    OUT/tasks/NAME.yaml     lmms-eval's task NAME_local: its own scoring of the benchmark, with LLaVA's prompts

With lmms-eval alone: `lmms-eval --include_path OUT/tasks --tasks gqa_local --model transfusion ...`.
"""
import hashlib
import importlib.util
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image as Picture
from tqdm import tqdm

from transfusion.command import claim
from transfusion.data.arrays import fingerprint
from transfusion.data.picture_files import open_picture
from transfusion.eval.benchmarks import BENCHMARKS, GROUP, Benchmark, Missing, Row, chosen
from transfusion.files import write_text, written
from transfusion.settings import check

SPLIT, ROWS, ABOUT, TASKS, NAMED = "test", "rows.jsonl", "benchmark.json", "tasks", 20
AT_ONCE = 256
"""rows whose pictures are looked at, and written, together"""
KINDS = {  # of columns: the type in Arrow, and the feature of `datasets`
    "string": ("string", {"dtype": "string", "_type": "Value"}),
    "int64": ("int64", {"dtype": "int64", "_type": "Value"}),
    "strings": ("list", {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}),
    "image": ("picture", {"_type": "Image"}),
    "images": ("pictures", {"feature": {"_type": "Image"}, "_type": "List"}),
}


@dataclass(frozen=True)
class PrepareSettings:
    """Write benchmarks in LLaVA's folders as lmms-eval reads them offline."""

    data: Path
    """the folder of all benchmarks, LLaVA's playground/data/eval"""
    out: Path
    """directory for the data sets and lmms-eval's tasks"""
    tasks: tuple[str, ...] = (GROUP,)
    """names of benchmarks; llava12: those of the twelve that are there"""


def prepare(settings: PrepareSettings) -> None:
    """Run `transfusion eval prepare`; what is not there, and what is left out, is said.

    Raises:
        ValueError: settings that do not fit, or a benchmark that was asked for by its name, or all, are missing.
        DataError: a file that cannot be read; the message names file and line.
    """
    check("eval prepare", settings)
    wanted, missing = chosen("eval prepare", settings.tasks), []
    if not settings.data.is_dir():
        raise ValueError(f"eval prepare: data is {str(settings.data)!r}, which is no directory; LLaVA's "
                         "playground/data/eval fits")
    with claim("eval prepare", settings.out, {"data": settings.data}):
        for benchmark in wanted:
            try:
                print(prepare_one(benchmark, settings.data, settings.out), flush=True)
            except Missing as error:
                if benchmark.name in settings.tasks:
                    raise
                missing.append(benchmark.name)
                print(f"not there: {error}", flush=True)
        if len(missing) == len(wanted):
            raise ValueError(f"eval prepare: data is {str(settings.data)!r}, which holds no benchmark; LLaVA's "
                             "playground/data/eval fits")
        write_tasks(settings.out, settings.out / TASKS)


def prepare_one(benchmark: Benchmark, data: Path, out: Path) -> str:
    """Write one benchmark and return a line that says what was written."""
    folder = benchmark.find(data)
    kept, skipped = _readable(benchmark.read(folder), benchmark.title)
    kept = _with_partners(kept, skipped) if benchmark.pairs else kept
    kept = _side_by_side(kept, benchmark.group) if benchmark.group else kept
    rows = [row for row, _ in kept]
    if not rows:
        first = next(iter(skipped.values()), ["it has no question"])[0]
        raise Missing(f"{benchmark.title}: {folder} has no question whose picture can be read ({first})")
    target = out / benchmark.name
    write_dataset(target, benchmark, kept)
    lines = (json.dumps({"id": row.id, "prompt": row.prompt, **row.upload}, ensure_ascii=False) for row in rows)
    write_text(target / ROWS, "\n".join(lines) + "\n")
    counts = {kind: len(places) for kind, places in skipped.items()}
    write_text(target / ABOUT, json.dumps({
        "benchmark": benchmark.name, "folder": str(folder.resolve()), "rows": len(rows), "skipped": counts,
        "examples": {kind: places[:NAMED] for kind, places in skipped.items()},
    }, indent=2) + "\n")
    left = "".join(f"; {count:,} left out: {kind} ({skipped[kind][0]})" for kind, count in counts.items())
    return f"{benchmark.title}: {len(rows):,} questions{left}"


def _readable(rows: Iterable[Row], title: str) -> tuple[list[tuple[Row, dict]], dict[str, list[str]]]:
    """Rows whose pictures can be read, each with its picture as a data set holds it; others by what is wrong."""
    kept, skipped, known = [], defaultdict(list), {}
    progress, rows = tqdm(desc=title, unit="row", disable=None), iter(rows)
    with ThreadPoolExecutor(8) as threads:
        while batch := list(islice(rows, AT_ONCE)):
            new = list({row.picture: None for row in batch if row.picture not in known})
            known |= dict(zip(new, threads.map(_stored, new)))
            for row in batch:
                stored = known[row.picture]
                if isinstance(stored, dict):
                    kept.append((row, stored))
                else:
                    skipped[stored[0]].append(f"{row.where}: {stored[1]}")
            known = {} if isinstance(batch[0].picture, bytes) else known
            progress.update(len(batch))
    progress.close()
    return kept, skipped


def _stored(picture: Path | bytes) -> dict | tuple[str, str]:
    """A picture as `datasets` stores it, or what is wrong with it: its kind and a text.

    A file stays where it is. What `datasets` would show otherwise than training does, such as transparent parts,
    which become white, is stored anew.
    """
    name = "its picture" if isinstance(picture, bytes) else str(picture)
    if not isinstance(picture, bytes) and not picture.is_file():
        return "missing picture", f"there is no {name}"
    try:
        shown = open_picture(io.BytesIO(picture) if isinstance(picture, bytes) else picture, name)
        with Picture.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as held:
            plain = shown.mode == "RGB" and held.mode in ("RGB", "L")
    except (ValueError, OSError) as error:
        return "unreadable picture", str(error)
    if plain:
        return {"bytes": picture, "path": None} if isinstance(picture, bytes) else \
            {"bytes": None, "path": str(picture.resolve())}
    flat, file = Picture.alpha_composite(Picture.new("RGBA", shown.size, "white"), shown.convert("RGBA")), io.BytesIO()
    flat.convert("RGB").save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _with_partners(kept: list[tuple[Row, dict]], skipped: dict[str, list[str]]) -> list[tuple[Row, dict]]:
    """Rows of pictures that are asked about twice, as MME's score needs; others count as skipped."""
    times = Counter(row.id for row, _ in kept)
    for row, _ in kept:
        if times[row.id] != 2:
            skipped["no pair of questions"].append(f"{row.where}: {times[row.id]} questions are about {row.id}, 2 fit")
    return [(row, stored) for row, stored in kept if times[row.id] == 2]


def _side_by_side(kept: list[tuple[Row, dict]], group: Callable) -> list[tuple[Row, dict]]:
    """Rows that are scored together stand together, where the first of them stood."""
    first = {group(row.id): at for at, (row, _) in reversed(list(enumerate(kept)))}
    return sorted(kept, key=lambda one: first[group(one[0].id)])


def write_dataset(folder: Path, benchmark: Benchmark, rows: list[tuple[Row, dict]]) -> None:
    """Write rows as `datasets` writes a DatasetDict of one split to disk."""
    kinds = {"image": benchmark.picture, "prompt": "string", **benchmark.columns}
    features = {name: KINDS[kind][1] for name, kind in kinds.items()}
    split, shard = folder / SPLIT, "data-00000-of-00001.arrow"
    with written(split / shard) as aside:
        _write_arrow(aside, kinds, features, rows, benchmark.picture)
    content = [(row.prompt, _identity(row.picture), row.columns) for row, _ in rows]
    state = {"_data_files": [{"filename": shard}], "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
             "_fingerprint": fingerprint(features, content),
             "_output_all_columns": False, "_split": SPLIT}
    about = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    write_text(split / "state.json", json.dumps(state, indent=2))
    write_text(split / "dataset_info.json", json.dumps(about, indent=2))
    write_text(folder / "dataset_dict.json", json.dumps({"splits": [SPLIT]}))


def _identity(picture: Path | bytes) -> tuple:
    """What changes with a picture: the hash of its bytes, or its file's name, size and time."""
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest(),
    about = picture.stat()
    return str(picture), about.st_size, about.st_mtime_ns


def _write_arrow(path: Path, kinds: dict[str, str], features: dict, rows: list, picture: str) -> None:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"eval prepare: data sets need pyarrow, which is not installed ({error}); "
                         "pip install 'tfkernels[data]'") from error
    held = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    types = {"string": pyarrow.string(), "int64": pyarrow.int64(), "list": pyarrow.list_(pyarrow.string()),
             "picture": held, "pictures": pyarrow.list_(held)}
    schema = pyarrow.schema([(name, types[KINDS[kind][0]]) for name, kind in kinds.items()],
                            {"huggingface": json.dumps({"info": {"features": features}})})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for start in range(0, len(rows), AT_ONCE):
            batch = [{"image": stored if picture == "image" else [stored], "prompt": row.prompt, **row.columns}
                     for row, stored in rows[start:start + AT_ONCE]]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))


def prepared(data: Path) -> Iterator[Benchmark]:
    """Yield the benchmarks that a folder of `prepare` holds."""
    return (one for one in BENCHMARKS.values() if (data / one.name / ABOUT).is_file())


def write_tasks(data: Path, folder: Path, judge: bool = False) -> None:
    """Write into `folder` a task of lmms-eval for each benchmark that is prepared in `data`.

    Without lmms-eval nothing is written, for a task includes one of its own. With `judge` the benchmarks that a
    language model scores are scored by lmms-eval's judge; without it their answers are kept alone.
    """
    found = importlib.util.find_spec("lmms_eval")
    if found is None:
        print("lmms-eval is not installed: its tasks are written when `transfusion eval vqa` finds it", flush=True)
        return
    names, tasks = [], Path(found.submodule_search_locations[0]) / "tasks"
    for benchmark in prepared(data):
        names.append(f"{benchmark.name}_local")
        write_text(folder / f"{benchmark.name}.yaml", task_yaml(benchmark, data, tasks, judge))
    write_text(folder / f"{GROUP}.yaml", "\n".join([f"group: {GROUP}_local", "task:",
                                                   *(f"- {name}" for name in names), ""]))


def task_yaml(benchmark: Benchmark, data: Path, tasks: Path, judge: bool) -> str:
    """The text of a task: lmms-eval's own, with another data set and LLaVA's prompts."""
    scored = benchmark.task is not None and (judge or not benchmark.judge)
    base = tasks / (benchmark.task or "gqa/gqa.yaml")  # of a task that a server scores, only the pictures' function
    lines = [f"include: {json.dumps(str(base))}", f"task: {benchmark.name}_local",
             f"dataset_path: {json.dumps(str((data / benchmark.name).resolve()))}", "dataset_name: null",
             "dataset_kwargs: {load_from_disk: true}", "process_docs: null", f"test_split: {SPLIT}",
             "doc_to_text: prompt", "lmms_eval_specific_kwargs: null", "model_specific_generation_kwargs: null",
             f"generation_kwargs: {{max_new_tokens: {benchmark.max_new_tokens}, until: [], do_sample: false}}"]
    return "\n".join([*lines, *(_scoring(benchmark) if scored else UNSCORED), ""])


UNSCORED = ["doc_to_target: prompt", "process_results: !function transfusion.eval.judged.unscored",
            "metric_list:", "- {metric: bypass, aggregation: bypass, higher_is_better: true}"]
OWN_METRICS = {
    "pope": ["process_results: !function transfusion.eval.judged.pope", "metric_list:",
             *(line for metric, score in (
                 ("accuracy", "accuracy"), ("precision", "precision"), ("recall", "recall"), ("f1_score", "f1"),
                 ("yes_ratio", "yes")) for line in (
                     f"- metric: pope_{metric}", "  higher_is_better: true",
                     f"  aggregation: !function transfusion.eval.judged.pope_{score}"))],
    "textvqa": ["metric_list:", "- {metric: exact_match, aggregation: mean, higher_is_better: true}"],
    **dict.fromkeys(("mmbench", "mmbench_cn"), [
        "metric_list:", "- metric: gpt_eval_score", "  higher_is_better: true",
        "  aggregation: !function lmms_eval.tasks.mmbench.en_utils.mmbench_aggregate_dev_results_static"]),
    "llava_wild": ["process_results: !function transfusion.eval.judged.llava_wild", "metric_list:",
                   *(line for kind in ("all", "conv", "detail", "complex") for line in (
                       f"- metric: gpt_eval_llava_{kind}", "  higher_is_better: true",
                       f"  aggregation: !function transfusion.eval.judged.llava_wild_{kind}"))],
    "mmvet": ["process_results: !function transfusion.eval.judged.mmvet", "metric_list:",
              "- metric: gpt_eval_score", "  higher_is_better: true",
              "  aggregation: !function transfusion.eval.judged.mmvet_score"],
}


def _scoring(benchmark: Benchmark) -> list[str]:
    """Lines of a task whose metrics are not those of lmms-eval's: no submission, no failed judge as a score."""
    return OWN_METRICS.get(benchmark.name, [])
