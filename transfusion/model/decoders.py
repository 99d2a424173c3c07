"""Which causal language models of transformers can be the decoder, and what is said of those that cannot.

A decoder fits if all of its attention goes through transformers' AttentionInterface, sees this model's masks and
nothing else, and if its logits are one linear layer of its last hidden states. Whatever would make it train or sample
as something else than it is, is refused by name before anything runs.
"""
import sys

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

import tfkernels.integrations.transformers as integration
from tfkernels.attention import MAX_HEAD_DIM

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names for kinds of layers
_LINEAR = "decoders whose logits are one linear layer of the hidden states fit (Llama, Mistral, Qwen2, Qwen3)"
_CHOSEN_KEYS = "attention to all keys that the mask shows fits, not to some chosen by score"
_DROPOUT = "0 fits, for attention weights are never formed; set it to 0"
_HEADS = ("classifier_", "summary_")  # fields of heads that are not used here
_OTHERS = "Llama, Mistral, Qwen2, Qwen3, Gemma 3 and others fit"
_WITHOUT_KEYWORDS = ("moshi", "nemotron", "stablelm")  # in some version of transformers
_UNFIT = {  # field of a decoder's configuration: the values that fit, and what is said of others
    "is_encoder_decoder": ((None, False), "a decoder without an encoder fits"),
    "final_logit_softcapping": ((None,), _LINEAR),
    "logits_scaling": ((None, 1), _LINEAR),
    "logit_scale": ((None, 1), _LINEAR),
    "attention_dropout": ((None, 0), _DROPOUT),
    "attn_pdrop": ((None, 0), _DROPOUT),
    "attention_probs_dropout_prob": ((None, 0), _DROPOUT),
    "output_router_logits": ((None, False), "False fits: the balancing loss of a mixture's routers is not added to the "
                                            "text loss; set it to False to train without one, as transformers does by "
                                            "default"),
    "hidden_size_per_layer_input": ((None, 0), "decoders whose layers take their hidden states alone fit, not the "
                                               "tokens' ids again"),
    "index_topk": ((None,), _CHOSEN_KEYS),
    "keep_window_size": ((None,), _CHOSEN_KEYS),
}


def layer_kinds(text_config) -> list[str]:
    """Return what each layer of a decoder is, `FULL` or `SLIDING`."""
    kinds = getattr(text_config, "layer_types", None)
    kind = SLIDING if getattr(text_config, "sliding_window", None) else FULL
    return list(kinds) if kinds else [kind] * text_config.num_hidden_layers


def check_config(config) -> None:
    """Refuse, by name, a decoder that would be trained or sampled as something else than it is.

    Raises:
        ValueError: the first field that does not fit.
    """
    for name, (fits, advice) in _UNFIT.items():
        value = getattr(config, name, None)
        if value not in fits:
            raise ValueError(f"Backbone: text_config.{name} is {value}; {advice}")
    _check_family(config)
    if unknown := sorted(set(layer_kinds(config)) - {FULL, SLIDING}):
        raise ValueError(f"Backbone: text_config.layer_types holds {unknown[0]!r}; {FULL!r} and {SLIDING!r} fit")
    if getattr(config, "is_heterogeneous", False):
        raise ValueError("Backbone: text_config.per_layer_config makes layers of several shapes; "
                         "layers of one shape fit")
    _check_heads(config)


def _check_family(config) -> None:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"Backbone: text_config is a {type(config).__name__}; "
                         "the configuration of a causal language model of transformers fits")
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    interface = hasattr(sys.modules[family.__module__], "ALL_ATTENTION_FUNCTIONS")
    if not family._supports_attention_backend or family._is_stateful or not interface:
        raise ValueError(f"Backbone: text_config.model_type is {config.model_type!r}, which has layers whose attention "
                         "does not go through transformers' AttentionInterface (ALiBi, state spaces, convolutions, an "
                         f"older model); {_OTHERS}")
    if config.model_type in _WITHOUT_KEYWORDS:
        raise ValueError(f"Backbone: text_config.model_type is {config.model_type!r}, whose layers do not hand keyword "
                         f"arguments on to their attention, which never sees this model's masks; {_OTHERS}")


def _check_heads(config) -> None:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(f"Backbone: text_config.num_attention_heads is {heads} and num_key_value_heads {kv_heads}; "
                         "a multiple of it fits")
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise ValueError(f"Backbone: text_config.hidden_size is {config.hidden_size} and num_attention_heads {heads}; "
                         "a multiple of it fits")
    keys = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "kv_lora_rank", None):
        keys = config.qk_nope_head_dim + config.qk_rope_head_dim
    values = getattr(config, "v_head_dim", None) or keys
    if keys != values:
        raise ValueError(f"Backbone: text_config has heads of {keys} for keys and v_head_dim {values} (multi-latent "
                         "attention); equal sizes fit")
    if not 1 <= keys <= MAX_HEAD_DIM:
        raise ValueError(f"Backbone: text_config has heads of {keys}; 1 to {MAX_HEAD_DIM} fits")


def check_parts(decoder) -> None:
    """As `check_config`, of what no field of a configuration says, and of any field that lets numbers be dropped."""
    family, head, body = decoder.config.model_type, decoder.get_output_embeddings(), decoder.get_decoder()
    if sinks := [name for name, _ in decoder.named_parameters() if "sink" in name.split(".")[-1]]:
        raise ValueError(f"Backbone: text_config.model_type is {family!r}, whose attention has sinks ({sinks[0]}); "
                         "attention without sinks fits")
    known = {id(p) for part in (body, head) if part is not None for p in part.parameters()}
    others = [name for name, p in decoder.named_parameters() if id(p) not in known]
    if head is None or body is decoder or others:
        raise ValueError(f"Backbone: text_config.model_type is {family!r}, whose logits are made by more than one "
                         f"layer ({others[:1]}); {_LINEAR}")
    for name, value in vars(decoder.config).items():
        if "drop" in name and not name.startswith(_HEADS) and isinstance(value, int | float) and value:
            raise ValueError(f"Backbone: text_config.{name} is {value}; 0 fits, for a resumed run would drop "
                             "others than it had dropped; set it to 0")


def check_implementation(decoder) -> None:
    """Refuse a decoder whose attention was changed after it was made."""
    if decoder.config._attn_implementation != integration.NAME:
        raise ValueError(f"Transfusion: the decoder's attn_implementation is {decoder.config._attn_implementation!r}, "
                         f"which cannot see this model's masks; {integration.NAME!r} fits; "
                         f"call decoder.set_attn_implementation({integration.NAME!r})")
