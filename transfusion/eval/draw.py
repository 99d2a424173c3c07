"""Many pictures drawn fast: `transfusion sample --prompts FILE` and `transfusion eval draw`, with --model and --out.

    OUT/pictures/000000.png, ...   a PNG for each prompt, named by its number; of GenEval's prompts in its own layout,
                                   00000/metadata.jsonl and 00000/samples/0000.png, ...
    OUT/prompts.jsonl              for each picture its file, prompt and seed, and what the prompts' file says of it
    OUT/drawing.json               the model and the settings, which a later call must share
    OUT/contact_sheet.png          up to 64 of the pictures, evenly spread

Picture i draws its random numbers from seed + i, or from the seed of its own line, whatever batch and process it is
drawn in, so that stopping, batch and processes change no picture beyond the rounding of the model's own sums. Pictures
of the same options are cut into blocks of one batch each, and block b is drawn by process b % processes. A picture that
is there is never drawn again.
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException
from tqdm import tqdm
from tyro.conf import arg

from transfusion.command import check_not_written, claim, file_error
from transfusion.data.model_images import decoded, load_image
from transfusion.data.picture_files import open_picture, to_picture
from transfusion.device import launched, own_device
from transfusion.diffusion.objective import OBJECTIVES
from transfusion.diffusion.solvers import make_solver
from transfusion.eval.picture_grids import contact_sheet
from transfusion.eval.prompts import GENEVAL_SAMPLES, Entry, Prompts, entries, read_prompts
from transfusion.eval.results import weights_hash
from transfusion.files import ASIDE, file_errors, read_json, spelled, sync, write_text
from transfusion.generate.row import grid_of
from transfusion.generate.sampling import Sampling
from transfusion.model.config import TransfusionConfig
from transfusion.model.loading import load_model
from transfusion.model.lora import find_base, holds_adapter, holds_checkpoint
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Text
from transfusion.settings import Count, check

PICTURES, ABOUT, SHOWN = "pictures", "drawing.json", 64
SAMPLING = ("steps", "sampler", "guidance", "image_size")
"""options of sampling that a result names"""


@dataclass(frozen=True)
class DrawSettings:
    """Draw a picture for each of many prompts into a folder of PNG files; the same command goes on after a stop."""

    model: Path
    """directory of a checkpoint"""
    prompts: Path
    """a .txt of lines, a .jsonl of objects with a "prompt" and, where they differ, "seed", "steps", "sampler",
    "guidance", "image_size" and the "image" to edit (GenEval's evaluation_metadata.jsonl is one), or COCO's captions
    (.json)"""
    out: Path
    """directory for pictures/, prompts.jsonl and contact_sheet.png"""
    count: Count | None = None
    """prompts at most; None: 30,000 of COCO's captions and all of any other file"""
    samples: Count | None = None
    """pictures of each prompt; None: 4 of GenEval's prompts and 1 of any other"""
    batch: Count = 64
    """pictures drawn at once by a process"""
    processes: Count = 1
    """processes on this machine, each with a GPU of its own or on the CPU; torchrun starts them on several machines"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""
    sampling: Annotated[Sampling, arg(name="")] = Sampling()


def draw(settings: DrawSettings, command: str = "eval draw") -> None:
    """Run `transfusion eval draw`, or what calls itself `command`.

    Raises:
        ValueError: settings or prompts that do not fit, options that say how text is written, or an `out` with pictures
            of another model or other settings.
    """
    check(command, settings)
    settings.sampling.check_one_image(command, "leave it out")
    rank, size = launched()
    if size > 1 and settings.processes > 1:
        raise ValueError(f"{command}: processes is {settings.processes} under a launcher of {size}; 1 fits there")
    if rank > 0:
        _draw_share(rank, command, settings, _prepare(command, settings, writes=False), size)
        return
    with claim(command, settings.out, {"model": settings.model}, alone=False):
        pictures = _prepare(command, settings, writes=True)
        if settings.processes == 1:
            _draw_share(rank, command, settings, pictures, size)
        else:
            own_device(command, settings.device, settings.processes - 1, settings.processes)  # the last has one
            try:
                torch.multiprocessing.spawn(_draw_in_process, (command, settings, pictures, settings.processes),
                                            settings.processes, daemon=True)
            except ProcessExitedException as error:  # such as for want of memory or disk; it said why, if it could
                raise ValueError(f"{command}: of {settings.processes} processes one ended ({error}); what was drawn "
                                 "stands, and the same command goes on") from error


def about_drawing(out: Path) -> dict:
    """What drawing.json says of the model and of sampling, as fields of a result; of a folder without one, nothing.

    seed is that of the first picture.
    """
    path = Path(out) / ABOUT
    held = read_json(path) if path.is_file() else {}
    sampling = held.get("sampling", {})
    details = {"sampling": {name: sampling[name] for name in SAMPLING if name in sampling}} if sampling else {}
    return {"model": held.get("model", ""), "weights_hash": held.get("weights_hash"), "prompts": held.get("rule"),
            "seed": sampling.get("seed"), "details": details}


def _line(entry: Entry) -> dict:
    """What prompts.jsonl says of a picture: ours, and what its own line has besides."""
    own = {"number": entry.number, "file": f"{PICTURES}/{entry.file}", "prompt": entry.prompt, "seed": entry.seed}
    return own | entry.about | own


def _prepare(command: str, settings: DrawSettings, writes: bool) -> list[Entry]:
    """Return the pictures to draw, compared with what an earlier call wrote; the first process writes what says so."""
    check_not_written(command, "prompts", settings.prompts, settings.out / "prompts.jsonl")
    prompts = read_prompts(settings.prompts, settings.count)
    samples = settings.samples or (GENEVAL_SAMPLES if prompts.is_geneval else 1)
    pictures = entries(prompts, samples, settings.sampling.seed, settings.prompts.parent)
    _check_entries(command, settings, _config(command, settings.model), prompts, pictures)
    lines = spelled("".join(json.dumps(_line(entry), ensure_ascii=False) + "\n" for entry in pictures))
    about = {"model": str(settings.model), "weights_hash": weights_hash(settings.model), "rule": prompts.rule,
             "pictures": len(pictures), "samples": samples, "prompts": hashlib.sha256(lines.encode()).hexdigest(),
             "sampling": json.loads(json.dumps(_drawing(settings.sampling)))}
    path = settings.out / ABOUT
    held = _compared(read_json(path, "take another --out") if path.is_file() else about)
    for name, value in _compared(about).items():
        if held.get(name) != value:
            raise ValueError(f"{command}: out is {str(settings.out)!r}, whose pictures were drawn with {name} "
                             f"{held.get(name)!r}, and now it is {value!r}; another --out fits")
    for folder in sorted({(settings.out / PICTURES / entry.file).parent for entry in pictures}):
        folder.mkdir(parents=True, exist_ok=True)
    if writes:
        write_text(path, json.dumps(about, indent=2) + "\n")
        write_text(settings.out / "prompts.jsonl", lines)
        for number, row in enumerate(prompts.rows if prompts.is_geneval else ()):
            write_text(settings.out / PICTURES / f"{number:05}" / "metadata.jsonl", json.dumps(row) + "\n")
    return pictures


def _compared(about: dict) -> dict:
    """What has to be equal for a drawing to go on, the likeliest reason first: other seeds make other lines, too."""
    sampling = about.get("sampling")
    options = sampling if isinstance(sampling, dict) else {}  # the file may hold anything
    return {"weights_hash": about.get("weights_hash"), "rule": about.get("rule"), "samples": about.get("samples"),
            **options, "pictures": about.get("pictures"), "prompts": about.get("prompts")}


def _drawing(sampling: Sampling) -> dict:
    """The options of sampling, but for what only says where text begins and ends."""
    return {name: value for name, value in dataclasses.asdict(sampling).items() if not name.startswith("turn_")}


def _check_entries(command: str, settings: DrawSettings, config: TransfusionConfig, prompts: Prompts,
                   pictures: list[Entry]) -> None:
    """Refuse a picture that cannot be drawn before the first one takes its time; the message names its line."""
    given, samples = settings.sampling.of_one_image(), len(pictures) // len(prompts.rows)
    places, solvers = {}, set()
    for entry in pictures:
        place = prompts.places[entry.number // samples]
        try:
            options = Sampling.of(given | entry.options | {"seed": entry.seed})
            solver = options.sampler, options.steps, math.prod(grid_of(config, options))
            if solver not in solvers:  # a file of many lines has few of them
                make_solver(solver[0], OBJECTIVES[config.objective], *solver[1:], config.time_shift_tokens)
                solvers.add(solver)
        except ValueError as error:
            where = place if entry.options or "seed" in prompts.rows[entry.number // samples] else command
            raise ValueError(f"{where}: {str(error).removeprefix('generate: ').removeprefix('sampler: ')}") from None
        if entry.image is not None:
            places.setdefault(entry.image, place)
    with ThreadPoolExecutor(8) as threads:
        for _ in tqdm(threads.map(_check_image, places, places.values()), desc="check images", total=len(places),
                      unit="file", disable=len(places) < 1000):
            pass


def _check_image(path: Path, place: str) -> None:
    try:
        open_picture(path)
    except ValueError as error:
        raise ValueError(f"{place}: {str(error).removeprefix('read_picture: ')}; a picture file fits") from None


def _config(command: str, path: Path) -> TransfusionConfig:
    """The configuration of a model that draws picture files; of an adapter, that of its model."""
    while holds_adapter(path):
        path = find_base(path)
    if not holds_checkpoint(path):
        raise ValueError(f"{command}: model is {str(path)!r}, which holds no config.json; a directory written by "
                         "save_pretrained or `transfusion train` fits")
    config = TransfusionConfig.from_pretrained(path)
    if config.image_channels not in (1, 3) and not (path / "vae").is_dir():
        raise ValueError(f"{command}: the model's images have {config.image_channels} channels and no VAE; models of 1 "
                         "(grey) or 3 (colour), or with a VAE (transfusion init --vae), draw picture files")
    return config


def _draw_in_process(rank: int, *share) -> None:
    """Draw the share of a process that `draw` started, which says in one line what stops it."""
    try:
        _draw_share(rank, *share)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {file_error(error)}") from None


def _draw_share(rank: int, command: str, settings: DrawSettings, pictures: list[Entry], size: int) -> None:
    """Draw what is missing of the blocks of process `rank` of `size`; who sees the last picture makes the sheet."""
    folder = settings.out / PICTURES
    share = [entry for block in _batches(pictures, settings.batch)[rank::size] for entry in block]
    missing = [entry for entry in share if not (folder / entry.file).exists()]
    if missing:
        if settings.processes > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // size))
        model = load_model(settings.model, str(own_device(command, settings.device, rank, size)))
        title = command if size == 1 else f"{command}, process 1 of {size}"
        with tqdm(total=len(share), initial=len(share) - len(missing), desc=title, unit="picture", dynamic_ncols=True,
                  disable=rank > 0) as bar, _staging(settings.out, rank) as aside, ThreadPoolExecutor(4) as writers:
            for batch in _batches(missing, settings.batch):
                saved = writers.map(functools.partial(_save, folder, aside), batch, _draw_batch(model, batch, settings))
                bar.update(len(list(saved)))
    if all((folder / entry.file).exists() for entry in pictures):
        shown = pictures[::-(-len(pictures) // SHOWN)]
        contact_sheet(settings.out / "contact_sheet.png", [folder / entry.file for entry in shown],
                      [f"{entry.number}: {entry.prompt}" for entry in shown])
        print(f"{len(pictures):,} pictures in {folder}")


def _batches(pictures: list[Entry], size: int) -> list[list[Entry]]:
    """Cut pictures into batches of at most `size`, each of pictures that are drawn with the same options."""
    alike: dict[str, list[Entry]] = {}
    for entry in pictures:
        alike.setdefault(json.dumps(entry.options, sort_keys=True), []).append(entry)
    return [group[i:i + size] for group in alike.values() for i in range(0, len(group), size)]


def _draw_batch(model: Transfusion, batch: list[Entry], settings: DrawSettings) -> Tensor:
    """Draw pictures (N, C, H, W) in [-1, 1] that have the same options."""
    prompts = [[*([] if entry.image is None else [load_image(entry.image, model.config, model.vae)]),
                Text(entry.prompt)] for entry in batch]
    options = settings.sampling.of_one_image() | batch[0].options
    drawn = model.draw(prompts, seeds=[entry.seed for entry in batch], **options)
    latents = torch.stack([image.latent for image in drawn])
    return decoded(latents, model.vae)


@contextlib.contextmanager
def _staging(out: Path, rank: int) -> Iterator[Path]:
    """Yield a directory of this process for pictures that are being written; what a kill left there goes first."""
    aside = out / f"{ASIDE}drawing-{rank}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _save(folder: Path, aside: Path, entry: Entry, pixels: Tensor) -> None:
    """Write a PNG in one piece; not by `written`, which looks through the whole folder each time."""
    path = aside / f"{entry.number}.png"
    with file_errors(folder / entry.file):
        to_picture(pixels.cpu()).save(path)
        sync(path)
        os.replace(path, folder / entry.file)
