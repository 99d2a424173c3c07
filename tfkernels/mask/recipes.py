"""The masks of published models as `TransfusionMask`s, built on the device from a few numbers, without waiting for it.

`TransfusionMask.from_spans` alone covers Transfusion (arXiv:2408.11039), Show-o2 (arXiv:2506.15564), packed documents,
padding on either side (documents -1), Gemma 3's sliding layers (`window`) and BAGEL's noised copies (arXiv:2505.14683,
`hidden`). The functions here cover the rest. `examples` makes a small one of each; `python -m tfkernels.mask` draws
them.
"""
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tfkernels._arguments import need_integer, need_integers, need_range
from tfkernels.mask.mask import TransfusionMask


def window_around_whole_images(spans, seq_len: int, window: int, documents=None, device=None) -> TransfusionMask:
    """A query looks back on `window` keys, itself included, and sees its image whole, however long: causal within the
    window, or same image.

    visible(i, j) = i - window < j <= i or same image; arguments as `TransfusionMask.from_spans` takes them, whose own
    `window` also cuts the beginning of an image longer than it, as Gemma 3's sliding layers do.
    """
    window = need_integer("window_around_whole_images", "window", window, 1)
    whole = TransfusionMask.from_spans(spans, seq_len, documents=documents, device=device)
    rows = torch.arange(seq_len, dtype=torch.int32, device=whole.lo.device)
    window = min(window, max(1, seq_len))
    # key_since: start of the token's image, or itself
    return replace(whole, lo=torch.maximum(whole.lo, torch.minimum(rows + 1 - window, whole.key_since)),
                   key_until=torch.minimum(whole.key_until, torch.maximum(rows + window, whole.hi)))


def prefix_lm(prefix_lens: Tensor, seq_len: int) -> TransfusionMask:
    """Row b's first prefix_lens[b] tokens see each other, the others look back.

    This is prefix-LM (arXiv:1910.10683) and Show-o's mmu (arXiv:2408.12528).

    visible(i, j) = j <= i or j < prefix_len. prefix_lens (B,) are integers from 0 to seq_len; on CUDA they are clipped
    to that.
    """
    seq_len = need_integer("prefix_lm", "seq_len", seq_len)
    prefix_lens = _vector("prefix_lm", "prefix_lens", prefix_lens, "(B,)", 1)
    need_range("prefix_lm", "prefix_lens", prefix_lens, 0, seq_len, "for seq_len tokens")
    return TransfusionMask.from_spans(torch.stack([torch.zeros_like(prefix_lens), prefix_lens], -1)[:, None], seq_len)


def image_before_prompt(images: Tensor, seq_len: int) -> TransfusionMask:
    """Every token, also of the system prompt before it, sees row b's image images[b] = (start, end).

    This is Show-o's mmu_vit (arXiv:2408.12528).

    visible(i, j) = j <= i or start <= j < end. The prompt's queries see the image ahead but not the text between: a
    hole in the row, which the key side tells. images (B, 2) are integers from 0 to seq_len; on CUDA keys behind the
    last are nobody's.
    """
    seq_len = need_integer("image_before_prompt", "seq_len", seq_len)
    images = _vector("image_before_prompt", "images", images, "(B, 2)", 2)
    need_range("image_before_prompt", "images", images, 0, seq_len, "for seq_len tokens")
    images = images.long().clamp(0, seq_len)
    start, end = images[:, :1], images[:, 1:]
    rows = torch.arange(seq_len, device=images.device)[None]
    since = torch.where((start <= rows) & (rows < end), 0, rows)
    hi = torch.maximum(rows + 1, end)
    return TransfusionMask.from_intervals(torch.zeros_like(hi), hi, since=since, until=torch.full_like(since, seq_len),
                                          columns_exact=True)


def chunk_causal(chunk_len: int, seq_len: int, window: int | None = None, device=None) -> TransfusionMask:
    """A token sees its own chunk of chunk_len tokens and the chunks before it: MAGI-1 (arXiv:2505.13211).

    With `window` it sees only the last window - 1 of the earlier chunks.

    visible(i, j) = j // c <= i // c < j // c + window. Chunks of different lengths: `from_spans` with a span for each.
    """
    seq_len = need_integer("chunk_causal", "seq_len", seq_len)
    chunk_len = need_integer("chunk_causal", "chunk_len", chunk_len, 1)
    window = window if window is None else need_integer("chunk_causal", "window", window, 1)
    chunk = torch.arange(seq_len, device=device)[None] // chunk_len
    lo = torch.zeros_like(chunk) if window is None else (chunk - window + 1).clamp(min=0) * chunk_len
    return TransfusionMask.from_intervals(lo, ((chunk + 1) * chunk_len).clamp(max=seq_len), columns_exact=True)


def shared_prefix(continuations, seq_len: int, documents=None, device=None) -> TransfusionMask:
    """Many continuations of one prompt in one row: each sees the prompt and itself, none sees another.

    This is grouped sampling in RL, and a tree of depth 1.

    `continuations` are spans as `from_spans` takes them; what lies in none is prompt; `documents` packs several
    prompts.
    """
    if not isinstance(continuations, (Tensor, list, tuple)):
        raise ValueError(f"shared_prefix: continuations is a {type(continuations).__name__}; a list of (start, end) "
                         "per batch row, or an integer tensor (B, M, 2), fits")
    rows = continuations.shape[0] if isinstance(continuations, Tensor) else len(continuations)
    device = device if device is not None else continuations.device if isinstance(continuations, Tensor) else None
    none = torch.zeros(rows, 0, 2, dtype=torch.int64, device=device)
    return TransfusionMask.from_spans(none, seq_len, documents=documents, hidden=continuations, device=device)


