"""What an H100 allows the attention kernels, computed before anything is measured: cycles a tile, then TFLOP/s.

    python -m benchmarks.roofline

One multiprocessor (sm_90) gives 4096 bf16 operations a cycle on its tensor cores, 128 bytes a cycle from shared
memory, 16 exponentials and 128 other float32 operations; 132 of them at 1.83 GHz are the data sheet's 989 TFLOP/s. A
wgmma of 64 x n x 16 takes n / 2 cycles, and no fewer than its operands take to leave shared memory: 2 kB for A,
unless that is in registers, and 32 n bytes for B. Two figures bracket a kernel. In `apart` the products, the
exponentials and the rest wait for each other; in `together` the slowest of the three hides the others. Programs are
dealt to the multiprocessors in the order of the launch, so that short sequences pay for the last wave.
"""
import heapq
from typing import NamedTuple

import torch

from benchmarks import diffusion_loss, image_chain, norm, patchify, rotary
from benchmarks.batches import packed_batch
from tfkernels import TransfusionMask
from tfkernels.attention.triton.backward import DKV_CONFIGS, DQ_CONFIGS
from tfkernels.attention.triton.forward import CONFIGS, SPLIT_KEYS
from tfkernels.attention.triton.parts import head_splits, key_splits
from tfkernels.losses.cross_entropy import chunk_rows
from tfkernels.norm.triton import RESIDENT, backward_config, backward_rows

PROCESSORS, GHZ = 132, 1.83
TENSOR, SHARED, EXPONENTIALS, OTHERS = 4096, 128, 16, 128  # per cycle
START_CYCLES = 2500  # a program's launch, first loads and stores: a guess to be replaced by a measurement
COPY_BANDWIDTH = 3.0e12  # bytes a second of a device copy; a guess to be replaced by the benchmarks' own
LENGTHS, HEADS = (1024, 2048, 4096, 8192, 16384, 32768), 16


class Product(NamedTuple):
    """A tile's matrix product, (m, k) x (k, n); the first operand comes from shared memory or from registers."""

    m: int
    n: int
    k: int
    shared: bool

    def cycles(self) -> float:
        """Cycles on one multiprocessor."""
        one = max(2 * 64 * self.n * 16 / TENSOR, (2048 * self.shared + 32 * self.n) / SHARED)
        return max(1, self.m / 64) * self.k / 16 * one


class Kernel(NamedTuple):
    """A kernel's tile of m queries by n keys, its products, and its other operations for each pair of query and key."""

    m: int
    n: int
    products: list[Product]
    others: float

    def cycles(self) -> tuple[float, float]:
        """Cycles of one tile: apart, together."""
        pairs = self.m * self.n
        parts = sum(p.cycles() for p in self.products), pairs / EXPONENTIALS, pairs * self.others / OTHERS
        return sum(parts), max(parts)


def kernels(dim: int) -> dict[str, Kernel]:
    """The three kernels with the launch tables' sm_90 tiles for bf16 and a head dim."""
    f, q, k = (table[90, 2, dim] for table in (CONFIGS, DQ_CONFIGS, DKV_CONFIGS))
    return {
        "forward": Kernel(f.block_m, f.block_n, [
            Product(f.block_m, f.block_n, dim, True), Product(f.block_m, dim, f.block_n, False)], 5),
        "dq": Kernel(q.block_m, q.block_n, [
            *[Product(q.block_m, q.block_n, dim, True)] * 2, Product(q.block_m, dim, q.block_n, False)], 6),
        "dkv": Kernel(k.block_m, k.block_n, [
            *[Product(k.block_n, k.block_m, dim, True)] * 2, *[Product(k.block_n, dim, k.block_m, False)] * 2], 6),
    }


