"""Conversations in JSON lines of ms-swift, LLaMA-Factory and ShareGPT: `messages` or `conversations`, and `images`.

    {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A cat."}],
     "images": ["cat.jpg"]}

Roles and texts are called role and content, or from and value. A content may be a list of parts as OpenAI has it:
{"type": "text", "text": ...} and {"type": "image", "image": "cat.jpg"}, where an image without a name takes the next
one of `images`. A picture in an answer is drawn, one in a question read.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from transfusion.data.sources.llava import DRAWN, Conversations
from transfusion.settings import OneOf, check


@dataclass(frozen=True)
class ShareGPTSettings:
    """Conversations in ShareGPT's and ms-swift's format."""

    path: Path
    """JSON lines, a JSON list, or a table with these columns; several files by a pattern or a folder"""
    images: Path | None = None
    """the folder that pictures' names start from; without it, the one that `path` lies in"""
    drawn: Annotated[str, OneOf(DRAWN)] = "assistant"
    """whose pictures are drawn: those of the assistant's turns, "all" or "none"; others are only read"""
    split: str = "train"
    """of a `datasets` directory or parquet files named after splits"""

    def open(self) -> Conversations:
        """Open the source; see `LLaVASettings.open`."""
        check("sharegpt", self)
        return Conversations("sharegpt", self, turns=("messages", "conversations"), images=("images", "image"))
