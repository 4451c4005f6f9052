"""Runtime code of contracts that mean harm, a few bytes each, for `anvil_setCode`."""

from __future__ import annotations

from payments.chain.batches import EXECUTED_TOPIC

BURNS_ALL = "0x5b5f56"
"""Jumps to itself for ever."""
RETURNS_FALSE = "0x60205ff3"
RETURNS_TRUE = "0x60015f5260205ff3"
"""To whatever it is asked, and does nothing."""
RETURNS_MEGABYTES = "0x62200000" + "5ff3"
REVERTS_WITH_MEGABYTES = "0x62200000" + "5ffd"
"""Two of them. Whoever reads them pays for it, and more than it cost to make them."""
CALLS_BACK = (
    "0x365f5f37"  # its own calldata,
    "5f5f365f5f335af1"  # sent back to whoever called it;
    "5f55"  # whether that went well is kept in slot 0;
    f"60015f5260017f{EXECUTED_TOPIC[2:]}60205fa200"  # and it says `Executed(1, true)` as the batch contract would.
)
