"""What the chain says before a deposit into a channel is made."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from payments.chain.channel_contract import ChannelState, decode_states, encode_deposit, states_call
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, PERMIT2_ADDRESS, Token
from payments.chain.rpc import Rpc, RpcError, RpcUnavailable
from payments.chain.transactions import WORD, decode_revert, encode_allowance, encode_balance_of
from payments.errors import PaymentError, PaymentRefused, SettlementUnavailable
from payments.promises import Cover, Earlier, Funds, InUse, Needed
from payments.verification.chain_state import LOOK_AGAIN_S, LOOKS_MAX, insufficient_funds, is_fresh, lacks_allowance
from payments.x402.channels import DEPOSIT_SIMULATION, ChannelConfig, Deposit, Erc3009Deposit, Permit2Deposit
from payments.x402.extensions.eip2612 import Eip2612Permit


@dataclass(frozen=True, slots=True)
class DepositLook:
    """A deposit that would succeed: its channel before it, as of a block, and what its payer has."""

    block: int
    state: ChannelState
    cover: Cover


async def check_deposit(
    rpc: Rpc,
    channel: int,
    config: ChannelConfig,
    deposit: Deposit,
    token: Token,
    earlier: Earlier,
    permit: Eip2612Permit | None = None,
) -> DepositLook:
    """Ask the chain whether a deposit would succeed now: funds, allowance and the very call, in one round trip.

    Args:
        rpc: The chain.
        channel: The channel's id.
        config: What the channel is.
        deposit: Checked without the chain.
        token: What it is in.
        earlier: What the payer has under way already.
        permit: Comes with it, and gives the allowance.

    Raises:
        PaymentRefused: It would fail.
        AllowanceRequired: Permit2 may not move the token yet.
        SettlementUnavailable: The chain cannot be asked.
    """
    permitted = isinstance(deposit, Permit2Deposit)
    needed = Needed(deposit.amount, deposit.amount if permitted else 0, permit is not None)
    call = encode_deposit(config, deposit, permit)
    for look in range(1, LOOKS_MAX + 1):
        block, state, funds, simulated = await _look(rpc, channel, config, call, token)
        if not simulated[0] and isinstance(deposit, Erc3009Deposit) and is_fresh(deposit.valid_after):
            simulated = await _simulate_next(rpc, call, simulated)
        problem = _judge(needed, token, funds, earlier.in_use, simulated)
        if problem is None:
            return DepositLook(block, state, Cover(funds, needed, earlier))
        if look == LOOKS_MAX or _judge(needed, token, funds, InUse(), simulated) is not None:
            raise problem
        # Perhaps what is promised has just left the balance, and only we do not know yet.
        await asyncio.sleep(LOOK_AGAIN_S)
        earlier = await earlier.again()
    raise AssertionError


def unavailable() -> SettlementUnavailable:
    """The chain cannot be asked now."""
    return SettlementUnavailable("chain_unavailable", "the chain cannot be asked; send the same payment again")


async def _look(
    rpc: Rpc, channel: int, config: ChannelConfig, call: bytes, token: Token
) -> tuple[int, ChannelState, Funds, tuple[bool, bytes]]:
    more = [
        (token.address, encode_balance_of(config.payer)),
        (token.address, encode_allowance(config.payer, PERMIT2_ADDRESS)),
        (BATCH_SETTLEMENT_ADDRESS, call),
    ]
    try:
        (answer,) = await rpc.ask([states_call([channel], more)])
        block, (state,), (balance, allowance, simulated) = decode_states(answer, 1, len(more))
        funds = Funds(_number(balance), _number(allowance))
    except (RpcUnavailable, RpcError, ValueError) as error:
        raise unavailable() from error
    return block, state, funds, simulated


async def _simulate_next(rpc: Rpc, call: bytes, before: tuple[bool, bytes]) -> tuple[bool, bytes]:
    """What the call would do in the block that is being made; if it fails there too, what it said `before`."""
    try:
        await rpc.call("eth_call", [{"to": BATCH_SETTLEMENT_ADDRESS, "data": "0x" + call.hex()}, "pending"])
    except RpcError:
        return before
    except RpcUnavailable as error:
        raise unavailable() from error
    return True, b""


def _judge(
    needed: Needed, token: Token, funds: Funds, promised: InUse, simulated: tuple[bool, bytes]
) -> PaymentError | None:
    succeeded, returned = simulated
    if succeeded and funds.cover(needed, promised):
        return None
    if funds.balance - promised.balance < needed.balance:
        return insufficient_funds(funds.balance - promised.balance, needed.balance, token)
    if not funds.allow(needed, promised):
        return lacks_allowance(needed, promised, token)
    return PaymentRefused(DEPOSIT_SIMULATION, f"the contract refuses the deposit: {decode_revert(returned)}")


def _number(result: tuple[bool, bytes]) -> int:
    succeeded, returned = result
    if not succeeded or len(returned) < WORD:
        raise ValueError("a contract that should be there did not answer")
    return int.from_bytes(returned[:WORD], "big")
