"""What kind of thing a token is, told from its text and the characters beside it."""

import keyword
import re
import unicodedata
from pathlib import Path

CLASSES = ("indent", "word", "word part", "keyword", "number", "operator", "quote", "space", "other")
"""`indent`: line ends and the white space that opens a line. `word`: begins with a word, with the space or sign before
it. `word part`: begins inside one. `keyword`: a word that the language of the file reserves, whole. `number`: digits
and no letter. `operator`: punctuation and signs. `quote`: the same with a quotation mark among them. `space`: other
white space. `other`: what has no text of its own (special tokens, the rest of a character that several tokens share)
and characters of no other kind."""

QUOTES = frozenset("\"'`“”‘’«»")
PYTHON = frozenset(keyword.kwlist)
C_LIKE = frozenset(
    re.findall(
        r"\w+",
        """auto bool break case catch char class const continue default delete do double else enum export extends extern
        false final finally float fn for func function if impl import in int interface let long match mut namespace new
        null nullptr package private protected pub public return self short signed sizeof static struct super switch
        template this throw true try type typedef typeof union unsigned use using var virtual void while yield""",
    )
)
C_LIKE_FILES = ".c .h .cc .cpp .hpp .cu .java .js .mjs .ts .tsx .go .rs .cs .php"
KEYWORDS = {".py": PYTHON, ".pyi": PYTHON, **dict.fromkeys(C_LIKE_FILES.split(), C_LIKE)}
"""Reserved words by how a file's name ends; other files are prose, where `for` and `if` are words like any other."""


def keywords_of(name: str) -> frozenset[str]:
    """The reserved words of the file called `name`; of Python for `python:code` and `python:packages`."""
    if name in ("python:code", "python:packages"):
        return PYTHON
    return KEYWORDS.get(Path(name).suffix.lower(), frozenset())


def in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def token_class(text: str, before: str = "", after: str = "", keywords: frozenset[str] = frozenset()) -> int:
    """The number in CLASSES of a token with this text, between the characters `before` and `after`, `""` at an end."""
    return CLASSES.index(class_name(text, before, after, keywords))


def class_name(text: str, before: str, after: str, keywords: frozenset[str]) -> str:
    core = text.strip()
    if not text:
        return "other"
    if not core:
        return "indent" if "\n" in text or "\r" in text or before in ("", "\n", "\r") else "space"
    if any(character.isalpha() or character == "_" for character in core):
        if in_word(text[0]) and before and in_word(before):
            return "word part"
        whole = not (after and text == text.rstrip() and in_word(after))
        return "keyword" if whole and core in keywords else "word"
    if any(character.isdigit() for character in core):
        return "number"
    if any(character in QUOTES for character in core):
        return "quote"
    signs = all(unicodedata.category(character)[0] in "PS" for character in core if not character.isspace())
    return "operator" if signs else "other"
