"""What a configuration can get wrong although every field is well formed: references, money, addresses, keys.

Works on the merged data before it becomes `Settings`, so that one run reports everything, malformed fields included; values of
the wrong type are passed over here because they are reported there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from gateway.settings import NetworkSettings

KeyPath = tuple[str | int, ...]

ZERO_ADDRESS = "0x" + "0" * 40
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENDPOINTS = ("/chat/completions", "/messages", ":generateContent", ":streamGenerateContent", "/responses")
_LOOKS_LIKE_A_KEY = re.compile(r"(sk|pk|key|xai|gsk|AIza)[-_A-Za-z0-9]{16,}")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong at a path of the configuration."""

    path: KeyPath
    what: str
    fix: str
    warning: bool = False


def dotted(path: KeyPath) -> str:
    """A path as people write it, such as ``models[2].provider``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def findings(data: Mapping[str, Any], env: Mapping[str, str]) -> Iterator[Finding]:
    """Everything that is wrong or doubtful.

    Args:
        data: File and environment merged, unchecked.
        env: The environment, to see whether provider keys are there.
    """
    yield from _providers(data, env)
    yield from _models(data)
    yield from _routing(data)
    yield from _networks(data)
    yield from _keys(data)
    yield from _service(data)


def key_variables(data: Mapping[str, Any]) -> set[str]:
    """The variables that providers' `api_key_env` name."""
    return {provider["api_key_env"] for _, provider in _tables(data, "providers") if _is_text(provider, "api_key_env")}


def _is_text(table: Mapping[str, Any], name: str) -> bool:
    return isinstance(table.get(name), str)


def _tables(data: Mapping[str, Any], name: str) -> list[tuple[Any, dict[str, Any]]]:
    """The tables of a list (by index) or of a table (by name), leaving out what is not a table."""
    value = data.get(name)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(key, item) for key, item in items if isinstance(item, dict)]


