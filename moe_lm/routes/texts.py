"""Texts as rows of tokens: read block by block, so that a file of any length takes the memory of one block."""

import io
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

from tokenizers import Tokenizer

from moe_lm.config import ConfigError, DataConfig, SourceConfig, require
from moe_lm.routes.classes import CLASSES, keywords_of, token_class

BLOCK = 1 << 16
"""Characters that are read and tokenized at a time, up to the last end of a line in them."""
DEFAULT_TEXT = "python:code"


class Token(NamedTuple):
    """One token of a text."""

    id: int
    text: str
    """The characters that it stands for; none for a special token, or where the token before it shows the character."""
    kind: int
    """Its number in CLASSES."""


def documents(names: Iterable[str]) -> Iterator[tuple[str, TextIO]]:
    """The texts of the names, opened in order, each under the name that tells its language.

    A name is a file, `-` for standard input, or `python:code`, `python:prose` or `python:packages` for the documents of
    the interpreter's libraries that training holds out by default. Raises ConfigError for a file that cannot be read.
    """
    for name in names:
        if name == "-":
            yield "standard input", io.TextIOWrapper(sys.stdin.buffer, "utf-8", errors="replace")
        elif name.startswith("python:"):
            for text in held_out(name):
                yield name, io.StringIO(text)
        else:
            try:
                yield name, Path(name).expanduser().open(encoding="utf-8", errors="replace", newline="")
            except OSError as error:
                raise ConfigError(f"--text {name} cannot be read: {error.strerror}.") from None


def held_out(source: str) -> Iterator[str]:
    """The documents of a source that a run with the default share of held-out documents is never trained on."""
    from moe_lm.data import is_held_out, open_source

    for document in open_source(SourceConfig(source)):
        if is_held_out(document.key, DataConfig().validation_fraction):
            yield document.text


def blocks(file: TextIO) -> Iterator[str]:
    """The text of a file in pieces that end where a line does and the next begins with no white space.

    No token of a tokenizer of this house reaches across such a place. A line longer than BLOCK is cut where it is.
    """
    left = ""
    while more := file.read(BLOCK):
        left += more
        end = len(left)
        while end := left.rfind("\n", 0, end) + 1:
            if end < len(left) and not left[end].isspace():
                break
            end -= 1
        if end or len(left) >= 4 * BLOCK:
            yield left[: end or len(left)]
            left = left[end:] if end else ""
    if left:
        yield left


def tokens_of(file: TextIO, name: str, tokenizer: Tokenizer) -> Iterator[Token]:
    """The tokens of one text; those that the tokenizer puts at the head of a text, at its head only."""
    keywords = keywords_of(name)
    first, before, kind = True, "", 0
    for block in blocks(file):
        encoding = tokenizer.encode(block, add_special_tokens=first)
        done = 0
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            start = max(start, done)  # tokens that share a character all point at it
            text = block[start:end]
            done = max(done, end)
            left = block[start - 1] if start else before
            # Where every space is a token of its own, all that open a line are its indentation.
            opens = CLASSES[kind] == "indent"
            kind = token_class(text, "\n" if opens else left, block[end : end + 1], keywords)
            yield Token(index, text, kind)
        first, before = False, block[-1]


def rows(names: Iterable[str], tokenizer: Tokenizer, length: int, most: int) -> Iterator[list[Token]]:
    """Rows of at most `length` tokens of one text each, `most` tokens in all.

    Raises ConfigError where there is no token at all, and for files as `documents` does.
    """
    left, names = most, list(names)
    for name, file in documents(names):
        with file:
            stream = tokens_of(file, name, tokenizer)
            while left and (row := list(islice(stream, min(length, left)))):
                left -= len(row)
                yield row
        if not left:
            return
    require(left < most, f"--text {' '.join(names)} holds no token: name a text with at least one character.")
