"""Attention over several processes against the same call in one: every kind of mask, grouped heads, scale and soft cap.

One spawn of four processes makes all cases, most of them in a group of the last two, and writes down how far each is
from one process; the tests read that.
"""
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModel

import tfkernels.integrations.transformers as integration
from tests.compare import assert_as_accurate
from tests.gloo_processes import needs_gloo, run_together
from tfkernels import TransfusionMask, attention
from tfkernels._library import INTERPRET
from tfkernels.mask import recipes
from tfkernels.parallel import Cut, SharedMask, cut_by_area, exchange, gathered_attention, ring_attention

WAYS = {"gathered": gathered_attention, "ring": ring_attention}
KINDS = {title: mask for title, mask in recipes.examples() if mask.query_len == mask.key_len}
HALVES = [[(10, 138), (160, 230)], [(100, 290), (310, 440)]]
DOCUMENTS = torch.tensor([[0] * 150 + [1] * 180 + [2] * 182, [0] * 300 + [1] * 180 + [-1] * 32])
PACKED = TransfusionMask.from_spans(HALVES, 512, documents=DOCUMENTS)
HIDDEN = TransfusionMask.from_spans(HALVES, 512, documents=DOCUMENTS, hidden=[[(160, 230)], []])
LONG = TransfusionMask.from_spans([[(10, 138), (400, 656)]], 1024, hidden=[[(10, 138)]], documents=torch.tensor(
    [[0] * 300 + [1] * 424 + [2] * 200 + [-1] * 100]))
OPTIONS = {"plain": {}, "scale": {"scale": 0.3}, "softcap": {"softcap": 2.0}, "both": {"scale": 0.3, "softcap": 5.0}}
HEADS = (1, 1), (4, 1), (6, 3)
DTYPES = torch.float64, torch.float32, torch.bfloat16
FAMILIES = "qwen2", "qwen3"

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="processes do not see which kernel runs; once, on PyTorch's, is enough"),
    needs_gloo]


def inputs(mask, heads, kv_heads, dtype):
    """q, k, v and the gradient of the output, of a whole row."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(mask.batch_size, n, mask.query_len, 16, generator=generator, dtype=torch.float64).to(dtype)
            for n in (heads, kv_heads, kv_heads, heads)]


def with_gradients(function, q, k, v, dout):
    """Return out, dq, dk, dv."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = function(q, k, v)
    return out.detach(), *(x.detach() for x in torch.autograd.grad(out, (q, k, v), dout))


def errors(way, mask, cut, group, heads=4, kv_heads=2, dtype=torch.float64, padding=None, **options):
    """The largest differences of out, dq, dk, dv from one process; `padding` is what tokens hold that see nothing."""
    rank, row = dist.get_rank(group), inputs(mask, heads, kv_heads, dtype)
    if padding is not None:
        row = [x.masked_fill((mask.visible_keys() == 0)[:, None, :, None], padding) for x in row]
    whole = with_gradients(lambda q, k, v: attention(q, k, v, mask, **options), *row)
    part = with_gradients(lambda q, k, v: WAYS[way](q, k, v, mask, cut, group, **options),
                          *(cut.take(x, rank, 2) for x in row))
    assert all(x.dtype == dtype for x in part)
    return [(x - cut.take(y, rank, 2)).abs().max().item() for x, y in zip(part, whole)]


def equal(found, limit=1e-13):
    """Whether no difference is larger than the limit, or NaN."""
    return all(difference <= limit for difference in found)


def accuracy(way, mask, cut, group, dtype):
    """What breaks the accuracy rule: at most twice the error of one process in the same dtype; "" if nothing does."""
    rank, rounded = dist.get_rank(group), inputs(mask, 4, 2, dtype)
    exact, whole = (with_gradients(lambda q, k, v: attention(q, k, v, mask), *row)
                    for row in ([x.double() for x in rounded], rounded))
    part = with_gradients(lambda q, k, v: WAYS[way](q, k, v, mask, cut, group),
                          *(cut.take(x, rank, 2) for x in rounded))
    try:
        for name, ours, theirs, true in zip(("out", "dq", "dk", "dv"), part, whole, exact):
            assert_as_accurate(name, ours, cut.take(theirs, rank, 2), cut.take(true, rank, 2))
    except AssertionError as broken:
        return str(broken)
    return ""


