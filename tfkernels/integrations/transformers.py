"""Hugging Face transformers: `attn_implementation="tfkernels"` through its registries of attention and masks.

    import tfkernels.integrations.transformers as integration
    integration.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="tfkernels")
    model(inputs_embeds=x, transfusion_mask=mask)      # or without a mask: causal, with padding as attention_mask says
    # a mask for each kind of layer, where they differ (Gemma-2)
    model(inputs_embeds=x, transfusion_mask={"full_attention": mask, "sliding_attention": windowed})
    model.generate(x, transfusion_mask=mask)           # mask of the prompt; what is written behind it is causal

`transfusion_mask` reaches every layer as a keyword argument and replaces the mask that transformers would make, except
that the keys which a 2-D `attention_mask` hides stay hidden. A mask of fewer tokens than there are belongs to a prompt:
tokens behind it see what the prompt's last token sees, and each other causally, with any cache. Its batch is 1, or what
generate makes of the prompts: with beams or several returned sequences, a row for each of them. A later turn's images
are no prompt's: give the mask of all tokens so far, or `TransfusionMask.from_cache(..., image=True)`. Where ranks share
a row, a `tfkernels.parallel.SharedMask` in its place has each of them attend with its own tokens.

A mask that transformers makes travels as what it takes for a ready 4-D mask: our integers in one int32 tensor (see
`_as_tensor`), which it may copy, keep in a static buffer or trace. A ready 4-D mask of at most one element beside
`transfusion_mask` is a stand-in that keeps transformers from making one; a larger one is refused.

Other registered implementations (sdpa, flash, flex) refuse `transfusion_mask` once `register` has been called. The
functions called eager are no part of a registry and swallow any keyword argument: `require(model)` refuses such a model
once, when it is loaded. So it does with the families whose layers hand no keyword argument on to their attention
(StableLM): they run on it, but never see a `transfusion_mask`. It is a decoder's: encoder-decoders, whose encoder and
cross-attention would take it for theirs, and vision towers that a model hands it on to (Qwen-VL) refuse it.
"""
import functools
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tfkernels._arguments import got
from tfkernels.attention.op import attention, check_rows
from tfkernels.integrations._visible import visible_pairs
from tfkernels.mask import TransfusionMask
from tfkernels.mask.pairs import PAIRS, hulls
from tfkernels.parallel import SharedMask

NAME = "tfkernels"
ARGUMENT = "transfusion_mask"
_DEAF = ("moshi", "nemotron", "stablelm")  # in some version of transformers
_OP = "tfkernels attention"
_FAR = torch.iinfo(torch.int32).max
_WAY = f"load the model with attn_implementation={NAME!r}, or call model.set_attn_implementation({NAME!r})"
_REFUSED = {"sinks": "attention sinks of each query", "position_bias": "numbers added to the scores",
            "head_mask": "weights of heads", "indices": "keys chosen one by one",
            "block_indices": "blocks of keys chosen one by one", "cache": "a paged cache",
            "cu_seq_lens_q": "packing by lengths, not by position_ids",
            "cu_seq_lens_k": "packing by lengths, not by position_ids",
            "output_attentions": "attention weights, which are never formed"}


class _Made(NamedTuple):
    """What `make_mask` laid into a tensor: the mask, where its queries and keys stand in the sequence, and which keys
    attention_mask keeps."""

    mask: TransfusionMask
    query_position: Tensor                                                                 # (B, Sq) int32
    key_position: Tensor                                                                   # (B, Sk) int32
    kept: Tensor | None                                                                    # (B, Sk) bool; None: all


