"""Batches: a function of the step with any number of workers, valid where records break, flat in memory."""

import dataclasses
import io
import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from transformers import LlamaConfig

from tests.transfusion.data.memory import (
    MemorySource,
    documents_of,
    kind_of,
    mixed_records,
    picture,
    sentence,
    tokenizer_of_words,
)
from transfusion import Transfusion, TransfusionConfig
from transfusion.data.grids import Grids, GridSettings
from transfusion.data.lengths import count_lengths
from transfusion.data.loader import Failure, FailureWatch, Loader, packed_rows
from transfusion.data.mixture import Mixture, MixtureSettings, SourceSettings, make_mixture, open_mixture
from transfusion.data.sources.record import DataError, PictureFile, PictureRef, Record
from transfusion.diffusion.objective import sample_times
from transfusion.sequence import Image, Text, encode

KILLED = "data: one of 1 processes that read ahead was killed, perhaps for want of"


def mixture_of(cache, *sources, documents=None, entries=None, **settings):
    """An opened mixture of sources in memory."""
    documents = documents or documents_of(context=settings.get("context", "noised"))
    entries = entries or tuple(SourceSettings(None) for _ in sources)
    lengths = tuple(count_lengths(source, documents, cache, workers=0) for source in sources)
    return Mixture(
        MixtureSettings(sources=entries, **settings),
        sources,
        tuple(source.name for source in sources),
        documents,
        lengths,
        cache,
    )


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return mixture_of(
        tmp_path_factory.mktemp("cache"),
        MemorySource("a", mixed_records(90)),
        MemorySource("b", mixed_records(40, seed=7)),
        held_out=0.1,
        flip=0.3,
        caption_first=0.5,
        caption_dropout=0.5,
    )


def rows_of(mixture, **options):
    return packed_rows(mixture, **{**dict(rows=2, seq_len=120, epochs=4), **options})


def same(a, b):
    """Whether two batches are equal to the bit."""
    tensors = [(getattr(a.sequence, f.name), getattr(b.sequence, f.name)) for f in dataclasses.fields(a.sequence)]
    tensors = [(x, y) for x, y in tensors if isinstance(x, torch.Tensor)] + [
        (a.limit, b.limit),
        (a.pixels, b.pixels),
        (a.picture, b.picture),
    ]
    return (
        all(torch.equal(x, y) for x, y in tensors)
        and a.failures == b.failures
        and a.sequence.layout.grids == b.sequence.layout.grids
    )


def test_batches_are_the_same_with_any_number_of_workers_and_after_a_resume(mixture):
    rows = rows_of(mixture)
    alone = list(Loader(rows, 0, 12, workers=0))
    for workers, start in ((2, 0), (3, 5), (0, 5), (2, 11)):
        found = list(Loader(rows_of(mixture), start, 12, workers=workers))
        assert len(found) == 12 - start and all(same(a, b) for a, b in zip(found, alone[start:]))
    assert not same(alone[0], alone[1])


def test_of_many_plans_two_are_open(mixture):
    planned = rows_of(mixture, epochs=1).planned
    kept = str(planned.directory)
    rows = planned.report(0)["rows"]
    for step in range(12):
        planned.row(step * rows)
        assert len(planned._plans) > step
        assert sum(kept in os.readlink(f"/proc/self/fd/{file}") for file in open_files()) <= 8
    again = rows_of(mixture, epochs=1).planned
    again.ensure(11 * rows)
    assert not again._open and again._firsts == planned._firsts[:len(again._firsts)]


def open_files():
    return [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]


def test_the_loader_leaves_the_run_s_random_numbers_alone(mixture):
    before = torch.get_rng_state()
    list(Loader(rows_of(mixture), 0, 2, workers=2))
    assert torch.equal(before, torch.get_rng_state())


def test_workers_leave_an_interrupt_to_the_run(mixture):
    """Ctrl-C goes to every process of a terminal; a run that it stops finishes its step and saves."""
    found, others = [], set(multiprocessing.active_children())  # which other tests may have left
    for batch in Loader(rows_of(mixture), 0, 12, workers=2):
        for worker in set(multiprocessing.active_children()) - others:
            os.kill(worker.pid, signal.SIGINT)
        found.append(batch)
    assert len(found) == 12 and not set(multiprocessing.active_children()) - others


def test_a_killed_worker_is_told_where_the_next_batch_is_asked_for_and_nowhere_else(mixture):
    others = set(multiprocessing.active_children())
    batches = iter(Loader(rows_of(mixture), 0, 12, workers=1))
    next(batches)
    worker, = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    for _ in range(20):
        time.sleep(0.05)  # PyTorch's own handler would raise here
    with pytest.raises(ValueError, match=KILLED):
        list(batches)


