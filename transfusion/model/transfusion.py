"""The model: one decoder that reads and writes text and images (Transfusion, arXiv:2408.11039)."""
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers import initialization as init

import tfkernels.integrations.transformers as integration
from tfkernels import grid_positions, noise_patchify
from transfusion.diffusion.objective import OBJECTIVES
from transfusion.files import check_files, replacing, unfinished, whole, write_text
from transfusion.generate import generation
from transfusion.model import hub
from transfusion.model.backbone import AdaLNBackbone, Backbone, LayerOffsets
from transfusion.model.config import TransfusionConfig
from transfusion.model.image_layers.embedding import PatchEmbedding, TimestepEmbedding, ZeroLinear
from transfusion.model.image_layers.heads import DiTHead, LinearHead
from transfusion.model.image_layers.unet import UNetDown, UNetUp, ZeroConv2d
from transfusion.model.lora import find_base, holds_adapter, load_adapter, spare_images
from transfusion.model.mixture_of_transformers import MixtureOfTransformersBackbone
from transfusion.model.progress import without_progress_bars
from transfusion.model.vae import VAE
from transfusion.model.weights import check_complete
from transfusion.sequence import IMAGE_ATTENTION, Context, Image, Part, Sequence, Share, share
from transfusion.settings import nearest

BACKBONE_CLASSES = {
    "decoder": Backbone, "adaln": AdaLNBackbone, "mixture_of_transformers": MixtureOfTransformersBackbone}
IMAGE_LAYER_CLASSES = {
    "linear": (PatchEmbedding, LinearHead), "dit": (PatchEmbedding, DiTHead), "unet": (UNetDown, UNetUp)}
GENERATION = "generation_config.json"  # how the decoder writes where transformers generates
LAYERS = ("backbone", "image_layers", "unet_channels", "unet_blocks", "unet_words")  # settings that may add some
HUB = ("repo_id", *(name for name in hub.UPLOAD if name != "max_shard_size"),
       *(field.name for field in dataclasses.fields(hub.CardSettings)))  # options of push_to_hub


class TransfusionOutput(NamedTuple):
    """`loss` = text_loss + diffusion_weight * diffusion_loss.

    The latter is the mean of `image_losses` (N,) over drawn images; that of others is 0.
    """

    loss: Tensor
    text_loss: Tensor
    diffusion_loss: Tensor
    image_losses: Tensor


