"""The models and the training of the paper (arXiv:2408.11039): `transfusion train paper --size 0.76B data:NAME`.

    size     layers  hidden  heads   parameters   linear image layers   U-Net of channels (c, 2c), 3 blocks
    0.16B      16      768     12      162.4 M       0.9 M   0.5 %       c = 640   260.0 M   160 % (106.1 %)
    0.37B      24     1024     16      373.9 M       1.4 M   0.4 %       c = 640   264.1 M    71 % (71.3 %)
    0.76B      24     1536     24      777.9 M       2.9 M   0.4 %       c = 640   272.8 M    35 % (35.5 %)
    1.4B       24     2048     16     1364.3 M       4.9 M   0.4 %       c = 640   282.0 M    21 % (19.3 %)
    7B         32     4096     32     6738.4 M      18.2 M   0.3 %       c = 576   271.0 M   4.0 % (3.8 %)

Layers, hidden sizes and heads are those of table 2. Parameters are the decoder's with both vocabulary matrices, whose
sum the sizes are named after (within 4 %; without the matrices 0.16B would be 0.11). Image layers are all else; where
they are linear, most of that is the embedding of the timestep. The percentages of table 7 hold for linear layers;
those of its U-Net column stand in brackets. The paper gives 0.27 B for the U-Net of every size but no channels, so
channels are chosen here that meet this sum within 4.5 %. Sum and percentages cannot both hold: 106.1 % of the
smallest model would be 0.17 B, 3.8 % of the largest 0.26 B.
"""
from pathlib import Path
from typing import NamedTuple

from transformers import LlamaConfig

from transfusion.data.dataset import DatasetSettings
from transfusion.data.picture_files import PictureFolderSettings
from transfusion.model.config import TransfusionConfig
from transfusion.settings import nearest
from transfusion.train.autoencoder import AutoencoderSettings, LossSettings, VAEOptimSettings, VAETrainConfig
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig

VOCABULARY = 32_000


class Size(NamedTuple):
    """A row of table 2, and the channels of its U-Net image layers."""

    layers: int
    hidden: int
    heads: int
    unet_channels: tuple[int, int] = (640, 1280)


PAPER = {
    "0.16B": Size(16, 768, 12),
    "0.37B": Size(24, 1024, 16),
    "0.76B": Size(24, 1536, 24),
    "1.4B": Size(24, 2048, 16),
    "7B": Size(32, 4096, 32, (576, 1152)),
}


def mlp_width(hidden: int) -> int:
    """Return 8/3 of `hidden`, rounded up to a multiple of 256, as Llama's SwiGLU has it: 11,008 for 4096.

    See arXiv:2302.13971, section 2.2.
    """
    return -(-(8 * hidden // 3) // 256) * 256


def named_size(size: str) -> Size:
    """Return a row of `PAPER`.

    Raises:
        ValueError: a size that does not exist.
    """
    if size not in PAPER:
        raise ValueError(f"paper: size is {size!r}; {', '.join(PAPER)} fit{nearest(size, PAPER)}")
    return PAPER[size]


def paper_model(size: str, image_layers: str = "linear") -> TransfusionConfig:
    """Return a model of the paper: Llama 2's kind, 4096 positions, cosine eps-prediction, lambda 5.

    Pictures of 256x256 are VAE latents of 8x32x32 in 256 patches. BOI and EOI are the tokens behind Llama 2's 32,000.

    Args:
        size: a name in `PAPER`.
        image_layers: "linear" or "unet", the paper's two; "dit" fits as everywhere.

    Raises:
        ValueError: a size or image layers that do not exist.
    """
    layers, hidden, heads, unet_channels = named_size(size)
    text_config = LlamaConfig(
        vocab_size=VOCABULARY + 2, hidden_size=hidden, intermediate_size=mlp_width(hidden), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    return TransfusionConfig(
        text_config=text_config, image_channels=8, image_size=(32, 32), patch_size=2, image_layers=image_layers,
        unet_channels=unet_channels, unet_blocks=3, objective="eps", diffusion_weight=5.0, boi_token_id=VOCABULARY,
        eoi_token_id=VOCABULARY + 1)


def paper(size: str = "0.16B", image_layers: str = "linear") -> TrainConfig:
    """The paper's models and training; --size and --image-layers choose the model, data:NAME the data set.

    250,000 steps of 2 M tokens, captions first 80 % of the time (section 4.1), images before their captions noised to
    half the time at most (section 4.3.4). AdamW's epsilon, 1e-8, is PyTorch's own. The paper names no average of
    weights and no share of captions left out for guidance (`caption_dropout` keeps its default). Its pictures are not
    public, so that there is no data set by default; latents of 8x32x32 make its 256 patches a picture. The tokenizer
    is trained on the data set's own texts.

    Args:
        size: a name in `PAPER`.
        image_layers: "linear" or "unet".
    """
    layers, hidden, heads, unet_channels = named_size(size)
    return TrainConfig(
        out=Path("runs") / f"paper-{size}", save_every=1000, autocast=True,
        model=ModelSettings(
            vocabulary=VOCABULARY + 2, hidden=hidden, layers=layers, heads=heads, kv_heads=heads, mlp=mlp_width(hidden),
            norm_eps=1e-5, patch_size=2, image_layers=image_layers, unet_channels=unet_channels, unet_blocks=3,
            objective="eps", diffusion_weight=5.0),
        data=DatasetSettings(caption_first=0.8, noise_limit=0.5),
        optim=OptimSettings(
            steps=250_000, rows=512, seq_len=4096, lr=3e-4, min_lr=1.5e-5, warmup=4000, betas=(0.9, 0.95),
            weight_decay=0.1, clip=1.0, times="uniform", ema=0.0))


def paper_autoencoder() -> VAETrainConfig:
    """Pictures of 256x256 to latents of 32x32x8, the paper's weights, its discriminator from step 50,000, 1 M steps.

    The pictures are those of --data.folder. For all terms of the loss name --losses.perceptual-model and
    --losses.identity-model; what has no model is left out.

    The layers are those of Stable Diffusion's first autoencoder, of three halvings: 83.7 M parameters, the nearest
    off-the-shelf shape to the paper's 86 M. Batch, learning rate and decay are not in the paper; they are latent
    diffusion's (arXiv:2112.10752).
    """
    return VAETrainConfig(
        out=Path("runs/vae-paper"), save_every=5000, autocast=True, data=PictureFolderSettings(size=256),
        model=AutoencoderSettings(latent_channels=8, widths=(128, 256, 512, 512), blocks=2, groups=32, attention=True),
        losses=LossSettings(adversarial_from=50_000),
        optim=VAEOptimSettings(
            steps=1_000_000, batch=32, lr=1e-4, min_lr=1e-5, warmup=5000, betas=(0.5, 0.9), ema=0.9999))


def paper_sampling(guidance: float = 3.0) -> dict:
    """Return how the paper draws, as options of `generate` and `draw`.

    It takes 250 steps of a model trained with 1000, and the likeliest token of the text.
    Guidance is 3 in its ablations (section 4.3) and 5 in its comparisons (section 4.2).
    """
    return {"steps": 250, "sampler": "ddim", "guidance": guidance, "temperature": 0.0}
