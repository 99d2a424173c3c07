"""From parts to one document: its tokens, which of them are text targets, and its images' patches.

A document is BOS, its parts in order (an image is BOI, its patches in raster order, EOI), and EOS. Text that begins
with BOS, as a chat template's does, gets no second one; other names of special tokens in a text are plain characters:
see `Text`. Text loss stands on every token that follows text, EOI or BOS in the same document, never where the input
is BOI or a patch (arXiv:2408.11039, footnote 8). The EOS of an image without any text is no target: its caption was
left out for guidance, and the model must not learn that nothing can be said about an image.

What follows an image reads it as it is noised (the paper), or clean: `with_clean_copies` lays an image out as BOI,
noised patches, clean patches, EOI. Nothing else sees the noised patches; the clean ones take their positions, time 0
and no loss. So all that follows has the position and the context that it has in sampling, where only the finished
image stands before it.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.sequence.parts import Image, Part, Text


class Document(NamedTuple):
    """One encoded document.

    tokens: ids (S,).
    targets: (S,), whether each is a text target.
    images: (start, patches, grid, image_first) of each; the last says whether it stands before any text.
    hidden: numbers of the images that only their own tokens see; the image after each one is its clean copy.
    read: numbers of the images that are only read: clean, and without a loss.
    """

    tokens: list[int]
    targets: list[bool]
    images: list[tuple[int, Tensor, tuple[int, int], bool]]
    hidden: tuple[int, ...] = ()
    read: tuple[int, ...] = ()

    def positions(self) -> list[int]:
        """Each token's position: from 0, a clean copy at those of its noised one."""
        positions = list(range(len(self.tokens)))
        for number in self.hidden:
            start, patches, *_ = self.images[number + 1]
            positions[start:] = [p - len(patches) for p in positions[start:]]
        return positions


def encode(parts: list[Part], tokenizer, config, *, end: bool = True) -> Document:
    """Turn one document's parts into tokens, targets and patches; `end=False` leaves EOS out (a prompt).

    Raises:
        ValueError: parts that are none, text that is no str or cannot be spelled without special tokens, images that do
            not fit the model (not floating point, not finite, other channels, no or broken patches, a gradient), or BOI
            and EOI that are not tokens of their own.
    """
    if not isinstance(parts, list | tuple):
        raise ValueError(f"encode: parts is a {type(parts).__name__}; a list of Text and Image fits, "
                         "e.g. [Text('a handwritten seven')]")
    if not parts:
        raise ValueError("encode: parts is empty; at least one Text or Image fits, e.g. [Text('a handwritten seven')]")
    boi, eoi, bos, eos = config.boi_token_id, config.eoi_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None:
        raise ValueError("encode: the tokenizer has no BOS, with which documents begin; set tokenizer.bos_token, such "
                         "as to its eos_token")
    if boi == eoi or boi in (bos, eos) or eoi in (bos, eos):
        raise ValueError(f"encode: boi_token_id is {boi} and eoi_token_id {eoi}, BOS and EOS are {bos} and {eos}; two "
                         "tokens of their own fit")
    tokens, targets, images, read, text_seen = [bos], [False], [], (), False
    for part in parts:
        if isinstance(part, Text):
            ids = part.token_ids(tokenizer, config)
            if list(ids[:1]) == tokens:  # a second BOS
                ids = ids[1:]
            tokens += ids
            targets += [part.loss] * len(ids)
            text_seen = text_seen or bool(ids)
        elif isinstance(part, Image):
            latent = _host_latent(part, config)
            size = config.patch_size
            patches = torch.nn.functional.pixel_unshuffle(latent, size).flatten(1).T  # tfkernels.patchify, cheaper
            grid = latent.shape[1] // size, latent.shape[2] // size
            read += () if part.loss else (len(images),)
            images.append((len(tokens) + 1, patches, grid, not text_seen))
            tokens += [boi] + [eoi] * (len(patches) + 1)
            targets += [part.loss] + [False] * (len(patches) + 1)
        else:
            raise ValueError(f"encode: a part is a {type(part).__name__}; transfusion.Text or transfusion.Image fits")
    if end:
        tokens.append(eos)
        targets.append(text_seen)
    return Document(tokens, targets, images, read=read)


def with_clean_copies(document: Document) -> Document:
    """Put a clean copy behind the patches of each image that is drawn and has a text target behind it.

    Such a target is text, the BOI of another image or, in a document with text, EOS. These are BAGEL's noised and
    clean tokens (arXiv:2505.14683, "Generalized Causal Attention"), between one BOI and one EOI. EOS alone is reason
    enough for a copy: if a noised image were read only where the document ends, noise would announce the end, and in
    sampling the image that is read has none.
    """
    tokens, targets, images, hidden, read = list(document.tokens), list(document.targets), [], [], []
    for number, (start, patches, grid, image_first) in enumerate(document.images):
        start += len(tokens) - len(document.tokens)  # behind the copies so far
        stop = start + len(patches)
        images.append((start, patches, grid, image_first))
        if number in document.read:
            read.append(len(images) - 1)
        elif any(targets[stop:]):
            hidden.append(len(images) - 1)
            images.append((stop, patches, grid, image_first))
            tokens[stop:stop], targets[stop:stop] = tokens[start:stop], [False] * len(patches)
    return Document(tokens, targets, images, tuple(hidden), tuple(read))


def _host_latent(image: Image, config) -> Tensor:
    """The image's latent as (channels, height, width) float32 on the host; on the way it is checked."""
    x, size, channels = image.latent, config.patch_size, config.image_channels
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        raise ValueError(f"Image: latent is a {kind}; a floating-point tensor ({channels}, height, width) fits")
    shape = tuple(x.shape)
    if len(shape) != 3 or shape[0] != channels:
        raise ValueError(f"Image: latent has shape {shape}; ({channels}, height, width) fits this model")
    if min(shape[1:]) < size or shape[1] % size or shape[2] % size:
        raise ValueError(f"Image: latent is {shape[1]}x{shape[2]} and the patch size {size}; multiples of the patch "
                         "size fit; resize or crop the image")
    if not x.is_floating_point():
        raise ValueError(f"Image: latent is of {x.dtype}; floating point around [-1, 1] fits; of bytes, "
                         "latent.float() / 127.5 - 1")
    if x.requires_grad:
        raise ValueError("Image: latent requires a gradient, which nothing computes; a tensor without one fits; "
                         "pass latent.detach()")
    if x.is_meta:
        raise ValueError("Image: latent is on the meta device and has no values; a tensor with values fits")
    x = x.to("cpu", torch.float32)
    if not x.isfinite().all():
        raise ValueError("Image: latent has values that are NaN or infinite; finite numbers around [-1, 1] fit")
    return x
