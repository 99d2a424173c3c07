"""Questions against what training writes, single questions and the model's own probabilities."""
import json
import math

import pytest
import torch
from PIL import Image as Picture

from tests.transfusion.conftest import tiny_model
from transfusion import Text
from transfusion.data.chat import TEMPLATES, ChatSettings, chat_parts, turn_end
from transfusion.data.grids import Grids, GridSettings
from transfusion.data.sources.llava import LLaVASettings
from transfusion.data.sources.record import PictureFile, PictureRef, Record, Turn
from transfusion.eval.asking import Asker, Asking, Question
from transfusion.eval.questions import read_known
from transfusion.generate.generation import read
from transfusion.generate.row import Row
from transfusion.sequence import Image, encode

FRONT = ChatSettings(image_position="front")
SIDE = GridSettings(side=8, mode="pad")
RED, BLUE = Picture.new("RGB", (30, 20), "red"), Picture.new("RGB", (3, 20), "blue")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def asker(model):
    return Asker(model, Asking(FRONT, SIDE))


def trained_on(model, question, answer, chat, folder):
    """The document of a conversation as training makes it of a record whose pictures are files."""
    said = []
    for number, picture in enumerate(question.pictures):
        picture.save(folder / f"{number}.png")
        said += [PictureRef(PictureFile(str(folder / f"{number}.png")), loss=False), "\n"]
    return document(model, Record("here", turns=(Turn("user", (*said, question.text)), Turn("assistant", (answer,)))),
                    chat)


def document(model, record, chat):
    """The document that training makes of a record."""
    grids = Grids(SIDE, model.config.patch_size, model.config.image_channels)
    parts = [Image(grids.pixels(part, grids.of(part)), loss=False) if isinstance(part, PictureRef) else part
             for part in chat_parts(record, model.tokenizer, chat)]
    return encode(parts, model.tokenizer, model.config)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("chatml", "tokenizer")])
@pytest.mark.parametrize("pictures", [(), (RED,), (RED, BLUE)], ids=len)
def test_a_prompt_is_the_beginning_of_the_document_that_training_makes(model, template, pictures, tmp_path):
    chat = ChatSettings(template=template, image_position="front")
    question = Question("What is it?", pictures)
    prompt = encode(Asker(model, Asking(chat, SIDE)).prompt(question), model.tokenizer, model.config, end=False)
    whole = trained_on(model, question, "A handwritten seven", chat, tmp_path)
    assert whole.tokens[:len(prompt.tokens)] == prompt.tokens and not any(prompt.targets)
    assert whole.targets[len(prompt.tokens)], "the answer's loss begins where the prompt ends"
    assert len(prompt.images) == len(pictures)
    for (start, patches, *_), (expected_start, expected, *_) in zip(prompt.images, whole.images):
        assert start == expected_start and torch.equal(patches, expected)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("chatml", "tokenizer", "plain")])
@pytest.mark.parametrize("pictures", [(RED,), (RED, BLUE)], ids=len)
def test_a_question_whose_row_shows_its_pictures_last_is_put_before_them(model, template, pictures, tmp_path):
    names = [f"{number}.png" for number in range(len(pictures))]
    for name, picture in zip(names, pictures):
        picture.save(tmp_path / name)
    said = [{"from": "human", "value": "What is it?" + "\n<image>" * len(names)}, {"from": "gpt", "value": "A seven"}]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"id": "a", "image": names, "conversations": said}]))
    chat = ChatSettings(template=template, image_position="keep")
    known, = read_known(rows, None)
    prompt = encode(Asker(model, Asking(chat, SIDE)).prompt(known.question(True)), model.tokenizer, model.config,
                    end=False)
    whole = document(model, LLaVASettings(rows, drawn="none").open()[0], chat)
    assert whole.tokens[:len(prompt.tokens)] == prompt.tokens and whole.targets[len(prompt.tokens)]
    assert [start for start, *_ in prompt.images] == [start for start, *_ in whole.images]
    assert "What is it?" in model.tokenizer.decode(prompt.tokens[:prompt.images[0][0]])
    for (_, patches, *_), (_, expected, *_) in zip(prompt.images, whole.images):
        assert torch.equal(patches, expected)