def attention_sinks(sinks: int, window: int, seq_len: int, device=None) -> TransfusionMask:
    """A token sees the `window` tokens up to itself and the first `sinks` tokens: StreamingLLM (arXiv:2309.17453)."""
    op = "attention_sinks"
    sinks, seq_len = need_integer(op, "sinks", sinks), need_integer(op, "seq_len", seq_len)
    window = need_integer(op, "window", window, 1)
    rows = torch.arange(seq_len, device=device)[None]
    until = torch.where(rows < sinks, seq_len, rows + min(window, seq_len))
    return TransfusionMask.from_intervals(torch.zeros_like(rows), rows + 1, since=torch.zeros_like(rows), until=until,
                                          columns_exact=True)


def block_diffusion(block_len: int, blocks: int, device=None) -> TransfusionMask:
    """BD3-LM (arXiv:2503.09573), each noised block before its clean copy: [noised 0, clean 0, noised 1, clean 1, ...].

    A noised block sees itself and the clean blocks before it; a clean block sees the clean blocks up to itself. The
    masks of BAGEL's noised images have the same form: the noised blocks are `hidden` spans.
    """
    block_len = need_integer("block_diffusion", "block_len", block_len, 1)
    blocks = need_integer("block_diffusion", "blocks", blocks)
    start = torch.arange(0, 2 * blocks * block_len, block_len, device=device)
    spans = torch.stack([start, start + block_len], -1)[None]
    return TransfusionMask.from_spans(spans, 2 * blocks * block_len, hidden=spans[:, ::2])


def block_diffusion_halves(block_len: int, blocks: int, device=None) -> TransfusionMask:
    """BD3-LM (arXiv:2503.09573) in the order of its paper: all noised blocks, then all clean ones.

    Neither the query side nor the key side tells this mask alone.
    """
    block_len = need_integer("block_diffusion_halves", "block_len", block_len, 1)
    blocks = need_integer("block_diffusion_halves", "blocks", blocks)
    half = block_len * blocks
    rows = torch.arange(2 * half, device=device)[None]
    clean, start = rows >= half, rows % half // block_len * block_len  # start of the token's block within its half
    lo, hi = torch.where(clean, half, start), half + start + torch.where(clean, block_len, 0)
    hi = torch.where(~clean & (start == 0), block_len, hi)  # the first noised block sees itself only
    since = torch.where(clean, start + block_len, start)
    until = torch.where(clean, 2 * half, start + block_len)
    since = torch.where(clean & (since == half), half + start, since)  # the last clean block has no later noised one
    return TransfusionMask.from_intervals(lo, hi, since=since, until=until)


def _vector(op: str, name: str, x, shape: str, ndim: int) -> Tensor:
    """Integers of `ndim` dimensions, the last of two numbers where there are two of them."""
    x = need_integers(op, name, x, shape)
    if x.ndim != ndim or ndim == 2 and x.shape[1] != 2:
        raise ValueError(f"{op}: {name} is {x.dtype} of shape {tuple(x.shape)}; integers {shape} fit")
    return x


class Example(NamedTuple):
    """A small mask to look at: what it is, and what it is called."""

    title: str
    mask: TransfusionMask


def examples() -> list[Example]:
    """One small mask of each kind, for pictures."""
    spans, size = [[(4, 10), (14, 20)]], 24
    document = torch.tensor([[0] * 12 + [1] * 12])
    left, right = torch.tensor([[-1] * 5 + [0] * 19]), torch.tensor([[0] * 19 + [-1] * 5])
    make = TransfusionMask.from_spans
    return [
        Example("Transfusion, Show-o2", make(spans, size)),
        Example("packed documents", make(spans, size, documents=document)),
        Example("padding on the left", make([[(8, 14)]], size, documents=left)),
        Example("padding on the right", make([[(8, 14)]], size, documents=right)),
        Example("Gemma 3, window 4", make(spans, size, window=4)),
        Example("window 4, images whole", window_around_whole_images(spans, size, 4)),
        Example("BAGEL: noised copies", make([[(4, 9), (9, 14), (16, 20)]], size, hidden=[[(4, 9)]])),
        Example("prefix-LM, Show-o mmu", prefix_lm(torch.tensor([9]), size)),
        Example("Show-o mmu_vit", image_before_prompt(torch.tensor([[6, 13]]), size)),
        Example("chunk-causal video", chunk_causal(6, size)),
        Example("chunk-causal, window 2", chunk_causal(6, size, window=2)),
        Example("shared prefix", shared_prefix([[(8, 13), (13, 19), (19, 24)]], size)),
        Example("attention sinks", attention_sinks(2, 5, size)),
        Example("BD3-LM, interleaved", block_diffusion(4, 3)),
        Example("BD3-LM, halves", block_diffusion_halves(4, 3)),
        Example("cache: text", TransfusionMask.from_cache(torch.tensor([16]), 4, size)),
        Example("cache: one image", TransfusionMask.from_cache(torch.tensor([12]), 8, size, image=True)),
    ]
