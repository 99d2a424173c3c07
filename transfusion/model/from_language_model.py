"""A Transfusion out of a pretrained language model: its weights as they are, two more tokens, and image layers.

The image layers start silent.

    transfusion init --llm PATH --out DIR
"""
import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from transfusion.command import claim
from transfusion.files import check_files, read_json, write_text
from transfusion.model.config import TransfusionConfig, TransfusionSettings
from transfusion.model.transfusion import Transfusion
from transfusion.model.vae import VAE
from transfusion.model.weights import check_complete
from transfusion.sequence.tokenizer import BOI, EOI
from transfusion.settings import Count, Seed, check_value

MADE_OF = "made_of.json"
"""file of a checkpoint of `transfusion init` that tells its language model"""


@dataclass(frozen=True, kw_only=True)
class InitSettings(TransfusionSettings):
    """Make a Transfusion checkpoint from a language model's."""

    llm: Path
    """directory of a causal language model in transformers' format (safetensors), or a GGUF file with its tokenizer"""
    out: Path
    """directory of the new checkpoint"""
    vae: Path | None = None
    """directory of a diffusers AutoencoderKL whose latents are the model's images; it is copied into the checkpoint"""
    image_channels: Count = 3
    """channels of an image; with a VAE those of its latents, whatever is said here"""
    image_size: tuple[Count, Count] = (32, 32)
    """height and width, of latents where there is a VAE, that are drawn when not told otherwise"""
    seed: Seed = 0
    """of the image layers' first weights"""


def load_language_model(path: Path):
    """Return (decoder, tokenizer) of a checkpoint directory or GGUF file, weights in float32.

    Pickled weights are refused, and no remote code runs.
    """
    if path.suffix == ".gguf":
        where, options = path.parent, {"gguf_file": path.name}
        weights = {"quantization_config": GgufConfig(dequantize=True)}
    else:
        where, options, weights = path, {}, {"use_safetensors": True}
    if not (path.is_file() if options else (path / "config.json").is_file()):
        raise ValueError(f"init: llm is {str(path)!r}, which is no checkpoint; a directory with config.json and "
                         "*.safetensors, or a .gguf file, fits")
    if not options:
        check_files(path)
    try:
        options["trust_remote_code"] = False
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        decoder, found = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, output_loading_info=True,
                                                              **options, **weights)
    except (OSError, ImportError) as error:
        raise ValueError(f"init: llm is {str(path)!r}, which cannot be loaded ({error}); safetensors fit, and GGUF "
                         "where the packages gguf and accelerate are installed; convert other formats first") from error
    check_complete("init", "llm", path, found)
    if "gguf_file" in options and decoder.config.eos_token_id is not None:  # transformers 5.17 takes BOS for EOS there
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(decoder.config.eos_token_id)
    return decoder, tokenizer


def from_language_model(decoder, tokenizer, *, seed: int = 0, **config) -> Transfusion:
    """Return a Transfusion that holds `decoder`'s weights; `config` are fields of `TransfusionConfig`.

    BOI and EOI are added to the vocabulary and their rows start as the mean of all rows. Text logits over the old
    vocabulary stay the decoder's own. Of a decoder of several modalities, such as the larger Gemma 3, the language
    model alone is taken. Documents begin with the tokenizer's BOS or, where it has none, its EOS.

    Raises:
        ValueError: a setting that does not fit, a decoder that does not (see `transfusion.model.decoders`), or a
            tokenizer without EOS.
    """
    _check(seed, config)
    decoder = _text_part(decoder)
    if tokenizer.eos_token is None:
        raise ValueError("init: the tokenizer has no EOS, without which no document ends; set tokenizer.eos_token")
    for name in ("bos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, tokenizer.eos_token)
    before = sorted(set(tokenizer.get_vocab().values()))  # ids may have gaps
    tokenizer.add_tokens([BOI, EOI], special_tokens=True)
    boi, eoi = tokenizer.convert_tokens_to_ids([BOI, EOI])
    new = sorted({boi, eoi} - set(before))
    known = slice(len(before)) if before == [*range(len(before))] else before
    size = max(boi, eoi, *before) + 1
    if size > decoder.get_input_embeddings().weight.shape[0]:
        decoder.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        head = decoder.get_output_embeddings()
        for table in (decoder.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)):
            if new and table is not None:
                table[new] = table[known].mean(0)
    torch.manual_seed(seed)
    left_out = "quantization_config", "_name_or_path", "dtype", "torch_dtype"  # of the file, not of the model
    text_config = AutoConfig.for_model(**{k: v for k, v in decoder.config.to_dict().items() if k not in left_out})
    config = TransfusionConfig(text_config=text_config, boi_token_id=boi, eoi_token_id=eoi, **config)
    model = Transfusion(config, tokenizer)
    model.backbone.load_text(decoder)
    return model


