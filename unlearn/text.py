"""Numbers and words as people read them: no NaN, no 0.30000000000000004, no 1e+12, no secret, no control character."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from urllib.parse import quote, quote_plus

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


def parameters(count: int) -> str:
    """``53 K parameters``, ``135 M parameters``."""
    return f"{count / 1e6:,.0f} M parameters" if count >= 999_500 else f"{count / 1e3:,.0f} K parameters"


def counted(n: float, noun: str) -> str:
    """``1 metric``, ``1.5 epochs``, ``3,000 metrics``."""
    return f"{f'{n:,}' if isinstance(n, int) else f'{n:g}'} {noun}{'' if n == 1 else 's'}"


def shorten(text: str, width: int = 80) -> str:
    """One line of at most ``width`` characters, for messages."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def first_line(error: BaseException) -> str:
    """What a library says of an error, without the places in its sources that may follow."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def listing(items: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *head, last = list(items) or [""]
    return f"{', '.join(head)} and {last}" if head else last


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str:
    """``; did you mean 'mcq'?`` of the known words that are near to this one, or nothing."""
    plain = {one.lower().replace("-", "_"): one for one in known}
    near = [plain[one] for one in get_close_matches(word.lower().replace("-", "_"), plain, n=most)]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


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


# -- text that others wrote, made fit to be shown


HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(?i)(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH_?KEY|CREDENTIALS?"
    r"|WEBHOOK|(?:STORAGE|ACCOUNT|SHARED|MASTER|ENCRYPTION|SIGNING)_?KEY)(?:_|$)"
    r"|(?:TOKEN|SECRET|PASSWORD|APIKEY|_PASS|_PWD|AUTHORIZATION)$"
)
_NO_SECRET = re.compile(
    r"(?i)_(?:FILE|PATH|DIR|HOME|SOCK|ENDPOINT|ID|NAME|HELPER|EXPIRES?|TYPE)$|(?<!WEBHOOK)_(?:URL|URI)$"
)
# Names that may as well be of something else (a key to sort by, a pattern of files): the value has to look the part.
_PERHAPS = re.compile(r"(?i)_(?:KEY|PAT)$")
_LOOKS_SECRET = re.compile(r"(?=\S*\d)[^\s/~]\S{15,}")
_SHORTEST = 8  # characters; a shorter value is a switch or a word, and hiding it would garble other text
# Keys that can be told by their form: model hubs, code hosts, chat services, clouds, JSON web tokens.
KEYS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{6,}|hf_oauth_[\w.-]+|sk-[\w-]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}"
    r"|xox[a-z]-[\w-]{8,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{20,}|pypi-[\w-]{16,}|npm_[A-Za-z0-9]{20,}"
    r"|(?:gsk|r8)_[A-Za-z0-9]{20,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]+)|(?i:\bbearer\s+)\S+"
)
_CERTAIN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
)
_URL_PASSWORD = re.compile(r"\w://[^/\s:@]*:[^/\s@]+@")
_URL_LOGIN = re.compile(r"(\w://)[^/\s]*@")
# What an address carries that opens it, also where only the end of the address is shown.
_PARAMETER = re.compile(
    r"(?i)([?&;](?:(?:access_|auth_|private_|id_|refresh_)?token|api_?key|password|(?:client_)?secret|sig(?:nature)?"
    r"|x-(?:amz|goog)-(?:signature|security-token)|accountkey|sharedaccesskey)=)[^&;\s\"'<>#]+"
)
_HEADER = re.compile(r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|token|digest|negotiate|apikey)\s+)[^\s\"']+")
# Control characters, and those that turn the reading direction of what follows them: both make a line say something
# else than it does. A line break and a tab are the message's own.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def hide(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without secrets: logins in addresses, keys known by their form, and what the environment calls secret.

    Of ``environment``, by default this process's own, the names of variables tell which values are secret.
    """
    for value in _secrets(os.environ if environment is None else environment):
        text = text.replace(value, HIDDEN)
    text = _PARAMETER.sub(rf"\1{HIDDEN}", _HEADER.sub(rf"\1{HIDDEN}", text))
    return KEYS.sub(HIDDEN, _URL_LOGIN.sub(rf"\1{HIDDEN}@", text))


def is_secret(text: str, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a text certainly holds a secret: an address that opens, a known key, or one of the environment.

    Stricter than :func:`hide`, which hides too much rather than too little.
    """
    known = any(value in text for value in _secrets(os.environ if environment is None else environment))
    forms = [_URL_PASSWORD, _CERTAIN, *([_PARAMETER] if "://" in text else [])]
    return known or any(form.search(text) is not None for form in forms)


def clean(text: str) -> str:
    """The text with what no HTML file may hold (control characters, lone surrogates) shown as U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def visible(text: str) -> str:
    """The text with control characters, and those that change its direction, shown as ``\\x1b`` and the like."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def fitted(text: str, encoding: str, kept: str = "") -> str:
    """As much of a text as a terminal's encoding has; other characters, and those that move the cursor, are ``?``."""
    known = text.encode(encoding, "replace").decode(encoding)
    return "".join(c if c.isprintable() or c in kept else "?" for c in known)


def one_line(text: str) -> str:
    """:func:`visible`, and line breaks and tabs shown as well: for a name within a sentence."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def shown(text: str) -> str:
    """A message as it may be put on a terminal or into a log."""
    return hide(visible(text))


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """Values of variables that are secret by their names, the longest first: one may contain another."""
    values = {value.strip() for name, value in environment.items() if _is_called_secret(name, value.strip())}
    return sorted({form for value in values for form in _spellings(value)}, key=len, reverse=True)


def _is_called_secret(name: str, value: str) -> bool:
    if len(value) < _SHORTEST or _NO_SECRET.search(name):
        return False
    if _PERHAPS.search(name) and _LOOKS_SECRET.fullmatch(value):
        return True
    folder = name.upper().endswith("PWD") and value.startswith(("/", "~"))
    return _SECRET_NAME.search(name) is not None and not folder


def _spellings(value: str) -> Iterator[str]:
    """A value as it stands in plain text, in JSON, in Python's own notation, and in an address."""
    plain = "'".join(repr(part)[1:-1] for part in value.split("'"))
    yield from (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
    yield from (plain, plain.replace("'", "\\'"), quote(value), quote(value, safe=""), quote_plus(value))
