"""What the cleaning of a config's data removes and why: the account, and how it is told on a terminal."""

import textwrap
from collections.abc import Callable
from typing import Any

from moe_lm.config import RunConfig, require
from moe_lm.data.loader import trained_tokenizer
from moe_lm.data.mixture import row_shares
from moe_lm.data.quality.classifier import load_classifier
from moe_lm.data.quality.cleaning import Cleaning
from moe_lm.data.quality.samples import BINS
from moe_lm.data.sources import open_source
from moe_lm.data.tokenizer import DocumentEncoder, load_tokenizer
from moe_lm.scaling.text import short, size, table

WIDTH = 100
NAME = 34
"""Columns of a source's or a rule's name."""


def report(config: RunConfig, samples: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """The account of `Cleaning`, with the tokens of each source's training documents before and after.

    Tokens are those of `data.tokenizer`, else of the tokenizer that the uncleaned training documents give. Raises
    ConfigError for a streamed source, and for whatever cannot be read.
    """
    data = config.data
    assert data.quality is not None
    for source in data.sources:
        require(
            not source.streaming,
            f"the report reads whole sources, and {source.path} has streaming = true: set it to false, or name a part "
            "of it.",
        )
    opened = tuple(open_source(source) for source in data.sources)
    classifier = load_classifier(data.quality.classifier) if data.quality.classifier else None
    cleaning = Cleaning(data, opened, classifier, samples).run(progress)
    account = cleaning.as_json()
    if data.tokenizer is None:
        tokenizer = trained_tokenizer(data, opened, config.model.vocab_size, progress)
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    progress("counting tokens")
    count_tokens(cleaning, account, DocumentEncoder(tokenizer))
    account["classifier"] = vars(classifier.facts) if classifier else None
    return account


def count_tokens(cleaning: Cleaning, account: dict[str, Any], encoder: DocumentEncoder) -> None:
    """Add tokens and shares of the training rows to every source of the account."""
    for source, verdict, told in zip(cleaning.opened, cleaning.verdicts, account["sources"], strict=True):
        before = after = 0
        for place, document in enumerate(source):
            if verdict.held_out[place] or not document.text:
                continue
            text = verdict.text(place, document)
            whole = len(encoder.encode([document.text])[0])
            before += whole
            if text is not None:
                after += whole if text == document.text else len(encoder.encode([text])[0])
        told["tokens"], told["kept_tokens"] = before, after
    told = account["sources"]
    for name, tokens in (("share", "tokens"), ("kept_share", "kept_tokens")):
        # A source of which nothing is left has no rows; row_shares counts an unknown size as one token.
        weights = [source["epochs"] * source[tokens] for source in told]
        shares = row_shares([s["epochs"] for s in told], [s[tokens] for s in told]) if all(weights) else weights
        for source, share in zip(told, shares, strict=True):
            source[name] = share / (sum(shares) or 1)


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0.0%"


def cut(name: str, width: int = NAME) -> str:
    """The end of a name that is too long: of paths it says most."""
    return name if len(name) <= width else f"...{name[3 - width :]}"


def plain(text: str) -> str:
    """`text` on one line, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def source_rows(source: dict[str, Any]) -> list[list[str]]:
    """A row for each rule that removed something, and one for what stays."""
    documents, total = source["documents"], source["bytes"]
    rows = [
        [rule["rule"], rule["step"], f"{'>' if rule['above'] else '<'} {rule['limit']:g}", f"{rule['documents']:,}",
         percent(rule["documents"], documents), size(rule["bytes"]), percent(rule["bytes"], total)]
        for rule in source["removed"]
    ]  # fmt: skip
    kept = source["kept_documents"], source["kept_bytes"]
    rows.append(["stays", "", "", f"{kept[0]:,}", percent(kept[0], documents), size(kept[1]), percent(kept[1], total)])
    return rows


RULES_HEAD = ("rule", "step", "removed if", "documents", "share", "bytes", "share")
MIXTURE_HEAD = ("source", "epochs", "tokens", "kept", "kept %", "share of rows", "after")


def mixture_rows(account: dict[str, Any]) -> list[list[str]]:
    """Tokens and the share of training rows of each source, before and after."""
    return [
        [cut(plain(s["name"])), f"{s['epochs']:g}", short(s["tokens"]), short(s["kept_tokens"]),
         percent(s["kept_tokens"], s["tokens"]), percent(s["share"], 1), percent(s["kept_share"], 1)]
        for s in account["sources"]
    ]  # fmt: skip


def heading(source: dict[str, Any]) -> str:
    return (
        f"{source['documents']:,} training documents of {size(source['bytes'])}; {source['held_out_documents']:,} of "
        f"{size(source['held_out_bytes'])} are held out and stay as they are"
    )


def classifier_text(account: dict[str, Any]) -> str:
    """What is known of the classifier."""
    facts = account["classifier"]
    return (
        f"for {facts['kind']}, labels: {facts['labels']}; trained on {sum(facts['trained_on']):,} documents, on "
        f"{sum(facts['held_out']):,} others {facts['accuracy']:.1%} right at 0.5, AUC {facts['auc']:.3f}"
    )


def report_text(account: dict[str, Any]) -> str:
    """The account within WIDTH columns."""
    parts = []
    for source in account["sources"]:
        parts.append(f"{cut(plain(source['name']), WIDTH)}\n{heading(source)}")
        parts.append(table(source_rows(source), RULES_HEAD))
    parts.append(table(mixture_rows(account), MIXTURE_HEAD))
    if account["classifier"]:
        counts = account["scores"]["histogram"]
        bars = [f"{i / BINS:.2f} {'#' * round(40 * n / max(*counts, 1)):40} {n:,}" for i, n in enumerate(counts)]
        parts.append("\n".join([textwrap.fill(f"classifier {classifier_text(account)}", WIDTH), *bars]))
        for end in ("lowest", "highest"):
            parts.append("\n".join([f"{end} scores", *(sample_text(item) for item in account["scores"][end])]))
    for source in account["sources"]:
        for rule in source["removed"]:
            if rule["samples"]:
                title = f"{cut(plain(source['name']))}: {rule['step']}, {rule['rule']}"
                parts.append("\n".join([title, *map(sample_text, rule["samples"])]))
    return "\n\n".join(parts)


def sample_text(item: dict[str, Any]) -> str:
    """A document, its reason, and where it begins; for a copy, both."""
    lines = [f"  {cut(plain(item['key']), 50)}  {item.get('reason') or format(item['value'], '.3f')}"]
    lines += [f"    {plain(item['text'])}"]
    if "twin_text" in item:
        lines += [f"  {cut(plain(item['twin_key']), 50)}  ({item['twin_side']})", f"    {plain(item['twin_text'])}"]
    return "\n".join(line[:WIDTH] for line in lines)
