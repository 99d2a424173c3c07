"""Hugging Face transformers: `attn_implementation="tfkernels"` for decoders and encoders, through its attention and mask registries.

    import tfkernels.integrations.transformers as integration
    integration.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="tfkernels")
    model(inputs_embeds=x, transfusion_mask=mask)      # or without a mask: causal, with padding as attention_mask says
    model(inputs_embeds=x, transfusion_mask={"full_attention": mask, "sliding_attention": windowed})   # layers that differ (Gemma-2)

`transfusion_mask` reaches every layer as a keyword argument and replaces the mask that transformers would make. A mask that
transformers makes travels as what it takes for a ready 4-D mask: our integers in one int32 tensor (see `_as_tensor`), which it
may copy, keep in a static buffer or trace.
"""
from collections.abc import Mapping

import torch
from torch import Tensor

from tfkernels.attention import attention
from tfkernels.integrations._visible import visible_pairs
from tfkernels.mask import TransfusionMask

NAME = "tfkernels"
_BLOCK = 2**22  # (query, key) pairs of transformers' mask looked at together
_REFUSED = {"s_aux": "attention sinks", "sinks": "attention sinks", "position_bias": "numbers added to the scores", "head_mask": "weights of heads",
            "indices": "keys chosen one by one", "block_indices": "blocks of keys chosen one by one", "cache": "a paged cache",
            "cu_seq_lens_q": "packing by lengths, not by position_ids", "cu_seq_lens_k": "packing by lengths, not by position_ids",
            "output_attentions": "attention weights, which are never formed"}


def register() -> str:
    """Make `attn_implementation="tfkernels"` known to transformers and return that name. Calling it again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    return NAME


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling=None, dropout=0.0, softcap=None, sliding_window=None,
           is_causal=None, transfusion_mask: TransfusionMask | Mapping | None = None, **options) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (B, H, Sq, D) x (B, K, Sk, D) -> (B, Sq, H, D); the second result, weights, is None."""
    if dropout:
        raise ValueError(f"tfkernels attention: dropout is {dropout}; 0 fits; set the model's attention_dropout (attention_probs_dropout_prob) to 0")
    for name, what in _REFUSED.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"tfkernels attention: {name} ({what}) is given; calls without it fit; use attn_implementation='eager' for this one")
    query_len, key_len = query.shape[2], key.shape[2]
    windowed = sliding_window is not None and key_len > sliding_window
    if isinstance(transfusion_mask, Mapping):
        mask = _of_layer(transfusion_mask, module, sliding_window)
    elif transfusion_mask is not None:
        if windowed:
            raise ValueError(f"tfkernels attention: transfusion_mask is one mask in a layer with sliding_window {sliding_window} and {key_len} keys; a mapping "
                             '{"full_attention": mask, "sliding_attention": windowed mask} fits, the latter alone where all layers have the window; '
                             "pass it, or set the config's sliding_window to None")
        mask = transfusion_mask
    elif attention_mask is not None:
        mask = _from_tensor(attention_mask, query_len, key_len)
    elif windowed:
        raise ValueError(f"tfkernels attention: attention_mask is None in a layer with sliding_window {sliding_window} and {key_len} keys; a mask fits; "
                         "call register(), which has transformers make one")
    else:
        mask = _without_mask(query_len, key_len, getattr(module, "is_causal", True) if is_causal is None else is_causal, query.device)
    return attention(query, key, value, mask, scale=scaling, softcap=softcap).transpose(1, 2), None


