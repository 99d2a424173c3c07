"""The training loop. A trainer builds networks, draws batches and names its losses; the rest of a run is here, once.

    loss = sum over terms of weight * mean        mean = sum over micro-batches of (count / total count) * mean of each

A term is a mean over things that are counted: text targets, drawn images, pictures. Micro-batches hold different
numbers of them, so each mean is weighted with its share of the whole step's count: `accumulate` changes memory, not
what is learnt. Where several processes take a step together, the total counts are those of all of them.
"""
import contextlib
import functools
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from transfusion.command import Interrupt
from transfusion.device import seconds_of
from transfusion.train.checkpoint import (
    check_finite,
    check_weights,
    open_saved,
    restore_players,
    training_state,
    write_run,
    write_state,
)
from transfusion.train.guard import Guard
from transfusion.train.keeping import save_place
from transfusion.train.log import LOG, Log, records_before, start_log
from transfusion.train.meter import Meter, TimeLimit
from transfusion.train.optimizer import Player
from transfusion.train.parallel import sum_copies, sum_counts, sum_means, whole
from transfusion.train.processes import any_process, is_agreed, is_main
from transfusion.train.resuming import history, recorded, run_to_resume
from transfusion.train.settings import RunSettings, StepSettings
from transfusion.train.sharded import Saver, agreeing, whole_weights
from transfusion.train.trackers import start_trackers


class Term(NamedTuple):
    """One term of a loss: its weight, and its mean over what a micro-batch counts for it."""

    weight: float
    mean: Tensor


class Batch(NamedTuple):
    """A micro-batch: what losses are computed from, and how many things each term is a mean over.

    `notes` are numbers for the step's record in the log; those that are 0 are left out. `totals` are the counts of all
    micro-batches of all processes, where the task knows them; otherwise `accumulate` adds them up.
    """

    inputs: object
    counts: Mapping[str, int]
    notes: Mapping[str, float] = {}
    totals: Mapping[str, int] | None = None


class Task(Protocol):
    """What a trainer gives to `fit`."""

    players: Sequence[Player]  # what is trained: one network or, with a discriminator, two
    size: int  # of a batch, in `unit`
    unit: str  # tokens or pictures
    shown: Sequence[str]  # terms beside the progress bar

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, which depend on the step alone: a resumed run draws what it would have drawn."""

    def losses(self, step: int, batch: Batch) -> Iterator[tuple[Player, dict[str, Term]]]:
        """The loss of each player that plays at this step. Its gradients are taken before the next one is asked for."""

    def save(self, directory: Path, step: int) -> None:
        """Write what `from_pretrained` reads, after `step` steps."""

    def save_whole(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Write the same of these weights, in the background: for trainers of several processes, who hold shards."""


class Watcher(Protocol):
    """What looks at a run from outside, every so many steps: losses on held-out data, samples."""

    def after(self, done: int) -> dict[str, float]:
        """Look at the players after `done` steps; return numbers for the step's record in the log, or none."""


def fit(command: str, config: RunSettings, optim: StepSettings, task: Task, rate: Callable[[int], float], *,
        fixed: tuple[str, ...], way_on: str = "", epoch: float | None = None, watchers: Sequence[Watcher] = (),
        operations: Callable[[], float] | None = None) -> int:
    """Train to the last step, to `stop_after`, near the end of `max_hours`, or to Ctrl-C, SIGTERM, SIGHUP or SIGUSR1.

    Args:
        command: whose name stands in errors and beside the progress bar.
        rate: the learning rate of a step.
        fixed: settings that must be what they were when a run goes on.
        way_on: what helps where a loss is not finite, for trainers without --resume.
        epoch: steps that show all data once, where there is such a number.
        watchers: what looks at the players after each step. They change neither weights nor what later steps draw.
        operations: how many this process computes for the step drawn last, where that can be counted.

    Returns:
        The number of steps done.

    Raises:
        ValueError: the data end the run. FloatingPointError: a loss is not finite, or the guard ends the run.
    """
    limit = TimeLimit(config.max_hours)
    start = restore(config, task.players, fixed) if config.resume else 0
    print(cost(task, optim, start, epoch), flush=True)
    spent = start_log(config.out / LOG, start) if is_main() else 0.0
    guard, meter = judges(command, config, task, operations, start)
    progress = tqdm(range(start, optim.steps), initial=start, total=optim.steps, desc=f"{command} {config.out.name}",
                    smoothing=0.05, unit="step", dynamic_ncols=True, disable=not is_main())
    began, done = time.perf_counter() - spent, start
    with Interrupt() as stop, open_log(command, config, start) as log, open_saver(config) as saver, limit.steps():
        save_run = functools.partial(save, command, config, task, way_on=way_on, saver=saver)
        for step in progress:
            # gradients
            is_unsaved = done > start and done % config.save_every > 0
            for player in task.players:
                player.set_rate(rate(step))
            with saving_first(save_run, done, is_unsaved), meter.begin():
                batches = task.batches(step)
            means, playing, notes = accumulate(task, step, batches)
            norms = {f"{player.prefix('_')}grad_norm": clip_gradients(player, optim.clip) for player in playing}
            found = numbers(**means, **norms)
            with saving_first(save_run, done, is_unsaved):
                skipped = guard.skips(step, found)
            if not skipped:
                check_finite(command, config.out, step, found, way_on)

            # step
            for player in playing:
                take_step(player, is_skipped=skipped)
            done = step + 1

            # log
            record = {"step": step, **found, "lr": rate(step), "seconds": time.perf_counter() - began,
                      **meter.after(done), **notes, **guard.notes(skipped)}
            for watcher in watchers:
                record |= watcher.after(done)
            log.write(record)
            progress.set_postfix(shown(task, record, (done - start) * task.size / (record["seconds"] - spent)))

            # save
            last = done in (optim.steps, config.stop_after) or any_process(
                stop.asked or limit.is_near(0.0 if saver is None else saver.seconds()))
            if last or done % config.save_every == 0:
                log.sync()
                with limit.saving():
                    save_run(done, is_last=last)
            if last and done < optim.steps:
                progress.close()
                break
    return done


