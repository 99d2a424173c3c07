"""CLIP by transformers' CLIPModel: embeddings of pictures and texts, and the CLIP score of pictures for their prompts.

    CLIP score    100 max(cos(picture, prompt), 0), its mean over pairs (arXiv:2104.08718 has 2.5 in place of 100)

Pictures are seen as OpenAI's CLIP was trained to: the central square, bicubic, with the mean and deviation of
preprocessor_config.json. Prompts longer than the text model's positions are cut off.
"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image as Picture
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPModel

from transfusion.data.picture_files import open_picture
from transfusion.eval.features import Preprocessing
from transfusion.eval.picture_features import fit_square, square_words
from transfusion.eval.pretrained import load_whole, local_directory, preprocessor
from transfusion.eval.results import weights_hash

OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}

FITS = "a directory of a CLIPModel, or its name in the hub's cache, e.g. openai/clip-vit-large-patch14, fits"


class ClipScore(NamedTuple):
    """The mean of 100 max(cos, 0) and its standard error."""

    score: float
    standard_error: float


class Clip:
    """A CLIPModel with its tokenizer and what it wants to see.

    Args:
        model: the network.
        tokenizer: of its text model.
        preprocessing: mean and deviation of its pixels.
        name: what results call it.
        digest: the hash of its weights.
    """

    def __init__(self, model: CLIPModel, tokenizer, preprocessing: Preprocessing, name: str, digest: str):
        self.model, self.tokenizer, self.preprocessing = model.eval().requires_grad_(False), tokenizer, preprocessing
        self.name, self.weights_hash = name, digest
        self.size = model.config.vision_config.image_size
        self.positions = model.config.text_config.max_position_embeddings

    @classmethod
    def from_pretrained(cls, name: str, device: torch.device) -> "Clip":
        """Load a directory that transformers wrote, or what the hub's cache holds of a name.

        Raises:
            ValueError: it is no CLIPModel with its tokenizer.
        """
        op = "Clip.from_pretrained"
        path, given = local_directory(op, name, FITS), f"{op}: name is {str(name)!r}"
        model = load_whole(CLIPModel, path, given, FITS).network
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{given}, whose tokenizer cannot be loaded ({str(error).splitlines()[0]}); {FITS}"
                             ) from error
        said, size = preprocessor(path), model.config.vision_config.image_size
        preprocessing = Preprocessing(3, (size, size), said.get("image_mean", OPENAI["mean"]),
                                      said.get("image_std", OPENAI["std"]))
        return cls(model.to(device), tokenizer, preprocessing, str(name), weights_hash(path))

    def resize(self) -> str:
        """Say what the network sees of a picture."""
        return square_words(self.size)

    @torch.inference_mode()
    def pictures(self, pictures: list[Picture.Image]) -> Tensor:
        """Return the embeddings (N, D) of pictures, of length 1."""
        pixels = torch.stack([fit_square(picture, self.size) for picture in pictures]).to(self.model.device)
        pooled = self.model.vision_model(pixel_values=self.preprocessing(pixels)).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(pooled).float(), dim=-1).cpu()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """Return the embeddings (N, D) of texts, of length 1."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.positions, return_tensors="pt")
        tokens = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        pooled = self.model.text_model(**tokens).pooler_output
        return torch.nn.functional.normalize(self.model.text_projection(pooled).float(), dim=-1).cpu()


def clip_score(clip: Clip, files: list[Path], prompts: list[str], batch: int = 64) -> ClipScore:
    """Return the CLIP score of picture files for their prompts.

    Raises:
        ValueError: as many prompts as pictures are needed, two or more; a file that is no picture.
    """
    if len(files) != len(prompts) or len(files) < 2:
        raise ValueError(f"clip_score: {len(files)} pictures and {len(prompts)} prompts; as many of both, 2 or more, "
                         "fit")
    scores = []
    with ThreadPoolExecutor(8) as threads:
        for i in tqdm(range(0, len(files), batch), desc="CLIP score", unit="batch", dynamic_ncols=True):
            pictures = clip.pictures(list(threads.map(open_picture, files[i:i + batch])))
            scores.append((pictures * clip.texts(prompts[i:i + batch])).sum(-1))
    scores = 100 * torch.cat(scores).double().clamp(min=0)
    return ClipScore(scores.mean().item(), scores.std().item() / len(scores)**0.5)
