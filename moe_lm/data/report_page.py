"""The report on the data as a page: one file, no scripts, readable in light and dark and on a phone."""

from html import escape
from typing import Any

from moe_lm.data.quality.samples import BINS
from moe_lm.data.report import (
    MIXTURE_HEAD,
    RULES_HEAD,
    classifier_text,
    heading,
    mixture_rows,
    percent,
    plain,
    source_rows,
)
from moe_lm.scaling.html import Table, Tile, document, section, table_html, tiles_html
from moe_lm.scaling.text import short, size

PAGE_STYLE = """
tbody tr:last-child th, tbody tr:last-child td { border-bottom: 0; }
h2 { overflow-wrap: anywhere; }
.samples { display: grid; gap: 1rem; }
.samples figure { margin: 0; min-width: 0; }
.samples pre { margin: .3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto; }
.samples figcaption { font-size: .8125rem; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem 1rem; min-width: 0; }
.pair > * { min-width: 0; }
.why { color: var(--warn); }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 10rem; margin: 1.25rem 0 .25rem;
  border-bottom: 1px solid var(--rule); }
.bars i { flex: 1; background: var(--model); min-height: 1px; }
.bars i.low { background: var(--draft); }
.axis { display: flex; justify-content: space-between; gap: .75rem; text-align: center; }
@media (max-width: 34rem) { .pair { grid-template-columns: 1fr; } }
"""


def page(account: dict[str, Any], limits: dict[str, float]) -> str:
    """The whole of the page; `limits` has the classifier's `min_score`."""
    sources = account["sources"]
    names = " + ".join(plain(source["name"]) for source in sources)
    steps = ", ".join(account["steps"])
    body = [f"<header><h1>What cleaning removes</h1><p>{escape(names)}</p><p>Steps: {escape(steps)}.</p></header>"]
    body.append(tiles_html(tiles(account)))
    for source in sources:
        rules = Table(RULES_HEAD, source_rows(source))
        note = f'<p class="note">{escape(heading(source))}.</p>'
        body.append(section(plain(source["name"]), note + table_html(rules, "what was removed")))
    mixture = table_html(Table(MIXTURE_HEAD, mixture_rows(account)), "mixture")
    note = '<p class="note">Rows are dealt to the sources by epochs times tokens.</p>'
    body.append(section("Mixture", note + mixture))
    if account["classifier"]:
        body.append(section("Classifier", scores_html(account, limits["min_score"])))
    shown = [(s, rule) for s in sources for rule in s["removed"] if rule["samples"]]
    for source, rule in shown:
        samples = "".join(map(sample_html, rule["samples"]))
        body.append(section(f"{plain(source['name'])}: {rule['rule']}", f'<div class="samples">{samples}</div>'))
    return document("What cleaning removes", PAGE_STYLE, body)


def tiles(account: dict[str, Any]) -> list[Tile]:
    sources = account["sources"]
    sums = {name: sum(s[name] for s in sources) for name in ("documents", "kept_documents", "bytes", "kept_bytes")}
    tokens, kept = (sum(s[name] for s in sources) for name in ("tokens", "kept_tokens"))
    gone = sums["documents"] - sums["kept_documents"]
    lost = sums["bytes"] - sums["kept_bytes"]
    return [
        Tile("documents removed", f"{gone:,}", f"{percent(gone, sums['documents'])} of {sums['documents']:,}"),
        Tile("bytes removed", size(lost), f"{percent(lost, sums['bytes'])} of {size(sums['bytes'])}"),
        Tile("tokens that stay", short(kept), f"of {short(tokens)}"),
    ]


def scores_html(account: dict[str, Any], limit: float) -> str:
    counts = account["scores"]["histogram"]
    most = max(*counts, 1)
    bars = "".join(
        f'<i{" class=low" if (i + 1) / BINS <= limit else ""} style="height:{100 * n / most:.1f}%" '
        f'title="{i / BINS:.2f} to {(i + 1) / BINS:.2f}: {n:,} documents"></i>'
        for i, n in enumerate(counts)
    )
    ends = "".join(
        f'<h3>{end.capitalize()} scores</h3><div class="samples">'
        f"{''.join(map(sample_html, account['scores'][end]))}</div>"
        for end in ("lowest", "highest")
    )
    label = f"documents by score, from 0 to 1 in {BINS} steps: {', '.join(map(str, counts))}"
    return (
        f'<p class="note">The classifier is {escape(classifier_text(account))}. Documents below {limit:g} go.</p>'
        f'<div class="bars" role="img" aria-label="{escape(label)}">{bars}</div>'
        f'<div class="axis"><small>0</small><small>score of the training documents, at most {most:,} in a bar</small>'
        f"<small>1</small></div>{ends}"
    )


def sample_html(item: dict[str, Any]) -> str:
    """A document with its reason; a copy and its original stand side by side."""
    reason = item.get("reason") or f"{item['value']:.3f}"
    first = figure(item["key"], f'<span class="why">{escape(reason)}</span>', item["text"])
    if "twin_text" not in item:
        return first
    return f'<div class="pair">{first}{figure(item["twin_key"], escape(item["twin_side"]), item["twin_text"])}</div>'


def figure(key: str, note: str, text: str) -> str:
    """`note` is HTML already."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return (
        f"<figure><figcaption><b>{escape(plain(key))}</b> {note}</figcaption>"
        f'<pre tabindex="0" aria-label="excerpt">{escape(shown)}</pre></figure>'
    )
