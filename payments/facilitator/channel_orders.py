"""What a resource server wants done with its channels: claims recorded, claimed money fetched, payers refunded.

None of it sells anything, so whoever asks again is told again; what failed may be asked for again, and costs whoever authorised
it a place among those that have to wait. See `payments.facilitator.schemes.Facilitated`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from payments.chain.channel_contract import encode_claim, encode_multicall, encode_refund, encode_settle, receiver_call
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, Token
from payments.chain.transactions import WORD, decode_revert
from payments.errors import PaymentRefused
from payments.facilitator import kinds
from payments.facilitator.channel_chain import ChannelChain, state_json
from payments.facilitator.records import Record
from payments.facilitator.schemes import AlreadyDone, Checked, Told, order_of
from payments.promises import Earlier
from payments.settlement import states
from payments.settlement.outcomes import SettlementOutcome
from payments.verification.vouchers import channel_id
from payments.x402 import channels as wire
from payments.x402.channel_actions import Claim, RefundAction
from payments.x402.channels import hex32

FAILED = frozenset({"failed"})


@dataclass(frozen=True, slots=True)
class FacilitatedClaims:
    """Claims of several channels of one receiver, signed by their authorizer."""

    claims: Sequence[Claim]
    signature: bytes
    payer: str
    """Who authorised them: the server's own key, or the receiver that we signed for."""
    token: Token
    chain: ChannelChain

    once = False
    repeats = FAILED
    value = None
    worth = None
    refusal = None

    @property
    def identity(self) -> str:
        """The same totals of the same channels are the same claim, however it is signed."""
        rows = "|".join(f"{number:x}:{claim.total:x}" for number, claim in zip(self._numbers, self.claims, strict=True))
        return f"{self.token.chain_id}|claim|{hashlib.sha256(rows.encode()).hexdigest()}"

    @property
    def _numbers(self) -> list[int]:
        return [channel_id(claim.config, self.token.chain_id) for claim in self.claims]

    @property
    def calls(self) -> tuple[tuple[str, bytes], ...]:
        """See `payments.facilitator.schemes.Facilitated`."""
        return ((BATCH_SETTLEMENT_ADDRESS, encode_claim(self.claims, self.signature)),)

    async def check_chain(self, earlier: Earlier) -> Checked:
        """See `payments.facilitator.schemes.Facilitated`."""
        ((_, call_data),) = self.calls
        found, succeeded, returned, _ = await self.chain.simulate(self._numbers, call_data)
        gain = sum(max(claim.total - state.total_claimed, 0) for claim, state in zip(self.claims, found, strict=True))
        if not gain:
            raise AlreadyDone("already_done", "all of it is claimed already")
        if any(claim.total > state.balance for claim, state in zip(self.claims, found, strict=True)):
            raise PaymentRefused(wire.EXCEEDS_BALANCE, "a channel holds less than is to be claimed of it")
        if not succeeded:
            raise PaymentRefused(wire.CLAIM_SIMULATION, f"the contract refuses the claims: {decode_revert(returned)}")
        return Checked(order_of(self, kinds.CLAIM, self.claims[0].config.receiver, gain), None)

    async def told(self, record: Record, outcome: SettlementOutcome | None) -> Told:
        """See `payments.facilitator.schemes.Facilitated`."""
        return Told(record.received)


@dataclass(frozen=True, slots=True)
class FacilitatedSettle:
    """All that was claimed for a receiver in a token goes to it. Anybody may ask for that, again and again."""

    payer: str
    """The receiver."""
    token: Token
    chain: ChannelChain

    once = False
    repeats = FAILED | states.PAID
    value = None
    worth = None
    refusal = None

    @property
    def identity(self) -> str:
        """See `payments.facilitator.schemes.Facilitated`."""
        return f"{self.token.chain_id}|settle|{self.payer}|{self.token.address}"

    @property
    def calls(self) -> tuple[tuple[str, bytes], ...]:
        """See `payments.facilitator.schemes.Facilitated`."""
        return ((BATCH_SETTLEMENT_ADDRESS, encode_settle(self.payer, self.token.address)),)

    async def check_chain(self, earlier: Earlier) -> Checked:
        """See `payments.facilitator.schemes.Facilitated`."""
        ((_, call_data),) = self.calls
        more = [receiver_call(self.payer, self.token.address)]
        _, succeeded, returned, (received,) = await self.chain.simulate([], call_data, more)
        value = int.from_bytes(received[:WORD], "big") - int.from_bytes(received[WORD : 2 * WORD], "big")
        if value <= 0:
            raise PaymentRefused(wire.NOTHING_TO_SETTLE, "nothing is claimed that was not sent to the receiver")
        if not succeeded:
            raise PaymentRefused(wire.SETTLE_SIMULATION, f"the contract refuses: {decode_revert(returned)}")
        return Checked(order_of(self, kinds.SETTLE, self.payer, value), None)

    async def told(self, record: Record, outcome: SettlementOutcome | None) -> Told:
        """See `payments.facilitator.schemes.Facilitated`."""
        return Told(record.received)


@dataclass(frozen=True, slots=True)
class FacilitatedRefund:
    """What a channel holds beyond the claims goes back to its payer; the last claims are made in the same call."""

    action: RefundAction
    refund_signature: bytes
    claim_signature: bytes
    """Empty without claims."""
    payer: str
    """Who authorised it, as for claims."""
    token: Token
    chain: ChannelChain

    once = False
    repeats = FAILED
    worth = None
    refusal = None

    @property
    def _channel(self) -> int:
        return channel_id(self.action.config, self.token.chain_id)

    @property
    def identity(self) -> str:
        """A channel's refunds are numbered."""
        return f"{self.token.chain_id}|refund|{hex32(self._channel)}|{self.action.nonce}"

    @property
    def calls(self) -> tuple[tuple[str, bytes], ...]:
        """See `payments.facilitator.schemes.Facilitated`."""
        action = self.action
        data = encode_refund(action.config, action.amount, action.nonce, self.refund_signature)
        if action.claims:
            data = encode_multicall((encode_claim(action.claims, self.claim_signature), data))
        return ((BATCH_SETTLEMENT_ADDRESS, data),)

    @property
    def value(self) -> int:
        """See `payments.facilitator.schemes.Facilitated`."""
        return self.action.amount

    async def check_chain(self, earlier: Earlier) -> Checked:
        """See `payments.facilitator.schemes.Facilitated`."""
        action = self.action
        ((_, call_data),) = self.calls
        (state,), succeeded, returned, _ = await self.chain.simulate([self._channel], call_data)
        claimed = max([state.total_claimed, *(claim.total for claim in action.claims)])
        if state.refund_nonce == action.nonce and claimed >= state.balance:
            raise PaymentRefused(wire.REFUND_NO_BALANCE, "the channel holds nothing beyond the claims")
        if not succeeded:
            message = f"the contract refuses the refund: {decode_revert(returned)}"
            if state.refund_nonce != action.nonce:
                message = f"the channel's next refund has the nonce {state.refund_nonce}"
            raise PaymentRefused(wire.REFUND_SIMULATION, message)
        order = order_of(
            self,
            kinds.REFUND,
            action.config.payer,
            action.amount,
            reference=hex32(self._channel),
            authorization_nonce=action.nonce,
        )
        return Checked(order, None)

    async def told(self, record: Record, outcome: SettlementOutcome | None) -> Told:
        """See `payments.facilitator.schemes.Facilitated`."""
        state = await self.chain.state_since(self._channel, None if outcome is None else outcome.block_number)
        return Told(record.received, {"channelState": state_json(self._channel, state)})
