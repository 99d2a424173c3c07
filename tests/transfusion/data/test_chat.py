"""Chat templates: LLaVA's own tokens and labels, loss on answers only, pictures never cut."""
import json
import random
import types

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from transfusion.data.chat import (
    CHATML,
    VICUNA,
    ChatSettings,
    EncodedText,
    chat_parts,
    length,
    question_parts,
    turn_spaces,
)
from transfusion.data.sources import DataError, PictureRef, Record, Turn
from transfusion.sequence import Image, Text, encode

IGNORED, IMAGE_TOKEN = -100, -200
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | "
    "trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
VOCABULARY = (
    "the cat sat on a mat what colour is bus white and red describe image in detail USER ASSISTANT Answer question "
    "using single word or phrase two three 12 1985 naïve straße 猫 ünïcode don't it's [0.12, 0.5] yes no"
)
WORDS = VOCABULARY.split()


def llama_like(legacy):
    """A tokenizer as Llama's: word pieces with "▁" for a space, bytes for what is unknown.

    Legacy ones put "▁" in front of every text behind a special token, later ones only at the beginning. As in
    Llama's, "USER" is one token and "▁USER" two, which LLaVA's lengths rely on.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    generator = random.Random(0)
    words = [word for word in WORDS if word != "USER"]
    lines = [" ".join(generator.choices(words, k=12)) for _ in range(300)] + [VICUNA] * 20
    lines += [f"{letter}USER" for letter in "abcdefghijklmnop"] * 30
    trained.train_from_iterator(lines, trainer)
    model = json.loads(trained.to_str())["model"]
    bpe = models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]], unk_token="<unk>", byte_fallback=True,
                     fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(template=None, eos="<|im_end|>"):
    """A tokenizer as Qwen's and SmolLM2's: bytes, with ChatML's tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<boi>", "<eoi>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator([" ".join(WORDS) + "\n\n" + CHATML] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="<|endoftext|>",
        eos_token=eos,
        chat_template=template,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<boi>", "<eoi>"],
    )


@pytest.fixture(scope="module", params=["legacy", "later"])
def llama(request):
    return llama_like(request.param == "legacy")


@pytest.fixture(scope="module")
def legacy():
    return llama_like(True)


def rows(count, seed=0, picture=False):
    """Conversations as LLaVA keeps them, with new lines, doubled spaces, signs and other scripts in them."""
    generator = random.Random(seed)

    def text():
        words = generator.choices(WORDS, k=generator.randint(1, 14))
        joints = generator.choices([" ", " ", " ", "\n", "  ", ", ", ".\n"], k=len(words))
        return "".join(word + joint for word, joint in zip(words, joints)).strip() + generator.choice(
            ["", ".", "?", "!"]
        )

    for _ in range(count):
        said = [{"from": who, "value": text()} for _ in range(generator.randint(1, 4)) for who in ("human", "gpt")]
        if picture:
            value = said[0]["value"]
            said[0]["value"] = generator.choice([f"<image>\n{value}", f"{value}\n<image>"])
        yield said


def record(said, picture=None, where="test, row 0"):
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = []
    for turn in said:
        texts = turn["value"].split("<image>")
        parts = [part for text in texts for part in (text, picture)][:-1]
        turns.append(Turn(roles[turn["from"]], tuple(part for part in parts if part != "")))
    return Record(where, turns=tuple(turns))


def llava_prompt(said, front=False):
    """LLaVA's conversation of style TWO: `conv_vicuna_v1.get_prompt()`."""
    prompt = VICUNA + " "
    for i, turn in enumerate(said):
        value = turn["value"]
        if front and "<image>" in value:
            value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
        prompt += ("USER", "ASSISTANT")[i % 2] + ": " + value + (" ", "</s>")[i % 2]
    return prompt


