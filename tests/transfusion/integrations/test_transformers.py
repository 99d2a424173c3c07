"""transformers' pipeline: the model's own answers in its records, for texts, pictures and chats, alone and in batches.
"""
import pytest
import torch
from PIL import Image as Picture
from transformers import AutoModelForMultimodalLM, pipeline

from tests.transfusion.conftest import tiny_model
from tests.transfusion.model.test_vae import autoencoder
from transfusion import Image, Text, Transfusion
from transfusion.data.model_images import image_of, pictures_of
from transfusion.data.sources.record import PictureRef, Turn
from transfusion.integrations.transformers import TransfusionAnyToAnyPipeline
from transfusion.model.vae import VAE
from transfusion.serve.turns import parts_of

PICTURE = Picture.new("RGB", (8, 8), "red")
CHAT = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "a seven"}]}]
WORDS = dict(max_new_tokens=6)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    where = tmp_path_factory.mktemp("pipe")
    tiny_model().save_pretrained(where)
    return pipeline("any-to-any", model=str(where), pipeline_class=TransfusionAnyToAnyPipeline, device="cpu")


def text_of(parts):
    return "".join(part.text for part in parts if isinstance(part, Text))


def test_transformers_makes_the_pipeline_of_a_directory_and_of_a_model(pipe, tmp_path):
    assert type(pipe) is TransfusionAnyToAnyPipeline and type(pipe.model) is Transfusion and not pipe.model.training
    model = tiny_model().train()
    made = TransfusionAnyToAnyPipeline(model=model, device="cpu", max_new_tokens=3)
    expected = text_of(model.eval().generate("a", max_new_tokens=3, max_images=0))
    assert made("a", generation_mode="text") == [{"input_text": "a", "generated_text": "a" + expected}]
    made.save_pretrained(tmp_path)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is Transfusion


def test_a_text_is_gone_on_from_as_generate_does(pipe):
    written = text_of(pipe.model.generate("a handwritten", max_images=0, **WORDS))
    assert written
    assert pipe(text="a handwritten", generation_mode="text", **WORDS) == [
        {"input_text": "a handwritten", "generated_text": "a handwritten" + written}]
    assert pipe(text="a handwritten", generation_mode="text", return_full_text=False, generate_kwargs=WORDS) == [
        {"input_text": "a handwritten", "generated_text": written}]


def test_the_mode_image_draws_what_draw_draws(pipe):
    record, = pipe(text="a handwritten seven", generation_mode="image", steps=2, guidance=2.0, seed=3)
    shown, = pictures_of(pipe.model.draw(["a handwritten seven"], steps=2, guidance=2.0, seed=3))
    assert record["input_text"] == "a handwritten seven" and record["generated_image"].tobytes() == shown.tobytes()
    assert sorted(record) == ["generated_image", "input_text"]


def test_without_a_mode_the_model_chooses_and_text_and_pictures_keep_their_order(pipe, monkeypatch):
    image = Image(torch.zeros(1, 8, 8))
    monkeypatch.setattr(pipe.model, "generate_batch", lambda prompts, **_: [[Text("one"), image, Text("two")]])
    record, = pipe(text="begin ")
    assert record["generated_text"] == "begin onetwo" and len(record["images"]) == 1
    answer = pipe(text=CHAT)[0]["generated_text"][-1]
    assert answer["role"] == "assistant" and [part["type"] for part in answer["content"]] == ["text", "image", "text"]
    assert isinstance(answer["content"][1]["image"], Picture.Image)


