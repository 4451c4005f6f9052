"""Approving Permit2 for a token, once, so that signed payments in it can be settled.

Tokens without EIP-3009 (most USDT) move through the Permit2 contract, which needs one ordinary transaction of the wallet
before: `approve`. It costs gas in the chain's own coin, so it needs an RPC server and a little of that coin.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx

from agents_sdk.errors import AnswerUnreadable, ApprovalFailed, ApprovalNeeded
from agents_sdk.money import nano_to_atomic_up, usd_to_nano
from agents_sdk.shared import Shared
from agents_sdk.steps import Sleep, Steps, fetch
from agents_sdk.tokens import PERMIT2_ADDRESS, Token
from agents_sdk.wallet import Wallet

UNLIMITED = 2**256 - 1
MINED_WAIT_S = 180
POLL_S = 0.25
LEASE_S = 2 * MINED_WAIT_S + 40
_ALLOWANCE = "dd62ed3e"
_APPROVE = "095ea7b3"
_log = logging.getLogger("farebox.agent")


def ensure_allowance(shared: Shared, token: Token, amount: int, *, asked_to: bool) -> Steps[None]:
    """Make sure that Permit2 may move `amount` atomic units: approve once, whoever else is at it.

    Args:
        shared: The agent's state.
        token: A token that moves through Permit2.
        amount: What the payment at hand moves, in atomic units.
        asked_to: The gateway said that the allowance does not suffice. Without an RPC server that is an error; before
            anybody said so it is not, because the approval may have been made elsewhere.

    Raises:
        ApprovalNeeded: There is no RPC server to do it with.
        ApprovalFailed: It was tried and did not work.
    """
    rpc_url, payer = shared.rpc_url(token.network), shared.wallet.address
    if rpc_url is None:
        if asked_to:
            raise ApprovalNeeded(
                f"{token.symbol} on {token.network} moves through Permit2, which {payer} has not approved yet: give the agent "
                "an rpc_url and a little gas to do it once, or pay by `exact` in a token that needs no approval (USDC)"
            )
        return
    known = shared.allowances.get(token.asset, 0)
    if known >= amount and not asked_to:
        shared.allowances[token.asset] = known - amount
        return
    lease = f"approve|{token.asset}|{payer}"
    waits = 0
    while not shared.journal.take_lease(lease, LEASE_S):
        waits += 1
        if waits * POLL_S > LEASE_S:
            raise ApprovalFailed(f"another process has been approving {token.symbol} for too long")
        yield Sleep(POLL_S)
    try:
        current = yield from read_allowance(rpc_url, shared.wallet, token)
        if current < amount:
            wanted = _wanted(shared.settings.policy.permit2_allowance, token, amount)
            done = yield from approve(rpc_url, shared.wallet, token, current=current, amount=wanted)
            _log.info("approved Permit2 for %s on %s: %s", token.symbol, token.network, done)
            current = wanted
        shared.allowances[token.asset] = current - amount
    finally:
        shared.journal.end_lease(lease)


def _wanted(allowance: str, token: Token, amount: int) -> int:
    if allowance == "unlimited":
        return UNLIMITED
    return max(amount, nano_to_atomic_up(usd_to_nano(allowance), token.decimals))


class _RpcFailed(Exception):
    """The server answered with an error (such as a call that reverts)."""


def read_allowance(rpc_url: httpx.URL, wallet: Wallet, token: Token) -> Steps[int]:
    """How much of `token` Permit2 may move, in atomic units.

    Raises:
        ApprovalFailed: If the RPC server is of another chain or cannot say.
        httpx.TransportError: If it does not answer.
    """
    try:
        chain_id = yield from _quantity(rpc_url, "eth_chainId")
        if chain_id != token.chain_id:
            raise ApprovalFailed(f"the RPC server is of chain {chain_id}, but {token.symbol} is on {token.chain_id}")
        data = "0x" + _ALLOWANCE + _word(int(wallet.address, 16)) + _word(int(PERMIT2_ADDRESS, 16))
        return (yield from _quantity(rpc_url, "eth_call", {"to": token.address, "data": data}, "latest"))
    except _RpcFailed as error:
        raise ApprovalFailed(f"the allowance of {token.symbol} cannot be read: {error}") from error


def approve(rpc_url: httpx.URL, wallet: Wallet, token: Token, *, current: int, amount: int) -> Steps[str]:
    """Let Permit2 move `amount` atomic units of `token`, and wait until that is mined.

    Args:
        rpc_url: A JSON-RPC server of the token's chain.
        wallet: Signs, and pays the gas.
        token: The token.
        current: The allowance there is. USDT refuses to change one that is not zero, so it is set to zero first if need be.
        amount: The new allowance.

    Returns:
        The hash of the transaction.

    Raises:
        ApprovalFailed: No gas, reverted, or not mined in time.
    """
    try:
        try:
            gas = yield from _estimate(rpc_url, wallet, token, amount)
        except _RpcFailed:
            if current == 0:
                raise
            yield from _send(rpc_url, wallet, token, 0, (yield from _estimate(rpc_url, wallet, token, 0)))
            gas = yield from _estimate(rpc_url, wallet, token, amount)
        return (yield from _send(rpc_url, wallet, token, amount, gas))
    except _RpcFailed as error:
        raise ApprovalFailed(f"approving Permit2 for {token.symbol} failed: {error}") from error


def _call_data(amount: int) -> str:
    return "0x" + _APPROVE + _word(int(PERMIT2_ADDRESS, 16)) + _word(amount)


def _estimate(rpc_url: httpx.URL, wallet: Wallet, token: Token, amount: int) -> Steps[int]:
    call = {"from": wallet.address, "to": token.address, "data": _call_data(amount)}
    estimate = yield from _quantity(rpc_url, "eth_estimateGas", call)
    return estimate * 5 // 4


def _send(rpc_url: httpx.URL, wallet: Wallet, token: Token, amount: int, gas: int) -> Steps[str]:
    fees, price = yield from _fees(rpc_url)
    balance = yield from _quantity(rpc_url, "eth_getBalance", wallet.address, "latest")
    if balance < gas * price:
        raise ApprovalFailed(
            f"approving Permit2 for {token.symbol} costs up to {gas * price} wei of gas on {token.network}, and "
            f"{wallet.address} has {balance}; send it some of the chain's own coin, or pay in a token that needs no "
            "approval (USDC)"
        )
    nonce = yield from _quantity(rpc_url, "eth_getTransactionCount", wallet.address, "pending")
    raw = wallet.sign_transaction(
        {
            "chainId": token.chain_id,
            "nonce": nonce,
            "to": bytes.fromhex(token.address[2:]),
            "value": 0,
            "gas": gas,
            "data": _call_data(amount),
            **fees,
        }
    )
    transaction_hash = str((yield from _rpc(rpc_url, "eth_sendRawTransaction", raw)))
    for _ in range(int(MINED_WAIT_S / POLL_S)):
        receipt = yield from _rpc(rpc_url, "eth_getTransactionReceipt", transaction_hash)
        if receipt is not None:
            if int(receipt["status"], 16) != 1:
                raise ApprovalFailed(f"the approval {transaction_hash} was reverted")
            return transaction_hash
        yield Sleep(POLL_S)
    raise ApprovalFailed(f"the approval {transaction_hash} was not mined within {MINED_WAIT_S} s; try again later")


def _fees(rpc_url: httpx.URL) -> Steps[tuple[dict[str, int], int]]:
    """Fee fields of a transaction, and the most that one unit of gas may cost with them."""
    block = yield from _rpc(rpc_url, "eth_getBlockByNumber", "latest", False)
    if not block.get("baseFeePerGas"):
        price = yield from _quantity(rpc_url, "eth_gasPrice")
        return {"gasPrice": price}, price
    try:
        priority = yield from _quantity(rpc_url, "eth_maxPriorityFeePerGas")
    except _RpcFailed:
        priority = 1_000_000
    price = 2 * int(block["baseFeePerGas"], 16) + priority
    return {"maxFeePerGas": price, "maxPriorityFeePerGas": priority, "type": 2}, price


def _quantity(rpc_url: httpx.URL, method: str, *params: Any) -> Steps[int]:
    value = yield from _rpc(rpc_url, method, *params)
    try:
        return int(value, 16)
    except (TypeError, ValueError):
        raise _RpcFailed(f"{method} answered {value!r}") from None


def _rpc(rpc_url: httpx.URL, method: str, *params: Any) -> Steps[Any]:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    reply, content = yield from fetch("POST", rpc_url, body)
    try:
        document = json.loads(content)
        if "error" in document:
            raise _RpcFailed(str(document["error"].get("message", document["error"])))
        return document["result"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnswerUnreadable(f"the RPC server answered {method} with HTTP {reply.status} and no JSON-RPC") from error


def _word(value: int) -> str:
    return f"{value:064x}"
