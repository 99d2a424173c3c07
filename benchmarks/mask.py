"""What a mask costs, measured without a GPU: time and bytes to build it, and the tiles that a kernel then visits.

`tfkernels` builds four integers per token; FlexAttention's create_block_mask looks at every pair. A tile counts as
visited where the kernels would load it: the keys from the least lo to the greatest hi of a tile of queries, in steps
of the key tile. The minimum is the keys that any of those queries sees, packed into as few tiles as hold them.
"""
import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.batches import PackedBatch, dense_definition, packed_batch
from benchmarks.harness import Contender, Result, measure
from benchmarks.report import Report
from tfkernels import TransfusionMask

IMAGE = 256
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
TILES = ((128, 128), (128, 64), (64, 64))
CHUNK = 1024
EAGER_LIMIT = 8192  # tokens up to which create_block_mask also runs uncompiled; beyond, one call takes many seconds


class Case(NamedTuple):
    """A row of `seq_len` tokens; `compiled`: beside the others, create_block_mask under torch.compile."""

    seq_len: int
    compiled: bool = True


def cases(quick: bool) -> list[Case]:
    """Every length, or three of them, which compile nothing."""
    return [Case(seq_len, not quick) for seq_len in (LENGTHS[:3] if quick else LENGTHS)]


class LargestTensor(TorchDispatchMode):
    """Record the bytes of the largest tensor that any operator returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def contenders(batch: PackedBatch, compiled: bool) -> dict[str, tuple[Contender, object]]:
    """Return each way to build the batch's mask, with the plain function behind it."""
    seq_len = batch.documents.shape[1]
    spans = torch.tensor(batch.spans, dtype=torch.int64).view(1, -1, 2)
    documents, images = batch.documents[0], batch.image_ids[0]

    def visible(b, h, i, j):
        return (documents[i] == documents[j]) & ((j <= i) | ((images[i] == images[j]) & (images[i] > 0)))

    needed = needed_tiles(batch, 128)

    def check_mask(state):
        for start in range(0, seq_len, CHUNK):
            part = state["mask"].queries(start, min(start + CHUNK, seq_len))
            right = torch.equal(part.dense(), dense_definition(batch, start, start + CHUNK))
            assert right, f"the mask is wrong in rows {start} to {start + CHUNK}"

    def check_blocks(state):
        right = torch.equal(state["mask"].to_dense().bool()[0, 0], needed)
        assert right, "the block mask lists other tiles than the definition needs"

    def ours(given):
        return TransfusionMask.from_spans(given, seq_len, documents=batch.documents)

    def flex(create):
        return create(visible, None, None, seq_len, seq_len, device="cpu")

    ways = {
        "tfkernels, from tensors": (lambda: ours(spans), check_mask),
        "tfkernels, from lists": (lambda: ours(batch.spans), check_mask),
        "tfkernels, with block_mask()": (lambda: ours(spans).block_mask(), check_blocks),
    }
    if seq_len <= EAGER_LIMIT:
        ways["create_block_mask"] = (lambda: flex(create_block_mask), check_blocks)
    if compiled:
        create = torch.compile(create_block_mask, dynamic=False)
        ways["create_block_mask, compiled"] = (lambda: flex(create), check_blocks)
    return {name: (Contender(name, {"build": functools.partial(_build, build)}, check), build)
            for name, (build, check) in ways.items()}


def _build(build, state):
    state["mask"] = build()


def mask_bytes(mask) -> int:
    """Bytes of the tensors that a TransfusionMask or a BlockMask holds, without those that its mask_mod captured."""
    if isinstance(mask, BlockMask):
        return sum(x.nbytes for x in mask.as_tuple(flatten=True) if isinstance(x, Tensor))
    return sum(x.nbytes for x in (mask.lo, mask.hi, mask.key_since, mask.key_until))


def needed_tiles(batch: PackedBatch, size: int) -> Tensor:
    """(row tiles, key tiles) bool: which aligned tiles hold a visible pair, from the definition."""
    seq_len = batch.documents.shape[1]
    rows = [dense_definition(batch, at, at + size)[0, 0].any(0) for at in range(0, seq_len, size)]
    return torch.nn.functional.pad(torch.stack(rows), (0, -seq_len % size)).unflatten(1, (-1, size)).any(-1)


