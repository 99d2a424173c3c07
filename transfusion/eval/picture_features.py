"""Features of picture files by a named network, kept on the disk, and what the network sees of a picture.

Every picture is brought to the network's size in one way: its central square, each channel resized in float32 by
Pillow's bicubic filter, which is wide enough to leave no aliasing where it shrinks (as clean-fid does,
arXiv:2104.11222). Features are kept in files of 1,024 pictures, named by the hash of the weights, the size, the
preprocessing and the pictures' paths, sizes and times: a kill loses one of them at most, and a changed picture renews
its own.
"""
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as Picture
from torch import Tensor
from tqdm import tqdm

from transfusion.data.folders import files_in
from transfusion.data.picture_files import SUFFIXES, open_picture
from transfusion.eval.features import Features
from transfusion.eval.inception import SIDE, Inception, is_fid_file
from transfusion.eval.prompts import read_drawn
from transfusion.eval.results import weights_hash
from transfusion.files import written

SHARD = 1024


class Network(NamedTuple):
    """A network whose features pictures are compared in."""

    name: str
    """what results call its features"""
    is_fid: bool
    """whether it is the one that FID is of"""
    size: int
    channels: int
    read: Callable[[Tensor], Tensor]
    """pictures (N, channels, size, size) in [-1, 1] to features (N, F)"""
    weights_hash: str
    preprocessing: str = ""
    """what it does to them before, where its directory says so"""

    @classmethod
    def open(cls, path: Path, device: torch.device) -> "Network":
        """Open FID's file of weights, or a directory with a network of transformers in safetensors.

        Raises:
            ValueError: it is neither.
        """
        path = Path(path)
        if path.is_file():
            network, is_fid = Inception.from_file(path).to(device), is_fid_file(path)
            name = "Inception 2015-12-05" if is_fid else "Inception of other weights"
            return cls(name, is_fid, SIDE, 3, lambda x: network(x.to(device)), weights_hash(path))
        features = Features.from_pretrained(path).to(device)
        size, config = features.preprocessing.size, features.body.config.to_dict()
        if size is None or size[0] != size[1]:
            raise ValueError(f"features of pictures: {features.name} takes pictures of size {size}; one square size in "
                             "its preprocessor_config.json fits")
        return cls(config.get("architecture") or config["model_type"], False, size[0], features.preprocessing.channels,
                   features.pooled, weights_hash(path), str(features.preprocessing))

    def resize(self) -> str:
        """Say what the network sees of a picture."""
        return square_words(self.size)


def square_words(size: int) -> str:
    """Say what `read_square` does."""
    return f"central square to {size}x{size}, bicubic with antialias (Pillow, float32)"


def read_square(path: Path, size: int, channels: int = 3) -> Tensor:
    """Return the central square of a picture file, (channels, size, size) in [-1, 1], white where transparent.

    Raises:
        ValueError: as `read_picture` of picture_files.
    """
    return fit_square(open_picture(path), size, channels)


def fit_square(picture: Picture.Image, size: int, channels: int = 3) -> Tensor:
    """Return the central square of a picture, as `read_square` does."""
    if picture.mode == "RGBA":
        picture = Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture)
    picture, side = picture.convert("L" if channels == 1 else "RGB"), min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    planes = [np.asarray(plane.convert("F").resize((size, size), Picture.Resampling.BICUBIC))
              for plane in picture.split()]
    return torch.from_numpy(np.stack(planes)).clamp(0, 255) / 127.5 - 1


def drawn_files(folder: Path) -> list[Path]:
    """Return the pictures of a directory that `transfusion eval draw` wrote, or those of any folder.

    Raises:
        ValueError: a drawing that is not finished, or a folder without pictures.
    """
    folder = Path(folder)
    if not (folder / "prompts.jsonl").is_file():
        return picture_files(folder)
    found = [folder / row["file"] for row in read_drawn(folder)]
    missing = [path for path in found if not path.is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} lacks {len(missing):,} of its {len(found):,} pictures; the command "
                         "`transfusion eval draw` that began it goes on")
    return found


def picture_files(folder: Path) -> list[Path]:
    """Return the picture files of a folder and of those inside it, in the order of their names.

    Raises:
        ValueError: there are none, or a folder cannot be read.
    """
    found = files_in(folder, SUFFIXES)
    if not found:
        raise ValueError(f"{str(folder)!r} holds no pictures; a folder of {', '.join(SUFFIXES)} files fits")
    return found


def features_of(files: list[Path], network: Network, cache: Path, batch: int = 64, title: str = "features") -> Tensor:
    """Return the features (N, F) of picture files, in float32 on the CPU; those in `cache` are not computed again.

    Raises:
        ValueError: a file that is no picture.
    """
    shards = [files[i:i + SHARD] for i in range(0, len(files), SHARD)]
    found = []
    with tqdm(total=len(files), desc=title, unit="picture", dynamic_ncols=True) as bar:
        for shard in shards:
            path = cache / f"{_key(shard, network)}.npy"
            if not path.is_file():
                rows = _compute(shard, network, batch)
                with written(path) as aside:
                    np.save(aside, rows.numpy())
            found.append(torch.from_numpy(np.load(path, allow_pickle=False)))
            bar.update(len(shard))
    return torch.cat(found)


@torch.inference_mode()
def _compute(files: list[Path], network: Network, batch: int) -> Tensor:
    with ThreadPoolExecutor(8) as threads:
        return torch.cat([
            network.read(torch.stack(list(threads.map(
                lambda path: read_square(path, network.size, network.channels), files[i:i + batch])))).float().cpu()
            for i in range(0, len(files), batch)])


def _key(files: list[Path], network: Network) -> str:
    states = [(str(path.resolve()), (state := path.stat()).st_size, state.st_mtime_ns) for path in files]
    about = [network.weights_hash, network.resize(), network.channels, network.preprocessing, states]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
