"""What a Transfusion checkpoint is: a Hugging Face decoder's configuration plus the image side's."""
from transformers import AutoConfig, PreTrainedConfig

from transfusion.objective import OBJECTIVES

BACKBONES = ("decoder", "adaln")


class TransfusionConfig(PreTrainedConfig):
    """Configuration of `Transfusion`.

    Args:
        text_config: configuration of any causal language model in transformers (a config or its dict); a tiny Llama by default.
        image_channels: channels of an image or of its VAE latent.
        image_size: (height, width) that `generate` draws when not told otherwise.
        patch_size: side of a square patch; an image's height and width are multiples of it.
        backbone: "decoder", the language model as it is (the paper), or "adaln", whose norms and residuals each image's timestep modulates.
        objective: what the image head predicts: "eps" (the paper, arXiv:2408.11039), "v" or "flow".
        diffusion_weight: lambda in loss = text + lambda * diffusion (the paper uses 5).
        boi_token_id, eoi_token_id: the tokens around an image.
    """

    model_type = "transfusion"
    sub_configs = {"text_config": AutoConfig}

    def __init__(self, text_config=None, image_channels=1, image_size=(8, 8), patch_size=2, backbone="decoder", objective="flow",
                 diffusion_weight=5.0, boi_token_id=3, eoi_token_id=4, **kwargs):
        if text_config is None:
            text_config = {"model_type": "llama"}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if objective not in OBJECTIVES:
            raise ValueError(f"TransfusionConfig: objective is {objective!r}; one of {', '.join(map(repr, OBJECTIVES))} fits")
        if backbone not in BACKBONES:
            raise ValueError(f"TransfusionConfig: backbone is {backbone!r}; one of {', '.join(map(repr, BACKBONES))} fits")
        if patch_size < 1 or any(side % patch_size for side in image_size):
            raise ValueError(f"TransfusionConfig: image_size is {tuple(image_size)} and patch_size {patch_size}; multiples of the patch size fit")
        self.text_config = text_config
        self.image_channels = image_channels
        self.image_size = list(image_size)
        self.patch_size = patch_size
        self.backbone = backbone
        self.objective = objective
        self.diffusion_weight = diffusion_weight
        self.boi_token_id = boi_token_id
        self.eoi_token_id = eoi_token_id
        super().__init__(**kwargs)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.image_channels * self.patch_size**2
