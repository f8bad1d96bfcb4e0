"""The heuristic filters. A rule measures one number of a document and removes it on the wrong side of one threshold.

Every threshold is a setting of `QualityRules`, whose docstrings name the source of each. Left out: dirty words (Llama
3, C4), whose lists remove dialects and medicine along with what they aim at, and C4's rules for lines of web pages (a
final full stop, JavaScript, cookies, braces), which would cut lists, headings and examples of code out of manuals.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moe_lm.config import QualityRules
from moe_lm.data.quality.text import BULLETS, GENERATED, STOP_WORDS, Text, repeated, sentences, share

VERSION = 1
"""To be raised whenever a rule or a step decides differently from before; part of the key of every cached verdict."""


@dataclass(frozen=True)
class Removal:
    """Why a document goes."""

    rule: str
    value: float
    limit: float
    above: bool

    @property
    def reason(self) -> str:
        return f"{self.rule} {self.value:.3g} {'>' if self.above else '<'} {self.limit:g}"


@dataclass(frozen=True)
class Rule:
    """One measure and its threshold."""

    name: str
    setting: str
    """Field of QualityRules with the threshold; 0 or false there turns the rule off."""
    kinds: tuple[str, ...]
    above: bool
    """Whether documents above the threshold go; else those below it."""
    measure: Callable[[Text], float]
    place: int | None = None
    """Which of the thresholds, where the setting is a list."""

    def limit(self, rules: QualityRules) -> float | None:
        """The threshold, or None where the rule is off."""
        value = getattr(rules, self.setting)
        if self.place is not None:
            value = value[self.place]
        if value is True:  # a yes-or-no rule counts what must not be there
            return 0.0
        return float(value) if value else None

    def check(self, text: Text, rules: QualityRules) -> Removal | None:
        limit = self.limit(rules)
        if limit is None:
            return None
        value = self.measure(text)
        wrong = value > limit if self.above else value < limit
        return Removal(self.name, value, limit, self.above) if wrong else None


PROSE, CODE, BOTH = ("prose",), ("code",), ("prose", "code")


def most(name: str, setting: str, kinds: tuple[str, ...], measure: Callable[[Text], float], place=None) -> Rule:
    return Rule(name, setting, kinds, True, measure, place)


def least(name: str, setting: str, kinds: tuple[str, ...], measure: Callable[[Text], float]) -> Rule:
    return Rule(name, setting, kinds, False, measure)


def mean_word(text: Text) -> float:
    return share(sum(map(len, text.words)), len(text.words))


def symbols(text: Text) -> float:
    """The more frequent of hashes and ellipses, for each word."""
    return share(max(text.text.count("#"), text.text.count("...") + text.text.count("…")), len(text.words))


def bullets(text: Text) -> float:
    return share(sum(line.startswith(BULLETS) for line in text.lines), len(text.lines))


def ellipses(text: Text) -> float:
    return share(sum(line.endswith(("...", "…")) for line in text.lines), len(text.lines))


def alphabetic_words(text: Text) -> float:
    return share(sum(any(map(str.isalpha, word)) for word in text.words), len(text.words))


def stop_words(text: Text) -> float:
    return len(STOP_WORDS.intersection(word.strip(".,;:!?()\"'").lower() for word in text.words))


def longest_line(text: Text) -> float:
    return max(map(len, text.text.split("\n")))


def mean_line(text: Text) -> float:
    return share(len(text.text), len(text.text.splitlines()))


def alphanumeric(text: Text) -> float:
    return share(sum(map(str.isalnum, text.text)), len(text.text))


def generated(text: Text) -> float:
    """Marks of a generator in the first five lines."""
    return len(GENERATED.findall("\n".join(text.text.split("\n", 5)[:5])))


def placeholder(text: Text) -> float:
    return text.text.lower().count("lorem ipsum")


def top_ngram(n: int) -> Callable[[Text], float]:
    return lambda text: text.top_ngram_share(n)


def duplicate_ngrams(n: int) -> Callable[[Text], float]:
    return lambda text: text.duplicate_ngram_share(n)


RULES = (
    least("words", "min_words", PROSE, lambda text: len(text.words)),
    most("many words", "max_words", PROSE, lambda text: len(text.words)),
    least("mean word", "min_mean_word", PROSE, mean_word),
    most("long mean word", "max_mean_word", PROSE, mean_word),
    most("symbols per word", "max_symbols", PROSE, symbols),
    most("bullet lines", "max_bullets", PROSE, bullets),
    most("ellipsis lines", "max_ellipses", PROSE, ellipses),
    least("alphabetic words", "min_alphabetic_words", PROSE, alphabetic_words),
    least("stop words", "min_stop_words", PROSE, stop_words),
    least("sentences", "min_sentences", PROSE, lambda text: sentences(text.text)),
    most("placeholder text", "placeholder", PROSE, placeholder),
    most("duplicate lines", "max_duplicate_lines", PROSE, lambda text: repeated(text.lines)[0]),
    most("duplicate line characters", "max_duplicate_line_characters", PROSE, lambda text: repeated(text.lines)[1]),
    most("duplicate paragraphs", "max_duplicate_paragraphs", PROSE, lambda text: repeated(text.paragraphs)[0]),
    most(
        "duplicate paragraph characters", "max_duplicate_paragraph_characters", PROSE,
        lambda text: repeated(text.paragraphs)[1],
    ),
    *(most(f"top {n}-gram", "max_top_ngrams", PROSE, top_ngram(n), n - 2) for n in (2, 3, 4)),
    *(most(f"duplicate {n}-grams", "max_duplicate_ngrams", PROSE, duplicate_ngrams(n), n - 5) for n in range(5, 11)),
    most("longest line", "max_line", CODE, longest_line),
    most("mean line", "max_mean_line", CODE, mean_line),
    least("alphanumeric", "min_alphanumeric", CODE, alphanumeric),
    most("generated", "generated", CODE, generated),
    most("encoded share", "max_encoded", BOTH, lambda text: share(sum(text.encoded_runs), len(text.text))),
    most("encoded run", "max_encoded_run", BOTH, lambda text: max(text.encoded_runs, default=0)),
)  # fmt: skip
"""In the order in which they are asked: the first that is broken is the reason."""


def broken(text: str, kind: str, rules: QualityRules) -> Iterator[Removal]:
    """Every rule for documents of this kind that `text` breaks, in the order of RULES, one after another on demand."""
    measured = Text(text)
    for rule in RULES:
        if kind in rule.kinds and (removal := rule.check(measured, rules)):
            yield removal
