"""Lengths of records: those of their documents, kept, resumed, counted by reason; splits that never share a picture."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.transfusion.data.memory import (
    MemorySource,
    documents_of,
    kind_of,
    mixed_records,
    picture,
    sentence,
    tokenizer_of_words,
)
from transfusion.data import lengths as module
from transfusion.data.chat import ChatSettings, chat_parts
from transfusion.data.documents import cut, extra_area, has_target
from transfusion.data.grids import Grids, GridSettings
from transfusion.data.lengths import count_lengths, picture_name
from transfusion.data.sources.record import DataError, PictureFile, PictureRef, Record, Turn
from transfusion.sequence import Text, encode, lay_out


@pytest.fixture(scope="module")
def documents():
    return documents_of()


@pytest.mark.parametrize(
    "options", [{}, {"context": "clean"}, {"max_length": 25}, {"max_length": 40, "context": "clean"}]
)
def test_outlines_are_as_long_as_the_documents_and_have_their_targets(options):
    documents = documents_of(**options)
    for record in (record for record in mixed_records(40) if not isinstance(record, Exception)):
        for caption in range(max(1, len(record.captions))):
            for image_first, dropped in ((False, False), (True, False), (False, True)):
                parts = documents.parts(record, image_first, dropped, caption)
                outline, document = documents.outline(parts), documents.encode(parts).document
                assert (
                    outline.tokens == document.tokens
                    and outline.targets == document.targets
                    and outline.hidden == document.hidden
                )
                assert [(start, len(x), *rest) for start, x, *rest in outline.images] == [
                    (start, len(x), *rest) for start, x, *rest in document.images
                ]


def test_lengths_equal_those_of_the_encoded_parts(documents, tmp_path):
    records = mixed_records(60)
    lengths = count_lengths(MemorySource("mixed", records), documents, tmp_path)
    arrays = lengths.arrays
    for i, record in enumerate(records):
        forms = arrays["lengths"][arrays["starts"][i] : arrays["starts"][i + 1]]
        if isinstance(record, Exception):
            assert arrays["reason"][i] > 0
            continue
        parts = [documents.parts(record, caption=n) for n in range(len(forms))]
        assert forms.tolist() == [len(documents.encode(one).document.tokens) for one in parts]
        assert arrays["images"][i] == sum(isinstance(part, PictureRef) for part in parts[0])
        if record.captions and record.picture.loss:
            bare = documents.encode(documents.parts(record, dropped=True)).document
            assert arrays["bare"][i] == len(bare.tokens) and len(forms) == len(record.captions)
        else:
            assert arrays["bare"][i] == 0
    assert lengths.failures() == {"broken record": 3}
    assert lengths.examples["broken record"][0] == [4, "memory, row 4", "it is broken"]


@pytest.mark.parametrize("context", ["noised", "clean"])
def test_attention_areas_are_the_pairs_that_the_mask_shows(context):
    documents = documents_of(context=context)
    for record in (record for record in mixed_records(25) if not isinstance(record, Exception)):
        document = documents.encode(documents.parts(record)).document
        size = len(document.tokens)
        mask = lay_out([[document]], size, documents.kind.image_channels * documents.kind.patch_size**2).mask()
        assert size * (size + 1) // 2 + extra_area(document) == mask.dense().sum()


def test_a_second_count_reads_no_record_and_a_change_counts_anew(documents, tmp_path):
    source = MemorySource("mixed", mixed_records(20))
    first = count_lengths(source, documents, tmp_path)
    source.__class__ = type("Unreadable", (MemorySource,), {"__getitem__": lambda self, n: pytest.fail("read again")})
    again = count_lengths(source, documents, tmp_path)
    assert first.arrays.directory == again.arrays.directory
    source.__class__ = MemorySource
    tokenizer = documents.tokenizer
    others = [
        documents_of(tokenizer, context="clean"),
        documents_of(tokenizer, max_length=30),
        documents_of(tokenizer, Grids(GridSettings(side=32), 4)),
        documents_of(tokenizer, kind=kind_of(tokenizer, factor=2)),
    ]
    found = {count_lengths(source, other, tmp_path).arrays.directory for other in others}
    found |= {
        count_lengths(MemorySource("mixed", mixed_records(21)), documents, tmp_path).arrays.directory,
        first.arrays.directory,
    }
    assert len(found) == 6


def test_a_count_that_was_stopped_goes_on_where_it_was(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 10)
    records, read = mixed_records(45), []
    source = MemorySource("mixed", records)
    whole = count_lengths(source, documents, tmp_path / "whole")

    class Stopping(MemorySource):
        def __getitem__(self, number):
            read.append(number)
            if number == 33 and stop:
                raise KeyboardInterrupt
            return super().__getitem__(number)

    stop, source = True, Stopping("mixed", records)
    with pytest.raises(KeyboardInterrupt):
        count_lengths(source, documents, tmp_path / "stopped")
    stop = False
    read.clear()
    found = count_lengths(source, documents, tmp_path / "stopped")
    assert read == list(range(30, 45))
    for name in ("lengths", "starts", "bare", "reason", "low", "extra"):
        assert np.array_equal(found.arrays[name], whole.arrays[name])
    assert not (found.arrays.directory / "parts").exists()


def test_a_pool_of_processes_counts_the_same(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 10)
    source = MemorySource("mixed", mixed_records(45))
    alone, pool = (count_lengths(source, documents, tmp_path / str(workers), workers=workers) for workers in (0, 2))
    assert all(np.array_equal(alone.arrays[name], pool.arrays[name]) for name in module.TYPES)
    assert alone.examples == pool.examples and alone.kinds == pool.kinds


def test_records_that_cannot_be_used_are_counted_by_reason(documents, tmp_path):
    whole = picture(1)
    records = [
        Record("row 0", captions=("a dog",), picture=PictureRef(PictureFile("/nowhere/a.png"), True)),
        Record("row 1", captions=("a dog",), picture=PictureRef(b"", True, "b.png")),
        Record("row 2", captions=("a dog",), picture=PictureRef(b"text", True, "c.png")),
        Record("row 3", parts=(Text("a question", loss=False),)),
        Record("row 4", parts=(Text("\ud800 half a character"),)),
        Record("row 5"),
        Record("row 6", captions=("a dog",), picture=whole),
        Record("row 7", parts=(PictureRef(whole.file, False), Text("what is it?", loss=False))),
        DataError("row 8", "the row is cut off", "bad json"),
    ]
    lengths = count_lengths(MemorySource("bad", records), documents, tmp_path)
    assert lengths.failures() == {
        "missing picture": 1,
        "empty picture": 1,
        "unreadable picture": 1,
        "no target": 2,
        "text that cannot be tokenized": 1,
        "empty record": 1,
        "bad json": 1,
    }
    assert lengths.records("train", 0.0).tolist() == [6]
    ((number, where, reason),) = lengths.examples["empty picture"]
    assert (number, where) == (1, "b.png") and "empty" in reason
    assert [one[0] for one in lengths.examples["no target"]] == [3, 7]


def test_no_picture_is_in_both_splits(documents, tmp_path):
    random = np.random.default_rng(0)
    files = [PictureRef(PictureFile(f"{tmp_path}/pictures/{i}.png"), True, f"{i}.png") for i in range(60)]
    for i in range(60):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i).file)
    records = [Record(f"row {i}", captions=(sentence(random),), picture=files[random.integers(60)]) for i in range(150)]
    records += [Record(f"row {150 + i}", parts=tuple(files[n] for n in random.choice(60, 2))) for i in range(100)]
    for by in ("name", "content"):
        lengths = count_lengths(MemorySource("splits", records), documents, tmp_path / by, held_out_by=by)
        train, held_out = (lengths.records(split, 0.3) for split in ("train", "held-out"))
        seen = [{ref.name for n in numbers for ref in records[n].pictures()} for numbers in (train, held_out)]
        assert not seen[0] & seen[1] and min(map(len, seen)) > 5
        assert len(train) + len(held_out) < len(records) - 10  # those whose pictures fall into both are in neither
        assert len(lengths.records("train", 0.0)) == len(records) and len(lengths.records("held-out", 0.0)) == 0


def test_one_text_is_in_one_split_wherever_it_stands(documents, tmp_path):
    said = [Record(where, parts=(Text(text),)) for where, text in (("a", "a dog"), ("b", "a dog"), ("c", "a cat"))]
    low = count_lengths(MemorySource("texts", said), documents, tmp_path).arrays["low"]
    assert low[0] == low[1] != low[2]


def test_the_same_bytes_under_two_names_are_one_picture_by_content(documents, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(picture(0).file)
    records = [
        Record(name, captions=("a dog",), picture=PictureRef(PictureFile(f"{tmp_path}/{name}.png"), True))
        for name in ("a", "b")
    ]
    by_name, by_content = (
        count_lengths(MemorySource("same", records), documents, tmp_path / by, held_out_by=by).arrays["low"]
        for by in ("name", "content")
    )
    assert by_name[0] != by_name[1] and by_content[0] == by_content[1]
    with pytest.raises(ValueError, match="held_out_by is 'date'; 'name' or 'content' fits"):
        count_lengths(MemorySource("same", records), documents, tmp_path, held_out_by="date")


def test_a_picture_s_name_does_not_change_when_its_data_set_is_moved():
    assert picture_name(PictureRef(PictureFile("/a/b/train/1.jpg"), True)) == picture_name(
        PictureRef(PictureFile("/c/train/1.jpg"), True)
    )
    tars = [
        picture_name(PictureRef(PictureFile(path, 512, 9, f"{path}, 0001.jpg"), True, "0001.jpg"))
        for path in ("/a/00.tar", "/b/00.tar", "01.tar")
    ]
    assert tars == ["00.tar/0001.jpg", "00.tar/0001.jpg", "01.tar/0001.jpg"]


def test_a_picture_s_name_does_not_depend_on_where_a_command_is_started(tmp_path, monkeypatch):
    def named(path):
        return picture_name(PictureRef(PictureFile(path), True))

    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    paths = "sub/cat.jpg", "./sub/cat.jpg", "sub/../sub/cat.jpg", f"{tmp_path}/sub/cat.jpg"
    from_outside = [named(path) for path in paths]
    monkeypatch.chdir(tmp_path / "sub")
    from_inside = [named(path) for path in ("cat.jpg", "./cat.jpg", "../sub/cat.jpg")]
    assert {*from_outside, *from_inside} == {"sub/cat.jpg"}


def test_a_cut_never_goes_through_an_image():
    documents = documents_of()
    parts = [Text("a red bus"), picture(0), Text("the end")]
    whole = documents.encode(parts).document
    ((start, patches, *_),) = whole.images
    for length in range(2, len(whole.tokens) + 3):
        short = cut(whole, length)
        assert whole.tokens[: len(short.tokens)] == short.tokens and len(short.tokens) <= length
        if start - 1 < length < start + len(patches) + 1:
            assert len(short.tokens) == start - 1 and not short.images  # BOI is gone too
        else:
            assert len(short.tokens) == min(length, len(whole.tokens))
            assert len(short.images) == (length >= start + len(patches) + 1)


@pytest.mark.parametrize("context", ["noised", "clean"])
def test_a_pair_is_as_long_as_it_was_counted_in_either_order_and_without_its_caption(tmp_path, context):
    tokenizer, look = tokenizer_of_words(), picture(0, 16, 16)
    captions = ("a red bus under two small cats", "", "<s>a dog", "the")
    alone = documents_of(tokenizer).picture_tokens(look) + 1  # BOS
    longest = len(Text(captions[0]).token_ids(tokenizer, kind_of(tokenizer)))
    for max_length in (*range(alone, alone + longest + 4), None):
        documents = documents_of(tokenizer, max_length=max_length, context=context)
        record = Record("row 0", captions=captions, picture=look)
        lengths = count_lengths(MemorySource("pair", [record]), documents, tmp_path / str(max_length)).arrays
        assert lengths["reason"].tolist() == [0]
        orders = [documents.encode(documents.parts(record, image_first, caption=n)).document
                  for image_first in (False, True) for n in range(len(captions))]
        assert [len(one.tokens) for one in orders] == 2 * lengths["lengths"].tolist()
        bare = documents.encode(documents.parts(record, dropped=True)).document
        assert len(bare.tokens) == lengths["bare"][0] and all(len(x.hidden) < len(x.images) for x in (*orders, bare))
        text = [sum(one.targets[:-1]) for one in orders]  # BOI is one of the targets
        assert max(text) == max(min((max_length or 1000) - alone, longest + 1), 1)


def test_a_cut_caption_ends_in_eos_before_its_picture_alone():
    documents = documents_of(max_length=25)
    record = Record("row 0", captions=("a red bus under two small cats",), picture=picture(0, 16, 16))
    before, after = (documents.encode(documents.parts(record, image_first)).document for image_first in (False, True))
    assert len(before.tokens) == len(after.tokens) == 25
    eos = documents.tokenizer.eos_token_id
    assert (before.tokens[-1] == eos, before.targets[-1]) == (True, True) and eos not in after.tokens
    assert before.tokens[1:6] == after.tokens[19:24] and after.targets[19:] == [True] * 6


def test_a_drawn_picture_that_max_length_has_no_room_for_is_counted(tmp_path):
    documents = documents_of(max_length=18)
    records = [Record(f"pairs.json, row {i}", captions=("a dog",) * i, picture=picture(i, 16, 16)) for i in range(2)]
    lengths = count_lengths(MemorySource("pairs", records), documents, tmp_path)
    assert lengths.failures() == {"picture longer than max_length": 2} and not len(lengths.records("train", 0.0))
    ((_, where, reason), _) = lengths.examples["picture longer than max_length"]
    assert where == "pairs.json, row 0" and "its picture and BOS are 19 tokens, and max_length is 18" in reason


def test_a_document_whose_targets_were_cut_off_has_none():
    documents = documents_of(max_length=8)
    parts = [Text("a red bus under the large picture of two small cats", loss=False), Text("yes")]
    assert not has_target(documents.outline(parts), documents.tokenizer.eos_token_id)
    assert has_target(documents_of().outline(parts), documents.tokenizer.eos_token_id)


def test_pictures_for_an_autoencoder_are_handed_over_with_latents_still_to_come():
    tokenizer = tokenizer_of_words()
    documents = documents_of(
        tokenizer, kind=kind_of(tokenizer, channels=8, patch_size=2, factor=8), grids=Grids(GridSettings(side=64), 16)
    )
    document, pictures, noises = documents.encode([picture(0), Text("a dog")])
    ((_, patches, grid, _),) = document.images
    assert patches.shape == (grid[0] * grid[1], 8 * 4) and not patches.any()
    assert len(noises) == len(pictures) == 1
    assert pictures[0].dtype == torch.uint8 and pictures[0].shape == (3, grid[0] * 16, grid[1] * 16)


def test_text_is_tokenized_as_encode_does_even_where_it_begins_with_bos(documents):
    for text in ("<s>a dog", "a <s> dog", "<boi>", "", " a dog"):
        parts = [Text(text), Text("the end")]
        assert documents.outline(parts).tokens == encode(parts, documents.tokenizer, documents.kind).tokens


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2"])
def test_a_conversation_of_several_questions_is_as_long_as_its_document(template):
    def arranged(record, room, picture_tokens):
        return chat_parts(record, tokenizer, ChatSettings(template=template), room=room, picture_tokens=picture_tokens)

    tokenizer = tokenizer_of_words()
    documents = documents_of(tokenizer, template=arranged)
    for count in range(1, 6):
        record = Record("talk", turns=tuple(Turn(role, (said,)) for i in range(count)
                                            for role, said in (("user", f"the end {i}"), ("assistant", "a dog"))))
        parts = documents.parts(record)
        assert documents.outline(parts).tokens == documents.encode(parts).document.tokens


def test_a_killed_count_leaves_no_process_behind(tmp_path):
    code = ("import sys, time\nfrom tests.transfusion.data.memory import *\n"
            "from transfusion.data import lengths\nlengths.CHUNK = 10\n"
            "class Slow(MemorySource):\n    def __getitem__(self, number):\n"
            "        os.write(1, b'%d\\n' % os.getpid())\n"
            "        time.sleep(0.5)\n        return super().__getitem__(number)\n"
            "lengths.count_lengths(Slow('slow', mixed_records(45)), documents_of(), sys.argv[1], workers=2)")
    holder = subprocess.Popen([sys.executable, "-c", f"import os\n{code}", str(tmp_path)], stdout=subprocess.PIPE,
                              text=True)
    workers = {int(holder.stdout.readline()) for _ in range(4)}
    assert holder.pid not in workers
    holder.kill()
    holder.communicate(timeout=60)  # the pipe ends when all who hold it are gone


def test_a_process_of_the_pool_that_is_killed_while_it_waits_is_told(tmp_path):
    """Those that are left are ended by SIGTERM, whatever the command does with it."""
    code = ("import glob, os, signal, sys, threading, time\nfrom tests.transfusion.data.memory import *\n"
            "from transfusion.command import plain_errors\nfrom transfusion.data import lengths\n"
            "lengths.CHUNK = 10\n"
            "def children():\n    return set(open(f'/proc/self/task/{os.getpid()}/children').read().split())\n"
            "class Slow(MemorySource):\n    def __getitem__(self, number):\n"
            "        open(f'{sys.argv[1]}/busy-{os.getpid()}', 'w').close()\n"
            "        time.sleep(0.4)\n        return super().__getitem__(number)\n"
            "def kill():\n    busy = set()\n    while len(busy) < 2:\n        time.sleep(0.1)\n"
            "        busy = {name.rpartition('-')[2] for name in glob.glob(f'{sys.argv[1]}/busy-*')}\n"
            "    os.kill(int((children() - busy).pop()), signal.SIGKILL)\n"
            "threading.Thread(target=kill, daemon=True).start()\n"
            "with plain_errors():\n"
            "    lengths.count_lengths(Slow('slow', mixed_records(20)), documents_of(), sys.argv[1], workers=3)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: count_lengths: one of 3 processes was killed")


def test_a_conversation_without_a_template_is_refused(documents, tmp_path):
    record = Record("row 0", turns=(Turn("user", ("hello",)), Turn("assistant", ("hi",))))
    lengths = count_lengths(MemorySource("chat", [record]), documents, tmp_path)
    assert lengths.failures() == {"no chat template": 1}
    shutil.rmtree(tmp_path)

    def template(record, room, picture_tokens):
        return [Text(part, loss=turn.role == "assistant") for turn in record.turns for part in turn.parts]

    chatty = documents_of(documents.tokenizer, template=template, name="plain")
    lengths = count_lengths(MemorySource("chat", [record]), chatty, tmp_path)
    assert lengths.arrays["lengths"].tolist() == [len(chatty.encode(template(record, None, None)).document.tokens)]
