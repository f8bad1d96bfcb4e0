"""Where documents come from: the standard library, local files, datasets of the Hugging Face hub.

A source can be read any number of times and gives the same documents in the same order. Whether a document is held
out depends on its key alone, so the split survives a change of order, of machine and of everything beside it.
"""

import hashlib
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lm.config import ConfigError, SourceConfig, require
from moe_lm.data import stdlib

ROW_FORMATS = {
    ".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".json.gz": "json", ".parquet": "parquet",
}  # fmt: skip
"""Files of rows, read with the `datasets` library, by how their name ends."""
PIECES_PER_FILE = 100
SMALLEST_PIECE, LARGEST_PIECE = 2_000, 50_000
LARGEST_MODULE = 200_000
"""Bytes of an installed module; what is larger is a table or was written by a program."""


@dataclass(frozen=True)
class Document:
    """One text, and the name by which it is or is not held out."""

    text: str
    key: str
    """The path of its file, relative to the source; for a row or a piece of a file, a hash of its text."""


def hash_share(key: str) -> float:
    """A number in [0, 1) that is the same for the same key everywhere."""
    # A file name that is not UTF-8 comes with surrogates.
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest()) / 2**48


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the document of this key belongs to validation, as about `fraction` of all keys do."""
    return hash_share(key) < fraction


def content_key(text: str) -> str:
    """A key for a text that has no file. Equal texts have equal keys: copies fall on the same side of the split."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Source(ABC):
    """Documents in a fixed order; every iteration starts again from the first."""

    def __init__(self, name: str):
        self.name = name
        self.skipped = 0
        """Files that the last iteration had to leave out because they do not decode or parse."""

    @abstractmethod
    def __iter__(self) -> Iterator[Document]: ...

    @abstractmethod
    def identity(self) -> list[Any]:
        """JSON-able facts, cheap to gather, that change whenever the documents may have changed."""


class StandardLibrary(Source):
    """`python:code` or `python:prose`; see `moe_lm.data.stdlib` for what is in them."""

    def __init__(self, part: str):
        super().__init__(f"python:{part}")
        require(
            part in ("code", "prose"),
            f"data source python:{part} is not known: it is python:code, python:prose or python:packages.",
        )
        self.part = part
        self.root = stdlib.stdlib_root()
        require(
            (self.root / "os.py").is_file(),
            f"{self.name} finds no source files in {self.root}, this interpreter's standard library: name a file, a "
            "directory or a hub dataset in data.sources.",
        )

    def __iter__(self) -> Iterator[Document]:
        library = stdlib.read_library(self.root)
        self.skipped = library.skipped
        for key, text in getattr(library, self.part):
            yield Document(text, key)

    def identity(self) -> list[Any]:
        files = [self.root / relative for relative in stdlib.stdlib_files(self.root, (".py", ".txt", ".rst"))]
        return [self.name, sys.version, file_stamps(self.root, files)]


