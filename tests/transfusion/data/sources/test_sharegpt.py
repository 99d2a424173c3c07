"""Conversations of ms-swift, LLaMA-Factory, ShareGPT and OpenAI's parts."""
import pytest

from tests.transfusion.data.sources.conftest import check_source, png, write_json_lines
from transfusion.data.sources import ShareGPTSettings

ROWS = [
    {
        "messages": [{"role": "user", "content": "<image>Was ist das?"}, {"role": "assistant", "content": "Eine 猫."}],
        "images": ["1.png"],
    },
    {"system": "Be short.", "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi."}]},
    {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
        ]
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Compare "},
                    {"type": "image"},
                    {"type": "text", "text": " and "},
                    {"type": "image", "image": "2.png"},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "So: "}, {"type": "image_url", "image_url": {"url": "1.png"}}],
            },
        ],
        "images": [{"path": "1.png", "bytes": None}],
    },
]


@pytest.fixture
def folder(tmp_path):
    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


def test_rows_of_every_spelling_are_read(folder):
    records = check_source(ShareGPTSettings(write_json_lines(folder / "rows.jsonl", ROWS)).open(), 4)
    assert [[(turn.role, turn.text) for turn in record.turns] for record in records] == [
        [("user", "<image>Was ist das?"), ("assistant", "Eine 猫.")],
        [("system", "Be short."), ("user", "Hi."), ("assistant", "Hi.")],
        [("system", "Be kind."), ("user", "a"), ("assistant", "b")],
        [("user", "Compare <image> and <image>"), ("assistant", "So: <image>")]]
    assert [[(picture.name, picture.loss) for picture in record.pictures()] for record in records] == [
        [("1.png", False)], [], [], [("1.png", False), ("2.png", False), ("1.png", True)]]


@pytest.mark.parametrize(
    "row, words, kind",
    [
        ({"messages": ROWS[0]["messages"]}, "1 times and the row has 0 pictures", "placeholders and pictures differ"),
        (
            {"messages": ROWS[1]["messages"], "images": ["1.png"]},
            "0 times and the row has 1 pictures",
            "placeholders and pictures differ",
        ),
        ({"text": "a"}, "no column 'messages' or 'conversations' for the turns; the row has 'text'", "missing column"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "a part's type is 'audio'; 'text' or 'image' fits",
            "no turns",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part's text is NoneType None", "no text"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "a part of a turn is 'a'", "no turns"),
        ({"messages": [{"role": "system", "content": "a"}]}, "there is no turn of the user", "no turns"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "a"}]},
            "turn 1 is said by 'tool'",
            "unknown role",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_an_error_with_its_line(folder, fails, row, words, kind):
    source = ShareGPTSettings(write_json_lines(folder / "rows.jsonl", [ROWS[1], row])).open()
    fails(source, 1, [words, "rows.jsonl, line 2"], kind)
    assert source[0].turns[0].text == "Be short."
