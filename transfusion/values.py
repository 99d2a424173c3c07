"""What a setting may be. NaN passes every `<` and True is an int to Python, so these ask what fits, not what does not."""
import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real


def is_whole(value, low: int, high: int | None = None) -> bool:
    """Whether `value` is a whole number from `low` on, to `high` at most; True and 1.0 are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= value and (high is None or value <= high)


def is_number(value, low: float, high: float = math.inf) -> bool:
    """Whether `value` is a finite number from `low` to `high`; NaN and True are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high


def is_pair(value, fits) -> bool:
    """Whether `value` is a list or tuple of two that fit."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(fits, value))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the one of `names` that is like `name`, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