def test_answers_of_a_batch_are_those_of_single_questions(asker):
    questions = [Question("a seven?", (RED,)), Question("what"), Question("which is blue", (RED, BLUE))]
    together = asker.answers(questions, max_new_tokens=6)
    assert together == [asker.answers([question], max_new_tokens=6)[0] for question in questions]
    assert all(together), "a random model writes something"


def test_an_answer_ends_before_the_first_text_that_stops_it(asker):
    whole, = asker.answers([Question("a seven?", (RED,))], max_new_tokens=8)
    assert len(whole) > 4
    stop = whole[3:5]
    assert asker.answers([Question("a seven?", (RED,))], max_new_tokens=8, stop=("never", stop)) == \
        [whole[:whole.index(stop)].strip()]


@pytest.mark.parametrize("template", ["chatml", "tokenizer"])
def test_an_answer_ends_where_its_turn_does_in_a_template_with_an_ending_of_its_own(template, monkeypatch):
    """Of a tokenizer whose EOS is another token, as Qwen's base models have it."""
    model = tiny_model()
    tokenizer = model.tokenizer
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    model.backbone.decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
                               "{% endfor %}")
    chat = ChatSettings(template=template, system="")
    record = Record("here", turns=(Turn("user", ("what",)), Turn("assistant", ("ten",))))
    parts = chat_parts(record, tokenizer, chat)
    learned = encode(parts, tokenizer, model.config)
    says = [token for token, target in zip(learned.tokens, learned.targets) if target]
    assert tokenizer.decode(says).startswith("ten") and "<|im_end|>" in tokenizer.decode(says)
    written = iter([*says[:-1], *tokenizer.encode("more", add_special_tokens=False), tokenizer.eos_token_id])
    monkeypatch.setattr(Row, "choose", lambda self, scores: next(written))
    assert Asker(model, Asking(chat, SIDE)).answers([Question("what")], max_new_tokens=16) == ["ten"]
    assert turn_end(tokenizer, chat) == "<|im_end|>"
    tokenizer.eos_token = "<|im_end|>"
    assert turn_end(tokenizer, chat) == "" == turn_end(tokenizer, FRONT)


def test_what_stops_a_row_is_in_no_event_and_leaves_the_other_rows_alone(model):
    prompts = [[Text("a handwritten seven")], [Text("two")]]
    whole = ["".join(part.text for part in parts)
             for parts in model.generate_batch(prompts, max_new_tokens=8, max_images=0)]
    stop = whole[0][2]
    expected = [text.split(stop)[0] for text in whole]
    stopped = model.generate_batch(prompts, max_new_tokens=8, max_images=0, stop=(stop,))
    assert ["".join(part.text for part in parts) for parts in stopped] == expected
    events = list(model.stream(prompts[0], max_new_tokens=8, max_images=0, stop=(stop,)))
    assert expected[0].startswith("".join(event.text for event in events))


@torch.no_grad()
def test_a_likelihood_is_the_sum_of_the_answers_log_probabilities(model, asker, tmp_path):
    question, answer = Question("a seven?", (RED,)), "seven"
    together = asker.likelihoods([question, Question("what is this, in many more words than that")], [answer, "a"])
    document = trained_on(model, question, answer, asker.asking.chat, tmp_path)
    tokens = [i for i, target in enumerate(document.targets) if target][:-1]  # without EOS
    total = 0.0
    for i in tokens:  # each from its own prefix alone
        prefix = document._replace(tokens=document.tokens[:i], targets=document.targets[:i])
        _, hidden = read(model, [prefix])
        total += float(model.backbone.logits(hidden[0, -1]).log_softmax(-1)[document.tokens[i]])
    assert together[0].log_probability == pytest.approx(total, rel=1e-4)


def test_a_likelihood_that_is_no_number_is_refused(model, asker, monkeypatch):
    monkeypatch.setattr(model.backbone, "logits", lambda states: torch.full((len(states), 9999), torch.nan))
    with pytest.raises(ValueError, match="eval: the model's outputs are not finite numbers; the dtype bfloat16"):
        asker.likelihoods([Question("a seven?", (RED,))], ["seven"])


