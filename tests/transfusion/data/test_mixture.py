"""Mixture files: read, checked to the line, opened; splits and shares of real sources on disk."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.transfusion.data.memory import WORDS, kind_of, picture, sentence, tokenizer_of_words
from transfusion.data.mixture import cache_directory, make_mixture, open_mixture, read_mixture, select
from transfusion.data.sources import ImageFolderSettings, LLaVASettings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A picture folder with captions, a LLaVA file over the same pictures, and text."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    lines = []
    for i in range(40):
        (folder / "pictures" / f"{i}.png").write_bytes(picture(i, *random.integers(10, 40, 2)).file)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": sentence(random, 2, 9)}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    rows = []
    for i in range(60):
        said = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": sentence(random, 1, 6)}]
        rows.append({"id": str(i), "image": f"pictures/{i % 40}.png", "conversations": said})
    rows += [
        {"id": "60", "conversations": [{"from": "human", "value": "a or the?"}, {"from": "gpt", "value": "the"}]}
    ] * 10
    (folder / "llava.json").write_text(json.dumps(rows))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": sentence(random)}) for _ in range(80)))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_words()


MIX = """
weights: tokens
caption_first: 0.5
held_out: 0.2
pictures: {side: 16}
sources:
  - {format: imagefolder, path: pictures, weight: 2, caption_dropout: 0}
  - format: llava
    path: llava.json
    weight: 1
  - {format: text, path: text.jsonl, weight: 1, epochs: 3}
