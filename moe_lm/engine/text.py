"""Tokens to text as they come, never showing half a character or half a stop string."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Feed tokens with `push`; it gives the text that is certain by then. `stopped` tells that a stop string came, and
    `found` which: the one that begins first, of those that begin there the one given first."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(text for text in stop if text)
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.held, self.found = "", None

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def push(self, tokens: list[int]) -> str:
        for token in tokens:
            self.held += self.decoder.step(self.tokenizer, token) or ""
            found = [(index, place) for place, text in enumerate(self.stop) if (index := self.held.find(text)) >= 0]
            if found:
                index, place = min(found)
                self.found = self.stop[place]
                text, self.held = self.held[:index], ""
                return text
        # What could be the beginning of a stop string waits for the next token.
        waiting = max((
            n for text in self.stop for n in range(1, min(len(text), len(self.held) + 1))
            if self.held.endswith(text[:n])
        ), default=0)  # fmt: skip
        text, self.held = self.held[: len(self.held) - waiting], self.held[len(self.held) - waiting :]
        return text

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        text, self.held = ("" if self.stopped else self.held), ""
        return text