class Transfusion(PreTrainedModel):
    """A decoder, a patch embedding in front of it and an image head behind it.

    `tokenizer` and `vae` travel with the checkpoint.
    """

    config_class = TransfusionConfig
    base_model_prefix = "transfusion"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True

    def __init__(self, config: TransfusionConfig, tokenizer=None):
        _check_implementation("Transfusion", config._attn_implementation or integration.NAME)
        config._attn_implementation_internal = integration.register()  # the public name also sets text_config's
        super().__init__(config)
        hidden = config.text_config.get_text_config().hidden_size
        self.backbone = BACKBONE_CLASSES[config.backbone](config.text_config)
        self.timestep = TimestepEmbedding(hidden)
        layers = IMAGE_LAYER_CLASSES[config.image_layers]
        self.patch_embedding, self.image_head = (layer(config, hidden) for layer in layers)
        self.image_attention = IMAGE_ATTENTION[config.image_attention]
        self.objective = OBJECTIVES[config.objective]
        self.tokenizer = tokenizer
        self.vae: VAE | None = None  # what its latents are of; set it to encode and decode pictures
        tied = self.backbone.decoder._tied_weights_keys or {}
        self._tied_weights_keys = {f"backbone.decoder.{a}": f"backbone.decoder.{b}" for a, b in tied.items()}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Images start silent: no modulation, no prediction, no timestep in the patches. Others as in transformers."""
        if isinstance(module, (ZeroLinear, ZeroConv2d)):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LayerOffsets):
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    def set_attn_implementation(self, attn_implementation, *args, **kwargs) -> None:
        """Refuse all but "tfkernels": no other attention sees this model's masks."""
        _check_implementation("Transfusion.set_attn_implementation", attn_implementation)

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embeddings."""
        return self.backbone.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's text head."""
        return self.backbone.decoder.get_output_embeddings()

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        """As `resize_token_embeddings` needs it."""
        self.backbone.decoder.set_input_embeddings(embeddings)

    def set_output_embeddings(self, head: nn.Module) -> None:
        """As `resize_token_embeddings` needs it."""
        self.backbone.decoder.set_output_embeddings(head)

    @classmethod
    @without_progress_bars()
    def from_pretrained(cls, path, *args, base=None, **kwargs) -> "Transfusion":
        """Load a checkpoint directory, or an adapter's, which is put into the model that it was trained on.

        A checkpoint is config.json, model.safetensors and the tokenizer's files. The model of an adapter is looked for
        where it lay, as seen from the adapter, unless `base` names it. Pickled weights are refused, damaged ones too.
        A str "owner/name" that is no directory here is a repository of the Hugging Face Hub; a `Path` never is.

        Options are those of transformers; settings of `TransfusionConfig` among them replace the checkpoint's. With
        `backbone="mixture_of_transformers"` a checkpoint of another backbone gives patches copies of its layers. With
        `output_loading_info=True` the result is (model, what was missing or left over). A `quantization_config`
        quantises the decoder alone: the image layers and the text head stay as they are.

        Raises:
            ValueError: no checkpoint, a damaged one, or an option that does not fit, named.
        """
        if kwargs.pop("output_loading_info", False):
            found: dict = {}
            return cls.from_pretrained(path, *args, base=base, loading_info=found, **kwargs), found
        path = hub.download(path, kwargs) if hub.is_repository(path) else Path(path)
        base = find_base(path, base) if holds_adapter(path) else base
        if unfinished(path):  # a kill left the newest save in two places
            with whole(path) as directory:
                return cls.from_pretrained(directory, *args, base=base, **kwargs)
        if (path / "adapter_config.json").is_file():
            return load_adapter(cls.from_pretrained(base, *args, **kwargs), path)
        if base is not None:
            raise ValueError(f"Transfusion.from_pretrained: base is {str(base)!r} and path {str(path)!r}, which holds "
                             "no adapter; leave base out")
        if not (path / "config.json").is_file():
            raise ValueError(f"Transfusion.from_pretrained: path is {str(path)!r}, which holds no config.json; "
                             "a directory written by save_pretrained or `transfusion train` fits")
        check_files(path)
        model = cls._load(path, *args, **kwargs)
        if model.tokenizer is None and any((path / f"tokenizer{end}.json").is_file() for end in ("", "_config")):
            model.tokenizer = load_tokenizer(path)
        if (path / GENERATION).is_file():
            model.backbone.decoder.generation_config = GenerationConfig.from_pretrained(path)
        if (path / "vae").is_dir():
            model.vae = VAE.from_pretrained(path / "vae")
        return model

    @classmethod
    def _load(cls, path: Path, *args, loading_info: dict | None = None, use_safetensors: bool = True,
              attn_implementation: str | None = None, quantization_config=None, **kwargs) -> "Transfusion":
        if not use_safetensors:
            raise ValueError("Transfusion.from_pretrained: use_safetensors is False; True fits, "
                             "for pickled weights are refused")
        _check_implementation("Transfusion.from_pretrained", attn_implementation or integration.NAME)
        if quantization_config is not None:
            with torch.device("meta"):
                given = {name: kwargs[name] for name in TransfusionConfig.names() if name in kwargs}
                outline = cls(kwargs.get("config") or TransfusionConfig.from_pretrained(path, **given))
            kwargs["quantization_config"] = spare_images(outline, quantization_config)
        try:
            model, found = super().from_pretrained(
                path, *args, use_safetensors=True, output_loading_info=True, **kwargs)
        except TypeError as error:
            if "__init__() got an unexpected keyword argument" not in str(error):
                raise
            name = str(error).split("'")[1]
            raise ValueError(f"Transfusion.from_pretrained: {name} is no option; those of transformers' "
                             "from_pretrained and settings of TransfusionConfig "
                             f"fit{nearest(name, TransfusionConfig.names())}") from error
        except ImportError as error:  # a quantiser's, of the argument or of a checkpoint that was saved with it
            raise ValueError(f"Transfusion.from_pretrained: quantization_config asks for a package that is not here "
                             f"({' '.join(str(error).split())}); install it, or leave quantization_config out"
                             ) from error
        _fill_image_layers(model, path, found["missing_keys"])
        if loading_info is not None:
            loading_info.update(found)
        elif "text_config" not in kwargs and not _has_new_layers(model.config, path):
            check_complete("Transfusion.from_pretrained", "path", path, found)
        return model

    @without_progress_bars()
    def save_pretrained(self, path, is_main_process: bool = True, state_dict: dict | None = None, *,
                        push_to_hub: bool = False, variant: str | None = None, **kwargs) -> None:
        """Write config.json, model.safetensors, the tokenizer's files and the autoencoder, if there is one.

        What the directory held stands until all are whole. Options are those of transformers; what `push_to_hub` takes
        is handed on to it. `save_card` writes a model card beside them.

        Raises:
            ValueError: `path` is a file, or another process writes there.
        """
        if Path(path).exists() and not Path(path).is_dir():
            raise ValueError(f"Transfusion.save_pretrained: path is {str(path)!r}, which is a file; a directory fits")
        pushed = {name: kwargs.pop(name) for name in HUB if name in kwargs}
        if is_main_process:
            with replacing(Path(path), weights=variant is None) as fresh:
                own = None if state_dict is None else dict(state_dict)  # transformers empties what it is given
                super().save_pretrained(fresh, True, own, variant=variant, **kwargs)
                write_text(fresh / GENERATION, self.backbone.decoder.generation_config.to_json_string())
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(fresh)
                if self.vae is not None:
                    self.vae.save_pretrained(fresh / "vae")
        if push_to_hub and is_main_process:
            said = {"state_dict": state_dict, "variant": variant, "max_shard_size": kwargs.get("max_shard_size")}
            pushed |= {name: value for name, value in said.items() if value is not None}
            self.push_to_hub(pushed.pop("repo_id", Path(path).name), **pushed)

    @without_progress_bars()
    def save_decoder(self, path) -> None:
        """Write the decoder alone with its tokenizer, as `transformers.AutoModelForCausalLM` loads it.

        Its text logits are `text_logits`. Image layers, and weights that patches have of their own, are left out.

        Raises:
            ValueError: the model is quantised, or another process writes into `path`.
        """
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError("Transfusion.save_decoder: the model is quantised; one that was loaded without "
                             "quantization_config fits")
        with replacing(Path(path)) as fresh:
            self.backbone.decoder.save_pretrained(fresh)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(fresh)

    def save_card(self, path, **card) -> Path:
        """Write README.md, a model card for the Hub, into a checkpoint's directory, over an older one; return its path.

        It says what the model is and how it is called, and what the run beside the checkpoint that this model was
        loaded from says of data, settings and pictures.

        Args:
            path: the directory; the card's examples load the model by this path, unless `name` is given.
            card: fields of `transfusion.model.hub.CardSettings`: license, base_model, datasets, language, tags,
                description, name, prompt, samples.

        Raises:
            ValueError: an option that does not fit, named.
        """
        settings = hub.CardSettings.of("Transfusion.save_card", card)
        return hub.write_card(self, Path(path), Path(path).as_posix(), settings)

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Upload the checkpoint with its autoencoder, tokenizer and model card to the Hub; return the commit's URL.

        The card is README.md of the directory that this model was loaded from, or one that stands on the Hub already,
        or else one as `save_card` writes it; with an option of the card it is written anew.

        Args:
            repo_id: "owner/name" of the repository, which is made where there is none.
            options: those of transformers (commit_message, commit_description, private, token, revision, create_pr,
                max_shard_size, variant, tags), `state_dict`, other weights than this model's, and those of `save_card`.

        Raises:
            ValueError: an option that does not fit, named; nothing was uploaded then.
        """
        return hub.push(self, repo_id, **options)

    def embed(self, sequence: Sequence, patches: Tensor, condition: Tensor) -> tuple[Tensor, list]:
        """Token embeddings (B, S, C), those of the (noised) patches in their places, and what skips the decoder."""
        x = self.backbone.embed(sequence.tokens)
        rows, places = sequence.image_rows(x)
        embedded, skips = self.patch_embedding(rows, patches, condition, sequence.layout, places)
        return sequence.placed(x, embedded), skips

    def positions(self, positions: Tensor, image_ids: Tensor, columns: Tensor) -> Tensor:
        """Positions (B, S) as the backbone takes them: as they are, or on each image's grid, (B, S, 2)."""
        return grid_positions(positions, image_ids, columns) if self.config.positions == "2d" else positions

    def forward(self, sequence: Sequence, times: Tensor, seed: Tensor | int) -> TransfusionOutput:
        """Losses of packed documents whose images are noised to `times` (N,).

        `seed` makes the noise, as in `tfkernels.noise_patchify`. An image that is not drawn, but only read or a clean
        copy, is at time 0, whatever `times` says.

        Of a `Share` of rows, losses are means over the text targets and the drawn images that are this rank's.
        """
        times = torch.where(sequence.timed, times, 0)
        (signal, noise), (p, q) = self.objective.path(times), self.objective.target(times)
        condition = self.timestep(times)                                                   # (N, C)
        noised = noise_patchify(sequence.patches, signal, noise, seed, offsets=sequence.layout.offsets)
        x, skips = self.embed(sequence, noised, condition)
        positions = sequence.own(self.positions(sequence.positions, sequence.image_ids, sequence.layout.columns))
        mask = self.image_attention.mask(sequence)
        x = self.backbone(x, positions, mask, condition, sequence.modality).flatten(0, 1)  # (B * S, C)
        text = self.backbone.text_loss(x, sequence.target_places, sequence.text_targets)
        images = sequence.drawn * self.image_head.loss(*sequence.read_by_images(x), condition, sequence.layout, skips,
                                                       sequence.patches, p, q, seed)
        diffusion = images.sum() / sequence.drawn.sum().clamp(min=1)
        return TransfusionOutput(text + self.config.diffusion_weight * diffusion, text, diffusion, images)

    def share(self, sequence: Sequence, context: Context) -> Share:
        """Return this rank's share of packed rows that the ranks of `context` compute together.

        `forward` takes it in place of the rows, with the times of all their images. Each rank must call it with the
        same rows, and take the same number of forward and backward passes.
        """
        return share(sequence, self.backbone.widest(self.image_attention.mask(sequence)), context)

    def text_logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits (B, S, V) of plain text (B, S): what the decoder alone would say."""
        return self.backbone.logits(self.text_hidden(tokens))

    def text_hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states (B, S, C) of plain text (B, S), of which `backbone.logits` makes the next tokens' logits."""
        return self.backbone.decoder.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state

    def generate(self, parts: str | list[Part], **options) -> list[Part]:
        """Go on from `parts`, writing text and drawing images as the model sees fit; options as in `generate_batch`."""
        return generation.generate_batch(self, [generation.as_parts("generate", "parts", parts)], **options)[0]

    def generate_batch(self, prompts: list[str | list[Part]], **options) -> list[list[Part]]:
        """Go on from several prompts at once; see `transfusion.generate.generation.generate_batch`."""
        return generation.generate_batch(self, prompts, **options)

    def stream(self, parts: str | list[Part], **options) -> Iterator[generation.Event]:
        """`generate` as an iterator of events: text as it is written, previews, finished images."""
        return generation.stream(self, [generation.as_parts("stream", "parts", parts)], **options)

    def draw(self, prompts: str | list[str | list[Part]], **options) -> list[Image]:
        """Draw one image for each prompt, text or parts such as [image, instruction]; options: `generate_batch`'s."""
        return generation.draw(self, prompts, **options)

    def caption(self, images: Image | list[Image], question: str = "", **options) -> list[str]:
        """Write the text that follows each image and the question, greedily; options as in `generate_batch`."""
        return generation.caption(self, images, question, **options)


