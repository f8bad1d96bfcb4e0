"""What is removed from the training documents before they are tokenized. Nothing, unless a step is switched on."""

from dataclasses import dataclass, field, fields

from moe_lm.config.errors import require, require_positive


@dataclass(frozen=True)
class QualityRules:
    """Thresholds of the heuristic filters; 0 or false turns a rule off. `moe_lm.data.quality.rules` has the rules.

    Prose: Gopher (Rae et al. 2021, appendix A.1.1 and table A1), which Llama 3 (2024, section 3.1.1) names too, and C4
    (Raffel et al. 2020, section 2.2). Code: Codex (Chen et al. 2021, section 3.1), The Stack (Kocetkov et al. 2022),
    StarCoder2 (Lozhkov et al. 2024, section 4). A share is of the document, between 0 and 1.
    """

    min_words: int = 50
    """Prose: fewest words (Gopher)."""
    max_words: int = 100_000
    """Prose: most words (Gopher)."""
    min_mean_word: float = 3.0
    """Prose: least mean length of a word in characters (Gopher)."""
    max_mean_word: float = 10.0
    """Prose: greatest mean length of a word in characters (Gopher)."""
    max_symbols: float = 0.1
    """Prose: most hashes, or most ellipses, for each word (Gopher)."""
    max_bullets: float = 0.9
    """Prose: largest share of lines that begin with a bullet (Gopher)."""
    max_ellipses: float = 0.3
    """Prose: largest share of lines that end with an ellipsis (Gopher)."""
    min_alphabetic_words: float = 0.8
    """Prose: least share of words with a letter in them (Gopher)."""
    min_stop_words: int = 2
    """Prose: fewest different words of the, be, to, of, and, that, have, with (Gopher)."""
    max_duplicate_lines: float = 0.3
    """Prose: largest share of lines that stood before in the document (Gopher)."""
    max_duplicate_paragraphs: float = 0.3
    """Prose: largest share of paragraphs that stood before (Gopher)."""
    max_duplicate_line_characters: float = 0.2
    """Prose: largest share of characters in lines that stood before (Gopher)."""
    max_duplicate_paragraph_characters: float = 0.2
    """Prose: largest share of characters in paragraphs that stood before (Gopher)."""
    max_top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    """Prose: largest share of characters in the most frequent 2-, 3- and 4-gram of words (Gopher)."""
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Prose: largest share of characters in 5- to 10-grams of words that stood before (Gopher; Llama 3's duplicated
    n-gram coverage)."""
    min_sentences: int = 3
    """Prose: fewest sentences (C4)."""
    placeholder: bool = True
    """Prose: remove what says lorem ipsum (C4)."""
    max_line: int = 1000
    """Code: longest line in characters (Codex, The Stack)."""
    max_mean_line: float = 100.0
    """Code: greatest mean length of a line in characters (Codex, The Stack)."""
    min_alphanumeric: float = 0.25
    """Code: least share of letters and digits (The Stack)."""
    generated: bool = True
    """Code: remove what says in its first five lines that a program wrote it (Codex, The Stack)."""
    max_encoded: float = 0.5
    """Code and prose: largest share of characters in runs of base64, hexadecimal bytes or escapes (StarCoder2)."""
    max_encoded_run: int = 1024
    """Code and prose: longest such run in characters (StarCoder2)."""

    def __post_init__(self):
        for name, default in ((setting.name, setting.default) for setting in fields(self)):
            value = getattr(self, name)
            if isinstance(value, tuple):
                length = len(default)
                require(
                    len(value) == length and min(value) >= 0,
                    f"{name} = {list(value)} of the quality rules must be {length} numbers of 0 or more.",
                )
            else:
                require(value >= 0, f"{name} = {value} of the quality rules must be 0 (off) or more.")


@dataclass(frozen=True)
class QualityConfig:
    """Which steps clean the training documents, in this order; held-out documents are never changed.

    The steps and their order are those that the Llama 3 report (2024, section 3.1.1) tells of.
    """

    exact: bool = False
    """Remove documents that are copies of a held-out or an earlier one, but for case and white space."""
    lines: bool = False
    """Remove lines of prose that are in more than `line_repeats` documents."""
    heuristics: bool = False
    """Remove documents that break one of `rules`."""
    near: bool = False
    """Remove documents that are nearly a held-out or an earlier one, by MinHash; needs the `quality` extra."""
    outliers: bool = False
    """Remove documents whose bytes are distributed too unlike their source's."""
    classifier: str | None = None
    """A directory that `python -m moe_lm.data classifier` wrote: remove documents that it scores below `min_score`;
    needs the `quality` extra."""
    rules: QualityRules = field(default_factory=QualityRules)
    """Thresholds of `heuristics`."""
    line_repeats: int = 6
    """Documents of a bucket that a line may be in."""
    line_bucket: int = 1_000_000
    """Documents of a source in which repeats of lines are counted together; the count holds 8 bytes per line."""
    line_characters: int = 20
    """Shortest line that counts as a repeat, without the white space around it."""
    shingle_words: int = 5
    """Consecutive words in a shingle of MinHash."""
    permutations: int = 128
    """Hash functions of MinHash: the similarity is known to about sqrt(J (1 - J) / permutations)."""
    near_threshold: float = 0.8
    """Jaccard similarity of the shingles from which two documents are near-duplicates."""
    max_divergence: float = 0.5
    """Greatest Kullback-Leibler divergence of a document's bytes from its source's, in nats."""
    min_score: float = 0.2
    """Least score of the classifier, a probability."""

    def __post_init__(self):
        require_positive(
            self, "line_repeats", "line_bucket", "shingle_words", "max_divergence", section="data.quality."
        )
        require(self.line_characters >= 0, f"data.quality.line_characters = {self.line_characters} must be 0 or more.")
        require(self.permutations >= 16, f"data.quality.permutations = {self.permutations} must be at least 16.")
        for name in ("near_threshold", "min_score"):
            value = getattr(self, name)
            require(0 < value < 1, f"data.quality.{name} = {value} must be between 0 and 1, both excluded.")

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps that are on, in the order in which they are taken."""
        return tuple(step for step in QUALITY_STEPS if getattr(self, step))


QUALITY_STEPS = ("exact", "lines", "heuristics", "near", "outliers", "classifier")
"""Every step, in order: what is cheap comes first, and each sees what those before it left."""
