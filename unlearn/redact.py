"""Text that others wrote, made fit to be shown: no secret in it, and no character that moves a terminal's cursor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote, quote_plus

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


def hide(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without secrets: logins in addresses, keys known by their form, and what the environment calls secret.

    Args:
        environment: Where the names of variables tell which values are secret; by default this process's own.
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


def visible(text: str) -> str:
    """The text with control characters, and those that change its direction, shown as ``\\x1b`` and the like."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


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
