"""docs/data.md, walked as a newcomer does with 300 pictures: the page's own files and commands, made tiny."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image as Picture

from tests.transfusion.train.own_data import paint, png
from transfusion.cli import main
from transfusion.data.mixture import MixtureSettings, SourceSettings, make_mixture
from transfusion.data.sources import FORMATS
from transfusion.recipes.llava import read_flags

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text()
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TINY = {
    "train": "--optim.steps 24 --optim.rows 1 --optim.seq-len 256 --optim.warmup 4 --optim.ema 0 --model.hidden 32 "
    "--model.layers 1 --model.heads 2 --model.kv-heads 2 --model.mlp 64 --device cpu",
    "sample": "--steps 4 --device cpu",
    "data": "",
}


def section(name):
    return PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def mixtures():
    return [yaml.safe_load(code) for language, code in FENCED.findall(PAGE) if language == "yaml"]


def test_three_hundred_pictures_become_a_model_that_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = FENCED.findall(section("Five minutes"))
    (tmp_path / "pictures").mkdir()
    for i, (caption, picture) in enumerate(paint(300, 48)):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(picture))
        (tmp_path / "pictures" / f"{i}.txt").write_text(caption)
    (tmp_path / "mix.yaml").write_text(next(code for language, code in blocks if language == "yaml"))
    lines = [
        line.partition("  #")[0]
        for language, code in blocks
        if language == ""
        for line in code.splitlines()
        if line.startswith("transfusion ")
    ]
    assert [line.split()[1] for line in lines] == ["data", "train", "sample"]
    for line in lines:
        words = shlex.split(line)[1:]
        main([*words, *TINY[words[0]].split()])
    said = re.search(
        r"an epoch has (\d+) documents of [\d,]+ tokens in [\d,]+ rows of 256, [\d.]+ % full", capsys.readouterr().out
    )
    assert 290 <= int(said[1]) <= 300
    records = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "log.jsonl").read_text().splitlines()]
    first, last = (sum(record["loss"] for record in part) / 4 for part in (records[:4], records[-4:]))
    assert len(records) == 24 and last < 0.9 * first
    with Picture.open(tmp_path / "bus.png") as drawn:
        assert drawn.size == (128, 128)


def test_every_mixture_on_the_page_is_understood_and_its_defaults_are_true(tmp_path):
    short, whole = mixtures()
    make_mixture(short, tmp_path)
    settings = make_mixture(whole, tmp_path)
    others = [field.name for field in dataclasses.fields(MixtureSettings) if field.name != "sources"]
    assert set(whole) == {*others, "sources"}
    defaults = MixtureSettings(sources=settings.sources)
    assert {name: getattr(settings, name) for name in others} == {name: getattr(defaults, name) for name in others}


def test_the_page_lists_every_format():
    listed = re.findall(r"^\| `(\w+)` \|", section("Formats"), re.MULTILINE)
    assert listed[0] == "format" and sorted(listed[1:]) == sorted(FORMATS)


def test_the_page_lists_every_setting_of_each_format():
    common, listed = re.findall(r"`(\w+)`", section("Settings of a source").split(".")[0]), {}
    assert {"source", *common} == {field.name for field in dataclasses.fields(SourceSettings)}
    for names, settings in re.findall(r"^\| (`.*?`) \| (.*) \|$", section("Settings of a source"), re.MULTILINE):
        listed |= dict.fromkeys(re.findall(r"`(\w+)`", names), {"path", *re.findall(r"`(\w+)`", settings)})
    assert listed == {name: {field.name for field in dataclasses.fields(kind)} for name, kind in FORMATS.items()}


@pytest.mark.parametrize("name,trained,rows", [("train_lora.sh", "lora", 8), ("train_full.sh", None, 64)])
def test_the_scripts_that_the_page_names_are_five_lines_that_llavas_flags_know(name, trained, rows):
    script = (ROOT / "scripts" / name).read_text()
    assert f"scripts/{name}" in section("Conversations")
    command = script[script.index("exec "):].strip()
    assert len(command.splitlines()) == 5
    words = shlex.split(command.replace("\\\n", " "))
    flags = read_flags(words[words.index("train") + 1 : -1], Path())
    assert flags.trainer.get("tune.trained") == trained and flags.trainer["optim.rows"] == rows and flags.words == ()


@pytest.mark.parametrize(
    "words",
    [
        "records cannot be used",
        "left out, and counted in the log (failed)",
        "documents could not be read",
        "documents an epoch are longer than optim.seq_len",
        "pixels and a patch",
    ],
)
def test_what_the_page_answers_is_what_the_program_says(words):
    sources = "".join(path.read_text() for path in (ROOT / "transfusion" / "data").glob("*.py"))
    assert words in re.sub(r'"\s*\n\s*f?"', "", sources) and words in section("Resume, log, and what fails")
