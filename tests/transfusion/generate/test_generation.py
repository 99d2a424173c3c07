"""Generation against one without a cache, batches against single prompts, and the order of text and images."""
import copy
import gc

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin

from tests.conftest import DEVICE
from tests.transfusion.conftest import tiny_model
from tfkernels import patchify
from tfkernels.attention import cpu
from transfusion import Image, Text
from transfusion.diffusion.guidance import Guidance
from transfusion.diffusion.objective import step
from transfusion.generate.generation import Drawn, Preview, _Generation
from transfusion.generate.kv_cache import Canvas, Graph, PrefixCache
from transfusion.generate.row import Row
from transfusion.generate.sampling import Sampling
from transfusion.sequence import Document, encode, lay_out


@torch.no_grad()
def draw_without_cache(model, prompt, steps, guidance, seed):
    """One image, everything recomputed at every step from packed whole sequences."""
    document = encode([Text(prompt)], model.tokenizer, model.config, end=False)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    boi, eoi = model.config.boi_token_id, model.config.eoi_token_id

    def predict(tokens, x, t):
        ids = [*tokens, boi, *[eoi] * 16]
        whole = Document(ids, [False] * len(ids), [(len(tokens) + 1, x, (4, 4), False)])
        sequence = lay_out([[whole]], len(ids), 4)
        condition = model.timestep(t[None])
        embedded, skips = model.embed(sequence, x, condition)
        positions = model.positions(sequence.positions, sequence.image_ids, sequence.layout.columns)
        hidden = model.backbone(embedded, positions, sequence.mask(), condition, sequence.modality).flatten(0, 1)
        return model.image_head(hidden[sequence.patch_places], condition, sequence.layout, skips)

    for number in range(steps):
        t, s = (torch.tensor(model.objective.start * (1 - n / steps)) for n in (number, number + 1))
        conditional, unconditional = predict(document.tokens, x, t), predict(document.tokens[:1], x, t)
        x = step(model.objective, x, unconditional + guidance * (conditional - unconditional), t, s)
    return x


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_cached_sampler_equals_one_without_a_cache(model, guidance):
    image, = model.draw(["a handwritten seven"], steps=6, guidance=guidance, seed=5)
    expected = draw_without_cache(model, "a handwritten seven", 6, guidance, 5)
    torch.testing.assert_close(patchify(image.latent[None], 2), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_with_causal_attention_the_cached_sampler_equals_transformers_own_causal_decoder(pictures):
    """Every step asks a Llama of transformers, which knows no spans, about the whole embedded sequence."""
    model, prompts = (
        tiny_model("v", image_layers="linear", image_attention="causal"),
        [[Text("a handwritten seven")], [pictures[0], Text(" and")]],
    )
    plain = LlamaForCausalLM._from_config(copy.deepcopy(model.config.text_config), attn_implementation="eager").eval()
    plain.load_state_dict(model.backbone.decoder.state_dict())

    def patches_at(x, t):
        return model.patch_embedding.linear(x + model.patch_embedding.time(model.timestep(torch.tensor([t]))))

    def predict(before, x, t):
        states = plain.model(inputs_embeds=torch.cat([before, patches_at(x, t)])[None]).last_hidden_state
        return model.image_head.linear(states[0, -16:])

    for number, (prompt, image) in enumerate(zip(prompts, model.draw(prompts, steps=4, guidance=3.0, seed=5))):
        document = encode(prompt, model.tokenizer, model.config, end=False)
        whole = model.backbone.embed(torch.tensor([*document.tokens, model.config.boi_token_id]))
        for start, patches, *_ in document.images:
            whole[start:start + 16] = patches_at(patches, 0.0)
        nothing, x = whole[[0, -1]], torch.randn(16, 4, generator=torch.Generator().manual_seed(5 + number))
        for t in (1.0, 0.75, 0.5, 0.25):
            prediction = torch.lerp(predict(nothing, x, t), predict(whole, x, t), 3.0)
            x = step(model.objective, x, prediction, torch.tensor(t), torch.tensor(t - 0.25))
        torch.testing.assert_close(patchify(image.latent[None], 2), x, rtol=1e-4, atol=1e-4)


def test_a_batch_gives_each_prompt_what_it_gets_alone(model, pictures):
    prompts = [[Text("a")], [Text("a handwritten seven and more")], [pictures[0], Text(" and")]]
    options = dict(max_new_tokens=6, steps=3, max_images=2, temperature=1.0)
    together = model.generate_batch(prompts, seed=7, **options)
    for i, prompt in enumerate(prompts):
        same(together[i], model.generate(prompt, seed=7 + i, **options))


def same(ours, theirs):
    assert [type(p) for p in ours] == [type(p) for p in theirs]
    for a, b in zip(ours, theirs):
        if isinstance(a, Text):
            assert a.text == b.text
        else:
            torch.testing.assert_close(a.latent, b.latent, rtol=1e-3, atol=1e-3)


@pytest.fixture
def talkative(model, monkeypatch):
    """The model made to write BOI after two tokens of text, always."""
    boi, plain = model.config.boi_token_id, model.tokenizer.encode("a", add_special_tokens=False)[0]
    counter = {"calls": 0}

    def logits(x):
        counter["calls"] += 1
        scores = torch.zeros(*x.shape[:-1], model.config.text_config.vocab_size)
        scores[..., plain] = 1
        scores[..., boi] = 2.0 if counter["calls"] % 3 == 0 else 0
        return scores

    monkeypatch.setattr(model.backbone, "logits", logits)
    return model


def test_text_and_images_alternate_as_the_model_decides(talkative):
    parts = talkative.generate([Text("a")], max_new_tokens=7, max_images=2, steps=2)
    assert [type(p) for p in parts] == [Text, Image, Text, Image, Text]
    assert [p.text for p in parts if isinstance(p, Text)] == ["aa", "aa", "aaa"]
    assert all(torch.isfinite(p.latent).all() for p in parts if isinstance(p, Image))


def test_later_text_reads_the_finished_image(model, monkeypatch):
    """What follows a drawn image must equal what follows the same image given in the prompt."""
    states, logits = [], model.backbone.logits
    monkeypatch.setattr(model.backbone, "logits", lambda x: states.append(x.clone()) or logits(x))
    prompts = [[Text("a handwritten seven")], [Text("a")]]
    images = model.draw(prompts, steps=2, seed=3, max_new_tokens=1)
    drawn = states[0]
    states.clear()
    model.generate_batch([[*prompt, image] for prompt, image in zip(prompts, images)], max_new_tokens=1, max_images=0)
    torch.testing.assert_close(drawn, states[0], rtol=1e-4, atol=1e-4)


def test_the_prefix_stays_where_it_is_while_an_image_is_drawn_against_it(model, pictures):
    generation = _Generation(
        model, [[Text("a handwritten seven")], [pictures[0], Text("b")]], Sampling(guidance=1.0), force_image=True
    )
    with torch.inference_mode():
        generation.clean = model.timestep(torch.zeros(1))
        prefix, _ = generation.prefill(generation.documents)
        canvas, columns = Canvas(model, prefix, generation.grid), prefix.seen.shape[1]
        layers = canvas.cache.layers
        addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers]
        x = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
        first, other, again = (canvas.predict(given, torch.tensor(t)) for given, t in ((x, 0.9), (-x, 0.2), (x, 0.9)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert addresses == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in layers]
    for layer, kept in zip(layers, prefix.cache.layers, strict=True):
        assert layer.get_seq_length() == columns == kept.keys.shape[2] and layer.keys.shape[2] == columns + 16
        assert torch.equal(layer.keys[:, :, :columns], kept.keys) and torch.equal(
            layer.values[:, :, :columns], kept.values
        )


@pytest.mark.skipif(DEVICE != "cpu", reason="DEVICE is not cpu: counts what attention's CPU path reads off a mask")
def test_all_layers_read_a_mask_once_for_each_token_and_for_each_image(model, pictures, monkeypatch):
    made = []

    def counted(read):
        return lambda *args, **options: made.append(args) or read(*args, **options)

    for name in ("_each_block", "_hidden"):  # of many queries and of few
        monkeypatch.setattr(cpu, name, counted(getattr(cpu, name)))
    model.generate_batch([[Text("a"), pictures[0]], [Text("two")]], max_new_tokens=4, max_images=0, temperature=0.0)
    assert len(model.backbone.decoder.model.layers) > 1 and len(made) <= 5  # the prompts, and each of 4 tokens
    made.clear()
    model.draw(["a"], steps=5, guidance=1.0)
    assert len(made) == 3  # the prompt, the image and the tokens behind it


def test_what_drew_a_batch_is_freed_without_a_search_for_cycles(model, pictures):
    kinds = (Canvas, PrefixCache, CacheLayerMixin)
    gc.collect()
    gc.disable()  # as it is in effect where what is kept are few objects and many gigabytes of a device
    try:
        model.draw(["a", "two"], steps=3, guidance=Guidance(3.0, interval=(0.3, 0.8)))
        model.generate_batch([[Text("a"), pictures[0]], [Text("two")]], max_new_tokens=4)
        assert [type(x) for x in gc.get_objects() if issubclass(type(x), kinds)] == []
    finally:
        gc.enable()


def test_a_graph_keeps_no_function_and_captures_on_the_device_of_its_inputs(monkeypatch):
    said, x = [], torch.ones(2)

    class Recorded:
        """Contexts and streams of torch.cuda, which this machine may lack."""

        def __init__(self, *args, **options):
            said.append((args, options))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def wait_stream(self, other):
            pass

        def replay(self):
            pass

    for name in ("device", "Stream", "stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Recorded)
    monkeypatch.setattr(torch.cuda, "current_stream", Recorded)
    graph = Graph()
    found = graph(lambda given: given + 1, x)
    assert torch.equal(found, x + 1) and ((x.device,), {}) == said[0]
    captured = next(options for args, options in said if args == (graph.graph,))
    assert isinstance(captured["stream"], Recorded), "the capture's stream is of the current device"
    assert not [value for value in vars(graph).values() if callable(value)]


def test_a_cuda_graph_needs_cuda(model):
    if DEVICE == "cuda":
        pytest.skip("torch.cuda.is_available() is True: this is what a machine without one is told")
    with pytest.raises(ValueError, match="cuda_graph is True and the model is on 'cpu'; a model on a CUDA device fits"):
        model.draw(["a"], steps=2, cuda_graph=True)


@pytest.mark.skipif(DEVICE != "cuda", reason="torch.cuda.is_available() is False: CUDA graphs exist on CUDA only")
@pytest.mark.parametrize("backbone,layers", [("decoder", "linear"), ("adaln", "dit"), ("decoder", "unet")])
def test_a_cuda_graph_draws_the_same(backbone, layers):
    torch.use_deterministic_algorithms(False)  # its fills and sorts are not what production captures
    model = tiny_model(backbone=backbone, image_layers=layers).cuda()
    options = dict(steps=5, guidance=Guidance(3.0, interval=(0.3, 0.8)), seed=1)
    plain, graphed = (model.draw(["a handwritten seven", "a"], cuda_graph=graph, **options) for graph in (False, True))
    for a, b in zip(plain, graphed, strict=True):
        assert torch.equal(a.latent, b.latent)


def test_each_prompt_may_have_a_seed_of_its_own(model):
    prompts = ["a handwritten seven", "a handwritten two", "a handwritten two"]
    drawn = model.draw(prompts, steps=2, seeds=[4, 9, 4])
    for prompt, seed, image in zip(prompts, (4, 9, 4), drawn):
        torch.testing.assert_close(image.latent, model.draw([prompt], steps=2, seed=seed)[0].latent)
    with pytest.raises(ValueError, match=r"seeds is \[1\] and there are 3 prompts; a list with one for each fits"):
        model.draw(prompts, seeds=[1])
    with pytest.raises(ValueError, match=r"draw: seeds\[1\] is 1.5; a whole number"):
        model.draw(prompts, seeds=[1, 1.5, 2])


def test_a_seed_gives_the_same_image_and_another_seed_another(model):
    first, again, other = (model.draw(["a handwritten two"], steps=2, seed=s)[0].latent for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_captions_are_written_without_drawing_and_within_the_limit(model, pictures):
    captions = model.caption(pictures, max_new_tokens=4)
    assert len(captions) == 4 and all(isinstance(c, str) for c in captions)


def test_images_of_another_size_are_drawn_when_asked(model):
    image, = model.draw(["a"], steps=1, image_size=(4, 12))
    assert image.latent.shape == (1, 4, 12)


def test_every_step_can_be_watched(model):
    seen = []
    images = model.draw(["a", "b"], steps=3, previews=True, on_event=seen.append)
    assert [(e.row, e.step, e.steps) for e in seen if isinstance(e, Preview)] == [
        (row, n, 3) for n in (1, 2, 3) for row in (0, 1)
    ]
    assert [e.row for e in seen if isinstance(e, Drawn)] == [0, 1]
    assert all(torch.equal(e.image.latent, images[e.row].latent) for e in seen if isinstance(e, Drawn))
    last = [e for e in seen if isinstance(e, Preview)][-1]
    # at the last step the estimate is the image
    torch.testing.assert_close(last.image.latent, images[1].latent, rtol=1e-4, atol=1e-4)
    assert len(list(model.stream([Text("a")], steps=3, max_images=0, max_new_tokens=2))) <= 2


def test_a_stream_says_what_the_whole_text_says_whatever_stops_it(model):
    """Also stops over several tokens, of which a beginning is written first, and that are never completed."""
    options, prompt = dict(max_new_tokens=8, max_images=0, temperature=1.0, seed=3), [Text("a handwritten seven")]

    def streamed(**more):
        return "".join(event.text for event in model.stream(prompt, **options, **more))

    def whole(**more):
        return "".join(part.text for part in model.generate(prompt, **options, **more))

    free = whole()
    assert streamed() == free and len(free) >= 8
    for start in range(0, len(free), 2):
        for length in range(1, 6):
            stop = free[start:start + length]
            assert streamed(stop=(stop,)) == whole(stop=(stop,)) == free[:free.index(stop)], stop
            never = (stop + "\0", stop[::-1] + "\0")
            assert streamed(stop=never) == whole(stop=never) == free, never


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_that_are_no_numbers_are_refused_and_never_taken_for_an_answer(model, temperature):
    row = Row(model, [Text("a")], Sampling(temperature=temperature), (1, 1), 0)
    scores = torch.zeros(model.config.text_config.vocab_size)
    scores[5] = torch.nan
    with pytest.raises(ValueError, match="outputs are not finite numbers; the dtype bfloat16 or float32"):
        row.choose(scores)
    with pytest.raises(ValueError, match="outputs are not finite numbers"):
        row.image(torch.full((1, model.config.patch_dim), torch.nan))


@pytest.mark.parametrize("call,message", [
    (lambda m: m.draw(["  "]), "a prompt is empty"),
    (lambda m: m.generate([]), "parts is empty"),
    (lambda m: m.draw(["a"], image_size=(7, 8)), r"image_size is \(7, 8\) and the patch size 2"),
    (lambda m: m.draw(["a"], steps=0), "steps is 0"),
])
def test_requests_that_do_not_fit_are_refused_by_name(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_layers_that_recompute_in_training_mode_keep_no_cache_and_are_refused():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="is in training mode and recomputes activations.*call model.eval"):
        model.draw(["a"], steps=2)
    assert len(model.eval().draw(["a"], steps=2)) == 1


NAN, INF = float("nan"), float("inf")
MEANINGLESS = [
    (name, value)
    for name, values in {
        "steps": (0, 1.5, True, NAN, "3", None),
        "max_new_tokens": (-1, 1.5, True, INF),
        "max_images": (-1, 0.5, False),
        "stop": ("a", ("a", 1), (), 3, ("",), ("a", ""), ("a" * 257,)),
        "seed": (1.5, NAN, "1", 2**64),
        "image_size": (8, 8.0, (8,), (8, 8, 8), (0, 8), (-8, 8), (8.0, 8), (True, 8), "88", (), (8, 7)),
        "guidance": (NAN, INF, -1.0, 1e300, "3", None, True),
        "temperature": (NAN, INF, -1.0, "0", True),
        "top_p": (NAN, -0.1, 1.1, True),
        "min_p": (NAN, INF, 1.5),
        "previews": (1, "no"),
        "cuda_graph": (0, None),
        "sampler": ("dim", None, 3),
    }.items()
    for value in values
]


@pytest.mark.parametrize("name,value", MEANINGLESS, ids=lambda x: str(x))
def test_an_option_that_no_sampler_can_mean_is_refused_by_name_before_anything_runs(model, monkeypatch, name, value):
    monkeypatch.setattr(model.backbone, "forward", lambda *_: pytest.fail("the model ran"))
    for call in (lambda: model.draw(["a"], **{name: value}), lambda: model.generate([Text("a")], **{name: value})):
        with pytest.raises(ValueError, match=f"{name} is .* fit"):
            call()


def test_an_unknown_option_is_answered_with_the_nearest(model, pictures):
    for call in (
        lambda: model.draw(["a"], guidence=2.0),
        lambda: model.caption(pictures, guidence=2.0),
        lambda: model.stream([Text("a")], guidence=2.0),
    ):
        with pytest.raises(ValueError, match="guidence is not an option; .* fit; did you mean guidance"):
            call()


def test_a_prompt_alone_is_a_list_of_one(model, pictures):
    options, written = dict(steps=1), dict(max_new_tokens=2, max_images=0)
    one, listed = model.draw("a handwritten seven", **options), model.draw(["a handwritten seven"], **options)
    assert len(one) == 1 and torch.equal(one[0].latent, listed[0].latent)
    assert torch.equal(model.draw(Text("a handwritten seven"), **options)[0].latent, listed[0].latent)
    for alone in ("a b", Text("a b")):
        same(model.generate(alone, **written), model.generate([Text("a b")], **written))
        assert list(model.stream(alone, **written)) == list(model.stream([Text("a b")], **written))
        batch = model.generate_batch(alone, **written)
        assert len(batch) == 1
        same(batch[0], model.generate([Text("a b")], **written))
    for ours, theirs in zip(
        model.generate_batch(["a", "a b"], **written),
        model.generate_batch([[Text("a")], [Text("a b")]], **written),
        strict=True,
    ):
        same(ours, theirs)
    assert model.caption(pictures[0], max_new_tokens=2) == model.caption([pictures[0]], max_new_tokens=2)


def test_no_prompts_give_nothing_back(model):
    assert model.draw([]) == model.caption([]) == model.generate_batch([]) == []
    with pytest.raises(ValueError, match="steps is 0"):
        model.draw([], steps=0)


@pytest.mark.parametrize(
    "call,message",
    [
        (
            lambda m, x: m.draw([x, Text("a")]),
            r"draw: prompts\[0\] is a Image; a str or a list of Text and Image fits, one for each prompt",
        ),
        (lambda m, x: m.generate_batch([Text("a"), x]), r"generate_batch: prompts\[0\] is a Text; a str or a list"),
        (lambda m, x: m.generate(["a"]), r"generate: parts\[0\] is a str; a Text or an Image fits"),
        (lambda m, x: m.generate([[Text("a")]]), r"generate: parts\[0\] is a list; a Text or an Image fits"),
        (lambda m, x: m.stream(None), "stream: parts is a NoneType; a list of Text and Image fits"),
        (lambda m, x: m.draw([3]), r"draw: prompts\[0\] is a int"),
        (lambda m, x: m.draw({"a": 1}), "draw: prompts is a dict"),
        (lambda m, x: m.draw([["a"]]), r"draw: prompts\[0\]\[0\] is a str"),
        (lambda m, x: m.draw([[x, Text(5)]]), r"draw: prompts\[0\]\[1\].text is a int; a str fits"),
        (lambda m, x: m.draw(Text(None)), r"draw: prompts\[0\].text is a NoneType; a str fits"),
        (lambda m, x: m.generate([Text(b"a")]), r"generate: parts\[0\].text is a bytes; a str fits"),
        (lambda m, x: m.caption(x.latent), "caption: images is a Tensor; a list of Image fits"),
        (lambda m, x: m.caption([x, "a"]), r"caption: images\[1\] is a str; an Image fits"),
        (lambda m, x: m.caption("a"), "caption: images is a str"),
        (lambda m, x: m.caption([x], question=3), "caption: question is a int; a str fits"),
        (lambda m, x: m.draw(["a"], max_images=2), "draw: max_images is 2; 1 fits"),
        (lambda m, x: m.caption([x], max_images=1), "caption: max_images is 1; 0 fits"),
    ],
)
def test_prompts_of_another_shape_are_refused_by_name(model, pictures, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, pictures[0])


def test_a_model_without_a_tokenizer_says_so():
    model = tiny_model()
    model.tokenizer = None
    with pytest.raises(ValueError, match="the model has no tokenizer with an EOS; set model.tokenizer"):
        model.draw(["a"])


def test_drawn_images_may_be_changed_and_trained_on(model):
    image, = model.draw(["a"], steps=1)
    weight = torch.ones_like(image.latent, requires_grad=True)
    (weight * image.latent).sum().backward()
    assert torch.equal(weight.grad, image.latent)
    image.latent.clamp_(-1, 1)


def test_every_seed_of_torch_and_numpy_draws(model):
    drawn = [model.draw(["a"], steps=1, seeds=[seed])[0].latent for seed in (np.int64(3), 3, 2**64 - 1, -1)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3]) and not torch.equal(drawn[1], drawn[2])
    for last in (np.int32(2**31 - 1), np.uint8(255)):  # whose sums wrap
        pairs = zip(*(model.draw(["a", "a"], steps=1, seed=seed) for seed in (last, int(last))))
        assert all(torch.equal(one.latent, other.latent) for one, other in pairs)
    with pytest.raises(ValueError, match=f"seed is {2**64}"):
        Sampling(seed=2**64)
