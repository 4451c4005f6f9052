"""Whether a payer's signed approval of Permit2 is exactly that, as far as can be told without the chain.

It becomes a transaction that we bring to the chain and pay for, so everything in it has to be what it must be: nothing may be
moved, nobody else approved, no other contract called.

Source: x402 `specs/extensions/erc20_gas_sponsoring.md`.
"""

from __future__ import annotations

from payments.chain.foreign_transactions import ForeignTransaction, read_transaction
from payments.chain.networks import PERMIT2_ADDRESS, Network, Token
from payments.chain.signers import WEI_PER_GWEI
from payments.chain.transactions import Fees, address_word, selector, word
from payments.errors import PaymentRefused
from payments.x402.extensions.erc20_approval import Erc20Approval

GAS_MAX = 100_000
"""Of an approval: USDT on Ethereum uses 48,000, stock clients sign for 70,000."""
_APPROVE = selector("approve(address,uint256)")


def encode_approve(spender: str, amount: int) -> bytes:
    """Calldata of ERC-20 `approve`."""
    return _APPROVE + address_word(spender) + word(amount)


def check_approval(
    approval: Erc20Approval, payer: str, value: int, token: Token, network: Network
) -> ForeignTransaction:
    """Return the transaction if it does nothing but approve Permit2 for a payment of `value` atomic units.

    Raises:
        PaymentRefused: ``erc20_approval_from_mismatch``, ``erc20_approval_asset_mismatch``,
            ``erc20_approval_spender_not_permit2``, ``erc20_approval_amount_too_small``, ``erc20_approval_tx_parse_failed``,
            ``erc20_approval_tx_signer_mismatch``, ``erc20_approval_tx_wrong_chain``, ``erc20_approval_tx_wrong_target``,
            ``erc20_approval_tx_wrong_call``, ``erc20_approval_tx_value``, ``erc20_approval_tx_gas`` or
            ``erc20_approval_tx_fees``.
    """
    for code, theirs, ours in (
        ("erc20_approval_from_mismatch", approval.owner, payer),
        ("erc20_approval_asset_mismatch", approval.asset, token.address),
        ("erc20_approval_spender_not_permit2", approval.spender, PERMIT2_ADDRESS),
    ):
        if theirs != ours:
            raise PaymentRefused(code, f"the approval's value must be {ours} there")
    if approval.amount < value:
        raise PaymentRefused("erc20_approval_amount_too_small", f"the approval must be of {value} atomic units or more")
    try:
        transaction = read_transaction(approval.raw)
    except ValueError as error:
        raise PaymentRefused("erc20_approval_tx_parse_failed", f"signedTransaction cannot be read: {error}") from None
    _check_transaction(transaction, approval, network)
    return transaction


def _check_transaction(transaction: ForeignTransaction, approval: Erc20Approval, network: Network) -> None:
    call, cap = transaction.call, Fees(network.max_fee_gwei, network.max_priority_fee_gwei)
    fees = transaction.fees
    for code, right, must in (
        ("erc20_approval_tx_signer_mismatch", transaction.sender == approval.owner, "be signed by the payer"),
        ("erc20_approval_tx_wrong_chain", transaction.chain_id == network.chain_id, f"be for {network.caip2}"),
        ("erc20_approval_tx_wrong_target", call.to == approval.asset, "call the token"),
        (
            "erc20_approval_tx_wrong_call",
            call.data == encode_approve(PERMIT2_ADDRESS, approval.amount),
            f"call approve({PERMIT2_ADDRESS}, {approval.amount}) and nothing else",
        ),
        ("erc20_approval_tx_value", call.value == 0, "move no coin"),
        (
            "erc20_approval_tx_fees",
            fees.priority_fee <= fees.max_fee
            and fees.max_fee <= cap.max_fee * WEI_PER_GWEI
            and fees.priority_fee <= cap.priority_fee * WEI_PER_GWEI,
            f"offer at most {cap.max_fee} gwei a unit of gas, {cap.priority_fee} of it as priority fee",
        ),
    ):
        if not right:
            raise PaymentRefused(code, f"the approval's transaction must {must}")