def _text_part(decoder):
    """The language model in a model of text and other modalities, as one of its own; others as they are."""
    text_config = decoder.config.get_text_config()
    if text_config is decoder.config:
        return decoder
    name, inside, head = type(decoder).__name__, decoder.get_decoder(), decoder.get_output_embeddings()
    text_config = copy.deepcopy(text_config)
    text_config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"init: llm is a {name}, whose text transformers knows no language model for; a language "
                         "model of text alone fits")
    text = AutoModelForCausalLM.from_config(text_config, dtype=torch.float32)
    if type(inside) is not type(text.base_model):
        raise ValueError(f"init: llm is a {name}, whose text part is a {type(inside).__name__} and not the "
                         f"{type(text.base_model).__name__} of a {type(text).__name__}; a language model of text alone "
                         "fits")
    text.base_model.load_state_dict(inside.state_dict())
    text.get_output_embeddings().load_state_dict(head.state_dict())
    text.generation_config = decoder.generation_config
    return text


def _check(seed: int, config: dict) -> None:
    """Refuse settings that do not fit before a language model is loaded for them."""
    check_value("init", "seed", seed, Seed)
    TransfusionConfig(**config)


def init(settings: InitSettings, alone: bool = True) -> Path:
    """Run `transfusion init`; return the new checkpoint's directory.

    `alone`: whether this is one process; otherwise the main one of several makes the checkpoint for all.

    Raises:
        ValueError: settings that do not fit; `out` is a file, cannot be written, holds a checkpoint, or is, holds or
            lies in `llm` or `vae`.
    """
    _check(settings.seed, _config(settings))
    with claim("init", settings.out, {"llm": settings.llm, "vae": settings.vae}, resume=False, alone=alone):
        return _init(settings)


def _config(settings: InitSettings) -> dict:
    """The fields of `TransfusionConfig` among the settings."""
    return settings.shared() | {"image_channels": settings.image_channels, "image_size": settings.image_size}


def _init(settings: InitSettings) -> Path:
    config = _config(settings)
    vae = None if settings.vae is None else VAE.from_pretrained(settings.vae)
    if vae is not None:
        config["image_channels"] = vae.channels
    decoder, tokenizer = load_language_model(settings.llm)
    model = from_language_model(decoder, tokenizer, seed=settings.seed, **config)
    model.vae = vae
    model.save_pretrained(settings.out)
    write_text(settings.out / MADE_OF, json.dumps({"llm": str(settings.llm), "sampled": _sampled(settings.llm)}) + "\n")
    text = sum(p.numel() for p in model.backbone.decoder.parameters())
    images = sum(p.numel() for p in model.parameters()) - text
    print(f"{settings.out}: {text:,} parameters of {type(model.backbone.decoder).__name__}, {images:,} of images; "
          f"BOI {model.config.boi_token_id}, EOI {model.config.eoi_token_id}")
    return settings.out


def was_made_of(start: Path, llm: Path) -> bool:
    """Whether a checkpoint of `transfusion init` was made of a language model; also where it does not tell."""
    file = start / MADE_OF
    return not file.is_file() or read_json(file).get("sampled") == _sampled(llm)


def _sampled(llm: Path) -> str:
    """A hash of sixteen parts of each file of weights: other weights have another, and little is read."""
    found = hashlib.sha256()
    for file in sorted(llm.glob("*.safetensors")) if llm.is_dir() else [llm]:
        size = file.stat().st_size
        found.update(f"{size} ".encode())
        with file.open("rb") as stream:
            for part in range(16):
                stream.seek(size * part // 16)
                found.update(stream.read(2**16))
    return found.hexdigest()