def judges(command: str, config: RunSettings, task: Task, operations: Callable[[], float] | None,
           start: int) -> tuple[Guard, Meter]:
    """What judges and counts steps from `start` on. The log before, perhaps of days, is read and not kept."""
    earlier = records_before(config.out / LOG, start)
    meter = Meter(task.size, task.unit, device_of(task), operations, start, seen_before(earlier, start, task.unit))
    return Guard(command, config.guard, task.players, earlier), meter


def open_log(command: str, config: RunSettings, start: int) -> Log:
    """Return the log of a run that goes on from step `start`; of several processes the main one alone writes."""
    if not is_main():
        return Log(None)
    return Log(config.out / LOG, start_trackers(command, config.log or (), config.out, recorded(config), start))


def open_saver(config: RunSettings) -> contextlib.AbstractContextManager[Saver | None]:
    """What saves in the background where several processes train; None of one process."""
    return Saver(config.out) if dist.is_initialized() else contextlib.nullcontext()


@contextlib.contextmanager
def saving_first(save_run: Callable[..., None], step: int, is_unsaved: bool) -> Iterator[None]:
    """Save what was trained so far where the data end a run, as when too many files cannot be read, or the guard.

    Of several processes one whose error the others do not know of must not wait for their part of a save.
    """
    try:
        yield
    except Exception as error:
        of_data = isinstance(error, ValueError | OSError) and not dist.is_initialized()
        if is_unsaved and (of_data or is_agreed(error)):
            save_run(step, is_last=True)
        raise


def accumulate(task: Task, step: int, batches: list[Batch] | None = None
               ) -> tuple[dict[str, Tensor], list[Player], dict[str, float]]:
    """Add up the gradients of a step's micro-batches, or of those given.

    Returns:
        Each loss and each term, a mean over the whole step; the players that played; and what the log is told besides.
    """
    batches = task.batches(step) if batches is None else batches
    totals, notes = Counter(), Counter()
    for batch in batches:
        totals.update(batch.counts)
        notes.update(batch.notes)
    totals = sum_counts(totals) if batches[0].totals is None else batches[0].totals
    means: dict[str, Tensor] = {}
    playing: list[Player] = []
    for number, batch in enumerate(batches, 1):
        for player, terms in task.losses(step, batch):
            sum_copies(player.model, number == len(batches))
            parts = {name: term.mean * (batch.counts[name] / totals[name] if totals[name] else 1.0)
                     for name, term in terms.items()}
            loss = sum(term.weight * parts[name] for name, term in terms.items())
            loss.backward()
            for name, part in ({player.loss: loss} | parts).items():
                means[name] = means[name] + part.detach() if name in means else part.detach()
            playing += [player] if player not in playing else []
    return sum_means(means), playing, {name: count for name, count in notes.items() if count}


def clip_gradients(player: Player, limit: float | None) -> Tensor:
    """Scale the gradients of a player down to a norm of at most `limit`; return the norm before."""
    return whole(torch.nn.utils.clip_grad_norm_(player.model.parameters(), float("inf") if limit is None else limit))


