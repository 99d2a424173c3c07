"""Grids of pictures and curves of losses are written as picture files."""
import json

from PIL import Image as Picture

from transfusion.eval.picture_grids import sample_grid
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
