"""Choices that are hashes: equal to an independent scalar one, evenly spread, the same for one record and for many."""

import numpy as np
import pytest

from transfusion.data.choices import CAPTION, ORDER, choose, hashed, source_key, splitmix64, uniform

MASK = 2**64 - 1
SHARES = dict(caption_first=0.8, caption_dropout=0.1, flip=0.25)


def scalar(x):
    """Splitmix64 in Python's integers, written from the paper."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64_as_its_authors_publish_it():
    state, stream = 1234567, []
    for _ in range(3):  # the reference program's first outputs for this seed: hash(seed), hash(seed + golden), ...
        stream.append(int(splitmix64(state)))
        state = (state + 0x9E3779B97F4A7C15) & MASK
    assert stream == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_vectorised_hash_equals_a_scalar_one():
    numbers = [0, 1, 2**31, 2**32 - 1, 2**63, MASK, *range(1000, 1100)]
    assert splitmix64(np.array(numbers, dtype=np.uint64)).tolist() == [scalar(n) for n in numbers]
    for words in ((0,), (7, 1, 2**63 - 1, 5, 9), (3, 3, 3)):
        state = 0
        for word in words:
            state = scalar(state ^ word)
        assert int(hashed(*words)) == state
        assert float(uniform(*words)) == (state >> 11) * 2.0**-53


def test_one_record_gets_the_choice_that_it_has_among_many():
    records, passes, counts = np.arange(500), np.arange(500) % 3, 1 + np.arange(500) % 5
    many = choose(11, source_key("a"), passes, records, counts, **SHARES)
    for i in (0, 17, 499):
        one = choose(11, source_key("a"), int(passes[i]), int(records[i]), int(counts[i]), **SHARES)
        assert [x.item() for x in one] == [x[i].item() for x in many]


def test_choices_come_in_the_shares_asked_for_and_do_not_depend_on_each_other():
    records = np.arange(200_000)
    choice = choose(0, source_key("a"), 0, records, np.full(len(records), 5), **SHARES)
    assert abs(choice.image_first.mean() - 0.2) < 0.005
    assert abs(choice.dropped.mean() - 0.08) < 0.003 and not (choice.dropped & choice.image_first).any()
    assert abs(choice.flipped.mean() - 0.25) < 0.005
    assert np.abs(np.bincount(choice.caption, minlength=5) / len(records) - 0.2).max() < 0.005
    assert abs(np.corrcoef(choice.image_first, choice.flipped)[0, 1]) < 0.01
    assert abs(np.corrcoef(choice.caption, choice.flipped)[0, 1]) < 0.01


@pytest.mark.parametrize("other", [(1, ORDER, 5, 0), (0, CAPTION, 5, 0), (0, ORDER, 6, 0), (0, ORDER, 5, 1)])
def test_another_seed_purpose_source_or_pass_gives_other_choices(other):
    records = np.arange(10_000)
    here, there = uniform(0, ORDER, 5, 0, records), uniform(*other, records)
    assert len(np.intersect1d(here, there)) == 0 and abs(np.corrcoef(here, there)[0, 1]) < 0.05
