"""Whether a payment pays for a requirement, as far as that can be told without the chain and the database.

Cheap comparisons come first and the signature last. The quote's own HMAC is checked before, by `payments.quotes`; balance,
allowance and the nonce's use afterwards, by `payments.verification.chain_state`.
"""

from __future__ import annotations

from payments.chain.networks import EXACT_PERMIT2_PROXY_ADDRESS, UPTO_PERMIT2_PROXY_ADDRESS, Network, Token
from payments.errors import PaymentRefused
from payments.verification.approvals import check_approval
from payments.verification.eip712 import eip3009_digest, permit2_exact_digest, permit2_upto_digest
from payments.verification.permits import DEADLINE_EXPIRED, check_permit
from payments.verification.signatures import recover
from payments.verification.wallet_signatures import unwrap
from payments.x402.wire import Payment, Permit2Authorization, Requirement, UptoAuthorization


class SignatureUnproven(PaymentRefused):
    """No key of the payer's made the signature: it is bad, unless the payer is a contract that says otherwise."""


TOO_LATE = frozenset({"expired", DEADLINE_EXPIRED})
"""The codes of what was good once: whoever used it in time is told what it came to all the same."""
SETTLEMENT_MARGIN_S = 6
"""An authorization must hold that much longer, so that its transfer can still be mined in one of the next blocks."""


def check_offline(
    payment: Payment,
    requirement: Requirement,
    network: Network,
    token: Token,
    *,
    now: int,
    valid_s: int = SETTLEMENT_MARGIN_S,
) -> str:
    """Check a decoded payment against what we would offer for the same request now.

    Args:
        payment: From `decode_payment`.
        requirement: Our own, from `requirement_for`.
        network: The requirement's chain.
        token: The requirement's token. Its domain and transfer method count, not what the payer claims in `extra`.
        now: Unix seconds.
        valid_s: How much longer it must hold, so that it can still be settled.

    Returns:
        The payer's address, lower-case hex, proven by the signature.

    Raises:
        PaymentRefused: With one of the codes ``wrong_scheme``, ``wrong_network``, ``wrong_token``, ``wrong_amount``,
            ``wrong_recipient``, ``wrong_timeout``, ``wrong_extra``, ``wrong_transfer_method``, ``wrong_spender``,
            ``wrong_facilitator``, ``not_yet_valid``, ``expired``, or those of `check_permit`
            and `check_approval`.
        SignatureUnproven: ``bad_signature``: all the rest is right, and if the payer has code the chain may be asked about it.
        PaymentMalformed: ``malformed_signature``, if the signature is shorter than any can be.
    """
    assert requirement.network == network.caip2
    assert requirement.asset == token.address
    if payment.accepted is not None:
        check_accepted(payment.accepted, requirement)
    else:
        _check_v1(payment, requirement, network)
    _check_authorization(payment, requirement, token)
    _check_times(payment, now, valid_s)
    if payment.permit is not None and isinstance(payment.authorization, Permit2Authorization):
        check_permit(payment.permit, payment.payer, payment.authorization.value, token, now=now, valid_s=valid_s)
    if payment.approval is not None and isinstance(payment.authorization, Permit2Authorization):
        check_approval(payment.approval, payment.payer, payment.authorization.value, token, network)
    check_signature(payment_digest(payment, token), payment.signature, payment.payer)
    return payment.payer


def check_signature(digest: bytes, signature: bytes, payer: str) -> None:
    """Return if `payer`'s key signed `digest`; raises as `check_offline` does."""
    unwrap(signature)
    try:
        signer = recover(digest, signature)
    except PaymentRefused as error:
        raise SignatureUnproven(error.code, error.message) from error
    if signer != payer:
        raise SignatureUnproven(
            "bad_signature", "the signature is not the payer's for this authorization, token and network"
        )


