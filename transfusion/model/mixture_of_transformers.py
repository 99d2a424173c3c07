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

from torch import Tensor
from transformers import DynamicCache

from tfkernels import TransfusionMask, modulated_rms_norm
from transfusion.model.backbone import AdaLNBackbone
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
        """Copy the decoder's weights into the image layers again, as after loading a checkpoint that has none."""
        decoder = self.decoder.get_decoder()
        self.image_layers.load_state_dict(decoder.layers.state_dict())
        self.image_norm.load_state_dict(decoder.norm.state_dict())

    def load_text(self, decoder) -> None:
        """As `Backbone.load_text`; the image layers start from the same weights."""
        super().load_text(decoder)
        self.start_from_text()

    def forward(self, x: Tensor, positions: Tensor, mask: TransfusionMask, condition: Tensor, modality: Modality,
                cache: DynamicCache | None = None) -> Tensor:
        """As `AdaLNBackbone.forward`; in between, everything is a pair (of text, of patches)."""
        decoder = self.decoder.get_decoder()
        rotations = tuple(zip(*map(modality.split, self.rotation(x, positions))))          # (cos, sin) of each modality
        tables, entries = self.tables(condition)
        layers = list(zip(decoder.layers, self.image_layers))
        norms = [tuple(layer.input_layernorm for layer in pair) for pair in layers] + [(decoder.norm, self.image_norm)]
        x, images = modality.split(x), modality.split(modality.image_ids)
        normed = [modulated_rms_norm(rows, norm.weight, *entries[0], image, eps=norm.variance_epsilon)
                  for rows, norm, image in zip(x, norms[0], images)]
        for pair, table, norm, entry, own in zip(layers, tables, norms[1:], entries[1:], self.layer_masks(mask)):
            x, normed = self.run(pair, x, normed, table, norm, entry, rotations, own, images, modality, cache)
        return modality.join(*normed)

    def block(self, layers, x, normed, table: Tensor, next_norms, next_entry, rotations, mask, images,
              modality: Modality, cache):
        """As `AdaLNBackbone.block`, of pairs."""
        attentions = [layer.self_attn for layer in layers]
        projected = zip(*map(self.project, attentions, normed, rotations))                 # pairs of (1, H, rows, D)
        q, k, v = (modality.join(*(rows.transpose(1, 2) for rows in pair)).transpose(1, 2) for pair in projected)
        mixed = modality.split(self.attend(attentions[0], q, k, v, mask, cache))
        branches = [attention.o_proj(rows) for attention, rows in zip(attentions, mixed)]
        added = [self.add(layer, rows, branch, table, norm, next_entry, image)
                 for layer, rows, branch, norm, image in zip(layers, x, branches, next_norms, images)]
        return tuple(zip(*added))                                                          # (residuals), (normed)
