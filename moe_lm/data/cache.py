"""Tokenized sources on the disk: written once, whole or not at all, and memory-mapped afterwards.

An entry is a directory of `cache_dir`, named by a hash of everything that its content depends on. Change a file, the
tokenizer, the held-out fraction or the interpreter, and another entry is written beside it.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_lm.config import ConfigError, require
from moe_lm.data.sources import Document, Source, hash_share
from moe_lm.data.tokenizer import DocumentEncoder

FORMAT = 1
"""To be raised when the same source is tokenized, split or laid out differently from before."""
CHUNK_CHARACTERS = 1_000_000
CHUNK_DOCUMENTS = 1024
STREAM_VALIDATION_TOKENS = 262_144
"""Held-out tokens that are gathered from the start of a streamed source: what the last evaluation of a run reads at the
default `train.eval_tokens`."""
STREAM_VALIDATION_DOCUMENTS = 1_000_000
"""Documents of a streamed source that are looked through for them at most."""


@dataclass(frozen=True)
class Split:
    """The tokenized documents of one side of a source."""

    tokens: np.ndarray
    """(tokens,) uint16 or uint32, a read-only memory map: the documents one after another, each with END_OF_TEXT."""
    starts: np.ndarray
    """(documents + 1,) int64: where each document begins, and where the last one ends."""
    num_bytes: int
    """UTF-8 bytes of the documents' text."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class TokenizedSource:
    """A source as the loader reads it."""

    name: str
    train: Split | None
    """None for a streamed source, whose size is not known."""
    validation: Split
    skipped: int
    """Files left out because they do not decode or parse."""
    digest: str
    """A hash of the training tokens, or of the held-out ones where the source is streamed: on every machine the same
    for the same data."""


class SplitWriter:
    """Appends documents to NAME.npy and, once closed, writes their starts to NAME.starts.npy."""

    def __init__(self, directory: Path, name: str, dtype: type[np.unsignedinteger]):
        self.directory, self.name, self.dtype = directory, name, np.dtype(dtype)
        self.lengths: list[int] = []
        self.num_bytes = 0
        self.hash = hashlib.blake2b(digest_size=16)
        with writable(directory.parent):
            self.file = (directory / f"{name}.npy").open("wb")
            self._write_header(0)

    def _write_header(self, length: int) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, text: str, tokens: np.ndarray) -> None:
        # Only the writing: what fails in reading the source is not the cache's fault.
        with writable(self.directory.parent):
            self.file.write(tokens.tobytes())
        self.hash.update(tokens)
        self.lengths.append(len(tokens))
        self.num_bytes += len(text.encode())

    def close(self) -> dict[str, Any]:
        """Finish the files; the facts about them that meta.json keeps."""
        starts = np.cumsum([0, *self.lengths], dtype=np.int64)
        # The library leaves room in the header for the array to grow, so the longer shape still fits.
        with writable(self.directory.parent):
            self.file.seek(0)
            self._write_header(int(starts[-1]))
            self.file.close()
            np.save(self.directory / f"{self.name}.starts.npy", starts)
        return {"tokens": int(starts[-1]), "bytes": self.num_bytes, "digest": self.hash.hexdigest()}


def read_split(directory: Path, name: str, facts: dict[str, Any]) -> Split:
    """The split that a SplitWriter wrote. Raises ValueError or OSError where the files are not what `facts` say."""
    tokens = np.load(directory / f"{name}.npy", mmap_mode="r")
    starts = np.load(directory / f"{name}.starts.npy")
    if not len(tokens) == starts[-1] == facts["tokens"]:
        raise ValueError(f"{name}.npy holds {len(tokens)} tokens, not {facts['tokens']}")
    return Split(tokens, starts, facts["bytes"])


def cache_entry(cache_dir: str | Path, kind: str, facts: Any, write: Callable[[Path], None]) -> Path:
    """The directory KIND-HASH of `cache_dir` that belongs to `facts` (JSON-able), filled by `write` if it is new.

    Two processes that write it at once both succeed. Raises ConfigError where the directory cannot be written.
    """
    name = f"{kind}-{hash_facts(facts)}"
    target = Path(cache_dir).expanduser() / name
    if os.path.isdir(target):
        return target
    partial = target.with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}")
    with writable(cache_dir):
        partial.mkdir(parents=True)
    try:
        write(partial)
        with writable(cache_dir):
            try:
                os.replace(partial, target)
            except OSError:
                if not os.path.isdir(target):
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def hash_facts(facts: Any) -> str:
    """A hash of JSON-able facts."""
    return hashlib.blake2b(json.dumps([FORMAT, facts]).encode(), digest_size=12).hexdigest()


