"""The report: every result is in it with what makes it comparable, and LLaVA's benchmarks stand in LLaVA's order."""
import dataclasses
import json

import pytest
from PIL import Image as Picture

from transfusion.cli import main
from transfusion.eval.report import COLUMNS, HEAD, LLAVA, llava_rows, row
from transfusion.eval.results import Result, write_result

KERNEL = Result("images", "kernel distance (resnet features)", 0.0123456, 2000, "transfusion", "0.1.0", 61.24,
                model="runs/a", weights_hash="0123456789abcdef", standard_error=0.00034, prompts="all of a.txt",
                resize="central square to 224x224", seed=0)
GQA = Result("gqa", "exact_match", 0.427, 12578, "lmms-eval", "0.7.3", 300.0, model="runs/a", prompts="LLaVA's")
MME = Result("mme", "mme_perception_score", 1234.56, 2374, "lmms-eval", "0.7.3", 90.0, model="runs/a")
WILD = Result("llava_wild", "gpt_eval_llava_all", None, 60, "lmms-eval", "0.7.3", 9.0, model="runs/a",
              judge="gpt-4-0613", note="3 of 60 answers have no verdict | of the judge")


def made(out, *results):
    """Write results and the report; return its JSON and its Markdown."""
    for result in results:
        write_result(out, result)
    main(["eval", "report", "--out", str(out)])
    return json.loads((out / "report.json").read_text()), (out / "report.md").read_text()


def test_a_row_says_all_that_makes_a_number_comparable():
    assert dict(zip(HEAD, row(KERNEL))) == {
        "task": "images", "metric": "kernel distance (resnet features)", "value": "0.012346 ± 0.00034", "n": "2000",
        "model": "runs/a", "weights": "01234567", "library": "transfusion 0.1.0", "prompts": "all of a.txt",
        "resize": "central square to 224x224", "judge": "none", "seed": "0", "seconds": "61.2", "note": "-"}


def test_the_report_holds_every_result_in_markdown_json_and_a_picture(tmp_path):
    held, page = made(tmp_path, KERNEL, GQA, MME, WILD)
    assert held["results"]["images-kernel-distance-resnet-features"] == dataclasses.asdict(KERNEL)
    assert len(held["results"]) == 4
    lines = page.splitlines()
    assert lines[2] == "| " + " | ".join(HEAD) + " |"
    assert len([line for line in lines if "lmms-eval 0.7.3" in line]) == 3
    assert "no score" in page and r"no verdict \| of the judge" in page
    with Picture.open(tmp_path / "report.png") as picture:
        assert picture.width > 1000 and picture.convert("L").getextrema() == (0, 255)


def test_llavas_benchmarks_stand_in_its_order_beside_its_published_numbers(tmp_path):
    held, page = made(tmp_path, KERNEL, GQA, MME, WILD)
    published, ours = held["llava"]
    assert list(ours)[1:] == ["VQAv2", "GQA", "VizWiz", "SciQA-IMG", "TextVQA", "POPE", "MME", "MMBench", "MMBench-CN",
                              "SEED-Bench", "LLaVA-Wild", "MM-Vet"]
    assert published["model"] == LLAVA and (published["GQA"], published["MME"]) == ("62.0", "1510.7")
    assert (ours["GQA"], ours["MME"], ours["LLaVA-Wild"], ours["VQAv2"]) == ("42.7", "1234.6", "no score", "-")
    assert "| runs/a | - | 42.7 |" in page and "arXiv:2310.03744" in page


def test_each_model_has_a_row_of_its_own(tmp_path):
    other = dataclasses.replace(GQA, model="runs/b", value=0.5, note="the first 100 questions alone")
    rows = llava_rows({"a": GQA, "b": other})
    assert [cells[0] for cells in rows] == [LLAVA, "runs/a", "runs/b"]
    assert (rows[1][2], rows[2][2]) == ("42.7", "50.0*"), "a star leads to the note"
    assert all(len(cells) == len(COLUMNS) + 1 for cells in rows)


def test_results_of_other_weights_in_one_directory_stand_in_rows_of_their_own():
    older, newer = (dataclasses.replace(one, weights_hash=digit * 64) for one, digit in ((GQA, "a"), (MME, "b")))
    rows = llava_rows({"a": older, "b": newer})
    assert [cells[0] for cells in rows] == [LLAVA, "runs/a (aaaaaaaa)", "runs/a (bbbbbbbb)"]
    assert [(cells[2], cells[7]) for cells in rows[1:]] == [("42.7", "-"), ("-", "1234.6")]


def test_without_llavas_benchmarks_there_is_no_table_of_them(tmp_path):
    held, page = made(tmp_path, KERNEL)
    assert held["llava"] == [] and LLAVA not in page


def test_no_results_and_damaged_ones_are_named(tmp_path):
    with pytest.raises(SystemExit, match="which holds no results/"):
        main(["eval", "report", "--out", str(tmp_path)])
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("{}")
    with pytest.raises(SystemExit, match="a.json: task is missing"):
        main(["eval", "report", "--out", str(tmp_path)])