def payment_digest(payment: Payment, token: Token) -> bytes:
    """The EIP-712 digest that the payer signed, if the payment is in `token`."""
    authorization = payment.authorization
    if isinstance(authorization, UptoAuthorization):
        return permit2_upto_digest(authorization, token.chain_id)
    if isinstance(authorization, Permit2Authorization):
        return permit2_exact_digest(authorization, token.chain_id)
    return eip3009_digest(authorization, token)


def check_accepted(accepted: Requirement, requirement: Requirement) -> None:
    """v2: the offer that the payer signed for must be ours, field by field."""
    _check_same("wrong_scheme", "accepted.scheme", accepted.scheme, requirement.scheme)
    _check_same("wrong_network", "accepted.network", accepted.network, requirement.network)
    _check_same("wrong_token", "accepted.asset", accepted.asset, requirement.asset)
    _check_same("wrong_amount", "accepted.amount", accepted.amount, requirement.amount)
    _check_same("wrong_recipient", "accepted.payTo", accepted.pay_to, requirement.pay_to)
    _check_same("wrong_timeout", "accepted.maxTimeoutSeconds", accepted.max_timeout_s, requirement.max_timeout_s)
    for name, ours in requirement.extra.items():
        # Members that a client added of its own accord mean nothing to us.
        theirs = accepted.extra.get(name)
        if not _same_address(theirs, ours):
            _check_same("wrong_extra", f"accepted.extra.{name}", theirs, ours)


def _check_v1(payment: Payment, requirement: Requirement, network: Network) -> None:
    """v1: the payer names only the scheme and the network; the authorization says the rest."""
    _check_same("wrong_scheme", "scheme", payment.scheme, requirement.scheme)
    if network.v1_name is None:
        raise PaymentRefused("wrong_network", f"x402 v1 has no name for {network.caip2}; pay with v2")
    _check_same("wrong_network", "network", payment.network, network.v1_name)


def _check_authorization(payment: Payment, requirement: Requirement, token: Token) -> None:
    authorization = payment.authorization
    upto = isinstance(authorization, UptoAuthorization)
    assert upto == (requirement.scheme == "upto")
    method = "permit2" if upto else token.transfer_method
    _check_same("wrong_transfer_method", "the authorization's kind", payment.transfer_method, method)
    if isinstance(authorization, Permit2Authorization):
        proxy = UPTO_PERMIT2_PROXY_ADDRESS if upto else EXACT_PERMIT2_PROXY_ADDRESS
        _check_same("wrong_token", "permitted.token", authorization.token, token.address)
        _check_same("wrong_spender", "spender", authorization.spender, proxy)
    if isinstance(authorization, UptoAuthorization):
        facilitator = requirement.extra["facilitatorAddress"]
        _check_same("wrong_facilitator", "witness.facilitator", authorization.facilitator, facilitator)
    _check_same("wrong_amount", "the authorized amount", authorization.value, requirement.amount)
    _check_same("wrong_recipient", "the authorized recipient", authorization.recipient, requirement.pay_to)


def _check_times(payment: Payment, now: int, valid_s: int) -> None:
    authorization = payment.authorization
    if authorization.valid_after > now:
        raise PaymentRefused("not_yet_valid", f"the authorization must be valid now ({now}) already: see validAfter")
    if authorization.expires_at < now + valid_s:
        raise PaymentRefused(
            "expired",
            f"the authorization must hold for {valid_s} s from now ({now}) on, so that it can be settled",
        )


def _same_address(theirs: object, ours: object) -> bool:
    """Whether both are one address: clients echo those in `extra` in the letter case that they like."""
    if not isinstance(theirs, str) or not isinstance(ours, str):
        return False
    return ours.startswith("0x") and theirs.lower() == ours.lower()


def _check_same(code: str, field: str, theirs: object, ours: object) -> None:
    """Only our own value is named: what was sent is the sender's and does not belong in a message."""
    if theirs != ours:
        raise PaymentRefused(code, f"{field} must be {ours}")
