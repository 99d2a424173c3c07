"""What fits in settings: beside its field a number says its range and a choice its names; `check` refuses all else.

    steps: Annotated[int, Range(1)] = 1000                  betas: tuple[Share, Share] = (0.9, 0.95)
    times: Annotated[str, OneOf(TIMES)] = "uniform"

Names are those of the command line: `optim.steps` is the field `steps` of the settings in the field `optim`.
`check_value` does the same for one argument of a function. NaN passes every `<` and True is an int to Python: these
ask what fits, not what does not.
"""
import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Container, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

MOST_SHOWN = 200   # characters of a value that messages repeat
LONGEST_NAME = 64  # characters of a name that a nearest one is looked for
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a str", Path: "a pathlib.Path"}


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both fit; `above` and `below` are ends that do not. NaN and infinity never fit."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def words(self) -> str:
        """Say which fit, behind "a number"."""
        ends = {"of at least ": self.low, "above ": self.above, "at most ": self.high, "below ": self.below}
        return " and ".join(f"{words}{end}" for words, end in ends.items() if math.isfinite(end))


class OneOf:
    """The names in `choices`, which may grow after the class is made."""

    def __init__(self, choices: Container):
        self.choices = choices


WholeNumber, Count = Annotated[int, Range(0)], Annotated[int, Range(1)]
Share, Decay = Annotated[float, Range(0, 1)], Annotated[float, Range(0, below=1)]
Positive, NotNegative = Annotated[float, Range(above=0)], Annotated[float, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]


def check(op: str, settings, prefix: str = "") -> None:
    """Refuse settings, a dataclass, where a value does not fit, in its fields' settings too.

    Raises:
        ValueError: a number out of its range, NaN or infinite, a value of another kind, or a name that is none of the
            choices; the first of them is named, behind `prefix`.
    """
    for name, hint in _hints(type(settings)).items():
        value = getattr(settings, name)
        check_value(op, f"{prefix}{name}", value, hint)
        if dataclasses.is_dataclass(hint):
            check(op, value, f"{prefix}{name}.")


def check_value(op: str, name: str, value, hint) -> None:
    """Refuse a value that does not fit `hint`, as `check` does for a field of that type.

    Raises:
        ValueError: the value is named `name`.
    """
    if misfit := _misfit(value, hint):
        raise ValueError(f"{op}: {name} is {shown(value)}; {misfit}")


def shown(value) -> str:
    """A value as messages repeat it: its repr, cut where that is long."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def nearest(name: str, names: Iterable[str], form=str) -> str:
    """Return "; did you mean ...?" with the one of `names` that is like `name`, or nothing."""
    if len(name) > LONGEST_NAME:  # difflib keeps a list for each of its characters
        return ""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {form(near[0])}?" if near else ""


def flat(settings: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested settings as {"optim.lr": 0.001, ...}."""
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _misfit(value, hint) -> str | None:
    """What fits `hint`, where `value` does not."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union_misfit(value, inner)
    if origin is tuple:
        return _tuple_misfit(value, inner)
    if origin is Literal:
        return _choice_misfit(value, inner)
    if dataclasses.is_dataclass(hint):
        return None if isinstance(value, hint) else f"settings of class {hint.__name__} fit"
    if origin is not Annotated:
        return _kind_misfit(value, hint, Range())
    rule = next((note for note in inner[1:] if isinstance(note, Range | OneOf)), None)
    if isinstance(rule, OneOf):
        return _choice_misfit(value, rule.choices)
    return _misfit(value, inner[0]) if rule is None else _kind_misfit(value, inner[0], rule)


def _union_misfit(value, inner: tuple) -> str | None:
    """X | None, or several kinds of which one must fit."""
    misfits = ["None" if part is type(None) else _misfit(value, part) for part in inner]
    if None in misfits or value is None and "None" in misfits:
        return None
    return " or ".join(misfit.removesuffix(" fits").removesuffix(" fit") for misfit in misfits) + " fits"


def _kind_misfit(value, kind: type, rule: Range) -> str | None:
    if kind in (int, float):
        return _number_misfit(value, kind, rule)
    return None if kind not in KINDS or isinstance(value, kind) else f"{KINDS[kind]} fits"


def _number_misfit(value, kind: type, rule: Range) -> str | None:
    right = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if right and value in rule:  # NaN and infinities are in no range
        return None
    return " ".join(filter(None, (KINDS[kind], rule.words(), "fits")))


def _choice_misfit(value, choices: Container) -> str | None:
    if isinstance(value, str | int) and value in choices:
        return None
    return f"one of {', '.join(map(repr, choices))} fits{nearest(str(value), map(str, choices), repr)}"


def _tuple_misfit(value, inner: tuple) -> str | None:
    if isinstance(value, tuple | list) and value and (inner[-1] is ... or len(value) == len(inner)):
        parts = inner[:1] * len(value) if inner[-1] is ... else inner
        misfits = filter(None, map(_misfit, value, parts))
        return next((f"{misfit} at each place" for misfit in misfits), None)
    return f"a tuple of {'one or more' if inner[-1] is ... else len(inner)} fits"
