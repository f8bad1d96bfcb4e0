"""From a DataConfig to batches: `prepare_data` tokenizes, `TrainLoader` and validation read.

Training is a line of rows without end. Row i comes from a source that depends on i alone (`Mixture`), and is that
source's next one; each pass over a source puts documents and rows in a new order, drawn from (seed, source, pass). So
where a run stands is a count of rows per source, and any way of cutting the rows into batches gives the same rows.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from moe_lm.config import DataConfig, require
from moe_lm.data.cache import Split, TokenizedSource, cache_entry, tokenized_source, writable
from moe_lm.data.mixture import Mixture, row_shares
from moe_lm.data.packing import Batch, count_rows, pack_rows, row_windows
from moe_lm.data.sources import Source, hash_share, open_source
from moe_lm.data.streaming import StreamedRows
from moe_lm.data.tokenizer import (
    DocumentEncoder,
    load_tokenizer,
    token_byte_lengths,
    train_tokenizer,
    write_text,
)

TOKENIZER_CHARACTERS = 8_000_000
"""Text that a tokenizer is trained on at most, in equal parts from each source: more hardly changes its merges."""
LONGEST_SAMPLE = 1_000_000
"""Characters of one document that count for that."""


class ShuffledRows:
    """The rows of a tokenized source, pass after pass. T tokens in a row.

    Each pass joins the documents in an order of its own, cuts the line into rows, the last one filled up, and gives
    the rows in random order: neighbouring rows of one document in one batch would tell the optimizer little.
    """

    def __init__(self, split: Split, seed: tuple[int, ...], sequence_length: int):
        self.split, self.seed, self.length = split, seed, sequence_length
        self.rows_per_pass = count_rows(split.num_tokens, sequence_length)
        self.orders: dict[int, PassOrder] = {}

    def windows(self, first_row: int, rows: int) -> np.ndarray:
        """(rows, T+1) int64: the tokens of `rows` rows from `first_row` on."""
        passes, places = np.divmod(first_row + np.arange(rows, dtype=np.int64), self.rows_per_pass)
        result = np.empty((rows, self.length + 1), np.int64)
        self.orders = {number: order for number, order in self.orders.items() if number >= passes[0]}
        for number in range(int(passes[0]), int(passes[-1]) + 1):
            where = passes == number
            order = self.order(number)
            offsets = order.rows[places[where], None] * self.length + np.arange(self.length + 1)
            offsets = np.minimum(offsets, self.split.num_tokens - 1)
            document = np.searchsorted(order.ends, offsets, side="right")
            result[where] = self.split.tokens[offsets + order.shift[document]]
        return result

    def order(self, number: int) -> "PassOrder":
        if number not in self.orders:
            random = np.random.default_rng([*self.seed, number])
            documents = random.permutation(self.split.num_documents)
            starts = self.split.starts[documents]
            ends = np.cumsum(self.split.starts[documents + 1] - starts)
            shift = starts - np.concatenate([[0], ends[:-1]])
            self.orders[number] = PassOrder(shift, ends, random.permutation(self.rows_per_pass))
        return self.orders[number]


class PassOrder(NamedTuple):
    """Where the tokens of one pass come from; int64 arrays."""

    shift: np.ndarray
    """(documents,) in the order of the pass: how far each one's tokens lie on from where they come in the pass."""
    ends: np.ndarray
    """(documents,) where each one ends in the pass."""
    rows: np.ndarray
    """(rows,) the order in which the pass gives its rows."""


