"""A small playground/data/eval: each of LLaVA's twelve benchmarks in its own format, two to four questions each.

Questions of one kind have the answers of `TRUTHS` in order, so that a model that gives them scores full marks.
"""
import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image as Picture

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
CHINESE = "\n请直接回答选项字母。"
TRUTHS = {
    "vqav2": ["a cat", "2"], "gqa": ["left", "yes"], "vizwiz": ["unanswerable", "Coke"], "scienceqa_img": ["B", "A"],
    "textvqa": ["Nokia", "dakota"], "pope": ["yes", "no", "no", "yes"], "mme": ["Yes", "No"],
    "mmbench": ["B", "A"], "mmbench_cn": ["B", "A"], "seedbench": ["C", "A"],
    "llava_wild": ["A red square.", "It is a square."], "mmvet": ["red", "4"],
}


def picture(path: Path, colour="red", size=(30, 20)) -> Path:
    """Write a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.new("RGB", size, colour).save(path)
    return path


def lines(path: Path, rows: list[dict]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def held(path: Path, value) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make(data: Path) -> Path:
    """Write all twelve; return the folder."""
    for write in (vqav2, gqa, vizwiz, scienceqa, textvqa, pope, mme, mmbench, seedbench, llava_wild, mmvet):
        write(data)
    return data


def vqav2(data: Path) -> None:
    folder = data / "vqav2"
    rows = [{"question_id": 262144005 + i, "image": f"COCO_test2015_{i}.jpg", "text": f"What is {i}?{SHORT}",
             "category": "default"} for i in range(3)]
    lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[:2])
    lines(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    for row in rows:
        picture(folder / "test2015" / row["image"])


def gqa(data: Path) -> None:
    folder = data / "gqa"
    lines(folder / "llava_gqa_testdev_balanced.jsonl", [
        {"question_id": f"2013{i}", "image": f"n{i}.jpg", "text": f"Which side, {i}?{SHORT}", "category": "default"}
        for i in range(2)])
    held(folder / "data" / "testdev_balanced_questions.json", {
        f"2013{i}": {"imageId": f"n{i}", "question": f"Which side, {i}?", "answer": answer}
        for i, answer in enumerate(TRUTHS["gqa"])})
    for i in range(2):
        picture(folder / "data" / "images" / f"n{i}.jpg", "blue")


def vizwiz(data: Path) -> None:
    folder = data / "vizwiz"
    request = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    lines(folder / "llava_test.jsonl", [
        {"question_id": i, "image": f"VizWiz_test_{i}.jpg", "text": f"What is this, {i}?{request}"} for i in range(2)])
    for i in range(2):
        picture(folder / "test" / f"VizWiz_test_{i}.jpg")


def scienceqa(data: Path) -> None:
    folder = data / "scienceqa"
    asked = [{"id": str(i), "image": f"{i}/image.png", "conversations": [
        {"from": "human", "value": f"<image>\nContext: N/A\nWhich, {i}?\nA. one\nB. two"},
        {"from": "gpt", "value": letter}]} for i, letter in enumerate(TRUTHS["scienceqa_img"])]
    text = {"id": "9", "conversations": [{"from": "human", "value": "Without a picture?\nA. x\nB. y"},
                                         {"from": "gpt", "value": "A"}]}
    held(folder / "llava_test_CQM-A.json", [asked[0], text, asked[1]])
    held(folder / "problems.json", {
        **{str(i): {"question": f"Which, {i}?", "choices": ["one", "two"], "answer": "AB".index(letter), "hint": "",
                    "image": "image.png"} for i, letter in enumerate(TRUTHS["scienceqa_img"])},
        "9": {"question": "Without a picture?", "choices": ["x", "y"], "answer": 0, "hint": "", "image": None}})
    held(folder / "pid_splits.json", {"test": ["0", "9", "1"]})
    for i in range(2):
        picture(folder / "images" / "test" / str(i) / "image.png")


def textvqa(data: Path) -> None:
    folder = data / "textvqa"
    lines(folder / "llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": f"003a{i}", "image": f"003a{i}.jpg",
         "text": f"what is the brand, {i}?\nReference OCR token: NOKIA, {i}{SHORT}"} for i in range(2)])
    held(folder / "TextVQA_0.5.1_val.json", {"data": [
        {"image_id": f"003a{i}", "question": f"What is the brand, {i}?", "question_id": 34602 + i,
         "answers": [answer.lower()] * 10} for i, answer in enumerate(TRUTHS["textvqa"])]})
    for i in range(2):
        picture(folder / "train_images" / f"003a{i}.jpg")


def pope(data: Path) -> None:
    folder, questions = data / "pope", []
    for number, kind in enumerate(("adversarial", "popular")):
        labels = TRUTHS["pope"][2 * number:2 * number + 2]
        lines(folder / "coco" / f"coco_pope_{kind}.json", [
            {"question_id": i + 1, "image": f"COCO_val2014_{i}.jpg", "text": f"Is there a {kind} dog, {i}?",
             "label": label} for i, label in enumerate(labels)])
        questions += [{"question_id": 2 * number + i, "image": f"COCO_val2014_{i}.jpg", "category": kind,
                       "text": f"Is there a {kind} dog, {i}?{SHORT}"} for i in range(2)]
    lines(folder / "llava_pope_test.jsonl", questions)
    for i in range(2):
        picture(folder / "val2014" / f"COCO_val2014_{i}.jpg", "green")


def mme(data: Path) -> None:
    """One picture of the kind whose answers lie beside it, and one of the kind whose answers have a folder."""
    folder, rows = data / "MME", []
    pictures = folder / "MME_Benchmark_release_version"
    for kind, image, answers in (("existence", "existence/1.jpg", "existence/1.txt"),
                                 ("landmark", "landmark/images/2.jpg", "landmark/questions_answers_YN/2.txt")):
        picture(pictures / image)
        (pictures / answers).parent.mkdir(parents=True, exist_ok=True)
        said = [f"Is it {i} in {kind}?" for i in range(2)]
        (pictures / answers).write_text("".join(f"{question}  Please answer yes or no.\t{answer}\n"
                                                for question, answer in zip(said, TRUTHS["mme"])))
        rows += [{"question_id": f"{kind}/{Path(image).name}", "image": image, "category": kind,
                  "text": f"{question} Please answer yes or no.{SHORT}"} for question in said]
    lines(folder / "llava_mme.jsonl", rows)


def mmbench(data: Path) -> None:
    """Both languages lie in one folder, as LLaVA's instructions have it."""
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
               "comment", "split"]
    file = io.BytesIO()
    Picture.new("RGB", (30, 20), "red").save(file, "JPEG")
    data.joinpath("mmbench").mkdir(parents=True, exist_ok=True)
    for name in ("mmbench_dev_20230712.tsv", "mmbench_dev_cn_20231003.tsv"):
        with open(data / "mmbench" / name, "w", encoding="utf-8", newline="") as out:
            table = csv.writer(out, delimiter="\t")
            table.writerow(columns)
            for i, answer in enumerate(TRUTHS["mmbench"]):
                table.writerow([241 + i, f"Which colour, {i}?", "A hint" if i else "nan", "blue", "red",
                                "green" if i else "nan", "nan", answer, "attribute", base64.b64encode(
                                    file.getvalue()).decode(), "made", "coarse", "nan", "dev"])


