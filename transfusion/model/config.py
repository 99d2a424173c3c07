"""What a Transfusion checkpoint is: a Hugging Face decoder's configuration plus the image side's."""
import dataclasses
import difflib
import inspect
from dataclasses import dataclass, fields
from typing import Annotated

from transformers import AutoConfig, PreTrainedConfig

from transfusion.diffusion.objective import OBJECTIVES
from transfusion.sequence import IMAGE_ATTENTION
from transfusion.settings import Count, NotNegative, OneOf, WholeNumber, check, nearest

_TIE = "tie_word_embeddings"
BACKBONES = ("decoder", "adaln", "mixture_of_transformers")
POSITIONS = ("1d", "2d")
IMAGE_LAYERS = ("linear", "dit", "unet")
_COMMON = {field.name for field in fields(PreTrainedConfig)} | {  # what any configuration of transformers may hold
    "attn_implementation", "auto_map", "bos_token_id", "decoder_start_token_id", "eos_token_id",
    "experts_implementation", "is_decoder", "label2id", "model_type", "name_or_path", "num_labels",
    "output_attentions", "pad_token_id", "quantization_config", "sep_token_id", _TIE,
    "tokenizer_class", "torch_dtype", "use_cache"}


def present_backbone(name):
    """Return the name that a backbone has now; checkpoints, runs and commands of earlier versions say "experts"."""
    return "mixture_of_transformers" if name == "experts" else name


@dataclass(frozen=True)
class TransfusionSettings:
    """The options that a training run, `transfusion init` and a checkpoint's configuration share."""

    patch_size: Count = 2
    """side of a square patch; an image's height and width are multiples of it"""
    backbone: Annotated[str, OneOf(BACKBONES)] = "decoder"
    """decoder: the language model as it is (the paper); adaln: each image's timestep modulates its norms and residuals;
    mixture_of_transformers: the same, and patches have weights of their own in all but attention (arXiv:2411.04996 and
    LMFusion, arXiv:2412.15188; "experts", its name in earlier versions, means the same)"""
    positions: Annotated[str, OneOf(POSITIONS)] = "1d"
    """of patches: 1d, one after the other like text (the paper), or 2d, a row and a column (see
    `tfkernels.grid_positions`; not with the backbone decoder)"""
    image_layers: Annotated[str, OneOf(IMAGE_LAYERS)] = "dit"
    """in front of and behind the decoder: linear (the paper), dit, linear in and a modulated final layer out, or unet
    (the paper's other choice), down blocks in, up blocks out and skips between"""
    unet_channels: tuple[Count, ...] = (64, 128)
    """channels at each resolution of the U-Net, from the latent's down to one position a patch"""
    unet_blocks: Count = 2
    """residual blocks at each resolution of the U-Net"""
    unet_words: Count | None = None
    """number of vectors, such as embeddings of words, of which each token from the U-Net's down blocks is a mean with
    softmax weights (AlignVLM's connector, arXiv:2502.01341); None: a linear layer"""
    image_attention: Annotated[str, OneOf(IMAGE_ATTENTION)] = "bidirectional"
    """inside an image: bidirectional (the paper) or causal, the same as text (its ablation, table 5)"""
    objective: Annotated[str, OneOf(OBJECTIVES)] = "flow"
    """what the image head predicts: eps (the paper, arXiv:2408.11039), v, flow or x0"""
    time_shift_tokens: Count | None = None
    """number of patches at which an image's times are not shifted; images with more get more noise (see
    `transfusion.diffusion.objective.shift_times`); None: no shift"""
    diffusion_weight: NotNegative = 5.0
    """lambda in text loss + lambda * diffusion loss (the paper: 5, for errors of eps; errors of x0 are a tenth of
    these)"""

    def __post_init__(self):
        object.__setattr__(self, "backbone", present_backbone(self.backbone))

    def shared(self) -> dict:
        """Return these options alone, by name, also where a subclass adds others."""
        return {field.name: getattr(self, field.name) for field in fields(TransfusionSettings)}


@dataclass(frozen=True)
class _Shape:
    image_channels: Count = 1
    image_size: tuple[Count, Count] = (8, 8)


@dataclass(frozen=True)
class _OwnSettings(TransfusionSettings, _Shape):
    """Every setting of `TransfusionConfig` but `text_config`, in their order."""

    boi_token_id: WholeNumber = 3
    eoi_token_id: WholeNumber = 4


_OWN = {field.name: field.default for field in fields(_OwnSettings)}