@pytest.mark.parametrize("after", [0.0, 0.005, 0.01, 0.02, 0.03])
def test_a_worker_that_is_killed_while_its_batches_are_on_their_way_is_told_as_well(mixture, after):
    others = set(multiprocessing.active_children())
    batches = iter(Loader(rows_of(mixture), 0, 12, workers=1))
    next(batches)
    worker, = set(multiprocessing.active_children()) - others
    time.sleep(after)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match=KILLED):
        list(batches)


def test_every_document_of_an_epoch_is_in_a_row_once_as_it_was_planned(mixture):
    rows = rows_of(mixture, epochs=1)
    report = rows.planned.report(0)
    seen = Counter()
    for row in range(report["rows"]):
        sources, records, passes = rows.planned.row(row)
        assert set(passes.tolist()) == {0}
        seen.update(zip(sources.tolist(), records.tolist()))
        documents = rows.read_row(row)
        assert not any(isinstance(one, Failure) for one in documents)
        streams = mixture.streams()
        for (document, *_), source, record in zip(documents, sources, records):
            at = np.searchsorted(streams[source].records, [record])
            assert len(document.tokens) == streams[source].chosen_lengths(0, np.zeros(1, dtype=int), at)[0]
    expected = {(i, n) for i, stream in enumerate(mixture.streams()) for n in stream.records.tolist()}
    too_long = sum(report["too_long"])
    assert set(seen) <= expected and len(seen) == len(expected) - too_long and set(seen.values()) == {1}


@pytest.mark.parametrize("context", ["noised", "clean"])
def test_pairs_that_are_cut_fit_the_rows_that_were_planned(tmp_path, context):
    random = np.random.default_rng(0)
    pairs = [Record(f"{i}", captions=(sentence(random, 8, 20),), picture=picture(i)) for i in range(40)]
    documents = documents_of(max_length=30, context=context)
    mixture = mixture_of(tmp_path, MemorySource("pairs", pairs), documents=documents, held_out=0.0, context=context,
                         caption_first=0.5, caption_dropout=0.2)
    rows = rows_of(mixture, seq_len=100, epochs=2)
    planned = rows.planned.report(0)
    read = [one for row in range(planned["rows"]) for one in rows.read_row(row)]
    assert len(read) == 80 and not any(isinstance(one, Failure) for one in read)
    assert sum(len(one.document.tokens) for one in read) == sum(planned["tokens"])
    assert all(one.document.images for one in read)


def test_choices_reach_the_documents(mixture):
    rows = rows_of(mixture)
    orders = Counter()
    for number in range(1, 90, 5):  # pairs
        for passes in range(8):
            document = rows.read(0, number, passes).document
            ((start, _, _, image_first),) = document.images
            orders[
                "dropped"
                if len(document.tokens) == start + len(document.images[0][1]) + 2 and start == 2
                else "image first"
                if image_first
                else "caption first"
            ] += 1
    total = sum(orders.values())
    assert abs(orders["image first"] / total - 0.5) < 0.15 and abs(orders["dropped"] / total - 0.25) < 0.12
    first, again, other = rows.read(0, 1, 0), rows.read(0, 1, 0), [rows.read(0, 1, n) for n in range(1, 6)]
    assert torch.equal(first.document.images[0][1], again.document.images[0][1])
    assert any(one.document.tokens != first.document.tokens for one in other)


def test_noise_limits_are_those_of_images_that_stand_before_their_caption(tmp_path):
    random = np.random.default_rng(0)
    pairs = MemorySource(
        "pairs", [Record(f"{i}", captions=(sentence(random, 2, 9),), picture=picture(i)) for i in range(40)]
    )
    documents = documents_of()
    for shares, context, expected in (
        ((0.0, 0.0), "noised", {0.25}),
        ((1.0, 0.5), "noised", {1.0}),
        ((0.5, 0.0), "noised", {0.25, 1.0}),
        ((0.0, 0.0), "clean", {1.0}),
    ):
        mixture = mixture_of(
            tmp_path / context,
            pairs,
            documents=documents_of(documents.tokenizer, context=context),
            noise_limit=0.25,
            caption_first=shares[0],
            caption_dropout=shares[1],
            context=context,
        )
        batch = rows_of(mixture)[0]
        assert set(batch.limit.tolist()) == expected and len(batch.limit) == batch.sequence.image_count
        assert (batch.sequence.drawn.all() and not batch.sequence.hidden.numel()) == (context == "noised")


def test_ranks_share_a_step_s_rows(mixture):
    whole = rows_of(mixture, rows=4)
    for step in (0, 3):
        tokens = [rows_of(mixture, rows=2, rank=rank, ranks=2)[step].sequence.tokens for rank in (0, 1)]
        assert torch.equal(torch.cat(tokens), whole[step].sequence.tokens)


