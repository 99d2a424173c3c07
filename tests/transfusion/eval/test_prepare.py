"""Benchmarks in LLaVA's folders, written as lmms-eval reads them: each in its own format, whole and broken."""
import base64
import io
import json

import pytest
from PIL import Image as Picture

from tests.transfusion.eval import llava_data
from tests.transfusion.eval.llava_data import LETTER, SHORT, TRUTHS
from transfusion.cli import main
from transfusion.data.sources.arrow import ArrowTable
from transfusion.eval.benchmarks import BENCHMARKS
from transfusion.eval.vqa import limit_of


@pytest.fixture
def data(tmp_path):
    return llava_data.make(tmp_path / "eval")


def prepared(data, *names):
    """Run `transfusion eval prepare`; return where it wrote."""
    out = data.parent / "prepared"
    main(["eval", "prepare", "--data", str(data), "--out", str(out), *(["--tasks", *names] if names else [])])
    return out


def table(out, name):
    """The rows of a prepared benchmark."""
    rows = ArrowTable([out / name / "test" / "data-00000-of-00001.arrow"])
    return [rows.row(i) for i in range(len(rows))]


def test_all_twelve_are_read_with_llavas_prompts_and_their_answers(data):
    out = prepared(data)
    for name in BENCHMARKS:
        about = json.loads((out / name / "benchmark.json").read_text())
        kept = [json.loads(line) for line in (out / name / "rows.jsonl").read_text().splitlines()]
        assert about["rows"] == len(kept) == len(TRUTHS[name]) * (2 if name == "mme" else 1) and not about["skipped"]
    prompts = {name: json.loads((out / name / "rows.jsonl").read_text().splitlines()[0])["prompt"]
               for name in BENCHMARKS}
    assert prompts["vqav2"] == f"What is 0?{SHORT}"
    assert prompts["scienceqa_img"] == f"Context: N/A\nWhich, 0?\nA. one\nB. two{LETTER}"
    assert prompts["textvqa"] == f"what is the brand, 0?\nReference OCR token: NOKIA, 0{SHORT}"
    assert prompts["mmbench"] == f"Which colour, 0?\nA. blue\nB. red{LETTER}"
    assert prompts["mmbench_cn"].endswith("\nB. red\n请直接回答选项字母。")
    assert prompts["llava_wild"] == "Describe 0."


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if BENCHMARKS[name].task])
def test_a_row_has_what_the_scoring_of_its_benchmark_asks_for(data, name):
    rows = table(prepared(data, name), name)
    column = {"textvqa": "answers", "llava_wild": "gpt_answer"}.get(name, "answer")
    answers = [row[column] for row in rows]
    expected = {"scienceqa_img": [1, 0], "textvqa": [["nokia"] * 10, ["dakota"] * 10], "mme": ["Yes", "No"] * 2,
                "llava_wild": ["It is a square."] * 2}.get(name, TRUTHS[name])
    assert answers == expected
    images = [row["image"][0] if name == "seedbench" else row["image"] for row in rows]
    for image in images:
        assert Picture.open(image["path"] or io.BytesIO(image["bytes"])).size == (30, 20)


def test_a_picture_that_is_missing_or_broken_is_left_out_counted_and_named_by_its_line(data, capsys):
    (data / "gqa" / "data" / "images" / "n0.jpg").unlink()
    broken = data / "vizwiz" / "test" / "VizWiz_test_1.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    out = prepared(data, "gqa", "vizwiz")
    said = capsys.readouterr().out
    assert "GQA: 1 questions; 1 left out: missing picture" in said
    assert "llava_gqa_testdev_balanced.jsonl, line 1: there is no" in said
    about = json.loads((out / "vizwiz" / "benchmark.json").read_text())
    assert about["skipped"] == {"unreadable picture": 1}
    assert "llava_test.jsonl, line 2" in about["examples"]["unreadable picture"][0]


def test_both_questions_about_a_picture_of_mme_stand_side_by_side(data):
    rows = (data / "MME" / "llava_mme.jsonl").read_text().splitlines()
    (data / "MME" / "llava_mme.jsonl").write_text("\n".join(rows[i] for i in (0, 2, 3, 1)) + "\n")
    asked = [row["question_id"] for row in table(prepared(data, "mme"), "mme")]
    assert asked == ["existence/1.jpg"] * 2 + ["landmark/2.jpg"] * 2


def test_a_question_of_mmbench_stands_beside_itself_with_its_options_in_other_orders(data):
    path = data / "mmbench" / "mmbench_dev_20230712.tsv"
    head, *rows = path.read_text().splitlines()
    cells = [row.partition("\t") for row in rows]
    turned = [f"{1_000_000 + int(index)}\t{rest}" for index, _, rest in cells]
    path.write_text("\n".join([head, *rows, *turned]) + "\n")
    assert [row["index"] for row in table(prepared(data, "mmbench"), "mmbench")] == [241, 1_000_241, 242, 1_000_242]
    mmbench = BENCHMARKS["mmbench"]
    assert [limit_of(mmbench, limit, [241, 1_000_241, 242, 1_000_242]) for limit in (1, 2, 3, 9)] == [2, 2, 4, 9]
    with pytest.raises(ValueError, match="limit is 2, and rows of MMBench that are scored together stand apart"):
        limit_of(mmbench, 2, [241, 242, 1_000_241, 1_000_242])
    assert limit_of(BENCHMARKS["pope"], 1, [0, 1]) == 1 and limit_of(mmbench, None, [241]) is None


