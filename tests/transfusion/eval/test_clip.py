"""The CLIP score: transformers' own forward pass on what its own image processor sees."""
import json
import shutil
import socket

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from transfusion.cli import main
from transfusion.eval.clip import OPENAI, Clip, clip_score
from transfusion.eval.picture_features import read_square
from transfusion.eval.results import read_results, weights_hash

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "photo", "of", "red", "blue", "green", "dog", "cat"]


def save_tiny_clip(path):
    """A random CLIPModel for pictures of 24x24 and a tokenizer of whole words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 12, "bos_token_id": 1,
                     "eos_token_id": 2, "pad_token_id": 0},
        vision_config={**sizes, "image_size": 24, "patch_size": 8}, projection_dim=8)
    config.text_config.eos_token_id = len(WORDS) - 1  # 2 means the largest id to CLIP, as of its first checkpoints
    words = {word: number for number, word in enumerate([*WORDS[:2], *WORDS[3:], WORDS[2]])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", len(WORDS) - 1)])
    CLIPModel(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<start>",
                            eos_token="<end>").save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": OPENAI["mean"],
                                                               "image_std": OPENAI["std"]}))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny CLIPModel and a drawing of five pictures with prompts of several lengths."""
    where = tmp_path_factory.mktemp("clip")
    save_tiny_clip(where / "clip")
    random, rows = np.random.default_rng(0), []
    (where / "drawn" / "pictures").mkdir(parents=True)
    for i, prompt in enumerate(["a red dog", "a photo of a blue cat", "green", "a dog", "a cat " * 9]):
        small = Picture.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        small.resize((60, 48), Picture.Resampling.BICUBIC).save(where / "drawn" / "pictures" / f"{i}.png")
        rows.append({"file": f"pictures/{i}.png", "prompt": prompt})
    (where / "drawn" / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return where


def direct_scores(made):
    """100 max(cos, 0) of each pair by transformers' forward pass, one pair at a time."""
    clip = Clip.from_pretrained(str(made / "clip"), torch.device("cpu"))
    model = CLIPModel.from_pretrained(made / "clip").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made / "clip")
    scores = []
    for line in (made / "drawn" / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        pixels = clip.preprocessing(read_square(made / "drawn" / row["file"], 24)[None])
        tokens = tokenizer([row["prompt"]], truncation=True, max_length=12, return_tensors="pt")
        with torch.inference_mode():
            out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        scores.append(100 * max((out.image_embeds * out.text_embeds).sum().item(), 0))
    return np.array(scores)


def test_the_score_is_that_of_transformers_forward_pass(made, tmp_path):
    main(["eval", "images", "--drawn", str(made / "drawn"), "--clip", str(made / "clip"), "--out", str(tmp_path)])
    (result,), direct = read_results(tmp_path).values(), direct_scores(made)
    assert direct.max() > 0 and direct.std() > 1, "the pairs do not differ"
    assert result.value == pytest.approx(direct.mean(), rel=1e-4)
    assert result.standard_error == pytest.approx(direct.std(ddof=1) / 5**0.5, rel=1e-4)
    assert (result.metric, result.n, result.library) == ("CLIP score", 5, "transformers")
    assert result.judge == str(made / "clip")
    assert result.details["clip_weights_hash"] == weights_hash(made / "clip")


def test_pictures_are_seen_as_clips_own_image_processor_shows_them(made):
    """It rounds to 8 bits after each direction and resizes before it crops: the border of the square may differ."""
    path = made / "drawn" / "pictures" / "0.png"
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    theirs = processor(Picture.open(path), return_tensors="pt").pixel_values
    ours = Clip.from_pretrained(str(made / "clip"), torch.device("cpu")).preprocessing(read_square(path, 24)[None])
    step = 1 / 255 / min(OPENAI["std"])
    assert (ours - theirs)[..., 2:-2, 2:-2].abs().max() <= 1.01 * step


def test_batches_change_nothing_and_prompts_are_needed(made):
    clip = Clip.from_pretrained(str(made / "clip"), torch.device("cpu"))
    files, prompts = sorted((made / "drawn" / "pictures").iterdir()), ["a red dog", "green", "a cat", "blue", "a"]
    assert clip_score(clip, files, prompts, 2) == pytest.approx(clip_score(clip, files, prompts, 64), rel=1e-5)
    with pytest.raises(ValueError, match="5 pictures and 4 prompts"):
        clip_score(clip, files, prompts[:4])


def test_a_name_of_the_hub_is_what_its_cache_holds_and_nothing_is_downloaded(made, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a download was tried"))
    model = tmp_path / "models--someone--clip"
    with pytest.raises(ValueError, match="name is 'someone/clip', which is no directory and is not in the hub's cache"):
        Clip.from_pretrained("someone/clip", torch.device("cpu"))
    shutil.copytree(made / "clip", model / "snapshots" / "0123")
    said = model / "snapshots" / "0123" / "preprocessor_config.json"
    said.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123")
    clip = Clip.from_pretrained("someone/clip", torch.device("cpu"))
    assert (clip.name, clip.weights_hash) == ("someone/clip", weights_hash(made / "clip"))
    assert (clip.preprocessing.mean, clip.preprocessing.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Clip.from_pretrained: name is .* which cannot be loaded"):
        Clip.from_pretrained(str(tmp_path), torch.device("cpu"))
