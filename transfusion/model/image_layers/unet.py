"""U-Net image layers: down blocks in front of the decoder, up blocks behind it, skips around it.

arXiv:2408.11039, section 2.2. Residual blocks are diffusers', with the timestep added inside (arXiv:2006.11239) and
plain norms over all channels in place of adaptive ones (the paper's footnote 7). Each level halves the sides until a
patch is one position, whose channels become a token. Images of one grid run as one batch.
"""
from collections.abc import Iterator

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tfkernels import patchify, unpatchify
from transfusion.model.image_layers.heads import ImageHead
from transfusion.sequence import ImageLayout


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""


class WordConnector(nn.Module):
    """Maps (N, D, H, W) to (N, C, H, W): at each position a mean of K vectors of C numbers, weighted by a softmax.

    While the vectors are a language model's embeddings of K words, what is written reads as text: AlignVLM's connector
    (arXiv:2502.01341), of some words in place of all. They are weights like others and start at random.
    """

    def __init__(self, channels: int, hidden: int, count: int):
        super().__init__()
        self.scores = nn.Conv2d(channels, count, 1)
        self.vectors = nn.Conv2d(count, hidden, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.vectors(self.scores(maps).softmax(1))

    @property
    def words(self) -> Tensor:
        """The K vectors (K, C)."""
        return self.vectors.weight[:, :, 0, 0].T


def _block(channels_in: int, channels: int, hidden: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels=channels_in, out_channels=channels, temb_channels=hidden, groups=1, eps=1e-6)


class UNetDown(nn.Module):
    """Latents to tokens: residual blocks at each resolution, strided convolutions between, and a linear layer or a
    `WordConnector`.
    """

    def __init__(self, config, hidden: int):
        super().__init__()
        channels = config.unet_channels
        self.patch_size = config.patch_size
        self.input = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.levels = nn.ModuleList(
            nn.ModuleList(_block(widths[i] if n == 0 else c, c, hidden) for n in range(config.unet_blocks))
            for i, c in enumerate(channels))
        self.down = nn.ModuleList(  # under its default name it has its weights twice
            Downsample2D(c, use_conv=True, name="op") for c in channels[:-1])
        self.output = (nn.Conv2d(channels[-1], hidden, 1) if config.unet_words is None else
                       WordConnector(channels[-1], hidden, config.unet_words))

    def forward(self, hidden: Tensor, patches: Tensor, condition: Tensor, layout: ImageLayout,
                places: Tensor) -> tuple[Tensor, list]:
        """Write the tokens of patches (P, patch_dim) to their places (P,) in `hidden` (T, C).

        The list is of what skips the decoder: each grid's maps, fine to coarse.
        """
        skips = []
        for members, maps in self.features(patches, condition, layout):
            tokens = patchify(self.output(maps[-1]), 1).to(hidden.dtype)
            hidden = hidden.index_copy(0, places[members], tokens)
            skips.append(maps)
        return hidden, skips

    def features(self, patches: Tensor, condition: Tensor, layout: ImageLayout) -> Iterator[tuple[Tensor, list]]:
        """For the images of each grid, the places of their patches in `patches` and their maps, fine to coarse."""
        for (rows, columns), image_ids, members in layout.by_grid():
            maps, time, tokens = [], condition[image_ids], patches[members].to(condition.dtype)
            x = self.input(unpatchify(tokens, self.patch_size, rows * self.patch_size, columns * self.patch_size))
            for level, down in zip(self.levels, [*self.down, None]):
                for block in level:
                    x = block(x, time)
                maps.append(x)
                x = x if down is None else down(x)
            yield members, maps


class UNetUp(ImageHead):
    """Tokens to predictions: the mirror image of `UNetDown`; each resolution is joined by what skipped the decoder."""

    def __init__(self, config, hidden: int):
        super().__init__()
        channels = config.unet_channels
        self.patch_size = config.patch_size
        self.input = nn.Conv2d(hidden, channels[-1], 1)
        self.levels = nn.ModuleList(
            nn.ModuleList(_block(2 * c if n == 0 else c, c, hidden) for n in range(config.unet_blocks))
            for c in channels)
        self.up = nn.ModuleList(
            Upsample2D(wide, use_conv=True, out_channels=narrow) for narrow, wide in zip(channels, channels[1:]))
        self.norm = nn.GroupNorm(1, channels[0], eps=1e-6)
        self.output = ZeroConv2d(channels[0], config.image_channels, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor, layout: ImageLayout, skips: list) -> Tensor:
        """As `ImageHead.forward`."""
        out = x.new_zeros(len(x), self.output.out_channels * self.patch_size**2)
        if not len(x):
            return out + x.sum()  # 0, of x: where ranks share rows, the backward of no patches is a message, too
        for ((rows, columns), image_ids, members), maps in zip(layout.by_grid(), skips):
            time = condition[image_ids]
            y = self.input(unpatchify(x[members], 1, rows, columns))
            for level, up, skip in zip(reversed(self.levels), [*reversed(self.up), None], reversed(maps)):
                y = torch.cat([y, skip], 1)
                for block in level:
                    y = block(y, time)
                y = y if up is None else up(y)
            y = self.output(nn.functional.silu(self.norm(y)))
            out = out.index_copy(0, members, patchify(y, self.patch_size).to(out.dtype))
        return out
