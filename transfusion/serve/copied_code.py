"""A call of the interface as code to copy: Python with OpenAI's client, and curl. Pictures are files beside the code.

`wire.py` reads what both send as the request that the page made.
"""
import json
import secrets
import shlex

from transfusion.serve.fields import Call, PictureFile, filled

OPENAI_NAMES = {
    "chat/completions": ("messages", "max_tokens", "temperature", "seed"),
    "images/generations": ("prompt", "n", "size"),
    "images/edits": ("prompt", "n", "size"),
}
"""Fields that OpenAI's client takes by name; others go into its extra_body."""
FUNCTIONS = {"chat/completions": "chat.completions.create", "images/generations": "images.generate",
             "images/edits": "images.edit"}
WIDTH = 90  # characters
IMPORTS = "import base64\nfrom pathlib import Path\n\nimport openai\n"
DATA_URL = """

def data_url(path):
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


"""
READ_ANSWER = """content = answer.choices[0].message.content
for number, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
    if part["type"] == "text":
        print(part["text"])
    else:
        data = part["image_url"]["url"].partition(",")[2]
        Path(f"answer-{number}.png").write_bytes(base64.b64decode(data))
"""
READ_PICTURES = """for number, picture in enumerate(answer.data):
    Path(f"picture-{number}.png").write_bytes(base64.b64decode(picture.b64_json))
"""


def python_code(call: Call, server: str, model: str) -> str:
    """A program with OpenAI's client (`pip install openai`); `server` is where /v1 lies, such as http://host:8000."""
    named = {name: value for name, value in call.body.items() if name in OPENAI_NAMES[call.address]}
    others = {name: value for name, value in call.body.items() if name not in named}
    given = {"model": model, **named, "extra_body": others}
    lines = [f"    {name}={_literal(value)}," for name, value in given.items() if value != {}]
    lines[1:1] = [f"    image=Path({picture.name!r})," for picture in call.pictures]
    shows_pictures = "data_url(" in "\n".join(lines)
    return "".join((
        IMPORTS, DATA_URL if shows_pictures else "\n",
        f"client = openai.OpenAI(base_url={server + '/v1'!r}, api_key='none')\n",
        f"answer = client.{FUNCTIONS[call.address]}(\n", "\n".join(lines), "\n)\n",
        READ_ANSWER if call.address.startswith("chat") else READ_PICTURES))


def curl_code(call: Call, server: str) -> str:
    """A line for a shell; the answer is JSON."""
    address = shlex.quote(f"{server}/v1/{call.address}")
    if call.pictures:
        files = [f"-F {shlex.quote(_form_file(picture.name))}" for picture in call.pictures]
        fields = [f"--form-string {shlex.quote(f'{name}={value}')}" for name, value in call.body.items()]
        return " \\\n  ".join([f"curl -s {address}", *files, *fields]) + "\n"
    return f'curl -s {address} -H "Content-Type: application/json" -d @- <<JSON\n{_here(call.body)}\nJSON\n'


def _literal(value: object, depth: int = 1) -> str:
    """A value as Python, on lines of their own where one is too short for it."""
    flat = repr(value)
    if len(flat) + 4 * depth <= WIDTH or not isinstance(value, (dict, list)):
        return flat
    pairs = [(f"{name!r}: ", part) for name, part in value.items()] if isinstance(value, dict) else [
        ("", part) for part in value]
    lines = [f"{'    ' * (depth + 1)}{name}{_literal(part, depth + 1)},\n" for name, part in pairs]
    return flat[0] + "\n" + "".join(lines) + "    " * depth + flat[-1]


def _form_file(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'image=@"{escaped}"'


def _here(body: dict) -> str:
    """A body as JSON in which a shell finds nothing to replace but its files, which it puts in as base64."""
    mark, names = secrets.token_hex(8), []  # what no text holds

    def write(picture: PictureFile) -> str:
        names.append(picture.path.name)
        return f"data:image/png;base64,{mark}"

    text = json.dumps(filled(body, write), indent=2, ensure_ascii=False)
    text = text.replace("\\\\", "\\u005c").replace("$", "\\u0024").replace("`", "\\u0060")
    for name in names:
        text = text.replace(mark, f"$(base64 < {shlex.quote(name)} | tr -d '\\n')", 1)
    return text
