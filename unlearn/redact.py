"""Text that others wrote, made fit to be shown: no secret in it, and no character that moves a terminal's cursor."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(?i)(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|AUTH_?KEY|CREDENTIALS?"
    r"|WEBHOOK)(?:_|$)|(?:TOKEN|SECRET|PASSWORD|APIKEY)$"
)
_NO_SECRET = re.compile(r"(?i)_(?:FILE|PATH|DIR|HOME|SOCK|URL|URI|ENDPOINT|ID|NAME|HELPER|EXPIRES?|TYPE)$")
_SHORTEST = 8  # characters; a shorter value is a switch or a word, and hiding it would garble other text
# Keys that can be told by their form: model hubs, code hosts, chat services, clouds, JSON web tokens.
KEYS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{6,}|hf_oauth_[\w.-]+|sk-[\w-]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}"
    r"|xox[a-z]-[\w-]{8,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{20,}|pypi-[\w-]{16,}|npm_[A-Za-z0-9]{20,}"
    r"|eyJ[\w-]{10,}\.[\w-]+\.[\w-]+)|(?i:\bbearer\s+)\S+"
)
_CERTAIN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
)
_URL_PASSWORD = re.compile(r"\w://[^/\s:@]*:[^/\s@]+@")
_URL_LOGIN = re.compile(r"(\w://)[^/\s]*@")
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
    return KEYS.sub(HIDDEN, _URL_LOGIN.sub(rf"\1{HIDDEN}@", text))


def is_secret(text: str, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a text certainly holds a secret: an address with a password, a known key, or one of the environment.

    Stricter than :func:`hide`, which hides too much rather than too little.
    """
    known = any(value in text for value in _secrets(os.environ if environment is None else environment))
    return known or _URL_PASSWORD.search(text) is not None or _CERTAIN.search(text) is not None


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
    found = {
        value.strip()
        for name, value in environment.items()
        if _SECRET_NAME.search(name) and not _NO_SECRET.search(name) and len(value.strip()) >= _SHORTEST
    }
    return sorted(found, key=len, reverse=True)
