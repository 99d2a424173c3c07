"""Networks of transformers that measure: their directories, their weights and what they want to see.

Nothing is downloaded. A network is named by a directory or by its name on the hub, where the hub's cache holds it, and
either way it is the directory's weights that are loaded and hashed. Pickled weights and code of others are refused.
"""
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.utils import logging

from transfusion.files import check_files, read_json


class Loaded(NamedTuple):
    """A network, the weights that its directory lacks and those that it does not take."""

    network: PreTrainedModel
    missing: list[str]
    unexpected: list[str]


def local_directory(op: str, name: str, fits: str) -> Path:
    """Return the directory of a network that is named by it, or by a name of the hub that its cache holds.

    Raises:
        ValueError: neither is there; the message ends with what fits.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"{op}: name is {str(name)!r}, which is no directory and is not in the hub's cache; {fits}; "
                         "nothing is downloaded") from error


def load_network(kind: type, directory: Path, given: str, fits: str) -> Loaded:
    """Load a network of a class of transformers from the safetensors in a directory.

    Args:
        given: how errors begin, with the argument that named the directory.
        fits: how they end.

    Raises:
        ValueError: damaged files, another kind of model, or no weights in safetensors.
    """
    check_files(directory)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # weights that are missing or not taken are the caller's to judge
    try:
        network, info = kind.from_pretrained(directory, use_safetensors=True, trust_remote_code=False,
                                             local_files_only=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{given}, which cannot be loaded ({str(error).splitlines()[0]}); {fits}, in safetensors"
                         ) from error
    finally:
        logging.set_verbosity(verbosity)
    return Loaded(network, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))


def load_whole(kind: type, directory: Path, given: str, fits: str) -> Loaded:
    """Return what `load_network` does.

    Raises:
        ValueError: as there, or weights are missing.
    """
    loaded = load_network(kind, directory, given, fits)
    if loaded.missing:
        raise ValueError(f"{given}, which has no weights for {', '.join(loaded.missing[:3])}; {fits}")
    return loaded


def preprocessor(directory: Path) -> dict:
    """Return what a directory's preprocessor_config.json says; {} where there is none."""
    path = Path(directory) / "preprocessor_config.json"
    return read_json(path) if path.is_file() else {}