def register() -> str:
    """Make `attn_implementation="tfkernels"` known to transformers and return that name. Calling it again is harmless.

    No function of transformers is replaced. Three entries are added or wrapped: ours in both registries; the other
    implementations in the attention registry, which from then on refuse `transfusion_mask` instead of dropping it
    (implementations that are registered later, such as kernels from the hub, are wrapped by calling register again);
    and the name `transfusion_mask` among the keyword arguments that generate lets through to every model.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import TransformersKwargs

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    for name, function in list(AttentionInterface().items()):
        if name != NAME and not hasattr(function, "refuses_transfusion_mask"):
            AttentionInterface.register(name, _refusing(name, function))
    TransformersKwargs.__optional_keys__ = frozenset(TransformersKwargs.__optional_keys__) | {ARGUMENT}
    return NAME


def require(model) -> None:
    """Refuse a model, or the config of one to be made, that would not attend through `attend` and drop
    `transfusion_mask`.

    Raises:
        ValueError: model is neither a PreTrainedConfig nor a module with a PreTrainedModel in it (peft's, a compiled
            one); its family has an attention of its own that asks no registry (Bloom, Falcon, GPT-J, MPT), or layers
            that hand no keyword argument on to it (StableLM); or a part of the model has another attn_implementation
            than "tfkernels".
    """
    from transformers import PreTrainedConfig, PreTrainedModel

    if isinstance(model, PreTrainedConfig):
        return _need_family(model)
    if not (isinstance(model, torch.nn.Module) and any(isinstance(part, PreTrainedModel) for part in model.modules())):
        raise ValueError(f"{_OP}: model is {got(model)}; a transformers.PreTrainedModel or PreTrainedConfig fits")
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            _need_family(part.config)
            if part.config._attn_implementation != NAME:
                raise ValueError(f"{_OP}: model{'.' * bool(name)}{name} has attn_implementation "
                                 f"{part.config._attn_implementation!r}, which drops {ARGUMENT}; {NAME!r} fits; {_WAY}")


def _need_family(config) -> None:
    """Refuse a family whose attention never sees the mask."""
    _need_registry(config)
    if config.model_type in _DEAF:
        raise ValueError(f"{_OP}: model_type is {config.model_type!r}, whose layers do not hand {ARGUMENT} on to their "
                         "attention; families that hand keyword arguments on fit, such as Llama")


def _need_registry(config) -> None:
    """Refuse a family whose modeling file defines an attention and does not import the registry; code from elsewhere is
    not judged, nor is a model made of others (PaliGemma)."""
    modeling = type(config).__module__.replace(".configuration_", ".modeling_")
    if modeling.startswith("transformers.models.") and _attends_by_itself(modeling):
        raise ValueError(f"{_OP}: model_type is {config.model_type!r}, whose attention is its own and asks no "
                         "registry; families that attend through transformers' AttentionInterface fit, such as Llama; "
                         "load this one with attn_implementation='eager'")


@functools.cache
def _attends_by_itself(modeling: str) -> bool:
    if importlib.util.find_spec(modeling) is None:
        return False
    names = vars(importlib.import_module(modeling))
    return "ALL_ATTENTION_FUNCTIONS" not in names and any(name.endswith("Attention") for name in names)


def _refusing(name: str, function):
    """The attention function of another implementation, which refuses `transfusion_mask` instead of dropping it."""

    @functools.wraps(function)
    def attention_forward(*args, **options):
        if options.pop(ARGUMENT, None) is not None:
            raise ValueError(f"{_OP}: {ARGUMENT} is given to a model with attn_implementation {name!r}, which drops "
                             f"it; {NAME!r} fits; {_WAY}")
        return function(*args, **options)

    attention_forward.refuses_transfusion_mask = True
    return attention_forward


def attend(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling=None, dropout=0.0, softcap=None,
    sliding_window=None, is_causal=None, transfusion_mask: TransfusionMask | SharedMask | Mapping | None = None,
    s_aux: Tensor | None = None, **options
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (B, H, Sq, D) x (B, K, Sk, D) -> (B, Sq, H, D), and None for its weights.

    `s_aux` (H,) is its name for learned sinks (gpt-oss).
    """
    if dropout:
        raise ValueError(f"tfkernels attention: dropout is {dropout}; 0 fits; set the model's attention_dropout "
                         "(attention_probs_dropout_prob) to 0")
    for name, what in _REFUSED.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"tfkernels attention: {name} ({what}) is given; calls without it fit; use "
                             "attn_implementation='eager' for this one")
    query_len, key_len = query.shape[2], key.shape[2]
    windowed = sliding_window is not None and key_len > sliding_window
    made = _from_tensor(attention_mask, query_len, key_len)
    if transfusion_mask is not None:
        mask = _of_layer(transfusion_mask, module, sliding_window, windowed, key_len)
        _need_decoder(mask, module, is_causal, query_len, key_len)
        if isinstance(mask, SharedMask):
            if made is None or made.kept is not None:
                _need_no_other(attention_mask)
            if s_aux is not None:
                raise ValueError(f"{_OP}: s_aux (attention sinks) is given beside a SharedMask; ranks that share a row "
                                 "fit models without sinks")
            return mask.attend(query, key, value, scale=scaling, softcap=softcap).transpose(1, 2), None
        check_rows("attention", query, mask)
        mask = _fitted(mask, made, attention_mask, query_len, key_len, sliding_window)
    elif made is not None:
        mask = made.mask
    elif attention_mask is not None:
        mask = _from_dense(attention_mask, query_len, key_len)
    elif windowed:
        raise ValueError("tfkernels attention: attention_mask is None in a layer with sliding_window "
                         f"{sliding_window} and {key_len} keys; a mask fits; call register(), which has transformers "
                         "make one")
    else:
        mask = _without_mask(query_len, key_len, getattr(module, "is_causal", True) if is_causal is None else is_causal,
                             query.device)
    return attention(query, key, value, mask, scale=scaling, softcap=softcap, sinks=s_aux).transpose(1, 2), None


