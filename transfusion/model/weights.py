"""Whether the files of a model, an adapter or an autoencoder had all of its weights."""
from pathlib import Path


def check_complete(op: str, name: str, path: Path, found: dict) -> None:
    """Refuse a model some of whose weights no file had, by transformers' loading info: they are random numbers.

    Raises:
        ValueError: the first of them.
    """
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{op}: {name} is {str(path)!r}, whose files lack {len(missing)} of the model's weights, "
                         f"{missing[0]} for one; copy them again, or make them anew")
