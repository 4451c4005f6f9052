"""A deposit into a channel of another resource server's, with its first voucher; see `schemes.Facilitated`."""

from __future__ import annotations

from dataclasses import dataclass

from payments.chain.channel_contract import ChannelState, encode_deposit
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, PERMIT2_ADDRESS, Token
from payments.channels.looks import check_deposit
from payments.errors import AllowanceRequired, PaymentRefused
from payments.facilitator import kinds
from payments.facilitator.channel_chain import ChannelChain, state_json
from payments.facilitator.records import Record
from payments.facilitator.schemes import NEVER, Checked, Told, order_of
from payments.promises import Cover, Earlier
from payments.settlement.outcomes import SettlementOutcome
from payments.sponsoring.sponsor import Approving, Sponsor
from payments.tenders.channel import authorization_nonce
from payments.x402 import channels as wire
from payments.x402.channels import ChannelPayment, Deposit, Permit2Deposit, hex32


@dataclass(frozen=True, slots=True)
class FacilitatedDeposit:
    """See `payments.facilitator.schemes.Facilitated`."""

    payment: ChannelPayment
    deposit: Deposit
    token: Token
    refusal: PaymentRefused | None
    chain: ChannelChain
    sponsor: Sponsor
    """Brings the approval to the chain that may have come along."""
    client: str
    """Who wants it settled."""

    once = True
    repeats = NEVER

    @property
    def identity(self) -> str:
        """As for any authorization: chain, verifying contract, payer, nonce."""
        contract = PERMIT2_ADDRESS if isinstance(self.deposit, Permit2Deposit) else self.token.address
        return f"{self.token.chain_id}|{contract}|{self.payer}|{authorization_nonce(self.payment)}"

    @property
    def payer(self) -> str:
        """See `payments.facilitator.schemes.Facilitated`."""
        return self.payment.payer

    @property
    def calls(self) -> tuple[tuple[str, bytes], ...]:
        """See `payments.facilitator.schemes.Facilitated`."""
        return ((BATCH_SETTLEMENT_ADDRESS, encode_deposit(self.payment.config, self.deposit, self.payment.permit)),)

    @property
    def value(self) -> int:
        """See `payments.facilitator.schemes.Facilitated`."""
        return self.deposit.amount

    @property
    def worth(self) -> int:
        """See `payments.facilitator.schemes.Facilitated`."""
        return self.deposit.amount

    async def check_chain(self, earlier: Earlier) -> Checked:
        """See `payments.facilitator.schemes.Facilitated`."""
        payment, deposit = self.payment, self.deposit
        channel = payment.voucher.channel_id
        order = order_of(
            self,
            kinds.DEPOSIT,
            BATCH_SETTLEMENT_ADDRESS,
            deposit.amount,
            reference=hex32(channel),
            authorization_nonce=authorization_nonce(payment),
            valid_before=deposit.expires_at,
        )
        approving: Approving | None = None
        cover: Cover | None = None
        try:
            look = await check_deposit(
                self.chain.rpc, channel, payment.config, deposit, self.token, earlier, payment.permit
            )
            state, cover = look.state, look.cover
        except AllowanceRequired as required:
            approving = await self.sponsor.approving(payment.approval, required, self.token, order, None, self.client)
            state = await self.chain.state(channel)
        check_amount(payment, state, state.balance + deposit.amount)
        return Checked(order, cover, state_json(channel, state), approving)

    async def told(self, record: Record, outcome: SettlementOutcome | None) -> Told:
        """See `payments.facilitator.schemes.Facilitated`."""
        channel = self.payment.voucher.channel_id
        state = await self.chain.state_since(channel, None if outcome is None else outcome.block_number)
        return Told(self.deposit.amount, {"channelState": state_json(channel, state)})


def check_amount(payment: ChannelPayment, state: ChannelState, balance: int) -> None:
    """Refuse a voucher that cannot be claimed from a channel that holds `balance` atomic units, or that claims nothing more.

    Raises:
        PaymentRefused: With the official code.
    """
    amount = payment.voucher.amount
    if amount > balance:
        raise PaymentRefused(wire.EXCEEDS_BALANCE, f"the channel holds {balance} atomic units in all")
    # A request for a refund may come with the last voucher.
    if amount < state.total_claimed + (payment.type != "refund"):
        raise PaymentRefused(
            wire.BELOW_CLAIMED, f"{state.total_claimed} atomic units of the channel are claimed already"
        )
