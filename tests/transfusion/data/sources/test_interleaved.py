"""Documents of text and pictures in three layouts."""
import pytest

from tests.transfusion.data.sources.conftest import check_source, png, write_json_lines
from transfusion.data.sources import InterleavedSettings

ROWS = [
    {
        "parts": [
            {"text": "Eine 猫."},
            {"image": "1.png"},
            {"text": "It sleeps.", "loss": False},
            {"image": "2.png", "loss": False},
        ]
    },
    {"texts": ["a", "b", None, "c"], "images": [None, None, "1.png", None]},
    {
        "text_list": ["One.", "Two.", "Three."],
        "image_info": [
            {"image_name": "2.png", "matched_text_index": 2, "raw_url": "http://x"},
            {"image_name": "1.png", "matched_text_index": 0},
        ],
    },
]


@pytest.fixture
def folder(tmp_path):
    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


def flat(record):
    return [(getattr(part, "text", None) or part.name, part.loss) for part in record.parts]


def test_the_three_layouts_are_told_apart_and_read_in_order(folder):
    path = write_json_lines(folder / "rows.jsonl", ROWS)
    own, obelics, mmc4 = check_source(InterleavedSettings(path).open(), 3)
    assert flat(own) == [("Eine 猫.", True), ("1.png", True), ("It sleeps.", False), ("2.png", False)]
    assert flat(obelics) == [("a\n\nb", True), ("1.png", True), ("c", True)]
    assert flat(mmc4) == [("1.png", True), ("One. Two.", True), ("2.png", True), ("Three.", True)]
    quiet = InterleavedSettings(path, drawn=False, loss=False).open()
    assert not any(loss for number in range(3) for _, loss in flat(quiet[number]))


@pytest.mark.parametrize(
    "row, words, kind",
    [
        ({"text": "a"}, "the row has 'text'; 'parts', 'text_list', 'texts' fit", "missing column"),
        ({"parts": "a"}, "parts is 'a'; a list fits", "bad part"),
        ({"parts": []}, "the document is empty", "empty text"),
        (
            {"parts": [{"text": "a", "image": "b"}]},
            "part 0 is {'text': 'a', 'image': 'b'}; an object with 'text' or 'image' fits",
            "bad part",
        ),
        ({"parts": [{"text": 3}]}, "a text is int 3", "no text"),
        ({"parts": [{"text": "a", "loss": 1}]}, "the loss of part 0 is 1; true or false fits", "bad part"),
        ({"texts": ["a"], "images": []}, "there are 1 texts and 0 images", "bad part"),
        ({"texts": ["a"], "images": ["b"]}, "at place 0 stand a text and an image", "bad part"),
        ({"texts": ["a"]}, "there is no column 'images'", "missing column"),
        (
            {"text_list": ["a"], "image_info": [{"image_name": "1.png", "matched_text_index": 1}]},
            "matched_text_index is 1; 0 to 0 fit",
            "bad part",
        ),
        (
            {"text_list": ["a"], "image_info": [{"matched_text_index": 0}]},
            "no column 'image_name' or 'image'",
            "missing column",
        ),
    ],
)
def test_a_document_that_does_not_fit_is_an_error_with_its_line(folder, fails, row, words, kind):
    source = InterleavedSettings(write_json_lines(folder / "rows.jsonl", [ROWS[0], row])).open()
    fails(source, 1, [words, "rows.jsonl, line 2"], kind)
