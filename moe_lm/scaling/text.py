"""Numbers as people read them, and columns."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Columns two spaces apart, the first to the left and the others to the right."""
    lines = [list(head), *map(list, rows)] if head else [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def short(number: float) -> str:
    """Three digits and a letter: 1.81T, 277B, 7.32M."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= scale * 0.9995:
            return f"{number / scale:.3g}{letter}" if abs(number) < 999.5 * scale else f"{number / scale:,.0f}{letter}"
    return f"{number:.3g}"


def size(nbytes: float) -> str:
    """Bytes in decimal units, as memory is sold: 30.2 GB."""
    for scale, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.3g} {unit}" if nbytes < 999.5 * scale else f"{nbytes / scale:.0f} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """In the unit that fits: 12.3 ms, 5.1 s, 3.4 h, 92 days."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 86400:
        return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
    return f"{seconds / 86400:,.3g} days" if seconds < 1000 * 86400 else f"{seconds / 86400:,.0f} days"


def dollars(amount: float) -> str:
    if amount >= 1e6:
        return f"${amount / 1e6:.3g}M" if amount < 1e9 else f"${amount / 1e9:,.3g}B"
    if amount >= 1000:
        return f"${amount / 1e3:.3g}k"
    return f"${amount:.2f}" if amount >= 0.1 else f"${amount:.2g}"
