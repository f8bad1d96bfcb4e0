"""Training rows of a source that is read and tokenized while training."""

from typing import Any

import numpy as np

from moe_lm.config import require
from moe_lm.data.sources import Rows, is_held_out
from moe_lm.data.tokenizer import DocumentEncoder

CHUNK_CHARACTERS = 200_000
CHUNK_DOCUMENTS = 64


class StreamedRows:
    """The rows of a stream, in its own order, without its held-out documents; after the last it starts again.

    At any time it holds one chunk of tokenized documents. The state is where the stream stood before that chunk, how
    many of the chunk's tokens are used, and the tokens, less than a row of them, left over from the chunk before: a
    resumed stream reads the chunk again and goes on from there.

    Shapes: T tokens in a row.
    """

    def __init__(self, source: Rows, encoder: DocumentEncoder, fraction: float, sequence_length: int):
        self.source, self.encoder, self.fraction, self.length = source, encoder, fraction, sequence_length
        self._open(None)
        self.before_chunk: dict[str, Any] | None = None
        self.carried = np.zeros(0, np.int64)
        self.line = self.carried
        """The tokens carried over and those of the chunk."""
        self.used = 0

    def windows(self, rows: int) -> np.ndarray:
        """(rows, T+1) int64: the tokens of the next rows, each beginning with the last token of the one before."""
        result = np.empty((rows, self.length + 1), np.int64)
        for row in result:
            while len(self.line) - self.used <= self.length:
                self._read_chunk(self.line[self.used :].copy())
                self.used = 0
            row[:] = self.line[self.used : self.used + self.length + 1]
            self.used += self.length
        return result

    def state_dict(self) -> dict[str, Any]:
        """The state, in JSON's types; at most T of them are tokens."""
        return {"before_chunk": self.before_chunk, "carried": self.carried.tolist(), "used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`: the same rows follow that followed then."""
        self._open(state["before_chunk"])
        # An unused stream has no chunk to read again.
        if state["used"] or state["carried"] or state["before_chunk"]:
            self._read_chunk(np.array(state["carried"], np.int64))
            # The library, asked for its state right after it was given one, may name another place.
            self.before_chunk = state["before_chunk"]
        self.used = state["used"]

    def _open(self, state: dict[str, Any] | None) -> None:
        self.stream = self.source.load()
        if state is not None:
            self.stream.load_state_dict(state)
        self.documents = self.source.read(self.stream)

    def _read_chunk(self, carried: np.ndarray) -> None:
        """Make the line of `carried` and the stream's next chunk."""
        self.before_chunk, self.carried = self.stream.state_dict(), carried
        texts, size, passes = [], 0, 0
        while size < CHUNK_CHARACTERS and len(texts) < CHUNK_DOCUMENTS:
            document = next(self.documents, None)
            if document is None:
                if texts:
                    break
                passes += 1
                require(
                    passes < 2,
                    f"data source {self.source.name} holds no text to train on: name another in data.sources.",
                )
                self._open(None)
                continue
            if document.text and not is_held_out(document.key, self.fraction):
                texts.append(document.text)
                size += len(document.text)
        self.line = np.concatenate([carried, *self.encoder.encode(texts)], dtype=np.int64)
