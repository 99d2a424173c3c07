"""The backbone: any causal language model of transformers, unmodified, with our attention and our mask inside."""
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import tfkernels.integrations.transformers as integration
from tfkernels import TransfusionMask


class Backbone(nn.Module):
    """Hidden states and text logits of a Hugging Face decoder; `decoder` keeps its own class, parameter names and file format."""

    def __init__(self, text_config):
        super().__init__()
        text_config = text_config.get_text_config()
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(text_config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"Backbone: text_config.{name} is {getattr(text_config, name)}; decoders whose logits are one linear layer of the "
                                 "hidden states fit (Llama, Mistral, Qwen2, Qwen3)")
        self.decoder = AutoModelForCausalLM.from_config(text_config, attn_implementation=integration.register())

    def forward(self, x: Tensor, positions: Tensor, mask: TransfusionMask, cache: DynamicCache | None = None) -> Tensor:
        """(B, S, C) embeddings -> (B, S, C) hidden states; with a cache, its keys come before and the mask counts them."""
        return self.decoder.get_decoder()(inputs_embeds=x, position_ids=positions, transfusion_mask=mask, past_key_values=cache,
                                          use_cache=cache is not None).last_hidden_state

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings."""
        return self.decoder.get_input_embeddings()(tokens)

    def logits(self, x: Tensor) -> Tensor:
        """Text logits of hidden states."""
        return self.decoder.get_output_embeddings()(x)
