"""The text of tokens that come one by one, of which only the last are decoded anew."""

WINDOW = 256   # tokens that are decoded at once, at most
CONTEXT = 32   # of them, those that stand before the ones whose text is not settled


class Decoding:
    """What `tokenizer.decode` says of all tokens so far, at a cost that does not grow with them.

    The text of older tokens is settled where that of the last ones, decoded alone, is how it ends: so no character is
    cut in two and the spaces that a tokenizer drops at a beginning are not missed.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.settled, self.start, self.known = "", 0, 0  # text, and the window's first token and settled characters

    def text(self) -> str:
        """The text of all tokens."""
        window = self.tokenizer.decode(self.tokens[self.start:]) if self.tokens else ""
        text = self.settled + window[self.known:]
        if len(self.tokens) - self.start >= WINDOW:
            self._settle(text)
        return text

    def _settle(self, text: str) -> None:
        end = self.tokenizer.decode(self.tokens[-CONTEXT:])
        if end and text.endswith(end) and not end.endswith("\N{REPLACEMENT CHARACTER}"):
            self.settled, self.start, self.known = text, len(self.tokens) - CONTEXT, len(end)
