"""The backbone: any causal language model of transformers, unmodified, with our attention and our mask inside; or its parts in adaLN blocks.

    Backbone         x <- x + f(norm(x))                                           f: attention, then the MLP, of each layer
    AdaLNBackbone    x <- x + gate * f(norm(x) * (1 + scale) + shift)              scale, shift, gate: the row of the token's image; 0, 0, 1 for text

`transfusion.model.mixture_of_transformers` adds a third. All are called alike and hold the decoder under its own class, parameter names and file format.
"""
import sys

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, DynamicCache

import tfkernels.integrations.transformers as integration
from tfkernels import TransfusionMask, gated_residual_rms_norm, linear_cross_entropy, modulated_rms_norm, qk_norm_rotary, rotary_table
from tfkernels.attention import MAX_HEAD_DIM
from transfusion.model.image_layers.embedding import ZeroLinear
from transfusion.sequence import Modality

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names for kinds of layers
_LINEAR = "decoders whose logits are one linear layer of the hidden states fit (Llama, Mistral, Qwen2, Qwen3)"
_DROPOUT = "0 fits, for attention weights are never formed; set it to 0"
_DEAF = ("moshi", "nemotron", "stablelm")  # in some version of transformers
_UNFIT = {  # field of a decoder's configuration: the values that fit, and what is said of others
    "is_encoder_decoder": ((None, False), "a decoder without an encoder fits"),
    "final_logit_softcapping": ((None,), _LINEAR), "logits_scaling": ((None, 1), _LINEAR), "logit_scale": ((None, 1), _LINEAR),
    "attention_dropout": ((None, 0), _DROPOUT), "attn_pdrop": ((None, 0), _DROPOUT), "attention_probs_dropout_prob": ((None, 0), _DROPOUT),
    "output_router_logits": ((None, False), "False fits: the balancing loss of a mixture's routers is not added to the text loss; set it to False to "
                                            "train without one, as transformers does by default"),
    "hidden_size_per_layer_input": ((None, 0), "decoders whose layers take their hidden states alone fit, not the tokens' ids again"),
    "index_topk": ((None,), "attention to all keys that the mask shows fits, not to some chosen by score"),
    "keep_window_size": ((None,), "attention to all keys that the mask shows fits, not to some chosen by score"),
}