def test_another_picture_under_the_same_name_is_another_data_set(data):
    def known():
        return [json.loads((prepared(data, *names) / name / "test" / "state.json").read_text())["_fingerprint"]
                for name in names]

    names = ["mme", "mmbench"]
    before = known()
    assert known() == before
    path = data / "mmbench" / "mmbench_dev_20230712.tsv"
    file = io.BytesIO()
    Picture.new("RGB", (30, 20), "blue").save(file, "JPEG")
    head, *rows = path.read_text().splitlines()
    at = head.split("\t").index("image")
    rows = [row.split("\t") for row in rows]
    path.write_text("\n".join([head, *("\t".join([*row[:at], base64.b64encode(file.getvalue()).decode(), *row[at + 1:]])
                                      for row in rows)]) + "\n")
    llava_data.picture(next((data / "MME").rglob("*.jpg")), "blue", (31, 20))
    assert all(a != b for a, b in zip(known(), before))


def test_a_question_of_mme_whose_partner_is_left_out_goes_too(data):
    rows = (data / "MME" / "llava_mme.jsonl").read_text().splitlines()
    (data / "MME" / "llava_mme.jsonl").write_text("\n".join(rows[:3]) + "\n")
    about = json.loads((prepared(data, "mme") / "mme" / "benchmark.json").read_text())
    assert about["rows"] == 2 and about["skipped"] == {"no pair of questions": 1}


def test_transparent_parts_are_white_as_in_training_and_other_files_stay_where_they_are(data):
    Picture.new("RGBA", (30, 20), (255, 0, 0, 0)).save(data / "seed_bench" / "SEED-Bench-image" / "0.png")
    first, second = (row["image"][0] for row in table(prepared(data, "seedbench"), "seedbench"))
    assert Picture.open(io.BytesIO(first["bytes"])).getpixel((0, 0)) == (255, 255, 255)
    assert second["bytes"] is None and second["path"] == str(data / "seed_bench" / "SEED-Bench-video-image" / "1.png")


def test_a_benchmark_that_is_not_there_is_named_with_the_folder_where_it_was_looked_for(data, capsys):
    (data / "pope").rename(data / "elsewhere")
    out = prepared(data)
    assert f"not there: POPE: there is no folder {data / 'pope'}" in capsys.readouterr().out
    assert not (out / "pope").exists() and (out / "mme").exists()
    with pytest.raises(SystemExit, match=f"^error: POPE: there is no folder {data / 'pope'}"):
        prepared(data, "pope")


@pytest.mark.parametrize("spoil,message", [
    (lambda data: (data / "gqa" / "llava_gqa_testdev_balanced.jsonl").write_text('{"question_id": "20130"}\n{oh\n'),
     "llava_gqa_testdev_balanced.jsonl, line 1: there is no 'text'"),
    (lambda data: (data / "gqa" / "llava_gqa_testdev_balanced.jsonl").write_text("\n{oh\n"),
     "llava_gqa_testdev_balanced.jsonl, line 2 is damaged"),
    (lambda data: (data / "gqa" / "data" / "testdev_balanced_questions.json").write_text("{}"),
     "line 1: .*testdev_balanced_questions.json has no answer to '20130'"),
    (lambda data: (data / "gqa" / "data" / "testdev_balanced_questions.json").write_text('{"a":\n oh}'),
     "testdev_balanced_questions.json is damaged .*line 2"),
    (lambda data: (data / "gqa" / "data" / "testdev_balanced_questions.json").unlink(),
     "testdev_balanced_questions.json or .* is missing"),
])
def test_a_file_that_cannot_be_read_is_named_with_its_line(data, spoil, message):
    spoil(data)
    with pytest.raises(SystemExit, match=message):
        prepared(data, "gqa")


def test_questions_and_labels_of_pope_that_are_not_of_one_release_are_refused(data):
    labels = data / "pope" / "coco" / "coco_pope_popular.json"
    labels.write_text("\n".join(reversed(labels.read_text().splitlines())) + "\n")
    with pytest.raises(SystemExit, match="llava_pope_test.jsonl, line 3: .*coco_pope_popular.json, line 1 asks"):
        prepared(data, "pope")


@pytest.mark.parametrize("arguments,message", [
    (["--tasks", "pop"], "'pop' is no benchmark; llava12, vqav2, .* fit; did you mean pope"),
    (["--data", "nowhere"], "data is 'nowhere', which is no directory"),
])
def test_settings_that_do_not_fit_end_in_one_line(data, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["eval", "prepare", "--data", str(data), "--out", str(tmp_path / "o"), *arguments])


@pytest.mark.parametrize("name,file,text,message", [
    ("scienceqa_img", "scienceqa/llava_test_CQM-A.json", '{"a": 1}', "llava_test_CQM-A.json: this is a dict; a list"),
    ("scienceqa_img", "scienceqa/llava_test_CQM-A.json", '[{"id": "1", "image": "a.png", "conversations": []}]',
     "row 0: there is no 'value'"),
    ("textvqa", "textvqa/TextVQA_0.5.1_val.json", '{"data": [{"image_id": "a"}]}', "row 0: there is no 'question'"),
    ("seedbench", "seed_bench/SEED-Bench.json", "[]", "SEED-Bench.json: there is no 'questions'"),
    ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "index\tquestion\timage\nx\twhy\t\n",
     "mmbench_dev_20230712.tsv, line 2: its index or picture cannot be read"),
    ("mme", "MME/MME_Benchmark_release_version/existence/1.txt", "another?\tYes\n", "llava_mme.jsonl, line 1: .*1.txt"),
    ("mmvet", "mm-vet/mm-vet.json", '{"v1_0": {"answer": 3}}', "line 1: 'answer' is 3; a str fits"),
])
def test_an_answer_file_of_another_shape_is_named_with_its_row(data, name, file, text, message):
    (data / file).write_text(text)
    with pytest.raises(SystemExit, match=message):
        prepared(data, name)