def _did_you_mean(name: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else otherwise


def _providers(data: Mapping[str, Any], env: Mapping[str, str]) -> Iterator[Finding]:
    used = {model.get("provider") for _, model in _tables(data, "models")}
    for name, provider in _tables(data, "providers"):
        path: KeyPath = ("providers", name)
        if not name or "@" in name or name != name.strip():
            yield Finding(path, f"{name!r} cannot be a provider's name", "Use letters, digits, - and _")
        base_url = provider.get("base_url")
        if isinstance(base_url, str):
            url = (*path, "base_url")
            if not _is_url(base_url):
                yield Finding(url, f"{dotted(url)} is not a URL", "Write it like https://api.openai.com/v1")
            elif base_url.rstrip("/").endswith(_ENDPOINTS):
                yield Finding(url, f"{dotted(url)} is a whole endpoint", "Leave out the last part: the gateway adds it")
        variable = provider.get("api_key_env")
        if isinstance(variable, str):
            here = (*path, "api_key_env")
            if not _VARIABLE.fullmatch(variable) or _LOOKS_LIKE_A_KEY.fullmatch(variable):
                fix = "Put the key into a variable such as OPENAI_API_KEY, write that name here, and replace the key"
                yield Finding(here, f"{dotted(here)} is not the name of a variable", fix)
            elif not env.get(variable):
                yield Finding(
                    here, f"{variable} is not set, so {name} cannot be used", f"Set {variable} to the key", True
                )
        if name not in used:
            yield Finding(path, f"provider {name!r} has no models", "Add [[models]] that name it, or remove it", True)


def _models(data: Mapping[str, Any]) -> Iterator[Finding]:
    from gateway.routing.catalog import normal_name

    providers = [name for name, _ in _tables(data, "providers")]
    seen: dict[tuple[str, str], int] = {}
    spellings: dict[str, str] = {}
    if not data.get("models"):
        yield Finding(("models",), "there are no models, so nothing can be asked", "Add [[models]]", True)
    for index, model in _tables(data, "models"):
        path: KeyPath = ("models", index)
        identifier, provider = model.get("id"), model.get("provider")
        if isinstance(provider, str) and provider not in providers:
            fix = _did_you_mean(provider, providers, f"Add [providers.{provider}]")
            yield Finding((*path, "provider"), f"provider {provider!r} is not defined", fix)
        if isinstance(identifier, str):
            if identifier == "auto" or "@" in identifier or not identifier or identifier != identifier.strip():
                fix = '"auto" lets the gateway choose, and @ separates model and provider; use another id'
                yield Finding((*path, "id"), f"{identifier!r} cannot be a model's id", fix)
            if isinstance(provider, str):
                first = seen.setdefault((identifier, provider), index)
                if first != index:
                    what = f"{identifier!r} at {provider!r} is defined twice (also models[{first}])"
                    yield Finding((*path, "id"), what, "Remove one; the same model may stand at several providers")
            other = spellings.setdefault(normal_name(identifier), identifier)
            if other != identifier:
                what = f"{identifier!r} and {other!r} differ only in spelling"
                yield Finding((*path, "id"), what, "Give one id to both, or callers have to spell them exactly", True)
        if all(_is_zero(model.get(name, "0")) for name in ("input_usd", "output_usd", "request_usd")):
            what = f"model {identifier!r} is free: callers pay nothing for it"
            yield Finding((*path, "input_usd"), what, "Set input_usd and output_usd unless that is meant", True)
        context, output = model.get("context_tokens", 128_000), model.get("max_output_tokens", 16_384)
        if isinstance(context, int) and isinstance(output, int) and output > context:
            what = f"max_output_tokens ({output}) of {identifier!r} is more than its context_tokens ({context})"
            yield Finding((*path, "context_tokens"), what, "Correct one of the two")


def _is_zero(amount: Any) -> bool:
    return isinstance(amount, str | int) and not str(amount).strip("0.")


def _routing(data: Mapping[str, Any]) -> Iterator[Finding]:
    routing = data.get("routing")
    if not isinstance(routing, dict):
        return
    pairs = [(model["id"], model.get("provider")) for _, model in _tables(data, "models") if _is_text(model, "id")]
    ids = list(dict.fromkeys(identifier for identifier, _ in pairs))
    known = {*ids, *(f"{identifier}@{provider}" for identifier, provider in pairs)}

    def unknown(path: KeyPath, name: Any, allowed: set[str]) -> Iterator[Finding]:
        if isinstance(name, str) and name not in allowed:
            fix = _did_you_mean(name, ids, "Use the id of one of the [[models]]")
            yield Finding(path, f"{dotted(path)}: there is no model {name!r}", fix)

    fallbacks = routing.get("fallbacks")
    for model, names in fallbacks.items() if isinstance(fallbacks, dict) else ():
        path: KeyPath = ("routing", "fallbacks", model)
        yield from unknown(path, model, set(ids))
        for index, name in enumerate(names if isinstance(names, list) else ()):
            yield from unknown((*path, index), name, known | {"auto"})
            if name == model:
                yield Finding((*path, index), f"{model!r} falls back to itself", "Name another model")
    auto_models = routing.get("auto_models")
    for index, name in enumerate(auto_models if isinstance(auto_models, list) else ()):
        yield from unknown(("routing", "auto_models", index), name, known)


def _networks(data: Mapping[str, Any]) -> Iterator[Finding]:
    chains: dict[Any, int] = {}
    yield from _address(("pay_to",), data.get("pay_to"))
    for index, network in _tables(data, "networks"):
        path: KeyPath = ("networks", index)
        chain_id = network.get("chain_id")
        first = chains.setdefault(chain_id, index)
        if first != index:
            yield Finding(
                (*path, "chain_id"), f"chain {chain_id} is configured twice", f"Merge it with networks[{first}]"
            )
        for name in ("pay_to", "batch_contract", "deposit_factory"):
            yield from _address((*path, name), network.get(name))
        factories = network.get("wallet_factories")
        for place, factory in enumerate(factories if isinstance(factories, list) else ()):
            yield from _address((*path, "wallet_factories", place), factory)
        if network.get("pay_to") is None and data.get("pay_to") is None:
            what = f"nothing says where payments on chain {chain_id} go"
            yield Finding(path, what, "Set pay_to at the top of the file, or here, to the treasury's address")
        urls = network.get("rpc_urls")
        for place, url in enumerate(urls if isinstance(urls, list) else ()):
            if isinstance(url, str) and not _is_url(url):
                here = (*path, "rpc_urls", place)
                yield Finding(here, f"{dotted(here)} is not a URL", "Write it like https://mainnet.base.org")
        yield from _resolution(path, network, network.get("pay_to") or data.get("pay_to"))


def _resolution(path: KeyPath, network: dict[str, Any], pay_to: Any) -> Iterator[Finding]:
    try:
        # The URLs are reported by themselves and must not keep the tokens from being looked at.
        settings = NetworkSettings(**{**network, "rpc_urls": ["http://localhost"]})
    except ValidationError:
        return  # reported field by field
    try:
        resolved = settings.resolve()
    except ValueError as error:
        what, _, fix = str(error).partition(": ")
        yield Finding(path, what, fix[:1].upper() + fix[1:] or "Correct it")
        return
    if isinstance(pay_to, str) and (token := resolved.token_at(pay_to)) is not None:
        what = f"pay_to is the contract of {token.symbol} itself: what is paid there is lost"
        yield Finding((*path, "pay_to"), what, "Set pay_to to the treasury's address")


def _address(path: KeyPath, address: Any) -> Iterator[Finding]:
    if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
        return
    if address == ZERO_ADDRESS:
        yield Finding(
            path, f"{dotted(path)} is the zero address: what is paid there is lost", "Set the treasury's address"
        )
    digits = address[2:]
    if digits not in (digits.lower(), digits.upper()) and address != _checksummed(address):
        fix = "Copy it again; the checksum in its capitals (EIP-55) does not fit"
        yield Finding(path, f"{dotted(path)} has a typing mistake", fix)


def _checksummed(address: str) -> str:
    from payments.verification.signatures import checksum_address

    return checksum_address(address)


def _keys(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys are never repeated in a message."""
    fix = "A private key is 0x and 64 hex digits"
    addresses: dict[str, int] = {}
    signer_keys = data.get("signer_keys")
    for index, key in enumerate(signer_keys if isinstance(signer_keys, list) else ()):
        address = _address_of(key)
        if address is None:
            yield Finding(("signer_keys", index), f"signer_keys[{index}] is not a private key", fix)
        elif addresses.setdefault(address, index) != index:
            what = f"signer_keys[{index}] is the same key as signer_keys[{addresses[address]}]"
            yield Finding(("signer_keys", index), what, "Each signer needs a key of its own")
    treasury_key = data.get("treasury_key")
    if treasury_key is not None:
        address = _address_of(treasury_key)
        if address is None:
            yield Finding(("treasury_key",), "the treasury key is not a private key", fix)
            return
        for pay_to in sorted(_pay_to_addresses(data)):
            if pay_to.lower() != address:
                what = f"the treasury key belongs to {address}, but payments go to {pay_to}, so it could refund nobody"
                yield Finding(("treasury_key",), what, "Set pay_to to the key's address, or use the key of pay_to")


def _pay_to_addresses(data: Mapping[str, Any]) -> set[str]:
    found = {data.get("pay_to"), *(network.get("pay_to") for _, network in _tables(data, "networks"))}
    return {address for address in found if isinstance(address, str) and _ADDRESS.fullmatch(address)}


def _address_of(key: Any) -> str | None:
    if not isinstance(key, str) or not re.fullmatch(r"(0x)?[0-9a-fA-F]{64}", key):
        return None
    import coincurve

    from payments.chain.transactions import address_of

    try:
        return address_of(coincurve.PrivateKey(bytes.fromhex(key.removeprefix("0x"))))
    except ValueError:
        return None


def _service(data: Mapping[str, Any]) -> Iterator[Finding]:
    public_url, database_url = data.get("public_url"), data.get("database_url")
    if isinstance(public_url, str) and not _is_url(public_url):
        yield Finding(("public_url",), "public_url is not a URL", "Write it like https://gateway.example.com")
    if isinstance(database_url, str) and not re.fullmatch(r"sqlite:///.+|postgres(ql)?://.+", database_url):
        fix = "Write sqlite:///path/to/farebox.db or postgresql://user@host/database"
        yield Finding(("database_url",), "only SQLite and PostgreSQL databases can be used", fix)
    if data.get("networks"):
        if not data.get("secret"):
            what = "not set; quotes cannot outlive a restart or be shared by replicas"
            yield Finding(
                ("secret",), what, "Set it to 32 random characters or more, e.g. from `openssl rand -hex 32`", True
            )
        if not data.get("signer_keys"):
            what = "not set; payments on a chain cannot be settled"
            yield Finding(("signer_keys",), what, """Set it to a JSON list of private keys: '["0x…"]'""", True)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
