"""The running interpreter's own standard library as documents: its code and its prose, apart.

It is there wherever Python is, so the default run needs no network. Left out are directories that are not the library
(`SKIPPED_DIRECTORIES`), `encodings/`, whose codecs are stamped from a few templates, and tables (`is_table`): held-out
copies of those look just like the trained ones and would flatter bits per byte.
"""

import ast
import inspect
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SKIPPED_DIRECTORIES = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "lib-dynload", "site-packages", "test", "tests",
}  # fmt: skip
TOPICS = "pydoc_data/topics.py"
"""The language reference by topic, as `help()` shows it: prose, in a Python file."""
NOT_PROSE = {"Grammar.txt", "PatternGrammar.txt"}


@dataclass(frozen=True)
class Library:
    """What `read_library` found: (key, text) pairs, the key being the file's path in the library."""

    code: tuple[tuple[str, str], ...]
    prose: tuple[tuple[str, str], ...]
    skipped: int
    """Files that do not decode or parse."""


Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_root() -> Path:
    """The directory of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def packages_root() -> Path:
    """The directory of the packages that are installed for the running interpreter."""
    return Path(sysconfig.get_path("purelib"))


def stdlib_files(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Paths relative to `root`, with forward slashes, sorted, of the library's files that end in `suffixes`."""
    found = []
    for directory, children, files in os.walk(root):
        children[:] = [c for c in children if c not in SKIPPED_DIRECTORIES and not c.startswith("config-")]
        relative = Path(directory).relative_to(root)
        found += [(relative / name).as_posix() for name in files if name.endswith(suffixes)]
    return sorted(found)


def read_module(path: Path) -> tuple[str, ast.Module]:
    """The source of a Python file and its tree.

    Raises SyntaxError, UnicodeDecodeError or ValueError (a NUL byte) where it has none.
    """
    with tokenize.open(path) as file:
        source = file.read()
    return source, ast.parse(source)


@lru_cache(maxsize=1)
def read_library(root: Path) -> Library:
    """Every document of the library at `root`, in the order of the paths.

    A module gives one document of code, its source without docstrings, and one of prose, its docstrings; the two share
    their key, so that they are held out together. Each topic of `TOPICS` and each .txt or .rst file is one more
    document of prose. Kept once read, some 10 MB: parsing the library takes seconds and both halves come of it.
    """
    code, prose, skipped = [], [], 0
    for relative in stdlib_files(root, (".py", ".txt", ".rst")):
        path = root / relative
        try:
            if not relative.endswith(".py"):
                prose += [] if path.name in NOT_PROSE else [(relative, path.read_text("utf-8"))]
                continue
            source, tree = read_module(path)
        except (SyntaxError, ValueError):  # an undecodable file is a ValueError
            skipped += 1
            continue
        if relative == TOPICS:
            prose += [(f"{relative}#{name}", text) for name, text in topics(tree)]
        elif not is_table(source, tree):
            code.append((relative, without_docstrings(source, tree)))
            prose.append((relative, docstrings(tree, relative)))
    return Library(*(tuple(pair for pair in pairs if pair[1].strip()) for pairs in (code, prose)), skipped)


class Positions:
    """Offsets into the UTF-8 bytes of a source, which is what the columns of `ast` count."""

    def __init__(self, source: str):
        self.data = source.encode()
        self.lines = [0]
        # Only a line feed ends a line for `ast`; `splitlines` would cut at form feeds too.
        for line in self.data.split(b"\n"):
            self.lines.append(self.lines[-1] + len(line) + 1)

    def span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        """The first byte of `node` and the one after its last."""
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset


def definitions(tree: ast.Module, name: str) -> Iterator[tuple[str, Definition]]:
    """The module and every class and function in it, outer first, each with its qualified name."""
    yield name, tree
    # Expressions hold no definitions, so only blocks of statements are walked.
    pending = [(name, child) for child in reversed(tree.body)]
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            prefix = f"{prefix}.{node.name}"
            yield prefix, node
        blocks = [getattr(node, field, []) for field in ("body", "handlers", "cases", "orelse", "finalbody")]
        pending += [(prefix, child) for block in reversed(blocks) for child in reversed(block)]


def leading_strings(node: Definition) -> list[ast.Expr]:
    """The docstring of `node`, and any strings right after it, which would become docstrings without it."""
    found = []
    for statement in node.body:
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            break
        if not isinstance(statement.value.value, str):
            break
        found.append(statement)
    return found


def without_docstrings(source: str, tree: ast.Module) -> str:
    """`source` with every docstring cut out; comments stay, and a body that was only a docstring becomes `pass`."""
    positions = Positions(source)
    data = positions.data
    pieces, done = [], 0
    # In the order of the text, which for docstrings is not always that of `definitions`.
    cuts = []
    for _, node in definitions(tree, ""):
        strings = leading_strings(node)
        only = not isinstance(node, ast.Module) and len(strings) == len(node.body)
        cuts += [(*positions.span(string), only and string is strings[-1]) for string in strings]
    for start, end, needs_body in sorted(cuts):
        pieces.append(data[done:start])
        if needs_body:
            pieces.append(b"pass")
        else:
            end = re.compile(rb"[ \t]*;?[ \t]*").match(data, end).end()
            line_start = data.rfind(b"\n", 0, start) + 1
            blank = re.compile(rb"\n(?:[ \t\f]*\n)*").match(data, end)
            if not data[line_start:start].strip() and (blank or end == len(data)):
                # The line is empty now: drop its indentation, and the blank lines that set the docstring apart.
                pieces[-1] = pieces[-1].rstrip(b" \t\f")
                end = blank.end() if blank else end
        done = end
    return b"".join([*pieces, data[done:]]).decode()


def docstrings(tree: ast.Module, relative: str) -> str:
    """The docstrings of the module at `relative`, each under its qualified name; empty where there are none."""
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parts = []
    for name, node in definitions(tree, module):
        text = inspect.cleandoc("\n\n".join(string.value.value for string in leading_strings(node))).strip()
        if text:
            parts.append(f"{name}\n\n{text}\n")
    # A docstring may escape half of a surrogate pair, which no UTF-8 text can hold.
    return "\n".join(parts).encode("utf-8", "replace").decode()


def is_table(source: str, tree: ast.Module) -> bool:
    """Whether more than half of the module's bytes, and at least 2,000, are literals at its top level.

    Such are the entities of HTML, the locale aliases, the string preparation tables, the build's variables: a list,
    dict, set, tuple or string in a statement outside all functions and classes.
    """
    positions = Positions(source)
    simple = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr)
    skipped = set(map(id, leading_strings(tree)))
    pending = [node for node in tree.body if isinstance(node, simple) and id(node) not in skipped]
    size = 0
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Dict | ast.List | ast.Tuple | ast.Set | ast.Constant):
            start, end = positions.span(node)
            size += end - start
        else:
            pending += ast.iter_child_nodes(node)
    return size >= 2_000 and size > len(positions.data) / 2


def topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and text of each topic of `TOPICS`, the longest first.

    Long topics contain short ones word for word; a paragraph is kept where it comes first, so that what is held out
    with one topic is not trained on with another.
    """
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    seen = set()
    for name, text in sorted(ast.literal_eval(tables[0]).items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        kept = "\n\n".join(paragraphs) + "\n"
        # What is left of a topic that a longer one contains is its heading.
        if len(kept) >= 200:
            yield name, kept