def tiles(low: torch.Tensor, high: torch.Tensor, size: int, step: int) -> list[int]:
    """How many tiles of `step` each program of `size` rows (or keys) visits, from a mask's (1, S) intervals."""
    pad = 0, -low.shape[1] % size
    low = torch.nn.functional.pad(low, pad, value=2**31 - 1).view(-1, size)
    high = torch.nn.functional.pad(high, pad, value=0).view(-1, size)
    return (-(-(high.amax(1) - low.amin(1)).clamp(min=0) // step)).tolist()


def makespan(programs: list[int], tile_cycles: float, copies: int) -> float:
    """Milliseconds until the last of `copies` x programs (longest first, one a multiprocessor) is done."""
    free = [0.0] * PROCESSORS
    for count in sorted(programs, reverse=True):
        for _ in range(copies):
            heapq.heapreplace(free, free[0] + count * tile_cycles + START_CYCLES)
    return max(free) / GHZ / 1e6


def predict(seq_len: int, dim: int) -> dict[str, tuple[float, float]]:
    """TFLOP/s over visible pairs (apart, together), forward and backward, on a packed batch of one row and 16 heads."""
    batch = packed_batch(seq_len, 256)
    mask = TransfusionMask.from_spans(batch.spans, seq_len, documents=batch.documents)
    chosen, area = kernels(dim), mask.area().item()
    rows, keys = (mask.lo, mask.hi), (mask.key_since, mask.key_until)
    visits = {
        "forward": tiles(*rows, chosen["forward"].m, chosen["forward"].n),
        "dq": tiles(*rows, chosen["dq"].m, chosen["dq"].n),
        "dkv": tiles(*keys, chosen["dkv"].n, chosen["dkv"].m)}
    times = {name: [makespan(visits[name], cycles, HEADS) for cycles in kernel.cycles()]
             for name, kernel in chosen.items()}
    work = 4 * area * HEADS * dim / 1e9
    forward = tuple(work / t for t in times["forward"])
    return {"forward": forward, "backward": tuple(2.5 * work / (a + b) for a, b in zip(times["dq"], times["dkv"]))}


def bytes_moved() -> dict[str, tuple[int, int]]:
    """Bytes that each operator around attention must move, forward and backward, in bfloat16.

    A sequence has 32,768 rows of 4096 columns; half of the rows are patches of 64 elements.
    """
    rows, patches, width, dim = 32_768, 16_384, 4096, 64
    found = {op: tuple(2 * n * rows * width for n in moved) for op, moved in norm.MOVED.items()}
    for op, moved in rotary.MOVED.items():
        found[f"{op}, 32 + 8 heads of 128"] = tuple(2 * n * rows * 40 * 128 for n in moved)
    for op in ("noise_patchify", "embed_patches"):
        found[op] = tuple(patchify.moved(patchify.Case(op, patches, dim, width), 2).values())
    found["diffusion_loss"] = tuple(2 * n * patches * dim for n in diffusion_loss.MOVED["diffusion_loss"])
    found["modulated_layer_norm_diffusion_loss"] = tuple(
        2 * width * (a * patches + b * rows) for a, b in diffusion_loss.MOVED["norm, head, loss"])
    found["noise, patches, embedding, loss"] = tuple(image_chain.moved(image_chain.Case(patches, width), 2).values())
    return found


def norm_programs(width: int, tokens: int = 32_768) -> tuple[int, float, float, float]:
    """Programs of the norms' backward, their waves, and MiB of the partial sums that gated_residual_rms_norm's write
    and read again, also as a share of what it must move in bfloat16."""
    programs, block = backward_rows(tokens, width, PROCESSORS)[1], backward_config(width).block_n
    partial = 2 * 3 * 4 * programs * width
    waves = programs * -(-width // block) / (PROCESSORS * RESIDENT[block])
    return programs, waves, partial / 2**20, partial / (2 * norm.MOVED["gated_residual_rms_norm"][1] * tokens * width)


def entropy_chunks(rows: int, words: int, width: int) -> tuple[int, int, float, float, float]:
    """Rows of a chunk of linear_cross_entropy in bfloat16, chunks, MiB of logits, GB that dweight's sums move, and the
    waves of the product that gives dhidden, in tiles of 128 by 256."""
    size = chunk_rows(rows, words, 2)
    chunks = -(-rows // size)
    tiles_of_dhidden = -(-min(size, rows) // 128) * -(-width // 256)
    return (size, chunks, 2 * size * words / 2**20, chunks * 8 * words * width / 1e9, tiles_of_dhidden / PROCESSORS)


def shared_heads(seq_len: int, heads: int, kv_heads: int, dim: int = 128) -> list[tuple[int, float, float]]:
    """(programs, MiB of parts, milliseconds) of dK/dV on a packed row: each key head's group whole, and in parts.

    Parts are written and read once, at the bandwidth of a copy.
    """
    batch, kernel, group = packed_batch(seq_len, 256), kernels(dim)["dkv"], heads // kv_heads
    mask = TransfusionMask.from_spans(batch.spans, seq_len, documents=batch.documents)
    visits, found = tiles(mask.key_since, mask.key_until, kernel.n, kernel.m), []
    for splits in (1, head_splits(len(visits) * kv_heads, group, PROCESSORS)):
        parts = 4 * seq_len * kv_heads * splits * 2 * dim if splits > 1 else 0
        walked = [count * group // splits for count in visits]
        found.append((len(visits) * kv_heads * splits, parts / 2**20,
                      makespan(walked, kernel.cycles()[0], kv_heads * splits) + 2e3 * parts / COPY_BANDWIDTH))
    return found


def denoising(prompt: int, heads: int, patches: int = 256, dim: int = 128) -> list[tuple[int, float, float]]:
    """(programs, MiB of parts, milliseconds) of the forward of one image against a prompt: keys whole, and in parts."""
    kernel, keys, found = kernels(dim)["forward"], prompt + patches, []
    programs = -(-patches // kernel.m) * heads
    for splits in (1, key_splits(programs, PROCESSORS, keys, SPLIT_KEYS)):
        parts = 4 * splits * heads * patches * (dim + 1) if splits > 1 else 0
        visits = -(-keys // splits // kernel.n)
        found.append((programs * splits, parts / 2**20,
                      makespan([visits] * splits, kernel.cycles()[0], programs) + 2e3 * parts / COPY_BANDWIDTH))
    return found


def print_parts() -> None:
    """Print what the cuts of `tfkernels/attention/triton/parts.py` change, at D 128."""
    ends = "programs | waves | parts MiB | us whole, in parts |\n|" + "---|" * 6
    rows = [(f"| dK/dV, tokens | heads | {ends}", [(n, f"{h}:{k}", shared_heads(n, h, k)) for h, k in ((32, 8), (16, 2))
                                                   for n in (1024, 4096, 16384)]),
            (f"| forward of 256 patches, prompt | heads | {ends}",
             [(n, f"{h}", denoising(n, h)) for h in (32, 16) for n in (256, 2048, 8192)])]
    for head, found in rows:
        print(f"\n{head}")
        for size, heads, (whole, cut) in found:
            print(f"| {size} | {heads} | {whole[0]}, {cut[0]} | {whole[0] / PROCESSORS:.1f}, {cut[0] / PROCESSORS:.1f} "
                  f"| {cut[1]:.1f} | {1e3 * whole[2]:.0f}, {1e3 * cut[2]:.0f} |")


def main() -> None:
    """Print the tables."""
    print("| D | kernel | tile | products | exponentials | others | cycles a tile: apart, together "
          "| tensor cores busy: apart, together |\n|" + "---|" * 8)
    for dim in (64, 128):
        for name, kernel in kernels(dim).items():
            apart, together = kernel.cycles()
            pairs, least = kernel.m * kernel.n, sum(2 * p.m * p.n * p.k for p in kernel.products) / TENSOR
            products = sum(p.cycles() for p in kernel.products)
            print(f"| {dim} | {name} | {kernel.m}x{kernel.n} | {products:.0f} | {pairs / EXPONENTIALS:.0f} | "
                  f"{pairs * kernel.others / OTHERS:.0f} | {apart:.0f}, {together:.0f} | "
                  f"{least / apart:.0%}, {least / together:.0%} |")
    print("\n| D | tokens | forward TFLOP/s: apart, together | backward |\n|---|---|---|---|")
    for dim in (64, 128):
        for seq_len in LENGTHS:
            rates = predict(seq_len, dim)
            print(f"| {dim} | {seq_len} | " + " | ".join(f"{a:.0f}, {b:.0f}" for a, b in rates.values()) + " |")
    print("\n| operator | forward MiB | us at 90 % of a copy | backward MiB | us at 80 % |\n|---|---|---|---|---|")
    for op, (forward, backward) in bytes_moved().items():
        times = forward / COPY_BANDWIDTH / 0.9 * 1e6, backward / COPY_BANDWIDTH / 0.8 * 1e6
        numbers = forward / 2**20, times[0], backward / 2**20, times[1]
        print(f"| {op} | " + " | ".join(f"{x:.0f}" for x in numbers) + " |")
    print("\n| columns | programs | waves | partial MiB | of what must move |\n" + "|---" * 5 + "|")
    for width in (256, 512, 1024, 2048, 4096, 16_384):
        programs, waves, partial, share = norm_programs(width)
        print(f"| {width} | {programs} | {waves:.2f} | {partial:.0f} | {share:.1%} |")
    print("\n| rows, words, columns | rows a chunk | chunks | logits MiB | dweight GB | waves of dhidden |\n"
          + "|---" * 6 + "|")
    for sizes in ((8192, 32_000, 2048), (16_384, 32_000, 2048), (16_384, 50_257, 768), (4096, 128_256, 4096),
                  (16_384, 128_256, 2048), (16_384, 151_936, 3584)):
        size, chunks, logits, moved, waves = entropy_chunks(*sizes)
        print(f"| {', '.join(f'{n:,}' for n in sizes)} | {size} | {chunks} | {logits:.0f} | {moved:.1f} | "
              f"{waves:.2f} |")
    print_parts()


if __name__ == "__main__":
    main()
