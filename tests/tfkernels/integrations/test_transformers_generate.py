"""Prompts with images under `generate`: what it writes behind them, with any cache, is what the whole mask gives."""
import pytest
import torch

from tests.conftest import DEVICE, adapts
from tests.tfkernels.integrations.test_transformers import WINDOW, build, close, tokens
from tfkernels import TransfusionMask

pytestmark = adapts
LEFT = [0, 5]  # padding on the left, row by row
PROMPT = [[(8, 14)], [(6, 9), (9, 20)]]


def padded_prompt(length=22):
    attention_mask = torch.ones(2, length, dtype=torch.int64, device=DEVICE)
    for row, count in enumerate(LEFT):
        attention_mask[row, :count] = 0
    return tokens(length=length), attention_mask


def whole_mask(length, padding=True, **more):
    """The mask of `length` tokens: the prompt's images, and text behind them."""
    documents = (torch.tensor([[-1] * count + [0] * (length - count) for count in LEFT], device=DEVICE)
                 if padding else None)
    return TransfusionMask.from_spans(PROMPT, length, documents=documents, device=DEVICE, **more)


def written_one_by_one(model, x, attention_mask, count, masks):
    """Greedy tokens without a cache, all of them read again for each, under the mask of all of them."""
    for _ in range(count):
        positions = attention_mask.cumsum(-1).sub(1).clamp(min=0)
        logits = model(x, position_ids=positions, transfusion_mask=masks(x.shape[1]), use_cache=False).logits[:, -1]
        x, attention_mask = (torch.cat([x, logits.argmax(-1)[:, None]], 1),
                             torch.nn.functional.pad(attention_mask, (0, 1), value=1))
    return x


@pytest.mark.parametrize("padding", ["attention_mask", "documents"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"num_beams": 1, "num_return_sequences": 1},
    ],
    ids=["dynamic", "static", "no cache", "one beam"],
)
@torch.no_grad()
def test_generate_writes_behind_images_what_the_whole_mask_gives(options, padding):
    model, (x, attention_mask) = build("llama", "tfkernels"), padded_prompt()
    prompt = whole_mask(22, padding == "documents")
    got = model.generate(x, attention_mask=attention_mask, transfusion_mask=prompt, max_new_tokens=7, do_sample=False,
                         **options)
    assert torch.equal(got, written_one_by_one(model, x, attention_mask, 7, whole_mask))
    assert not torch.equal(got, model.generate(x, attention_mask=attention_mask, max_new_tokens=7, do_sample=False))


@torch.no_grad()
def test_generate_takes_embeddings_and_one_mask_for_all_beams():
    model, x = build("llama", "tfkernels"), tokens(batch=1, length=22)
    prompt, options = TransfusionMask.from_spans(PROMPT[:1], 22, device=DEVICE), dict(max_new_tokens=6, do_sample=False)
    written = model.generate(x, transfusion_mask=prompt, **options)
    embeds = model.get_input_embeddings()(x)
    assert torch.equal(model.generate(inputs_embeds=embeds, transfusion_mask=prompt, **options), written[:, 22:])
    beams = model.generate(x, transfusion_mask=prompt, num_beams=3, num_return_sequences=3,
                           return_dict_in_generate=True, output_scores=True, **options)
    for sequence, score in zip(beams.sequences, beams.sequences_scores):
        masks = TransfusionMask.from_spans(PROMPT[:1], len(sequence), device=DEVICE)
        logits = model(sequence[None], transfusion_mask=masks, use_cache=False).logits[0, 21:-1].log_softmax(-1)
        close(logits.gather(1, sequence[22:, None]).sum() / (len(sequence) - 22), score)
    with pytest.raises(ValueError, match="mask has 2 batch rows and q has 6"):
        model.generate(tokens(length=22), transfusion_mask=TransfusionMask.from_spans(PROMPT, 22, device=DEVICE),
                       num_beams=3, **options)


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generate_in_a_window_goes_on_past_it(family, cache):
    model, (x, attention_mask) = build(family, "tfkernels"), padded_prompt()
    kinds = {"full_attention": {}, "sliding_attention": {"window": WINDOW}}

    def masks(length):
        return {kind: whole_mask(length, **more) for kind, more in kinds.items()}

    got = model.generate(x, attention_mask=attention_mask, transfusion_mask=masks(22), max_new_tokens=12,
                         do_sample=False, cache_implementation=cache, disable_compile=True)
    assert torch.equal(got, written_one_by_one(model, x, attention_mask, 12, masks))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU looking would wait for the device")
def test_a_prompt_read_in_chunks_that_cut_an_image_is_refused():
    model, options = build("llama", "tfkernels"), dict(max_new_tokens=4, do_sample=False)
    mask, x = TransfusionMask.from_spans([[(8, 14)]], 22), tokens(batch=1, length=22)
    whole = model.generate(x, transfusion_mask=mask, **options)
    assert torch.equal(model.generate(x, transfusion_mask=mask, prefill_chunk_size=14, **options), whole)
    with pytest.raises(ValueError, match="transfusion_mask shows a query keys up to 14 and there are 11 yet; images "
                                         "within one pass fit"):
        model.generate(x, transfusion_mask=mask, prefill_chunk_size=11, **options)
