"""A mixture of sources, as a file says it, and opened.

    weights: tokens                 # what weights are shares of; without any weight each source is read `epochs` times
    held_out: 0.01                  # share of the records that are never trained on
    pictures: {side: 256}
    sources:
      - {format: llava, path: llava_v1_5_mix665k.json, images: playground/data, weight: 2}
      - {format: imagefolder, path: clip-art, weight: 1}

YAML or JSON. Paths count from the file's directory. Each setting is checked; an error names the file, the line and the
setting, and an unknown one is answered with the nearest.
"""
import dataclasses
import json
import os
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np

from transfusion.data.arrays import fingerprint
from transfusion.data.chat import ChatSettings, chat_parts
from transfusion.data.choices import source_key
from transfusion.data.dataset import SPLITS, Arrangement
from transfusion.data.documents import Documents, Kind, Parts
from transfusion.data.grids import Grids, GridSettings
from transfusion.data.lengths import KEYS, Lengths, count_lengths
from transfusion.data.plan import Stream, passes_in_epoch
from transfusion.data.sources import FORMATS, PictureRef, Record, Source
from transfusion.data.stored_latents import PosteriorStore
from transfusion.settings import Count, Decay, NotNegative, OneOf, Positive, Seed, Share, check, nearest


@dataclass(frozen=True)
class SourceSettings:
    """One source of a mixture: the settings of its format and how much of it there is."""

    source: Any
    """settings of its format; see FORMATS in transfusion/data/sources"""
    name: str = ""
    """what tables and logs call it, and what its random choices depend on; its file's name where it is left out"""
    weight: NotNegative | None = None
    """its share, with those of the other sources; none: as much as there is of it"""
    epochs: Positive = 1.0
    """how often it is read in an epoch of the mixture, or, with weights, at most"""
    caption_first: Share | None = None
    """share of its pairs whose caption stands first; none: the mixture's"""
    caption_dropout: Share | None = None
    """share of those whose caption is left out; none: the mixture's"""
    flip: Share | None = None
    """share of its records whose pictures are mirrored; none: the mixture's"""


@dataclass(frozen=True)
class MixtureSettings(Arrangement):
    """Sources and what is common to them."""

    sources: tuple[SourceSettings, ...] = field(kw_only=True)
    """at least one"""
    weights: Annotated[str, OneOf(("tokens", "samples"))] = "tokens"
    """what weights are shares of"""
    flip: Share = 0.0
    """share of records whose pictures are mirrored"""
    held_out: Decay = 0.01
    """share of the records that are held out, chosen by their pictures"""
    held_out_by: Annotated[str, OneOf(KEYS)] = "name"
    """what tells pictures apart: name, the last two parts of the path, or content, which reads every file once"""
    max_length: Count | None = None
    """tokens that a longer document is cut to, never through an image, and a conversation only between two exchanges;
    none: what is longer than a row is left out and counted. Copies of drawn pictures (`context: clean`) come on top"""
    seed: Seed = 0
    """seed of order, captions and mirrored pictures"""
    chat: ChatSettings = field(default_factory=ChatSettings)
    pictures: GridSettings = field(default_factory=GridSettings)
    latents: Path | None = None
    """directory that `transfusion data encode` wrote: pictures that it holds are not decoded and encoded in training"""
    cache: Path | None = None
    """directory of what is counted and planned; none: one beside the mixture's file"""


class Amount(NamedTuple):
    """How often a source is read in an epoch, and how many samples and tokens that makes, on average."""

    name: str
    passes: float
    samples: float
    tokens: float