class TrainLoader:
    """An endless line of training rows that can be left and taken up again at any row."""

    def __init__(self, data: "PreparedData", seed: int, sequence_length: int):
        self.data, self.seed, self.length = data, seed, sequence_length
        sizes = [source.train.num_tokens if source.train else None for source in data.sources]
        self.mixture = Mixture(row_shares([source.epochs for source in data.config.sources], sizes))
        self.readers = [
            StreamedRows(opened, data.encoder, data.config.validation_fraction, sequence_length)
            if source.train is None
            else ShuffledRows(source.train, (seed, index), sequence_length)
            for index, (source, opened) in enumerate(zip(data.sources, data.opened, strict=True))
        ]

    def next_batch(self, rows: int) -> Batch:
        """The next `rows` rows, in the order of the mixture."""
        done = list(self.mixture.counts)
        sources = self.mixture.take(rows)
        windows = np.empty((rows, self.length + 1), np.int64)
        for index, reader in enumerate(self.readers):
            where = np.flatnonzero(sources == index)
            if len(where):
                streamed = isinstance(reader, StreamedRows)
                windows[where] = reader.windows(len(where)) if streamed else reader.windows(done[index], len(where))
        return self.data.pack(windows)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, in JSON's types: rows read per source and what the data was."""
        return {
            "seed": self.seed,
            "sequence_length": self.length,
            "data": [source.digest for source in self.data.sources],
            "rows": list(self.mixture.counts),
            "streams": [r.state_dict() if isinstance(r, StreamedRows) else None for r in self.readers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`: the batches that follow are those that followed then, bit for bit.

        Raises ConfigError where seed, row length, tokens or sources are not those of the saved run.
        """
        for name, here, setting in (
            ("seed", self.seed, "train.seed"),
            ("sequence_length", self.length, "data.sequence_length"),
        ):
            require(
                state[name] == here, f"{setting} = {here} is not the {state[name]} of the saved run: resume with that."
            )
        self.mixture.load(state["rows"])
        for source, digest in zip(self.data.sources, state["data"], strict=True):
            require(
                source.digest == digest,
                f"data source {source.name} does not give the tokens that the saved run read: resume with the same "
                "data.sources, data.quality, data.validation_fraction and tokenizer.",
            )
        for reader, stream in zip(self.readers, state["streams"], strict=True):
            if isinstance(reader, StreamedRows):
                reader.load_state_dict(stream)


@dataclass(frozen=True)
class PreparedData:
    """Tokenized sources and their tokenizer; what `prepare_data` returns."""

    config: DataConfig
    tokenizer: Tokenizer
    sources: tuple[TokenizedSource, ...]
    """In the order of `config.sources`."""
    opened: tuple[Source, ...]
    encoder: DocumentEncoder
    token_bytes: np.ndarray
    """(vocabulary,) int64: UTF-8 bytes that each token stands for."""

    def train_loader(self, seed: int, sequence_length: int) -> TrainLoader:
        """Training rows from the first one on.

        Raises ConfigError where some but not all sources are streamed.
        """
        return TrainLoader(self, seed, sequence_length)

    def validation_batches(
        self, source_index: int, sequence_length: int, max_tokens: int, batch_rows: int
    ) -> Iterator[Batch]:
        """Batches of at most `batch_rows` rows of the held-out documents of a source, `max_tokens` in all.

        The rows come in a fixed shuffled order, so a small `max_tokens` is a sample from all documents and a larger
        one begins with the same rows. At least one row is given; the last batch may be smaller.
        """
        line = self.sources[source_index].validation.tokens
        order = np.random.default_rng(0).permutation(count_rows(len(line), sequence_length))
        order = order[: max(1, max_tokens // sequence_length)]
        for start in range(0, len(order), batch_rows):
            yield self.pack(row_windows(line, order[start : start + batch_rows], sequence_length))

    def pack(self, windows: np.ndarray) -> Batch:
        return pack_rows(windows, self.encoder.end_of_text, self.token_bytes)


def prepare_data(
    config: DataConfig,
    vocab_size: int,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str], None] | None = None,
) -> PreparedData:
    """Open, clean, split and tokenize every source of `config`, reusing what `config.cache_dir` holds.

    The tokenizer is `tokenizer` (as a draft model uses its target's), else that of `config.tokenizer`, else one of
    `vocab_size` trained on the training documents. `progress` is told in a few words what takes time next. Raises
    ConfigError for a source, a tokenizer or a cache that cannot work.
    """
    report = progress or (lambda message: None)
    opened = tuple(open_source(source) for source in config.sources)
    if config.quality is not None:
        from moe_lm.data.quality import clean_sources  # nothing of it is needed otherwise

        opened = clean_sources(config, opened, report)
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is None:
        tokenizer = trained_tokenizer(config, opened, vocab_size, report)
    size = max(tokenizer.get_vocab().values()) + 1
    require(
        size <= vocab_size,
        f"the tokenizer has {size} tokens, more than model.vocab_size = {vocab_size}: raise it or name a smaller "
        "data.tokenizer.",
    )
    encoder, token_bytes = DocumentEncoder(tokenizer), token_byte_lengths(tokenizer)
    sources = []
    for source, settings in zip(opened, config.sources, strict=True):
        report(f"tokenizing {source.name}")
        sources.append(
            tokenized_source(config.cache_dir, source, settings.streaming, encoder, config.validation_fraction)
        )
    return PreparedData(config, tokenizer, tuple(sources), opened, encoder, token_bytes)


def trained_tokenizer(
    config: DataConfig, opened: tuple[Source, ...], vocab_size: int, report: Callable[[str], None]
) -> Tokenizer:
    """A tokenizer of `vocab_size` trained on the training documents of `opened`, or the cached one."""
    streaming = [source.streaming for source in config.sources]
    facts = [[source.identity() for source in opened], streaming, config.validation_fraction, vocab_size]

    def write(directory: Path) -> None:
        report(f"training a tokenizer of {vocab_size} tokens")
        budget = TOKENIZER_CHARACTERS // len(opened)
        texts = []
        for source, streamed in zip(opened, streaming, strict=True):
            texts += sample_texts(source, streamed, config.validation_fraction, budget)
        trained = train_tokenizer(texts, vocab_size).to_str()
        with writable(config.cache_dir):
            write_text(directory / "tokenizer.json", trained)

    return load_tokenizer(cache_entry(config.cache_dir, "tokenizer", facts, write))


def sample_texts(source: Source, streaming: bool, fraction: float, budget: int) -> list[str]:
    """Training documents of `source` of about `budget` characters: the first ones of a stream, else those whose keys
    hash lowest, which is a sample from all of it that is the same every time."""
    heap: list[tuple[float, int, str]] = []
    size = 0
    for number, document in enumerate(source):
        share = hash_share(document.key)
        if share < fraction or not document.text:
            continue
        text = document.text[:LONGEST_SAMPLE]
        size += len(text)
        heapq.heappush(heap, (-number if streaming else -share, number, text))
        if streaming and size >= budget:
            break
        while size - len(heap[0][2]) >= budget:
            size -= len(heapq.heappop(heap)[2])
    return [text for *_, text in sorted(heap, reverse=True)]
