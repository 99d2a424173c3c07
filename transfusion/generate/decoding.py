"""The text of tokens that come one by one, of which only the last are decoded anew and no finished one changes."""
from collections.abc import Sequence

WINDOW = 256   # tokens that are decoded at once, at most
CONTEXT = 32   # of them, those that stand before the ones whose text is not settled
LONGEST = 4    # bytes of a character in UTF-8
CUT = "\N{REPLACEMENT CHARACTER}"  # at the end of a text: its last character is not whole yet


class Decoding:
    """What `tokenizer.decode` says of all tokens so far, at a cost that does not grow with them.

    The text of older tokens is settled where that of the last ones, decoded alone, is how it ends: so no character is
    cut in two and the spaces that a tokenizer drops at a beginning are not missed.

    A text that ends with a whole character stays. Tokenizers that fall back to bytes make replacement characters of a
    whole run of bytes where its last character is cut; then only the tokens behind the text that stays are decoded.

    `before` are the last tokens of a text that these go on with: they are read, and no part of what is said. Without
    them a tokenizer that drops the space at a beginning (Llama 2) would say "seven" of the " seven" in "a seven".
    """

    def __init__(self, tokenizer, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.tokens = list(before)
        said = self._decoded(self.tokens)
        self.settled, self.start, self.known = "", 0, len(said)  # text, window's first token and settled characters
        # the last text without a cut character, its tokens and its window
        self.whole, self.count, self.seen = "", len(self.tokens), said

    def text(self) -> str:
        """The text of all tokens but those before."""
        window = self._window()
        if not window.startswith(self.seen):
            self.settled, self.start, self.known, self.seen = self.whole, self.count, 0, ""
            window = self._window()
        text = self.settled + window[self.known:]
        if not window.endswith(CUT):
            self.whole, self.count, self.seen = text, len(self.tokens), window
        if len(self.tokens) - self.start >= WINDOW:
            self._settle(text)
        return text

    def _window(self) -> str:
        return self._decoded(self.tokens[self.start:])

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens) if tokens else ""

    def _settle(self, text: str) -> None:
        for context in range(CONTEXT, CONTEXT + LONGEST):  # one of them begins with a character, where tokens are bytes
            end = self.tokenizer.decode(self.tokens[-context:])
            if end and text.endswith(end) and not end.endswith(CUT):
                self.settled, self.start, self.known = text, len(self.tokens) - context, len(end)
                self.seen = end
                return
