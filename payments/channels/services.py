"""What all channels on one network share: the database, the engine, the chain, and who waits for whom."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from payments import promises
from payments.chain.channel_contract import decode_states, states_call
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, MULTICALL3_ADDRESS, Network, Token
from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.chain.signers import Signer
from payments.channels import book
from payments.channels.book import Channel, Seen
from payments.channels.looks import check_deposit, unavailable
from payments.promises import Cover
from payments.store import Store
from payments.tenders.exact_services import ExactServices, Settling
from payments.x402.channels import ChannelConfig, Deposit
from payments.x402.extensions.eip2612 import Eip2612Permit

LOOKS_AT_ONCE = 50
"""Channels in one call."""


@dataclass(frozen=True, slots=True)
class DepositCheck:
    """A deposit that would succeed, and its channel's state."""

    seen: Seen
    cover: Cover


async def has_channels(rpc: Rpc) -> bool:
    """Whether the chain has the batch-settlement contract and Multicall3; without them channels are not offered."""
    requests: list[Request] = [
        ("eth_getCode", (address, "latest")) for address in (BATCH_SETTLEMENT_ADDRESS, MULTICALL3_ADDRESS)
    ]
    codes = await rpc.ask(requests)
    return all(isinstance(code, str) and len(code) > 2 for code in codes)


class ChannelServices:
    """What all channels on one network share.

    Args:
        store: The database.
        settlements: Settles deposits.
        rpc: The chain.
        network: Its tokens.
        receiver: The treasury, lower-case hex.
        authorizers: Sign claims and refunds. One is part of every channel's identity, so its key must be kept as long as its
            channels are; new ones are offered the first.
        withdraw_delay_s: What is asked of a channel, see `payments.x402.channels.channel_requirement`.
        payers: Who works on which receipt, and what a payer's exposure may be.
    """

    def __init__(
        self,
        *,
        store: Store,
        settlements: Settling,
        rpc: Rpc,
        network: Network,
        receiver: str,
        authorizers: Sequence[Signer],
        withdraw_delay_s: int,
        payers: ExactServices,
        unclaimed_s_max: float = float("inf"),
    ) -> None:
        self.unclaimed_s_max = unclaimed_s_max
        self.store = store
        self.settlements = settlements
        self.network = network
        self.receiver = receiver
        self.authorizers = {signer.address: signer for signer in authorizers}
        self.withdraw_delay_s = withdraw_delay_s
        self.payers = payers
        self._rpc = rpc
        self._changes: dict[str, asyncio.Event] = {}

    @property
    def authorizer(self) -> Signer:
        """The one that new channels are offered."""
        return next(iter(self.authorizers.values()))

    # --- the chain ----------------------------------------------------------------------------------------------------

    async def look(self, channels: Sequence[tuple[int, int]]) -> list[Seen]:
        """What the chain says of channels, given by their ids and marks; one call for each `LOOKS_AT_ONCE`.

        Raises:
            SettlementUnavailable: The chain cannot be asked.
        """
        seen: list[Seen] = []
        for start in range(0, len(channels), LOOKS_AT_ONCE):
            some = channels[start : start + LOOKS_AT_ONCE]
            try:
                (answer,) = await self._rpc.ask([states_call([number for number, _ in some])])
                block, found, _ = decode_states(answer, len(some))
            except (RpcUnavailable, RpcError, ValueError) as error:
                raise unavailable() from error
            seen += [Seen(state, block, marks) for state, (_, marks) in zip(found, some, strict=True)]
        return seen

    async def sync(self, channel_ids: Sequence[str]) -> list[Channel]:
        """Read the chain's state of channels that are in the book into it; of those in a token that is configured.

        Raises:
            SettlementUnavailable: The chain cannot be asked.
            StoreBusy: The database cannot be written to.
        """
        known = await self.store.read(lambda tx: [book.find(tx, channel_id) for channel_id in channel_ids])
        tokens = {token.address: token for token in self.network.tokens}
        channels = [channel for channel in known if channel is not None and channel.config.token in tokens]
        seen = await self.look([(channel.number, channel.marks) for channel in channels])
        pairs = list(zip(channels, seen, strict=True))
        synced = await self.store.write(
            lambda tx: [book.sync(tx, channel.id, each, tokens[channel.config.token]) for channel, each in pairs]
        )
        for channel in channels:
            self.notify(channel.id)
        return synced

    async def check_deposit(
        self,
        channel: int,
        marks: int,
        config: ChannelConfig,
        deposit: Deposit,
        token: Token,
        permit: Eip2612Permit | None = None,
    ) -> DepositCheck:
        """Ask the chain whether a deposit would succeed now, with the permit that comes with it and beside everything else that
        the payer has under way: funds, allowance and the very call, in one round trip.

        Raises:
            PaymentRefused: It would fail.
            AllowanceRequired: Permit2 may not move the token yet.
            SettlementUnavailable: The chain cannot be asked.
        """
        earlier = await promises.before(self.store, config.payer, token)
        found = await check_deposit(self._rpc, channel, config, deposit, token, earlier, permit)
        return DepositCheck(Seen(found.state, found.block, marks), found.cover)

    # --- waiting ------------------------------------------------------------------------------------------------------

    def notify(self, channel_id: str) -> None:
        """Something about a channel changed; whoever waits for that looks again."""
        changed = self._changes.pop(channel_id, None)
        if changed is not None:
            changed.set()

    async def change(self, channel_id: str, timeout_s: float) -> None:
        """Wait until something about a channel changes, at most `timeout_s`: other processes' changes are not told."""
        changed = self._changes.setdefault(channel_id, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await changed.wait()
