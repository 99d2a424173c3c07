"""What tests ask a server with, wait for, and count of what runs at once."""
import base64
import io
import json
import threading
import time

from PIL import Image as Picture

DRAW = {"num_inference_steps": 2, "seed": 3}


def until(happened, seconds=30):
    """Wait until it has happened, or fail."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.002)


class AtOnce:
    """Counts who is inside a `with` of it, and the most that were."""

    def __init__(self):
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def __enter__(self):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *error):
        with self.lock:
            self.now -= 1


def png(size=(9, 7), colour=128):
    file = io.BytesIO()
    Picture.new("L", size, colour).save(file, "PNG")
    return file.getvalue()


def data_url(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def post(client, path, body):
    """What a body is answered; in ASCII, as the client of the tests cannot write what UTF-8 cannot."""
    return client.post(f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})


def chat(client, content, **fields):
    return post(client, "chat/completions", {"messages": [{"role": "user", "content": content}], **fields})