@dataclass(frozen=True, eq=False)
class Mixture:
    """Opened sources, how their records become documents, and what is known of their lengths."""

    settings: MixtureSettings
    sources: tuple[Source, ...]
    names: tuple[str, ...]
    documents: Documents
    lengths: tuple[Lengths, ...]
    cache: Path

    def shares(self) -> list[dict[str, float]]:
        """What `choose` is told of each source."""
        names = "caption_first", "caption_dropout", "flip"
        return [{name: getattr(self.settings if getattr(entry, name) is None else entry, name) for name in names}
                for entry in self.settings.sources]

    def streams(self, split: str = "train") -> list[Stream]:
        """What a plan of a split, "train" or "held-out", is made from.

        Raises:
            ValueError: another split.
        """
        if split not in SPLITS:
            raise ValueError(f"streams: split is {split!r}; {' or '.join(map(repr, SPLITS))} fits")
        return [self._stream(i, split) for i in range(len(self.sources))]

    def epoch(self, split: str = "train") -> list[Amount]:
        """What an epoch of a split has of each source.

        Raises:
            ValueError: weights that do not fit, or no record that can be used.
        """
        streams = self.streams(split)
        passes = passes_in_epoch(streams, self.settings.weights)
        return [Amount(name, often, often * len(stream.records), often * float(stream.expected_lengths().sum()))
                for name, often, stream in zip(self.names, passes, streams)]

    def _stream(self, i: int, split: str) -> Stream:
        entry, lengths = self.settings.sources[i], self.lengths[i]
        records, arrays = lengths.records(split, self.settings.held_out), lengths.arrays
        forms, starts = select(arrays["starts"], arrays["lengths"], records)
        weighted = entry.weight if split == "train" or entry.weight is None or len(records) else 0.0
        bare, extra = arrays["bare"][records], arrays["extra"][records]
        return Stream(source_key(self.names[i]), records, starts, forms, bare, extra, weight=weighted,
                      passes=entry.epochs, **self.shares()[i])


