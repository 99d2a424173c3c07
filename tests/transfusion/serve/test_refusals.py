"""What a server refuses: with which status, by which field's name, and at what cost."""
import io
import struct
import zlib

import pytest
from PIL import Image as Picture

from tests.transfusion.serve.clients import DRAW, chat, data_url, png, post

for package in ("fastapi", "uvicorn", "multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed; pip install 'tfkernels[serve]'")

from transfusion.serve.wire import ApiError  # noqa: E402


@pytest.mark.parametrize("files,fields,param", [
    ({"mask": ("m.png", png(), "image/png")}, {}, "mask"), ({"other": ("o.png", b"")}, {}, "other"),
    ({}, {"extra_body": "[" * 100_000}, "extra_body"), ({}, {"extra_body": "3"}, "extra_body"),
    ({}, {"extra_body": "{"}, "extra_body"), ({}, {"extra_body": f'{{"seed": {"9" * 5000}}}'}, "extra_body"),
    ({}, {"output_format": "jpeg"}, "output_format")])
def test_what_an_edit_does_not_serve_is_refused_by_its_name(client, files, fields, param):
    answer = client.post("/v1/images/edits", files={"image": ("a.png", png()), **files}, data={"prompt": "a", **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize("charset,param,message", [
    ('"a\0b"', None, "the form cannot be read"), ("raw_unicode_escape", r"\ud800", r"\ud800 is not served as a file")])
def test_a_form_of_another_charset_is_no_error_of_the_server(client, charset, param, message):
    body = b'--x\r\nContent-Disposition: form-data; name="\\ud800"; filename="a"\r\n\r\na\r\n--x--\r\n'
    answer = client.post("/v1/images/edits", content=body,
                         headers={"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and error["message"].startswith(message)


def bomb():
    """A PNG of a few bytes whose header says 50,000 x 50,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    pieces = {b"IHDR": struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0), b"IDAT": zlib.compress(bytes(50_001)),
              b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*piece) for piece in pieces.items())


@pytest.mark.parametrize("fields,status,param,message", [
    ({"num_inference_steps": 251}, 400, "num_inference_steps", "at most 250 fit"),
    ({"num_inference_steps": 2**60}, 400, "num_inference_steps", "at most 250 fit"),
    ({"num_inference_steps": 2**70}, 400, "num_inference_steps", "at most 250 fit"),
    ({"num_inference_steps": 0}, 400, "num_inference_steps", "steps is 0"),
    ({"guidance_scale": 1e300}, 400, "guidance_scale", "is 1e+300; a number of at least 0 and at most 10000.0"),
    ({"image_guidance_scale": 1e300}, 400, "image_guidance_scale", "at most 10000.0"),
    ({"guidance_scale": -1}, 400, "guidance_scale", "is -1.0"),
    ({"size": "big"}, 400, "size", "WIDTHxHEIGHT fits"),
    ({"size": "7x8"}, 400, "size", "size is '7x8'; multiples of 2 fit"),
    ({"size": "0x8"}, 400, "size", "size is '0x8'; multiples of 2 fit"),
    ({"size": "4000x4000"}, 400, "size", "size is '4000x4000'; at most 1048576 pixels in all fit"),
    ({"prompt": "a" * 30_000}, 400, "prompt", "prompt is of"),
    ({"output_format": "webp"}, 400, "output_format", "output_format is not served"),
    ({"output_compression": 50}, 400, "output_compression", "not served"),
    ({"partial_images": 2}, 400, "partial_images", "not served"),
    ({"extra_body": 3}, 400, "extra_body", "extra_body is 3; an object fits"),
    ({"extra_body": "\ud800"}, 400, "extra_body", r"extra_body is '\ud800'; an object fits"),
    ({"n": 0}, 400, "n", "greater than or equal to 1"),
    ({"n": 9}, 400, "n", "n is 9; at most 8 answers fit this server at once, 4 that run and 4 that wait"),
    ({"model": "gpt"}, 404, "model", "'tiny' fits"),
    ({"model": "a" * 2**20}, 400, "model", "at most 256 characters"),
    ({"sampler": "a" * 2**20}, 400, "sampler", "at most 64 characters"),
    ({"sampler": "ddin"}, 400, "sampler", "did you mean 'ddim'?"),
    ({"size": "x" * 2**20}, 400, "size", "at most 64 characters"),
    ({"prompt": " "}, 400, "prompt", "prompt is empty"),
    ({"mask": "x"}, 400, "mask", "mask is not served"),
    ({"steps": 2}, 400, "steps", "steps is not an option here; num_inference_steps fits"),
    ({"guidance": 0}, 400, "guidance", "guidance is not an option here; guidance_scale fits"),
    ({"image_guidance": 2}, 400, "image_guidance", "image_guidance is not an option here; image_guidance_scale fits"),
    ({"image_size": [8, 8]}, 400, "image_size", "image_size is not an option here; size fits"),
    ({"width": 8}, 400, "width", "width is not an option here; size fits"),
    ({"extra_body": {"steps": 2}}, 400, "steps", "num_inference_steps fits"),
    ({"guidance_interval": [0.1, 0.9]}, 400, "guidance_interval", "guidance_interval is not served; leave it out"),
    ({"guidance_rescale": 0.5}, 400, "guidance_rescale", "guidance_rescale is not served"),
    ({"negative_prompt": "blurred"}, 400, "negative_prompt", "negative_prompt is not served"),
    ({"stream": True}, 400, "stream", "/v1/chat/completions streams"),
])
def test_a_field_that_does_not_fit_is_refused_by_its_name(client, fields, status, param, message):
    answer = post(client, "images/generations", {"prompt": "a", **DRAW, **fields})
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("fields", [
    {"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1e300}, {"guidance_scale": 1e4}, {"seed": -2**63},
    {"guidance_scale": 1e4, "image_guidance_scale": 1e4}, {"guidance_scale": 5e-324}, {"top_p": 0, "min_p": 1}])
def test_numbers_at_their_ends_are_answered(client, fields):
    options = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, **DRAW, **fields}
    for modalities in (["text"], ["image"]):
        answer = client.post("/v1/chat/completions", json={**options, "modalities": modalities})
        assert answer.status_code == 200, answer.text


def test_what_clients_send_and_changes_no_answer_is_no_error(client):
    idle = {"logprobs": False, "top_logprobs": 0, "top_k": -1, "repetition_penalty": 1.0, "negative_prompt": "",
            "guidance_rescale": 0.0, "guidance_interval": [0.0, 1.0], "steps": None, "user": "me", "store": False,
            "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "tools": [], "metadata": {}}
    asked = {"temperature": 0, "max_tokens": 3, "max_images": 0, "seed": 1}
    plain, same = (chat(client, "a", **asked, **fields).json() for fields in ({}, idle))
    assert same["choices"] == plain["choices"]


@pytest.mark.parametrize("fields,param,message", [
    ({"max_tokens": 5000}, "max_tokens", "max_tokens is 5000 and the prompt of 2 tokens"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    ({"top_p": 2}, "top_p", "top_p is 2.0"),
    ({"n": 16}, "n", "n is 16; at most 8 answers fit"),
    ({"prompt": ["a"] * 3, "n": 3}, "prompt", "prompt is 3 texts and n 3; at most 8 answers fit this server at once"),
    ({"prompt": ["a"] * 65}, "prompt", "prompt is 65 texts and n 1; 1 to 64 answers fit"),
    ({"prompt": [1, 2]}, "prompt", "prompt: Input should be a valid string"),
    ({"stop": ""}, "stop", "texts, none of them empty, fit"),
    ({"stop": list("abcde")}, "stop", "at most 4 texts fit"),
    ({"stop": "a" * 2**20}, "stop", "of at most 256 characters each"),
    ({"logprobs": 0}, "logprobs", "logprobs is not served"),
    ({"logprobs": 5}, "logprobs", "logprobs is not served"),
    ({"max_new_tokens": 5}, "max_new_tokens", "max_new_tokens is not an option here; max_tokens fits"),
    ({"top_k": 40}, "top_k", "top_k is not served; leave it out"),
    ({"repetition_penalty": 1.1}, "repetition_penalty", "repetition_penalty is not served"),
])
def test_a_field_of_texts_that_does_not_fit_is_refused_by_its_name(client, fields, param, message):
    answer = client.post("/v1/completions", json={"prompt": "a", **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"]


@pytest.mark.parametrize("content,message", [
    (3, "of type 'NoneType'"),
    ([{"type": "a" * 2**20}], "aaa...; text"),
    ([{"type": "audio"}], "of type 'audio'; text"),
    ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}], "--allow-remote"),
    ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "a data: URL fits"),
    ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}], "not base64"),
    ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA\u00e9"}}], "image_url: url is not base64"),
    ([{"type": "image_url", "image_url": {"url": data_url(b"no picture")}}], "no picture that can be read"),
    ("a" * 2**20, "messages is of 1048576 characters"),
    ([{"type": "image_url", "image_url": {"url": data_url(bomb())}}], "no picture that can be read"),
    ([{"type": "image_url", "image_url": {"url": data_url(png((9000, 9000)))}}], "a picture is 9000x9000"),
])
def test_a_message_that_cannot_be_read_is_refused(client, content, message):
    answer = chat(client, content)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_long_role_is_not_repeated(client):
    answer = post(client, "chat/completions", {"messages": [{"role": "a" * 2**20, "content": "a"}]})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and len(message) < 300 and "aaa...; system, user and assistant fit" in message


def test_errors_of_prompts_and_pictures_name_these_and_those_of_guidance_its_scales(client):
    torn = io.BytesIO()
    Picture.effect_noise((64, 64), 50).save(torn, "PNG")
    torn, broken = torn.getvalue()[:2000], "a\ud800"
    in_a_chat = [{"type": "image_url", "image_url": {"url": data_url(torn)}}]
    for answer, param, message in (
            (client.post("/v1/images/edits", files={"image": ("a.png", torn)}, data={"prompt": "a"}), "image",
             "image is not a picture that can be read"),
            (chat(client, in_a_chat), "image", "image is not a picture that can be read"),
            (post(client, "images/generations", {"prompt": broken}), "prompt", r"prompt is 'a\ud800'"),
            (post(client, "completions", {"prompt": broken}), "prompt", r"prompt is 'a\ud800'"),
            (chat(client, broken), "messages", r"messages is 'a\ud800'"),
            (chat(client, "a", guidance_scale=-1), "guidance_scale", "guidance_scale is -1.0"),
            (chat(client, "a", image_guidance_scale=-1), "image_guidance_scale", "image_guidance_scale is -1.0")):
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == param and error["message"].startswith(message)


@pytest.mark.parametrize("body,status", [
    (b"{", 400), (b"[]", 400), (b'{"messages": []}', 400), (b'{"messages": [{"role": "x"}]}', 400), (b"x" * 2**20, 400),
    (b'{"messages": ' + b"[" * 100_000, 400), (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    (b"x" * (33 * 2**20), 413)])
def test_malformed_and_large_bodies_are_answered_in_openais_shape(client, body, status):
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/nothing").json()["error"]["message"] == "Not Found"


def test_an_error_says_in_utf8_and_not_at_any_length_what_the_client_sent():
    message = ApiError(400, "url is \ud800" + "a" * 2**20).body()["error"]["message"]
    assert message.startswith("url is \\ud800a") and len(message.encode()) < 1100


def test_more_answers_than_ever_fit_at_once_are_no_429(served):
    _, engine, client = served
    before = engine.stats()["submitted"]
    edit = client.post("/v1/images/edits", files={"image": ("a.png", png())}, data={"prompt": "a", "n": "9"})
    for answer in (chat(client, "a", n=9), edit):
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "n" and "at most 8 answers fit" in error["message"]
    assert engine.stats()["submitted"] == before
    several = chat(client, "a", n=4, max_tokens=2, max_images=0)
    assert several.status_code == 200 and len(several.json()["choices"]) == 4


def test_more_pictures_than_fit_are_refused_before_one_is_read(client, monkeypatch):
    monkeypatch.setattr("transfusion.serve.pictures.PictureReader.read", lambda *_: pytest.fail("one was read"))
    answers = [
        chat(client, [{"type": "image_url", "image_url": {"url": data_url(png())}}] * 228),
        client.post("/v1/images/edits", files=[("image[]", ("a.png", png()))] * 228)]
    for answer in answers:
        assert answer.status_code == 400 and "there are 228; at most 227 fit" in answer.json()["error"]["message"]


def test_a_conversation_of_more_messages_than_tokens_fit_is_refused_before_it_is_written_out(client, monkeypatch):
    monkeypatch.setattr("transfusion.serve.wire.parts_of", lambda *_: pytest.fail("it was written out"))
    answer = post(client, "chat/completions", {"messages": [{"role": "user", "content": ""}] * 5000})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
    assert "messages has 5000 messages; at most 4096 fit" in answer.json()["error"]["message"]
