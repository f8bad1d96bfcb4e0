"""What the project's pages share: one file each that loads nothing, readable in light and dark and on a phone."""

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from typing import NamedTuple


class Table(NamedTuple):
    """Rows of text; the first column names the row, the others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Tile(NamedTuple):
    """One figure at the head of a page."""

    label: str
    value: str
    note: str = ""


def document(title: str, style: str, body: Sequence[str], script: str = "") -> str:
    """The whole of a page, whose policy makes it certain that no text in it, whatever it says, is more than text.

    `script` is a module of ours that runs at the end of it: the policy names its hash, and no other may run.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    if script:
        policy += f"; script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"
    run = f'<script type="module">{script}</script>\n' if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
{"".join(part + chr(10) for part in body)}</main>
{run}</body>
</html>
"""


def tiles_html(tiles: Sequence[Tile]) -> str:
    """The figures at the head."""
    figures = "".join(
        f"<div><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}<small>{escape(tile.note)}</small></dd></div>"
        for tile in tiles
    )
    return f'<dl class="tiles">{figures}</dl>'


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def table_html(table: Table, label: str) -> str:
    """A table in a box of its own that scrolls where the page is narrow."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf9; --ink: #1f2328; --muted: #646a72; --rule: #e4e1db;
  --panel: #f4f2ee; --model: #2a6cb0; --draft: #c2611f; --low: #2566a8; --even: #efece6; --high: #bd4a12;
  --first: #9cc3e6; --last: #17406d; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e7e5e0; --muted: #9ba1a9; --rule: #2f3338;
  --panel: #1e2125; --model: #79b2ea; --draft: #f0a05a; --low: #4a93d9; --even: #25292e; --high: #f5905a;
  --first: #3f6b96; --last: #cfe6ff; --warn: #e8b35c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55; -webkit-text-size-adjust: 100%;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 650; letter-spacing: -.005em; margin: 0; }
h3 { font-size: 1rem; font-weight: 600; margin: 1rem 0 0; }
header p { margin: .4rem 0 0; color: var(--muted); max-width: 44rem; overflow-wrap: anywhere; }
section { margin-top: 3.5rem; border-top: 1px solid var(--rule); padding-top: 1.25rem; }
small { font-size: .8125rem; color: var(--muted); font-weight: 400; }
.note { font-size: .875rem; color: var(--muted); max-width: 44rem; margin: .6rem 0 0; }
.warnings { margin-top: 1.75rem; border-left: 3px solid var(--warn); padding: .1rem 0 .1rem 1rem; }
.warnings h2 { font-size: 1rem; color: var(--warn); }
.warnings ul { margin: .3rem 0 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1.75rem 1.5rem;
  margin: 2.5rem 0 0; }
.tiles div { border-top: 2px solid var(--ink); padding-top: .55rem; min-width: 0; }
.tiles dt { font-size: .8125rem; color: var(--muted); overflow-wrap: anywhere; }
.tiles dd { margin: .1rem 0 0; font-size: 1.65rem; line-height: 1.25; font-weight: 600; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; letter-spacing: 0; line-height: 1.4; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .4rem 0 .4rem 1.4rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 500; color: var(--muted); vertical-align: bottom; }
tbody th { font-weight: 500; }
pre { margin: 1rem 0 0; padding: .9rem 1.1rem; background: var(--panel); border-radius: 6px; overflow-x: auto;
  font: .8125rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 4; }
.prompt { color: var(--model); font-weight: 600; }
.sample figcaption { margin: .3rem 0 0; }
.facts { margin: 1.25rem 0 0; font-size: .9375rem; }
.facts div { display: grid; grid-template-columns: 7rem 1fr; gap: 0 1rem; padding: .3rem 0; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1.25rem; }
summary { cursor: pointer; color: var(--muted); font-size: .9375rem; }
:focus-visible { outline: 2px solid var(--model); outline-offset: 3px; }
@media (max-width: 34rem) { main { padding-top: 1.75rem; } h1 { font-size: 1.6rem; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1.4rem 1.1rem; }
  .tiles dd { font-size: 1.4rem; } .facts div { grid-template-columns: 1fr; } section { margin-top: 2.75rem; } }
"""
