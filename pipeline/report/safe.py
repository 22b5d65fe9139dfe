"""Web text and settings made fit for a page that others will read.

Escaping is the template's; here goes what escaping leaves: characters that reorder or hide what
is read, texts without end, and secrets.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

MASK = "•••"

_JOINERS = "\u200c\u200d"
"""Persian and Indic scripts and emoji need them; they change no order."""


def plain(text: object, limit: int = 280) -> str:
    """``text`` in one line of at most ``limit`` characters.

    Bidirectional controls (U+202A–202E, U+2066–2069, marks) and other invisible format characters
    go; control characters and lone surrogates become ``�``, white space one blank.
    """
    whole = str(text)
    # A long text is cut first, so that one of megabytes costs no more than a short one.
    start = whole[: 4 * limit + 100]
    shown = " ".join("".join(map(_harmless, start)).split())
    if len(shown) > limit or len(start) < len(whole):
        return shown[: limit - 1].rstrip() + "…"
    return shown


def _harmless(character: str) -> str:
    if character.isspace():
        return " "
    category = unicodedata.category(character)
    if category == "Cf":
        return character if character in _JOINERS else ""
    return "�" if category in ("Cc", "Cs") else character


# ---- secrets ---------------------------------------------------------------------------------

_SECRET_WORDS = frozenset(
    {
        *("password", "passwd", "pwd", "passphrase", "secret", "secrets", "token", "credential"),
        *("credentials", "authorization", "auth", "apikey", "accesskey", "key", "signature"),
        *("sig", "sas", "bearer", "cookie"),
    }
)
_SECRET = (
    r"[\w.-]*(?:password|passwd|pwd|secret|token|credential|signature|api[_-]?key|"
    r"access[_-]?key|account[_-]?key|shared[_-]?access|accesskeyid)[\w.-]*"
)
_PATTERNS = (
    # scheme://user:password@host, the password may hold / and @; the user alone can be a token
    (re.compile(r"(?<=://)(?:[^\s\"']*:[^\s\"']*|[^/?#\s\"']+)(?=@)"), MASK),
    # one query parameter, or one setting of a connection string
    (re.compile(rf"(?i)\b({_SECRET})(\s*[=:]\s*)([^\s;&,'\"#]+)"), rf"\1\2{MASK}"),
    (re.compile(r"(?i)([?&;](?:sig|se|skoid|key|auth|jwt|code)=)[^&\s#;]+"), rf"\1{MASK}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\1 {MASK}"),
    # tokens that are known by their form
    (
        re.compile(
            r"\b(?:hf_\w{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|"
            r"(?:AKIA|ASIA)[A-Z0-9]{16}|sk-[\w-]{20,}|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}|"
            r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
        ),
        MASK,
    ),
)


def masked(text: str) -> str:
    """``text`` with passwords, tokens and signatures replaced, as in URLs and connection
    strings."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def masked_tree(value: Any, key: str = "") -> Any:
    """Nested settings with every secret replaced, by the name of the field or the look of the
    value. Numbers are no secrets: ``max_tokens: 20`` stays."""
    if isinstance(value, Mapping):
        return {masked(str(name)): masked_tree(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked_tree(item, key) for item in value]
    if isinstance(value, str):
        return MASK if value and _secret_name(key) else masked(value)
    return value


def _secret_name(key: str) -> bool:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", key)
    words = re.split(r"[^a-z0-9]+", spaced.lower())
    return not _SECRET_WORDS.isdisjoint(words)
