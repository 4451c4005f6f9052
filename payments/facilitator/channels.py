"""The scheme `batch-settlement` for others: payers' deposits and vouchers, and what servers want done with their channels.

`/verify` takes deposits, vouchers and requests for refunds; what is wrong with a signature or a channel is told without the
chain, and what is right needs one look at it, which many share. `/settle` takes deposits, claims, settles and refunds. A server
signs claims and refunds with an authorizer of its own, or has us sign them: then its API key must be bound to the receiver.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from payments.chain.networks import NOBODY, Network, Token
from payments.errors import PaymentRefused
from payments.facilitator.access import Client
from payments.facilitator.channel_chain import ChannelChain, check_bound, state_json
from payments.facilitator.channel_deposits import FacilitatedDeposit, check_amount
from payments.facilitator.channel_orders import FacilitatedClaims, FacilitatedRefund, FacilitatedSettle
from payments.facilitator.schemes import Facilitated, Promise
from payments.facilitator.transfers import token_of
from payments.facilitator.wire import FacilitatorCall
from payments.sponsoring.sponsor import Sponsor
from payments.verification.channel_deposits import check_deposit
from payments.verification.checks import TOO_LATE
from payments.verification.vouchers import channel_id, claim_batch_digest, refund_digest, verify_voucher
from payments.x402 import channels as wire
from payments.x402.channel_actions import Claim, ClaimAction, RefundAction, SettleAction
from payments.x402.channels import ChannelConfig, ChannelPayment, Permit2Deposit, Voucher
from payments.x402.requirements import Requirement


class ChannelFacilitation:
    """`batch-settlement` on one network, in every token that the operator configured there.

    Args:
        network: Where it is.
        chain: Asks it, and signs.
        sponsor: Brings payers' approvals of Permit2 to the chain.
    """

    name = wire.SCHEME

    def __init__(self, network: Network, chain: ChannelChain, sponsor: Sponsor) -> None:
        self.network = network
        self._sponsor = sponsor
        self._chain = chain

    def kinds(self) -> list[dict[str, Any]]:
        """See `payments.facilitator.schemes.FacilitatedScheme`."""
        extra = self._chain.advertised()
        kind = {"x402Version": 2, "scheme": self.name, "network": self.network.caip2}
        return [kind | {"extra": extra} if extra else kind]

    def verifies(self, call: FacilitatorCall, client: Client, now: int) -> Facilitated | Promise:
        """See `payments.facilitator.schemes.FacilitatedScheme`."""
        payment = call.payment
        if not isinstance(payment, ChannelPayment):
            raise PaymentRefused(wire.PAYLOAD_TYPE, "only deposits, vouchers and requests for refunds are verified")
        return self._deposit(call, payment, client, now) or self._voucher(call, payment, client)

    def settles(self, call: FacilitatorCall, client: Client, now: int) -> Facilitated:
        """See `payments.facilitator.schemes.FacilitatedScheme`."""
        payment = call.payment
        match payment:
            case ClaimAction():
                return self._claims(call, payment, client)
            case SettleAction():
                return self._settle(call, payment)
            case RefundAction():
                return self._refund(call, payment, client)
            case ChannelPayment():
                deposit = self._deposit(call, payment, client, now)
                if deposit is not None:
                    return deposit
                raise PaymentRefused(
                    wire.PAYLOAD_TYPE, "a voucher is settled by a claim, and a refund needs refundNonce and claims"
                )
        raise PaymentRefused(wire.PAYLOAD_TYPE, "deposits, claims, settles and refunds are settled")

    # --- payers' ------------------------------------------------------------------------------------------------------

    def _deposit(
        self, call: FacilitatorCall, payment: ChannelPayment, client: Client, now: int
    ) -> FacilitatedDeposit | None:
        if payment.deposit is None:
            return None
        token = self._check_payment(call, payment, client)
        refusal: PaymentRefused | None = None
        try:
            check_deposit(payment, payment.deposit, token, self.network, now)
        except PaymentRefused as error:
            # Times pass: whoever settled in time is told of the outcome all the same.
            if error.code not in (wire.DEPOSIT_EXPIRED, *TOO_LATE):
                raise
            refusal = error
        return FacilitatedDeposit(payment, payment.deposit, token, refusal, self._chain, self._sponsor, client.name)

    def _voucher(self, call: FacilitatorCall, payment: ChannelPayment, client: Client) -> Promise:
        token = self._check_payment(call, payment, client)
        channel = payment.voucher.channel_id

        async def look() -> dict[str, Any]:
            state = await self._chain.state(channel)
            if state.balance == 0:
                raise PaymentRefused(wire.CHANNEL_NOT_FOUND, "nothing is in this channel")
            check_amount(payment, state, state.balance)
            return state_json(channel, state)

        return Promise(token, look)

    def _check_payment(self, call: FacilitatorCall, payment: ChannelPayment, client: Client) -> Token:
        requirement, config = call.requirement, payment.config
        by_permit2 = isinstance(payment.deposit, Permit2Deposit)
        token = self._token(call, None if payment.deposit is None else "permit2" if by_permit2 else "eip3009")
        if payment.voucher.channel_id != channel_id(config, self.network.chain_id):
            raise PaymentRefused(wire.CHANNEL_ID_MISMATCH, "the voucher's channelId is not that of the channelConfig")
        _check_receiver(config, requirement)
        authorizer = requirement.extra.get("receiverAuthorizer")
        if (
            not isinstance(authorizer, str)
            or config.receiver_authorizer in (NOBODY, "")
            or (config.receiver_authorizer != authorizer.lower())
        ):
            raise PaymentRefused(
                wire.RECEIVER_AUTHORIZER_MISMATCH, "channelConfig.receiverAuthorizer must be the requirement's"
            )
        delay = requirement.extra.get("withdrawDelay", config.withdraw_delay)
        if config.withdraw_delay != delay:
            raise PaymentRefused(wire.WITHDRAW_DELAY_MISMATCH, "channelConfig.withdrawDelay must be the requirement's")
        if not wire.WITHDRAW_DELAY_S_MIN <= config.withdraw_delay <= wire.WITHDRAW_DELAY_S_MAX:
            raise PaymentRefused(
                wire.WITHDRAW_DELAY_RANGE,
                f"withdrawDelay must be {wire.WITHDRAW_DELAY_S_MIN} to {wire.WITHDRAW_DELAY_S_MAX} seconds",
            )
        if config.payer == NOBODY:
            raise PaymentRefused(wire.DEPOSIT_PAYLOAD, "channelConfig.payer must be an account")
        if config.receiver_authorizer in self._chain.authorizers:
            check_bound(client, config.receiver)
        verify_voucher(payment.voucher, config.payer_authorizer, self.network.chain_id)
        return token

    # --- servers' -----------------------------------------------------------------------------------------------------

    def _claims(self, call: FacilitatorCall, action: ClaimAction, client: Client) -> FacilitatedClaims:
        token = self._token(call)
        signature, payer = self._authorize_claims(call.requirement, action.claims, action.authorization, client)
        return FacilitatedClaims(action.claims, signature, payer, token, self._chain)

    def _settle(self, call: FacilitatorCall, action: SettleAction) -> FacilitatedSettle:
        token = self._token(call)
        if (action.receiver, action.token) != (call.requirement.pay_to, token.address):
            raise PaymentRefused(wire.SETTLE_PAYLOAD, "receiver and token must be the requirement's payTo and asset")
        return FacilitatedSettle(action.receiver, token, self._chain)

    def _refund(self, call: FacilitatorCall, action: RefundAction, client: Client) -> FacilitatedRefund:
        token, config = self._token(call), action.config
        channel = channel_id(config, self.network.chain_id)
        if action.voucher.channel_id != channel:
            raise PaymentRefused(wire.CHANNEL_ID_MISMATCH, "the voucher's channelId is not that of the channelConfig")
        _check_receiver(config, call.requirement)
        if action.amount == 0:
            raise PaymentRefused(wire.REFUND_AMOUNT, "the amount of a refund must be more than 0")
        if any(claim.config != config for claim in action.claims):
            raise PaymentRefused(wire.REFUND_PAYLOAD, "a refund comes with claims of its own channel only")
        claim_signature = b""
        if action.claims:
            claim_signature, _ = self._authorize_claims(
                call.requirement, action.claims, action.claim_authorization, client
            )
        signature = self._chain.authorize(
            refund_digest(channel, action.nonce, action.amount, self.network.chain_id),
            action.refund_authorization,
            config.receiver_authorizer,
            config.receiver,
            client,
            wire.REFUND_PAYLOAD,
        )
        payer = self._authorised_by(config)
        return FacilitatedRefund(action, signature, claim_signature, payer, token, self._chain)

    def _authorize_claims(
        self, requirement: Requirement, claims: Sequence[Claim], signature: bytes | None, client: Client
    ) -> tuple[bytes, str]:
        """Check claims offline; the authorizer's signature, and who answers for them."""
        chain_id, first = self.network.chain_id, claims[0].config
        entries = []
        for claim in claims:
            _check_receiver(claim.config, requirement)
            if claim.config.receiver_authorizer != first.receiver_authorizer:
                raise PaymentRefused(wire.AUTHORIZER_MISMATCH, "channels that are claimed together share an authorizer")
            if claim.total > claim.voucher_amount:
                raise PaymentRefused(wire.CLAIM_PAYLOAD, "totalClaimed must not exceed maxClaimableAmount")
            entries.append((channel_id(claim.config, chain_id), claim.voucher_amount, claim.total))
        if len({channel for channel, _, _ in entries}) != len(entries):
            raise PaymentRefused(wire.CLAIM_PAYLOAD, "a channel may be claimed once in a batch")
        digest = claim_batch_digest(entries, chain_id)
        signed = self._chain.authorize(
            digest, signature, first.receiver_authorizer, first.receiver, client, wire.CLAIM_PAYLOAD
        )
        # Last, since it is one recovery a row: whoever is no authorizer does not get so far.
        for claim, (channel, amount, _) in zip(claims, entries, strict=True):
            verify_voucher(Voucher(channel, amount, claim.signature), claim.config.payer_authorizer, chain_id)
        return signed, self._authorised_by(first)

    def _authorised_by(self, config: ChannelConfig) -> str:
        ours = config.receiver_authorizer in self._chain.authorizers
        return config.receiver if ours else config.receiver_authorizer

    def _token(self, call: FacilitatorCall, signed: str | None = None) -> Token:
        """The token as the requirement says it is moved; if it does not say, as was `signed`."""
        requirement, accepted = call.requirement, call.payment.accepted
        if accepted is None or (accepted.scheme, accepted.network) != (requirement.scheme, requirement.network):
            raise PaymentRefused("wrong_scheme", f"the payment's scheme must be {requirement.scheme}")
        known = self.network.token_at(requirement.asset)
        method = signed or ("eip3009" if known is None else known.transfer_method)
        return token_of(requirement, self.network, requirement.extra.get("assetTransferMethod", method))


def _check_receiver(config: ChannelConfig, requirement: Requirement) -> None:
    if config.receiver != requirement.pay_to:
        raise PaymentRefused(wire.RECEIVER_MISMATCH, f"channelConfig.receiver must be {requirement.pay_to}")
    if config.token != requirement.asset:
        raise PaymentRefused(wire.TOKEN_MISMATCH, f"channelConfig.token must be {requirement.asset}")