def live_tiles(mask: TransfusionMask, start: int, end: int, first: Tensor, last: Tensor, size: int) -> int:
    """Count the tiles [first, last) of `size` keys of which a query of [start, end) sees one, over all batch rows."""
    seen = mask.key_since < mask.key_until

    def by_tile(keys: Tensor, fill: int) -> Tensor:
        keys = torch.where(seen, keys, fill)
        return torch.nn.functional.pad(keys, (0, -mask.key_len % size), value=fill).unflatten(1, (-1, size))

    low, high = by_tile(mask.key_since, end).amin(-1), by_tile(mask.key_until, 0).amax(-1)
    tile = torch.arange(low.shape[1])
    return ((low < end) & (high > start) & (first[:, None] <= tile) & (tile < last[:, None])).sum().item()


def tile_counts(mask: TransfusionMask, definition, rows: int, keys: int) -> dict[str, float]:
    """Count the tiles of rows x keys that a kernel visits, the fewest that would do and the visible area in tiles.

    `definition(start, stop)` is the dense mask of those queries; the mask must equal it.
    """
    visited = minimum = 0
    for start in range(0, mask.query_len, rows):
        part, seen = mask.queries(start, min(start + rows, mask.query_len)), definition(start, start + rows)
        assert torch.equal(part.dense(), seen), f"the mask is wrong in rows {start} to {start + rows}"
        some = part.lo < part.hi
        first, last = torch.where(some, part.lo, mask.key_len).amin(1), torch.where(some, part.hi, 0).amax(1)
        if mask.rows_exact:
            visited += (-(-(last - first).clamp(min=0) // keys)).sum().item()
        else:  # tiles counted from 0, the dead among them passed over (tfkernels.attention.triton.tiles)
            visited += live_tiles(mask, start, start + part.query_len, first // keys, -(-last // keys), keys)
        minimum += (-(-seen[:, 0].any(1).sum(-1) // keys)).sum().item()
    return {"visited": visited, "minimum": minimum, "area_in_tiles": mask.area().item() / (rows * keys)}


def run_case(case: Case, report: Report) -> None:
    """Measure one length, and record and print a row for each way to build the mask and for each mask's tiles."""
    torch._dynamo.reset()
    batch = packed_batch(case.seq_len, IMAGE)
    ways = contenders(batch, case.compiled)

    def record(result: Result, **found) -> dict:
        return report.record({"seq_len": case.seq_len}, result, **found)

    chosen = [contender for contender, _ in ways.values()]
    for result in measure(chosen, device="cpu", seconds=2, warmup=1, record=record, **report.limits):
        build = ways[result.name][1]
        row = record(result, **sizes(build, traced="compiled" not in result.name) if result.checked else {})
        print(f"{case.seq_len:6} {result.name:32} {words(row)}", flush=True)
    for hidden in (False, True):
        packed = packed_batch(case.seq_len, IMAGE, hidden=hidden)
        mask = TransfusionMask.from_spans(
            packed.spans, case.seq_len, documents=packed.documents, hidden=packed.hidden)
        counts = {f"{rows}x{keys}": tile_counts(mask, functools.partial(dense_definition, packed), rows, keys)
                  for rows, keys in TILES}
        name = f"tiles, packed{', every other image hidden' * hidden}"
        report.rows.append(
            {"seq_len": case.seq_len, "contender": name, "area": mask.area().item(), "tiles": counts})
        print(f"{case.seq_len:6} {name} of 128x128: {counts['128x128']}", flush=True)


def sizes(build, traced: bool) -> dict[str, int]:
    """Bytes of the mask that `build` returns and, where `traced`, of the largest tensor on the way to it."""
    found = {"bytes": mask_bytes(build())}
    if traced:
        with LargestTensor() as largest:
            build()
        found["largest_tensor_bytes"] = largest.bytes
    return found


def words(row: dict) -> str:
    """What a way to build the mask took, or why there are no numbers."""
    if not row["milliseconds"]:
        return row["error"] or row["left_out"] or "no numbers"
    return (f"{row['milliseconds']['build']['p50']:10.3f} ms {row['bytes']:9} bytes, "
            f"largest tensor {row.get('largest_tensor_bytes', 'not traced')}")
