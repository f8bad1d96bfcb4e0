"""From token arrays of documents to rows of a fixed length.

The documents of a source stand in one long line, each ended by END_OF_TEXT. Row r covers the T+1 tokens from r*T on:
it reads the first T of them and predicts the last T, so neighbours share one token and no prediction is lost where a
document is cut. Nothing is predicted from END_OF_TEXT: what follows it is another document.

B rows, T tokens in a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

IGNORED = -100
"""The target of a token from which nothing is predicted; what torch's cross entropy ignores."""


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass; the tensors are (B, T) int64."""

    tokens: torch.Tensor
    targets: torch.Tensor
    """The token after each one, or IGNORED where that belongs to another document or there is none."""
    positions: torch.Tensor
    """Distance from the start of the document's part in this row: a document that is cut starts again at 0."""
    documents: torch.Tensor
    """Number of the document within its row, from 0; a token attends to its own document only."""
    num_targets: int
    """Targets that are not IGNORED."""
    num_bytes: int
    """UTF-8 bytes of the text that those targets stand for; END_OF_TEXT stands for none."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`; to a GPU through pinned memory, for which nothing waits."""
        names = ("tokens", "targets", "positions", "documents")
        tensors = {name: getattr(self, name) for name in names}
        if torch.device(device).type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def join_documents(documents: Iterable[np.ndarray], end_of_text: int) -> np.ndarray:
    """One array of the documents' tokens, each followed by `end_of_text`, which no document may contain."""
    parts = [part for document in documents for part in (document, [end_of_text])]
    return np.concatenate([np.asarray(part, np.int64) for part in parts]) if parts else np.zeros(0, np.int64)


def count_rows(num_tokens: int, sequence_length: int) -> int:
    """Rows that it takes to predict every token but the first."""
    return max(0, -(-(num_tokens - 1) // sequence_length))


def row_windows(line: np.ndarray, rows: np.ndarray, sequence_length: int) -> np.ndarray:
    """(len(rows), T+1) int64: the tokens that these rows of a line of documents cover.

    The last row of the line is filled up with its last token, END_OF_TEXT, from which nothing is predicted.
    """
    positions = np.asarray(rows, np.int64)[:, None] * sequence_length + np.arange(sequence_length + 1)
    return line[np.minimum(positions, len(line) - 1)].astype(np.int64)


def pack_rows(windows: np.ndarray, end_of_text: int, token_bytes: np.ndarray) -> Batch:
    """The batch of `windows` (B, T+1), integers, whose documents each end with `end_of_text`.

    `token_bytes` (vocabulary,) int64 is `tokenizer.token_byte_lengths`.
    """
    windows = windows.astype(np.int64)
    tokens, following = windows[:, :-1], windows[:, 1:]
    ends = tokens == end_of_text
    scored = ~ends
    starts = np.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    index = np.arange(tokens.shape[1])
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens)),
        targets=torch.from_numpy(np.where(scored, following, IGNORED)),
        positions=torch.from_numpy(index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)),
        documents=torch.from_numpy(np.cumsum(starts, axis=1, dtype=np.int64)),
        num_targets=int(scored.sum()),
        num_bytes=int(token_bytes[following[scored]].sum()),
    )
