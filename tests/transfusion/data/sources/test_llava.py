"""LLaVA's conversations: pictures where `<image>` stands, roles in order, every misfit with its row."""
import json
import pickle
from pathlib import Path

import pytest

from tests.transfusion.data.sources.conftest import check_source, png, write_json_lines
from transfusion.data.sources import FORMATS, DataError, LLaVASettings, PictureRef, Turn


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


ROWS = [
    {
        "id": "000000033471",
        "image": "coco/1.png",
        "conversations": talk("<image>\nWas ist das für ein Bus?", "Ein weißer."),
    },
    {"id": 7, "conversations": talk("Tell me of the 猫.", "It sleeps.", "Why?", "It is night.")},
    {
        "id": "7",
        "image": ["coco/1.png", "gqa/2.png"],
        "model": "",
        "conversations": talk("Compare <image> with\n<image>.", "No."),
    },
    {
        "id": "x",
        "image": "gqa/2.png",
        "conversations": [{"from": "gpt", "value": "Hello!"}, *talk("And this?\n<image>", "Blue.")],
    },
    {"id": "y", "image": "gqa/2.png", "conversations": talk("Draw it.", "Here: <image>")},
]


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("coco/1.png", "gqa/2.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(i))
    (tmp_path / "mix.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    write_json_lines(tmp_path / "mix.jsonl", ROWS)
    return tmp_path


def open_rows(folder, rows, **options):
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return LLaVASettings(folder / "rows.json", folder / "images", **options).open()


@pytest.mark.parametrize("name", ["mix.json", "mix.jsonl"])
def test_rows_are_read_as_they_lie(folder, name):
    records = check_source(LLaVASettings(folder / name, folder / "images").open(), len(ROWS))
    bus, night, two, dropped, answer = (record.turns for record in records)
    picture = bus[0].parts[0]
    assert picture == PictureRef(picture.file, False, "coco/1.png") and picture.read() == png(0)
    assert bus == (Turn("user", (picture, "\nWas ist das für ein Bus?")), Turn("assistant", ("Ein weißer.",)))
    assert [(turn.role, turn.text) for turn in night] == [("user", "Tell me of the 猫."), ("assistant", "It sleeps."),
                                                          ("user", "Why?"), ("assistant", "It is night.")]
    assert [part if isinstance(part, str) else part.name for part in two[0].parts] == [
        "Compare ", "coco/1.png", " with\n", "gqa/2.png", "."]
    assert [turn.text for turn in dropped] == ["And this?\n<image>", "Blue."]
    assert [[picture.loss for picture in record.pictures()] for record in records] == [
        [False],
        [],
        [False] * 2,
        [False],
        [True],
    ]


def test_a_folder_beside_the_file_is_the_default_and_numbers_are_those_of_the_list(folder):
    (folder / "mix.json").rename(folder / "images" / "mix.json")
    source = LLaVASettings(folder / "images" / "mix.json").open()
    assert source.name == "mix" and source[0].turns[0].parts[0].read() == png(0)
    for number, row in enumerate(json.loads((folder / "images" / "mix.json").read_text(encoding="utf-8"))):
        texts = [turn.text for turn in source[number].turns]
        assert texts == [turn["value"] for turn in row["conversations"]][-len(texts):]
        assert source[number].where.endswith(f"mix.json, row {number}")


@pytest.mark.parametrize(
    "drawn, losses", [("none", [False, False]), ("all", [True, True]), ("assistant", [False, True])]
)
def test_which_pictures_are_drawn_is_a_setting(folder, drawn, losses):
    rows = [{"image": ["coco/1.png", "gqa/2.png"], "conversations": talk("<image> Turn it.", "<image>")}]
    assert [picture.loss for picture in open_rows(folder, rows, drawn=drawn)[0].pictures()] == losses


@pytest.mark.parametrize(
    "row, words, kind",
    [
        (
            {"image": "coco/1.png", "conversations": talk("What?", "No.")},
            "<image> stands in the text 0 times and the row has 1 pictures",
            "placeholders and pictures differ",
        ),
        (
            {"conversations": talk("<image>What?", "No.")},
            "stands in the text 1 times and the row has 0",
            "placeholders and pictures differ",
        ),
        (
            {"image": ["a.png"], "conversations": talk("<image><image>", "No.")},
            "2 times and the row has 1",
            "placeholders and pictures differ",
        ),
        (
            {"conversation": talk("a", "b")},
            "there is no column 'conversations' for the turns; the row has 'conversation'; did you mean conversation?",
            "missing column",
        ),
        ({"conversations": []}, "the turns are []", "no turns"),
        ({"conversations": "hello"}, "the turns are 'hello'", "no turns"),
        ({"conversations": ["hello"]}, "turn 0 is 'hello'", "no turns"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            "turn 1 is the user's and the assistant's is due",
            "roles do not alternate",
        ),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "turn 0 is said by 'tool'", "unknown role"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "there is no turn of the user", "no turns"),
        (
            {"conversations": [{"value": "a"}]},
            "turn 0: there is no column 'from' or 'role' for the role",
            "missing column",
        ),
        ({"conversations": [{"from": "human"}]}, "no column 'value' or 'content' for the text", "missing column"),
        ({"conversations": talk(3, "b")}, "a turn's text is int 3; text fits", "no text"),
        ({"conversations": talk("a \ud800", "b")}, "which is no Unicode text", "bad encoding"),
        ({"conversations": talk("a", " ")}, "turn 1, the assistant's, is empty", "empty turn"),
        (
            {"image": 5, "conversations": talk("<image>a", "b")},
            "a picture is int 5; a file's name or bytes fit",
            "no picture",
        ),
        ({"image": "", "conversations": talk("<image>a", "b")}, "a picture is str ''", "no picture"),
        ({"image": "https://x/y.jpg", "conversations": talk("<image>a", "b")}, "fetch it first", "no picture"),
    ],
)
def test_a_row_that_does_not_fit_is_an_error_with_its_place_and_costs_no_other(folder, fails, row, words, kind):
    source = open_rows(folder, [ROWS[1], row, ROWS[1]])
    assert fails(source, 1, [words, "rows.json, row 1"], kind).where.startswith(str(folder))
    assert source[0].turns == source[2].turns and len(source) == 3


def test_pictures_that_are_missing_are_named_with_their_row_when_they_are_read(folder):
    source = open_rows(folder, [{"image": "coco/9.png", "conversations": talk("<image>a", "b")}, ROWS[0]])
    pictures = [picture for number in range(2) for picture in source[number].pictures()]
    with pytest.raises(DataError, match="rows.json, row 0: the picture '.*coco/9.png' cannot be opened") as error:
        pictures[0].read()
    assert error.value.kind == "missing picture"


def test_the_fingerprint_follows_the_file_and_the_settings(folder):
    settings = LLaVASettings(folder / "mix.json", folder / "images")
    first = settings.open().fingerprint()
    assert settings.open().fingerprint() == first == pickle.loads(pickle.dumps(settings.open())).fingerprint()
    assert LLaVASettings(folder / "mix.json", folder / "images", drawn="all").open().fingerprint() != first
    (folder / "mix.json").write_text(json.dumps(ROWS[1:], ensure_ascii=False), encoding="utf-8")
    assert settings.open().fingerprint() != first and len(settings.open()) == len(ROWS) - 1


def test_settings_that_do_not_fit_are_refused():
    assert FORMATS["llava"] is LLaVASettings
    with pytest.raises(ValueError, match="llava: path is 'mix.json'; a pathlib.Path fits"):
        LLaVASettings("mix.json").open()
    with pytest.raises(ValueError, match="llava: drawn is 'yes'; one of 'assistant', 'all', 'none' fits"):
        LLaVASettings(Path("mix.json"), drawn="yes").open()
    with pytest.raises(ValueError, match="llava: path is 'no/mix.json', where no file is"):
        LLaVASettings(Path("no/mix.json")).open()
