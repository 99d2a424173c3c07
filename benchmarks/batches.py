"""Packed Transfusion batches: documents of text and images, one row of tokens, drawn from a seed."""
import math
import random
from typing import NamedTuple

import torch
from torch import Tensor


class PackedBatch(NamedTuple):
    """One row of tokens as each mask builder wants it."""

    spans: list[list[tuple[int, int]]]  # (start, end) of every image
    documents: Tensor                   # (1, S) document of each token
    image_ids: Tensor                   # (1, S) 1, 2, ... in images, 0 in text
    hidden_ids: Tensor                  # (1, S) an image's id where only itself may see it (a noised copy), else 0

    @property
    def hidden(self) -> list[list[tuple[int, int]]] | None:
        """The spans of hidden images, as `from_spans` takes them; None where there are none."""
        first = [self.hidden_ids[0, start].item() for start, _ in self.spans[0]]
        return [[span for span, number in zip(self.spans[0], first) if number]] if any(first) else None


def packed_batch(
    seq_len: int, image_tokens: int, seed: int = 0, device: str = "cpu", hidden: bool = False
) -> PackedBatch:
    """Fill `seq_len` tokens with documents of 512 to 8192 tokens, log-uniform.

    In a document, runs of 16 to 256 text tokens and whole images take turns. With `hidden` every other image, beginning
    with the first, is one that only itself may see.
    """
    draw = random.Random(seed)
    spans, documents, position, document = [], [], 0, 0
    while position < seq_len:
        end = min(seq_len, position + round(math.exp(draw.uniform(math.log(512), math.log(8192)))))
        documents += [document] * (end - position)
        document += 1
        while position < end:
            position = min(end, position + draw.randint(16, 256))
            if position + image_tokens <= end:
                spans.append((position, position + image_tokens))
                position += image_tokens
    image_ids = torch.zeros(1, seq_len, dtype=torch.int32)
    for number, (start, stop) in enumerate(spans, 1):
        image_ids[0, start:stop] = number
    hidden_ids = image_ids * (image_ids % 2) * hidden
    documents = torch.tensor([documents], dtype=torch.int32, device=device)
    return PackedBatch([spans], documents, image_ids.to(device), hidden_ids.to(device))


def even_batch(seq_len: int, document_tokens: int, image_tokens: int) -> PackedBatch:
    """Fill `seq_len` tokens on the CPU with documents of one length, each with an image in its middle."""
    starts = range((document_tokens - image_tokens) // 2, seq_len, document_tokens)
    spans = [(at, at + image_tokens) for at in starts if at + image_tokens <= seq_len]
    documents = (torch.arange(seq_len, dtype=torch.int32) // document_tokens)[None]
    image_ids = torch.zeros(1, seq_len, dtype=torch.int32)
    for number, (start, stop) in enumerate(spans, 1):
        image_ids[0, start:stop] = number
    return PackedBatch([spans], documents, image_ids, torch.zeros_like(image_ids))


def dense_definition(batch: PackedBatch, start: int = 0, stop: int | None = None) -> Tensor:
    """(1, 1, stop - start, S) bool: the batch's mask for the queries [start, stop), straight from the ids."""
    documents, images = batch.documents, batch.image_ids
    keys = torch.arange(documents.shape[1], device=documents.device)
    rows = keys[start:stop, None]
    own, image = documents[:, start:stop, None], images[:, start:stop, None]
    secret, asking = batch.hidden_ids[:, None], batch.hidden_ids[:, start:stop, None]
    seen = (own == documents[:, None]) & ((keys <= rows) | ((image == images[:, None]) & (image > 0)))
    return (seen & ((secret == 0) | (secret == asking)))[:, None]