def select(starts: np.ndarray, lengths: np.ndarray, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of ragged arrays the rows of `records`: their lengths, and where each begins."""
    if len(records) == len(starts) - 1:
        return np.asarray(lengths), np.asarray(starts)
    counts = starts[records + 1] - starts[records]
    begins = np.concatenate([[0], np.cumsum(counts)])
    return lengths[np.repeat(starts[records] - begins[:-1], counts) + np.arange(begins[-1])], begins


def read_mixture(path: Path) -> MixtureSettings:
    """Read a mixture's file, .yaml, .yml or .json.

    Raises:
        ValueError: the file is missing, is neither, or a setting is unknown or does not fit; file, line and setting are
            named.
    """
    path = Path(path)
    given, lines = _parsed(path)
    return make_mixture(given, path.parent, str(path), lines)


def make_mixture(given: dict, folder: Path, op: str = "mixture",
                 lines: dict[str, int] | None = None) -> MixtureSettings:
    """Return the settings of a mixture's file with these contents; paths count from `folder`, messages begin with `op`.

    Raises:
        ValueError: as `read_mixture`.
    """
    reader = _Reader(folder, op, lines or {})
    known = [f.name for f in dataclasses.fields(MixtureSettings)]
    reader.refuse_unknown(given, known, "")
    entries = given.get("sources")
    if not isinstance(entries, list) or not entries:
        reader.fail("sources", f"is {entries!r:.60}; a list of at least one source fits, such as "
                    "[{format: imagefolder, path: pictures}]")
    sources = tuple(reader.source(entry, f"sources[{i}]") for i, entry in enumerate(entries))
    settings = reader.make(MixtureSettings, {**given, "sources": sources}, "")
    weights = [entry.weight for entry in sources]
    if any(weight is not None for weight in weights):
        if None in weights:
            missing = weights.index(None)
            reader.fail(f"sources[{missing}]", "has no weight and others have; one for every source fits, or for none")
        if not any(weights):
            reader.fail("sources", "have weights that are all 0; one above 0 fits")
    return settings


def open_mixture(settings: MixtureSettings, tokenizer, config, *, folder: Path = Path(), factor: int = 1,
                 channels: int | None = None, workers: int | None = None, autoencoder: str = "") -> Mixture:
    """Open the sources of a mixture and count the lengths of their records, or find them counted.

    Args:
        tokenizer, config: of the model.
        folder: where the cache lies, if the settings name none: the directory of the mixture's file.
        factor: pixels to a position of the model's latents; 1 where it draws pixels.
        channels: of pictures, 3 or 1; those of the model, or 3 before an autoencoder.
        workers: processes that count.
        autoencoder: the fingerprint of the one whose latents the model draws; "" for any.

    Raises:
        ValueError: a source that cannot be opened, two of the same name, or latents that are not the model's.
    """
    kind = Kind.of(config, factor)
    channels = channels or (kind.image_channels if factor == 1 else 3)
    if channels not in (1, 3):
        raise ValueError(f"open_mixture: the model draws pictures of {channels} channels; 1 (grey) or 3 (colour) fits, "
                         "or latents, with the factor of their autoencoder")
    grids = Grids(settings.pictures, kind.patch_size * factor, channels)
    documents = Documents(tokenizer, kind, grids, template=Chat(tokenizer, settings.chat), context=settings.context,
                          max_length=settings.max_length, name=str(settings.chat),
                          store=_open_latents(settings, folder, kind, autoencoder))
    sources, names = open_sources(settings)
    cache = settings.cache or cache_directory(folder)
    lengths = tuple(count_lengths(source, documents, cache, held_out_by=settings.held_out_by, workers=workers)
                    for source in sources)
    return Mixture(settings, tuple(sources), tuple(names), documents, lengths, cache)


def cache_directory(folder: Path) -> Path:
    """Where a mixture of this folder keeps what is counted and planned: beside its file, or in the user's cache."""
    beside = Path(folder) / ".transfusion"
    if os.access(beside if beside.exists() else folder, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "transfusion" / fingerprint(os.path.abspath(folder))


def _open_latents(settings: MixtureSettings, folder: Path, kind: Kind, autoencoder: str) -> PosteriorStore | None:
    """The latents that a mixture names, if it names some."""
    if settings.latents is None:
        return None
    store = PosteriorStore(settings.latents, folder, autoencoder)
    if (store.factor, store.channels) != (kind.factor, kind.image_channels):
        shape = f"latents of {kind.image_channels} channels, {kind.factor} pixels wide"
        raise ValueError(f"mixture: latents is {str(settings.latents)!r}, of {store.channels} channels, {store.factor} "
                         f"pixels wide, and the model draws {'pixels' if kind.factor == 1 else shape}; leave latents "
                         "out, or name its autoencoder")
    return store


def open_sources(settings: MixtureSettings) -> tuple[list[Source], list[str]]:
    """Open the sources of a mixture; return them and their names.

    Raises:
        ValueError: one that cannot be opened, or two of the same name.
    """
    sources, names = [], []
    for i, entry in enumerate(settings.sources):
        try:
            source = entry.source.open()
        except ValueError as error:
            raise ValueError(f"mixture: sources[{i}] cannot be opened: {error}") from error
        name = entry.name or source.name
        if name in names:
            raise ValueError(f"mixture: sources[{names.index(name)}] and sources[{i}] are both called {name!r}; "
                             "different names fit; set `name` of one")
        sources.append(source)
        names.append(name)
    return sources, names


class Chat:
    """Makes parts of conversations, as `Documents` calls it; pickles with its tokenizer."""

    def __init__(self, tokenizer, settings: ChatSettings):
        self.tokenizer, self.settings = tokenizer, settings

    def __call__(self, record: Record, room: int | None, picture_tokens: Callable[[PictureRef], int]) -> Parts:
        return chat_parts(record, self.tokenizer, self.settings, room=room, picture_tokens=picture_tokens)


class _Reader:
    """Makes settings of what a file holds."""

    def __init__(self, folder: Path, op: str, lines: dict[str, int]):
        self.folder, self.op, self.lines = folder, op, lines

    def fail(self, key: str, words: str):
        """Raise, naming the line of the key."""
        line = self.lines.get(key)
        raise ValueError(f"{self.op}{'' if line is None else f', line {line}'}: {key} {words}")

    def refuse_unknown(self, given, known: list[str], prefix: str) -> None:
        if not isinstance(given, dict):
            self.fail(prefix.rstrip(".") or "the mixture", f"is {given!r:.60}; settings with names fit")
        for name in given:
            if name not in known:
                self.fail(f"{prefix}{name}", f"is no setting; {', '.join(known)} fit{nearest(str(name), known)}")

    def source(self, given, key: str) -> SourceSettings:
        """One source: the settings of its format, and its own."""
        if not isinstance(given, dict):
            self.fail(key, f"is {given!r:.60}; settings with names fit, such as "
                      "{format: imagefolder, path: pictures}")
        name = given.get("format")
        if not isinstance(name, str) or name not in FORMATS:
            fitting = f"one of {', '.join(map(repr, FORMATS))} fits{nearest(str(name), FORMATS)}"
            self.fail(f"{key}.format", f"is {name!r}; {fitting}")
        theirs = [f.name for f in dataclasses.fields(FORMATS[name])]
        ours = [f.name for f in dataclasses.fields(SourceSettings) if f.name != "source"]
        self.refuse_unknown(given, ["format", *theirs, *(n for n in ours if n not in theirs)], f"{key}.")
        made = self.make(FORMATS[name], {n: value for n, value in given.items() if n in theirs}, f"{key}.")
        rest = {n: value for n, value in given.items() if n in ours}
        return self.make(SourceSettings, {"source": made, **rest}, f"{key}.")

    def make(self, kind: type, given: dict, prefix: str):
        """Settings of a class; values are turned into what its fields hold, then checked."""
        hints = get_type_hints(kind, include_extras=True)
        for one in dataclasses.fields(kind):
            if one.name not in given and one.default is one.default_factory is dataclasses.MISSING:
                self.fail(prefix.rstrip(".") or "the mixture", f"has no {one.name}; it needs one")
        settings = kind(**{name: self.value(hints[name], value, f"{prefix}{name}") for name, value in given.items()})
        try:
            check(self.op, settings, prefix)
        except ValueError as error:
            key = re.match(r"([\w.\[\]]+) is ", str(error).removeprefix(f"{self.op}: "))
            if key is None or key[1] not in self.lines:
                raise
            raise ValueError(str(error).replace(self.op, f"{self.op}, line {self.lines[key[1]]}", 1)) from error
        return settings

    def value(self, hint, value, key: str):
        """A value as a field wants it: a path, a tuple, a number that YAML took for text, settings."""
        origin, inner = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return None if value is None else self.value(next(x for x in inner if x is not type(None)), value, key)
        if origin is Annotated:
            return self.value(inner[0], value, key)
        if dataclasses.is_dataclass(hint) and not isinstance(value, hint):
            self.refuse_unknown(value, [f.name for f in dataclasses.fields(hint)], f"{key}.")
            return self.make(hint, value, f"{key}.")
        if hint is Path and isinstance(value, str):
            return self.folder / Path(value).expanduser()
        if hint is float and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value.strip(), re.I):
            return float(value)  # YAML 1.1 takes 1e-4 for text
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(self.value(inner[0], one, f"{key}[{i}]") for i, one in enumerate(value))
        return value


def _parsed(path: Path) -> tuple[dict, dict[str, int]]:
    """What a file holds, and the line of each key in it."""
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"mixture: {str(path)!r} is no mixture; a .yaml or .json file fits")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"mixture: {str(path)!r} cannot be read ({error.strerror}); the path of a mixture "
                         "fits") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"mixture: {str(path)!r} is not UTF-8 ({error.reason}); UTF-8 fits") from error
    if path.suffix == ".json":
        try:
            return json.loads(text, object_pairs_hook=lambda pairs: _without_twins(pairs, path)), {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: this is no JSON ({error.msg}); check commas, quotes and "
                             "brackets") from error
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"mixture: {str(path)!r} is YAML, and PyYAML is not installed; install the extra [data], or "
                         "write it as .json") from error
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        lines: dict[str, int] = {}
        if node is not None:
            _find_lines(node, "", lines, path)
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"{path}{line}: this is no YAML ({reason}); check indents, colons and brackets") from error


def _find_lines(node, key: str, lines: dict[str, int], path: Path) -> None:
    """Note the line of every key below a node of YAML; refuse a key that stands twice."""
    import yaml

    lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, one in enumerate(node.value):
            _find_lines(one, f"{key}[{i}]", lines, path)
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = f"{key}.{name.value}" if key else str(name.value)
            if inner in lines:
                raise ValueError(f"{path}, line {name.start_mark.line + 1}: {inner} stands twice, first in line "
                                 f"{lines[inner]}; once fits")
            lines[inner] = name.start_mark.line + 1
            _find_lines(value, inner, lines, path)


def _without_twins(pairs: list[tuple], path: Path) -> dict:
    names = [name for name, _ in pairs]
    if twins := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: {min(twins)} stands twice; once fits")
    return dict(pairs)
