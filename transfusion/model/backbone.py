"""The backbone: any causal language model of transformers with our attention and our mask inside.

    Backbone         x <- x + f(norm(x))                                   f: attention, then the MLP, of each layer
    AdaLNBackbone    x <- x + gate * f(norm(x) * (1 + scale) + shift)      scale, shift, gate: of the token's image;
                                                                           0, 0, 1 for text

The first is the unmodified model, the second its parts in adaLN blocks; `transfusion.model.mixture_of_transformers`
adds a third. All are called alike and hold the decoder under its own class, parameter names and file format.
"""
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache

import tfkernels.integrations.transformers as integration
from tfkernels import (
    TransfusionMask,
    gated_residual_rms_norm,
    linear_cross_entropy,
    modulated_rms_norm,
    qk_norm_rotary,
    rotary_table,
)
from tfkernels.parallel import SharedMask
from transfusion.model.decoders import FULL, SLIDING, check_config, check_implementation, check_parts, layer_kinds
from transfusion.model.image_layers.embedding import ZeroLinear
from transfusion.sequence import Modality


class Backbone(nn.Module):
    """Hidden states and text logits of a Hugging Face decoder.

    The timestep reaches it through the patches alone (arXiv:2408.11039).
    """

    def __init__(self, text_config):
        super().__init__()
        text_config = text_config.get_text_config()
        check_config(text_config)
        try:
            dtype = {} if text_config.dtype is None else {"dtype": torch.get_default_dtype()}  # not a file's
            self.decoder = AutoModelForCausalLM.from_config(
                text_config, attn_implementation=integration.register(), **dtype)
        except (KeyError, NotImplementedError) as error:
            family = text_config.model_type
            raise ValueError(f"Backbone: text_config.model_type is {family!r}, whose attention does not go through "
                             "transformers' AttentionInterface; a family whose does fits (Llama, Mistral, "
                             "Qwen2, Qwen3, Gemma 3, ...)") from error
        check_parts(self.decoder)
        self.window = getattr(text_config, "sliding_window", None)
        self.kinds = layer_kinds(text_config)

    def forward(self, x: Tensor, positions: Tensor, mask: TransfusionMask | SharedMask, condition: Tensor,
                modality: Modality, cache: DynamicCache | None = None) -> Tensor:
        """(B, S, C) embeddings -> (B, S, C) hidden states.

        condition (N, C) is the time of each image, and modality knows the image of each token. With a cache, its keys
        come before and the mask counts them. Under a `SharedMask` all but the mask is of this rank's tokens.
        """
        check_implementation(self.decoder)
        ready = x.new_empty(0, 0, 0, 0)  # else transformers makes a mask of S x S, waits for the device and discards it
        outputs = self.decoder.get_decoder()(
            inputs_embeds=x, position_ids=positions, attention_mask=ready, transfusion_mask=self.masks(mask),
            past_key_values=cache, use_cache=cache is not None)
        return outputs.last_hidden_state

    def masks(self, mask: TransfusionMask | SharedMask) -> dict[str, TransfusionMask | SharedMask]:
        """Return the mask of each kind of layer; windows are those of whole rows, whoever shares them."""
        if isinstance(mask, SharedMask):
            return {kind: mask.of(own) for kind, own in self.masks(mask.whole).items()}
        narrow = SLIDING in self.kinds and self.window is not None and mask.key_len > self.window
        return {FULL: mask, SLIDING: windowed(mask, self.window) if narrow else mask}

    def widest(self, mask: TransfusionMask) -> TransfusionMask:
        """Return the mask of the layers that see most."""
        return self.masks(mask)[FULL if FULL in self.kinds else SLIDING]

    def blocks(self) -> list[nn.Module]:
        """Return the layers. A forward calls each once, and nothing else reads a layer's parameters."""
        layers = self.decoder.config.get_text_config().num_hidden_layers
        lists = (part for part in self.decoder.get_decoder().children() if isinstance(part, nn.ModuleList))
        return list(next(part for part in lists if len(part) == layers))

    @property
    def room(self) -> int | None:
        """How many positions a decoder has that learned a vector for each; None where any fits, as with rotations."""
        words, config = self.decoder.get_input_embeddings(), self.decoder.config.get_text_config()
        count = getattr(config, "max_position_embeddings", None)
        tables = [one for one in self.decoder.modules() if isinstance(one, nn.Embedding) and one is not words]
        return count if count and any(0 <= table.num_embeddings - count <= 2 for table in tables) else None

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

    def text_loss(self, x: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the next tokens `targets` (R,) at the places (R,) in hidden states (T, C).

        It is 0 without targets.
        """
        head, count = self.decoder.get_output_embeddings(), max(1, len(targets))
        if type(head) is nn.Linear:
            return linear_cross_entropy(x, head.weight, targets, places, bias=head.bias).loss / count
        logits = head(x[places]).float()  # an adapter stands around the head's weight
        return nn.functional.cross_entropy(logits, targets, reduction="sum") / count


def windowed(mask: TransfusionMask, window: int) -> TransfusionMask:
    """Return `mask` with queries that look back on their last `window` keys: `from_spans(window=)`, of any mask.

    A query counts itself. Keys that nobody behind them sees (noised copies, columns of a cache that stand empty) are
    not counted, so that the window is as long in sampling as in training.
    """
    rows = torch.arange(mask.offset, mask.offset + mask.query_len, device=mask.lo.device)
    floor = torch.where(mask.lo >= mask.hi, torch.iinfo(torch.int32).max, mask.lo).flip(1).cummin(1).values.flip(1)
    keys = torch.arange(mask.key_len, device=mask.lo.device, dtype=torch.int32).repeat(len(floor), 1)
    last = torch.searchsorted(floor.contiguous(), keys, right=True) + mask.offset  # behind the last such run
    lasting = mask.key_until >= last                                       # (B, Sk): seen by all whose run holds it
    count = lasting.cumsum(1)                                              # (B, Sk)
    start, own, lasts = (x[:, rows] for x in (mask.key_since, count, lasting))  # (B, Sq); start: of the query's image
    first = torch.searchsorted(count, torch.where(lasts, own, own + rows + 1 - start) - window, right=True)
    lo = torch.maximum(mask.lo, torch.where(lasts | (rows + 1 - window < start), first, rows + 1 - window))
    sides = (None, None) if mask.rows_exact else (mask.key_since, mask.key_until)
    return TransfusionMask.from_intervals(lo, mask.hi, *sides, key_len=mask.key_len, offset=mask.offset,
                                          columns_exact=mask.columns_exact)


class LayerOffsets(nn.Module):
    """What each layer's modulation has of its own: (layers, 6, C), zero at first.

    It is a module, so that adapters can take it along.
    """

    def __init__(self, layers: int, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, 6, hidden))

    def forward(self) -> Tensor:
        """Return the table."""
        return self.weight


class Stream(NamedTuple):
    """The residual stream in front of a norm: x + gate * branch, a sum that the norm's kernel makes on its way.

    Embeddings are x alone.
    """

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None


class Modulation(NamedTuple):
    """What a layer's block takes beside the stream."""

    entry: tuple[Tensor, Tensor]  # scale and shift (N, C) of the norm in front of attention
    table: Tensor  # (N, 6, C), of which the gates and the other norm's scale and shift are taken
    rotation: tuple[Tensor, Tensor]  # cos and sin (B, S, R/2)
    image_ids: Tensor  # (B, S)
    mix: Callable[..., Tensor]  # attention between its projections, as `attend`


def add_and_norm(stream: Stream, norm: nn.Module, entry: tuple[Tensor, Tensor], image_ids: Tensor) -> tuple:
    """Return the stream's sum and its norm, modulated by `entry`: scale and shift (N, C)."""
    (x, branch, gate), (scale, shift) = stream, entry
    if branch is None:
        return x, modulated_rms_norm(x, norm.weight, scale, shift, image_ids, eps=norm.variance_epsilon)
    return gated_residual_rms_norm(x, branch, gate, weight=norm.weight, scale=scale, shift=shift, index=image_ids,
                                   eps=norm.variance_epsilon)


class ModulatedLayer:
    """A decoder's own layer that also runs as an adaLN block: `modulated_class` puts this in front of its class.

    The block begins with the layer's first norm and ends in front of the next layer's, so that a layer reads its own
    parameters alone, inside its own forward. That is what lets `fully_shard` split layers among processes.
    """

    # `AdaLNBackbone.run` checkpoints blocks: what transformers sets here would do so a second time
    gradient_checkpointing = property(lambda self: False, lambda self, enabled: None)

    def forward(self, x: Tensor | Stream, modulation: Modulation | None = None, **options):
        """The stream behind the block; without a modulation, what the decoder's own layer says of hidden states x."""
        if modulation is None:
            return super().forward(x, **options)
        entry, table, rotation, image_ids, mix = modulation
        x, normed = add_and_norm(x, self.input_layernorm, entry, image_ids)
        attention = self.self_attn
        branch = attention.o_proj(mix(attention, *project(attention, normed, rotation)))
        _, _, gate_attention, scale, shift, gate_mlp = table.unbind(1)                     # (N, C) each
        x, normed = add_and_norm(Stream(x, branch, 1 + gate_attention), self.post_attention_layernorm, (scale, shift),
                                 image_ids)
        return Stream(x, self.mlp(normed), 1 + gate_mlp)

    def __reduce_ex__(self, protocol):
        """Pickle and copy by the decoder's own class: the one that is made of it has no name in a module."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _empty_layer, (self.unmodulated,), *state


@cache
def modulated_class(layer: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a decoder's layers with `ModulatedLayer` in front of it."""
    return type(f"Modulated{layer.__name__}", (ModulatedLayer, layer), {"unmodulated": layer})


def _empty_layer(layer: type[nn.Module]) -> nn.Module:
    """A modulated layer without its state, which pickle and copy fill in."""
    modulated = modulated_class(layer)
    return modulated.__new__(modulated)


def project(attention, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's queries (B, H, S, D), keys and values (B, K, S, D); queries and keys are normed and rotated."""
    q, k, v = (linear(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
               for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    if not AdaLNBackbone.FAMILIES[attention.config.model_type]:
        return *qk_norm_rotary(q, k, None, None, *rotation), v
    q_norm, k_norm = attention.q_norm, attention.k_norm
    return *qk_norm_rotary(q, k, q_norm.weight, k_norm.weight, *rotation, eps=q_norm.variance_epsilon), v


def attend(attention, q: Tensor, k: Tensor, v: Tensor, mask: TransfusionMask | SharedMask,
           cache: DynamicCache | None) -> Tensor:
    """A layer's attention between its projections, (B, S, H * D); a cache's keys and values come before."""
    if cache is not None:
        k, v = cache.update(k, v, attention.layer_idx)
    out, _ = integration.attend(attention, q, k, v, None, scaling=attention.scaling, transfusion_mask=mask)
    return out.flatten(2)


class AdaLNBackbone(Backbone):
    """A Llama-shaped decoder's own attention, MLP and norm weights in blocks that each image's timestep modulates.

    adaLN-zero (arXiv:2212.09748, section 3.2) with one linear layer for all blocks and a learned offset for each
    (adaLN-single, arXiv:2310.00426). Both start at zero and the gate is 1 plus what they say: a fresh model is the
    unmodified decoder, and text always sees that.
    """

    FAMILIES = {"llama": False, "mistral": False, "qwen2": False, "qwen3": True}  # whether queries and keys have a norm

    def __init__(self, text_config):
        super().__init__(text_config)
        text_config = text_config.get_text_config()
        if text_config.model_type not in self.FAMILIES:
            raise ValueError(f"{type(self).__name__}: text_config.model_type is {text_config.model_type!r}; "
                             f"{', '.join(map(repr, self.FAMILIES))} fit, whose blocks are two norms, attention and "
                             "MLP; set backbone='decoder' for others")
        for layer in self.decoder.get_decoder().layers:
            layer.__class__ = modulated_class(type(layer))
        self.modulation = ZeroLinear(text_config.hidden_size, 6 * text_config.hidden_size)
        self.offsets = LayerOffsets(text_config.num_hidden_layers, text_config.hidden_size)
        self.gradient_checkpointing = False  # transformers' gradient_checkpointing_enable sets both
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor, positions: Tensor, mask: TransfusionMask | SharedMask, condition: Tensor,
                modality: Modality, cache: DynamicCache | None = None) -> Tensor:
        """As `Backbone.forward`; positions may also be (B, S, 2), of row and column (`tfkernels.grid_positions`)."""
        decoder, image_ids, rotation = self.decoder.get_decoder(), modality.image_ids, self.rotation(x, positions)
        tables, entries = self.tables(condition)
        stream = Stream(x)
        for layer, table, entry, own in zip(decoder.layers, tables, entries, self.layer_masks(mask)):
            mixing = partial(attend, mask=own, cache=cache)
            stream = self.run(layer, stream, Modulation(entry, table, rotation, image_ids, mixing))
        return add_and_norm(stream, decoder.norm, entries[-1], image_ids)[1]

    def layer_masks(self, mask: TransfusionMask | SharedMask) -> list[TransfusionMask | SharedMask]:
        """Return each layer's mask."""
        masks = self.masks(mask)
        return [masks[kind] for kind in self.kinds]

    def run(self, block, *arguments):
        """`block(*arguments)`, whose intermediates are made again in backward under gradient checkpointing."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    def tables(self, condition: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """What each layer's block is modulated by (N, 6, C), and scale and shift (N, C) of each norm in front of one.

        The last pair is that of the norm behind the last layer, which nothing modulates.
        """
        shared = self.modulation(nn.functional.silu(condition)).unflatten(-1, (6, -1))     # (N, 6, C)
        tables = [shared + own for own in self.offsets().to(shared.dtype)]
        identity = torch.zeros_like(shared[:, 0])
        return tables, [(table[:, 0], table[:, 1]) for table in tables] + [(identity, identity)]

    def rotation(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, S, R/2) of the decoder's own frequencies, of which row and column take every other one."""
        rotary = self.decoder.get_decoder().rotary_emb
        if positions.ndim == 2:
            cos, sin = rotary(x, position_ids=positions)                           # (B, S, R), both halves equal
            return cos[..., :cos.shape[-1] // 2], sin[..., :sin.shape[-1] // 2]
        if getattr(rotary, "rope_type", "") in ("dynamic", "longrope"):  # which choose their frequencies in a call
            rotary(x[:, :0], position_ids=positions.amax(-1))
        axes = torch.arange(len(rotary.inv_freq), device=x.device) % 2
        tables = rotary_table(positions, rotary.inv_freq.float(), axes)
        return tuple((table * rotary.attention_scaling).to(x.dtype) for table in tables)
