"""What a mask costs, measured without a GPU: time and bytes to build it, and the tiles a kernel then visits.

`tfkernels` builds four integers per token; FlexAttention's create_block_mask looks at every pair. A tile counts as
visited where the kernels would load it: the keys from the least lo to the greatest hi of a tile of queries, in steps
of the key tile. The minimum is the keys that any of those queries sees, packed into as few tiles as hold them.
"""
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.batches import PackedBatch, dense_definition, packed_batch
from benchmarks.harness import Contender, Report, environment, measure
from tfkernels import TransfusionMask

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
TILES = ((128, 128), (128, 64), (64, 64))
CHUNK = 1024
EAGER_LIMIT = 8192  # tokens up to which create_block_mask also runs uncompiled; beyond, one call takes many seconds


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
            assert torch.equal(part.dense(), dense_definition(batch, start, start + CHUNK)), f"the mask is wrong in rows {start} to {start + CHUNK}"

    def check_blocks(state):
        assert torch.equal(state["mask"].to_dense().bool()[0, 0], needed), "the block mask lists other tiles than the definition needs"

    ways = {
        "tfkernels, from tensors": (lambda: TransfusionMask.from_spans(spans, seq_len, documents=batch.documents), check_mask),
        "tfkernels, from lists": (lambda: TransfusionMask.from_spans(batch.spans, seq_len, documents=batch.documents), check_mask),
        "tfkernels, with block_mask()": (lambda: TransfusionMask.from_spans(spans, seq_len, documents=batch.documents).block_mask(), check_blocks),
    }
    if seq_len <= EAGER_LIMIT:
        ways["create_block_mask"] = (lambda: create_block_mask(visible, None, None, seq_len, seq_len, device="cpu"), check_blocks)
    if compiled:
        create = torch.compile(create_block_mask, dynamic=False)
        ways["create_block_mask, compiled"] = (lambda: create(visible, None, None, seq_len, seq_len, device="cpu"), check_blocks)
    return {name: (Contender(name, {"build": functools.partial(_build, build)}, check), build) for name, (build, check) in ways.items()}


def _build(build, state):
    state["mask"] = build()


def mask_bytes(mask) -> int:
    """Return the bytes of the tensors that a TransfusionMask or a BlockMask holds; what a BlockMask's mask_mod captured is not counted."""
    tensors = mask.as_tuple(flatten=True) if isinstance(mask, BlockMask) else (mask.lo, mask.hi, mask.query_lo, mask.query_hi)
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


def needed_tiles(batch: PackedBatch, size: int) -> Tensor:
    """(row tiles, key tiles) bool: which aligned tiles hold a visible pair, from the definition."""
    seq_len = batch.documents.shape[1]
    rows = [dense_definition(batch, at, at + size)[0, 0].any(0) for at in range(0, seq_len, size)]
    return torch.nn.functional.pad(torch.stack(rows), (0, -seq_len % size)).unflatten(1, (-1, size)).any(-1)


def live_tiles(mask: TransfusionMask, start: int, end: int, first: Tensor, last: Tensor, size: int) -> int:
    """Count the tiles [first, last) of `size` keys of which some key may be seen by a query of [start, end), all batch rows together."""
    seen = mask.query_lo < mask.query_hi
    pad = -mask.key_len % size
    low = torch.nn.functional.pad(torch.where(seen, mask.query_lo, end), (0, pad), value=end).unflatten(1, (-1, size)).amin(-1)
    high = torch.nn.functional.pad(torch.where(seen, mask.query_hi, 0), (0, pad), value=0).unflatten(1, (-1, size)).amax(-1)
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


def run(out: Path, *, quick: bool = False, commit: str | None = None, lengths=LENGTHS, image_tokens: int = 256) -> int:
    """Measure every length, write attention-cpu-<commit>.json into `out` and print a short table."""
    torch.set_num_threads(1)  # on a shared machine a second thread measures how long the other waits for a core
    where = environment("cpu", commit)
    report = Report("mask", {"image_tokens": image_tokens, "timing": "wall time, interleaved, caches not flushed"}, where)
    path = out / f"attention-cpu-{(where['commit'] or 'unknown')[:10]}.json"
    for seq_len in lengths[:3] if quick else lengths:
        torch._dynamo.reset()
        batch = packed_batch(seq_len, image_tokens)
        ways = contenders(batch, compiled=not quick)

        def record(result, seq_len=seq_len):
            report.record({"seq_len": seq_len}, result)
            report.save(path)

        chosen = [contender for contender, _ in ways.values()]
        for result in measure(chosen, device="cpu", seconds=2, warmup=1, record=record):
            build, found = ways[result.name][1], {}
            if result.checked:
                found["bytes"] = mask_bytes(build())
            if result.checked and "compiled" not in result.name:
                with LargestTensor() as largest:
                    build()
                found["largest_tensor_bytes"] = largest.bytes
            row = report.record({"seq_len": seq_len}, result, **found)
            print(f"{seq_len:6} {result.name:32} " + (result.error or f"{row['milliseconds']['build']['p50']:10.3f} ms {row['bytes']:9} bytes, "
                                                       f"largest tensor {row.get('largest_tensor_bytes', 'not traced')}"), flush=True)
        for name, packed in (("packed", batch), ("packed, every other image hidden", packed_batch(seq_len, image_tokens, hidden=True))):
            mask = TransfusionMask.from_spans(packed.spans, seq_len, documents=packed.documents, hidden=packed.hidden)
            definition = functools.partial(dense_definition, packed)
            counts = {f"{rows}x{keys}": tile_counts(mask, definition, rows, keys) for rows, keys in TILES}
            report.rows.append({"seq_len": seq_len, "mask": name, "area": mask.area().item(), "tiles": counts})
            print(f"{seq_len:6} {name:32} tiles of 128x128: {counts['128x128']}")
        report.save(path)
    return int(any(row.get("error") for row in report.rows))