def make_mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, device=None, **options) -> Tensor:
    """The mask of one forward pass: causal or full, cut by a 2-D `attention_mask`; any other rule is read off transformers' dense mask."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function is bidirectional_mask_function:
        hi = torch.full((1, q_length), kv_length, device=device)
    elif mask_function is None or mask_function is causal_mask_function:
        hi = torch.arange(1, q_length + 1, device=device)[None] + (q_offset - kv_offset)   # (1, Sq)
    else:
        return _as_tensor(_read_off(batch_size, q_length, kv_length, q_offset, device, kv_offset=kv_offset, mask_function=mask_function,
                                    attention_mask=attention_mask, **options))
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return _as_tensor(TransfusionMask.from_intervals(torch.zeros_like(hi), hi, key_len=kv_length, columns_exact=True))
    seen = torch.nn.functional.pad(attention_mask.bool(), (0, max(0, kv_offset + kv_length - attention_mask.shape[1])))[:, kv_offset:kv_offset + kv_length]
    hi = hi.expand(seen.shape[0], -1)
    until = torch.where(seen, torch.iinfo(torch.int32).max, 0)
    return _as_tensor(TransfusionMask.from_intervals(torch.zeros_like(hi), hi, since=torch.zeros_like(until), until=until))


def _read_off(batch_size, q_length, kv_length, q_offset, device, **rule) -> TransfusionMask:
    """Take the hull of each row and column of transformers' mask, a block of rows at a time; as many pairs in the hulls as in the mask: exact."""
    from transformers.masking_utils import sdpa_mask

    compiling = torch.compiler.is_compiling()
    step = q_length if compiling else max(1, _BLOCK // (batch_size * kv_length))
    rule |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    rows, columns = [], []
    for start in range(0, q_length, step):
        visible = sdpa_mask(batch_size=batch_size, q_length=min(step, q_length - start), kv_length=kv_length, q_offset=q_offset + start, device=device,
                            **rule)[:, 0]
        rows.append(_hull(visible))
        since, until, count = _hull(visible.mT)
        columns.append((torch.where(count > 0, since + start, q_length), torch.where(count > 0, until + start, 0), count))
    lo, hi, row_count = (torch.cat(x, 1) for x in zip(*rows))                              # (B, Sq)
    since, until, column_count = (torch.stack(x) for x in zip(*columns))                   # (blocks, B, Sk)
    since, until, column_count = since.amin(0), until.amax(0), column_count.sum(0)
    exact = [not compiling and bool((count == (stop - first).clamp(min=0)).all())
             for first, stop, count in ((lo, hi, row_count), (since, until, column_count))]
    mask = TransfusionMask(lo.int(), hi.int(), since.int(), until.int(), *exact)
    fits = mask.area() == row_count.sum()
    if compiling:
        torch._assert_async(fits, "tfkernels attention: the model's mask has rows with holes that no column explains")
    elif not fits:
        raise ValueError("tfkernels attention: the model's mask has rows with holes that no column explains; one run of keys per query and one run of "
                         "queries per key fit; use attn_implementation='sdpa' for this one")
    return mask


def _hull(visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return [first True, last True + 1) of each row of (B, R, C), [0, 0) for rows without one, and how many are True."""
    count = visible.sum(-1)
    first, last = visible.view(torch.uint8).argmax(-1), visible.shape[-1] - visible.view(torch.uint8).flip(-1).argmax(-1)
    return torch.where(count > 0, first, 0), torch.where(count > 0, last, 0), count


def _of_layer(masks: Mapping, module, sliding_window) -> TransfusionMask:
    types = getattr(module.config, "layer_types", None)
    kind = types[module.layer_idx] if types else "full_attention" if sliding_window is None else "sliding_attention"
    if kind not in masks:
        raise ValueError(f"tfkernels attention: transfusion_mask has masks for {sorted(masks)} and layer {module.layer_idx} is {kind}; "
                         f"one for each kind of layer fits; add {kind!r}")
    return masks[kind]


def _without_mask(query_len: int, key_len: int, is_causal: bool, device) -> TransfusionMask:
    """What a call without a mask means to SDPA's adapter: every key, or causal where the module is."""
    full = not is_causal or query_len == 1
    if not full and query_len != key_len:
        raise ValueError(f"tfkernels attention: attention_mask is None in a causal layer with {query_len} queries and {key_len} keys; equal numbers, "
                         "one query or is_causal=False fits; pass a mask")
    hi = torch.full((1, query_len), key_len, device=device) if full else torch.arange(1, query_len + 1, device=device)[None]
    return TransfusionMask.from_intervals(torch.zeros_like(hi), hi, key_len=key_len, columns_exact=True)


def as_attention_mask(mask: TransfusionMask) -> Tensor:
    """Return `mask` as what transformers takes for a ready 4-D mask, (B, 2, 1, Sq + Sk) or (B, 1, 2, Sq + Sk) int32, and hands to every layer.

        model(inputs_embeds=x, position_ids=positions, attention_mask=as_attention_mask(mask))

    Beside `transfusion_mask` transformers makes a mask of its own, from position_ids that start anew even one of S x S; with this it makes none and
    nothing waits for the device. Decoders whose layers differ take a dict of such tensors, one for each name in `layer_types`.
    """
    return _as_tensor(mask)


def _as_tensor(mask: TransfusionMask) -> Tensor:
    """Lay [lo, query_lo] and [hi, query_hi] side by side: (B, 2, 1, Sq + Sk) where each side alone is exact, else (B, 1, 2, Sq + Sk)."""
    query_lo, query_hi = ((x - mask.offset).clamp(min=0) if mask.offset else x for x in (mask.query_lo, mask.query_hi))  # of rows from 0 on
    sides = torch.stack([torch.cat([mask.lo, query_lo], 1), torch.cat([mask.hi, query_hi], 1)], 1)
    return sides[:, :, None] if mask.rows_exact and mask.columns_exact else sides[:, None]


def _from_tensor(x: Tensor, query_len: int, key_len: int) -> TransfusionMask:
    """Undo `_as_tensor`; a dense mask of the caller's own, bool or additive, is read off."""
    if x.ndim == 4 and x.dtype == torch.int32 and tuple(x.shape[1:]) in ((2, 1, query_len + key_len), (1, 2, query_len + key_len)):
        exact = x.shape[1] == 2
        low, high = x.flatten(1, 2).unbind(1)                                              # (B, Sq + Sk)
        return TransfusionMask(low[:, :query_len], high[:, :query_len], low[:, query_len:], high[:, query_len:], exact, exact)
    if x.ndim != 4 or x.shape[1] != 1:
        raise ValueError(f"tfkernels attention: attention_mask is {x.dtype} of shape {tuple(x.shape)} for {query_len} queries and {key_len} keys; "
                         "(B, Sk), or (B, 1, Sq, Sk) for all heads alike, fits")
    return TransfusionMask.from_dense(visible_pairs("tfkernels attention", x))
