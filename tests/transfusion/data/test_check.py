"""`transfusion data check`: what it counts, names, draws, and when it says that a mixture may train."""
import itertools
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from tests.transfusion.data.memory import picture
from transfusion.cli import main
from transfusion.data import check_pictures
from transfusion.data.check import CheckSettings, check_mixture, tokenizer_of
from transfusion.data.check_pictures import DRAWN, TARGET, Shown, pieces, unpatched
from transfusion.data.loader import packed_rows
from transfusion.data.mixture import open_mixture, read_mixture

PIXELS = dict(factor=1, patch_size=4, seq_len=128, rows=2, workers=1, vocabulary=300)


def folder_of_pairs(folder, count):
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.png").write_bytes(picture(i, 20, 16).file)
        (folder / f"{i}.txt").write_text(f"the red dog {i}")
    return folder


def conversations(file, count, images):
    def said(i):
        return [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"number {i}"}]

    rows = [{"id": str(i), "image": f"{images}/{i}.png", "conversations": said(i)} for i in range(count)]
    file.write_text(json.dumps(rows))


@pytest.fixture
def mixture_file(tmp_path):
    folder_of_pairs(tmp_path / "pictures", 8)
    conversations(tmp_path / "chat.json", 6, "pictures")
    return write_mixture(tmp_path)


def write_mixture(folder, **settings):
    file = folder / "mix.json"
    sources = [{"format": "imagefolder", "path": "pictures"}, {"format": "llava", "path": "chat.json"}]
    file.write_text(json.dumps({"pictures": {"side": 16}, "held_out": 0.0, **settings, "chat": {"system": ""},
                                "sources": sources}))
    return file


def checked(file, tmp_path, capsys, **options):
    """(whether it may train, what was printed)"""
    verdict = check_mixture(file, CheckSettings(**{**PIXELS, "out": tmp_path / "out", **options}))
    return verdict, capsys.readouterr().out


def row_of(said, name):
    """The cells of a source's line in the first table, by the head's names."""
    lines = said.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("source"))
    line = next(line for line in lines[head:] if line.startswith(name))
    names = ("records", "usable", "pictures", "missing", "unreadable", "no target", "other", "tokens", "longest")
    return dict(zip(names, (int(cell.replace(",", "")) for cell in line.split()[1:10])))


def test_a_good_mixture_is_counted_drawn_and_may_train(mixture_file, tmp_path, capsys):
    verdict, said = checked(mixture_file, tmp_path, capsys)
    assert verdict and said.splitlines()[-1] == "this may train" and said.isascii()
    pairs, chats = row_of(said, "pictures"), row_of(said, "chat")
    assert (pairs["records"], pairs["usable"], pairs["pictures"], pairs["other"]) == (8, 8, 8, 0)
    assert (chats["records"], chats["usable"], chats["pictures"]) == (6, 6, 6)
    mixture = opened(mixture_file)
    for lengths, counts in zip(mixture.lengths, (pairs, chats)):
        found = lengths.arrays["lengths"]
        assert (counts["tokens"], counts["longest"]) == (found.sum(), found.max())
    assert "20x16" in said and "% full" in said and "an epoch" in said
    for name in ("lengths.png", "samples.png"):
        with Picture.open(tmp_path / "out" / name) as drawn:
            assert min(drawn.size) > 200 and len(drawn.convert("RGB").getcolors(2**24)) > 20


def test_dollars_in_the_name_of_a_source_are_no_formula(tmp_path, capsys):
    folder_of_pairs(tmp_path / "pictures", 4)
    sources = [{"format": "imagefolder", "path": "pictures", "name": r"$\nothing{$"}]
    (tmp_path / "mix.json").write_text(json.dumps({"pictures": {"side": 16}, "held_out": 0.0, "sources": sources}))
    verdict, _ = checked(tmp_path / "mix.json", tmp_path, capsys)
    assert verdict and (tmp_path / "out" / "lengths.png").is_file()


