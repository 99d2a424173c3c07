"""The other ways to run the same model: its weights in plain PyTorch, and transfusion-pytorch of its width and depth.
"""
import random

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.batches import PackedBatch, dense_definition
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Document, Sequence, lay_out


def training_sequence(config, rows: int, seq_len: int, seed: int = 0) -> Sequence:
    """Rows filled with documents of a caption and an image, as many text tokens as patches on average.

    What is left at a row's end is text.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    height, width = (side // config.patch_size for side in config.image_size)
    text_config = config.text_config

    def document(room: int) -> Document:
        count, words = height * width, draw.randint(height * width // 4, 7 * height * width // 4)
        fits = words + count + 4 <= room
        words = words if fits else room - 2
        tokens = torch.randint(5, config.boi_token_id, (words,), generator=generator).tolist()
        tokens, targets, images = [text_config.bos_token_id, *tokens], [False] + [True] * words, []
        if fits:
            patches = torch.randn(count, config.patch_dim, generator=generator)
            images = [(len(tokens) + 1, patches, (height, width), False)]
            tokens += [config.boi_token_id] + [config.eoi_token_id] * (count + 1)
            targets += [True] + [False] * (count + 1)
        return Document([*tokens, text_config.eos_token_id], [*targets, True], images)

    packed = []
    for _ in range(rows):
        packed.append([])
        while (room := seq_len - sum(len(d.tokens) for d in packed[-1])) > 2:
            packed[-1].append(document(room))
    return lay_out(packed, seq_len, config.patch_dim)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every matrix that starts at zero small weights: zeros would let no gradient through."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for p in model.parameters():
        if not p.detach().any():
            torch.nn.init.normal_(p, std=0.02, generator=generator)


def dense_mask(sequence: Sequence) -> Tensor:
    """(B, 1, S, S) bool, made on the device from the ids of documents and images."""
    return dense_definition(_ids(sequence))


def block_mask(sequence: Sequence, create):
    """FlexAttention's BlockMask from the same ids; `create` is create_block_mask, compiled."""
    documents, images = sequence.documents, sequence.image_ids

    def visible(b, h, i, j):
        one_image = (images[b, i] == images[b, j]) & (images[b, i] >= 0)
        return (documents[b, i] == documents[b, j]) & ((j <= i) | one_image)

    rows, seq_len = documents.shape
    return create(visible, rows, None, seq_len, seq_len, device=documents.device.type)


def plain_hidden(
    model: Transfusion, tokens: Tensor, positions: Tensor, patches: Tensor, patch_places: Tensor, timestep: Tensor,
    mask, attention: str,
) -> Tensor:
    """Hidden states (B * S, C) of the unmodified decoder under transformers' own `attention`.

    Patches and timestep are (P, patch_dim), added as in the paper.
    """
    decoder = model.backbone.decoder
    decoder.config._attn_implementation = attention
    embedded = model.patch_embedding.linear(patches + timestep)
    x = decoder.get_input_embeddings()(tokens).flatten(0, 1)
    x = x.index_copy(0, patch_places, embedded.to(x.dtype)).view(*tokens.shape, -1)
    output = decoder.get_decoder()(inputs_embeds=x, position_ids=positions, attention_mask=mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def plain_loss(
    model: Transfusion, sequence: Sequence, times: Tensor, mask, attention: str, eps: Tensor | None = None
) -> Tensor:
    """The loss of `model(sequence, times, seed)` in plain PyTorch, for linear image layers and images of one size.

    Logits of text targets alone are made, not all. The noise is drawn where `eps` (P, patch_dim) is not given.
    """
    image, x0 = sequence.layout.image_ids, sequence.patches
    eps = torch.randn_like(x0) if eps is None else eps
    pairs = model.objective.path(times), model.objective.target(times)
    (signal, noise), (p, q) = ((a[image][:, None] for a in pair) for pair in pairs)
    timestep = model.patch_embedding.time(model.timestep(times))[image]
    noised = signal * x0 + noise * eps
    x = plain_hidden(
        model, sequence.tokens, sequence.positions, noised, sequence.patch_places, timestep, mask, attention)
    wide = torch.promote_types(x.dtype, torch.float32)
    text = F.cross_entropy(model.get_output_embeddings()(x[sequence.target_places]).to(wide), sequence.text_targets)
    prediction = model.image_head.linear(x[sequence.patch_places]).to(wide)
    return text + model.config.diffusion_weight * (prediction - (p * x0 + q * eps)).square().mean()


def transfusion_pytorch(config, device: str, *, flex: bool):
    """lucidrains' model of as many layers, heads and columns, its feed-forwards as wide as ours.

    Raises:
        ModuleNotFoundError: transfusion-pytorch is not installed.
    """
    from transfusion_pytorch import Transfusion as Peer

    text, (height, width) = config.text_config, (side // config.patch_size for side in config.image_size)
    transformer = {
        "dim": text.hidden_size, "depth": text.num_hidden_layers, "heads": text.num_attention_heads,
        "dim_head": text.head_dim, "ff_expansion_factor": 1.5 * text.intermediate_size / text.hidden_size,
        "use_flex_attn": flex}
    model = Peer(num_text_tokens=text.vocab_size, dim_latent=config.patch_dim,
                 modality_default_shape=(height * width,), transformer=transformer)
    return model.to(device)


def peer_samples(sequence: Sequence) -> list[list]:
    """Packed rows as transfusion-pytorch takes them: each a list of text tokens and images, which it joins itself.

    The borders of documents are lost.
    """
    samples, ends, image = [], sequence.layout.offsets.tolist(), 0
    for tokens, numbers in zip(sequence.tokens, sequence.image_ids):
        starts = [int((numbers == n).nonzero()[0]) for n in numbers.unique().tolist() if n >= 0]
        sample, at = [], 0
        for start in starts:
            patches = sequence.patches[ends[image]:ends[image + 1]]
            sample += [tokens[at:start - 1], (0, patches)]  # it writes its own BOI and EOI
            at, image = start + ends[image] - ends[image - 1] + 1, image + 1
        samples.append([*sample, tokens[at:]] if at < len(tokens) else sample)
    return samples


def _ids(sequence: Sequence) -> PackedBatch:
    return PackedBatch([], sequence.documents, sequence.image_ids + 1, torch.zeros_like(sequence.image_ids))
