"""Sources as the loader reads them once `data.quality` has steps: what goes is decided once and kept in the cache."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from moe_lm.config import ConfigError, DataConfig, SourceConfig, require
from moe_lm.data.cache import cache_entry, hash_facts, writable
from moe_lm.data.quality.classifier import Classifier, load_classifier
from moe_lm.data.quality.cleaning import Cleaning
from moe_lm.data.quality.duplicates import near_library
from moe_lm.data.quality.rules import VERSION, broken
from moe_lm.data.quality.verdict import Verdict, kind_of, rules_of
from moe_lm.data.sources import Document, Rows, Source, is_held_out

NEEDS_CORPUS = ("exact", "lines", "near", "outliers")
"""Steps that compare a document with others, which a stream does not have at hand."""


class CleanedSource(Source):
    """A source without what its verdict removes."""

    def __init__(self, source: Source, verdict: Verdict, facts: Any):
        super().__init__(source.name)
        self.source, self.verdict, self.facts = source, verdict, facts

    def __iter__(self) -> Iterator[Document]:
        for place, document in enumerate(self.source):
            text = self.verdict.text(place, document)
            if text is not None:
                yield Document(text, document.key)
        self.skipped = self.source.skipped

    def identity(self) -> list[Any]:
        return [self.source.identity(), self.facts]


class CleanedStream(Source):
    """A streamed source without the training documents that a rule or the classifier removes, one at a time."""

    def __init__(
        self, source: Rows, config: DataConfig, settings: SourceConfig, classifier: Classifier | None, facts: Any
    ):
        super().__init__(source.name)
        assert config.quality is not None
        self.source, self.settings, self.facts = source, settings, facts
        self.config, self.fraction = config.quality, config.validation_fraction
        self.steps = [step for step in self.config.steps if step not in settings.skip_quality]
        self.classifier = classifier

    def load(self) -> Any:
        return self.source.load()

    def read(self, dataset: Any) -> Iterator[Document]:
        return (d for d in self.source.read(dataset) if is_held_out(d.key, self.fraction) or self.stays(d))

    def __iter__(self) -> Iterator[Document]:
        return self.read(self.load())

    def stays(self, document: Document) -> bool:
        kind = kind_of(self.settings, document.key)
        if "heuristics" in self.steps:
            rules = rules_of(self.settings, self.config)
            if next(broken(document.text, kind, rules), None):
                return False
        if "classifier" in self.steps and self.classifier is not None and self.classifier.judges(kind):
            return self.classifier.scores([document.text])[0] >= self.config.min_score
        return True

    def identity(self) -> list[Any]:
        return [self.source.identity(), self.facts]


def clean_sources(config: DataConfig, opened: tuple[Source, ...], report: Callable[[str], None]) -> tuple[Source, ...]:
    """`opened`, the sources of `config`, without what `config.quality` removes; as they are where it removes nothing.

    The verdict is kept in `config.cache_dir` under everything that it depends on. Raises ConfigError for a streamed
    source with a step that needs the whole of it, a missing library or classifier, and where nothing is left.
    """
    quality = config.quality
    if quality is None or not quality.steps:
        return opened
    classifier = load_classifier(quality.classifier) if quality.classifier else None
    facts = quality_facts(config, classifier)
    streamed = [settings.streaming for settings in config.sources]
    for source, settings in zip(opened, config.sources, strict=True):
        if settings.streaming:
            check_streamed(source.name, config, settings)
    if any(streamed):
        # The mixture takes streamed sources only beside other streamed ones; a document never meets another.
        require(all(streamed), "data.quality needs streaming alike for all data.sources.")
        return tuple(
            CleanedStream(source, config, settings, classifier, hash_facts(facts))
            for source, settings in zip(opened, config.sources, strict=True)
        )
    facts.append([source.identity() for source in opened])

    def write(directory: Path) -> None:
        cleaning = Cleaning(config, opened, classifier, samples=0).run(report)
        account = cleaning.as_json()
        with writable(config.cache_dir):
            for number, verdict in enumerate(cleaning.verdicts):
                np.savez(directory / f"{number}.npz", **verdict.arrays())
            (directory / "account.json").write_text(json.dumps(account, indent=2) + "\n", "utf-8")

    entry = cache_entry(config.cache_dir, "quality", facts, write)
    try:
        account = json.loads((entry / "account.json").read_text("utf-8"))
        verdicts = [
            Verdict.from_arrays(quality, settings, np.load(entry / f"{number}.npz"))
            for number, settings in enumerate(config.sources)
        ]
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise ConfigError(f"the verdict on the data in {entry} is damaged ({error}): delete that directory.") from error
    for facts_of_source in account["sources"]:
        require_some_left(facts_of_source)
    report(summary(account))
    return tuple(
        CleanedSource(source, verdict, [entry.name, number])
        for number, (source, verdict) in enumerate(zip(opened, verdicts, strict=True))
    )


def quality_facts(config: DataConfig, classifier: Classifier | None) -> list[Any]:
    """What a verdict depends on beside the documents: settings, versions of our rules and of the libraries."""
    per_source = [[s.kind, s.path, repr(s.rules), list(s.skip_quality)] for s in config.sources]
    near = near_library().__version__ if config.quality.near else None
    identity = classifier.identity() if classifier else None
    return [VERSION, repr(config.quality), per_source, config.validation_fraction, near, identity]


def check_streamed(name: str, config: DataConfig, settings: SourceConfig) -> None:
    """Refuse the steps that a streamed source cannot take."""
    for step in config.quality.steps:
        require(
            step not in NEEDS_CORPUS or step in settings.skip_quality,
            f"data.quality.{step} = true compares documents of the whole source, and {name} has streaming = true: set "
            f'one of them to false, or add "{step}" to the source\'s skip_quality.',
        )


def require_some_left(source: dict[str, Any]) -> None:
    if source["documents"] and not source["kept_documents"]:
        worst = max(source["removed"], key=lambda rule: rule["documents"])
        raise ConfigError(
            f"data.quality removes all {source['documents']} training documents of {source['name']}, "
            f"{worst['documents']} of them by the rule {worst['rule']!r}: see python -m moe_lm.data report, and loosen "
            "the rule or name it in skip_quality."
        )


def summary(account: dict[str, Any]) -> str:
    """One line about what was removed."""
    sources = account["sources"]
    documents = sum(s["documents"] for s in sources)
    gone = documents - sum(s["kept_documents"] for s in sources)
    total, kept = sum(s["bytes"] for s in sources), sum(s["kept_bytes"] for s in sources)
    share = 100 * (1 - kept / total) if total else 0.0
    return f"cleaned: {gone:,} of {documents:,} training documents and {share:.1f}% of their bytes removed"
