"""The backbone: any causal language model of transformers, unmodified, with our attention and our mask inside; or its parts in adaLN blocks.

    Backbone         x <- x + f(norm(x))                                           f: attention, then the MLP, of each layer
    AdaLNBackbone    x <- x + gate * f(norm(x) * (1 + scale) + shift)              scale, shift, gate: the row of the token's image; 0, 0, 1 for text

`transfusion.experts` adds a third. All are called alike and hold the decoder under its own class, parameter names and file format.
"""
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache

import tfkernels.integrations.transformers as integration
from tfkernels import TransfusionMask, gated_residual_rms_norm, linear_cross_entropy, modulated_rms_norm, qk_norm_rotary, rotary_table
from transfusion.embed import ZeroLinear
from transfusion.sequence import Modality


class Backbone(nn.Module):
    """Hidden states and text logits of a Hugging Face decoder; the timestep reaches it through the patches alone (arXiv:2408.11039)."""

    def __init__(self, text_config):
        super().__init__()
        text_config = text_config.get_text_config()
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(text_config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"Backbone: text_config.{name} is {getattr(text_config, name)}; decoders whose logits are one linear layer of the "
                                 "hidden states fit (Llama, Mistral, Qwen2, Qwen3)")
        self.decoder = AutoModelForCausalLM.from_config(text_config, attn_implementation=integration.register())

    def forward(self, x: Tensor, positions: Tensor, mask: TransfusionMask, condition: Tensor, modality: Modality,
                cache: DynamicCache | None = None) -> Tensor:
        """(B, S, C) embeddings -> (B, S, C) hidden states.

        condition (N, C) and modality, which knows the image of each token, say what time it is in each image. With a cache, its keys come before
        and the mask counts them.
        """
        return self.decoder.get_decoder()(inputs_embeds=x, position_ids=positions, transfusion_mask=mask, past_key_values=cache,
                                          use_cache=cache is not None).last_hidden_state

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
        decoder, image, rotation = self.decoder.get_decoder(), modality.image, self.rotation(x, positions)
        tables, entries = self.tables(condition)
        norms = [layer.input_layernorm for layer in decoder.layers] + [decoder.norm]
        normed = modulated_rms_norm(x, norms[0].weight, *entries[0], image, eps=norms[0].variance_epsilon)
        for layer, table, norm, entry in zip(decoder.layers, tables, norms[1:], entries[1:]):
            x, normed = self.run(layer, x, normed, table, norm, entry, rotation, mask, image, cache)
        return normed

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
        kinds, window = (getattr(attention.config, name, None) for name in ("layer_types", "sliding_window"))
        window = window if kinds is None or kinds[attention.layer_idx] == "sliding_attention" else None
        out, _ = integration.attend(attention, q, k, v, None, scaling=attention.scaling, sliding_window=window, transfusion_mask=mask)
        return out.flatten(2)