class Backbone(nn.Module):
    """Hidden states and text logits of a Hugging Face decoder; the timestep reaches it through the patches alone (arXiv:2408.11039)."""

    def __init__(self, text_config):
        super().__init__()
        text_config = text_config.get_text_config()
        _check_config(text_config)
        try:
            self.decoder = AutoModelForCausalLM.from_config(text_config, attn_implementation=integration.register())
        except (KeyError, NotImplementedError) as error:
            raise ValueError(f"Backbone: text_config.model_type is {text_config.model_type!r}, whose attention does not go through transformers' "
                             "AttentionInterface; a family whose does fits (Llama, Mistral, Qwen2, Qwen3, Gemma 3, ...)") from error
        _check_parts(self.decoder)
        self.window = getattr(text_config, "sliding_window", None)
        self.kinds = layer_kinds(text_config)

    def forward(self, x: Tensor, positions: Tensor, mask: TransfusionMask, condition: Tensor, modality: Modality,
                cache: DynamicCache | None = None) -> Tensor:
        """(B, S, C) embeddings -> (B, S, C) hidden states.

        condition (N, C) and modality, which knows the image of each token, say what time it is in each image. With a cache, its keys come before
        and the mask counts them.
        """
        _check_implementation(self.decoder)
        ready = x.new_empty(0, 0, 0, 0)  # instead of the mask of S x S that transformers would make, waiting for the device, and throw away
        return self.decoder.get_decoder()(inputs_embeds=x, position_ids=positions, attention_mask=ready, transfusion_mask=self.masks(mask),
                                          past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def masks(self, mask: TransfusionMask) -> dict[str, TransfusionMask]:
        """Return the mask of each kind of layer."""
        narrow = SLIDING in self.kinds and self.window is not None and mask.key_len > self.window
        return {FULL: mask, SLIDING: windowed(mask, self.window) if narrow else mask}

    def load_text(self, decoder) -> None:
        """Take the weights of a language model of the same configuration."""
        self.decoder.load_state_dict(decoder.state_dict())
        self.decoder.generation_config = decoder.generation_config

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings."""
        return self.decoder.get_input_embeddings()(tokens)

    def logits(self, x: Tensor) -> Tensor:
        """Text logits of hidden states."""
        return self.decoder.get_output_embeddings()(x)

    def text_loss(self, x: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the next tokens `targets` (R,) after the rows `rows` of hidden states (T, C); 0 without targets."""
        head = self.decoder.get_output_embeddings()
        if type(head) is nn.Linear:
            return linear_cross_entropy(x, head.weight, targets, rows, bias=head.bias).loss / max(1, len(targets))
        return nn.functional.cross_entropy(head(x[rows]).float(), targets, reduction="sum") / max(1, len(targets))  # an adapter stands on its weight


def layer_kinds(text_config) -> list[str]:
    """Return what each layer of a decoder is, `FULL` or `SLIDING`."""
    kinds = getattr(text_config, "layer_types", None)
    return list(kinds) if kinds else [SLIDING if getattr(text_config, "sliding_window", None) else FULL] * text_config.num_hidden_layers


def windowed(mask: TransfusionMask, window: int) -> TransfusionMask:
    """Return `mask` with queries that look back on the last `window` keys of theirs, themselves included: `from_spans(window=)`, of any mask.

    Keys that nobody behind them sees (noised copies, columns of a cache that stand empty) are not counted: the window is as long in sampling as in training.
    """
    rows = torch.arange(mask.offset, mask.offset + mask.query_len, device=mask.lo.device)
    floor = torch.where(mask.lo >= mask.hi, torch.iinfo(torch.int32).max, mask.lo).flip(1).cummin(1).values.flip(1)
    keys = torch.arange(mask.key_len, device=mask.lo.device, dtype=torch.int32).repeat(len(floor), 1)
    lasting = mask.query_hi >= torch.searchsorted(floor.contiguous(), keys, right=True) + mask.offset  # seen by all whose run of keys holds them
    count = lasting.cumsum(1)                                                              # (B, Sk)
    start, own, lasts = mask.query_lo[:, rows], count[:, rows], lasting[:, rows]           # (B, Sq): of the query's image, of what lasts up to it
    first = torch.searchsorted(count, torch.where(lasts, own, own + rows + 1 - start) - window, right=True)
    lo = torch.maximum(mask.lo, torch.where(lasts | (rows + 1 - window < start), first, rows + 1 - window))
    sides = (None, None) if mask.rows_exact else (mask.query_lo, mask.query_hi)
    return TransfusionMask.from_intervals(lo, mask.hi, *sides, key_len=mask.key_len, offset=mask.offset, columns_exact=mask.columns_exact)


def _check_config(config) -> None:
    """Refuse, by name, a decoder that would be trained or sampled as something else than it is."""
    for name, (fits, advice) in _UNFIT.items():
        value = getattr(config, name, None)
        if value not in fits:
            raise ValueError(f"Backbone: text_config.{name} is {value}; {advice}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"Backbone: text_config is a {type(config).__name__}; the configuration of a causal language model of transformers fits")
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not family._supports_attention_backend or family._is_stateful or not hasattr(sys.modules[family.__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(f"Backbone: text_config.model_type is {config.model_type!r}, which has layers whose attention does not go through transformers' "
                         "AttentionInterface (ALiBi, state spaces, convolutions, an older model); Llama, Mistral, Qwen2, Qwen3, Gemma 3 and others fit")
    if config.model_type in _DEAF:
        raise ValueError(f"Backbone: text_config.model_type is {config.model_type!r}, whose layers do not hand keyword arguments on to their attention, which "
                         "never sees this model's masks; Llama, Mistral, Qwen2, Qwen3, Gemma 3 and others fit")
    if unknown := sorted(set(layer_kinds(config)) - {FULL, SLIDING}):
        raise ValueError(f"Backbone: text_config.layer_types holds {unknown[0]!r}; {FULL!r} and {SLIDING!r} fit")
    if getattr(config, "is_heterogeneous", False):
        raise ValueError("Backbone: text_config.per_layer_config makes layers of several shapes; layers of one shape fit")
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % kv_heads:
        raise ValueError(f"Backbone: text_config.num_attention_heads is {heads} and num_key_value_heads {kv_heads}; a multiple of it fits")
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise ValueError(f"Backbone: text_config.hidden_size is {config.hidden_size} and num_attention_heads {heads}; a multiple of it fits")
    keys = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "kv_lora_rank", None):
        keys = config.qk_nope_head_dim + config.qk_rope_head_dim
    values = getattr(config, "v_head_dim", None) or keys
    if keys != values:
        raise ValueError(f"Backbone: text_config has heads of {keys} for keys and v_head_dim {values} (multi-latent attention); equal sizes fit")
    if not 1 <= keys <= MAX_HEAD_DIM:
        raise ValueError(f"Backbone: text_config has heads of {keys}; 1 to {MAX_HEAD_DIM} fits")


def _check_parts(decoder) -> None:
    """The same, of what no field of a configuration says."""
    family, head, body = decoder.config.model_type, decoder.get_output_embeddings(), decoder.get_decoder()
    if sinks := [name for name, _ in decoder.named_parameters() if "sink" in name.split(".")[-1]]:
        raise ValueError(f"Backbone: text_config.model_type is {family!r}, whose attention has sinks ({sinks[0]}); attention without sinks fits")
    known = {id(p) for part in (body, head) if part is not None for p in part.parameters()}
    others = [name for name, p in decoder.named_parameters() if id(p) not in known]
    if head is None or body is decoder or others:
        raise ValueError(f"Backbone: text_config.model_type is {family!r}, whose logits are made by more than one layer ({others[:1]}); {_LINEAR}")


def _check_implementation(decoder) -> None:
    if decoder.config._attn_implementation != integration.NAME:
        raise ValueError(f"Transfusion: the decoder's attn_implementation is {decoder.config._attn_implementation!r}, which cannot see this model's masks; "
                         f"{integration.NAME!r} fits; call decoder.set_attn_implementation({integration.NAME!r})")


class LayerOffsets(nn.Module):
    """What each layer's modulation has of its own: (layers, 6, C), zero at first. A module, so that adapters can take it along."""

    def __init__(self, layers: int, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, 6, hidden))

    def forward(self) -> Tensor:
        """Return the table."""
        return self.weight


class AdaLNBackbone(Backbone):
    """A Llama-shaped decoder's own attention, MLP and norm weights in blocks that each image's timestep modulates.

    adaLN-zero (arXiv:2212.09748, section 3.2) with one linear layer for all blocks and a learned offset for each (adaLN-single, arXiv:2310.00426). Both
    start at zero and the gate is 1 plus what they say: a fresh model is the unmodified decoder, and text always sees it.
    """

    FAMILIES = {"llama": False, "mistral": False, "qwen2": False, "qwen3": True}  # model_type: whether queries and keys have a norm

    def __init__(self, text_config):
        super().__init__(text_config)
        text_config = text_config.get_text_config()
        if text_config.model_type not in self.FAMILIES:
            raise ValueError(f"{type(self).__name__}: text_config.model_type is {text_config.model_type!r}; {', '.join(map(repr, self.FAMILIES))} fit, whose "
                             "blocks are two norms, attention and MLP; set backbone='decoder' for others")
        self.modulation = ZeroLinear(text_config.hidden_size, 6 * text_config.hidden_size)
        self.offsets = LayerOffsets(text_config.num_hidden_layers, text_config.hidden_size)
        self.gradient_checkpointing = False  # transformers' gradient_checkpointing_enable sets it

    def forward(self, x: Tensor, positions: Tensor, mask: TransfusionMask, condition: Tensor, modality: Modality,
                cache: DynamicCache | None = None) -> Tensor:
        """As `Backbone.forward`; positions may also be (B, S, 2), a row and a column (see `tfkernels.grid_positions`)."""
        decoder, image, rotation = self.decoder.get_decoder(), modality.image_ids, self.rotation(x, positions)
        tables, entries = self.tables(condition)
        norms = [layer.input_layernorm for layer in decoder.layers] + [decoder.norm]
        normed = modulated_rms_norm(x, norms[0].weight, *entries[0], image, eps=norms[0].variance_epsilon)
        for layer, table, norm, entry, own in zip(decoder.layers, tables, norms[1:], entries[1:], self.layer_masks(mask)):
            x, normed = self.run(layer, x, normed, table, norm, entry, rotation, own, image, cache)
        return normed

    def layer_masks(self, mask: TransfusionMask) -> list[TransfusionMask]:
        """Return each layer's mask."""
        masks = self.masks(mask)
        return [masks[kind] for kind in self.kinds]

    def run(self, *arguments):
        """`block`, whose intermediates are made again in backward under gradient checkpointing."""
        return checkpoint(self.block, *arguments, use_reentrant=False) if self.gradient_checkpointing and self.training else self.block(*arguments)

    def tables(self, condition: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Of each layer, what its block is modulated by (N, 6, C); in front of each layer's attention and behind the last, scale and shift (N, C)."""
        shared = self.modulation(nn.functional.silu(condition)).unflatten(-1, (6, -1))     # (N, 6, C)
        tables = [shared + own for own in self.offsets().to(shared.dtype)]
        identity = torch.zeros_like(shared[:, 0])
        return tables, [(table[:, 0], table[:, 1]) for table in tables] + [(identity, identity)]

    def rotation(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, S, R/2) of the decoder's own frequencies; of two positions, each takes every other frequency."""
        rotary = self.decoder.get_decoder().rotary_emb
        if positions.ndim == 2:
            cos, sin = rotary(x, position_ids=positions)                                   # (B, S, R), both halves equal
            return cos[..., :cos.shape[-1] // 2], sin[..., :sin.shape[-1] // 2]
        axes = torch.arange(len(rotary.inv_freq), device=x.device) % 2
        return tuple((table * rotary.attention_scaling).to(x.dtype) for table in rotary_table(positions, rotary.inv_freq.float(), axes))

    def block(self, layer, x: Tensor, normed: Tensor, table: Tensor, next_norm, next_entry, rotation, mask, image: Tensor, cache) -> tuple[Tensor, Tensor]:
        """One layer, from its normed input to the next one's."""
        branch = layer.self_attn.o_proj(self.attend(layer.self_attn, *self.project(layer.self_attn, normed, rotation), mask, cache))
        return self.add(layer, x, branch, table, next_norm, next_entry, image)

    def add(self, layer, x: Tensor, branch: Tensor, table: Tensor, next_norm, next_entry, image: Tensor) -> tuple[Tensor, Tensor]:
        """A layer behind its attention: residual, norm, MLP, residual and the next layer's norm."""
        _, _, gate_attention, scale, shift, gate_mlp = table.unbind(1)                     # (N, C) each
        norm = layer.post_attention_layernorm
        x, normed = gated_residual_rms_norm(x, branch, 1 + gate_attention, norm.weight, scale, shift, image, eps=norm.variance_epsilon)
        return tuple(gated_residual_rms_norm(x, layer.mlp(normed), 1 + gate_mlp, next_norm.weight, *next_entry, image, eps=next_norm.variance_epsilon))

    def project(self, attention, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's queries (B, H, S, D), keys and values (B, K, S, D) with its own weights; norm and rotation of the first two in one pass."""
        q, k, v = (project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        if self.FAMILIES[attention.config.model_type]:
            return *qk_norm_rotary(q, k, attention.q_norm.weight, attention.k_norm.weight, *rotation, eps=attention.q_norm.variance_epsilon), v
        return *qk_norm_rotary(q, k, None, None, *rotation), v

    def attend(self, attention, q: Tensor, k: Tensor, v: Tensor, mask: TransfusionMask, cache: DynamicCache | None) -> Tensor:
        """A layer's attention between its projections, (B, S, H * D); a cache's keys and values come before."""
        if cache is not None:
            k, v = cache.update(k, v, attention.layer_idx)
        out, _ = integration.attend(attention, q, k, v, None, scaling=attention.scaling, transfusion_mask=mask)
        return out.flatten(2)