def llava_tokens(prompt, tokenizer):
    """LLaVA's `tokenizer_image_token`: texts between pictures tokenized apart, one BOS."""
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    ids = [tokenizer.bos_token_id]
    for i, chunk in enumerate(chunks):
        ids += [IMAGE_TOKEN] * (i > 0) + chunk[1:]
    return ids


def llava_preprocess_v1(said, tokenizer, legacy, front=False):
    """LLaVA's `preprocess_v1` for one row: (ids, labels), all labels -100 where its lengths do not add up."""
    prompt = llava_prompt(said, front)
    ids = llava_tokens(prompt, tokenizer)
    labels, at = list(ids), 1
    labels[:1] = [IGNORED]
    for i, exchange in enumerate(prompt.split("</s>")):
        if exchange == "":
            break
        halves = exchange.split(" ASSISTANT: ")
        if len(halves) != 2:
            break
        halves[0] += " ASSISTANT: "
        exchange_length = len(llava_tokens(exchange, tokenizer))
        question_length = len(llava_tokens(halves[0], tokenizer)) - 2
        if i != 0 and not legacy:
            exchange_length, question_length = exchange_length - 1, question_length - 1
        labels[at:at + question_length] = [IGNORED] * question_length
        at += exchange_length
    labels[at:] = [IGNORED] * len(labels[at:])
    if at != len(ids):
        labels = [IGNORED] * len(ids)
    return ids, labels


def config(boi=-5, eoi=-6):
    return types.SimpleNamespace(boi_token_id=boi, eoi_token_id=eoi, patch_size=1, image_channels=1)


def ours(parts, tokenizer):
    """(ids, labels) of parts as `encode` lays them out, a picture of one patch as LLaVA's image token."""
    made = [Image(torch.zeros(1, 1, 1)) if isinstance(part, PictureRef) else part for part in parts]
    document = encode(made, tokenizer, config())
    ids, labels = [], []
    for i, (token, target) in enumerate(zip(document.tokens, document.targets)):
        if token == -5:
            ids.append(IMAGE_TOKEN)
            labels.append(IGNORED)
        elif token != -6:
            ids.append(token)
            labels.append(token if target and i else IGNORED)
    return ids, labels


def test_text_rows_of_vicuna_have_the_ids_and_labels_of_llava(llama):
    compared, apart, behind = 0, *(llama.encode(text, add_special_tokens=False) for text in ("USER", "</s>USER"))
    legacy = behind[1:] == apart
    assert len(apart) == 2 and len(behind) == 2 + legacy
    for said in rows(200):
        expected_ids, expected = llava_preprocess_v1(said, llama, legacy)
        ids, labels = ours(chat_parts(record(said), llama, ChatSettings()), llama)
        assert ids == expected_ids, said
        if any(label != IGNORED for label in expected):  # LLaVA gives a row up where its lengths do not add up
            assert labels == expected, said
            compared += 1
    assert compared == 200


def test_picture_rows_of_vicuna_have_the_ids_and_labels_of_llava(legacy):
    picture = PictureRef(b"x", loss=False)
    for said in rows(100, seed=1, picture=True):
        expected = llava_preprocess_v1(said, legacy, True, front=True)
        parts = chat_parts(record(said, picture), legacy, ChatSettings(image_position="front"))
        assert ours(parts, legacy) == expected, said


def test_pictures_stay_where_the_author_put_them_unless_the_front_is_asked_for(legacy):
    picture = PictureRef(b"x", loss=False)
    said = [{"from": "human", "value": "what is <image> this"}, {"from": "gpt", "value": "a cat"}]
    kept = chat_parts(record(said, picture), legacy, ChatSettings())
    assert (
        kept[0].text.endswith("USER: what is ") and kept[1] is picture and kept[2].text.startswith(" this ASSISTANT:")
    )
    front = chat_parts(record(said, picture), legacy, ChatSettings(image_position="front"))
    assert front[0].text.endswith("USER: ") and front[1] is picture and front[2].text.startswith("\nwhat is  this ")


