"""The facts as text."""

from collections.abc import Iterable

from moe_lm.scaling.facts.row import Figure, Row, Value
from moe_lm.scaling.text import short, table


def facts_text(rows: Iterable[Row]) -> str:
    """Every row: its claim, its figures, its verdict and its derivation."""
    parts = ["Reported of GPT-4 and its neighbours; what is said of GPT-4 is reported, unconfirmed."]
    verdicts: dict[str, int] = {}
    for row in rows:
        verdicts[row.verdict] = verdicts.get(row.verdict, 0) + 1
        lines = [
            [f"  {figure.name}", said(figure.reported), figure_text(figure), figure.verdict] for figure in row.figures
        ]
        figures = table(lines, ("  ", "reported", "computed", ""))
        parts.append(f"{row.id}  {row.claim}: {row.verdict}\n{figures}\n  {row.derivation}")
    counted = ", ".join(f"{count} {name}" for name, count in verdicts.items())
    return "\n\n".join([*parts, counted])


def said(value: Value | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else number(value)


def figure_text(figure: Figure) -> str:
    difference = "" if figure.difference is None or not figure.difference else f" ({figure.difference:+.1%})"
    return f"{said(figure.computed)} {figure.unit}{difference}".strip()


def number(value: float) -> str:
    """As many digits as say something: 14.3, 0.0049, 1,504, 1.81T, 2.16e+25."""
    if abs(value) < 1e6 and value == int(value):
        return f"{value:,.0f}"
    return short(value) if 1000 <= abs(value) < 1e16 else f"{value:.3g}"
