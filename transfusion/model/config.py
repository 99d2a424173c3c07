"""What a Transfusion checkpoint is: a Hugging Face decoder's configuration plus the image side's."""
import difflib
import inspect
from dataclasses import fields

from transformers import AutoConfig, PreTrainedConfig

from transfusion.diffusion.objective import OBJECTIVES
from transfusion.values import is_number, is_pair, is_whole, nearest

BACKBONES = ("decoder", "adaln", "experts")
POSITIONS = ("1d", "2d")
IMAGE_LAYERS = ("linear", "dit", "unet")
IMAGE_ATTENTION = ("bidirectional", "causal")
_COMMON = {field.name for field in fields(PreTrainedConfig)} | {  # what any configuration of transformers may hold, besides names with a leading underscore
    "attn_implementation", "auto_map", "bos_token_id", "decoder_start_token_id", "eos_token_id", "experts_implementation", "is_decoder", "label2id",
    "model_type", "name_or_path", "num_labels", "output_attentions", "pad_token_id", "quantization_config", "sep_token_id", "tie_word_embeddings",
    "tokenizer_class", "torch_dtype", "use_cache"}


class TransfusionConfig(PreTrainedConfig):
    """Configuration of `Transfusion`.

    Args:
        text_config: configuration of any causal language model in transformers (a config or its dict); transformers' default Llama, of 7B, where none is given.
        image_channels: channels of an image or of its VAE latent.
        image_size: (height, width) that `generate` draws when not told otherwise.
        patch_size: side of a square patch; an image's height and width are multiples of it.
        backbone: "decoder", the language model as it is (the paper), "adaln", whose norms and residuals each image's timestep modulates, or "experts",
            the same with weights of their own for patches in all but attention (LMFusion, arXiv:2412.15188).
        positions: of patches, "1d", one after the other like text (the paper), or "2d", a row and a column (see `tfkernels.grid_positions`; not
            with "decoder").
        image_layers: in front of and behind the decoder: "linear" (the paper), "dit", linear in and a modulated final layer out, or "unet" (the paper's other
            choice), down blocks in, up blocks out and skips between.
        unet_channels, unet_blocks: of "unet": channels at each resolution, from the latent's down to one position a patch, and residual blocks at each.
        image_attention: inside an image, "bidirectional" (the paper) or "causal", the same as text (its ablation, table 5).
        objective: what the image head predicts: "eps" (the paper, arXiv:2408.11039), "v", "flow" or "x0".
        time_shift_tokens: patches of an image whose times are not shifted; larger images get more noise (see `transfusion.diffusion.objective.shift_times`); None: none.
        diffusion_weight: lambda in loss = text + lambda * diffusion (the paper uses 5).
        boi_token_id, eoi_token_id: the tokens around an image.
    """

    model_type = "transfusion"
    sub_configs = {"text_config": AutoConfig}

    def __init__(self, text_config=None, image_channels=1, image_size=(8, 8), patch_size=2, backbone="decoder", positions="1d", image_layers="dit",
                 unet_channels=(64, 128), unet_blocks=2, image_attention="bidirectional", objective="flow", time_shift_tokens=None, diffusion_weight=5.0,
                 boi_token_id=3, eoi_token_id=4, **kwargs):
        names = self.names()
        for name in kwargs:
            if name not in _COMMON and not name.startswith("_"):
                raise ValueError(f"TransfusionConfig: {name} is no setting; {', '.join(names)} fit{nearest(name, names)}")
        if text_config is None:
            text_config = {"model_type": "llama"}
        if isinstance(text_config, dict):
            text_config = _text_config(text_config)
        if not isinstance(text_config, PreTrainedConfig):
            raise ValueError(f"TransfusionConfig: text_config is a {type(text_config).__name__}; a configuration of transformers or its dict fits")
        for name, value, choices in (("backbone", backbone, BACKBONES), ("positions", positions, POSITIONS), ("image_layers", image_layers, IMAGE_LAYERS),
                                     ("image_attention", image_attention, IMAGE_ATTENTION), ("objective", objective, OBJECTIVES)):
            if value not in choices:
                raise ValueError(f"TransfusionConfig: {name} is {value!r}; one of {', '.join(map(repr, choices))} fits")
        for name, value in (("image_channels", image_channels), ("patch_size", patch_size), ("unet_blocks", unet_blocks)):
            if not is_whole(value, 1):
                raise ValueError(f"TransfusionConfig: {name} is {value!r}; a whole number of at least 1 fits")
        if not is_pair(image_size, lambda side: is_whole(side, 1)):
            raise ValueError(f"TransfusionConfig: image_size is {image_size!r}; (height, width), two whole numbers of at least 1, fits")
        if any(side % patch_size for side in image_size):
            raise ValueError(f"TransfusionConfig: image_size is {tuple(image_size)} and patch_size {patch_size}; multiples of the patch size fit")
        if not isinstance(unet_channels, (list, tuple)) or not unet_channels or not all(is_whole(channels, 1) for channels in unet_channels):
            raise ValueError(f"TransfusionConfig: unet_channels is {unet_channels!r}; whole numbers of at least 1, one for each resolution, fit")
        if time_shift_tokens is not None and not is_whole(time_shift_tokens, 1):
            raise ValueError(f"TransfusionConfig: time_shift_tokens is {time_shift_tokens!r}; a whole number of at least 1, or None, fits")
        if not is_number(diffusion_weight, 0):
            raise ValueError(f"TransfusionConfig: diffusion_weight is {diffusion_weight!r}; a finite number of at least 0 fits")
        vocabulary = getattr(text_config.get_text_config(), "vocab_size", None)
        if vocabulary is None:
            raise ValueError(f"TransfusionConfig: text_config is a {type(text_config).__name__}; the configuration of a causal language model fits")
        for name, value in (("boi_token_id", boi_token_id), ("eoi_token_id", eoi_token_id)):
            if not is_whole(value, 0, vocabulary - 1):
                raise ValueError(f"TransfusionConfig: {name} is {value!r}; a token of the decoder's vocabulary, 0 to {vocabulary - 1}, fits")
        if boi_token_id == eoi_token_id:
            raise ValueError(f"TransfusionConfig: boi_token_id and eoi_token_id are both {boi_token_id}; two tokens fit")
        if positions == "2d" and backbone == "decoder":
            raise ValueError(f"TransfusionConfig: positions is '2d' and backbone {backbone!r}, which turns its heads itself; "
                             "backbone 'adaln' or 'experts', or positions '1d' fits")
        if image_layers == "unet" and patch_size != 2**(len(unet_channels) - 1):
            raise ValueError(f"TransfusionConfig: patch_size is {patch_size} and unet_channels {tuple(unet_channels)}; a patch size of 2^k and k + 1 "
                             "channels fit, one number for each resolution down to a patch")
        self.text_config = text_config
        self.tie_word_embeddings = getattr(text_config.get_text_config(), "tie_word_embeddings", False)
        self.image_channels = image_channels
        self.image_size = list(image_size)
        self.patch_size = patch_size
        self.backbone = backbone
        self.positions = positions
        self.image_layers = image_layers
        self.unet_channels = list(unet_channels)
        self.unet_blocks = unet_blocks
        self.image_attention = image_attention
        self.objective = objective
        self.time_shift_tokens = time_shift_tokens
        self.diffusion_weight = diffusion_weight
        self.boi_token_id = boi_token_id
        self.eoi_token_id = eoi_token_id
        super().__init__(**{name: value for name, value in kwargs.items() if name != "tie_word_embeddings"})

    @classmethod
    def names(cls) -> list[str]:
        """Names of the settings that are this class's own."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "TransfusionConfig":
        """As transformers does, from a file's dict; settings among `kwargs` stand above the file's and are checked like them.

        What transformers, now or long ago, wrote beside our settings stays; a name that is nearly one of ours is refused.
        """
        names = cls.names()
        config_dict = config_dict | {name: kwargs.pop(name) for name in names if name in kwargs}
        others = {name: value for name, value in config_dict.items() if name not in (*names, *_COMMON) and not name.startswith("_")}
        for name in others:
            if difflib.get_close_matches(name, names, n=1, cutoff=0.85):
                raise ValueError(f"TransfusionConfig: {name} is no setting; {', '.join(names)} fit{nearest(name, names)}")
        made = super().from_dict({name: value for name, value in config_dict.items() if name not in others}, **kwargs)
        for name, value in others.items():
            setattr(made[0] if isinstance(made, tuple) else made, name, value)
        return made

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.image_channels * self.patch_size**2


def _text_config(given: dict) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(**given)
    except TypeError as error:
        raise ValueError(f"TransfusionConfig: text_config is a dict without model_type ({error}); one with the decoder's model_type fits") from error
