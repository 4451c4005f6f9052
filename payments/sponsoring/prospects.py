"""What the chain says of an approval before anything is given for it: that it would come through, and the payment after it.

Everything is asked in one round trip. Where the node can simulate several calls in a row (`eth_simulateV1`), approval and
settlement are tried together; elsewhere the approval and a plain transfer of the same amount are tried by themselves.
"""

from __future__ import annotations

from typing import Any

from payments.chain.foreign_transactions import ForeignTransaction
from payments.chain.replies import Reply
from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.chain.transactions import encode_transfer, selector
from payments.errors import PaymentRefused, SettlementUnavailable
from payments.settlement.orders import SettlementOrder
from payments.verification.approvals import GAS_MAX

OP_STACK_ORACLE = "0x420000000000000000000000000000000000000f"
_L1_FEE = selector("getL1Fee(bytes)")
L1_FEE_MARGIN_PERCENT = 50
"""What a rollup charges for publishing may rise until the approval is mined."""
BASE_FEE_RISE = (9, 8)
"""In one block."""


async def lacking(rpc: Rpc, transaction: ForeignTransaction, order: SettlementOrder, sender: str) -> int:
    """Wei that the payer lacks to send its approval, if that would come through and the payment after it; 0 if it has enough.

    Args:
        rpc: The chain.
        transaction: The payer's approval.
        order: What settles the payment once the approval is there.
        sender: Who makes the order's call, lower-case hex.

    Raises:
        PaymentRefused: ``erc20_approval_nonce``, ``erc20_approval_tx_gas``, ``erc20_approval_tx_fees``,
            ``erc20_approval_needs_a_key`` or ``transfer_would_fail``.
        SettlementUnavailable: The chain cannot be asked.
    """
    try:
        return _judge(transaction, await rpc.batch(_requests(transaction, order, sender)))
    except (RpcUnavailable, ValueError) as error:  # ValueError: nonsense from a node
        raise _unavailable() from error


def _judge(transaction: ForeignTransaction, replies: list[Reply]) -> int:
    latest, pending, balance, code, block, estimate, transfer, l1_fee, simulated = replies
    for reply in (latest, pending, balance, code, block):
        if isinstance(reply, RpcError):
            raise _unavailable() from reply
    _check_account(transaction, int(str(latest), 16), int(str(pending), 16), code)
    _check_fees(transaction, block)
    _check_gas(transaction, estimate)
    _check_settling(transfer, simulated)
    return max(transaction.cost_max + _publishing(l1_fee) - int(str(balance), 16), 0)


def _requests(transaction: ForeignTransaction, order: SettlementOrder, sender: str) -> list[Request]:
    payer, call = transaction.sender, transaction.call
    approve = {"from": payer, "to": call.to, "data": "0x" + call.data.hex()}
    settle = {"from": sender, "to": order.call_to, "data": "0x" + order.call_data.hex()}
    transfer = {"from": payer, "to": order.token, "data": "0x" + encode_transfer(order.pay_to, order.value).hex()}
    raw = transaction.raw + b"\0" * (-len(transaction.raw) % 32)
    publishing = (_L1_FEE + (32).to_bytes(32, "big") + len(transaction.raw).to_bytes(32, "big") + raw).hex()
    return [
        ("eth_getTransactionCount", (payer, "latest")),
        ("eth_getTransactionCount", (payer, "pending")),
        ("eth_getBalance", (payer, "latest")),
        ("eth_getCode", (payer, "latest")),
        ("eth_getBlockByNumber", ("latest", False)),
        ("eth_estimateGas", (approve,)),
        ("eth_call", (transfer, "latest")),
        ("eth_call", ({"to": OP_STACK_ORACLE, "data": "0x" + publishing}, "latest")),
        ("eth_simulateV1", ({"blockStateCalls": [{"calls": [approve, settle]}]}, "latest")),
    ]


def _check_account(transaction: ForeignTransaction, latest: int, pending: int, code: Any) -> None:
    if len(str(code)) > len("0x"):
        # It can undo in the same block whatever it has approved, at no cost.
        raise PaymentRefused("erc20_approval_needs_a_key", "approvals are paid for only for accounts without code")
    if not transaction.nonce == latest == pending:
        raise PaymentRefused(
            "erc20_approval_nonce",
            f"the approval's transaction must have the wallet's next nonce, {latest}, and no other may wait to be mined",
        )


def _check_fees(transaction: ForeignTransaction, block: Any) -> None:
    base_fee = int(str((block or {}).get("baseFeePerGas") or "0x0"), 16)
    least = base_fee * BASE_FEE_RISE[0] // BASE_FEE_RISE[1]
    if transaction.fees.max_fee < least:
        raise PaymentRefused(
            "erc20_approval_tx_fees", f"the approval's transaction must offer at least {least} wei a unit of gas"
        )


def _check_gas(transaction: ForeignTransaction, estimate: Reply) -> None:
    if isinstance(estimate, RpcError):
        raise PaymentRefused("transfer_would_fail", f"the token refuses the approval: {estimate.message}")
    needed = int(str(estimate), 16)
    if not needed <= transaction.call.gas <= max(GAS_MAX, 2 * needed):
        raise PaymentRefused(
            "erc20_approval_tx_gas",
            f"the gas limit of the approval's transaction must be from {needed} to {max(GAS_MAX, 2 * needed)}",
        )


def _check_settling(transfer: Reply, simulated: Reply) -> None:
    calls = _simulated_calls(simulated)
    if calls is not None:
        for call in calls:
            if call.get("status") != "0x1":
                error = call.get("error")
                reason = error.get("message") if isinstance(error, dict) else "reverted"
                raise PaymentRefused("transfer_would_fail", f"the payment would fail after its approval: {reason}")
    elif isinstance(transfer, RpcError):
        raise PaymentRefused("transfer_would_fail", f"the token refuses the transfer: {transfer.message}")


def _simulated_calls(simulated: Reply) -> list[dict[str, Any]] | None:
    """What became of approval and settlement; None if this node cannot try them in a row."""
    if isinstance(simulated, RpcError) or not isinstance(simulated, list) or len(simulated) != 1:
        return None
    calls = simulated[0].get("calls") if isinstance(simulated[0], dict) else None
    if not isinstance(calls, list) or len(calls) != 2 or not all(isinstance(call, dict) for call in calls):
        return None
    return calls


def _publishing(l1_fee: Reply) -> int:
    """Wei that an OP-stack rollup charges besides for the transaction's bytes; nothing on other chains."""
    if not isinstance(l1_fee, str) or len(l1_fee) != len("0x") + 64:
        return 0
    return int(l1_fee, 16) * (100 + L1_FEE_MARGIN_PERCENT) // 100


def _unavailable() -> SettlementUnavailable:
    return SettlementUnavailable("chain_unavailable", "the chain cannot be asked; send the same payment again")
