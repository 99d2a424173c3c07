"""A server that writes conversations by a template of training: what it answers and what it refuses."""
import pytest

from tests.transfusion.conftest import tiny_model
from tests.transfusion.serve.clients import post
from transfusion.serve.engine import Engine

for package in ("fastapi", "uvicorn", "multipart"):
    pytest.importorskip(package, reason=f"{package} is not installed; pip install 'tfkernels[serve]'")

from fastapi.testclient import TestClient  # noqa: E402

from transfusion.serve.server import make_app  # noqa: E402

STRIPS = "{% for message in messages %}{{ message['content'] | trim + eos_token }}{% endfor %}"
FEW = {"max_tokens": 2, "max_images": 0, "temperature": 0, "seed": 1}


def server(template):
    """A client of a server with a template."""
    model = tiny_model()
    model.tokenizer.chat_template = STRIPS if template == "tokenizer" else None
    return TestClient(make_app(Engine(model), "tiny", template=template), raise_server_exceptions=False)


def said(client, *messages):
    """The answer to messages (role, content)."""
    return post(client, "chat/completions", {
        "messages": [{"role": role, "content": content} for role, content in messages], **FEW})


def test_a_message_of_the_system_has_its_place_in_front():
    with server("vicuna_v1") as client:
        late = said(client, ("system", "Be short."), ("user", "a"), ("assistant", "b"), ("developer", "Now be long."),
                    ("user", "c"))
        assert late.status_code == 400
        assert "turn 3 is the system's and stands behind others" in late.json()["error"]["message"]
        several, one = (said(client, *system, ("user", "a")) for system in (
            [("system", "Be short."), ("developer", "Be kind.")], [("system", "Be short.\n\nBe kind.")]))
        assert several.status_code == 200 and several.json()["usage"] == one.json()["usage"]
        assert several.json()["choices"] == one.json()["choices"]


@pytest.mark.parametrize("template", ["vicuna_v1", "tokenizer"])
def test_no_words_are_no_error_of_the_server_and_no_unicode_is_one_of_the_client(template):
    with server(template) as client:
        for empty in ([], ""):
            assert said(client, ("user", "a"), ("assistant", empty), ("user", "b")).status_code == 200
            assert said(client, ("user", empty)).status_code == 200
        error = said(client, ("user", "a\ud800")).json()["error"]
        assert error["param"] == "messages" and error["message"].startswith(r"messages is 'a\ud800', which is no Unico")
