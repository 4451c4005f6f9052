"""What a facilitator asks the chain about channels, and what it signs for servers that have no key of their own for that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from payments.chain.channel_contract import ChannelState, decode_states, states_call
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS
from payments.chain.rpc import Rpc, RpcError, RpcUnavailable
from payments.chain.signers import Signer
from payments.channels.looks import unavailable
from payments.errors import PaymentError, PaymentRefused
from payments.facilitator.access import Client
from payments.verification.signatures import checksum_address, recover
from payments.verification.vouchers import sign_digest
from payments.x402.channels import AUTHORIZER_MISMATCH, AUTHORIZER_NOT_CONFIGURED, hex32

WINDOW_S = 0.0005
LOOKS_AT_ONCE = 50
LAG_POLL_S = 0.1
LAG_POLLS_MAX = 20


@dataclass(slots=True)
class _Look:
    channel: int
    found: asyncio.Future[ChannelState | PaymentError]


class ChannelChain:
    """The channels of one network. States that are asked for within half a millisecond are one call.

    Args:
        rpc: The chain.
        authorizers: Sign claims and refunds for servers whose channels name one of them; none if we sign for nobody. New
            channels are offered the first.
    """

    def __init__(self, rpc: Rpc, authorizers: Sequence[Signer]) -> None:
        self.rpc = rpc
        self.authorizers = {signer.address: signer for signer in authorizers}
        self._waiting: list[_Look] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def state(self, channel: int) -> ChannelState:
        """A channel as the contract has it now.

        Raises:
            SettlementUnavailable: The chain cannot be asked.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_later(WINDOW_S, self._depart)
        look = _Look(channel, loop.create_future())
        self._waiting.append(look)
        found = await look.found
        if isinstance(found, PaymentError):
            raise found
        return found

    async def simulate(
        self, channels: Sequence[int], call_data: bytes, more: Sequence[tuple[str, bytes]] = ()
    ) -> tuple[list[ChannelState], bool, bytes, list[bytes]]:
        """The states of channels, what a call of the contract would do, and the answers to `more` calls, in one round trip.

        Returns:
            The states, whether the call would succeed, what it returned, and the answers.

        Raises:
            SettlementUnavailable: The chain cannot be asked.
        """
        # The call last: what it does, even in a simulation, the others would see.
        calls = [*more, (BATCH_SETTLEMENT_ADDRESS, call_data)]
        try:
            (answer,) = await self.rpc.ask([states_call(channels, calls)])
            _, states, (*answers, (succeeded, returned)) = decode_states(answer, len(channels), len(calls))
        except (RpcUnavailable, RpcError, ValueError) as error:
            raise unavailable() from error
        return states, succeeded, returned, [data for _, data in answers]

    async def state_since(self, channel: int, block: int | None) -> ChannelState:
        """A channel as of a block or a later one, however far behind the asked node is.

        Raises:
            SettlementUnavailable: No node got there in time, or answered.
        """
        for _ in range(LAG_POLLS_MAX):
            try:
                (answer,) = await self.rpc.ask([states_call([channel])])
                head, (state,), _ = decode_states(answer, 1)
            except (RpcUnavailable, RpcError, ValueError) as error:
                raise unavailable() from error
            if block is None or head >= block:
                return state
            await asyncio.sleep(LAG_POLL_S)
        raise unavailable()

    def authorize(
        self, digest: bytes, signature: bytes | None, authorizer: str, receiver: str, client: Client, code: str
    ) -> bytes:
        """The authorizer's signature for claims or a refund: the server's own, or ours for a key that is bound to the receiver.

        Whoever may have us sign may give away what a server has not claimed yet, so nobody else may.

        Args:
            digest: What is signed.
            signature: The server's, or None.
            authorizer: The channels' receiverAuthorizer.
            receiver: The channels' receiver.
            client: Who asks.
            code: The protocol's word for a signature that is not the authorizer's.

        Raises:
            PaymentRefused: It is not signed, and not signed by us.
        """
        if signature is not None:
            try:
                signer = recover(digest, signature)
            except PaymentError as error:
                raise PaymentRefused(code, error.message) from None
            if signer != authorizer:
                raise PaymentRefused(code, f"it must be signed by the key of the receiverAuthorizer {authorizer}")
            return signature
        if not self.authorizers:
            raise PaymentRefused(AUTHORIZER_NOT_CONFIGURED, "nothing is signed here: sign it with your own authorizer")
        if authorizer not in self.authorizers:
            message = f"only channels with the receiverAuthorizer {' or '.join(self.authorizers)} are signed for here"
            raise PaymentRefused(AUTHORIZER_MISMATCH, message)
        check_bound(client, receiver)
        return sign_digest(self.authorizers[authorizer].key, digest)

    def advertised(self) -> dict[str, Any]:
        """What `/supported` says of the signer, if there is one."""
        return {"receiverAuthorizer": checksum_address(next(iter(self.authorizers)))} if self.authorizers else {}

    def _depart(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), LOOKS_AT_ONCE):
            task = asyncio.get_running_loop().create_task(self._look(waiting[start : start + LOOKS_AT_ONCE]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _look(self, looks: Sequence[_Look]) -> None:
        found: list[ChannelState] = []
        try:
            (answer,) = await self.rpc.ask([states_call([look.channel for look in looks])])
            _, found, _ = decode_states(answer, len(looks))
        except (RpcUnavailable, RpcError, ValueError):
            found = []
        finally:
            # Nobody may wait for ever for an answer that cannot come.
            for number, look in enumerate(looks):
                if not look.found.done():
                    look.found.set_result(found[number] if found else unavailable())


def check_bound(client: Client, receiver: str) -> None:
    """Refuse what is signed on behalf of `receiver`, unless the asking key is bound to it.

    Raises:
        PaymentRefused: It is not.
    """
    if client.pay_to != receiver:
        raise PaymentRefused(
            AUTHORIZER_NOT_CONFIGURED,
            f"this facilitator signs for {receiver} only what a key bound to it asks for (farebox keys create NAME --pay-to"
            f" {receiver}); or sign with an authorizer of your own",
        )


def state_json(channel: int, state: ChannelState) -> dict[str, Any]:
    """A channel's state as facilitators tell it."""
    return {
        "channelId": hex32(channel),
        "balance": str(state.balance),
        "totalClaimed": str(state.total_claimed),
        "withdrawRequestedAt": state.withdraw_at,
        "refundNonce": str(state.refund_nonce),
    }
