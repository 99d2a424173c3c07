"""Plans: rows full, documents whole, shares exact, passes without replacement, steps balanced."""

import dataclasses

import numpy as np
import pytest

from transfusion.data.choices import source_key
from transfusion.data.plan import (
    Stream,
    _piece,
    balance,
    epochs_in_plan,
    make_plan,
    pack_lengths,
    passes_in_epoch,
    slowest_over_mean,
)


def stream(name, lengths, patches=None, **settings):
    """A source of documents, or of pairs with a picture of `patches` and one caption."""
    lengths = np.asarray(lengths, dtype=np.int32)
    patches = np.zeros(len(lengths), dtype=np.int64) if patches is None else np.asarray(patches, dtype=np.int64)
    bare = np.where(patches > 0, patches + 4, 0)
    return Stream(
        source_key(name),
        np.arange(len(lengths)),
        np.arange(len(lengths) + 1),
        lengths,
        bare,
        patches * (patches - 1) // 2,
        **settings,
    )


def realistic(count, *weights):
    """Text of 20 to 2,000 tokens, and pictures of 256 to 1,024 with captions."""
    random = np.random.default_rng(0)
    text = np.clip(np.exp(random.normal(5.5, 1.0, count // 2)), 20, 2000).astype(int)
    patches = random.choice([256, 480, 512, 1024], count - count // 2)
    weights = weights or (None, None)
    return [
        stream("text", text, weight=weights[0]),
        stream("pairs", patches + random.integers(10, 80, len(patches)), patches, weight=weights[1]),
    ]


def plan_of(streams, number=0, **options):
    return make_plan(streams, **{**dict(seed=0, number=number, seq_len=8192, step_rows=8), **options})


def row_lengths(streams, plan, seed=0):
    """Tokens in each row, from the lengths of what it holds."""
    lengths = np.empty(len(plan.records), dtype=np.int64)
    for i, one in enumerate(streams):
        mine = plan.sources == i
        lengths[mine] = one.chosen_lengths(seed, plan.passes[mine], np.searchsorted(one.records, plan.records[mine]))
    return np.add.reduceat(lengths, plan.offsets[:-1]), lengths


def test_a_realistic_mix_fills_its_rows_to_98_percent_and_no_row_is_too_long():
    streams = realistic(30_000)
    plan = plan_of(streams, epochs=1)
    rows, lengths = row_lengths(streams, plan)
    assert rows.max() <= 8192 and lengths.sum() / (8192 * len(rows)) == pytest.approx(plan.report.fill)
    assert plan.report.fill >= 0.98
    assert sum(plan.report.tokens) == lengths.sum() and plan.report.rows == len(rows)


@pytest.mark.parametrize("lengths", [[100] * 500, [60, 41] * 300, [100, 1], list(range(1, 101)) * 7, [51] * 40])
def test_packing_uses_each_document_once_and_splits_none(lengths):
    lengths = np.array(lengths)
    order, offsets = pack_lengths(lengths, 100, pool=16)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rows = [lengths[order[a:b]].sum() for a, b in zip(offsets, offsets[1:])]
    assert max(rows) <= 100 and min(rows) > 0 and offsets[-1] == len(lengths)


def test_no_document_waits_much_longer_than_the_pool_is_large():
    lengths = np.random.default_rng(1).integers(1, 60, 5000)
    order, _ = pack_lengths(lengths, 100, pool=64)
    assert (np.arange(len(order)) - order).min() >= -64  # none comes earlier than the pool allows
    assert (np.argsort(order) - np.arange(len(order))).max() < 64 * 8  # and none much later


def test_each_record_comes_once_a_pass_and_passes_are_in_different_orders():
    streams = [stream("a", [10] * 300), stream("b", [20] * 100, passes=3)]
    plan = plan_of(streams, epochs=2, seq_len=64)
    for i, (count, passes) in enumerate(((300, 2), (100, 6))):
        mine = plan.sources == i
        for number in range(passes):
            assert sorted(plan.records[mine & (plan.passes == number)]) == list(range(count))
        assert plan.passes[mine].max() == passes - 1
    first, second = (plan.records[(plan.sources == 0) & (plan.passes == number)] for number in (0, 1))
    assert not np.array_equal(first, second) and abs(np.corrcoef(first, second)[0, 1]) < 0.3


def test_pieces_of_an_epoch_lose_no_record_and_repeat_none():
    streams = [stream("a", [10] * 1000), stream("b", np.arange(5, 502), passes=2.5)]
    seen = {0: [], 1: []}
    for number in range(8):  # 8 quarters: two epochs
        plan = plan_of(streams, number, seq_len=600, epochs=0.25)
        for i in seen:
            seen[i] += zip(plan.passes[plan.sources == i].tolist(), plan.records[plan.sources == i].tolist())
    assert sorted(seen[0]) == [(p, r) for p in range(2) for r in range(1000)]
    assert sorted(seen[1]) == [(p, r) for p in range(5) for r in range(497)]


@pytest.mark.parametrize("by", ["tokens", "samples"])
def test_weights_are_the_shares_of_the_plan_to_three_digits(by):
    streams = realistic(60_000, 1.0, 3.0)
    plan = plan_of(streams, by=by, epochs=1)
    counts = np.array(plan.report.tokens if by == "tokens" else plan.report.samples)
    assert counts / counts.sum() == pytest.approx([0.25, 0.75], abs=0.0005)
    assert max(passes_in_epoch(streams, by)) == 1  # one source is read to its end


def test_a_source_with_weight_goes_on_in_the_next_epoch_where_it_stopped():
    streams = [stream("a", [10] * 1000, weight=1.0), stream("b", [10] * 500, weight=1.0)]
    seen = []
    for number in range(2):
        plan = plan_of(streams, number, seq_len=100, epochs=1)
        seen += plan.records[plan.sources == 0].tolist()
    assert sorted(seen) == list(range(1000))


def test_a_plan_depends_on_the_seed_and_its_number_alone():
    streams = realistic(4000)
    first, again, seeded, other = (
        plan_of(streams, number, seed=seed, epochs=1) for seed, number in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert all(np.array_equal(a, b) for a, b in zip(first[:4], again[:4]))
    assert not np.array_equal(first.records[:100], seeded.records[:100])
    assert not np.array_equal(first.records[:100], other.records[:100])


def test_a_new_source_changes_no_other_sources_order():
    alone, more = ([stream("a", [10] * 200)], [stream("b", [30] * 50), stream("a", [10] * 200)])
    orders = []
    for streams in (alone, more):
        at = len(streams) - 1
        orders.append(_piece(streams[at], 0, 0, 1, "tokens")[1])
    assert np.array_equal(*orders)


def test_sources_are_mixed_evenly_from_the_first_row_to_the_last():
    streams = [stream("a", [10] * 9000), stream("b", [10] * 1000)]
    plan = plan_of(streams, seq_len=1000, epochs=1)
    shares = [(plan.sources[a:b] == 1).mean() for a, b in zip(plan.offsets, plan.offsets[1:])]
    assert abs(np.mean(shares) - 0.1) < 0.01 and min(shares) > 0.03 and max(shares) < 0.2


def test_documents_longer_than_a_row_are_counted_and_left_out():
    streams = [stream("a", [10, 200, 30, 150]), stream("b", [40, 300])]
    plan = plan_of(streams, seq_len=100, epochs=1, step_rows=1)
    assert plan.report.too_long == [2, 1] and sorted(plan.records[plan.sources == 0]) == [0, 2]
    with pytest.raises(
        ValueError, match="plan: seq_len is 5 and the shortest of 6 documents has 10 tokens; raise seq_len"
    ):
        plan_of(streams, seq_len=5, epochs=1)


def test_a_step_s_rows_have_about_equal_attention_areas():
    plan = plan_of(realistic(40_000), epochs=1)
    assert plan.report.slowest < 1.05 < plan.report.slowest_before


def test_balancing_exchanges_rows_of_nearby_steps_only_and_begins_where_rows_are_counted_from():
    areas = np.random.default_rng(0).integers(1, 1000, 1003)
    rows = balance(areas, 8, 5, seed=0, number=0)
    assert sorted(rows.tolist()) == list(range(1003)) and rows[:3].tolist() == [0, 1, 2]
    assert np.abs(rows - np.arange(1003)).max() < 16 * 8
    assert slowest_over_mean(areas[rows], 8, 5) < 1.2 and slowest_over_mean(areas, 8, 5) > 1.6
    assert np.isnan(slowest_over_mean(areas[:3], 8))


def test_captions_are_left_out_in_their_share_and_the_plan_knows_the_shorter_length():
    streams = [stream("pairs", [500] * 4000, [400] * 4000, caption_first=0.8, caption_dropout=0.5)]
    lengths = streams[0].chosen_lengths(0, np.zeros(4000, dtype=int), np.arange(4000))
    assert set(lengths) == {500, 404} and abs((lengths == 404).mean() - 0.4) < 0.03
    assert streams[0].expected_lengths() == pytest.approx(np.full(4000, 0.6 * 500 + 0.4 * 404))


def test_one_of_several_captions_is_chosen_and_a_document_without_choices_stays():
    one = Stream(
        1, np.arange(2), np.array([0, 3, 4]), np.array([11, 12, 13, 50]), np.zeros(2, dtype=int), np.zeros(2, dtype=int)
    )
    found = {int(length) for number in range(50) for length in one.chosen_lengths(0, np.array([number]), np.array([0]))}
    assert found == {11, 12, 13} and one.expected_lengths().tolist() == [12, 50]
    assert one.chosen_lengths(0, np.array([3]), np.array([1])).tolist() == [50]


def test_a_plan_of_small_sources_covers_many_epochs_and_one_of_large_sources_a_piece():
    assert epochs_in_plan([stream("a", [10] * 300)], "tokens") == 219
    big = dataclasses.replace(stream("a", [10] * 1000), passes=3000)
    assert epochs_in_plan([big], "tokens") == 1 / 3


@pytest.mark.parametrize(
    "weights, words",
    [
        ((0.0, 0.0), "weights are .0.0, 0.0.; numbers of at least 0 fit, one of them above 0"),
        ((1.0, None), "a weight for every source fits, or none at all"),
        ((1.0, -1.0), "numbers of at least 0 fit"),
        ((1.0, float("nan")), "numbers of at least 0 fit"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        plan_of([stream("a", [10] * 10, weight=weights[0]), stream("b", [10] * 10, weight=weights[1])])


def test_sources_without_a_record_are_refused_where_they_have_a_weight():
    with pytest.raises(ValueError, match="none of 1 sources has a record"):
        plan_of([stream("a", [])])
    with pytest.raises(ValueError, match="source 1 has weight 2.0 and no record"):
        plan_of([stream("a", [10] * 10, weight=1.0), stream("b", [], weight=2.0)])
    plan = plan_of([stream("a", [10] * 10), stream("b", [])], epochs=1, seq_len=50)
    assert plan.report.samples == [10, 0]
    assert plan_of([stream("a", [10] * 10, weight=1.0), stream("b", [10], weight=0.0)], epochs=1).report.samples == [
        10,
        0,
    ]


def test_steps_are_balanced_where_rows_are_counted_from():
    streams = realistic(20_000)
    first, later = (plan_of(streams, 1, epochs=1, first_row=row).report for row in (0, 5))
    assert first.slowest < 1.05 and later.slowest < 1.05