def make_mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None,
              device=None, **options) -> Tensor:
    """Return the mask of one forward pass: causal or full, cut by a 2-D `attention_mask`.

    The mask of any other rule is read off transformers' dense mask.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if (config := options.get("config")) is not None and not torch.compiler.is_compiling():
        _need_registry(config)
    if not isinstance(attention_mask, Tensor | None):
        raise ValueError(f"{_OP}: attention_mask is {got(attention_mask)}; a tensor (B, Sk), 1 for keys and 0 for "
                         f"padding, fits; a TransfusionMask is given as {ARGUMENT}")
    kept = None
    if attention_mask is not None and (torch.compiler.is_compiling() or not bool(attention_mask.all())):
        missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
        kept = torch.nn.functional.pad(attention_mask.bool(), (0, missing))[:, kv_offset:kv_offset + kv_length]
    if mask_function is bidirectional_mask_function:
        hi = torch.full((1, q_length), kv_length, device=device)
    elif mask_function is None or mask_function is causal_mask_function:
        hi = torch.arange(1, q_length + 1, device=device)[None] + (q_offset - kv_offset)   # (1, Sq)
    else:
        mask = _read_off(batch_size, q_length, kv_length, q_offset, device, kv_offset=kv_offset,
                         mask_function=mask_function, attention_mask=attention_mask, **options)
        return _as_tensor(mask, q_offset, kv_offset, kept)
    if kept is None:
        mask = TransfusionMask.from_intervals(torch.zeros_like(hi), hi, key_len=kv_length, columns_exact=True)
        return _as_tensor(mask, q_offset, kv_offset, None)
    hi, until = hi.expand(kept.shape[0], -1), torch.where(kept, _FAR, 0)
    mask = TransfusionMask.from_intervals(torch.zeros_like(hi), hi, since=torch.zeros_like(until), until=until)
    return _as_tensor(mask, q_offset, kv_offset, kept)


def _read_off(batch_size, q_length, kv_length, q_offset, device, **rule) -> TransfusionMask:
    """Take the hull of each row and column of transformers' mask, a block of rows at a time.

    It is exact where the hulls hold as many pairs as the mask.
    """
    from transformers.masking_utils import sdpa_mask

    compiling = torch.compiler.is_compiling()
    step = q_length if compiling else max(1, PAIRS // (batch_size * kv_length))
    rule |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    found = hulls(sdpa_mask(batch_size=batch_size, q_length=min(step, q_length - start), kv_length=kv_length,
                            q_offset=q_offset + start, device=device, **rule)[:, 0]
                  for start in range(0, q_length, step))
    fits = ~found.missed().any()
    if compiling:
        torch._assert_async(fits, "tfkernels attention: the model's mask has rows with holes that no column explains")
    elif not fits:
        raise ValueError("tfkernels attention: the model's mask has rows with holes that no column explains; one run "
                         "of keys per query and one run of queries per key fit; use attn_implementation='sdpa' for "
                         "this one")
    exact = [not compiling and bool(x) for x in (found.rows_exact, found.columns_exact)]
    return TransfusionMask(found.lo, found.hi, found.since, found.until, *exact)


def _of_layer(masks: TransfusionMask | SharedMask | Mapping, module, sliding_window, windowed: bool,
              key_len: int) -> TransfusionMask | SharedMask:
    """The mask of one layer: the one mask, where the layer has no window to cut it, or the one of the layer's kind."""
    config, number = getattr(module, "config", None), getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    kind = (types[number] if types and number is not None and number < len(types) else
            "full_attention" if sliding_window is None else "sliding_attention")
    chunk = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None
    if isinstance(masks, Mapping):
        if kind not in masks:
            raise ValueError(f"tfkernels attention: transfusion_mask has masks for {sorted(masks)} and layer "
                             f"{number} is {kind}; one for each kind of layer fits; add {kind!r}")
        masks = masks[kind]
    elif windowed or chunk is not None and key_len > chunk:
        name, size, what = (("sliding_window", sliding_window, "windowed") if windowed
                            else ("attention_chunk_size", chunk, "chunked"))
        raise ValueError(f"tfkernels attention: transfusion_mask is one mask in a layer with {name} {size} and "
                         f'{key_len} keys; a mapping {{"full_attention": mask, "{kind}": {what} mask}} fits, the '
                         "latter alone where all layers are cut; pass it, or set the config's "
                         f"{name} to None")
    if not isinstance(masks, TransfusionMask | SharedMask):
        raise ValueError(f"{_OP}: {ARGUMENT} is {got(masks)}; a tfkernels.TransfusionMask, or a mapping of them by "
                         "kind of layer, fits; build one with TransfusionMask.from_spans")
    return masks


