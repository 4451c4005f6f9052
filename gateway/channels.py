"""Payment channels as a part of a running gateway: opened for one network, closed with it."""

from __future__ import annotations

import contextlib

from gateway.settings import Settings
from payments.channels.keeper import ChannelKeeper
from payments.channels.refunds import Refunder
from payments.channels.services import ChannelServices
from payments.leases import Leases
from payments.money import usd_to_nano
from payments.settlement.alarms import Alarms
from payments.settlement.engine import Settlements
from payments.tenders.channel_scheme import ChannelScheme
from payments.tenders.exact_services import ExactServices


async def open_channels(
    settings: Settings,
    settlements: Settlements,
    payers: ExactServices,
    pay_to: str,
    leases: Leases,
    alarms: Alarms,
    cleanup: contextlib.AsyncExitStack,
) -> tuple[ChannelScheme, Refunder]:
    """Begin to take payments through channels on a network.

    Args:
        settings: The gateway's.
        settlements: Of the network, started; its first signer is the receiver's authorizer of new channels.
        payers: What is known of payments under way there.
        pay_to: The treasury, lower-case hex.
        leases: Of this process.
        alarms: Are told what cannot be claimed.
        cleanup: Closes what is opened here.
    """
    services = ChannelServices(
        store=payers.store,
        settlements=settlements,
        rpc=settlements.rpc,
        network=settlements.network,
        receiver=pay_to,
        authorizers=settlements.signers,
        withdraw_delay_s=settings.payments.channel_withdraw_delay_s,
        payers=payers,
        unclaimed_s_max=settings.payments.channel_claim_age_s + settings.payments.channel_withdraw_delay_s / 2,
    )
    keeper = ChannelKeeper(
        services,
        settlements,
        leases,
        claim_nano_usd=usd_to_nano(settings.payments.channel_claim_usd),
        claim_age_s=settings.payments.channel_claim_age_s,
    )
    alarms.sources.append(keeper.alarms)
    await keeper.start()
    cleanup.push_async_callback(keeper.stop)
    scheme = ChannelScheme(services)
    return scheme, Refunder(services, settlements, scheme.check_channel)