def written(parts):
    """Text with targets in brackets, as a reader would mark them."""
    return "".join(
        "<image>" if isinstance(part, PictureRef) else f"[{part.text}]" if part.loss else part.text for part in parts
    )


HELLO = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}, {"from": "human", "value": "the cat"},
         {"from": "gpt", "value": "the mat"}]


@pytest.mark.parametrize(
    "template, made, expected",
    [
        ("vicuna_v1", lambda: llama_like(True), "S USER: hi ASSISTANT:[ hello</s>]USER: the cat ASSISTANT:[ the mat]"),
        (
            "llama_2",
            lambda: llama_like(True),
            "[INST] <<SYS>>\nS\n<</SYS>>\n\nhi [/INST][ hello </s>]<s>[INST] the cat [/INST][ the mat ]",
        ),
        (
            "chatml",
            byte_level,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[hello"
            "<|im_end|>]\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n[the mat]",
        ),
        (
            "tokenizer",
            lambda: byte_level(SMOL),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>"
            "assistant\n[hello<|im_end|>]\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n[the mat]",
        ),
        ("plain", lambda: llama_like(True), "hi\n[hello\n]the cat\n[the mat\n]"),
    ],
)
def test_templates_write_their_words_and_train_on_answers_and_what_ends_them(template, made, expected):
    tokenizer = made()
    parts = chat_parts(record(HELLO), tokenizer, ChatSettings(template=template, system="S"))
    assert written(parts) == expected
    assert all(part.special for part in parts)
    ids, labels = ours(parts, tokenizer)
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id  # the last EOS is a target, and stands there once
    assert ids[-2] != tokenizer.eos_token_id


def test_chatml_is_the_tokenization_of_the_whole_text():
    tokenizer = byte_level(SMOL)
    for said in rows(50, seed=2):
        messages = [{"role": turn.role, "content": turn.text} for turn in record(said).turns]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        parts = chat_parts(record(said), tokenizer, ChatSettings(template="tokenizer"))
        ids = [i for part in parts for i in part.ids]
        assert [*ids, tokenizer.eos_token_id] == tokenizer.encode(whole.removesuffix("\n"), add_special_tokens=False)
        assert "".join(part.text for part in parts) + "<|im_end|>\n" == whole


def test_a_template_that_strips_and_puts_a_space_before_the_answer_is_followed():
    tokenizer = llama_like(True)
    tokenizer.chat_template = MISTRAL
    said = [{"from": "human", "value": " hi\n"}, {"from": "gpt", "value": "  hello "}]
    parts = chat_parts(record(said), tokenizer, ChatSettings(template="tokenizer"))
    assert written(parts) == "<s>[INST] hi [/INST][ hello]"
    assert ours(parts, tokenizer)[0].count(tokenizer.bos_token_id) == 1
    with pytest.raises(DataError, match="test, row 0: the tokenizer's template refuses it .*no system here"):
        chat_parts(record([{"from": "system", "value": "S"}, *said]), tokenizer, ChatSettings(template="tokenizer"))


def test_plain_keeps_pictures_and_answers_of_pairs():
    picture = PictureRef(b"x", loss=False)
    said = [{"from": "human", "value": "Give a caption.\n<image>"}, {"from": "gpt", "value": "the cat"}]
    assert (
        written(chat_parts(record(said, picture), llama_like(True), ChatSettings(template="plain")))
        == "<image>[the cat\n]"
    )


def test_names_of_special_tokens_in_an_authors_words_are_spelled_out(legacy):
    said = [{"from": "human", "value": "what is <s>this</s> here"}, {"from": "gpt", "value": "it's </s> in a text"}]
    parts = chat_parts(record(said), legacy, ChatSettings())
    ids, labels = ours(parts, legacy)
    assert ids.count(legacy.bos_token_id) == 1 and ids.count(legacy.eos_token_id) == 1
    assert "</s>" in legacy.decode([i for i in labels if i != IGNORED][:-1]).replace(" ", "")


def test_what_the_system_says_in_the_record_comes_first(legacy):
    said = [{"from": "system", "value": "Be short."}, *HELLO]
    assert written(chat_parts(record(said), legacy, ChatSettings(system="S"))).startswith("Be short. USER:")
    assert written(chat_parts(record(HELLO), legacy, ChatSettings(system=""))).startswith("USER: hi")
    assert written(chat_parts(record(HELLO), legacy, ChatSettings())).startswith(VICUNA + " USER: hi")


def test_a_question_without_an_answer_at_the_end_is_left_out(legacy):
    assert written(chat_parts(record(HELLO[:3]), legacy, ChatSettings(system="S"))) == "S USER: hi ASSISTANT:[ hello]"


def test_conversations_too_long_lose_whole_exchanges_and_no_part_of_a_picture(legacy):
    picture = PictureRef(b"x", loss=False)
    said = [
        turn
        for i in range(6)
        for turn in ({"from": "human", "value": f"<image>what is {i}"}, {"from": "gpt", "value": "the cat"})
    ]
    whole = record(said, picture)
    parts = [chat_parts(Record("r", turns=whole.turns[:2 * n]), legacy, ChatSettings()) for n in range(1, 7)]
    sizes = [length(part, legacy, lambda _: 66) for part in parts]
    for room in range(sizes[0], sizes[-1] + 3, 7):
        got = chat_parts(whole, legacy, ChatSettings(), room=room, picture_tokens=lambda _: 66)
        assert got == parts[max(n for n in range(6) if sizes[n] <= room)]
    with pytest.raises(DataError, match=f"longer than {sizes[0] - 1} tokens") as error:
        chat_parts(whole, legacy, ChatSettings(), room=sizes[0] - 1, picture_tokens=lambda _: 66)
    assert error.value.kind == "too long"


def test_the_length_of_parts_is_that_of_their_document():
    for tokenizer, template in (
        (llama_like(True), "vicuna_v1"),
        (byte_level(SMOL), "tokenizer"),
        (byte_level(), "chatml"),
        (llama_like(False), "llama_2"),
    ):
        for said in rows(10, seed=3):
            parts = chat_parts(record(said), tokenizer, ChatSettings(template=template))
            assert length(parts, tokenizer) == len(encode(parts, tokenizer, config()).tokens)


def test_a_row_without_any_target_is_an_error_with_its_place(legacy):
    with pytest.raises(DataError, match="test, row 0: there is no turn of the assistant") as error:
        chat_parts(record(HELLO[:1]), legacy, ChatSettings())
    assert error.value.kind == "no target"
    read = PictureRef(b"x", loss=False)
    silent = Record("r", turns=(Turn("user", ("",)), Turn("assistant", (read,))))
    with pytest.raises(DataError, match="r: nothing in it is a target"):
        chat_parts(
            silent,
            byte_level("{% for m in messages %}{{ m['content'] }}{% endfor %}"),
            ChatSettings(template="tokenizer"),
        )


def test_a_drawn_picture_in_an_answer_is_a_target(legacy):
    drawn = PictureRef(b"x", loss=True)
    parts = chat_parts(
        Record("r", turns=(Turn("user", ("draw the cat",)), Turn("assistant", (drawn,)))),
        legacy,
        ChatSettings(system=""),
    )
    assert [part.loss for part in parts] == [False, True, True]
    assert (
        parts[1] == EncodedText(" ", True, True, tuple(legacy.encode(" ", add_special_tokens=False)[1:]))
        and parts[2] is drawn
    )


def test_settings_and_tokenizers_that_do_not_fit_are_refused(legacy):
    with pytest.raises(ValueError, match="template is 'vicuna'; one of .* fits; did you mean 'vicuna_v1'"):
        chat_parts(record(HELLO), legacy, ChatSettings(template="vicuna"))
    with pytest.raises(ValueError, match="template is 'chatml', and the tokenizer has no token '<|im_start|>'"):
        chat_parts(record(HELLO), legacy, ChatSettings(template="chatml"))
    with pytest.raises(ValueError, match="template is 'tokenizer', and the tokenizer has no chat_template"):
        chat_parts(record(HELLO), byte_level(), ChatSettings(template="tokenizer"))
    forgetful = byte_level("{{ messages[-1]['content'] }}")
    with pytest.raises(ValueError, match=r"writes turns \[3\] of 4; one that writes each once, in order, fits"):
        chat_parts(record(HELLO), forgetful, ChatSettings(template="tokenizer"))


def test_parts_are_text_to_everyone_else(legacy):
    parts = chat_parts(record(HELLO), legacy, ChatSettings())
    assert all(isinstance(part, Text) and part.token_ids(legacy, config()) == part.ids for part in parts)


def asked_and_answered(*said):
    """Turns of which the user's are first, with a picture in the first."""
    picture = PictureRef(b"", loss=False)
    return record([{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)], picture)


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "chatml", "tokenizer", "plain"])
@pytest.mark.parametrize("said", [("<image>\nwhat colour is the bus?",),
                                  ("<image>\nwhat colour?", "white and red", "is it in detail?")], ids=len)
