"""What visitors may give the page's parts: texts, and the files that they sent or were sent.

This is checked in front of gradio's parts, for those open a file, and the page shows it again, before a request is
made of it. Left alone, gradio would fetch the file of an address, take any path that the client did not mark as a
file's, decode a data: URL of any size, and make a component in a message with the client's arguments.
"""
from pathlib import Path

import gradio as gr
from gradio_client.utils import is_http_url_like


def take_sent_files_alone(part: gr.components.Component) -> None:
    """Have a part refuse all but texts and the files in its cache, where visitors' uploads and the page's own lie."""
    move, read, folder = part.async_move_resource_to_block_cache, part.preprocess, Path(part.GRADIO_CACHE).resolve()

    async def checked_move(path: str | None) -> str | None:
        if is_http_url_like(str(path)):
            raise _refused("A picture is given by its address; send the file")
        return await move(path)

    def checked_read(payload):
        _check(None if payload is None else payload.model_dump(), folder)
        return read(payload)

    part.async_move_resource_to_block_cache, part.preprocess = checked_move, checked_read


def _check(value: object, folder: Path) -> None:
    """Refuse a value with a component in it, a data: URL, or a file outside the folder."""
    if isinstance(value, dict):
        if "component" in value:
            raise _refused("A message is neither text nor a picture; write it, or send the file")
        if "path" in value and not Path(str(value["path"])).resolve().is_relative_to(folder):
            raise _refused("A picture is no file that was sent; send it")
        if str(value.get("url")).startswith("data:"):
            raise _refused("A picture is given as a data: URL; send the file")
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(one, folder)


def _refused(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)
