"""What stands for a picture in a document: continuous patches (Transfusion), or codes among the text (Chameleon).

The codes are those of a VQ autoencoder. Both kinds are trained by `transfusion.train.transfusion`, on the same data
set's documents drawn in the same order. A Transfusion that never sees an image part is its decoder, a plain
LlamaForCausalLM: text, language-model loss on every token, a causal mask; transformers' `generate` draws with it,
token by token.
"""
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from transfusion.data.dataset import Arrangement, Dataset, DatasetSettings, PictureDataset
from transfusion.model.from_language_model import from_language_model
from transfusion.model.transfusion import Transfusion
from transfusion.recipes.studies.vq import from_codes, load_autoencoder, to_codes
from transfusion.sequence import Image, Part, Text, encode
from transfusion.sequence.tokenizer import BOI, EOI, train_tokenizer
from transfusion.train.transfusion import TrainConfig


class Patches:
    """Pictures as the model's own images."""

    def prepare(self, config: TrainConfig) -> TrainConfig:
        """Return the training run as it is."""
        return config

    def parts(self, images: Tensor) -> list[Part]:
        """Pictures (N, C, H, W) as parts of prompts."""
        return [Image(image) for image in images]

    def draw(self, model: Transfusion, captions: list[str], steps: int, guidance: float, seed: int) -> Tensor:
        """Draw one picture (N, C, H, W) for each caption."""
        images = model.draw(captions, steps=steps, guidance=guidance, seed=seed)
        return torch.stack([image.latent for image in images]).clamp(-1, 1)


class CodeText(Text):
    """Codes of a picture, among them BOI and EOI: here they are read as the tokens that they name."""

    def token_ids(self, tokenizer, config) -> tuple[int, ...]:
        """As `Text.token_ids`."""
        return tuple(tokenizer.encode(self.text, add_special_tokens=False))


class Codes:
    """Pictures as text: BOI, a token for each code in raster order, EOI.

    `path` is the directory of the VQ autoencoder.
    """

    def __init__(self, path: Path):
        self.path, self.autoencoder = path, load_autoencoder(path)
        self.names = [f"<code {i}>" for i in range(self.autoencoder.config.num_vq_embeddings)]

    def prepare(self, config: TrainConfig) -> TrainConfig:
        """Write a fresh decoder whose vocabulary holds the codes; return the run that starts from it, on codes."""
        dataset, settings = config.data.open(), config.model
        tokenizer = train_tokenizer(dataset.texts())
        tokenizer.add_tokens(self.names, special_tokens=True)
        torch.manual_seed(config.seed)
        decoder = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=settings.hidden, intermediate_size=settings.mlp,
            num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
        channels, *size = dataset.image_shape
        model = from_language_model(decoder, tokenizer, seed=config.seed, image_channels=channels, image_size=size,
                                    patch_size=settings.patch_size, image_layers="linear")
        start = config.out.with_name(f"{config.out.name}-start")
        model.save_pretrained(start)
        data = CodeDocumentsSettings(original=config.data, autoencoder=self.path, **config.data.shared())
        return replace(config, data=data, tune=replace(config.tune, start=start))

    def text(self, codes: Tensor) -> str:
        """What codes (h, w) are in a document."""
        return BOI + "".join(self.names[i] for i in codes.flatten().tolist()) + EOI

    def parts(self, images: Tensor) -> list[Part]:
        """As `Patches.parts`."""
        return [CodeText(self.text(codes)) for codes in to_codes(self.autoencoder, images)]

    @torch.no_grad()
    def draw(self, model: Transfusion, captions: list[str], steps: int, guidance: float, seed: int) -> Tensor:
        """As `Patches.draw`: one token after the other, sampled at temperature 1; `steps` says nothing here.

        log p = log p(no caption) + guidance (log p(caption) - log p(no caption)), among the codes alone.
        """
        decoder, tokenizer, config = model.backbone.decoder, model.tokenizer, model.config
        grid = to_codes(self.autoencoder, torch.zeros(1, config.image_channels, *config.image_size)).shape[1:]
        first = tokenizer.convert_tokens_to_ids(self.names[0])
        others = [i for i in range(decoder.config.vocab_size) if not first <= i < first + len(self.names)]
        drawn = torch.zeros(len(captions), *grid, dtype=torch.int64)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for caption in dict.fromkeys(captions):
                rows = [i for i, other in enumerate(captions) if other == caption]
                tokens = encode([Text(caption)], tokenizer, config, end=False).tokens
                prompt = torch.tensor([*tokens, config.boi_token_id]).expand(len(rows), -1)
                nothing = torch.tensor([tokenizer.bos_token_id, config.boi_token_id]).expand(len(rows), -1)
                written = decoder.generate(
                    prompt, attention_mask=torch.ones_like(prompt), negative_prompt_ids=nothing,
                    negative_prompt_attention_mask=torch.ones_like(nothing), guidance_scale=guidance, do_sample=True,
                    top_k=0, suppress_tokens=others, min_new_tokens=grid.numel(), max_new_tokens=grid.numel())
                drawn[rows] = (written[:, prompt.shape[1]:] - first).view(-1, *grid)
        return from_codes(self.autoencoder, drawn)


@dataclass(frozen=True)
class CodeDocumentsSettings(DatasetSettings):
    """The documents of another data set with codes in place of pictures."""

    original: DatasetSettings = field(default_factory=DatasetSettings)
    """the other data set"""
    autoencoder: Path = Path()
    """directory of the VQ autoencoder whose codes they are"""

    @property
    def name(self) -> str:
        """What messages call the data set."""
        return f"{self.original.name}-codes"

    def open(self, split: str = "train") -> "CodeDocuments":
        """As `DatasetSettings.open`."""
        return CodeDocuments(self.original.open(split), Codes(self.autoencoder))


class CodeDocuments(PictureDataset):
    """A data set's documents with the codes of each picture, as text, in its place."""

    def __init__(self, dataset: Dataset, codes: Codes):
        super().__init__(dataset.pictures)
        self.codes, self.dataset = codes, dataset
        made = to_codes(codes.autoencoder, dataset.pictures)                               # (N, h, w), once
        dataset.pictures = made[:, None].float()                                           # so that documents hold them

    def texts(self) -> list[str]:
        """As `Dataset.texts`, without the codes."""
        return self.dataset.texts()

    def document(self, generator: torch.Generator, arrangement: Arrangement) -> list[Part]:
        """Draw one document.

        Behind a lone picture stands a blank without loss: as everywhere, it is not learned that a picture has no
        caption.
        """
        parts = self.dataset.document(generator, arrangement)
        code = self.codes.text
        written = [CodeText(code(part.latent.long())) if isinstance(part, Image) else part for part in parts]
        return written if len(written) > 1 else [*written, Text(" ", loss=False)]
