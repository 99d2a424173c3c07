"""Mixture of transformers: text and patches go through weights of their own and see each other in one attention.

Patches have norms, projections and MLPs of their own; text keeps the decoder's. For m = text or image:

    q, k, v = project_m(norm_m(x))
    x <- x + gate * output_m(attention(q, k, v))
    x <- x + gate * mlp_m(norm_m(x))

There is no router, as a mixture of experts has one: a token's modality says which weights are its own. Sources:
Mixture-of-Transformers, arXiv:2411.04996 (section 2.2, algorithm 1), and LMFusion, arXiv:2412.15188, which starts
both sets of weights from a language model and freezes those of text: `backbone.decoder.requires_grad_(False)`. Norms
and residuals of patches are modulated as in `AdaLNBackbone`, those of text never are. Outside attention, text and
patches are two separate tensors, so that each weight takes part in one matrix product; they are joined for attention
alone.
"""
import copy
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from transformers import DynamicCache

from tfkernels import TransfusionMask
from tfkernels.parallel import SharedMask
from transfusion.model.backbone import AdaLNBackbone, Modulation, Stream, add_and_norm, attend
from transfusion.sequence import Modality


class MixtureOfTransformersBackbone(AdaLNBackbone):
    """An `AdaLNBackbone` whose patches go through `image_layers` and `image_norm`; the decoder stays that of text.

    Both begin as copies of the decoder's layers and norm.
    """

    def __init__(self, text_config):
        super().__init__(text_config)
        decoder = self.decoder.get_decoder()
        self.image_layers, self.image_norm = copy.deepcopy(decoder.layers), copy.deepcopy(decoder.norm)

    def start_from_text(self) -> None:
        """Copy the decoder's weights into the image layers again, as loading a checkpoint that has none does."""
        decoder = self.decoder.get_decoder()
        self.image_layers.load_state_dict(decoder.layers.state_dict())
        self.image_norm.load_state_dict(decoder.norm.state_dict())

    def blocks(self) -> list[nn.Module]:
        """As `Backbone.blocks`, of text and then of patches."""
        return [*super().blocks(), *self.image_layers]

    def load_text(self, decoder) -> None:
        """As `Backbone.load_text`; the image layers start from the same weights."""
        super().load_text(decoder)
        self.start_from_text()

    def forward(self, x: Tensor, positions: Tensor, mask: TransfusionMask | SharedMask, condition: Tensor,
                modality: Modality, cache: DynamicCache | None = None) -> Tensor:
        """As `AdaLNBackbone.forward`; in between, everything is a pair (of text, of patches)."""
        decoder = self.decoder.get_decoder()
        rotations = tuple(zip(*map(modality.split, self.rotation(x, positions))))          # (cos, sin) of each modality
        tables, entries = self.tables(condition)
        images = modality.split(modality.image_ids)
        streams = tuple(map(Stream, modality.split(x)))
        for *layers, table, entry, own in zip(decoder.layers, self.image_layers, tables, entries,
                                              self.layer_masks(mask)):
            mixing = partial(attend, mask=own, cache=cache)
            streams = self.run(run_pair, layers, streams, table, entry, rotations, images, modality, mixing)
        normed = [add_and_norm(stream, norm, entries[-1], image)[1]
                  for stream, norm, image in zip(streams, (decoder.norm, self.image_norm), images)]
        return modality.join(*normed)


def run_pair(layers, streams: tuple[Stream, Stream], table: Tensor, entry: tuple[Tensor, Tensor], rotations, images,
             modality: Modality, mix: Callable[..., Tensor]) -> tuple[Stream, Stream]:
    """Run the layer of text and that of patches, which meet in one attention.

    Each is called once and reads its parameters inside this call: text's layer, where it comes to its attention, calls
    that of patches, which joins the rows of both.
    """
    text_layer, image_layer = layers
    text_rotation, image_rotation = rotations
    text_ids, image_ids = images
    image_stream = None

    def mix_both(attention, *of_text: Tensor) -> Tensor:
        nonlocal image_stream
        text = None

        def mix_joined(_, *of_images: Tensor) -> Tensor:
            nonlocal text
            q, k, v = (modality.join(*(rows.transpose(1, 2) for rows in pair)).transpose(1, 2)
                       for pair in zip(of_text, of_images))                               # pairs of (1, H, rows, D)
            text, image = modality.split(mix(attention, q, k, v))
            return image

        image_stream = image_layer(streams[1], Modulation(entry, table, image_rotation, image_ids, mix_joined))
        return text

    text_stream = text_layer(streams[0], Modulation(entry, table, text_rotation, text_ids, mix_both))
    return text_stream, image_stream
