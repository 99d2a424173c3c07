"""A page's fields as the body of a call: what is left out, what a conversation becomes, how errors read."""
import pytest

pytest.importorskip("pydantic", reason="pydantic is not installed; pip install 'tfkernels[serve]'")

from transfusion.serve.fields import (  # noqa: E402
    LABELS,
    Fields,
    PictureFile,
    draw,
    edit,
    filled,
    messages_of,
    talk,
    told,
)
from transfusion.serve.wire import FIELDS, ApiError  # noqa: E402


def test_a_field_that_is_empty_is_left_out_of_the_body():
    assert draw("a", Fields()).body == {"prompt": "a"}
    assert draw("a", Fields(seed=0, guidance=0.0, count=2)).body == {"prompt": "a", "n": 2, "seed": 0,
                                                                    "guidance_scale": 0.0}
    assert "modalities" not in talk([{"role": "user", "content": "a"}], Fields()).body


def test_every_field_that_the_page_names_is_one_of_the_wire():
    assert set(LABELS) <= FIELDS | {"image"}


def test_messages_of_one_speaker_in_a_row_are_one_and_a_text_alone_is_a_string(tmp_path):
    path = tmp_path / "seen.png"
    path.write_bytes(b"picture")
    history = [{"role": "user", "content": {"path": str(path)}}, {"role": "user", "content": "what is it?"},
               {"role": "assistant", "content": [{"type": "text", "text": " a seven"}]}]
    messages = messages_of(history)
    assert messages == [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PictureFile(path)}},
                                     {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": " a seven"}]
    assert messages_of(history) == messages, "the history is left as it was"
    assert filled(messages, PictureFile.url)[0]["content"][0]["image_url"] == {
        "url": "data:image/png;base64,cGljdHVyZQ=="}


def test_an_edit_without_a_picture_says_where_to_get_one():
    with pytest.raises(ApiError, match="drop one into its field, or take one that was drawn"):
        edit(None, "a", Fields())


def test_a_picture_that_is_kept_no_longer_is_asked_for_again(tmp_path):
    with pytest.raises(ApiError, match="kept no longer; send it again"):
        PictureFile(tmp_path / "gone.png").url()


@pytest.mark.parametrize("error, shown", [
    (ApiError(400, "num_inference_steps is 999; at most 250 fit", "num_inference_steps"),
     "Steps is 999; at most 250 fit"),
    (ApiError(429, "submit: 4 requests wait; 4 fit; try again later"), "4 requests wait; 4 fit; try again later"),
    (ApiError(400, "steps are many", "unknown"), "steps are many")])
def test_an_error_calls_a_field_as_the_page_does(error, shown):
    assert told(error) == shown
