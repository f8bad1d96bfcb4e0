"""Which of a source's documents stay, and what of them."""

from typing import Any

import numpy as np

from moe_lm.config import QualityConfig, QualityRules, SourceConfig
from moe_lm.data.quality.duplicates import without_lines
from moe_lm.data.sources import Document

CODE_ENDINGS = (
    ".c", ".cc", ".cpp", ".cs", ".css", ".cu", ".go", ".h", ".hpp", ".html", ".java", ".js", ".jsx", ".kt", ".lua",
    ".php", ".pl", ".py", ".pyi", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx",
)  # fmt: skip


def kind_of(source: SourceConfig, key: str) -> str:
    """`prose` or `code`: what the source is said to be, else by the name of the document or of the source."""
    if source.kind != "auto":
        return source.kind
    if source.path.startswith("python:"):
        return "prose" if source.path == "python:prose" else "code"
    return "code" if is_code(key) or is_code(source.path) else "prose"


def is_code(name: str) -> bool:
    return name.lower().endswith(CODE_ENDINGS)


def rules_of(source: SourceConfig, config: QualityConfig) -> QualityRules:
    return source.rules or config.rules


class Verdict:
    """What goes of one source: whole documents by their place, and repeated lines of prose."""

    def __init__(self, config: QualityConfig, settings: SourceConfig):
        self.config, self.settings = config, settings
        self.removed = bytearray()
        """1 for each document that goes, 0 for each that stays."""
        self.held_out = bytearray()
        """1 for each held-out document, which is never changed."""
        self.repeated: dict[int, frozenset[int]] = {}
        """For each bucket of documents the hashes of the lines that go."""

    def text(self, place: int, document: Document) -> str | None:
        """What is left of the document at this place of the source; None where nothing is."""
        return None if self.removed[place] else self.without_lines(place, document)

    def without_lines(self, place: int, document: Document) -> str:
        """The document at this place, whether or not it goes, without its repeated lines."""
        lines = self.repeated.get(place // self.config.line_bucket)
        if not lines or self.held_out[place] or kind_of(self.settings, document.key) != "prose":
            return document.text
        return without_lines(document.text, lines, self.config.line_characters)

    def arrays(self) -> dict[str, np.ndarray]:
        """The verdict to be stored: (documents,) uint8 twice, and (lines,) int64 buckets and uint64 hashes."""
        lines = [(bucket, line) for bucket, hashes in self.repeated.items() for line in sorted(hashes)]
        return {
            "removed": np.frombuffer(bytes(self.removed), np.uint8),
            "held_out": np.frombuffer(bytes(self.held_out), np.uint8),
            "buckets": np.array([bucket for bucket, _ in lines], np.int64),
            "lines": np.array([line for _, line in lines], np.uint64),
        }

    @classmethod
    def from_arrays(cls, config: QualityConfig, settings: SourceConfig, arrays: Any) -> "Verdict":
        """The verdict that `arrays` gave. Raises KeyError where one is missing."""
        verdict = cls(config, settings)
        verdict.removed, verdict.held_out = bytearray(arrays["removed"]), bytearray(arrays["held_out"])
        buckets, lines = arrays["buckets"], arrays["lines"]
        verdict.repeated = {
            bucket: frozenset(lines[buckets == bucket].tolist()) for bucket in np.unique(buckets).tolist()
        }
        return verdict
