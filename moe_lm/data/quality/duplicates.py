"""Copies of documents, repeated lines, and near-copies of documents.

Hashes of 64 bits stand for texts: among ten million of them two different ones agree with a chance of 3 in a million.
"""

import hashlib
import re
from collections.abc import Container, Sequence
from types import ModuleType

import numpy as np

from moe_lm.config import ConfigError, QualityConfig

WORD = re.compile(r"\w+")
BATCH = 4096
"""Shingles that are hashed at once: with 128 permutations 4 MB."""


def text_hash(text: str) -> int:
    """64 bits that are the same for texts that differ in case and white space only."""
    return line_hash(" ".join(text.lower().split()))


def line_hash(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def first_copies(hashes: Sequence[int], held_out: Sequence[bool]) -> np.ndarray:
    """(documents,) int64: the document that each training document is a copy of, -1 for those that are none.

    The original is a held-out document if there is one, else the first. Held-out documents are copies of nothing.
    """
    hashes, held_out = np.asarray(hashes, np.uint64), np.asarray(held_out, bool)
    order = np.concatenate([np.flatnonzero(held_out), np.flatnonzero(~held_out)])
    _, first, group = np.unique(hashes[order], return_index=True, return_inverse=True)
    original = np.empty(len(hashes), np.int64)
    original[order] = order[first[group]]
    return np.where(held_out | (original == np.arange(len(hashes))), -1, original)


def counted_lines(text: str, shortest: int) -> set[int]:
    """Hashes of the different lines of a document of at least `shortest` characters."""
    return {line_hash(line) for line in map(str.strip, text.split("\n")) if len(line) >= max(shortest, 1)}


def frequent(hashes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of `hashes` (uint64) that are there more than `most` times, sorted, and how often each."""
    values, counts = np.unique(hashes, return_counts=True)
    return values[counts > most], counts[counts > most]


def without_lines(text: str, repeated: Container[int], shortest: int) -> str:
    """`text` without its lines whose hashes are `repeated`; the same object where there is none."""
    lines = text.split("\n")
    kept = [line for line in lines if len(bare := line.strip()) < max(shortest, 1) or line_hash(bare) not in repeated]
    return text if len(kept) == len(lines) else "\n".join(kept)


def near_library() -> ModuleType:
    """`datasketch`. Raises ConfigError where it is missing."""
    try:
        import datasketch
    except ImportError:
        raise ConfigError(
            "data.quality.near = true needs the datasketch library: pip install 'moe-lm[quality]', or set it to false."
        ) from None
    return datasketch


class NearDuplicates:
    """The documents that were added, and which of them a text resembles (MinHash, Broder 1997, with banded LSH).

    Two texts are as similar as the sets of their shingles, runs of `shingle_words` words in lower case: the Jaccard
    similarity. Candidates from the index count as near-duplicates if the signatures agree in at least `near_threshold`
    of their entries. Holds 8 bytes per permutation and document: 1 kB at the default. Raises ConfigError where
    `datasketch` is missing.
    """

    def __init__(self, config: QualityConfig):
        datasketch = near_library()
        self.config = config
        # Candidates are compared anyway, so a wrong one costs little and a missed one stays in the data.
        self.index = datasketch.MinHashLSH(
            threshold=config.near_threshold, num_perm=config.permutations, weights=(0.1, 0.9)
        )
        self.empty = datasketch.MinHash(config.permutations, seed=1, hashfunc=int)
        self.signatures: dict[int, np.ndarray] = {}

    def sketch(self, text: str):
        """The MinHash of a text; a text shorter than a shingle is one shingle."""
        sketch = self.empty.copy()
        shingles = self.shingles(text)
        for start in range(0, len(shingles), BATCH):
            sketch.update_batch(shingles[start : start + BATCH])
        return sketch

    def shingles(self, text: str) -> list[int]:
        """A hash of 32 bits for each different shingle, sorted."""
        words, size = WORD.findall(text.lower()), self.config.shingle_words
        runs = {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}
        return sorted(int.from_bytes(hashlib.blake2b(run.encode(), digest_size=4).digest(), "little") for run in runs)

    def find(self, sketch) -> tuple[int, float] | None:
        """The most similar document that was added, the first among equals, and its similarity; or None."""
        found = [(-self.similarity(sketch, number), number) for number in self.index.query(sketch)]
        if not found or -min(found)[0] < self.config.near_threshold:
            return None
        similarity, number = min(found)
        return number, -similarity

    def similarity(self, sketch, number: int) -> float:
        return float((sketch.hashvalues == self.signatures[number]).mean())

    def add(self, number: int, sketch) -> None:
        self.index.insert(number, sketch)
        self.signatures[number] = sketch.hashvalues


def byte_counts(text: str) -> np.ndarray:
    """(256,) int64: how often each byte is in the UTF-8 of a text."""
    return np.bincount(np.frombuffer(text.encode("utf-8", "replace"), np.uint8), minlength=256)


def divergence(document: np.ndarray, corpus: np.ndarray) -> float:
    """KL(document || corpus) in nats of two (256,) counts of bytes, those of the corpus smoothed by one each.

    Llama 3 (2024, section 3.1.1) removes documents whose tokens are distributed unlike the corpus by this measure. Here
    the tokens are bytes, the base of the vocabulary: the tokenizer is trained on what the cleaning leaves.
    """
    p = document / max(1, document.sum())
    q = (corpus + 1) / (corpus + 1).sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())