def test_an_answer_of_the_likeliest_tokens_is_greedy_and_another_is_not(model, asker, monkeypatch):
    question, answers = Question("a seven?", (RED,)), ("seven", "two")
    ids = [i for i in model.tokenizer.encode(" seven", add_special_tokens=False)]
    wanted = iter([*ids, *ids])

    def logits(hidden):
        scores = torch.zeros(len(hidden), len(model.tokenizer))
        for row in scores:
            row[next(wanted)] = 1.0
        return scores

    monkeypatch.setattr(model.backbone, "logits", logits)
    assert [asker.likelihoods([question], [answer])[0].greedy for answer in answers] == [True, False]


def test_a_question_longer_than_the_models_positions_is_named_and_leaves_the_others_alone(capsys):
    short = Asker(tiny_model(max_position_embeddings=250), Asking(FRONT, SIDE))
    questions = [Question("a", (RED,)), Question("why " * 200, (RED,), "rows.jsonl, line 3"), Question("two")]
    answers = short.answers(questions, max_new_tokens=4)
    assert answers[1] is None and answers[::2] == short.answers(questions[::2], max_new_tokens=4)
    assert all(answers[::2])
    said = capsys.readouterr()
    assert "rows.jsonl, line 3 has" in said.out + said.err and "the model has 250 positions" in said.out + said.err


def test_an_answer_near_the_end_of_the_positions_does_not_shorten_its_neighbours(model):
    asker, long, short = Asker(model, Asking(FRONT, SIDE)), Question("why so", (RED,)), Question("why")
    length = len(encode(asker.prompt(long), model.tokenizer, model.config, end=False).tokens)
    few = Asker(tiny_model(max_position_embeddings=length + 2), Asking(FRONT, SIDE))
    assert few.answers([long, short], max_new_tokens=6) == [
        few.answers([long], max_new_tokens=6)[0], few.answers([short], max_new_tokens=6)[0]]
    assert few.answers([short], max_new_tokens=6) != few.answers([short], max_new_tokens=2)


def test_no_more_is_written_than_there_are_positions(model):
    length = len(encode(Asker(model, Asking(FRONT, SIDE)).prompt(Question("why", (RED,))), model.tokenizer,
                        model.config, end=False).tokens)
    few = tiny_model(max_position_embeddings=length + 2)
    answer, = Asker(few, Asking(FRONT, SIDE)).answers([Question("why", (RED,))], max_new_tokens=50)
    assert answer == Asker(model, Asking(FRONT, SIDE)).answers([Question("why", (RED,))], max_new_tokens=2)[0]


@pytest.mark.parametrize("template", ["chatml", "llama_2", "vicuna_v1", "plain"])
def test_how_a_template_ends_an_answer_is_no_part_of_its_likelihood(template):
    model = tiny_model()
    model.tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    model.backbone.decoder.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    asker = Asker(model, Asking(ChatSettings(template=template, system=""), SIDE))
    found, = asker.likelihoods([Question("what")], ["ten"])
    said = " ten" if template in ("llama_2", "vicuna_v1") else "ten\n" if template == "plain" else "ten"
    assert found.tokens == len(model.tokenizer.encode(said, add_special_tokens=False))


def test_an_answer_longer_than_the_models_positions_is_not_likely_and_leaves_the_others_alone(capsys):
    short = Asker(tiny_model(max_position_embeddings=250), Asking(FRONT, SIDE))
    questions = [Question("a"), Question("why " * 200, where="rows.jsonl, line 3"), Question("two")]
    found = short.likelihoods(questions, ["ten"] * 3)
    assert found[1].log_probability == -math.inf and not found[1].greedy and found[1].tokens > 0
    assert found[::2] == short.likelihoods(questions[::2], ["ten"] * 2)
    said = capsys.readouterr()
    assert "rows.jsonl, line 3 has" in said.out + said.err and "the model has 250 positions" in said.out + said.err
