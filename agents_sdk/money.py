"""Dollar texts and token units as integers. No floats, and one rounding: up, towards what is really paid."""

from __future__ import annotations

import re

NANO_DECIMALS = 9
NANO_PER_USD = 1_000_000_000
_USD = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?", re.ASCII)


def usd_to_nano(text: str) -> int:
    """Read a dollar amount such as ``"0.05"`` (at most nine decimals, no sign) as nano-USD (1e-9 $).

    Raises:
        ValueError: If the text is anything else.
    """
    match = _USD.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is not a dollar amount such as '0.05' (a text with at most nine decimals)")
    return int(match[1]) * NANO_PER_USD + int((match[2] or "").ljust(NANO_DECIMALS, "0"))


def nano_to_usd(amount_nano_usd: int) -> str:
    """Write nano-USD as dollars, with at least two decimals and as many as it takes."""
    sign = "-" if amount_nano_usd < 0 else ""
    whole, fraction = divmod(abs(amount_nano_usd), NANO_PER_USD)
    decimals = f"{fraction:0{NANO_DECIMALS}d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals}"


def nano_to_atomic_up(amount_nano_usd: int, decimals: int) -> int:
    """The least number of a token's atomic units that is worth `amount_nano_usd`."""
    shift = decimals - NANO_DECIMALS
    scale = int(10 ** abs(shift))
    return amount_nano_usd * scale if shift >= 0 else -(-amount_nano_usd // scale)


def atomic_to_nano_down(amount: int, decimals: int) -> int:
    """What a number of a token's atomic units is worth in whole nano-USD, rounded down."""
    shift = NANO_DECIMALS - decimals
    scale = int(10 ** abs(shift))
    return amount * scale if shift >= 0 else amount // scale


def nano_to_atomic_down(amount_nano_usd: int, decimals: int) -> int:
    """The largest number of a token's atomic units that is worth at most `amount_nano_usd`."""
    shift = decimals - NANO_DECIMALS
    scale = int(10 ** abs(shift))
    return amount_nano_usd * scale if shift >= 0 else amount_nano_usd // scale