class Rows(Source):
    """Rows of a dataset, opened by `datasets.load_dataset` with `arguments`; the text is in column `text_field`."""

    def __init__(self, name: str, text_field: str, stamps: list[Any], *arguments: Any, **options: Any):
        super().__init__(name)
        self.text_field, self.stamps, self.arguments, self.options = text_field, stamps, arguments, options

    def load(self) -> Any:
        """The `datasets` dataset. Raises ConfigError with the library's reason where it cannot be opened."""
        import datasets  # costs seconds, which the standard library and plain text need not pay

        try:
            return datasets.load_dataset(*self.arguments, **self.options)
        # The library raises whatever its readers and its network client raise; the reason is passed on.
        except Exception as error:
            raise ConfigError(f"data source {self.name} cannot be opened: {first_line(error)}.") from error

    def document(self, row: dict[str, Any]) -> Document:
        """The document of one row. Raises ConfigError where the text column is missing or holds no text."""
        require(
            self.text_field in row,
            f"data source {self.name} has no column {self.text_field!r}, only {', '.join(map(repr, row))}: name the "
            "one with the text in its text_field.",
        )
        text = row[self.text_field]
        require(
            isinstance(text, str | None),
            f"column {self.text_field!r} of data source {self.name} holds a {type(text).__name__}, not text: name the "
            "one with the text in its text_field.",
        )
        return Document(text or "", content_key(text or ""))

    def read(self, dataset: Any) -> Iterator[Document]:
        """The documents of an opened dataset, one row being read for each.

        Raises ConfigError with the library's reason where a row cannot be read.
        """
        rows = iter(dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise ConfigError(f"data source {self.name} cannot be read: {first_line(error)}.") from error
            yield self.document(row)

    def __iter__(self) -> Iterator[Document]:
        return self.read(self.load())

    def identity(self) -> list[Any]:
        return [self.name, self.text_field, self.stamps]


class LocalFiles(Source):
    """A file, or every file below a directory: text first, then JSON rows, then parquet, each in order of its path.

    A text file is one document, unless it is all there is: then it is cut at blank lines into about 100 pieces of
    2,000 to 50,000 characters, so that some can be held out. Hidden files and directories are passed over.
    """

    def __init__(self, path: Path, text_field: str, name: str | None = None, files: list[Path] | None = None):
        """`files` are those of the directory to be read, all of them if not given."""
        super().__init__(name or str(path))
        self.root = path
        self.text_files, by_format = [], {}
        for file in walk(path) if files is None else files:
            kind = row_format(file)
            (self.text_files if kind is None else by_format.setdefault(kind, [])).append(file)
        self.rows = [
            # Streamed whether or not the run tokenizes it beforehand: that needs no second copy of it on the disk.
            Rows(
                str(path),
                text_field,
                file_stamps(path, files),
                kind,
                data_files=[str(f) for f in files],
                split="train",
                streaming=True,
            )
            for kind, files in sorted(by_format.items())
        ]

    def __iter__(self) -> Iterator[Document]:
        self.skipped = 0
        for file in self.text_files:
            text = read_text(file)
            if text is None:
                self.skipped += 1
            elif file == self.root:
                yield from (Document(piece, content_key(piece)) for piece in cut_text(text))
            elif text.strip():
                yield Document(text, file.relative_to(self.root).as_posix())
        for rows in self.rows:
            yield from rows

    def identity(self) -> list[Any]:
        return [self.name, file_stamps(self.root, self.text_files), *(rows.identity() for rows in self.rows)]


def open_source(source: SourceConfig) -> Source:
    """The documents that `source` names.

    `python:` is the standard library, or what is installed beside it; a path that exists is local; what looks like a
    path and does not exist is refused; anything else is a dataset on the hub. With `streaming` the result is always
    `Rows`, the one kind that can be resumed from the middle. Hub data count as fixed: a tokenized copy in the cache is
    not compared with the hub.
    Raises ConfigError for what cannot be opened.
    """
    path, opened = Path(source.path).expanduser(), None
    if source.path == "python:packages":
        opened = installed_packages()
    elif source.path.startswith("python:"):
        opened = StandardLibrary(source.path.removeprefix("python:"))
    elif path.exists():
        opened = LocalFiles(path, source.text_field)
        if source.streaming and len(opened.rows) == 1 and not opened.text_files:
            return opened.rows[0]
    else:
        require(
            not looks_like_path(source.path),
            f"data source {source.path} does not exist: name a file, a directory, a hub dataset or python:code.",
        )
    if opened is not None:
        require(
            not source.streaming,
            f"streaming = true of data source {source.path} needs a hub dataset, or local files that are all JSON rows "
            "or all parquet: set it to false.",
        )
        return opened
    stamps = [source.name, source.split]
    options = {"split": source.split, "streaming": source.streaming}
    return Rows(source.path, source.text_field, stamps, source.path, source.name, **options)


def installed_packages() -> LocalFiles:
    """The Python files of the packages that are installed beside this interpreter, as they are.

    Some 200 MB where this project is installed with its extras. Directories of tests are left out, as are files of more
    than LARGEST_MODULE bytes. Raises ConfigError where there are none.
    """
    root = stdlib.packages_root()
    files = [root / relative for relative in stdlib.stdlib_files(root, (".py",))]
    files = [file for file in files if file.stat().st_size <= LARGEST_MODULE]
    require(
        bool(files),
        f"data source python:packages finds no Python files in {root}: install packages there, or name a directory or "
        "a hub dataset in data.sources.",
    )
    return LocalFiles(root, "text", "python:packages", files)


def looks_like_path(path: str) -> bool:
    """Whether a name that is not on the disk was meant to be: a hub dataset is NAME or OWNER/NAME."""
    name = path.lower()
    endings = (*ROW_FORMATS, ".txt", ".md", ".rst", ".py")
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or name.endswith(("/", *endings))


def walk(path: Path) -> list[Path]:
    """The files at or below `path`, sorted, without hidden ones. Raises ConfigError for an unreadable directory."""

    def refuse(error: OSError) -> None:
        raise unreadable(error) from error

    if path.is_file():
        return [path]
    found = []
    for directory, children, files in os.walk(path, onerror=refuse):
        children[:] = [child for child in children if not child.startswith(".")]
        found += [Path(directory, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def row_format(file: Path) -> str | None:
    """The reader of a file of rows, or None for any other file."""
    return next((kind for ending, kind in ROW_FORMATS.items() if file.name.lower().endswith(ending)), None)


def file_stamps(root: Path, files: list[Path]) -> list[Any]:
    """Where `files` are, and the relative path, size and time of change of each."""
    stats = [(file, file.stat()) for file in files]
    return [str(root.resolve()), *([os.path.relpath(f, root), s.st_size, s.st_mtime_ns] for f, s in stats)]


def read_text(file: Path) -> str | None:
    """The text of a UTF-8 file with its line ends made \\n, or None where it is no such file."""
    try:
        with file.open("rb") as stream:
            head = stream.read(8192)
            if b"\0" in head:
                return None
            data = head + stream.read()
    except OSError as error:
        raise unreadable(error) from error
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def cut_text(text: str) -> Iterator[str]:
    """Pieces that join to `text`, cut after a blank line, or after a line where none ends for four times as long."""
    size = min(max(len(text) // PIECES_PER_FILE, SMALLEST_PIECE), LARGEST_PIECE)
    start = 0
    while start < len(text):
        for pattern in (r"\n[ \t]*\n", r"\n"):
            found = re.compile(pattern).search(text, start + size, start + 4 * size)
            if found:
                break
        end = found.end() if found else start + 4 * size
        yield text[start:end]
        start = end


def unreadable(error: OSError) -> ConfigError:
    """What to raise for a file or directory of a source that the system does not let us read."""
    return ConfigError(f"{error.filename} in data.sources cannot be read ({error.strerror}): leave it out.")


def first_line(error: Exception) -> str:
    """The first line of an error's message without its full stop, or the error's type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
