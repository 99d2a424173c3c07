"""Prompts: lines, objects, GenEval's prompts and COCO's captions, and where each picture is kept."""
import hashlib
import json

import pytest

from transfusion.eval.prompts import entries, read_drawn, read_prompts

GENEVAL = [{"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"},
           {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}]


def coco(path, pictures=6):
    """A file of COCO's captions: two of each picture, the later one first."""
    annotations = [{"id": 2 * image + late, "image_id": image, "caption": f"{'late' if late else 'early'} {image}\n"}
                   for image in range(pictures) for late in (1, 0)]
    images = [{"id": image, "file_name": f"COCO_{image:012}.jpg"} for image in range(pictures)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_lines_that_are_not_empty_are_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two \nthree\n")
    assert [row["prompt"] for row in read_prompts(tmp_path / "a.txt").rows] == ["one", "two", "three"]
    first = read_prompts(tmp_path / "a.txt", 2)
    assert [row["prompt"] for row in first.rows] == ["one", "two"] and first.rule == "the first 2 of a.txt"


def test_a_text_in_another_encoding_is_named_and_one_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes("grün\n".encode("latin-1"))
    with pytest.raises(ValueError, match="a.txt is no text in UTF-8"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("grün\n", encoding="utf-8-sig")
    assert [row["prompt"] for row in read_prompts(tmp_path / "a.txt").rows] == ["grün"]


def test_each_picture_of_coco_gives_its_first_caption_and_fewer_are_the_first_of_more(tmp_path):
    path = coco(tmp_path / "captions.json")
    order = sorted(range(6), key=lambda image: hashlib.sha256(b"%d" % image).hexdigest())
    six, three = read_prompts(path, 6), read_prompts(path, 3)
    assert [row["prompt"] for row in six.rows] == [f"early {image}" for image in order]
    assert three.rows == six.rows[:3] and three.rows[0]["image_file"] == f"COCO_{order[0]:012}.jpg"
    with pytest.raises(ValueError, match="captions of 6 pictures, and 30,000 are asked for; --count 6 fits"):
        read_prompts(path)


def test_genevals_prompts_are_kept_in_its_folders(tmp_path):
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, GENEVAL)))
    prompts = read_prompts(tmp_path / "evaluation_metadata.jsonl")
    assert prompts.is_geneval and prompts.rows == GENEVAL
    assert [entry.file for entry in entries(prompts, 2)] == [
        "00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png", "00001/samples/0001.png"]
    assert [entry.prompt for entry in entries(prompts, 2)][1:3] == ["a photo of two dogs", "a photo of a cat"]


def test_other_objects_are_kept_by_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "one", "style": "flat"}\n{"prompt": "two"}\n')
    found = entries(read_prompts(tmp_path / "a.jsonl"), 1)
    assert [entry.file for entry in found] == ["000000.png", "000001.png"] and found[0].about == {"style": "flat"}


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(ValueError, match="none.txt', where no file is; a .txt of lines"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("name, text, says", [
    ("a.csv", "one", "a .txt of lines"), ("a.txt", "\n", "holds 0 prompts; one or more fit"),
    ("a.jsonl", '{"prompt": "one"}\n{', "line 2 is damaged"), ("a.jsonl", "[1]", "line 1 holds a list"),
    ("a.jsonl", '{"text": "one"}', "a.jsonl, line 1: prompt is None; some text fits"),
    ("a.jsonl", '\n{"prompt": "one", "steps": 0}', "a.jsonl, line 2: steps is 0; a whole number of at least 1 fits"),
    ("a.jsonl", '{"prompt": "one", "seed": 1.5}', "line 1: seed is 1.5"),
    ("a.jsonl", '{"prompt": "one", "sampler": "dmp"}', "line 1: sampler is 'dmp'; one of 'ddim'"),
    ("a.jsonl", '{"prompt": "one", "image_size": 8}', "line 1: image_size is 8"),
    ("a.jsonl", '{"prompt": "one", "image": "b.png"}', "line 1: image is 'b.png'; a picture file fits"),
    ("a.jsonl", '{"prompt": "one"}\n{"prompt": "\\ud800"}', "line 2: prompt is '.ud800', which is no Unicode text"),
    ("a.json", "{}", "no file of COCO's captions"),
])
def test_a_file_that_holds_no_prompts_is_named(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="holds no prompts.jsonl"):
        read_drawn(tmp_path)