class TransfusionConfig(PreTrainedConfig):
    """Configuration of `Transfusion`. Its settings are keywords: those of `TransfusionSettings`, and

    Args:
        text_config: configuration of any causal language model in transformers (a config or its dict); transformers'
            default Llama, of 7B, where none is given. It alone says whether embeddings are tied.
        image_channels: channels of an image or of its VAE latent.
        image_size: (height, width) that `generate` draws when not told otherwise.
        boi_token_id, eoi_token_id: the tokens around an image.
    """

    model_type = "transfusion"
    sub_configs = {"text_config": AutoConfig}

    def __init__(self, text_config=None, **settings):
        _refuse_unknown(name for name in settings if name not in _COMMON and not name.startswith("_"))
        common = {name: value for name, value in settings.items() if name not in (*_OWN, _TIE)}
        own = _OwnSettings(**{name: settings[name] for name in _OWN if name in settings})
        text_config = _text_config(text_config)
        _check_settings(own, text_config)
        self.text_config = text_config
        self.tie_word_embeddings = getattr(text_config.get_text_config(), _TIE, False)
        if settings.get(_TIE) not in (None, self.tie_word_embeddings):
            raise ValueError(f"TransfusionConfig: {_TIE} is {settings[_TIE]!r} and text_config's "
                             f"{self.tie_word_embeddings!r}; the same fits; set it in text_config")
        for name, value in dataclasses.asdict(own).items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)        # as JSON gives them back
        super().__init__(**common)

    __init__.__signature__ = inspect.Signature(
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
         inspect.Parameter("text_config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
         *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in _OWN.items()),
         inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])

    @classmethod
    def names(cls) -> list[str]:
        """Names of the settings that are this class's own."""
        return ["text_config", *_OWN]

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "TransfusionConfig":
        """As transformers does, from a file's dict; settings among `kwargs` replace the file's and are checked alike.

        What transformers, now or long ago, wrote beside our settings stays; a name that is nearly one of ours is
        refused.
        """
        names = cls.names()
        if "text_config" in kwargs:  # which says by itself whether its embeddings are tied
            config_dict = {name: value for name, value in config_dict.items() if name != _TIE}
        config_dict = config_dict | {name: kwargs.pop(name) for name in (*names, _TIE) if name in kwargs}
        others = {name: value for name, value in config_dict.items()
                  if name not in (*names, *_COMMON) and not name.startswith("_")}
        _refuse_unknown(name for name in others if difflib.get_close_matches(name, names, n=1, cutoff=0.85))
        made = super().from_dict({name: value for name, value in config_dict.items() if name not in others}, **kwargs)
        for name, value in others.items():
            setattr(made[0] if isinstance(made, tuple) else made, name, value)
        return made

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.image_channels * self.patch_size**2


def _refuse_unknown(others) -> None:
    """Refuse the first name that is none of the settings."""
    names = TransfusionConfig.names()
    for name in others:
        if name not in names:
            raise ValueError(f"TransfusionConfig: {name} is no setting; {', '.join(names)} fit{nearest(name, names)}")


def _text_config(given) -> PreTrainedConfig:
    """Return the decoder's configuration from itself, its dict or None."""
    given = {"model_type": "llama"} if given is None else given
    if isinstance(given, dict):
        try:
            return AutoConfig.for_model(**given)
        except TypeError as error:
            raise ValueError(f"TransfusionConfig: text_config is a dict without model_type ({error}); "
                             "one with the decoder's model_type fits") from error
    if not isinstance(given, PreTrainedConfig):
        raise ValueError(f"TransfusionConfig: text_config is a {type(given).__name__}; "
                         "a configuration of transformers or its dict fits")
    return given


def _check_settings(settings: _OwnSettings, text_config: PreTrainedConfig) -> None:
    """Refuse settings that do not fit, or not each other or the decoder."""
    op = "TransfusionConfig"
    check(op, settings)
    if any(side % settings.patch_size for side in settings.image_size):
        raise ValueError(f"{op}: image_size is {tuple(settings.image_size)} and patch_size {settings.patch_size}; "
                         "multiples of the patch size fit")
    vocabulary = getattr(text_config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise ValueError(f"{op}: text_config is a {type(text_config).__name__}; "
                         "the configuration of a causal language model fits")
    for name in ("boi_token_id", "eoi_token_id"):
        if getattr(settings, name) >= vocabulary:
            raise ValueError(f"{op}: {name} is {getattr(settings, name)!r}; "
                             f"a token of the decoder's vocabulary, 0 to {vocabulary - 1}, fits")
    if settings.boi_token_id == settings.eoi_token_id:
        raise ValueError(f"{op}: boi_token_id and eoi_token_id are both {settings.boi_token_id}; two tokens fit")
    if settings.positions == "2d" and settings.backbone == "decoder":
        raise ValueError(f"{op}: positions is '2d' and backbone 'decoder', which applies its own rotary embedding; "
                         "backbone 'adaln' or 'mixture_of_transformers', or positions '1d' fits")
    if settings.unet_words is not None and settings.image_layers != "unet":
        raise ValueError(f"{op}: unet_words is {settings.unet_words} and image_layers {settings.image_layers!r}; "
                         "image_layers 'unet', or unet_words None fits")
    if settings.image_layers == "unet" and settings.patch_size != 2**(len(settings.unet_channels) - 1):
        raise ValueError(f"{op}: patch_size is {settings.patch_size} and unet_channels "
                         f"{tuple(settings.unet_channels)}; a patch size of 2^k and k + 1 channels fit, one number for "
                         "each resolution down to a patch")
