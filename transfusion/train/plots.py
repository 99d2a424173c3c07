"""Curves of a training log."""
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from transfusion.files import written  # noqa: E402
from transfusion.train.log import read_log  # noqa: E402


def loss_curves(path: Path, log: Path) -> None:
    """Plot the text and the diffusion loss of a training log (JSON lines), raw and as a running mean."""
    records = read_log(log)
    if not records:
        print(f"{log} holds no step: {path} is not drawn", flush=True)
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = {"text_loss": "text loss (nats per token)", "diffusion_loss": "diffusion loss (mean squared error)"}
    for axis, (key, title) in zip(axes, titles.items()):
        values = torch.tensor([record[key] for record in records])
        width = max(1, len(values) // 50)
        axis.plot(values, color="0.8", linewidth=0.8)
        means = values.unfold(0, width, 1).mean(-1)
        axis.plot(torch.arange(width - 1, len(values)), means, linewidth=1.5, label=f"mean of {width} steps")
        axis.set(xlabel="step", title=title, yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    with written(path) as aside:
        figure.savefig(aside, dpi=150, bbox_inches="tight")
    plt.close(figure)