def _check_implementation(op: str, wanted) -> None:
    if not all(one == integration.NAME for one in (wanted.values() if isinstance(wanted, dict) else [wanted])):
        raise ValueError(f"{op}: attn_implementation is {wanted!r}; {integration.NAME!r} fits, which alone sees this "
                         "model's masks; leave it out")


def _has_new_layers(config: TransfusionConfig, path: Path) -> bool:
    """Whether a model was asked for that has layers which the checkpoint in `path` does not."""
    saved = TransfusionConfig.from_pretrained(path)
    counts = [one.text_config.get_text_config().num_hidden_layers for one in (config, saved)]
    return counts[0] != counts[1] or any(getattr(config, name) != getattr(saved, name) for name in LAYERS)


def _fill_image_layers(model: Transfusion, path: Path, missing) -> None:
    """Have the image layers of a mixture of transformers begin as copies where the checkpoint had none of them."""
    own = {name for name in model.state_dict() if name.startswith(("backbone.image_layers.", "backbone.image_norm."))}
    if not own or not own <= set(missing):
        return
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"Transfusion.from_pretrained: path is {str(path)!r}, which has no image layers for backbone "
                         "'mixture_of_transformers', and quantised weights cannot be copied into them; load it without "
                         "quantization_config, save it, and load that")
    model.backbone.start_from_text()


def load_tokenizer(path: Path):
    """Load a checkpoint's tokenizer.

    Raises:
        ValueError: its file cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower for a file that it cannot read
        raise ValueError(f"{path / 'tokenizer.json'} cannot be read ({' '.join(str(error).split())}); "
                         "copy it again or make it anew") from error


AutoConfig.register(TransfusionConfig.model_type, TransfusionConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForMultimodalLM):  # the second is what transformers' any-to-any pipeline loads
    auto_class.register(TransfusionConfig, Transfusion, exist_ok=True)
