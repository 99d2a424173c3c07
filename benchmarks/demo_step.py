"""Where a step of the digits demo spends one CPU thread: milliseconds of processor time by part, as a table.

    OMP_NUM_THREADS=1 python -m benchmarks.demo_step [--steps N]

Processor time, because a machine may be shared; medians of N steps. The operators are timed around their CPU
implementations, forward and backward. "Products alone" are the decoder's matrix products by themselves.
"""
import argparse
import functools
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace

import torch

from transfusion.recipes.digits import digits
from transfusion.train.loop import accumulate, clip_gradients, take_step
from transfusion.train.transfusion import TransfusionTask, build_model, open_data

WARM_UP = 3  # steps


class Clock:
    """Processor seconds by part."""

    def __init__(self):
        self.spent = Counter()

    def around(self, part: str, function):
        """`function`, whose calls count as `part`."""

        @functools.wraps(function)
        def timed(*args, **options):
            began = time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.spent[part] += time.process_time() - began

        return timed


def operators() -> list[torch.library.CustomOpDef]:
    """Every operator of tfkernels."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("tfkernels.")]
    found = (x for module in modules for x in vars(module).values() if isinstance(x, torch.library.CustomOpDef))
    return list({id(x): x for x in found}.values())


def task() -> TransfusionTask:
    """The demo's, on the CPU."""
    config = replace(digits(), device="cpu")
    data, optim = open_data(config.data, config.model.patch_size), config.optim
    model = build_model(config, data).train()
    rows = data.rows(model.tokenizer, model.config, None, rows=optim.rows, seq_len=optim.seq_len, steps=optim.steps,
                     rank=0, ranks=1)
    return TransfusionTask(config, rows, model, model)


def products(hidden: int, mlp: int, layers: int, tokens: int) -> tuple[float, float]:
    """Milliseconds and GFLOP of the decoder's linear layers in a step, forward and backward."""
    seconds, operations = 0.0, 0
    for rows, columns, count in ((hidden, hidden, 4), (hidden, mlp, 2), (mlp, hidden, 1)):
        x, weight, dy = torch.randn(tokens, rows), torch.randn(columns, rows), torch.randn(tokens, columns)
        for a, b in ((x, weight.T), (dy, weight), (dy.T, x)):
            times = []
            for _ in range(20):
                began = time.process_time()
                torch.mm(a, b)
                times.append(time.process_time() - began)
            seconds += statistics.median(times) * count * layers
            operations += 2 * tokens * rows * columns * count * layers
    return 1e3 * seconds, operations / 1e9


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    steps = parser.parse_args(arguments).steps
    torch.set_num_threads(1)
    clock, demo, found = Clock(), task(), []
    for op in operators():
        op._backend_fns["cpu"] = clock.around(op._name, op._backend_fns["cpu"])
    draw, both, update = (clock.around(*x) for x in (
        ("drawing the batch", demo.batches), ("forward and backward", accumulate),
        ("clipping, AdamW, average", lambda: (clip_gradients(demo.player, demo.config.optim.clip),
                                              take_step(demo.player, is_skipped=False)))))
    for step in range(WARM_UP + steps):
        clock.spent.clear()
        both(demo, step, draw(step))
        update()
        found.append(dict(clock.spent))
    middle = {name: 1e3 * statistics.median(x.get(name, 0) for x in found[WARM_UP:]) for name in found[-1]}
    phases = [middle.pop(name) for name in ("drawing the batch", "forward and backward", "clipping, AdamW, average")]
    alone, linear = products(demo.config.model.hidden, demo.config.model.mlp, demo.config.model.layers, demo.size)
    rest = phases[1] - sum(middle.values()) - alone
    rows = {"drawing the batch": phases[0], **middle, "the decoder's products alone": alone,
            "the decoder's other passes, autograd": rest, "clipping, AdamW, average": phases[2]}
    total, work = sum(phases), demo.operations() / 1e9
    print("| part | ms | share |\n|---|---|---|")
    for name, milliseconds in rows.items():
        print(f"| {name} | {milliseconds:.1f} | {milliseconds / total:.0%} |")
    print(f"| all, {work:.1f} GFLOP | {total:.1f} | {work / total * 1e3:.0f} GFLOP/s; products alone "
          f"{linear / alone * 1e3:.0f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
