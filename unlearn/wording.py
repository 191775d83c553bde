"""Numbers as people read them: no NaN, no 0.30000000000000004, no 1e+12."""

from __future__ import annotations

import math
from collections.abc import Iterable

MISSING = "–"
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(value: float | None) -> str:
    """A score for people: three decimals up to 10, fewer above, powers of ten beyond six digits, – when missing."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size and (size < 0.0005 or size >= 999_999.5):
        mantissa, exponent = f"{size:.1e}".split("e")
        body = f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    else:
        body = f"{size:.{3 if size < 10 else 2 if size < 100 else 1 if size < 10_000 else 0}f}"
    return f"−{body}" if value < 0 else body


def short(value: float) -> str:
    """Two decimals for a sentence, as :func:`number` where two are too few or too many."""
    return f"{value:.2f}" if 0.01 <= value < 10 or value == 0 else number(value)


def signed(value: float | None) -> str:
    """A change with its sign always shown."""
    shown = number(value)
    return f"+{shown}" if value is not None and value > 0 else shown


def percent(share: float | None) -> str:
    """A share as a percentage, with a decimal where it decides (near 95 or 100)."""
    if share is None or not math.isfinite(share):
        return MISSING
    body = f"{100 * share:.1f}".removesuffix(".0") if abs(share) < 100 else number(100 * share)
    return body.replace("-", "−") + " %"


def coefficient(value: float) -> str:
    """``1.5``, never ``1.50000001``."""
    return f"{value:.6g}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``48 s``, ``2 min 13 s``, ``1 h 05 min``."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def file_size(count: int) -> str:
    """``512 bytes``, ``4.1 MB``, ``2.8 GB`` (powers of 1000)."""
    if count < 1000:
        return f"{count} bytes"
    size, units = float(count), ["kB", "MB", "GB", "TB"]
    while (size := size / 1000) >= 999.95 and len(units) > 1:
        units.pop(0)
    return f"{size:.1f} {units[0]}"


def counted(n: int, noun: str) -> str:
    """``1 metric``, ``3 metrics``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def listing(items: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *head, last = list(items) or [""]
    return f"{', '.join(head)} and {last}" if head else last


def tick_label(value: float) -> str:
    """``0.25``, ``150``, ``10⁶``; a true minus sign."""
    size = abs(value)
    if size >= 10_000 or 0 < size < 0.001:
        mantissa, exponent = f"{size:.0e}".split("e")
        power = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
        body = power if mantissa == "1" else f"{mantissa}×{power}"
    else:
        body = f"{size:g}"
    return f"−{body}" if value < 0 else body
