"""What a site says about the use of its images: headers, robots.txt and TDM reservation.

img2dataset's `is_disallowed` is not used: it takes whatever stands before the first colon for the
name of an agent, so that ``unavailable_after: …, noai`` opts nobody out.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from protego import Protego

from stages.connect import FetchError, parse_url

OPT_OUT_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")

# Directives of X-Robots-Tag that carry a value behind a colon, as an agent's name does.
_WITH_VALUE = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)
_MEANT = {"none": "noindex"}
"""Directive → the one that it includes."""

_AGENT_LINE = re.compile(r"\s*user(?:-|\s*)agent(?:\s*:|\s)\s*(.*)", re.IGNORECASE)
_WILDCARD_STEPS = 10_000_000
"""Wildcards of a robots.txt times characters of a URL: some tenths of a second at most."""
_HOSTS_REMEMBERED = 10_000
_BYTES_REMEMBERED = 8 << 20
"""Of the files of all hosts; parsed, they take some twenty times as much."""
_LOCATIONS = 1_000
"""In a tdmrep.json; each is a regular expression."""

Read = Callable[[str, float], tuple[int | None, bytes]]
"""(URL, deadline) → (HTTP status, or None where redirects led nowhere; body). Raises `FetchError`
where that may be another on another day."""
Rule = Callable[[str], str | None]
"""URL → what disallows it, or None."""


def header_objection(headers: Message, agent: str, directives: Collection[str]) -> str | None:
    """Which header disallows the use to ``agent`` (lower case), or None.

    X-Robots-Tag counts where it names one of ``directives`` (lower case) for everyone or for
    ``agent``; ``TDM-Reservation: 1`` (the W3C's TDMRep) always does.
    """
    for value in headers.get_all("X-Robots-Tag", []):
        said = _directives(str(value), agent)
        found = next((d for d in said if d in directives or _MEANT.get(d) in directives), None)
        if found is not None:
            return f"X-Robots-Tag: {found}"
    if str(headers.get("TDM-Reservation", "")).strip() == "1":
        return "TDM-Reservation: 1"
    return None


def _directives(value: str, agent: str) -> Iterable[str]:
    """The directives in one header that hold for ``agent``; a name holds up to the next one. Other
    names with a blank are none but the rest of a date."""
    holds = True
    for part in re.split("[,;]", value.lower()):
        name, colon, rest = (piece.strip() for piece in part.partition(":"))
        if colon and name not in _WITH_VALUE and (" " not in name or name == agent):
            holds, name = name == agent, rest
        if holds:
            yield name


@dataclass
class _Site:
    """What is known of one host; whoever asks the host holds ``lock``."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    rules: list[Rule] | None = None
    failure: FetchError | None = None
    failed_at: float = 0.0
    size: int = 0
    """Bytes of the files that the rules are from."""
    counted: bool = False
    """Whether `SiteRules` has added them up."""


class SiteRules:
    """robots.txt and /.well-known/tdmrep.json of each host, read once; serves many threads. A
    failure to read them is not remembered: the next URL asks again.

    Args:
        read: fetches a URL within the limits of the crawl.
        agent: the token that robots.txt may name.
    """

    def __init__(self, read: Read, agent: str, robots: bool, tdmrep: bool) -> None:
        self._read, self._agent = read, agent
        self._robots, self._tdmrep = robots, tdmrep
        self._known: OrderedDict[str, _Site] = OrderedDict()
        self._size = 0  # of all that is known
        self._lock = threading.Lock()

    def objection(self, url: str, deadline: float = math.inf) -> str | None:
        """Which of the host's rules disallows ``url``, or None.

        Raises:
            FetchError: the rules cannot be read now, or by ``deadline`` (of `time.monotonic`).
        """
        if not (self._robots or self._tdmrep):
            return None
        name = parse_url(url).origin
        with self._lock:
            site = self._known.setdefault(name, _Site())
            self._known.move_to_end(name)
        try:
            rules = self._read_once(name, site, deadline)
        finally:
            self._remember(name, site)
        return next((said for rule in rules if (said := rule(url)) is not None), None)

    def _remember(self, name: str, site: _Site) -> None:
        """Forget the hosts that were asked for longest ago, if the known ones are too much."""
        with self._lock:
            if self._known.get(name) is site and site.rules is not None and not site.counted:
                site.counted = True
                self._size += site.size
            while len(self._known) > _HOSTS_REMEMBERED or self._size > _BYTES_REMEMBERED:
                _, oldest = self._known.popitem(last=False)
                self._size -= oldest.size if oldest.counted else 0

    def _read_once(self, name: str, site: _Site, deadline: float) -> list[Rule]:
        """The first to come asks the host, the others wait for what it says, or for its failure:
        if each asked a host that hangs, they would wait for each other as well."""
        came = time.monotonic()
        if not site.lock.acquire(timeout=min(max(0.0, deadline - came), threading.TIMEOUT_MAX)):
            what = f"total time is up while another asks for the rules of {name[-100:]}"
            raise FetchError("timeout", what, transient=True)
        try:
            if site.rules is None:
                if site.failure is not None and site.failed_at >= came:
                    raise site.failure
                try:
                    site.rules, site.size = self._rules(name, deadline)
                except FetchError as error:
                    site.failure, site.failed_at = error, time.monotonic()
                    raise
            return site.rules
        finally:
            site.lock.release()

    def _rules(self, site: str, deadline: float) -> tuple[list[Rule], int]:
        """And how many bytes say them."""
        rules, size = [], 0
        if self._robots:
            code, body = self._read(f"{site}/robots.txt", deadline)
            rules.append(_robots_rule(code, body, self._agent))
            size += len(body)
        if self._tdmrep:
            code, body = self._read(f"{site}/.well-known/tdmrep.json", deadline)
            rules.append(_tdm_rule(code, body))
            size += len(body)
        return rules, size


def _robots_rule(code: int | None, body: bytes, agent: str) -> Rule:
    """RFC 9309, 2.3.1: no such file allows everything, one that redirects hide nothing."""
    if code is not None and code < 300:
        text = _for_us(body.decode("utf-8-sig", "replace"), agent)
    elif code is not None and 400 <= code < 500:
        text = ""
    else:
        why = f"HTTP {code}" if code else "its redirects lead nowhere"
        return lambda _: f"robots.txt cannot be read ({why})"
    parser, wildcards = Protego.parse(text), text.count("*")

    def rule(url: str) -> str | None:
        if wildcards * len(url) > _WILDCARD_STEPS:
            return f"robots.txt: {wildcards} wildcards for a URL of {len(url)} characters"
        try:
            return None if parser.can_fetch(url, agent) else "robots.txt"
        except ValueError:
            return "robots.txt is unreadable"

    return rule


def _for_us(text: str, agent: str) -> str:
    """A robots.txt in which groups for others have no name.

    Protego keeps each rule for each agent, a product that fills the memory where a file has
    thousands of both; and it takes a name that ours begins with for ours, ours with a version not.
    """
    ours = re.compile(rf"(?:\*|{re.escape(agent)})(?![\w-])", re.IGNORECASE)
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if (agents := _AGENT_LINE.match(line)) is not None:
            name = ours.match(agents[1])
            lines[number] = f"User-agent: {name[0] if name else ''}"
    return "\n".join(lines)


def _tdm_rule(code: int | None, body: bytes) -> Rule:
    """TDMRep, 6.1: a list of {location, tdm-reservation}; the first location that fits counts."""
    try:
        entries = json.loads(body) if code is not None and code < 300 else []
    except (ValueError, RecursionError):
        entries = []
    found = [
        (str(entry["location"]), entry.get("tdm-reservation"))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and "location" in entry
    ]

    if len(found) > _LOCATIONS:
        return lambda _: f"tdmrep.json: {len(found)} locations, at most {_LOCATIONS} are read"

    def rule(url: str) -> str | None:
        path = urlsplit(url).path or "/"
        said = next((r for location, r in found if _fits(path, location)), 0)
        return "tdmrep.json" if said in (1, "1") else None

    return rule


def _fits(path: str, location: str) -> bool:
    pattern = location.replace("[", "[[]").replace("?", "[?]")
    return fnmatchcase(path, pattern[:-1] if pattern.endswith("$") else pattern + "*")
