"""Losses on held-out rows while a run trains: `transfusion train PRESET --validate.every 200`.

    text loss            mean over the rows' text targets; perplexity = exp(text loss)
    diffusion loss       mean over their images and over times spread evenly on what training draws from, [0, limit]
    the same by time     [0, 1] is cut into bins of equal width, and each image counts in the bin of its time

Rows, times and noise are the same whenever a run looks, in every run on these data, and on any number of processes, so
that numbers compare. Each row is passed once for every bin; in pass k image n stands in part (n + k) of its times, so
that each pass holds all noise levels and each image meets every one. Times are uniform, whatever `optim.times` says.
"""
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion.data.batches import Drawn
from transfusion.sequence import Sequence
from transfusion.settings import Count, WholeNumber
from transfusion.train.optimizer import Player
from transfusion.train.parallel import sum_means
from transfusion.train.watching import averaged_weights, is_due

NOISE_SEED = -1
"""of noise: that of no run, whose seeds begin at 0"""


@dataclass(frozen=True)
class ValidationSettings:
    """Losses on held-out data during training."""

    every: WholeNumber = 0
    """steps between looks at the held-out split, with the averaged weights; 0: none"""
    rows: Count = 16
    """packed rows of held-out documents, at most; they stay in memory"""
    bins: Count = 4
    """parts of the noise times [0, 1] whose diffusion losses are logged apart; each row is passed once for each"""


class Validation:
    """A watcher that computes losses on held-out rows.

    Args:
        settings: how often, and how many bins.
        rows: held-out rows, each a batch of one.
        player: whose model, with averaged weights, is measured.
        steps: of the run, whose last one is always looked at.
        autocast: compute in bfloat16, as training does.
        device: that the model computes on; None for that of its weights.
        rank, ranks: which part of the rows this process passes, of how many parts.
        share: what this process computes of a row whose tokens it shares with others, as `Transfusion.share` says.
    """

    def __init__(self, settings: ValidationSettings, rows: Many[Drawn], player: Player, *, steps: int,
                 autocast: bool = False, device: torch.device | None = None, rank: int = 0, ranks: int = 1,
                 share: Callable[[Sequence], Sequence] | None = None):
        self.settings, self.player, self.steps, self.autocast = settings, player, steps, autocast
        self.device = device or next(player.model.parameters()).device
        self.count, self.rank, self.ranks, self.share = len(rows), rank, ranks, share
        self.rows = {number: rows[number] for number in self._numbers()}

    def _numbers(self) -> list[int]:
        """Rows that this process passes: as many on each, for sharded weights are gathered by all at once.

        A number past the end stands for the first row, which then counts nothing.
        """
        return [number % self.count if number < self.count else self.rank % self.count
                for number in range(self.rank, -(-self.count // self.ranks) * self.ranks, self.ranks)]

    def words(self) -> str:
        """A line to print before training: what is measured, and how often."""
        images = sum(int(row.sequence.drawn.sum()) for row in self.rows.values())
        return (f"held-out losses every {self.settings.every:,} steps: {self.count:,} rows"
                f"{'' if self.ranks > 1 else f', {images:,} images'}, {self.settings.bins} times each")

    def after(self, done: int) -> dict[str, float]:
        """As `Watcher.after`."""
        if not is_due(done, self.settings.every, self.steps):
            return {}
        began = time.perf_counter()
        with averaged_weights(self.player, self.device):
            found = self.measure()
        return found | {"validation_seconds": round(time.perf_counter() - began, 3)}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The losses of the model as it is."""
        table = self._table()
        totals = {name: math.fsum(values.tolist()) for name, values in sum_means(table).items()}
        found = {}
        if totals["text targets"]:
            found["validation_text_loss"] = totals["text"] / totals["text targets"]
            found["validation_perplexity"] = math.exp(min(found["validation_text_loss"], 700))
        bins = range(self.settings.bins)
        if images := sum(totals[f"images {k}"] for k in bins):
            found["validation_diffusion_loss"] = sum(totals[f"diffusion {k}"] for k in bins) / images
        for k in bins:
            if totals[f"images {k}"]:
                found[bin_name(k, self.settings.bins)] = totals[f"diffusion {k}"] / totals[f"images {k}"]
        return found

    def _table(self) -> dict[str, Tensor]:
        """Sums and counts of each row, 0 for the rows of other processes."""
        names = ["text", "text targets", *(f"{what} {k}" for k in range(self.settings.bins)
                                           for what in ("diffusion", "images"))]
        table = {name: torch.zeros(self.count) for name in names}
        for place, number in enumerate(self._numbers()):
            is_ours = self.rank + place * self.ranks < self.count
            for name, value in self._passes(number).items():
                table[name][number] += value if is_ours else 0.0
        return table

    def _passes(self, number: int) -> dict[str, float]:
        """Sums and counts of a row over its passes."""
        bins, device = self.settings.bins, self.device
        sequence = self.rows[number].sequence
        sequence = sequence if self.share is None else self.share(sequence)
        targets, on_device = len(sequence.text_targets), sequence.to(device)
        texts, losses, places = [], [], []
        for k in range(bins):
            times = self.times(number, k)
            seed = torch.tensor([NOISE_SEED, number * bins + k])
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                output = self.player.model(on_device, times.to(device), seed.to(device))
            texts.append(output.text_loss.float() * targets)
            losses.append(output.image_losses.float())
            places.append((times * bins).long().clamp(max=bins - 1))
        texts, losses, places = torch.stack(texts), torch.cat(losses).cpu(), torch.cat(places)
        drawn = sequence.drawn.repeat(bins)
        found = {"text": float(texts.mean()) if targets else 0.0, "text targets": float(targets)}
        for k in range(bins):
            chosen = drawn & (places == k)
            found |= {f"diffusion {k}": float(losses[chosen].sum()), f"images {k}": float(chosen.sum())}
        return found

    def times(self, number: int, k: int) -> Tensor:
        """Times (N,) of a row's images in pass k: at a random place of one of the equal parts of [0, limit]."""
        bins, limit = self.settings.bins, self.rows[number].limit
        generator = torch.Generator().manual_seed(number * bins + k)
        part = (torch.arange(len(limit)) + number + k) % bins
        return limit * (part + torch.rand(len(limit), generator=generator)) / bins


def bin_name(k: int, bins: int) -> str:
    """What the log calls the diffusion loss of images whose times are in bin k, e.g. of 0.25 to 0.5."""
    return f"validation_diffusion_loss_{k / bins:.2f}_{(k + 1) / bins:.2f}"