def seedbench(data: Path) -> None:
    folder, kinds = data / "seed_bench", ("image", "video")
    lines(folder / "llava-seed-bench.jsonl", [
        {"question_id": f"10{i}", "image": f"SEED-Bench-{'image' if kind == 'image' else 'video-image'}/{i}.png",
         "category": "default", "text": f"What, {i}?\nA. a\nB. b\nC. c\nD. d{LETTER}"} for i, kind in enumerate(kinds)])
    held(folder / "SEED-Bench.json", {"question_type": {"Scene": 1}, "questions": [
        {"question_id": f"10{i}", "question": f"What, {i}?", "answer": answer, "data_type": kind, "choice_a": "a",
         "choice_b": "b", "choice_c": "c", "choice_d": "d", "question_type_id": 1}
        for i, (kind, answer) in enumerate(zip(kinds, TRUTHS["seedbench"]))]})
    picture(folder / "SEED-Bench-image" / "0.png")
    picture(folder / "SEED-Bench-video-image" / "1.png")


def llava_wild(data: Path) -> None:
    folder = data / "llava-bench-in-the-wild"
    lines(folder / "questions.jsonl", [
        {"question_id": i, "image": f"00{i}.jpg", "category": kind, "text": f"Describe {i}."}
        for i, kind in enumerate(("conv", "detail"))])
    lines(folder / "context.jsonl", [
        {"id": f"00{i}", "image": f"00{i}.jpg", "caption": "A square."} for i in range(2)])
    lines(folder / "answers_gpt4.jsonl", [
        {"question_id": i, "prompt": f"Describe {i}.", "text": "It is a square.", "answer_id": f"x{i}",
         "model_id": "gpt4", "metadata": {}} for i in range(2)])
    for i in range(2):
        picture(folder / "images" / f"00{i}.jpg")


def mmvet(data: Path) -> None:
    folder = data / "mm-vet"
    lines(folder / "llava-mm-vet.jsonl", [
        {"question_id": i, "image": f"v1_{i}.png", "text": f"What colour, {i}?"} for i in range(2)])
    held(folder / "mm-vet.json", {f"v1_{i}": {
        "imagename": f"v1_{i}.png", "question": f"What colour, {i}?", "answer": answer, "capability": ["rec", "ocr"]}
        for i, answer in enumerate(TRUTHS["mmvet"])})
    for i in range(2):
        picture(folder / "images" / f"v1_{i}.png")