def test_a_name_that_begins_with_an_underscore_stands_in_the_legend(tmp_path, capsys, monkeypatch):
    drawn, name = [], "_pictures"
    monkeypatch.setattr(check_pictures.plt, "close", drawn.append)
    folder_of_pairs(tmp_path / "pictures", 4)
    sources = [{"format": "imagefolder", "path": "pictures", "name": name}]
    (tmp_path / "mix.json").write_text(json.dumps({"pictures": {"side": 16}, "held_out": 0.0, "sources": sources}))
    checked(tmp_path / "mix.json", tmp_path, capsys)
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == [name]


def test_names_of_files_that_are_no_utf8_are_names(tmp_path, capsys):
    place = tmp_path / os.fsdecode(b"caf\xe9")
    folder_of_pairs(place, 4)
    for number, suffix in itertools.product(range(3), ("png", "txt")):
        os.rename(place / f"{number}.{suffix}", place / os.fsdecode(b"th\xe9%d.%s" % (number, suffix.encode())))
    (place / os.fsdecode(b"th\xe90.png")).write_bytes(b"none")
    sources = [{"format": "imagefolder", "path": "."}]
    (place / "mix.json").write_text(json.dumps({"pictures": {"side": 16}, "held_out": 0.0, "sources": sources}))
    main(["data", "check", str(place / "mix.json"), "--out", str(tmp_path / "out"), "--factor", "1", "--patch-size",
          "4", "--allow", "0.3", "--workers", "1", "--vocabulary", "300"])
    said = capsys.readouterr().out
    cells = row_of(said, r"caf\udce9")
    assert (cells["records"], cells["usable"], cells["unreadable"]) == (4, 3, 1) and r"th\udce90.png: " in said


def opened(file):
    settings, shape = read_mixture(file), CheckSettings(**PIXELS)
    tokenizer, config, factor = shape.load(file)
    return open_mixture(settings, tokenizer, config, folder=file.parent, factor=factor, workers=1)


def test_missing_broken_and_empty_records_are_counted_and_named_with_file_and_row(mixture_file, tmp_path, capsys):
    (tmp_path / "pictures" / "1.png").unlink()
    (tmp_path / "pictures" / "1.txt").unlink()
    (tmp_path / "pictures" / "2.png").write_bytes(b"")
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture at all")
    rows = json.loads((tmp_path / "chat.json").read_text())
    rows[5]["conversations"][1]["value"] = "<image>"
    rows[4] = {"id": "4", "conversations": [{"from": "human", "value": "hello"}]}
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    verdict, said = checked(mixture_file, tmp_path, capsys)
    assert not verdict and "this may train" not in said
    pairs, chats = row_of(said, "pictures"), row_of(said, "chat")
    assert (pairs["records"], pairs["usable"], pairs["missing"], pairs["unreadable"]) == (7, 5, 0, 2)
    names = "usable", "missing", "unreadable", "no target", "other"
    assert tuple(chats[name] for name in names) == (1, 1, 2, 1, 1)
    assert "chat.json, row 1: " in said and "chat.json, row 5: " in said and "3.png" in said
    assert "not yet: 5 of 6 records of 'chat' cannot be used, 83.3 %; at most 5 % fit" in said
    assert checked(mixture_file, tmp_path, capsys, allow=0.9)[0]


def test_pictures_that_only_decoding_finds_broken_are_found_by_decode(mixture_file, tmp_path, capsys):
    file = tmp_path / "pictures" / "6.png"
    file.write_bytes(file.read_bytes()[:150])
    assert checked(mixture_file, tmp_path, capsys)[0]
    verdict, said = checked(mixture_file, tmp_path, capsys, decode=True)
    assert not verdict and row_of(said, "pictures")["unreadable"] == 1 and row_of(said, "pictures")["usable"] == 7
    assert "6.png" in said and "pictures: 1 record, unreadable picture" in said


def test_rows_that_are_too_short_for_the_documents_are_told(mixture_file, tmp_path, capsys):
    verdict, said = checked(mixture_file, tmp_path, capsys, seq_len=8)
    assert not verdict and "raise seq_len" in said
    longest = max(row_of(said, name)["longest"] for name in ("pictures", "chat"))
    verdict, said = checked(mixture_file, tmp_path, capsys, seq_len=longest - 1)
    assert not verdict and "are longer than a row" in said and "max_length in the mixture" in said


