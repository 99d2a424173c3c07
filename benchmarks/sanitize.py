"""Attention at small shapes, for compute-sanitizer to watch; results are compared with the reference.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python -m benchmarks.sanitize      (or --tool racecheck)

Forward, backward and decode run over masks of one side and of two, lengths that no tile divides, grouped heads, and a
paged cache.
"""
import torch

from benchmarks.batches import packed_batch
from benchmarks.decode import PAGE, paged
from tfkernels import TransfusionMask, attention, attention_reference, paged_attention

TOLERANCE = 0.05  # of values near 1 in bfloat16: wrong memory errs by more, small errors are the tests' business


def check(name: str, actual, expected) -> None:
    """Compare and say so."""
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=TOLERANCE, atol=TOLERANCE)
    print(f"{name}: as the reference", flush=True)


def training(device: str, dtype: torch.dtype, seq_len: int, head_dim: int, hidden: bool) -> None:
    """Forward and backward of a packed row."""
    batch = packed_batch(seq_len, 64, device=device, hidden=hidden)
    mask = TransfusionMask.from_spans(
        batch.spans, seq_len, documents=batch.documents, hidden=batch.hidden, device=device)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (torch.randn(1, heads, seq_len, head_dim, generator=generator, device=device).to(dtype)
                     for heads in (4, 2, 2, 4))
    found = []
    for function in (attention, lambda q, k, v, mask: attention_reference(q, k, v, mask).out):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves, mask)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    check(f"{seq_len} tokens, D {head_dim}{', hidden images' * hidden}", *found)


def cached(device: str, dtype: torch.dtype, queries: int) -> None:
    """New tokens against ragged caches, dense and paged."""
    lengths, generator = torch.tensor([3 * PAGE + 5, PAGE // 2], device=device), torch.Generator(device).manual_seed(0)
    key_len = 4 * PAGE
    q, k, v = (torch.randn(2, heads, n, 64, generator=generator, device=device).to(dtype)
               for heads, n in ((4, queries), (2, key_len), (2, key_len)))
    hi = (lengths[:, None] + torch.arange(1, queries + 1, device=device)).clamp(max=key_len)
    mask = TransfusionMask.from_intervals(torch.zeros_like(hi), hi, key_len=key_len)
    expected = attention_reference(q, k, v, mask).out
    (k_pages, table), (v_pages, _) = paged(k), paged(v)
    check(f"{queries} queries, ragged cache", [attention(q, k, v, mask)], [expected])
    check(f"{queries} queries, paged cache", [paged_attention(q, k_pages, v_pages, table, mask)], [expected])


def main() -> None:
    """Run every case once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for head_dim in (64, 128):
        for seq_len in (300, 513):
            for hidden in (False, True):
                training(device, dtype, seq_len, head_dim, hidden)
    for queries in (1, 7, 40):
        cached(device, dtype, queries)


if __name__ == "__main__":
    main()