def test_workers_read_plans_that_are_made_while_they_run(mixture, tmp_path):
    rows = rows_of(mixture, epochs=0.25)
    found = [batch.sequence.tokens for batch in Loader(rows, 0, 30, workers=2)]
    assert len(rows.planned._plans) > 3 and len(found) == 30
    again = rows_of(mixture, epochs=0.25)
    assert torch.equal(list(Loader(again, 29, 30, workers=0))[0].sequence.tokens, found[29])


def test_a_row_that_was_not_planned_is_refused_by_whoever_only_reads(mixture, tmp_path):
    rows = pickle.loads(pickle.dumps(rows_of(mixture, epochs=0.5, rows=3)))
    with pytest.raises(ValueError, match="a plan is made before its rows are read"):
        rows[0]


@pytest.mark.parametrize(
    "spoil, kind",
    [
        (lambda path: path.unlink(), "missing picture"),
        (lambda path: path.write_bytes(b""), "empty picture"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "unreadable picture"),
        (lambda path: path.write_bytes(picture(0, 8, 80).file), "changed record"),
    ],
)
def test_a_record_that_broke_after_it_was_counted_is_left_out_and_counted(tmp_path, spoil, kind):
    random, paths = np.random.default_rng(0), [tmp_path / f"{i}.png" for i in range(12)]
    for i, path in enumerate(paths):
        path.write_bytes(picture(i, 16, 16).file)
    records = [
        Record(f"row {i}", parts=(Text(sentence(random, 2, 6)), PictureRef(PictureFile(str(path)), True, path.name)))
        for i, path in enumerate(paths)
    ]
    documents = documents_of(grids=Grids(GridSettings(sizes=((16, 16), (40, 16))), 4))
    mixture = mixture_of(tmp_path / "cache", MemorySource("pictures", records), documents=documents, held_out=0.0)
    longest = int(mixture.lengths[0].arrays["lengths"].max())
    rows = rows_of(mixture, rows=1, seq_len=longest, epochs=1)  # one document fills a row
    before = {n: rows[n] for n in range(12)}
    assert not any(batch.failures for batch in before.values())
    spoil(paths[3])
    failed = [n for n in before if not same(rows[n], before[n])]
    assert len(failed) == 1
    batch = rows[failed[0]]
    (failure,) = batch.failures
    assert failure.kind == kind and batch.documents == 1 and (batch.sequence.documents == -1).all()
    assert batch.sequence.tokens.shape == (1, longest) and batch.sequence.image_count == 0
    assert all(same(a, b) for a, b in zip(Loader(rows, 0, 12, workers=2), Loader(rows, 0, 12, workers=0)))


class Failing(MemorySource):
    """Every record fails from some reading on."""

    broken = 0

    def __getitem__(self, number):
        if number < self.broken:
            raise DataError(f"row {number}", "the disk is gone", "missing file")
        return super().__getitem__(number)


def test_a_rising_share_of_failures_stops_the_run_and_a_few_do_not(tmp_path):
    random = np.random.default_rng(0)
    source = Failing("text", [Record(f"{i}", parts=(Text(sentence(random, 3, 6)),)) for i in range(400)])
    rows = rows_of(mixture_of(tmp_path, source, held_out=0.0), epochs=1)
    source.broken = 12  # 3 %
    loader = Loader(rows, 0, 12, workers=0)
    assert {failure.kind for batch in loader for failure in batch.failures} == {"missing file"}
    source.broken = 40
    with pytest.raises(
        ValueError,
        match=r"data: \d+ of the last \d+ documents could not be read, \d+ of them for: missing file "
        r"\(row \d+: the disk is gone\); at most 5 % may fail",
    ):
        list(Loader(rows, 0, 12, workers=0))


def test_failures_are_judged_by_the_last_thousand_documents_and_not_before_two_hundred():
    bad = tuple(Failure("a", "b", "c") for _ in range(20))
    watch = FailureWatch()
    watch.add(150, bad)  # 13 %, but too early to tell
    watch.add(1000, ())  # 1.7 %
    for _ in range(20):
        watch.add(100, bad[:4])
    with pytest.raises(ValueError, match="56 of the last 1,000"):
        watch.add(100, bad)
    early = FailureWatch()
    early.add(100, bad[:6])
    with pytest.raises(ValueError, match="12 of the last 200"):
        early.add(100, bad[:6])