def test_a_source_without_a_usable_record_is_refused(mixture_file, tmp_path, capsys):
    for path in (tmp_path / "pictures").glob("*.png"):
        path.write_bytes(b"")
    verdict, said = checked(mixture_file, tmp_path, capsys)
    assert not verdict and "none of 8 records of 'pictures' can be used" in said


@pytest.mark.parametrize("context", ["noised", "clean"])
def test_the_samples_are_what_the_model_reads(mixture_file, tmp_path, context):
    mixture = opened(write_mixture(tmp_path, context=context, caption_dropout=0.0))
    rows = packed_rows(mixture, rows=2, seq_len=128)
    for source, record in ((0, 3), (1, 2)):
        one = rows.read(source, record, 0)
        found = pieces(one, mixture)
        (shown,) = (part for part in found if isinstance(part, Shown))
        assert shown.drawn == (source == 0)            # the folder's are drawn, the chat's only read
        text = "".join(part[0] for part in found if isinstance(part, tuple))
        written = "".join(part[0] for part in found if isinstance(part, tuple) and part[1])
        expected = [("the red dog 3", "the red dog 3"), ("What is it?", "number 2")][source]
        assert expected[0] in text and expected[1] in written
        assert "What is it" not in written and text.count("dog") < 2
        picture_in = next(mixture.sources[source][record].pictures())
        pixels = mixture.documents.grids.pixels(picture_in, mixture.documents.grids.of(picture_in))
        difference = torch.tensor(np.asarray(shown.picture)).movedim(-1, 0) / 127.5 - 1 - pixels
        assert difference.abs().max() < 0.01


def test_targets_and_frames_are_coloured(mixture_file, tmp_path, capsys):
    checked(mixture_file, tmp_path, capsys)
    with Picture.open(tmp_path / "out" / "samples.png") as drawn:
        colours = dict((colour, count) for count, colour in drawn.convert("RGB").getcolors(2**24))
    assert colours[TARGET] > 500 and colours[DRAWN] > 2000


def test_patches_become_the_image_that_they_were_cut_from():
    image = torch.randn(3, 8, 12)
    patches = torch.nn.functional.pixel_unshuffle(image, 4).flatten(1).T
    assert torch.equal(unpatched(patches, (2, 3), 4), image)


def test_a_tokenizer_is_trained_on_the_texts(mixture_file):
    tokenizer = tokenizer_of(mixture_file, 300)
    assert len(tokenizer.encode("the red dog", add_special_tokens=False)) < len("the red dog") // 2


def test_names_of_files_cannot_move_the_cursor(mixture_file, tmp_path, capsys):
    (tmp_path / "pictures" / "\x1b[31mred.png").write_bytes(b"")
    (tmp_path / "pictures" / "\x1b[31mred.txt").write_text("a red herring")
    _, said = checked(mixture_file, tmp_path, capsys)
    assert "\x1b" not in said and "\\x1b[31mred.png" in said


def test_the_command_s_exit_status_says_whether_it_may_train(mixture_file, tmp_path, capsys):
    words = ["data", "check", str(mixture_file), "--out", str(tmp_path / "out"), "--factor", "1", "--patch-size", "4",
             "--seq-len", "128", "--workers", "1"]
    main(words)
    assert "this may train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*words, "--seq-len", "9"])
    assert stop.value.code == 1
    with pytest.raises(SystemExit, match="error: .*no-such.yaml"):
        main(["data", "check", "no-such.yaml"])
    with pytest.raises(SystemExit, match="'chek' is not a verb; check, encode fit; did you mean check?"):
        main(["data", "chek"])


def test_a_directory_that_is_no_checkpoint_is_named(mixture_file, tmp_path):
    with pytest.raises(ValueError, match="data: model is .* which holds no config.json"):
        check_mixture(mixture_file, CheckSettings(model=tmp_path))
