"""How a row's tokens are dealt to ranks: balance of area and of tokens, and what a cut gives back.

`python -m tests.tfkernels.parallel.test_cut` prints the table of docs/kernels.md.
"""
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tfkernels.mask.test_mask import arguments, build
from tfkernels import TransfusionMask
from tfkernels._library import INTERPRET
from tfkernels.parallel import Cut, cut_by_area

ROW = 131_072
RANKS = (2, 3, 4, 6, 8, 16, 32, 64)


def packed_row(mean, hidden=False, seq_len=ROW):
    """A row of documents of exponential lengths; two of three hold images of 256 tokens with captions between them."""
    rng, spans, lengths = random.Random(0), [], []
    while sum(lengths) < seq_len:
        at = sum(lengths)
        lengths.append(min(seq_len - at, max(64, int(rng.expovariate(1 / mean)))))
        start, end = at + 20, at + lengths[-1]
        while len(lengths) % 3 and start + 258 < end:
            spans.append((start, start + 256))
            start += 256 + rng.randint(20, 200)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    return TransfusionMask.from_spans([spans], seq_len, documents=documents, hidden=[spans[::2]] if hidden else None)


def slowest(keys, cut):
    """Area of the slowest rank over the mean area, from the number of keys that each query sees."""
    areas = torch.stack([keys[:, tokens].sum() for tokens in cut.tokens]).double()
    return (areas.max() / areas.mean()).item()


ROWS = {
    "documents of 600 tokens": lambda: packed_row(600),
    "documents of 4,000": lambda: packed_row(4_000),
    "documents of 30,000": lambda: packed_row(30_000),
    "one document": lambda: packed_row(1e9),
    "documents of 4,000, half of the images hidden": lambda: packed_row(4_000, hidden=True),
    "one text": lambda: TransfusionMask.causal(ROW),
    "half of it padding": lambda: TransfusionMask.causal(ROW, torch.arange(ROW)[None].lt(ROW // 2).int() - 1),
}


@pytest.mark.skipif(INTERPRET, reason="a row of 131k tokens is too long for the interpreter, and the cut is the same")
@pytest.mark.parametrize("kind", ROWS)
def test_the_slowest_of_2_to_64_ranks_has_at_most_a_tenth_more_than_the_mean_of_131k_tokens(kind):
    mask = ROWS[kind]()
    keys = mask.visible_keys()
    for ranks in RANKS:
        cut = cut_by_area(mask, ranks)
        assert slowest(keys, cut) <= 1.1, f"{kind}, {ranks} ranks"
        assert cut.longest - min(len(x) for x in cut.tokens) <= 128, f"{kind}, {ranks} ranks"


@pytest.mark.skipif(INTERPRET, reason="a row of 131k tokens is too long for the interpreter, and the cut is the same")
def test_runs_of_equal_length_are_far_from_balanced_where_the_cut_is_not():
    mask = packed_row(4_000)
    assert slowest(mask.visible_keys(), Cut(torch.arange(ROW).chunk(8))) > 1.5


@given(arguments(), st.integers(1, 5), st.integers(1, 4))
def test_every_token_has_one_rank_and_tensors_come_back_in_order(given_arguments, ranks, chunk_len):
    mask = build(**given_arguments)
    if -(-mask.query_len // chunk_len) < ranks:
        with pytest.raises(ValueError, match="cut_by_area: ranks is .* fits; make chunk_len smaller"):
            cut_by_area(mask, ranks, chunk_len)
        return
    cut = cut_by_area(mask, ranks, chunk_len)
    x = torch.randn(2, mask.query_len, 3, device=mask.lo.device)
    parts = [cut.take(x, rank) for rank in range(ranks)]
    assert (cut.ranks, cut.seq_len) == (ranks, mask.query_len)
    assert torch.equal(cut.join(parts), x) and max(part.shape[1] for part in parts) == cut.longest
    areas = [mask.select_queries(tokens).area() for tokens in cut.tokens]
    assert sum(areas) == mask.area() and areas == [mask.visible_keys()[:, tokens].sum() for tokens in cut.tokens]
    together = torch.cat([torch.nn.functional.pad(part, (0, 0, 0, cut.longest - part.shape[1])) for part in parts], 1)
    assert torch.equal(together[:, cut.places], x)


@pytest.mark.parametrize("tokens", [
    [], [[0, 1], [1, 2]], [[0, 1], [3]], [[1, 0], [2]], [[0.0, 1.0]], [[[0, 1]]]], ids=str)
def test_tokens_that_are_not_those_of_one_row_are_refused(tokens):
    with pytest.raises(ValueError, match="Cut: tokens .* fit"):
        Cut([torch.tensor(x) for x in tokens])


@pytest.mark.parametrize("tokens", [[[0, 1], [2]], 3, None], ids=str)
def test_tokens_that_are_no_tensors_are_refused(tokens):
    with pytest.raises(ValueError, match="Cut: tokens is .* fits"):
        Cut(tokens)


@pytest.mark.parametrize("call,words", [
    (lambda cut: cut.take(torch.zeros(2, 4, 64, 8), 0), r"Cut.take: x is .* of shape \(2, 4, 64, 8\) .* with dim"),
    (lambda cut: cut.take(torch.zeros(64), 0), "Cut.take: x is .* 64 tokens in dimension 1 fits"),
    (lambda cut: cut.take([1], 0), "Cut.take: x is a list"), (lambda cut: cut.take(torch.zeros(1, 64), 2), "rank is 2"),
    (lambda cut: cut.take(torch.zeros(1, 64), -1), "Cut.take: rank is -1; 0 to 1 fits"),
    (lambda cut: cut.join([torch.zeros(1, 32), torch.zeros(1, 40)]), r"Cut.join: parts put together is .* \(1, 72\)")])
def test_what_is_not_a_whole_rows_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call(cut_by_area(TransfusionMask.causal(64), 2, 16))


@pytest.mark.parametrize("change,name", [
    ({"mask": "causal"}, "mask"), ({"mask": TransfusionMask.causal(64).queries(8, 24)}, "mask"),
    ({"mask": TransfusionMask.causal(64).keys(8, 24)}, "mask"), ({"ranks": 0}, "ranks"), ({"ranks": 5}, "ranks"),
    ({"chunk_len": 0}, "chunk_len"), ({"chunk_len": 2.0}, "chunk_len")], ids=str)
def test_what_cannot_be_cut_is_refused_by_name(change, name):
    with pytest.raises(ValueError, match=f"cut_by_area: {name} is .* fits"):
        cut_by_area(**{"mask": TransfusionMask.causal(64), "ranks": 2, "chunk_len": 16, **change})


if __name__ == "__main__":
    print("| row | 2 ranks | 4 | 8 | 16 | 32 | 64 | 64, one run each |\n|---|---|---|---|---|---|---|---|")
    for kind, made in ROWS.items():
        mask = made()
        keys = mask.visible_keys()
        dealt = [slowest(keys, cut_by_area(mask, ranks)) for ranks in (2, 4, 8, 16, 32, 64)]
        print(f"| {kind} |", *(f"{found:.3f} |" for found in dealt),
              f"{slowest(keys, Cut(torch.arange(ROW).chunk(64))):.2f} |")
