"""The catalogue of what is sold over x402: the resources that payments settled here were for, as their `bazaar` extension says.

The description arrives with a payment and so passes through its payer's hands; it is entered only once money has moved, a field
that fails its rule is dropped, and what one recipient can enter is bounded. A description's own JSON Schema is never executed:
it is the payer's, and a schema's patterns can take for ever. The forms that the specification knows are checked instead.

Source: x402 `specs/extensions/bazaar.md`; x402 specification v2, section 8.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import orjson

from payments.facilitator.wire import FacilitatorCall
from payments.store import Transaction
from payments.x402.requirements import Requirement, describe_requirement

BAZAAR = "bazaar"
PAGE_MAX = 100
PAGE_DEFAULT = 20
ENTRIES_PER_RECIPIENT_MAX = 200
DOCUMENT_BYTES_MAX = 16_384
URL_CHARACTERS_MAX = 2_048
TEXT_CHARACTERS_MAX = 500
TAGS_MAX = 5
LABEL_CHARACTERS_MAX = 32

_BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})
_QUERY_METHODS = frozenset({"GET", "HEAD", "DELETE"})
_BODY_TYPES = frozenset({"json", "form-data", "text"})
_LABEL = re.compile(rf"[\x20-\x7e]{{1,{LABEL_CHARACTERS_MAX}}}")
_TEMPLATE = re.compile(r"/[a-zA-Z0-9_/:.\-~%]+")
_NUMBER_HOST = re.compile(r"[0-9]+|0x[0-9a-f]+|[0-9.]+|.*:.*")
_LOCAL_HOSTS = frozenset({"localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"})


class NotListed(ValueError):
    """A description cannot be entered; the message says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One resource as it is listed."""

    id: str
    type: str
    pay_to: str
    scheme: str
    network: str
    document: bytes


@dataclass(frozen=True, slots=True)
class Page:
    """What somebody asked to see."""

    limit: int = PAGE_DEFAULT
    offset: int = 0
    filters: tuple[tuple[str, str], ...] = ()
    """Columns and the values that they must have."""


def read_page(query: Mapping[str, str]) -> Page:
    """Read the parameters of `/discovery/resources`.

    Raises:
        ValueError: Naming the parameter that is not what it must be.
    """
    numbers = {}
    for name, default, high in (("limit", PAGE_DEFAULT, PAGE_MAX), ("offset", 0, 10**9)):
        text = query.get(name, str(default))
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise ValueError(f"{name} must be a whole number, 0 or more")
        numbers[name] = min(int(text), high)
    columns = (("type", "type"), ("payTo", "pay_to"), ("scheme", "scheme"), ("network", "network"))
    filters = [(column, query[name]) for name, column in columns if name in query]
    return Page(
        limit=max(numbers["limit"], 1),
        offset=numbers["offset"],
        filters=tuple((column, value.lower() if column == "pay_to" else value) for column, value in filters),
    )


def describes(call: FacilitatorCall) -> bool:
    """Whether a payment carries a description."""
    extensions = call.document.get("extensions")
    return isinstance(extensions, dict) and extensions.get(BAZAAR) is not None


def entry_for(call: FacilitatorCall) -> Entry:
    """Read the description that a payment carries.

    Raises:
        NotListed: Saying why not.
    """
    extension = call.document["extensions"][BAZAAR]
    info = extension.get("info") if isinstance(extension, dict) else None
    resource = call.document.get("resource")
    if not isinstance(info, dict) or not isinstance(resource, dict):
        raise NotListed("info and resource must be objects")
    kind, tool = _read_input(info.get("input"))
    url = _listed_url(resource.get("url"), extension.get("routeTemplate"))
    item: dict[str, Any] = {
        "resource": url,
        "type": kind,
        "x402Version": call.payment.version,
        "accepts": [describe_requirement(_offered(call))],
        "lastUpdated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **_service(resource),
        "extensions": {BAZAAR: {"info": info}},
    }
    document = orjson.dumps(item)
    if len(document) > DOCUMENT_BYTES_MAX:
        raise NotListed(f"the description must have at most {DOCUMENT_BYTES_MAX} bytes")
    requirement = call.requirement
    identity = url if tool is None else f"{url}#{tool}"
    return Entry(identity, kind, requirement.pay_to, requirement.scheme, requirement.network, document)


def _offered(call: FacilitatorCall) -> Requirement:
    """What was asked for before anybody knew how much would be used."""
    accepted = call.payment.accepted
    upto = accepted is not None and call.requirement.scheme == "upto"
    return replace(call.requirement, amount=accepted.amount) if upto and accepted else call.requirement


def enter(tx: Transaction, entry: Entry) -> bool:
    """List a resource, or renew what is listed.

    Returns:
        False, with nothing changed, if it is listed for another recipient, or its recipient has entered too much.
    """
    known = tx.execute("SELECT pay_to FROM discovered_resource WHERE id = ?", (entry.id,)).fetchone()
    if known is not None and known[0] != entry.pay_to:
        return False
    if known is None:
        count = tx.execute("SELECT COUNT(*) FROM discovered_resource WHERE pay_to = ?", (entry.pay_to,)).fetchone()[0]
        if int(count) >= ENTRIES_PER_RECIPIENT_MAX:
            return False
    tx.execute(
        "INSERT INTO discovered_resource (id, type, pay_to, scheme, network, document, updated_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET type = excluded.type, scheme = excluded.scheme,"
        " network = excluded.network, document = excluded.document, updated_ms = excluded.updated_ms",
        (
            entry.id,
            entry.type,
            entry.pay_to,
            entry.scheme,
            entry.network,
            entry.document.decode(),
            time.time_ns() // 1_000_000,
        ),
    )
    return True


def listing(tx: Transaction, page: Page) -> dict[str, Any]:
    """The answer of `/discovery/resources`, the newest first."""
    where = " AND ".join(f"{column} = ?" for column, _ in page.filters) or "1 = 1"
    values = [value for _, value in page.filters]
    total = tx.execute(f"SELECT COUNT(*) FROM discovered_resource WHERE {where}", values).fetchone()[0]  # noqa: S608 - columns of this module
    rows = tx.execute(
        f"SELECT document FROM discovered_resource WHERE {where} ORDER BY updated_ms DESC, id LIMIT ? OFFSET ?",  # noqa: S608
        (*values, page.limit, page.offset),
    ).fetchall()
    return {
        "x402Version": 2,
        "items": [orjson.loads(row[0]) for row in rows],
        "pagination": {"limit": page.limit, "offset": page.offset, "total": int(total)},
    }


def _read_input(value: object) -> tuple[str, str | None]:
    """The kind of a described input, and the tool if it is one of MCP."""
    members = value if isinstance(value, dict) else {}
    kind, method = members.get("type"), members.get("method")
    if kind == "mcp":
        tool = members.get("tool")
        if not isinstance(tool, str) or not 0 < len(tool) <= 128 or not isinstance(members.get("inputSchema"), dict):
            raise NotListed("an input of type mcp must have a tool and an inputSchema")
        return "mcp", tool
    if kind != "http":
        raise NotListed("info.input.type must be http or mcp")
    if method in _BODY_METHODS:
        if members.get("bodyType") not in _BODY_TYPES or "body" not in members:
            raise NotListed(f"an input of method {method} must have a bodyType and a body")
    elif method not in _QUERY_METHODS:
        raise NotListed("info.input.method must be an HTTP method")
    return "http", None


def _listed_url(value: object, template: object) -> str:
    """The URL under which a resource is listed: without query, its path the template's if it has one that is harmless."""
    if not isinstance(value, str) or len(value) > URL_CHARACTERS_MAX or not value.isprintable():
        raise NotListed("resource.url must be a URL")
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
    except ValueError:
        usable = False
    if not usable:
        raise NotListed("resource.url must be an http or https URL without credentials")
    path = parts.path
    if isinstance(template, str) and _TEMPLATE.fullmatch(template):
        plain = unquote(template)
        if ".." not in plain and "://" not in plain:
            path = template
    return urlunsplit((parts.scheme, parts.netloc.lower(), path, "", ""))


