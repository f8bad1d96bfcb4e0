"""Which training documents stay: the steps of `QualityConfig`, one after another over all sources.

Each step reads what those before it left. Held-out documents are only looked at: a training document that is a copy of
one goes, and the held-out files of a run with cleaning are those of the run without it. In memory are, for each
document, two bytes, at the exact step 25 more and at the near step its signature (1 kB at 128 permutations); for the
lines of a bucket 8 bytes each. The sources are read once or twice for each step.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np

from moe_lm.config import DataConfig
from moe_lm.data.quality.classifier import BATCH, Classifier
from moe_lm.data.quality.duplicates import (
    NearDuplicates,
    byte_counts,
    counted_lines,
    divergence,
    first_copies,
    frequent,
    line_hash,
    near_library,
    text_hash,
    without_lines,
)
from moe_lm.data.quality.rules import Removal, broken
from moe_lm.data.quality.samples import EXCERPT, Chosen, Removed, Scores, pair_excerpts
from moe_lm.data.quality.verdict import Verdict, kind_of, rules_of
from moe_lm.data.sources import Document, Source, is_held_out

SHORTEST = 512
"""Bytes from which a document's distribution is compared: the divergence of a sample of n bytes from its own source is
about (different bytes - 1) / 2n nats, 0.05 there."""


class Entry(NamedTuple):
    """A document on its way through the steps."""

    source: int
    place: int
    """Its number in the source."""
    key: str
    text: str
    """As it stands: repeated lines are gone once that step is over."""
    kind: str
    held_out: bool


class Cleaning:
    """The verdict on every document of `opened`, the sources of `config`, and what it was based on.

    `samples` documents are kept to be shown for each source and rule.
    """

    def __init__(self, config: DataConfig, opened: Sequence[Source], classifier: Classifier | None, samples: int):
        assert config.quality is not None
        self.config, self.sources, self.fraction = config.quality, config.sources, config.validation_fraction
        self.opened, self.classifier, self.samples = opened, classifier, samples
        self.verdicts = [Verdict(self.config, settings) for settings in self.sources]
        self.sizes: list[dict[str, int]] = []
        """Documents and bytes of both sides of each source, before."""
        self.rules: list[dict[str, Removed]] = [{} for _ in opened]
        """What each rule took from each source, in the order in which they first did."""
        self.chosen: list[dict[str, Chosen]] = [{} for _ in opened]
        self.scores = Scores(samples)

    def run(self, report: Callable[[str], None] = lambda message: None) -> "Cleaning":
        """Take the steps that are on. Raises ConfigError where a library is missing, before the first."""
        if self.config.near:
            near_library()
        self.weigh()
        for step in self.config.steps:
            report(f"cleaning the training documents: {step}")
            getattr(self, f"take_{step}")()
        for rules, chosen in zip(self.rules, self.chosen, strict=True):
            for name, removed in rules.items():
                removed.samples = chosen[name].items()
        self.show_twins()
        return self

    def weigh(self) -> None:
        """Count both sides of every source."""
        for source, verdict in zip(self.opened, self.verdicts, strict=True):
            sizes = dict.fromkeys(("documents", "bytes", "held_out_documents", "held_out_bytes"), 0)
            for document in source:
                held_out = is_held_out(document.key, self.fraction)
                verdict.held_out.append(held_out)
                verdict.removed.append(not document.text)
                side = "held_out_" if held_out else ""
                sizes[f"{side}documents"] += bool(document.text)
                sizes[f"{side}bytes"] += len(document.text.encode())
            self.sizes.append(sizes)

    def entries(self, step: str, held_out: bool | None = None) -> Iterator[Entry]:
        """What is left of the sources that take this step, of one side if `held_out` says which."""
        for index, (source, verdict) in enumerate(zip(self.opened, self.verdicts, strict=True)):
            if step in verdict.settings.skip_quality:
                continue
            for place, document in enumerate(source):
                held = bool(verdict.held_out[place])
                if held_out in (None, held) and (text := verdict.text(place, document)) is not None:
                    kind = kind_of(verdict.settings, document.key)
                    yield Entry(index, place, document.key, text, kind, held)

    def note(self, step: str, entry: Entry, removal: Removal, size: int, **shown: Any) -> None:
        """Count `size` bytes of `entry` under a rule, and show it if it is among the chosen ones."""
        rules, chosen = self.rules[entry.source], self.chosen[entry.source]
        if removal.rule not in rules:
            rules[removal.rule] = Removed(step, removal.rule, removal.above, removal.limit)
            chosen[removal.rule] = Chosen(self.samples)
        rules[removal.rule].documents += 1
        rules[removal.rule].bytes += size
        item = {"key": entry.key, "reason": removal.reason, "value": removal.value, **shown}
        chosen[removal.rule].offer(entry.key, entry.place, item)

    def remove(self, step: str, entry: Entry, removal: Removal, twin: tuple[int, int] | None = None) -> None:
        self.verdicts[entry.source].removed[entry.place] = 1
        # The text of a copy is kept whole until `show_twins` knows where the other one differs.
        shown = {"text": entry.text[:EXCERPT]} if twin is None else {"text": entry.text, "twin": twin}
        self.note(step, entry, removal, len(entry.text.encode()), **shown)

    def take_exact(self) -> None:
        """Remove training documents that are copies."""
        hashes, sides, where = array("Q"), bytearray(), (array("Q"), array("Q"))
        for entry in self.entries("exact"):
            hashes.append(text_hash(entry.text))
            sides.append(entry.held_out)
            where[0].append(entry.source)
            where[1].append(entry.place)
        original = first_copies(np.array(hashes, np.uint64), np.array(sides, bool))
        # By its number among the entries: what is removed as it is passed has been counted.
        for number, entry in enumerate(self.entries("exact")):
            if (twin := int(original[number])) >= 0:
                self.remove("exact", entry, Removal("copies", 1.0, 0.0, True), (where[0][twin], where[1][twin]))

    def take_lines(self) -> None:
        """Cut out the lines of prose that are in more than `line_repeats` training documents of a bucket."""
        often: dict[tuple[int, int], dict[int, int]] = {}
        for bucket, entries in groupby(self.prose(), self.bucket):
            hashes = array("Q")
            for entry in entries:
                hashes.extend(counted_lines(entry.text, self.config.line_characters))
            values, counts = frequent(np.array(hashes, np.uint64), self.config.line_repeats)
            if len(values):
                often[bucket] = dict(zip(values.tolist(), counts.tolist(), strict=True))
        shown: set[int] = set()
        for entry in self.prose():
            if self.bucket(entry) in often:
                self.cut_lines(entry, often[self.bucket(entry)], shown)
        for (source, number), counts in often.items():
            self.verdicts[source].repeated[number] = frozenset(counts)

    def prose(self) -> Iterator[Entry]:
        return (entry for entry in self.entries("lines", held_out=False) if entry.kind == "prose")

    def bucket(self, entry: Entry) -> tuple[int, int]:
        return entry.source, entry.place // self.config.line_bucket

    def cut_lines(self, entry: Entry, counts: dict[int, int], shown: set[int]) -> None:
        """Count what a document loses, remove it if that is all it has, and show its most frequent line.

        `counts` are the documents that each repeated line is in, `shown` the lines that were shown of other documents.
        """
        left = without_lines(entry.text, counts, self.config.line_characters)
        if left is entry.text:
            return
        here = {h: line for line in map(str.strip, entry.text.split("\n")) if (h := line_hash(line)) in counts}
        top = max(here.keys() - shown or here, key=lambda line: (counts[line], -line))
        shown.add(top)
        self.verdicts[entry.source].removed[entry.place] = not left.strip()
        size = len(entry.text.encode()) - len(left.encode() if left.strip() else b"")
        removal = Removal("repeated line", float(counts[top]), float(self.config.line_repeats), True)
        self.note("lines", entry, removal, size, text=here[top][:EXCERPT])

    def take_heuristics(self) -> None:
        """Remove training documents that break a rule of their source."""
        for entry in self.entries("heuristics", held_out=False):
            rules = rules_of(self.sources[entry.source], self.config)
            if removal := next(broken(entry.text, entry.kind, rules), None):
                self.remove("heuristics", entry, removal)

    def take_near(self) -> None:
        """Remove training documents that resemble a held-out or an earlier one."""
        seen, where = NearDuplicates(self.config), []
        for held_out in (True, False):
            for entry in self.entries("near", held_out=held_out):
                sketch = seen.sketch(entry.text)
                found = None if held_out else seen.find(sketch)
                if found:
                    removal = Removal("near copy", found[1], self.config.near_threshold, True)
                    self.remove("near", entry, removal, where[found[0]])
                else:
                    seen.add(len(where), sketch)
                    where.append((entry.source, entry.place))

    def take_outliers(self) -> None:
        """Remove training documents whose bytes are distributed unlike those of their source's training documents."""
        totals = np.zeros((len(self.opened), 256), np.int64)
        for entry in self.entries("outliers", held_out=False):
            totals[entry.source] += byte_counts(entry.text)
        for entry in self.entries("outliers", held_out=False):
            counts = byte_counts(entry.text)
            value = divergence(counts, totals[entry.source])
            if counts.sum() >= SHORTEST and value > self.config.max_divergence:
                self.remove("outliers", entry, Removal("divergence", value, self.config.max_divergence, True))

    def take_classifier(self) -> None:
        """Remove training documents that the classifier scores too low."""
        assert self.classifier is not None
        judged = (e for e in self.entries("classifier", held_out=False) if self.classifier.judges(e.kind))
        while entries := list(islice(judged, BATCH)):
            scores = self.classifier.scores([entry.text for entry in entries])
            for entry, score in zip(entries, scores.tolist(), strict=True):
                self.scores.add(score, entry.place, entry.key, entry.text)
                if score < self.config.min_score:
                    self.remove("classifier", entry, Removal("score", score, self.config.min_score, False))

    def show_twins(self) -> None:
        """Put beside every copy that is shown the document it is a copy of, both from where they differ."""
        rules = [rule for rules in self.rules for rule in rules.values()]
        pairs = [(rule.step, item) for rule in rules for item in rule.samples if "twin" in item]
        wanted = {item["twin"] for _, item in pairs}
        found: dict[tuple[int, int], Document] = {}
        for index in {source for source, _ in wanted}:
            for place, document in enumerate(self.opened[index]):
                if (index, place) in wanted:
                    found[index, place] = document
        for step, item in pairs:
            index, place = item.pop("twin")
            verdict, twin = self.verdicts[index], found[index, place]
            # As the step saw it: repeated lines go between the two steps that find copies.
            text = verdict.without_lines(place, twin) if step == "near" else twin.text
            item["text"], item["twin_text"] = pair_excerpts(item["text"], text)
            item["twin_key"] = twin.key
            item["twin_side"] = "held out" if verdict.held_out[place] else "training"

    def as_json(self) -> dict[str, Any]:
        """The account: what was there, what each rule took and why, of each source."""
        sources = []
        for source, verdict, sizes, rules in zip(self.opened, self.verdicts, self.sizes, self.rules, strict=True):
            removed = [vars(rule) for rule in rules.values()]
            # Empty documents are marked as removed, too, but are not counted among the documents.
            training = (not held_out for held_out in verdict.held_out)
            kept = sum(side and not gone for side, gone in zip(training, verdict.removed, strict=True))
            sources.append(
                {
                    "name": source.name,
                    "epochs": verdict.settings.epochs,
                    **sizes,
                    "kept_documents": kept,
                    "kept_bytes": sizes["bytes"] - sum(rule["bytes"] for rule in removed),
                    "removed": removed,
                }
            )
        return {"steps": list(self.config.steps), "sources": sources, "scores": self.scores.as_json()}