@contextmanager
def writable(cache_dir: str | Path) -> Iterator[None]:
    """Turns a failure to write into a ConfigError that names the setting."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"data.cache_dir = {cache_dir} cannot be written ({reason}): name another.") from error


def tokenized_source(
    cache_dir: str | Path, source: Source, streaming: bool, encoder: DocumentEncoder, fraction: float
) -> TokenizedSource:
    """`source` split by `fraction` and tokenized, from the cache if it is there.

    Of a streamed source only validation is kept: the held-out documents from its start up to
    STREAM_VALIDATION_TOKENS, looking through STREAM_VALIDATION_DOCUMENTS at most. Raises ConfigError where either side
    of the split is empty, the source cannot be read or the cache cannot be written.
    """
    facts = [source.identity(), streaming, fraction, encoder.identity()]

    def write(directory: Path) -> None:
        write_source(directory, source, streaming, encoder, fraction)

    entry = cache_entry(cache_dir, "source", facts, write)
    try:
        meta = json.loads((entry / "meta.json").read_text("utf-8"))
        train = None if streaming else read_split(entry, "train", meta["train"])
        validation = read_split(entry, "validation", meta["validation"])
        digest = meta["validation" if streaming else "train"]["digest"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the tokenized source in {entry} is damaged ({error}): delete that directory.") from error
    return TokenizedSource(source.name, train, validation, meta["skipped"], digest)


def write_source(directory: Path, source: Source, streaming: bool, encoder: DocumentEncoder, fraction: float) -> None:
    """Fill a cache entry with the splits of `source` and meta.json."""
    validation = SplitWriter(directory, "validation", encoder.dtype)
    train = None if streaming else SplitWriter(directory, "train", encoder.dtype)
    seen, shares = 0, [1.0, 0.0]
    for documents in chunked(document for document in source if document.text):
        seen += len(documents)
        drawn = [hash_share(document.key) for document in documents]
        shares = [min(shares[0], *drawn), max(shares[1], *drawn)]
        for writer, side in ((validation, True), (train, False)):
            texts = [d.text for d, share in zip(documents, drawn, strict=True) if (share < fraction) == side]
            for text, tokens in zip(texts, encoder.encode(texts) if writer else (), strict=writer is not None):
                writer.append(text, tokens)
        if streaming and (sum(validation.lengths) >= STREAM_VALIDATION_TOKENS or seen >= STREAM_VALIDATION_DOCUMENTS):
            break
    require_both_sides(source.name, seen, shares, fraction)
    meta = {"source": source.name, "skipped": source.skipped, "validation": validation.close()}
    if train:
        meta["train"] = train.close()
    with writable(directory.parent):
        (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")


def chunked(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents in lists of about CHUNK_CHARACTERS, which bounds what is held in memory."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_CHARACTERS or len(chunk) == CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def require_both_sides(name: str, documents: int, shares: list[float], fraction: float) -> None:
    """Refuse a source that leaves nothing to train on or to validate with, naming the fraction that would do.

    `shares` are the least and the greatest `hash_share` of its documents.
    """
    require(documents > 0, f"data source {name} holds no text: name another in data.sources.")
    lowest, highest = shares
    require(
        documents > 1 and lowest != highest,
        f"data source {name} holds one document, which cannot be both trained on and held out: add more.",
    )
    # Rounded away from the hash, so that the fraction that is named does what is said of it.
    above, below = int(lowest * 1000 + 1) / 1000, int(highest * 1000) / 1000
    require(
        lowest < fraction,
        f"data.validation_fraction = {fraction} holds out none of the {documents} documents of {name}: raise it to "
        f"{above:.3f} or add documents.",
    )
    require(
        fraction <= highest,
        f"data.validation_fraction = {fraction} holds out all {documents} documents of {name}: lower it to {below:.3f} "
        "or add documents.",
    )