def _need_decoder(mask: TransfusionMask | SharedMask, module, is_causal: bool | None, query_len: int,
                  key_len: int) -> None:
    """Refuse a decoder's mask where a layer that is not causal has other tokens than it: they are not the decoder's."""
    config = getattr(module, "config", None)
    is_other = getattr(config, "is_encoder_decoder", False) or "Vision" in type(config).__name__
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    fits = isinstance(mask, SharedMask) or (mask.query_len, mask.key_len) == (query_len, key_len)
    if not causal and (is_other or not fits):
        sizes = "" if is_other else " or a mask of these sizes"
        raise ValueError(f"{_OP}: {ARGUMENT} reaches {type(module).__name__}, which is not causal and has {query_len} "
                         f"queries and {key_len} keys; layers of a decoder{sizes} fit; give what an encoder or vision "
                         "tower makes as inputs_embeds, or call the decoder by itself")


def _fitted(mask: TransfusionMask, made: _Made | None, attention_mask, query_len: int, key_len: int,
            window: int | None) -> TransfusionMask:
    """`mask` without the keys that attention_mask hides, and for the queries and keys of this pass where it is a
    prompt's."""
    if made is None:
        _need_no_other(attention_mask)
        return mask
    if (mask.query_len, mask.key_len) != (query_len, key_len) and mask.offset == 0 and mask.query_len == mask.key_len:
        mask = _behind(mask, made, window)
    # `attention` refuses lengths that do not fit
    if made.kept is None or mask.key_len != key_len:
        return mask
    mask = _sized(mask, len(made.kept))
    key_since, key_until = (torch.where(made.kept, x, mask.offset) for x in (mask.key_since, mask.key_until))
    return replace(mask, key_since=key_since, key_until=key_until, rows_exact=False)


def _need_no_other(attention_mask) -> None:
    """Refuse what hides keys beside `transfusion_mask`."""
    if attention_mask is not None and attention_mask.numel() > 1:
        raise ValueError(f"{_OP}: attention_mask is {got(attention_mask)} beside {ARGUMENT}; (B, Sk), 1 for keys "
                         "and 0 for padding, or None fits; "
                         f"put what it hides into {ARGUMENT}: padding is documents of -1")


def _sized(mask: TransfusionMask, batch: int) -> TransfusionMask:
    """A mask of batch 1 for `batch` rows."""
    if mask.batch_size != 1 or batch == 1:
        return mask
    lo, hi, key_since, key_until = (x.expand(batch, -1).contiguous()
                                    for x in (mask.lo, mask.hi, mask.key_since, mask.key_until))
    return replace(mask, lo=lo, hi=hi, key_since=key_since, key_until=key_until)


def _behind(mask: TransfusionMask, made: _Made, window: int | None) -> TransfusionMask:
    """The prompt's mask for the queries of this pass: a token behind the prompt sees what its last token sees, and the
    tokens since.

    Positions become columns of this pass's keys, of which a window's cache drops the oldest and a static cache has more
    than there are tokens.
    """
    size, rows, keys = mask.query_len, made.query_position.long(), made.key_position.long()
    at, behind = rows.clamp(max=size - 1), rows >= size                                    # (B or 1, Sq)
    batch = max(mask.batch_size, len(rows))
    lo, hi, key_since, key_until = (x.long().expand(batch, -1)
                                    for x in (mask.lo, mask.hi, mask.key_since, mask.key_until))
    # an empty row: padding on the right
    last = torch.where(lo[:, -1:] < hi[:, -1:], lo[:, -1:], size)
    if window is not None:
        last = torch.maximum(last, rows + 1 - window)
    at, behind, last = (x.expand(batch, rows.shape[1]) for x in (at, behind, last))
    lo = torch.where(behind, last, lo.gather(1, at))
    hi = torch.where(behind, rows + 1, hi.gather(1, at))
    place, new = keys.clamp(max=size - 1).expand(batch, -1), (keys >= size).expand(batch, -1)
    since = torch.where(new, keys, key_since.gather(1, place))                              # (B, Sk)
    until = key_until.gather(1, place)
    until = torch.where(new | (until >= size), _FAR, until)
    # a mask's rows and columns begin at 0
    first, start = keys[:, :1], rows[:, :1]
    lo, hi, since, until = lo - first, hi - first, since - start, torch.where(until == _FAR, _FAR, until - start)
    _need_all_keys(hi, keys.shape[1])
    lo, hi, since, until = (x.clamp(-_FAR, _FAR).int() for x in (lo, hi, since, until))
    return TransfusionMask(lo, hi, since, until, mask.rows_exact, False)


