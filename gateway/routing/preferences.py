"""What a caller may say about routing, in the fields that clients already send (OpenRouter's `provider`) and in our own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, get_args

from gateway.api.errors import ApiError
from gateway.routing.strategies import STRATEGIES, Sort
from gateway.settings import StrategyName
from payments.money import usd_to_nano

STRATEGY_HEADER = "x-farebox-strategy"
NAMES_MAX = 50
SORTS: tuple[Sort, ...] = get_args(Sort)


@dataclass(frozen=True, slots=True)
class MaxPrice:
    """The dearest that a candidate may be: nano-USD per million tokens, and per request. None: no limit."""

    input: int | None = None
    output: int | None = None
    request: int | None = None


@dataclass(frozen=True, slots=True)
class Preferences:
    """One request's wishes. `strategy` None means the configured one. Provider names are compared without case."""

    strategy: StrategyName | None = None
    sort: Sort | None = None
    order: tuple[str, ...] = ()
    """These providers first, in this order."""
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    max_price: MaxPrice | None = None
    allow_fallbacks: bool = True


def parse_preferences(body: Mapping[str, Any], headers: Mapping[str, str]) -> Preferences:
    """Read the preferences of a request.

    Args:
        body: The request's JSON object; `provider` and `farebox` are read, the rest ignored.
        headers: With lower-case names. The header's strategy wins over the body's.

    Raises:
        ApiError: 400 for a wrong or unknown field, naming it: a wish must never be dropped in silence.
    """
    provider = _object(body.get("provider"), "provider")
    own = _object(body.get("farebox"), "farebox")
    if body.get("strategy") is not None:
        raise _wrong(
            "strategy", f"say it as farebox.strategy, or in the header {STRATEGY_HEADER}", "unknown_preference"
        )
    for name in own:
        if name != "strategy":
            raise _unknown(name, "farebox", ["strategy"])
    values: dict[str, Any] = {}
    for name, value in provider.items():
        if value is None:
            continue
        reader = _READERS.get(name)
        if reader is None:
            raise _unknown(name, "provider", list(_READERS))
        values[name] = reader(value, f"provider.{name}")
    values.pop("require_parameters", None)
    values.pop("data_collection", None)
    values.pop("zdr", None)
    strategy = headers.get(STRATEGY_HEADER)
    if strategy is not None:
        values["strategy"] = _choice(strategy.strip().lower(), f"the header {STRATEGY_HEADER}", tuple(STRATEGIES))
    elif own.get("strategy") is not None:
        values["strategy"] = _choice(own["strategy"], "farebox.strategy", tuple(STRATEGIES))
    return Preferences(**values)


def _wrong(param: str, message: str, code: str = "invalid_preference") -> ApiError:
    return ApiError(400, code, f"{param}: {message}", param=param)


def _unknown(name: str, parent: str, known: list[str]) -> ApiError:
    near = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return _wrong(f"{parent}.{name[:100]}", f"not supported by this gateway; {hint}", "unknown_preference")


def _object(value: Any, param: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(param, "must be an object")
    return value


def _names(value: Any, param: str) -> tuple[str, ...]:
    if (
        not isinstance(value, list)
        or len(value) > NAMES_MAX
        or not all(isinstance(name, str) and name for name in value)
    ):
        raise _wrong(param, f"must be a list of at most {NAMES_MAX} provider names")
    return tuple(name.casefold() for name in value)


def _flag(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(param, "must be true or false")
    return value


def _choice(value: Any, param: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _wrong(param, f"must be one of {', '.join(choices)}")
    return value


def _sort(value: Any, param: str) -> str:
    return _choice(value, param, SORTS)


def _max_price(value: Any, param: str) -> MaxPrice:
    limits: dict[str, int] = {}
    fields = {"prompt": "input", "completion": "output", "request": "request"}
    for name, amount in _object(value, param).items():
        if name not in fields:
            raise _unknown(name, param, list(fields))
        limits[fields[name]] = _dollars(amount, f"{param}.{name}")
    return MaxPrice(**limits)


def _dollars(value: Any, param: str) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _wrong(param, "must be dollars per million tokens (per request for `request`), such as 2.5")
    try:
        return usd_to_nano(value if isinstance(value, str) else format(Decimal(repr(value)), "f"))
    except ValueError:
        raise _wrong(param, "must be a dollar amount such as 2.5, not negative, with at most nine decimals") from None


def _data_collection(value: Any, param: str) -> str:
    if _choice(value, param, ("allow", "deny")) == "deny":
        raise _wrong(
            param,
            "this gateway stores no prompts itself, but does not know what its providers keep, so it cannot promise this; "
            "leave the field out and name trusted providers in provider.only",
            "preference_not_supported",
        )
    return "allow"


def _zero_retention(value: Any, param: str) -> bool:
    if _flag(value, param):
        _data_collection("deny", param)
    return False


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "order": _names,
    "only": _names,
    "ignore": _names,
    "allow_fallbacks": _flag,
    "sort": _sort,
    "max_price": _max_price,
    # Always so: a candidate that lacks what the request needs is never tried.
    "require_parameters": _flag,
    "data_collection": _data_collection,
    "zdr": _zero_retention,
}