def autocast(way, mask, cut, group):
    """The dtype under autocast to bfloat16, and the largest difference from the same call in one process."""
    rank, (q, k, v, _) = dist.get_rank(group), inputs(mask, 4, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole = attention(q, k, v, mask)
        part = WAYS[way](*(cut.take(x, rank, 2) for x in (q, k, v)), mask, cut, group)
    return part.dtype, (part - cut.take(whole, rank, 2)).abs().max().item()


def kept(way, group):
    """Bytes that are kept between forward and backward, over those of this rank's q, k, v and output."""
    cut, sizes = cut_by_area(LONG, 2, 32), []
    part = [cut.take(x, dist.get_rank(group), 2).requires_grad_() for x in inputs(LONG, 4, 2, torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
        out = WAYS[way](*part[:3], LONG, cut, group)
    out.sum().backward()
    return sum(sizes) / sum(x.nbytes for x in part)


def repeats(way, group):
    """Whether a second call gives the same bits, gradients too."""
    cut = cut_by_area(HIDDEN, 2, 32)
    part = [cut.take(x, dist.get_rank(group), 2) for x in inputs(HIDDEN, 4, 2, torch.float32)]
    first, second = (with_gradients(lambda q, k, v: WAYS[way](q, k, v, HIDDEN, cut, group), *part) for _ in range(2))
    return all(torch.equal(x, y) for x, y in zip(first, second))


def refusals(group):
    """What each way says to arguments that do not fit; none sends a message first."""
    cut = cut_by_area(PACKED, 2, 32)
    q, k, v, _ = (cut.take(x, dist.get_rank(group), 2) for x in inputs(PACKED, 4, 2, torch.float32))
    wrong = {
        "q": (q[:, :, 1:], k, v, PACKED, cut), "k": (q, k[:, 0], v, PACKED, cut), "v": (q, k, v[:, :, 1:], PACKED, cut),
        "k and v": (q, k, v[..., :8], PACKED, cut), "mask": (q, k, v, PACKED.select_queries(cut.tokens[0]), cut),
        "cut": (q, k, v, PACKED, cut_by_area(PACKED, 1)), "cut is a list": (q, k, v, PACKED, [])}
    said = {}
    for way, function in WAYS.items():
        for name, given in wrong.items():
            with pytest.raises(ValueError) as error:
                function(*given, group)
            said[way, name] = str(error.value)
    return said


def of_model(family, way, group, attention_mask=None):
    """The largest difference of a transformers model's hidden states, in which every other layer has a window."""
    integration.register()
    config = AutoConfig.for_model(family, vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=20,
                                  layer_types=["sliding_attention", "full_attention"], use_sliding_window=True)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="tfkernels").double()
    masks = {"full_attention": LONG, "sliding_attention": TransfusionMask.causal(1024, window=20)}
    cut, rank = cut_by_area(LONG, 2, 32), dist.get_rank(group)
    shared = {kind: SharedMask(mask, cut, group, WAYS[way]) for kind, mask in masks.items()}
    row = torch.randn(1, 1024, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(1024)[None]
    with torch.no_grad():
        whole = model(inputs_embeds=row, position_ids=positions, transfusion_mask=masks, use_cache=False)[0]
        part = model(inputs_embeds=cut.take(row, rank), position_ids=cut.take(positions, rank), use_cache=False,
                     transfusion_mask=shared, attention_mask=attention_mask)[0]
    return (part - cut.take(whole, rank)).abs().max().item()


def padded(group):
    """What a model says to padding beside the mask that ranks share."""
    with pytest.raises(ValueError) as error:
        of_model("qwen3", "gathered", group, torch.arange(512)[None] > 3)
    return str(error.value)


def exchanged(group):
    """Whether rows arrive in the order of the ranks, and their gradients where they came from; what is refused."""
    rank = dist.get_rank(group)
    sent, received = ((1, 2), (0, 3))[rank], ((1, 0), (2, 3))[rank]
    x = (torch.arange(3.0)[:, None] + 10 * rank).requires_grad_()
    y = exchange(x, sent, received, group)
    (y * torch.tensor([1.0, 100.0])[rank]).sum().backward()
    arrived, factors = ([0.0], [1.0, 2.0, 10.0, 11.0, 12.0])[rank], ([1.0, 100.0, 100.0], [100.0] * 3)[rank]
    none = exchange(torch.zeros(0, 2), (0, 0), (0, 0), group)
    whole = exchange(x.detach().long(), sent, received, group)  # integers, such as the places of patches
    assert whole.dtype == torch.int64 and torch.equal(whole, y.detach().long()) and not whole.requires_grad
    none.sum().backward()
    said = []
    for counts in (((1,), (1,)), ((1, 1), (0, 3))):
        with pytest.raises(ValueError, match="exchange: .* fits?") as error:
            exchange(x, *counts, group)
        said.append(str(error.value))
    return y.flatten().tolist() == arrived and x.grad.flatten().tolist() == factors and none.requires_grad, said


def of_two(group):
    """All that two processes are asked."""
    found, cut = {"exchange": exchanged(group), "padded": padded(group)}, cut_by_area(HIDDEN, 2, 32)
    for way in WAYS:
        found["model", way] = [of_model(family, way, group) for family in FAMILIES]
        for kind, mask in KINDS.items():
            found["kind", way, kind] = errors(way, mask, cut_by_area(mask, 2, 3), group)
        for name, options in OPTIONS.items():
            found["option", way, name] = errors(way, HIDDEN, cut, group, **options)
        for heads in HEADS:
            found["heads", way, heads] = errors(way, HIDDEN, cut, group, *heads)
        for dtype in DTYPES:
            found["dtype", way, dtype] = errors(way, LONG, cut_by_area(LONG, 2, 32), group, dtype=dtype)
            found["accuracy", way, dtype] = accuracy(way, LONG, cut_by_area(LONG, 2, 32), group, dtype)
        found["uneven", way] = errors(way, PACKED, Cut((torch.arange(100), torch.arange(100, 512))), group)
        found["nan", way] = errors(way, PACKED, cut, group, padding=torch.nan)
        found["kept", way] = kept(way, group)
        found["repeats", way] = repeats(way, group)
        found["autocast", way] = autocast(way, LONG, cut_by_area(LONG, 2, 32), group)
    return found | refusals(group)


def work(rank, folder):
    pair, alone = dist.new_group([2, 3]), dist.new_group([1])
    found = of_two(pair) if rank >= 2 else {}
    if rank == 1:
        found = {("alone", way): errors(way, HIDDEN, cut_by_area(HIDDEN, 1), alone) for way in WAYS}
    found |= {("four", way): errors(way, HIDDEN, cut_by_area(HIDDEN, 4, 16), None) for way in WAYS}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("four")
    run_together(4, work, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.fixture(scope="module")
def two(four):
    """What each process of the group of two found."""
    return four[2:]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask_gives_what_one_process_gives(kind, way, two):
    for rank in two:
        assert equal(rank["kind", way, kind])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_scale_and_softcap_give_what_one_process_gives(name, way, two):
    for rank in two:
        assert equal(rank["option", way, name])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", HEADS)
def test_grouped_heads_give_what_one_process_gives(heads, way, two):
    for rank in two:
        assert equal(rank["heads", way, heads])


@pytest.mark.parametrize("way", WAYS)
def test_ranks_may_hold_uneven_numbers_of_tokens(way, two):
    for rank in two:
        assert equal(rank["uneven", way])


@pytest.mark.parametrize("way", WAYS)
def test_padding_that_holds_nan_reaches_no_rank(way, two):
    for rank in two:
        assert equal(rank["nan", way])


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_same_bits_each_time(way, two):
    assert all(rank["repeats", way] for rank in two)


@pytest.mark.parametrize("way", WAYS)
def test_other_ranks_keys_and_values_are_not_kept_for_backward(way, two):
    for rank in two:  # beside q, k, v and out there is the LSE, a sixteenth of out
        assert 1 <= rank["kept", way] <= 1.1


def test_gathered_keys_give_the_bits_of_one_process_where_chunks_are_those_of_its_kernel(two):
    for rank in two:
        for dtype in DTYPES:
            out, dq, _, _ = rank["dtype", "gathered", dtype]
            assert out == dq == 0, dtype


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_single_and_half_precision_err_at_most_twice_as_much_as_one_process(dtype, way, two):
    for rank in two:
        assert not rank["accuracy", way, dtype]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["q", "k", "v", "k and v", "mask", "cut", "cut is a list"])
def test_arguments_that_do_not_fit_the_cut_are_refused_by_name(name, way, two):
    for rank in two:
        said = rank[way, name]
        assert said.startswith(f"{way}_attention: {name.split()[0]} ") and " fit" in said


@pytest.mark.parametrize("way", WAYS)
def test_autocast_casts_as_it_does_in_one_process(way, two):
    for rank in two:
        dtype, error = rank["autocast", way]
        assert dtype == torch.bfloat16 and error <= (0 if way == "gathered" else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("way", WAYS)
def test_a_group_of_one_process_changes_nothing(way, four):
    assert equal(four[1]["alone", way], 0 if way == "gathered" else 1e-13)


@pytest.mark.parametrize("way", WAYS)
def test_four_processes_give_what_one_gives(way, four):
    for rank in four:
        assert equal(rank["four", way])


@pytest.mark.parametrize("way", WAYS)
def test_a_model_of_transformers_attends_with_its_tokens_under_a_mask_that_ranks_share(way, two):
    for rank in two:  # norms are float32 in any model
        assert max(rank["model", way]) <= 1e-6


def test_padding_beside_a_mask_that_ranks_share_is_refused(two):
    for rank in two:
        assert rank["padded"].startswith("tfkernels attention: attention_mask is ")


def test_rows_go_to_the_ranks_that_they_are_sent_to_and_gradients_come_back(two):
    for rank in two:
        arrived, (group, rows) = rank["exchange"]
        assert arrived and group.startswith("exchange: sent has 1 counts") and rows.startswith("exchange: sent adds up")
