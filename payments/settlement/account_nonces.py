"""Which transaction used an account's nonce, as the chain's blocks have it.

A node that lacks a receipt may have it in a moment: its index of transactions lags behind its state, or is built anew. A block
holds its transactions itself, so only it proves that a nonce was used by another one than ours.
"""

from __future__ import annotations

from payments.chain.rpc import Rpc


async def user_of(rpc: Rpc, address: str, nonce: int, head: int) -> str | None:
    """The hash of the transaction that used a nonce, up to block `head`; None if no block shows one.

    Costs about two round trips for each doubling of how long ago that was.

    Args:
        rpc: The chain.
        address: The account, lower-case hex.
        nonce: Which.
        head: A block by which the nonce is used.

    Raises:
        RpcError: A node refused, as one may that forgets old states: nobody knows then.
        RpcUnavailable: No node answered.
    """
    # The nonce is used in (unused, used].
    used, distance = head, 1
    while (unused := max(used - distance, -1)) >= 0 and await _count(rpc, address, unused) > nonce:
        used, distance = unused, 2 * distance
    while used - unused > 1:
        middle = (used + unused) // 2
        if await _count(rpc, address, middle) > nonce:
            used = middle
        else:
            unused = middle
    block = await rpc.call("eth_getBlockByNumber", (hex(used), True))
    for transaction in (block or {}).get("transactions", ()):
        if transaction["from"].lower() == address and int(transaction["nonce"], 16) == nonce:
            return str(transaction["hash"])
    return None


async def _count(rpc: Rpc, address: str, number: int) -> int:
    return int(await rpc.call("eth_getTransactionCount", (address, hex(number))), 16)
