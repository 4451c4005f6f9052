"""Where the chain keeps the nonces of payers' authorizations, at the token (EIP-3009) or at Permit2, and what ends them."""

from __future__ import annotations

from payments.chain.logs import Log, get_logs
from payments.chain.networks import PERMIT2_ADDRESS
from payments.chain.rpc import Rpc
from payments.chain.transactions import (
    AUTHORIZATION_CANCELED_TOPIC,
    AUTHORIZATION_USED_TOPIC,
    NONCES_INVALIDATED_TOPIC,
    WORD,
    address_topic,
    encode_authorization_state,
    encode_nonce_bitmap,
    nonce_is_set,
)
from payments.settlement.orders import NonceRead, Search, SettlementOrder

End = tuple[int, int]
"""A place on the chain: a block, and a log in it."""


def nonce_read(order: SettlementOrder, *, permit2: bool) -> NonceRead:
    """Where the chain keeps the nonce of an order: at Permit2, or at the token itself."""
    payer, nonce = order.payer, order.authorization_nonce
    assert nonce is not None
    if permit2:
        return NonceRead(PERMIT2_ADDRESS, encode_nonce_bitmap(payer, nonce), nonce, in_bitmap=True)
    return NonceRead(order.token, encode_authorization_state(payer, nonce), nonce, in_bitmap=False)


async def is_used(rpc: Rpc, nonce: NonceRead, block: int) -> bool:
    """Whether an authorization was used or cancelled up to a block; errors as for `Rpc.call`."""
    return nonce.is_used(await rpc.call(*nonce.request(block)))


async def end_of(nonce: NonceRead, payer: str, where: Search) -> End | None:
    """Where a log says first what consumed a nonce: that it was cancelled or, at the token, used. None if no log says it.

    Asked before evidence is looked for: a node that has this log has the earlier ones. A nonce of Permit2 that was used leaves
    none, but one may follow that cancels it all the same.

    Raises:
        RpcError: A node refused.
        RpcUnavailable: No node answered.
    """
    topics: list[str | list[str] | None]
    if nonce.in_bitmap:
        topics = [NONCES_INVALIDATED_TOPIC, address_topic(payer)]
    else:
        ends = [AUTHORIZATION_USED_TOPIC, AUTHORIZATION_CANCELED_TOPIC]
        topics = [ends, address_topic(payer), f"0x{nonce.nonce:064x}"]
    logs = await get_logs(where.rpc, nonce.to, topics, where.earliest, where.head)
    if nonce.in_bitmap:
        logs = [log for log in logs if _cancels(log, nonce.nonce)]
    return min(map(place_of, logs), default=None)


def place_of(log: Log) -> End:
    """Where a log stands."""
    return int(log["blockNumber"], 16), int(log["logIndex"], 16)


def _cancels(log: Log, nonce: int) -> bool:
    place, mask = int(log["data"][2 : 2 + 2 * WORD], 16), int(log["data"][2 + 2 * WORD :], 16)
    return place == nonce >> 8 and nonce_is_set(mask, nonce)
