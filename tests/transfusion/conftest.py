"""A tiny model and its tokenizer, built once and never trained in place, and pictures."""
from pathlib import Path

import pytest
import torch
from PIL import Image as Picture
from transformers import AutoConfig, LlamaConfig

from transfusion import Image, Transfusion, TransfusionConfig
from transfusion.model.lora import TuneSettings, prepare
from transfusion.recipes.digits import Digits
from transfusion.sequence.tokenizer import BOI, EOI, train_tokenizer


def tiny_model(
    objective="flow",
    backbone="decoder",
    image_layers="dit",
    positions="1d",
    image_attention="bidirectional",
    unet_channels=(64, 128),
    unet_blocks=2,
    patch_size=2,
    image_channels=1,
    **text_options,
):
    """A random model of 2 layers whose image layers are not silent, so that images and their times matter."""
    tokenizer = train_tokenizer(Digits.caption(i) for i in range(10))
    torch.manual_seed(0)
    text_config = LlamaConfig(
        **{
            **dict(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
            **text_options,
        }
    )
    model = Transfusion(
        TransfusionConfig(
            text_config=text_config,
            patch_size=patch_size,
            image_channels=image_channels,
            backbone=backbone,
            image_layers=image_layers,
            positions=positions,
            objective=objective,
            unet_channels=unet_channels,
            unet_blocks=unet_blocks,
            image_attention=image_attention,
            boi_token_id=tokenizer.convert_tokens_to_ids(BOI),
            eoi_token_id=tokenizer.convert_tokens_to_ids(EOI),
        ),
        tokenizer,
    )
    for name, parameter in model.named_parameters():
        if "modulation" in name or "offsets" in name or name.startswith(("image_head", "patch_embedding")):
            torch.nn.init.normal_(parameter, std=0.3)
        if name.startswith("backbone.image_") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def in_training(model, trained="all", checkpointed=False, frozen=None):
    """The model, or adapters around it, ready to be trained; the adapters, too, are random numbers."""
    if checkpointed:
        model.gradient_checkpointing_enable()
    model = prepare(model.train(), TuneSettings(start=Path("start"), trained=trained, lora_rank=4, frozen=frozen))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_decoder_config(family, **options):
    """The configuration of a language model of any family, with 2 layers."""
    sizes = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, pad_token_id=0)
    return AutoConfig.for_model(family, **sizes | options)


@pytest.fixture(scope="session", params=["decoder", "adaln, 2d", "mixture_of_transformers, 2d"])
def model(request):
    backbone, *positions = request.param.split(", ")
    return tiny_model(backbone=backbone, positions=(positions or ["1d"])[0])


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(1)
    return [Image(torch.rand(1, 8, 8, generator=generator) * 2 - 1) for _ in range(4)]


@pytest.fixture
def folder(tmp_path):
    """Forty pictures, left half red and right half blue behind bars, two files that are none, and a text."""
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for i in range(40):
        picture = Picture.new("RGB", (40, 20), "red")
        picture.paste("blue", (20, 0, 40, 20))
        picture.save(tmp_path / "pictures" / ("deep" if i % 2 else ".") / f"{i}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"not a picture")
    whole = (tmp_path / "pictures" / "0.png").read_bytes()
    (tmp_path / "pictures" / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"