"""


def written(folder, text, name="mix.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def opened(path, tokenizer, **options):
    return open_mixture(read_mixture(path), tokenizer, kind_of(tokenizer), folder=path.parent, **options)


def test_a_file_says_sources_and_what_is_common_to_them(tmp_path):
    settings = read_mixture(written(tmp_path, MIX))
    folder, llava, text = settings.sources
    assert folder.source == ImageFolderSettings(tmp_path / "pictures") and llava.source == LLaVASettings(
        tmp_path / "llava.json"
    )
    assert (folder.weight, folder.caption_dropout, llava.caption_dropout, text.epochs) == (2, 0, None, 3)
    assert settings.caption_first == 0.5 and settings.pictures.side == 16 and settings.caption_dropout == 0.1


def test_json_says_the_same(tmp_path):
    import yaml

    as_json = written(tmp_path, json.dumps(yaml.safe_load(MIX)), "mix.json")
    assert read_mixture(as_json) == read_mixture(written(tmp_path, MIX))


def test_paths_count_from_the_file_and_numbers_may_have_an_exponent(tmp_path):
    text = (
        "held_out: 1e-3\ncache: /tmp/there\nsources:\n- {format: text, path: ../a.txt}\n- {format: text, path: ~/b.txt}"
    )
    settings = read_mixture(written(tmp_path, text))
    assert settings.held_out == 0.001 and settings.cache == Path("/tmp/there")
    assert (
        settings.sources[0].source.path == tmp_path / "../a.txt"
        and settings.sources[1].source.path == Path.home() / "b.txt"
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (
            ("caption_first: 0.5", "caption_frist: 0.5"),
            "mix.yaml, line 3: caption_frist is no setting; .*; did you mean caption_first",
        ),
        (
            ("caption_first: 0.5", "caption_first: 1.5"),
            "mix.yaml, line 3: caption_first is 1.5; a number of at least 0 and at most 1",
        ),
        (("caption_first: 0.5", "caption_first: .nan"), "line 3: caption_first is nan"),
        (("weights: tokens", "weights: rows"), "line 2: weights is 'rows'; one of 'tokens', 'samples' fits"),
        (("{side: 16}", "{sid: 16}"), "line 5: pictures.sid is no setting; .*; did you mean side"),
        (("{side: 16}", "{side: 0}"), "line 5: pictures.side is 0; a whole number of at least 1 fits"),
        (("{side: 16}", "16"), "line 5: pictures is 16; settings with names fit"),
        (("format: llava", "format: lava"), "line 8: sources.1..format is 'lava'; .*; did you mean llava"),
        (("    path: llava.json\n", ""), r"line 8: sources.1. has no path; it needs one"),
        (
            ("    path: llava.json", "    path: llava.json\n    imags: x"),
            r"line 10: sources.1..imags is no setting; .*did you mean images",
        ),
        (("    weight: 1", "    weight: -1"), r"line 10: sources.1..weight is -1; a number of at least 0 or None fits"),
        (("    weight: 1\n", ""), r"line 8: sources.1. has no weight and others have"),
        (("weights: tokens", "weights: tokens\nweights: samples"), "line 3: weights stands twice, first in line 2"),
        (("weights: tokens", "weights: [tokens"), "line 3: this is no YAML|line [0-9]+: this is no YAML"),
        (
            ("  - {format: imagefolder", "  - 5\n  - {format: imagefolder"),
            r"line 7: sources.0. is 5; settings with names fit",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_named_with_file_and_line(tmp_path, change, words):
    assert change[0] in MIX
    with pytest.raises(ValueError, match=words):
        read_mixture(written(tmp_path, MIX.replace(*change, 1)))


@pytest.mark.parametrize(
    "text, words",
    [
        ("sources: []", "line 1: sources is ..; a list of at least one source fits"),
        ("seed: 1", "sources is None"),
        ("", "the mixture is None; settings with names fit"),
        ("- a", "the mixture is ..a..; settings with names fit"),
        (
            "sources: [{format: text, path: a, weight: 0}, {format: text, path: b, weight: 0}]",
            "sources have weights that are all 0",
        ),
    ],
)
def test_a_mixture_without_data_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        read_mixture(written(tmp_path, text))


def test_files_that_are_no_mixture_are_refused(tmp_path):
    with pytest.raises(ValueError, match="none.yaml' cannot be read .No such file"):
        read_mixture(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="a .yaml or .json file fits"):
        read_mixture(written(tmp_path, MIX, "mix.toml"))
    with pytest.raises(ValueError, match="mix.json, line 2: this is no JSON"):
        read_mixture(written(tmp_path, '{"seed": 1,\n oops}', "mix.json"))
    with pytest.raises(ValueError, match="seed stands twice"):
        read_mixture(written(tmp_path, '{"seed": 1, "seed": 2}', "mix.json"))


def test_flags_make_the_same_settings_as_a_file(tmp_path):
    made = make_mixture({"sources": [{"format": "text", "path": "a.txt"}], "seed": 3}, tmp_path)
    assert made == read_mixture(written(tmp_path, "seed: 3\nsources: [{format: text, path: a.txt}]"))
    with pytest.raises(ValueError, match="^mixture: sed is no setting"):
        make_mixture({"sed": 3}, tmp_path)


def test_an_opened_mixture_knows_every_length_and_its_splits_share_no_picture(data, tokenizer):
    mixture = opened(written(data, MIX), tokenizer, workers=0)
    assert mixture.names == ("pictures", "llava", "text") and [len(x) for x in mixture.lengths] == [40, 70, 80]
    assert [lengths.failures() for lengths in mixture.lengths] == [{}, {}, {}]
    seen = {}
    for split in ("train", "held-out"):
        numbers = [stream.records for stream in mixture.streams(split)]
        seen[split] = {
            ref.file.path
            for source, ns in zip(mixture.sources, numbers)
            for n in ns
            for ref in source[int(n)].pictures()
        }
    assert (
        not seen["train"] & seen["held-out"]
        and len(seen["train"] | seen["held-out"]) == 40
        and len(seen["held-out"]) >= 3
    )
    (stream,) = mixture.streams("held-out")[:1]
    assert (stream.weight, stream.caption_first, stream.caption_dropout) == (2, 0.5, 0)
    with pytest.raises(ValueError, match="split is 'test'; 'train' or 'held-out' fits"):
        mixture.streams("test")


def test_a_folder_that_cannot_be_written_keeps_its_counts_in_the_users_cache(tmp_path, monkeypatch):
    assert cache_directory(tmp_path) == tmp_path / ".transfusion"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = {cache_directory(tmp_path / name) for name in ("a", "b")}
    assert len(found) == 2 and {path.parent for path in found} == {tmp_path / "cache" / "transfusion"}


def test_an_epoch_ends_with_the_first_source_and_has_the_shares_of_the_weights(data, tokenizer):
    mixture = opened(written(data, MIX), tokenizer, workers=0)
    amounts = mixture.epoch()
    tokens = np.array([amount.tokens for amount in amounts])
    assert tokens / tokens.sum() == pytest.approx([0.5, 0.25, 0.25])
    assert [amount.name for amount in amounts] == ["pictures", "llava", "text"]
    most = [amount.passes / entry.epochs for amount, entry in zip(amounts, mixture.settings.sources)]
    assert max(most) == 1
    plain = MIX.replace("weight: 2, ", "").replace("    weight: 1\n", "").replace("weight: 1, ", "")
    amounts = opened(written(data, plain, "plain.yaml"), tokenizer, workers=0).epoch("held-out")
    assert [amount.passes for amount in amounts] == [1, 1, 3]
    assert amounts[0].samples == len(mixture.streams("held-out")[0].records)


def test_lengths_of_a_stream_are_those_of_its_records():
    starts, lengths = np.array([0, 2, 3, 6]), np.array([10, 11, 20, 30, 31, 32])
    found, begins = select(starts, lengths, np.array([0, 2]))
    assert found.tolist() == [10, 11, 30, 31, 32] and begins.tolist() == [0, 2, 5]
    assert select(starts, lengths, np.arange(3))[0].tolist() == lengths.tolist()
    assert select(starts, lengths, np.array([], dtype=np.int64))[1].tolist() == [0]


def test_sources_that_cannot_be_opened_or_told_apart_are_named(data, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"sources.0. cannot be opened: .*nowhere"):
        opened(written(tmp_path, "sources: [{format: imagefolder, path: nowhere}]"), tokenizer)
    twice = "sources: [{format: text, path: text.jsonl}, {format: text, path: text.jsonl}]"
    with pytest.raises(ValueError, match="sources.0. and sources.1. are both called 'text'; different names fit"):
        opened(written(data, twice, "twice.yaml"), tokenizer)
    named = twice.replace("text.jsonl}]", "text.jsonl, name: more}]")
    assert opened(written(data, named, "named.yaml"), tokenizer).names == ("text", "more")


def test_grids_that_do_not_fit_the_model_are_refused_when_the_mixture_is_opened(data, tokenizer):
    with pytest.raises(ValueError, match="grids: side has 18x18 pixels and a patch of this model is 4 pixels wide"):
        opened(written(data, MIX.replace("side: 16", "side: 18"), "odd.yaml"), tokenizer)


def test_conversations_are_cut_between_exchanges_to_the_length_asked_for(data, tokenizer):
    assert WORDS
    short = MIX.replace("weights: tokens", "weights: tokens\nmax_length: 90\nchat: {template: plain}")
    mixture = opened(written(data, short, "short.yaml"), tokenizer, workers=0)
    assert all(lengths.arrays["lengths"].max() <= 90 for lengths in mixture.lengths)
    with pytest.raises(ValueError, match="line 3: chat.template is 'plane'; .*did you mean"):
        read_mixture(written(data, short.replace("plain", "plane").replace("max_length: 90\n", ""), "plane.yaml"))
