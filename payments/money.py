"""Amounts of money: nano-USD integers inside, token atomic units only at the chain's border.

One function rounds, `divide_up`, and every price, quote and charge goes through it. There are no floats here and no
Decimals on the request path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NANO_PER_USD = 1_000_000_000
NANO_DECIMALS = 9
TOKENS_PER_PRICE_UNIT = 1_000_000
"""Prices are nano-USD per this many tokens: hundreds of real prices are not whole per single token."""

_USD = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?", re.ASCII)


def usd_to_nano(text: str) -> int:
    """Read a dollar amount such as ``"0.05"``.

    Args:
        text: Digits with at most nine decimals; no sign, exponent, separator or currency mark.

    Returns:
        The amount in nano-USD.

    Raises:
        ValueError: If the text is anything else.
    """
    if not _USD.fullmatch(text):
        raise ValueError(f"{text!r} is not a dollar amount such as 0.05 (at most nine decimals)")
    whole, _, fraction = text.partition(".")
    return int(whole) * NANO_PER_USD + int(fraction.ljust(NANO_DECIMALS, "0") or "0")


def nano_to_usd(amount_nano_usd: int) -> str:
    """Write nano-USD as dollars without losing a digit: at least two decimals, at most nine."""
    sign = "-" if amount_nano_usd < 0 else ""
    whole, fraction = divmod(abs(amount_nano_usd), NANO_PER_USD)
    return f"{sign}{whole}.{f'{fraction:09d}'.rstrip('0').ljust(2, '0')}"


def divide_up(numerator: int, denominator: int) -> int:
    """Divide two non-negative integers, rounding up. The only rounding of money there is."""
    assert numerator >= 0
    assert denominator > 0
    return -(-numerator // denominator)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer consumed, in tokens. `input_tokens` includes the cached ones, `output_tokens` the reasoning."""

    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        assert min(self.input_tokens, self.cached_input_tokens, self.cache_write_tokens, self.output_tokens) >= 0
        assert self.cached_input_tokens + self.cache_write_tokens <= self.input_tokens


@dataclass(frozen=True, slots=True)
class Price:
    """What a candidate costs: nano-USD per million tokens, and nano-USD per request."""

    input: int
    output: int
    cached_input: int | None = None
    """None: cached input costs what other input costs."""
    cache_write: int | None = None
    """None: writing the cache costs what other input costs."""
    request: int = 0

    def cost(self, usage: Usage) -> int:
        """Sum the exact cost of `usage` and round it up once, to nano-USD."""
        cached_price = self.input if self.cached_input is None else self.cached_input
        write_price = self.input if self.cache_write is None else self.cache_write
        plain_input = usage.input_tokens - usage.cached_input_tokens - usage.cache_write_tokens
        scaled = (
            plain_input * self.input
            + usage.cached_input_tokens * cached_price
            + usage.cache_write_tokens * write_price
            + usage.output_tokens * self.output
        )
        return divide_up(scaled, TOKENS_PER_PRICE_UNIT) + self.request

    def maximum_cost(self, input_tokens: int, output_tokens: int) -> int:
        """The most that `input_tokens` in and `output_tokens` out can cost, whatever the cache does, in nano-USD."""
        dearest_input = max(self.input, self.cached_input or 0, self.cache_write or 0)
        scaled = input_tokens * dearest_input + output_tokens * self.output
        return divide_up(scaled, TOKENS_PER_PRICE_UNIT) + self.request


def _power_of_ten(exponent: int) -> int:
    return int(10**exponent)


def nano_to_atomic_up(amount_nano_usd: int, decimals: int) -> int:
    """Token atomic units worth at least `amount_nano_usd`: what a payer pays rounds up, the excess is credited."""
    if decimals >= NANO_DECIMALS:
        return amount_nano_usd * _power_of_ten(decimals - NANO_DECIMALS)
    return divide_up(amount_nano_usd, _power_of_ten(NANO_DECIMALS - decimals))


def nano_to_atomic_down(amount_nano_usd: int, decimals: int) -> int:
    """Token atomic units worth at most `amount_nano_usd`: what leaves rounds down."""
    if decimals >= NANO_DECIMALS:
        return amount_nano_usd * _power_of_ten(decimals - NANO_DECIMALS)
    return amount_nano_usd // _power_of_ten(NANO_DECIMALS - decimals)


def atomic_to_nano_down(value: int, decimals: int) -> int:
    """Nano-USD that `value` atomic units are worth, rounded down (below nine decimals it is exact)."""
    if decimals >= NANO_DECIMALS:
        return value // _power_of_ten(decimals - NANO_DECIMALS)
    return value * _power_of_ten(NANO_DECIMALS - decimals)
