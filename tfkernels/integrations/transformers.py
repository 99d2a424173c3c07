"""Hugging Face transformers: `attn_implementation="tfkernels"` for any decoder, through its attention and mask registries.

    import tfkernels.integrations.transformers as integration
    integration.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="tfkernels")
    model(inputs_embeds=x, transfusion_mask=mask)      # or without a mask: causal, with padding as attention_mask says

`transfusion_mask` reaches every layer as a keyword argument and replaces the mask that transformers would make. A mask that
transformers makes travels as what it takes for a ready 4-D mask: our integers in one int32 tensor (see `_as_tensor`), which it
may copy, keep in a static buffer or trace.
"""
import torch
from torch import Tensor

from tfkernels.attention import attention
from tfkernels.mask import TransfusionMask

NAME = "tfkernels"


def register() -> str:
    """Make `attn_implementation="tfkernels"` known to transformers and return that name. Calling it again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    return NAME


def attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling=None, dropout=0.0, softcap=None, sliding_window=None,
           s_aux=None, transfusion_mask: TransfusionMask | None = None, **_) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (B, H, Sq, D) x (B, K, Sk, D) -> (B, Sq, H, D); the second result, weights, is None."""
    if dropout:
        raise ValueError(f"tfkernels attention: dropout is {dropout}; 0 fits; set the model's attention_dropout to 0")
    if s_aux is not None:
        raise ValueError("tfkernels attention: s_aux (attention sinks) is given; models without sinks fit; use attn_implementation='eager' for this one")
    if transfusion_mask is not None and sliding_window is not None and key.shape[2] > sliding_window:
        raise ValueError(f"tfkernels attention: transfusion_mask is given to a layer with sliding_window {sliding_window} and {key.shape[2]} keys; "
                         "a mask cannot differ between layers yet; set the config's sliding_window to None")
    mask = transfusion_mask if transfusion_mask is not None else attention_mask
    if isinstance(mask, Tensor):
        mask = _from_tensor(mask, query.shape[2])
    return attention(query, key, value, mask, scale=scaling, softcap=softcap).transpose(1, 2), None


def make_mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, device=None, **options) -> Tensor:
    """The mask of one forward pass: causal, cut by a 2-D `attention_mask`; any other rule is read off transformers' dense mask."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if mask_function is not None and mask_function is not causal_mask_function:
        options["allow_is_causal_skip"] = False
        return _as_tensor(TransfusionMask.from_dense(sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, device=device, **options)))
    shift = q_offset - kv_offset
    hi = torch.arange(1, q_length + 1, device=device)[None] + shift                        # (1, Sq)
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return _as_tensor(TransfusionMask.from_intervals(torch.zeros_like(hi), hi, key_len=kv_length, columns_exact=True))
    seen = torch.nn.functional.pad(attention_mask.bool(), (0, max(0, kv_offset + kv_length - attention_mask.shape[1])))[:, kv_offset:kv_offset + kv_length]
    hi = hi.expand(seen.shape[0], -1)
    until = torch.where(seen, torch.iinfo(torch.int32).max, 0)
    return _as_tensor(TransfusionMask.from_intervals(torch.zeros_like(hi), hi, since=torch.zeros_like(until), until=until))


def _as_tensor(mask: TransfusionMask) -> Tensor:
    """Lay [lo, query_lo] and [hi, query_hi] side by side: (B, 2, 1, Sq + Sk) where each side alone is exact, else (B, 1, 2, Sq + Sk)."""
    sides = torch.stack([torch.cat([mask.lo, mask.query_lo], 1), torch.cat([mask.hi, mask.query_hi], 1)], 1)
    return sides[:, :, None] if mask.rows_exact and mask.columns_exact else sides[:, None]


def _from_tensor(x: Tensor, query_len: int) -> TransfusionMask:
    """Undo `_as_tensor`; a dense mask of the caller's own, bool or additive, is read off."""
    if x.dtype != torch.int32:
        return TransfusionMask.from_dense(x if x.dtype == torch.bool else x == 0)
    exact = x.shape[1] == 2
    low, high = x.flatten(1, 2).unbind(1)                                                  # (B, Sq + Sk)
    return TransfusionMask(low[:, :query_len], high[:, :query_len], low[:, query_len:], high[:, query_len:], exact, exact)
