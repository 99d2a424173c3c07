"""Hugging Face diffusers: an attention processor for the layers whose own processor is AttnProcessor2_0.

Those are the `Attention` layers of U-Nets, DiT, PixArt and VAEs.

    from tfkernels.integrations.diffusers import TransfusionAttnProcessor
    model.set_attn_processor(TransfusionAttnProcessor())            # the same numbers
    model.set_attn_processor(TransfusionAttnProcessor(mask))        # self-attention under a TransfusionMask

The same layers as diffusers' AttnProcessor2_0 around another attention call; diffusers itself is never imported.
"""
from functools import lru_cache

import torch
from torch import Tensor

from tfkernels._arguments import got, need_tensors
from tfkernels._library import watched
from tfkernels.attention.op import attention
from tfkernels.integrations._visible import visible_pairs
from tfkernels.mask import TransfusionMask

_OP = "TransfusionAttnProcessor"
_PARTS = ("spatial_norm", "group_norm", "norm_cross", "residual_connection", "rescale_output_factor")


class TransfusionAttnProcessor:
    """What AttnProcessor2_0 computes, with `tfkernels.attention`.

    Args:
        mask: of self-attention, as long as the layer's tokens; None lets every query see every key, as cross attention
            always does.
    """

    def __init__(self, mask: TransfusionMask | None = None):
        if not isinstance(mask, TransfusionMask | None):
            raise ValueError(f"{_OP}: mask is {got(mask)}; a tfkernels.TransfusionMask or None fits; build one with "
                             "TransfusionMask.from_spans")
        self.mask = mask

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, *, scale=None, ip_hidden_states=None,
        image_rotary_emb=None, rotary_emb=None, query_rotary_emb=None, key_rotary_emb=None, freqs_cis=None,
        kv_cache=None
    ) -> Tensor:
        """Return attention of hidden_states (B, S, C) or (B, C, height, width), in the same shape.

        `attention_mask` is bool or added to the scores: (B, Sk), (B, 1, Sk) or (B, Sq, Sk).

        The arguments after `temb` are named to be refused: diffusers drops what a processor does not name.
        """
        self_attention = encoder_hidden_states is None
        _check(attn, encoder_hidden_states, scale=scale, ip_hidden_states=ip_hidden_states,
               image_rotary_emb=image_rotary_emb, rotary_emb=rotary_emb, query_rotary_emb=query_rotary_emb,
               key_rotary_emb=key_rotary_emb, freqs_cis=freqs_cis, kv_cache=kv_cache)
        if self_attention and self.mask is not None and attention_mask is not None:
            raise ValueError(f"{_OP}: attention_mask is given beside the processor's mask; one of them fits; put "
                             "padding in the mask as documents of -1")
        if self_attention and self.mask is None and getattr(attn, "is_causal", False):
            raise ValueError(f"{_OP}: attn.is_causal is True and mask is None; a mask fits; pass "
                             "TransfusionMask.causal(tokens)")
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)                       # (B, height * width, C)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.mT).mT
        if self_attention:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)        # (B, H, Sq, D)
        k, v = (to(encoder_hidden_states).unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
                for to in (attn.to_k, attn.to_v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if attention_mask is not None:
            mask = _read(attention_mask, q.shape[0], q.shape[2], k.shape[2])
        elif self_attention and self.mask is not None:
            mask = self.mask
        else:
            mask = _every_key(q.shape[2], k.shape[2], q.device)
        out = attention(q, k, v, mask, scale=attn.scale).transpose(1, 2).flatten(2)         # (B, Sq, H D)

        for layer in attn.to_out:
            out = layer(out)
        if len(shape) == 4:
            out = out.mT.reshape(shape)
        return (out + residual if attn.residual_connection else out) / attn.rescale_output_factor


def _check(attn, encoder_hidden_states, **others) -> None:
    """Refuse layers that AttnProcessor2_0 is not the processor of, and arguments that other processors take."""
    if missing := [name for name in _PARTS if not hasattr(attn, name)]:
        raise ValueError(f"{_OP}: attn is a {type(attn).__name__} without {missing[0]}; diffusers' Attention fits; "
                         "keep the layer's own processor")
    if attn.add_k_proj is not None:
        raise ValueError(f"{_OP}: attn.add_k_proj is given (joint attention); layers with to_q, to_k and to_v alone "
                         "fit; keep the layer's own processor")
    if attn.to_out is None:
        raise ValueError(f"{_OP}: attn.to_out is None (pre_only); a layer with an output projection fits; keep the "
                         "layer's own processor")
    if isinstance(encoder_hidden_states, tuple):
        raise ValueError(f"{_OP}: encoder_hidden_states is a tuple (IP-Adapter); one tensor fits; keep the adapter's "
                         "own processor")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{_OP}: {name} is given; calls without it fit; keep the layer's own processor")


def _full(query_len: int, key_len: int, device: torch.device) -> TransfusionMask:
    with torch.inference_mode(False):  # kept for training too
        lo = torch.zeros(1, query_len, dtype=torch.int32, device=device)
        return TransfusionMask.from_intervals(lo, lo + key_len, key_len=key_len, columns_exact=True)


def _every_key(query_len: int, key_len: int, device: torch.device) -> TransfusionMask:
    """The mask that hides nothing, made once for each stream, whose order alone says that it is ready.

    What is made while something traces holds no values, and in a CUDA graph's capture what its replays fill in; a graph
    must not read what is thrown away here, either.
    """
    on_gpu = device.type == "cuda"
    if watched() or on_gpu and torch.cuda.is_current_stream_capturing():
        return _full(query_len, key_len, device)
    return _kept(query_len, key_len, device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0)


@lru_cache(maxsize=64)
def _kept(query_len: int, key_len: int, device: torch.device, stream: int) -> TransfusionMask:
    return _full(query_len, key_len, device)


def _read(attention_mask: Tensor, batch: int, query_len: int, key_len: int) -> TransfusionMask:
    """Read off the keys hidden from all queries, (B, Sk) or (B, 1, Sk), or any (B, Sq, Sk) that from_dense takes."""
    need_tensors(_OP, {"attention_mask": attention_mask})
    x = attention_mask[:, None] if attention_mask.ndim == 2 else attention_mask
    if x.ndim != 3 or x.shape[0] != batch or x.shape[1] not in (1, query_len) or x.shape[2] != key_len:
        raise ValueError(f"{_OP}: attention_mask has shape {tuple(attention_mask.shape)} for {query_len} queries and "
                         f"{key_len} keys in a batch of {batch}; (B, Sk), (B, 1, Sk) or (B, Sq, Sk) fits, one mask "
                         "for all heads")
    visible = visible_pairs(_OP, x)
    seen = visible.any(-1).all()
    if torch.compiler.is_compiling():
        torch._assert_async(seen, f"{_OP}: attention_mask hides every key from a query")
    elif not seen:
        raise ValueError(f"{_OP}: attention_mask hides every key from a query; at least one key to see fits; keep "
                         "one, such as the empty prompt's first token")
    if x.shape[1] == query_len > 1:
        return TransfusionMask.from_dense(visible[:, None])
    until = torch.where(visible[:, 0], query_len, 0)                                       # (B, Sk)
    lo = torch.zeros(batch, query_len, dtype=torch.int32, device=x.device)
    return TransfusionMask.from_intervals(lo, lo + key_len, since=torch.zeros_like(until), until=until,
                                          columns_exact=True)
