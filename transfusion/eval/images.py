"""How near drawn pictures come to real ones: `transfusion eval images --drawn DIR --real DIR --features MODEL`.

The Frechet distance is called FID only in the features of FID's own weights (inception.py). Real pictures give their
central squares; drawn ones are seen in the same way, whatever their size.
"""
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from transfusion.device import choose_device
from transfusion.eval.clip import Clip, clip_score
from transfusion.eval.draw import about_drawing
from transfusion.eval.inception import inception_file
from transfusion.eval.metrics import frechet_distance, kernel_distance, precision_recall
from transfusion.eval.picture_features import Network, drawn_files, features_of
from transfusion.eval.prompts import read_drawn
from transfusion.eval.results import Result, version_of, write_result
from transfusion.files import check_writable
from transfusion.settings import Count, Range, Seed, check

INCEPTION = "inception"


@dataclass(frozen=True)
class ImagesSettings:
    """Compare drawn pictures with real ones in a network's features, and with their prompts by CLIP."""

    drawn: Path
    """what `transfusion eval draw` wrote, or any folder of pictures"""
    real: Path | None = None
    """a folder of real pictures; None leaves out all but the CLIP score"""
    prompted: bool = False
    """of the real pictures take those alone that prompts.jsonl names, as COCO's prompts do"""
    features: str = INCEPTION
    """directory of a network of transformers (safetensors), a file of FID's Inception weights, or `inception`: that
    file in the cache of torch.hub"""
    clip: str | None = None
    """directory of a CLIPModel, or its name where the hub's cache holds it; None leaves out the CLIP score, which needs
    --drawn with its prompts.jsonl"""
    out: Path | None = None
    """directory for results/ and features/; None: --drawn, where `transfusion eval draw` wrote it"""
    neighbours: Count = 3
    """of precision and recall: a ball reaches its centre's neighbour of this number"""
    neighbour_pictures: Count = 10_000
    """pictures of either kind, at most, that precision and recall compare, chosen at random"""
    subsets: Annotated[int, Range(2)] = 100
    """that the kernel distance is a mean of"""
    subset_size: Annotated[int, Range(2)] = 1000
    """pictures in each, at most"""
    seed: Seed = 0
    """of these subsets, and of the pictures that precision and recall compare"""
    batch: Count = 64
    """pictures at once"""
    device: str = "auto"
    """cpu, cuda, or auto: the accelerator if there is one"""


def images(settings: ImagesSettings) -> list[Result]:
    """Run `transfusion eval images`: write and print a result for each number.

    Raises:
        ValueError: settings, folders or networks that do not fit.
    """
    check("eval images", settings)
    if settings.real is None and settings.clip is None:
        raise ValueError("eval images: real and clip are None; --real with a folder of pictures, --clip with a "
                         "CLIPModel, or both fit")
    if settings.out is None and not (settings.drawn / "prompts.jsonl").is_file():
        raise ValueError(f"eval images: out is None and drawn is {str(settings.drawn)!r}, a folder that `transfusion "
                         "eval draw` did not write; a directory for the results fits for --out")
    out = settings.out or settings.drawn
    check_writable("eval images", out)
    drawn, device = drawn_files(settings.drawn), choose_device(settings.device)
    measures = []  # all of them are opened before the first one takes its time
    if settings.real is not None:
        path = inception_file() if settings.features == INCEPTION else Path(settings.features)
        measures.append(_distances(settings, path, Network.open(path, device), out, drawn, _real(settings)))
    if settings.clip is not None:
        prompts = [row["prompt"] for row in read_drawn(settings.drawn)]
        measures.append(_clip(settings, Clip.from_pretrained(settings.clip, device), drawn, prompts))
    about, found = about_drawing(settings.drawn), []
    for result in itertools.chain(*measures):
        found.append(replace(result, **{**about, "details": about["details"] | result.details}))
        print(f"{result.metric:<48}{result.value:>12.5f}   {write_result(out, found[-1])}", flush=True)
    return found


def _distances(settings: ImagesSettings, path: Path, network: Network, out: Path, drawn: list[Path],
               real: list[Path]) -> Iterator[Result]:
    began = time.perf_counter()
    theirs, ours = (features_of(files, network, out / "features", settings.batch, title)
                    for files, title in ((real, "real"), (drawn, "drawn")))
    details = {"real": str(settings.real), "prompted": settings.prompted, "real_pictures": len(real),
               "features": str(path), "features_weights_hash": network.weights_hash}
    seconds = time.perf_counter() - began
    for number in _numbers(settings, network, theirs, ours):
        yield Result("images", number.metric, number.value, number.n, "transfusion", version_of("transfusion"), seconds,
                     standard_error=number.standard_error, resize=network.resize(), details=details | number.details)


def _real(settings: ImagesSettings) -> list[Path]:
    """The real pictures that drawn ones are compared with."""
    found = drawn_files(settings.real)
    if not settings.prompted:
        return found
    named = {row.get("image_file") for row in read_drawn(settings.drawn)}
    chosen = [path for path in found if path.name in named]
    if not chosen or len(chosen) != len(named):
        raise ValueError(f"eval images: prompted is True and real is {str(settings.real)!r}, which holds "
                         f"{len(chosen):,} of the {len(named):,} pictures that prompts.jsonl of drawn names; the "
                         "pictures of COCO's captions fit, or no --prompted")
    return chosen


class _Number(NamedTuple):
    """A number, the drawn pictures that it is of, and what else is to say of it."""

    metric: str
    value: float
    n: int
    details: dict = {}
    standard_error: float | None = None


def _numbers(settings: ImagesSettings, network: Network, real: Tensor, drawn: Tensor) -> Iterator[_Number]:
    yield _Number(distance_name("Fréchet", network), frechet_distance(real, drawn), len(drawn))
    kernel = kernel_distance(real, drawn, settings.subsets, settings.subset_size, settings.seed)
    yield _Number(distance_name("kernel", network), kernel.distance, len(drawn), {
        "subset_seed": settings.seed, "deviation": kernel.deviation, "subsets": settings.subsets,
        "subset_size": min(settings.subset_size, len(real), len(drawn))}, kernel.standard_error)
    theirs, ours = (x[chosen(len(x), settings.neighbour_pictures, settings.seed)] for x in (real, drawn))
    for name, value in precision_recall(theirs, ours, settings.neighbours)._asdict().items():
        yield _Number(f"{name} ({network.name} features)", value, len(ours), {
            "neighbours": settings.neighbours, "real_compared": len(theirs), "drawn_compared": len(ours),
            "subset_seed": settings.seed})


def chosen(count: int, most: int, seed: int) -> Tensor:
    """Return the places of `most` of `count` rows by random, rising; all of them where there are no more."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def distance_name(kind: str, network: Network) -> str:
    """The name of a distance: FID and KID in FID's features alone."""
    short = {"Fréchet": "FID", "kernel": "KID"}[kind]
    return short if network.is_fid else f"{kind} distance ({network.name} features)"


def _clip(settings: ImagesSettings, clip: Clip, drawn: list[Path], prompts: list[str]) -> Iterator[Result]:
    began = time.perf_counter()
    found = clip_score(clip, drawn, prompts, settings.batch)
    yield Result("images", "CLIP score", found.score, len(drawn), "transformers", version_of("transformers"),
                 time.perf_counter() - began, standard_error=found.standard_error, resize=clip.resize(),
                 judge=clip.name, details={"clip_weights_hash": clip.weights_hash})