def _need_all_keys(hi: Tensor, key_len: int) -> None:
    """A prompt read in chunks must not end one within an image; on a CUDA device, where looking would wait, such a
    query sees what is there."""
    if hi.device.type == "cpu" and not torch.compiler.is_compiling() and hi.numel() and int(hi.max()) > key_len:
        raise ValueError(f"{_OP}: {ARGUMENT} shows a query keys up to {int(hi.max())} and there are {key_len} yet; "
                         "images within one pass fit; read the prompt at once (prefill_chunk_size=None)")


def _without_mask(query_len: int, key_len: int, is_causal: bool, device) -> TransfusionMask:
    """What a call without a mask means to SDPA's adapter: every key, or causal where the module is."""
    full = not is_causal or query_len == 1
    if not full and query_len != key_len:
        raise ValueError(f"tfkernels attention: attention_mask is None in a causal layer with {query_len} queries and "
                         f"{key_len} keys; equal numbers, one query or is_causal=False fits; pass a mask")
    hi = (torch.full((1, query_len), key_len, device=device)
          if full else torch.arange(1, query_len + 1, device=device)[None])
    return TransfusionMask.from_intervals(torch.zeros_like(hi), hi, key_len=key_len, columns_exact=True)


def _as_tensor(mask: TransfusionMask, q_offset, kv_offset, kept: Tensor | None) -> Tensor:
    """Lay two rows of integers over each other: (B, 2, 1, W) where either side of the mask is exact, else (B, 1, 2, W).

        lo, key_since, query positions, key positions                W = 2 (Sq + Sk), and one column more, of nothing,
        hi, key_until, nothing,         whether a key is kept        where attention_mask hides keys
    """
    rows = torch.arange(mask.query_len, device=mask.lo.device) + q_offset
    keys = torch.arange(mask.key_len, device=mask.lo.device) + kv_offset
    mask = mask if kept is None else _sized(mask, len(kept))
    ones = torch.ones_like(mask.key_since)
    low = [mask.lo, mask.key_since, *(x[None].int().expand(mask.batch_size, -1) for x in (rows, keys))]
    high = [mask.hi, mask.key_until, torch.zeros_like(mask.lo), ones if kept is None else kept.int()]
    if kept is not None:
        low, high = low + [ones[:, :1]], high + [ones[:, :1]]
    sides = torch.stack([torch.cat(low, 1), torch.cat(high, 1)], 1)
    return sides[:, :, None] if mask.rows_exact and mask.columns_exact else sides[:, None]


def _from_tensor(x, query_len: int, key_len: int) -> _Made | None:
    """Undo `_as_tensor`; None for what it did not make."""
    width = 2 * (query_len + key_len)
    if not isinstance(x, Tensor):
        if x is None:
            return None
        raise ValueError(f"{_OP}: attention_mask is {got(x)}; a tensor (B, Sk), or (B, 1, Sq, Sk) for all heads "
                         f"alike, fits; a TransfusionMask is given as {ARGUMENT}")
    if x.ndim != 4 or x.dtype != torch.int32 or sorted(x.shape[1:3]) != [1, 2] or x.shape[3] not in (width, width + 1):
        return None
    exact = x.shape[1] == 2
    sizes = [query_len, key_len, query_len, key_len, x.shape[3] - width]
    low, high = (side.split(sizes, 1) for side in x.flatten(1, 2).unbind(1))
    mask = TransfusionMask(low[0], high[0], low[1], high[1], exact, exact)
    return _Made(mask, low[2], low[3], high[3] != 0 if x.shape[3] > width else None)


def _from_dense(x: Tensor, query_len: int, key_len: int) -> TransfusionMask:
    """Read off a dense mask of the caller's own, bool or additive."""
    if x.ndim != 4 or x.shape[1] != 1:
        raise ValueError(f"tfkernels attention: attention_mask is {x.dtype} of shape {tuple(x.shape)} for {query_len} "
                         f"queries and {key_len} keys; (B, Sk), or (B, 1, Sq, Sk) for all heads alike, fits")
    visible = visible_pairs("tfkernels attention", x)
    return TransfusionMask.from_dense(visible.expand(-1, -1, query_len, -1) if x.shape[2] == 1 else visible)