@pytest.mark.parametrize("context, channels", [("noised", 3), ("clean", 3), ("noised", 1)])
def test_latents_of_an_autoencoder_take_their_images_places(tmp_path, context, channels):
    tokenizer = tokenizer_of_words()
    kind = kind_of(tokenizer, channels=4, patch_size=2, factor=4)
    documents = documents_of(tokenizer, Grids(GridSettings(side=32), 8, channels), kind, context=context)
    mixture = mixture_of(tmp_path, MemorySource("a", mixed_records(60)), documents=documents, context=context)
    batch = rows_of(mixture)[0]
    pictures = batch.pictures()
    assert pictures and not batch.sequence.patches.any() and batch.pixels.dtype == torch.uint8
    whole = [one.pictures for row in (0, 1) for one in rows_of(mixture).read_row(row)]
    for found, kept in zip(pictures, [one for some in whole for one in some], strict=True):
        assert found.shape[0] == channels and torch.equal(found, kept.float() / 127.5 - 1)
    latents = [torch.randn(4, x.shape[1] // 4, x.shape[2] // 4) for x in pictures]
    filled = batch.with_latents(latents, 2)
    for n, (start, stop) in enumerate(zip(batch.sequence.layout.offsets, batch.sequence.layout.offsets[1:])):
        latent = latents[int(batch.picture[n])]
        document = encode([Text("a"), Image(latent)], tokenizer, kind)
        assert torch.equal(filled.patches[start:stop], document.images[0][1])
    assert (len(batch.picture) > len(pictures)) == (context == "clean")
    with pytest.raises(ValueError, match="with_latents: latents have"):
        batch.with_latents([x[:, :2, :2] for x in latents], 2)


def test_batches_of_files_are_the_same_in_a_process_that_got_them_by_pickle(tmp_path):
    """As workers do where processes are not forked: no array, no open file and no record travels."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(picture(i).file)
        (tmp_path / f"{i}.txt").write_text("a red bus")
    tokenizer = tokenizer_of_words()
    settings = make_mixture({"sources": [{"format": "imagefolder", "path": "."}], "pictures": {"side": 16}}, tmp_path)
    mixture = open_mixture(settings, tokenizer, kind_of(tokenizer), folder=tmp_path, workers=0)
    rows = packed_rows(mixture, rows=1, seq_len=100)
    here, sent = rows[0], pickle.dumps(rows)
    assert same(pickle.loads(sent)[0], here) and not here.failures
    assert len(sent) < 3 * len(pickle.dumps(tokenizer)) + 5000


def test_what_workers_hold_is_small_and_waiting_is_measured(mixture):
    rows = rows_of(mixture)
    assert len(pickle.dumps(rows.planned)) < 2000
    loader = Loader(rows, 0, 3, workers=0)
    for _ in loader:
        assert loader.waited > 0
    assert len(loader) == 3


@pytest.mark.parametrize("autoencoder", [False, True])
def test_a_model_learns_from_the_batches(tmp_path, autoencoder):
    """Captions that name the colour of their picture, read and drawn: both losses fall."""
    tokenizer = tokenizer_of_words()
    colours = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}
    records = []
    for i, (name, colour) in enumerate(list(colours.items()) * 8):
        file = io.BytesIO()
        Picture.new("RGB", (12, 8 + i % 9), colour).save(file, "PNG")
        records.append(Record(f"{i}", captions=(f"a {name} bus",), picture=PictureRef(file.getvalue(), True)))
    kind = kind_of(tokenizer, factor=2 if autoencoder else 1)
    grids = Grids(GridSettings(side=8 * kind.factor), 4 * kind.factor)
    mixture = mixture_of(
        tmp_path,
        MemorySource("colours", records),
        documents=documents_of(tokenizer, grids, kind),
        held_out=0.0,
        caption_first=0.5,
    )
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    own = dict(
        boi_token_id=kind.boi_token_id,
        eoi_token_id=kind.eoi_token_id,
        image_channels=3,
        patch_size=4,
        image_size=(8, 8),
        objective="x0",
    )
    text = LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)
    model = Transfusion(TransfusionConfig(text_config=text, **own), tokenizer)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 5e-3), []
    for step, batch in enumerate(Loader(packed_rows(mixture, rows=2, seq_len=96), 0, 40, workers=0)):
        sequence = batch.sequence
        if autoencoder:  # one that halves pictures
            latents = [torch.nn.functional.avg_pool2d(picture, 2) for picture in batch.pictures()]
            sequence = batch.with_latents(latents, 4)
        times = sample_times(
            "uniform", batch.limit, sequence.layout.offsets.diff(), None, torch.Generator().manual_seed(step)
        )
        output = model(sequence, times, step)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((output.text_loss.item(), output.diffusion_loss.item()))
    first, last = np.mean(losses[:5], 0), np.mean(losses[-5:], 0)
    assert (last < 0.6 * first).all(), (first, last)
