"""Editing triples: only the target is drawn, the instruction only read."""
import pytest

from tests.transfusion.data.sources.conftest import check_source, png, write_json_lines
from transfusion.data.sources import EditingSettings
from transfusion.sequence import Text


@pytest.fixture
def folder(tmp_path):
    for i in (1, 2, 3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


def test_columns_of_the_known_data_sets_are_found(folder):
    path = write_json_lines(folder / "rows.jsonl", [
        {"source": "1.png", "instruction": "male die 猫 rot", "target": "2.png"},
        {"original_image": "1.png", "original_prompt": "a cat", "edit_prompt": "make it red", "edited_image": "3.png"},
        {"input_images": ["1.png", "2.png"], "instruction": "join them", "output_image": "3.png"}])
    records = check_source(EditingSettings(path).open(), 3)
    assert [
        [part if isinstance(part, Text) else (part.name, part.loss) for part in record.parts] for record in records
    ] == [
        [("1.png", False), Text("male die 猫 rot", loss=False), ("2.png", True)],
        [("1.png", False), Text("make it red", loss=False), ("3.png", True)],
        [("1.png", False), ("2.png", False), Text("join them", loss=False), ("3.png", True)],
    ]
    loud = EditingSettings(path, drawn="all", loss=True).open()[0]
    assert [part.loss for part in loud.parts] == [True, True, True]


def test_parquet_with_bytes_and_columns_of_ones_own(tmp_path):
    pytest.importorskip("pyarrow", reason="parquet files need the extra [data]")
    from tests.transfusion.data.sources.test_tables import write_parquet
    path = write_parquet(tmp_path / "a.parquet", [{"von": png(1), "wie": "rot", "nach": png(2)}])
    record, = check_source(EditingSettings(path, source=("von",), instruction=("wie",), target=("nach",)).open(), 1)
    assert [picture.read() for picture in record.pictures()] == [png(1), png(2)]


@pytest.mark.parametrize(
    "row, words, kind",
    [
        (
            {"source": "1.png", "instruction": "x"},
            "for the target picture; the row has 'source', 'instruction'",
            "missing column",
        ),
        (
            {"source": [], "instruction": "x", "target": "1.png"},
            "the list of source pictures is empty",
            "missing source picture",
        ),
        (
            {"source": "1.png", "instruction": ["x"], "target": "2.png"},
            "the instruction is list ['x']; text fits",
            "no text",
        ),
        ({"source": "1.png", "instruction": "x", "target": 3}, "a picture is int 3", "no picture"),
    ],
)
def test_a_triple_that_does_not_fit_is_an_error_with_its_line(folder, fails, row, words, kind):
    fails(
        EditingSettings(write_json_lines(folder / "rows.jsonl", [row])).open(), 0, [words, "rows.jsonl, line 1"], kind
    )
