"""Grids of pictures and curves of losses are written as picture files."""
import json

from matplotlib import pyplot as plt
from PIL import Image as Picture

from transfusion.eval.picture_grids import answer_figure, answer_sheet, contact_sheet, sample_grid
from transfusion.recipes.digits import Digits
from transfusion.train.plots import loss_curves


def test_pictures_are_written(tmp_path):
    records = [json.dumps({"text_loss": 1 / (i + 1), "diffusion_loss": 1.0}) for i in range(100)]
    (tmp_path / "log.jsonl").write_text("\n".join(records) + "\n")
    loss_curves(tmp_path / "loss.png", tmp_path / "log.jsonl")
    digits = Digits().pictures[:20].view(2, 10, 1, 8, 8)
    sample_grid(tmp_path / "samples.png", digits, digits, ["zero", "one"], ("generated", "real"))
    for name in ("loss.png", "samples.png"):
        with Picture.open(tmp_path / name) as picture:
            assert min(picture.size) > 100 and len(picture.convert("L").getcolors()) > 10


def test_dollars_are_no_formulas(tmp_path):
    picture, words = Picture.new("RGB", (8, 8), "red"), r"$\nothing{$"
    picture.save(tmp_path / "one.png")
    answer_sheet(tmp_path / "answers.png", [((picture,), words, words, ""), ((), "Why?", "red", words)])
    contact_sheet(tmp_path / "sheet.png", [tmp_path / "one.png"], [words])
    digits = Digits().pictures[:4].view(2, 2, 1, 8, 8)
    sample_grid(tmp_path / "samples.png", digits, digits, [words, "one"], ("generated", "real"))
    for name in ("answers.png", "sheet.png", "samples.png"):
        assert (tmp_path / name).is_file()


def test_a_strip_beside_a_high_picture_is_small(tmp_path):
    strip, high = Picture.new("RGB", (300, 1), "red"), Picture.new("RGB", (1, 300), "blue")
    figure = answer_figure([((strip, high), "Why?", "red", "")])
    assert max(figure.axes[0].images[0].get_array().shape) < 10_000
    plt.close(figure)


def test_long_questions_and_answers_cover_neither_each_other_nor_a_picture(tmp_path):
    picture, words = Picture.new("RGB", (32, 32), "red"), "as many words as fill four lines of the sheet " * 2
    shown = [((picture,), words, words, words), ((picture, picture), "Why?", "", ""), ((), "What?", "red", "blue")] * 3
    answer_sheet(tmp_path / "answers.png", shown)
    with Picture.open(tmp_path / "answers.png") as written:
        assert min(written.size) > 300
    figure = answer_figure(shown, columns=2)
    renderer = figure.canvas.get_renderer()
    texts = [text.get_window_extent(renderer) for axis in figure.axes for text in axis.texts]
    boxes = texts + [axis.get_window_extent(renderer) for axis in figure.axes]
    for i, one in enumerate(texts):
        assert not any(one.overlaps(other) for other in boxes[i + 1:])
    plt.close(figure)