def _service(resource: Mapping[str, Any]) -> dict[str, Any]:
    """What a resource says about itself, without what fails its rule."""
    found: dict[str, Any] = {}
    for name in ("description", "mimeType"):
        value = resource.get(name)
        if isinstance(value, str) and value and value.isprintable():
            found[name] = value[:TEXT_CHARACTERS_MAX]
    service = resource.get("serviceName")
    if isinstance(service, str) and _LABEL.fullmatch(service):
        found["serviceName"] = service
    tags = resource.get("tags")
    if isinstance(tags, list):
        kept = {tag.lower(): tag for tag in reversed(tags) if isinstance(tag, str) and _LABEL.fullmatch(tag)}
        if kept:
            found["tags"] = list(reversed(kept.values()))[:TAGS_MAX]
    icon = resource.get("iconUrl")
    if isinstance(icon, str) and _is_harmless_icon(icon):
        found["iconUrl"] = icon
    return found


def _is_harmless_icon(url: str) -> bool:
    """Whether a page that shows the icon asks a public host for it."""
    if len(url) > URL_CHARACTERS_MAX or not url.isprintable():
        return False
    try:
        parts = urlsplit(url)
        host = unquote(parts.hostname or "").encode("idna").decode().lower().rstrip(".")
    except (ValueError, UnicodeError):
        return False
    return (
        parts.scheme in ("http", "https")
        and parts.username is None
        and bool(host)
        and host not in _LOCAL_HOSTS
        and not _NUMBER_HOST.fullmatch(host)
    )