def test_pictures_stand_before_the_text_and_come_from_files_too(pipe, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    image = image_of(PICTURE, pipe.model.config)
    written = text_of(pipe.model.generate([image, Text(" a")], max_images=0, **WORDS))
    for images in (PICTURE, [str(tmp_path / "a.png")], tmp_path / "a.png"):
        record, = pipe(text=" a", images=images, generation_mode="text", return_full_text=False, **WORDS)
        assert record["generated_text"] == written
    caption, = pipe(images=PICTURE, generation_mode="text", **WORDS)
    written = text_of(pipe.model.generate([image], max_images=0, **WORDS))
    assert caption == {"input_text": None, "generated_text": written}


def test_a_chat_is_gone_on_from_by_its_template_and_answered_by_the_assistant(pipe):
    image = image_of(PICTURE, pipe.model.config)
    plain = text_of(pipe.model.generate([image, Text("a seven")], max_images=0, **WORDS))
    record, = pipe(text=CHAT, generation_mode="text", **WORDS)
    assert record == {"input_text": CHAT, "generated_text": [*CHAT, {"role": "assistant", "content": plain}]}
    record, = pipe(text=CHAT, generation_mode="text", return_full_text=False, template="vicuna_v1", **WORDS)
    turn = Turn("user", (PictureRef(b"", loss=False, name="x"), "a seven"))
    marked = parts_of([turn], {"x": image}, pipe.model.tokenizer, "vicuna_v1")
    assert "ASSISTANT:" in text_of(marked)
    assert record["generated_text"] == text_of(pipe.model.generate(marked, max_images=0, **WORDS))


def test_an_answer_with_a_picture_goes_back_in_as_part_of_the_chat(pipe):
    image, = pipe.model.draw([[image_of(PICTURE, pipe.model.config), Text("a seven")]], steps=1)
    shown, = pictures_of([image])
    answer = [{"type": "text", "text": "one"}, {"type": "image", "image": shown}]
    chat = [*CHAT, {"role": "assistant", "content": answer}, {"role": "user", "content": " and a two"}]
    record, = pipe(text=chat, generation_mode="image", steps=1)
    parts = [image_of(PICTURE, pipe.model.config), Text("a seven"), Text("one"), image_of(shown, pipe.model.config),
             Text(" and a two")]
    expected, = pictures_of(pipe.model.draw([parts], steps=1))
    assert record["generated_image"].tobytes() == expected.tobytes()


def test_several_texts_and_several_chats_run_as_one_batch_of_the_same_answers(pipe, monkeypatch):
    sizes, real = [], pipe.model.generate_batch
    monkeypatch.setattr(pipe.model, "generate_batch",
                        lambda prompts, **options: sizes.append(len(prompts)) or real(prompts, **options))
    texts = ["a handwritten", "two", "the seven"]
    records = pipe(text=texts, images=[None, PICTURE, [PICTURE, PICTURE]], generation_mode="text", **WORDS)
    assert [record["input_text"] for record in records] == texts and sizes == [3]
    assert records[1:2] == pipe(text="two", images=PICTURE, generation_mode="text", **WORDS)
    nested = pipe(text=[CHAT, CHAT[:1]], generation_mode="text", **WORDS)
    assert nested == [pipe(text=CHAT, generation_mode="text", **WORDS)] * 2


def test_words_of_transformers_for_sampling_are_understood(pipe):
    call = dict(generation_mode="text", return_full_text=False, max_new_tokens=12)
    assert pipe("a", do_sample=True, seed=4, **call) == pipe("a", temperature=1.0, seed=4, **call)
    assert pipe("a", do_sample=False, temperature=0.7, **call) == pipe("a", **call)
    whole = pipe("a", **call)[0]["generated_text"]
    assert pipe("a", stop_sequence=whole[2:4], **call)[0]["generated_text"] == whole[:whole.index(whole[2:4])]


def test_pictures_go_through_the_autoencoder():
    model = tiny_model()
    model.vae = VAE(autoencoder(latent_channels=1))
    pipe = TransfusionAnyToAnyPipeline(model=model, device="cpu")
    drawn, = pipe("a", images=PICTURE, generation_mode="image", steps=1)
    assert drawn["generated_image"].size == (32, 32) and drawn["generated_image"].mode == "RGB"


@pytest.mark.parametrize("given, says", [
    ({"text": ""}, "text is ''; a text, a chat or a list"), ({}, "text is None"), ({"text": 3}, "text is 3"),
    ({"text": "a", "images": "http://a/b.png"}, "an image is 'http://a/b.png'; .* addresses are not fetched"),
    ({"text": ["a", "b"], "images": [PICTURE]}, "images is .* and there are 2 texts; a list with an item"),
    ({"text": CHAT, "images": PICTURE}, "images are given beside a chat"),
    ({"text": [{"role": "me", "content": "a"}]}, r"text\[0\] is .*; a dict with a role, one of 'system'"),
    ({"text": [{"role": "user", "content": [{"type": "audio"}]}]}, r"text\[0\]\['content'\]\[0\] is"),
    ({"text": "a", "generation_mode": "audio"}, "generation_mode is 'audio'; None, 'text' or 'image' fits"),
    ({"text": CHAT, "template": "chatlm"}, "template is 'chatlm'; .*did you mean 'chatml'"),
])
def test_what_does_not_fit_is_named(pipe, given, says):
    with pytest.raises(ValueError, match=f"TransfusionAnyToAnyPipeline: {says}"):
        pipe(**given)


def test_an_option_that_is_none_of_sampling_is_answered_with_the_nearest(pipe):
    with pytest.raises(ValueError, match="max_new_token is not an option; .*did you mean max_new_tokens"):
        pipe("a", max_new_token=3)


def test_options_fit_as_well_in_generate_kwargs_and_are_checked_there(pipe):
    record, = pipe(text="a", generation_mode="text", max_new_tokens=4, generate_kwargs={"do_sample": True, "seed": 3})
    again, = pipe(text="a", generation_mode="text", max_new_tokens=4, temperature=1.0, seed=3)
    assert record == again
    with pytest.raises(ValueError, match="generation_mode is 'pictures'"):
        pipe(text="a", generate_kwargs={"generation_mode": "pictures"})
    with pytest.raises(ValueError, match="max_images is 3 and generation_mode 'text', which draws none"):
        pipe(text="a", generation_mode="text", max_images=3)
