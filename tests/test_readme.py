"""README and the pages of docs/: their Python runs on the CPU, their links lead somewhere, README stays short."""
import re
import shlex
from pathlib import Path

import pytest

import transfusion.cli
import transfusion.data.check
import transfusion.data.posteriors
import transfusion.eval.autoencoder
import transfusion.eval.captions
import transfusion.eval.draw
import transfusion.eval.geneval
import transfusion.eval.images
import transfusion.eval.prepare
import transfusion.eval.questions
import transfusion.eval.report
import transfusion.eval.text
import transfusion.eval.vqa
import transfusion.model.export
import transfusion.model.from_language_model
import transfusion.recipes.command_line as command_line
import transfusion.sample
import transfusion.serve.chat
import transfusion.serve.command_line
import transfusion.train.report
from tests.transfusion.conftest import tiny_model
from transfusion.data.dataset import DatasetSettings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PRINTED = {*(ROOT / "docs" / "studies").glob("*-*.md")}  # written by a command
WRITTEN = [page for page in PAGES if page not in PRINTED]
TORCHRUN = re.compile(r"^torchrun .*-m transfusion\.train ")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    """The Python blocks of a page."""
    return [code for language, code in FENCED.findall(page.read_text()) if language == "python"]


def commands(page):
    """The lines of a page that call the `transfusion` command, continued ones whole, without their comments.

    What torchrun starts is among them, as one process would be.
    """
    lines = [TORCHRUN.sub("transfusion train ", line) for language, code in FENCED.findall(page.read_text())
             if not language for line in code.replace("\\\n", "").splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("transfusion ")]


def links(page):
    """What a page links to in this repository, as (file, anchor or None)."""
    prose = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield (page.parent / path if path else page), anchor or None


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory that holds, as after `make demo`, a checkpoint in runs/digits: a tiny one."""
    where = tmp_path_factory.mktemp("docs")
    tiny_model().save_pretrained(where / "runs" / "digits")
    return where


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    scope = {"__name__": page.stem}
    for number, code in enumerate(blocks(page)):
        exec(compile(code, f"{page.name}, Python block {number + 1}", "exec"), scope)


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}))
def test_a_command_line_is_understood(command, monkeypatch):
    run = []
    for module, name in ((command_line.trainer, "train"), (command_line.autoencoder, "train"),
                         (command_line.plan, "print_plan"), (transfusion.train.report, "report"),
                         (transfusion.eval.autoencoder, "evaluate"), (command_line, "encode_dataset"),
                         (transfusion.eval.prepare, "prepare"), (transfusion.eval.vqa, "evaluate_vqa"),
                         (transfusion.eval.text, "evaluate_text"),
                         (transfusion.model.from_language_model, "init"), (transfusion.sample, "sample"),
                         (transfusion.model.export, "export"),
                         (transfusion.sample, "caption"), (transfusion.serve.command_line, "serve"),
                         (transfusion.serve.command_line, "app"), (transfusion.serve.chat, "chat"),
                         (transfusion.eval.draw, "draw"), (transfusion.eval.images, "images"),
                         (transfusion.eval.geneval, "geneval"), (transfusion.eval.captions, "captions"),
                         (transfusion.eval.questions, "evaluate_questions"), (transfusion.eval.report, "report")):
        monkeypatch.setattr(module, name, lambda *arguments: run.append(arguments))
    for module, name in ((transfusion.data.check, "check_mixture"), (transfusion.data.posteriors, "encode_mixture")):
        monkeypatch.setattr(module, name, lambda *settings: run.append(settings) or True)
    transfusion.cli.main(shlex.split(command)[1:])
    assert len(run) == 1, f"{command} ran nothing"
    if command.startswith("transfusion train "):
        assert type(run[0][0].data) is not DatasetSettings, f"{command} names no data set"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading_that_exist(page):
    for path, anchor in links(page):
        assert path.exists(), f"{page.name} links to {path}, which does not exist"
        assert anchor is None or anchor in anchors(path), f"{page.name} links to #{anchor}, which {path.name} has not"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_the_project_that_a_page_names_exists(page):
    for name in re.findall(r"`((?:tfkernels|transfusion|tests|benchmarks|docs|examples)/[\w/.-]+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which does not exist"


def test_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_readme_shows_the_attention_call_and_the_model_in_fifteen_lines_each():
    attention, model = blocks(ROOT / "README.md")
    assert "tfkernels.attention(" in attention and "Transfusion.from_pretrained(" in model
    assert max(len([line for line in code.splitlines() if line.strip()]) for code in (attention, model)) <= 15


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_lines_of_a_page_wrap_at_120_characters_but_for_tables(page):
    for line in page.read_text().splitlines():
        assert len(line) <= 120 or line.startswith(("|", "![")), f"{page.name}: {line[:60]}..."