def take_step(player: Player, *, is_skipped: bool) -> None:
    """Let a player's optimizer take its step and its average take part in it, or not; drop the gradients."""
    if not is_skipped:
        player.optimizer.step()
    player.model.zero_grad()
    if player.averaged is not None and not is_skipped:
        player.averaged.update(player.model)


def shown(task: Task, record: Mapping[str, float], speed: float) -> dict[str, str]:
    """What stands beside the progress bar: losses, how fast the run is, and what it makes of its GPU."""
    said = {name: f"{record[name]:.3f}" for name in task.shown if name in record} | {f"{task.unit}/s": f"{speed:,.0f}"}
    return said | ({"MFU": f"{record['mfu']:.1%}"} if "mfu" in record else {})


def numbers(**values: Tensor) -> dict[str, float]:
    """Single numbers as floats, with one wait for the device."""
    found = [x.detach().float() for x in values.values()]  # with offloaded weights, norms are on the host
    return dict(zip(values, torch.stack([x.to(found[0].device) for x in found]).tolist()))


def seen_before(earlier: list[dict], start: int, unit: str) -> int | None:
    """What a run had seen before step `start` by the records of earlier steps, None where they do not say."""
    return earlier[-1].get(unit) if earlier and earlier[-1]["step"] == start - 1 else None


def device_of(task: Task) -> torch.device:
    """Where the players compute: offloaded weights lie elsewhere."""
    return getattr(task, "device", None) or next(task.players[0].model.parameters()).device


def cost(task: Task, optim: StepSettings, start: int, epoch: float | None = None) -> str:
    """Say what is left to do and about how long it takes, by the second of two passes that change nothing.

    They take the batch that the run goes on with, for later ones may not be planned yet.
    """
    left = optim.steps - start
    if left <= 0:
        return f"all {optim.steps:,} steps are done"
    buffers = [(x, x.clone()) for player in task.players for x in player.model.buffers()]  # batch norm keeps statistics

    def once() -> None:
        accumulate(task, optim.steps - 1, task.batches(start))  # by the last step every player plays
        for player in task.players:
            player.model.zero_grad()

    seconds = seconds_of(once, device_of(task))
    for x, before in buffers:
        x.copy_(before)
    told = f"{left:,} steps of {task.size:,} {task.unit} at {seconds:.2f} s: about {left * seconds / 60:,.0f} min"
    if epoch is None:
        return told
    return f"{told}, {left / epoch:,.1f} epochs of {epoch:,.1f} steps and {epoch * seconds / 60:,.1f} min each"


def save(command: str, config: RunSettings, task: Task, step: int, way_on: str = "",
         saver: Saver | None = None, is_last: bool = False) -> None:
    """Replace the checkpoint and what resuming needs together: a kill while writing leaves the save before whole.

    With a `saver` training goes on while files are written, but for the last ones, which are waited for.
    """
    state, optimizers = training_state(task.players)
    with contextlib.nullcontext() if saver is None else saver.agreeing():
        check_weights(command, config.out, step, state, way_on)
    run = {"step": step, "config": recorded(config), "optimizers": optimizers, **history(config)}
    place = save_place(config, step)
    if saver is None:
        with place as fresh:
            task.save(fresh, step)
            write_state(fresh, state)
            write_run(fresh, run)
        return

    def finish(fresh: Path) -> None:
        task.save_whole(fresh, whole_weights(fresh))
        write_run(fresh, run)

    saver.start(state, place, finish, step)
    if is_last:
        saver.wait()


def restore(config: RunSettings, players: Sequence[Player], fixed: tuple[str, ...]) -> int:
    """Put what `save` wrote into the players; return the step to go on from."""
    with agreeing() if dist.is_initialized() else contextlib.nullcontext():
        run = run_to_resume(config, fixed)
        with open_saved(config.out) as saved:
            restore_players(players, saved, run.get("optimizers", {}))
    return run["step"]


def say_stopped(config: RunSettings, optim: StepSettings, done: int) -> None:
    """Say how a run that was stopped before its last step goes on, in commands that have --resume."""
    if done < optim.steps and is_main():
        print(f"stopped after step {done} of {optim.steps}, saved in {config.out}; add --resume to the same command to "
              "go on", file=sys.stderr)


def end_run(config: RunSettings, optim: StepSettings, done: int) -> None:
    """End a run that the same call goes on with: say that it was stopped, or remove what only going on needs."""
    if done < optim.steps:
        raise KeyboardInterrupt(f"{config.out}: {done:,} of {optim.steps:,} steps are done; the same command goes on")
    shutil.rmtree(config.out / "resume", ignore_errors=True)