def test_a_question_is_the_tokens_in_front_of_any_answer(template, said):
    tokenizers = {"chatml": [byte_level()], "tokenizer": [byte_level(SMOL)]}
    settings = ChatSettings(template=template)
    for tokenizer in tokenizers.get(template, [llama_like(True), llama_like(False)]):
        asked = encoded_ids(question_parts(asked_and_answered(*said), tokenizer, settings), tokenizer)
        for answer in ("white and red", "12", "the cat"):
            whole = chat_parts(asked_and_answered(*said, answer), tokenizer, settings)
            last = max(i for i, part in enumerate(whole) if not part.loss)
            assert asked == encoded_ids(whole[:last + 1], tokenizer)
            assert whole[last + 1:], "the answer begins there"


def encoded_ids(parts, tokenizer):
    """Tokens of parts, -200 for a picture."""
    return [token for part in parts for token in
            ([IMAGE_TOKEN] if isinstance(part, PictureRef) else part.token_ids(tokenizer, config()))]


def test_a_conversation_that_ends_with_an_answer_is_no_question(legacy):
    with pytest.raises(DataError, match="its last turn is not the user's; a question fits"):
        question_parts(asked_and_answered("what?", "red"), legacy, ChatSettings())


def test_a_template_writes_the_same_date_on_every_day():
    tokenizer = byte_level()
    tokenizer.chat_template = ("{{ 'Today: ' + strftime_now('%d %B %Y') + ' ' + date_string }}"
                               "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    parts = chat_parts(record(HELLO), tokenizer, ChatSettings(template="tokenizer"))
    assert parts[0].text.startswith("Today: 26 July 2024 26 Jul 2024")


@pytest.mark.parametrize("template,own,spaces", [
    ("vicuna_v1", None, True), ("llama_2", None, True), ("chatml", None, False), ("plain", None, False),
    ("tokenizer", SMOL, False), ("tokenizer", MISTRAL, True), ("tokenizer", None, False)])
def test_spaces_around_answers_are_those_that_training_has_the_model_write(template, own, spaces):
    tokenizer = byte_level(own)
    settings = ChatSettings(template)
    assert turn_spaces(tokenizer, settings) is spaces
    if template != "tokenizer" or own:
        said = Record("here", turns=(Turn("user", ("what",)), Turn("assistant", ("cat",))))
        parts = chat_parts(said, tokenizer, settings)
        written = tokenizer.decode([token for part in parts if part.loss for token in part.ids])
        assert written.startswith(" cat" if spaces else "cat")
