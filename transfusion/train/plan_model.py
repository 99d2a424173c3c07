"""What is planned for: the model that settings describe, and rows like those of its training. No data set is read."""
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig

from transfusion.files import read_json
from transfusion.model.config import TransfusionConfig
from transfusion.sequence import Sequence, pack
from transfusion.sequence.encoding import Document, with_clean_copies
from transfusion.settings import nearest
from transfusion.train.transfusion import TrainConfig

_LLAMA_7B = dict(model_type="llama", vocab_size=32_000, hidden_size=4096, intermediate_size=11_008,
                 num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
SHAPES = {
    "llama-7b": _LLAMA_7B,
    "vicuna-7b": _LLAMA_7B,
    "vicuna-13b": dict(_LLAMA_7B, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40,
                       num_attention_heads=40, num_key_value_heads=40),
    "llama-3-8b": dict(_LLAMA_7B, vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8),
    "mistral-7b": dict(_LLAMA_7B, model_type="mistral", intermediate_size=14_336, num_key_value_heads=8,
                       sliding_window=None),
    "qwen2.5-7b": dict(model_type="qwen2", vocab_size=152_064, hidden_size=3584, intermediate_size=18_944,
                       num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
    "qwen3-8b": dict(model_type="qwen3", vocab_size=151_936, hidden_size=4096, intermediate_size=12_288,
                     num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128),
}
"""Language models that `--tune.start` may name in a plan without their weights."""


def planned_config(config: TrainConfig, image: tuple[int, int, int]) -> TransfusionConfig:
    """Return the configuration of the model that would be trained on images (channels, height, width).

    `tune.start` may be a checkpoint of ours, a language model's directory, of which config.json is read alone, or a
    name in `SHAPES`; a language model gets BOI and EOI, as from `transfusion init`.

    Raises:
        ValueError: none of these, or settings that do not fit.
    """
    model, start = config.model, config.tune.start
    if start is None:
        text = LlamaConfig(
            vocab_size=model.vocabulary, hidden_size=model.hidden, intermediate_size=model.mlp,
            num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
            tie_word_embeddings=False, max_position_embeddings=max(2048, config.optim.seq_len))
    else:
        shape = _shape(start)
        if shape.get("model_type") == TransfusionConfig.model_type:
            return TransfusionConfig.from_dict(shape)
        text = AutoConfig.for_model(**shape)
        text.get_text_config().vocab_size += 2
    words = text.get_text_config().vocab_size
    return TransfusionConfig(text_config=text, image_channels=image[0], image_size=image[1:], boi_token_id=words - 2,
                             eoi_token_id=words - 1, **model.shared())


def _shape(start: Path) -> dict:
    file = Path(start) / "config.json"
    if file.is_file():
        shape = read_json(file)
        if shape.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(f"plan: tune.start is {str(start)!r}, whose config.json has model_type "
                             f"{shape.get('model_type')!r}; a Transfusion or a language model of transformers fits")
        return shape
    if str(start) not in SHAPES:
        raise ValueError(f"plan: tune.start is {str(start)!r}, where no config.json is; a checkpoint's directory or "
                         f"{', '.join(SHAPES)} fit{nearest(str(start), SHAPES)}")
    return SHAPES[str(start)]


def planned_rows(config: TransfusionConfig, rows: int, seq_len: int, *, caption: int, text_share: float,
                 text_tokens: int, clean: bool = False) -> Sequence:
    """Return packed rows: text for a share of the tokens, pictures behind captions for as many as then fit, and text.

    Args:
        caption: tokens of a caption.
        text_share: share of a row's tokens in documents without pictures.
        text_tokens: tokens of such a document, at most.
        clean: pictures have clean copies behind them (data.context).

    Raises:
        ValueError: a picture and its caption are longer than a row.
    """
    height, width = (side // config.patch_size for side in config.image_size)
    document = _pair(caption, height, width, config)
    document = with_clean_copies(document) if clean else document
    pair = len(document.tokens)
    if pair > seq_len:
        raise ValueError(f"plan: optim.seq_len is {seq_len}, and a picture of {height * width} patches with a caption "
                         f"of {caption} tokens takes {pair}; at least as many fit")
    pictures = max(1, int((1 - text_share) * seq_len) // pair)
    row = [document] * pictures
    left = seq_len - pictures * pair
    row += [_text(min(text_tokens, left - start)) for start in range(0, left, text_tokens)]
    return pack(row * rows, seq_len, config.patch_dim, rows=rows)


def _text(length: int) -> Document:
    return Document([0] * length, [False] + [True] * (length - 1), [])


def _pair(caption: int, height: int, width: int, config: TransfusionConfig) -> Document:
    """BOS, caption, BOI, patches, EOI, EOS."""
    patches = torch.zeros(height * width, config.patch_dim)
    targets = [False] + [True] * (caption + 1) + [False] * (len(patches) + 1) + [True]
    return Document([0] * len(targets), targets, [(caption + 2, patches, (height, width), False)])
