"""Everything that a running facilitator is made of, opened in order and closed in reverse."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from payments import anchors, kinds, recovery
from payments.chain.batches import missing_for_upto
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.channels.services import has_channels
from payments.databases.base import LEASE_S
from payments.doctor import verify_tokens
from payments.facilitator.access import Clients
from payments.facilitator.channel_chain import ChannelChain
from payments.facilitator.channels import ChannelFacilitation
from payments.facilitator.discovery import BAZAAR
from payments.facilitator.exact import ExactFacilitation
from payments.facilitator.metrics import FacilitatorMetrics
from payments.facilitator.schemes import FacilitatedScheme
from payments.facilitator.service import Facilitator
from payments.facilitator.upto import UptoFacilitation
from payments.migrate import upgrade
from payments.settlement.alarms import Alarms
from payments.settlement.engine import Settlements
from payments.sponsoring.records import Budget
from payments.sponsoring.sponsor import Sponsor
from payments.store import Store
from payments.verification.chain_state import ChainStates
from payments.verification.permits import with_permits
from payments.x402.extensions import eip2612, erc20_approval

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """A network to settle on."""

    network: Network
    rpc_urls: list[str]
    confirmations: int = 2
    batch_contract: str | None = None
    wallet_factories: tuple[str, ...] = ()
    sponsoring: Budget | None = None
    """What payers without coin may be given to approve Permit2; None for nothing."""


@dataclass(frozen=True, slots=True)
class Options:
    """What an operator decides."""

    database: Path | str
    """A SQLite file, or a PostgreSQL URL."""
    networks: tuple[NetworkOptions, ...]
    signer_keys: tuple[str, ...]
    """Private keys (hex) of the accounts that pay the gas."""
    require_key: bool = True
    pay_to: frozenset[str] = frozenset()
    """Whom payments are settled for, lower-case hex; empty for anybody."""
    minimum_nano_usd: int = 0
    settlement_wait_s: float = 30
    calls_per_minute: int = 6_000
    client_failures_per_hour: int = 100
    gas_alarm_wei: int = 0
    cross_check_nano_usd: int | None = None
    """Settlements from here on count only when two nodes have their evidence."""
    lease_s: float = LEASE_S
    """How long other processes on the database wait for one that is gone."""


@dataclass(slots=True)
class Services:
    """What handlers use."""

    store: Store
    facilitator: Facilitator
    clients: Clients
    metrics: FacilitatorMetrics
    watchers: list[Alarms]

    def alarms(self) -> list[dict[str, str]]:
        """What is wrong; empty if payments can be settled."""
        return [asdict(alarm) for watcher in self.watchers for alarm in watcher.raised()]


@contextlib.asynccontextmanager
async def opened(options: Options) -> AsyncIterator[Services]:
    """Open the database, take up the settlements that a crash left behind, and start every part.

    Raises:
        TokenMismatch, RpcUnavailable, RpcError: A chain is not what the configuration says, or cannot be asked.
        StoreOwned, SchemaTooNew: The database belongs to another process, or to a newer Farebox.
    """
    async with contextlib.AsyncExitStack() as cleanup:
        upgrade(options.database)
        store = Store(options.database, lease_s=options.lease_s)
        cleanup.callback(store.close)
        leases = await cleanup.enter_async_context(recovery.serving(store))
        engines: list[Settlements] = []
        sponsors: list[Sponsor] = []
        schemes: list[FacilitatedScheme] = []
        for entry in options.networks:
            rpc = Rpc(entry.rpc_urls, chain_id=entry.network.chain_id, lag_blocks_max=entry.network.lag_blocks_max)
            cleanup.push_async_callback(rpc.aclose)
            await verify_tokens(rpc, entry.network)
            await anchors.hold_fast(store, rpc, entry.network)
            engine = Settlements(
                store,
                rpc,
                entry.network,
                options.signer_keys,
                batch_contract=entry.batch_contract,
                confirmations=entry.confirmations,
                cross_check_nano_usd=options.cross_check_nano_usd,
                leases=leases,
            )
            # Gateways may work on this database too: whoever holds the key settles everybody's.
            kinds.register(engine, store)
            engines.append(engine)
            sponsor = Sponsor(store, engine, entry.sponsoring or Budget(0, 0))
            sponsors.append(sponsor)
            schemes += await _schemes(entry, engine, sponsor, signs=options.require_key)
        facilitator = Facilitator(
            store,
            {engine.network.chain_id: engine for engine in engines},
            schemes,
            extensions=await _extensions(engines, sponsors),
            pay_to=options.pay_to,
            minimum_nano_usd=options.minimum_nano_usd,
            settlement_wait_s=options.settlement_wait_s,
            client_failures_per_hour=options.client_failures_per_hour,
        )
        watchers = []
        for engine in engines:
            await engine.start()
            cleanup.push_async_callback(engine.stop)
            watcher = Alarms(
                engine,
                engine.signers[0].address,
                gas_minimum_wei=options.gas_alarm_wei,
                treasury_minimum_nano_usd=0,
            )
            await watcher.start()
            cleanup.push_async_callback(watcher.stop)
            watchers.append(watcher)
        for sponsor in sponsors:
            await sponsor.start()
            cleanup.push_async_callback(sponsor.stop)
        clients = Clients(store, require_key=options.require_key, calls_per_minute=options.calls_per_minute)
        metrics = FacilitatorMetrics(lambda: _gauges(engines, watchers))
        yield Services(store, facilitator, clients, metrics, watchers)


async def _schemes(
    entry: NetworkOptions, engine: Settlements, sponsor: Sponsor, *, signs: bool
) -> list[FacilitatedScheme]:
    """What can be settled on a network as it is now; `signs` says whether claims and refunds are signed for servers."""
    network, rpc = entry.network, engine.rpc
    chain_states = ChainStates(rpc, network)
    schemes: list[FacilitatedScheme] = [ExactFacilitation(network, chain_states, entry.wallet_factories, sponsor)]
    if entry.batch_contract is not None:
        missing = await missing_for_upto(rpc, entry.batch_contract, [signer.address for signer in engine.signers])
        if missing is None:
            schemes.append(UptoFacilitation(network, chain_states, entry.batch_contract, sponsor))
        else:
            log.warning("upto is not settled on %s: %s", network.caip2, missing)
    if engine.signers and await has_channels(rpc):
        schemes.append(ChannelFacilitation(network, ChannelChain(rpc, engine.signers if signs else ()), sponsor))
    return schemes


async def _extensions(engines: list[Settlements], sponsors: list[Sponsor]) -> list[str]:
    """What `/supported` lists. The list is one for all networks, and official servers take it for each of them: so it has what
    works on every one."""
    permits = [await with_permits(engine.rpc, engine.network) for engine in engines]
    names = [BAZAAR]
    if all(any(token.has_permit for token in network.tokens) for network in permits):
        names.append(eip2612.NAME)
    if all(sponsor.active for sponsor in sponsors):
        names.append(erc20_approval.NAME)
    return names


def _gauges(engines: list[Settlements], watchers: list[Alarms]) -> Iterator[tuple[str, str, dict[str, str], float]]:
    for engine, watcher in zip(engines, watchers, strict=True):
        labels = {"network": engine.network.caip2}
        yield "farebox_settlements_in_flight", "Settlements neither paid nor failed", labels, engine.in_flight
        yield "farebox_settlements_paid", "Settlements with evidence since the start", labels, engine.paid
        yield "farebox_settlements_failed", "Settlements that failed since the start", labels, engine.failed
        yield "farebox_rpc_round_trips", "POSTs to the chain's nodes since the start", labels, engine.rpc.round_trips
        yield "farebox_rpc_available", "1 if the last POST was answered", labels, float(engine.rpc.available)
        for name, text, own_labels, value in watcher.gauges():
            yield name, text, labels | own_labels, value
        yield "farebox_alarms", "Alarms that /readyz shows", labels, len(watcher.raised())
