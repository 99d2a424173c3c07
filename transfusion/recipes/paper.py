"""The models and the training of the paper (arXiv:2408.11039), as settings.

    size     layers  hidden  heads   parameters    linear image layers   U-Net, of channels (c, 2c), 3 blocks
    0.16B      16      768     12      162.4 M       0.9 M   0.5 %        c = 640   260.0 M   160 % (106.1 %)
    0.37B      24     1024     16      373.9 M       1.4 M   0.4 %        c = 640   264.1 M    71 % (71.3 %)
    0.76B      24     1536     24      777.9 M       2.9 M   0.4 %        c = 640   272.8 M    35 % (35.5 %)
    1.4B       24     2048     16     1364.3 M       4.9 M   0.4 %        c = 640   282.0 M    21 % (19.3 %)
    7B         32     4096     32     6738.4 M      18.2 M   0.3 %        c = 576   271.0 M   4.0 % (3.8 %)

Layers, hidden sizes and heads are table 2's. Parameters are the decoder's with both vocabulary matrices, whose sum the sizes are named after (within
4 %; without the matrices 0.16B would be 0.11). Image layers are all else, most of which is the embedding of the timestep where they are linear;
table 7's percentages hold. Its U-Net column stands in brackets: the paper gives 0.27 B for every size but no channels, so they are chosen here for
that sum and meet it within 4.5 %. 106.1 % of the smallest model would be 0.17 B and 3.8 % of the largest 0.26 B: there both cannot hold.
"""
import difflib
from typing import NamedTuple

from transformers import LlamaConfig

from transfusion.data.batches import DataSettings
from transfusion.model.config import TransfusionConfig
from transfusion.train.transfusion import OptimSettings

VOCABULARY = 32_000


class Size(NamedTuple):
    """A row of table 2, and what its U-Net image layers are made of."""

    layers: int
    hidden: int
    heads: int
    unet_channels: tuple[int, int] = (640, 1280)


PAPER = {"0.16B": Size(16, 768, 12), "0.37B": Size(24, 1024, 16), "0.76B": Size(24, 1536, 24), "1.4B": Size(24, 2048, 16),
         "7B": Size(32, 4096, 32, (576, 1152))}


def mlp_width(hidden: int) -> int:
    """Return 8/3 of `hidden`, rounded up to a multiple of 256: Llama's SwiGLU (arXiv:2302.13971, section 2.2), 11,008 for 4096."""
    return -(-(8 * hidden // 3) // 256) * 256


def paper(size: str, image_layers: str = "linear") -> TransfusionConfig:
    """Return a model of the paper: Llama 2's kind, 4096 positions, cosine eps-prediction, lambda 5.

    Pictures of 256x256 are VAE latents of 8x32x32 in 256 patches. BOI and EOI are the tokens behind Llama 2's 32,000.

    Args:
        size: a name in `PAPER`.
        image_layers: "linear" or "unet", the paper's two; "dit" fits as everywhere.

    Raises:
        ValueError: a size or image layers that do not exist.
    """
    if size not in PAPER:
        near = difflib.get_close_matches(size, PAPER, n=1)
        raise ValueError(f"paper: size is {size!r}; {', '.join(PAPER)} fit" + (f"; did you mean {near[0]}?" if near else ""))
    layers, hidden, heads, unet_channels = PAPER[size]
    text_config = LlamaConfig(
        vocab_size=VOCABULARY + 2, hidden_size=hidden, intermediate_size=mlp_width(hidden), num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    return TransfusionConfig(text_config=text_config, image_channels=8, image_size=(32, 32), patch_size=2, image_layers=image_layers,
                             unet_channels=unet_channels, unet_blocks=3, objective="eps", diffusion_weight=5.0, boi_token_id=VOCABULARY,
                             eoi_token_id=VOCABULARY + 1)


def paper_training() -> tuple[OptimSettings, DataSettings]:
    """Return how the paper trained for its comparisons: 250,000 steps of 2 M tokens, captions first 80 % of the time (section 4.1).

    Images before their captions are noised to half the time at most (section 4.3.4). AdamW's epsilon, 1e-8, is PyTorch's own. The paper names no
    average of weights and no share of captions left out for guidance (`caption_dropout` keeps its default); its pictures are not public.
    """
    optim = OptimSettings(steps=250_000, rows=512, seq_len=4096, lr=3e-4, min_lr=1.5e-5, warmup=4000, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0,
                          times="uniform", ema=0.0)
    return optim, DataSettings(caption_first=0.8, noise_limit=0.5)


def paper_sampling(guidance: float = 3.0) -> dict:
    """Return how the paper draws, as options of `generate` and `draw`: 250 steps of a model trained with 1000, text greedily.

    Guidance is 3 in its ablations (section 4.3) and 5 in its comparisons (section 4.2).
    """
    return {"steps": 250, "sampler": "ddim", "guidance": guidance, "temperature": 0.0}
