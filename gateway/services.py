"""Everything that a running gateway is made of, opened in order and closed in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import structlog

from gateway.access.keys import Access
from gateway.access.limits import QuoteLimiter
from gateway.api.wallet import WalletApi
from gateway.api.withdrawals import WithdrawalApi
from gateway.channels import open_channels
from gateway.execution.failover import Executor
from gateway.extensions import Extensions
from gateway.flow import Flow
from gateway.metrics import Metrics
from gateway.offers import NetworkPayments, Offers
from gateway.planning import Planner
from gateway.providers.registry import Registry
from gateway.replays import Replays
from gateway.routing.catalog import Catalog
from gateway.routing.engine import Engine
from gateway.routing.tokens import count_input, count_text
from gateway.settings import NetworkSettings, Settings, WalletSettings
from gateway.topups import TopUps
from payments import anchors, kinds, recovery
from payments.chain.batches import missing_for_upto
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.channels.refunds import Refunder
from payments.channels.services import has_channels
from payments.deposits import Deposits
from payments.doctor import verify_tokens
from payments.leases import Leases
from payments.migrate import upgrade
from payments.money import nano_to_atomic_down, usd_to_nano
from payments.quotes import QuoteSealer
from payments.reconciliation import open_books
from payments.settlement import sweeps
from payments.settlement.alarms import Alarms
from payments.settlement.engine import Settlements
from payments.settlement.refunds import Refunds
from payments.settlement.withdrawer import Withdrawer
from payments.sign_in import SignIn
from payments.sponsoring.records import Budget
from payments.sponsoring.sponsor import Sponsor
from payments.store import Store, StoreBusy
from payments.tenders.exact_scheme import ExactScheme
from payments.tenders.exact_services import ExactServices
from payments.tenders.schemes import Scheme
from payments.tenders.upto_scheme import UptoScheme
from payments.verification.chain_state import ChainStates
from payments.verification.permits import with_permits
from payments.withdrawals import Limits
from payments.x402.extensions.offer_receipt import OfferSigner
from payments.x402.extensions.sign_in_with_x import SignInWithX

SWEEP_INTERVAL_S = 60.0
DEPOSIT_INTERVAL_S_MIN = 1.0
WEI_DECIMALS = 18
QUOTE_MARGIN_S = 60
"""What a payment's validity exceeds a quote's by, so that a payment signed at the last moment can still be mined."""
log = structlog.get_logger("farebox.services")


@dataclass(slots=True)
class Chain:
    """One network under way."""

    network: Network
    rpc: Rpc
    settlements: Settlements
    refunds: Refunds
    withdrawer: Withdrawer
    deposits: Deposits | None
    sponsor: Sponsor
    alarms: Alarms
    refunder: Refunder | None


@dataclass(slots=True)
class Services:
    """What handlers use."""

    store: Store
    catalog: Catalog
    metrics: Metrics
    limiter: QuoteLimiter
    offers: Offers
    extensions: Extensions
    flow: Flow
    wallet: WalletApi
    withdrawals: WithdrawalApi
    topups: TopUps
    chains: list[Chain]

    @property
    def channels(self) -> dict[int, Refunder]:
        """Who refunds payment channels, by chain id."""
        return {chain.network.chain_id: chain.refunder for chain in self.chains if chain.refunder is not None}

    def alarms(self) -> list[dict[str, str]]:
        """What is wrong, for `/readyz`; empty if the gateway can take payments and serve."""
        return [asdict(alarm) for chain in self.chains for alarm in chain.alarms.raised()]

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: Settings, metrics: Metrics) -> AsyncIterator[Services]:
        """Open the database, resume what a crash left behind, and start every part."""
        async with contextlib.AsyncExitStack() as cleanup:
            upgrade(settings.database)
            store = Store(settings.database, lease_s=settings.lease_s)
            cleanup.callback(store.close)
            secret = (settings.secret or secrets.token_hex(32)).encode()
            if settings.secret is None:
                log.warning("FAREBOX_SECRET is not set: quotes and sessions end with this process")

            catalog = Catalog.from_settings(settings)
            executor = Executor(
                settings, Registry.from_settings(settings), count_text=count_text, count_input=count_input
            )
            cleanup.push_async_callback(executor.aclose)
            engine = Engine(catalog, settings, is_open=lambda candidate_id: executor.breakers.of(candidate_id).blocked)
            planner = Planner(settings, catalog, engine, count_input)

            leases = await cleanup.enter_async_context(recovery.serving(store))
            chains: list[Chain] = []
            payable: list[NetworkPayments] = []
            for network in settings.resolved_networks():
                chain, payments = await _open_chain(settings, network, store, leases, cleanup)
                chains.append(chain)
                payable.append(payments)

            assets = tuple(token.asset for chain in chains for token in chain.network.tokens)
            sign_in = _sign_in(settings, secret, chains)
            access = Access(store, sign_in)
            limiter = QuoteLimiter(settings.limits.quotes_per_minute)
            timeout_s = settings.payments.quote_ttl_s + QUOTE_MARGIN_S
            extensions = Extensions(
                store,
                OfferSigner(secret),
                SignInWithX(secret, [chain.network.caip2 for chain in chains]),
                _origin(settings),
                settings.payments.extensions,
                settings.models[0].id if settings.models else None,
                frozenset(chain.network.caip2 for chain in chains if chain.sponsor.active),
            )
            offers = Offers(
                payable,
                QuoteSealer(secret),
                planner,
                settings.public_url,
                timeout_s,
                tuple(settings.payments.schemes),
                extensions,
            )
            replays = Replays(store, settings.payments.replay_ttl_s)
            flow = Flow(
                planner=planner,
                offers=offers,
                executor=executor,
                access=access,
                extensions=extensions,
                store=store,
                replays=replays,
                limiter=limiter,
                metrics=metrics,
                credit_assets=assets,
                json_depth_max=settings.limits.json_depth,
            )
            depth = settings.limits.json_depth
            withdrawers = [chain.withdrawer for chain in chains]
            withdrawals = WithdrawalApi(store, access, withdrawers, _withdrawal_limits(settings.wallet), depth)
            topups = TopUps(
                store=store,
                offers=offers,
                access=access,
                limiter=limiter,
                replays=replays,
                minimum_nano_usd=usd_to_nano(settings.wallet.topup_minimum_usd),
                maximum_nano_usd=usd_to_nano(settings.wallet.topup_maximum_usd),
                quote_ttl_s=settings.payments.quote_ttl_s,
                json_depth_max=depth,
            )
            limits = {"topups": topups.limits_json() if payable else None, "withdrawals": withdrawals.limits_json()}
            deposits = [chain.deposits for chain in chains if chain.deposits is not None]
            wallet = WalletApi(store, sign_in, access, assets, limits, deposits, depth)
            metrics.add_gauges(lambda: _gauges(chains))
            sweeper = asyncio.create_task(_sweep(store))
            cleanup.callback(sweeper.cancel)
            yield cls(store, catalog, metrics, limiter, offers, extensions, flow, wallet, withdrawals, topups, chains)


async def _open_chain(
    settings: Settings, network: Network, store: Store, leases: Leases, cleanup: contextlib.AsyncExitStack
) -> tuple[Chain, NetworkPayments]:
    own = next(entry for entry in settings.networks if entry.chain_id == network.chain_id)
    pay_to = settings.pay_to_for(network.chain_id).lower()
    rpc = Rpc(own.rpc_urls, chain_id=network.chain_id, lag_blocks_max=network.lag_blocks_max)
    cleanup.push_async_callback(rpc.aclose)
    await verify_tokens(rpc, network)
    network = await with_permits(rpc, network)
    await anchors.hold_fast(store, rpc, network)
    await open_books(store, rpc, network, pay_to)
    settlements = Settlements(
        store,
        rpc,
        network,
        settings.signer_keys,
        treasury_key=settings.treasury_key,
        batch_contract=own.batch_contract,
        confirmations=own.confirmations,
        cross_check_nano_usd=usd_to_nano(settings.payments.cross_check_usd),
        leases=leases,
    )
    # Whatever is offered now: what was begun before, here or in another process, comes to its end.
    kinds.register(settlements, store)
    upto_works = own.batch_contract is not None and await _can_settle_upto(rpc, own.batch_contract, settlements)
    threshold_nano_usd = usd_to_nano(settings.payments.refund_threshold_usd)
    refunds = Refunds(store, settlements, network.tokens, threshold_nano_usd)
    sends_back = settings.treasury_key is not None and threshold_nano_usd > 0
    withdrawer = Withdrawer(store, settlements, network.tokens, pay_to)
    await settlements.start()
    cleanup.push_async_callback(settlements.stop)
    sponsor = Sponsor(store, settlements, _budget(own))
    await sponsor.start()
    cleanup.push_async_callback(sponsor.stop)
    deposits = None
    if own.deposit_factory is not None:
        deposits = await _open_deposits(settings, network, own, settlements, store, leases, cleanup)
    await withdrawer.start()
    cleanup.push_async_callback(withdrawer.stop)
    if sends_back:
        await refunds.start()
        cleanup.push_async_callback(refunds.stop)
    alarms = Alarms(
        settlements,
        pay_to,
        gas_minimum_wei=nano_to_atomic_down(usd_to_nano(settings.payments.gas_alarm_native), WEI_DECIMALS),
        treasury_minimum_nano_usd=usd_to_nano(settings.payments.treasury_alarm_usd),
    )
    await alarms.start()
    cleanup.push_async_callback(alarms.stop)
    services = ExactServices(
        store=store,
        settlements=settlements,
        chain_states=ChainStates(rpc, network),
        payer_exposure_nano_usd=usd_to_nano(settings.payments.payer_exposure_usd),
        settlement_wait_s=settings.payments.settlement_wait_s,
        credited=refunds.consider if sends_back else None,
        sponsor=sponsor,
    )
    schemes: list[Scheme] = [ExactScheme(network, pay_to, services, own.wallet_factories)]
    if upto_works:
        assert own.batch_contract is not None
        answer_s = settings.timeouts.total_ms // 1000 + settings.payments.settlement_wait_s
        exposure_nano_usd = usd_to_nano(settings.payments.upto_exposure_usd)
        schemes.append(
            UptoScheme(
                network,
                pay_to,
                own.batch_contract,
                services,
                answer_s=answer_s,
                exposure_max_nano_usd=exposure_nano_usd,
            )
        )
    refunder = None
    if settlements.signers and await has_channels(rpc):
        channels, refunder = await open_channels(settings, settlements, services, pay_to, leases, alarms, cleanup)
        schemes.append(channels)
    chain = Chain(network, rpc, settlements, refunds, withdrawer, deposits, sponsor, alarms, refunder)
    return chain, NetworkPayments(network, tuple(schemes))


async def _open_deposits(
    settings: Settings,
    network: Network,
    own: NetworkSettings,
    settlements: Settlements,
    store: Store,
    leases: Leases,
    cleanup: contextlib.AsyncExitStack,
) -> Deposits:
    assert own.deposit_factory is not None
    deposits = Deposits(
        store,
        settlements.rpc,
        network,
        settings.pay_to_for(network.chain_id),
        own.deposit_factory,
        confirmations=own.confirmations,
        leased=leases,
        interval_s=max(network.block_time_ms / 1000, DEPOSIT_INTERVAL_S_MIN),
    )
    await deposits.start()
    cleanup.push_async_callback(deposits.stop)
    sweeping = sweeps.Sweeps(
        store,
        settlements,
        deposits,
        threshold_nano_usd=usd_to_nano(settings.wallet.sweep_threshold_usd),
        interval_s=settings.wallet.sweep_interval_s,
    )
    await sweeping.start()
    cleanup.push_async_callback(sweeping.stop)
    return deposits


def _budget(own: NetworkSettings) -> Budget:
    hourly, payer = own.sponsor_hourly_native, own.sponsor_payer_native
    return Budget(*(nano_to_atomic_down(usd_to_nano(text), WEI_DECIMALS) for text in (hourly, payer)))


def _withdrawal_limits(settings: WalletSettings) -> Limits:
    return Limits(
        minimum=usd_to_nano(settings.withdrawal_minimum_usd),
        maximum=usd_to_nano(settings.withdrawal_maximum_usd),
        daily=usd_to_nano(settings.withdrawal_daily_usd),
        review=usd_to_nano(settings.withdrawal_review_usd),
        fee=usd_to_nano(settings.withdrawal_fee_usd),
    )


async def _can_settle_upto(rpc: Rpc, batch_contract: str, settlements: Settlements) -> bool:
    """Whether the batch contract takes batches from every signer, and the proxy is there that it settles through."""
    missing = await missing_for_upto(rpc, batch_contract, [signer.address for signer in settlements.signers])
    if missing is not None:
        log.warning("upto_not_offered", network=settlements.network.caip2, reason=missing)
    return missing is None


def _origin(settings: Settings) -> str:
    return settings.public_url or f"http://{settings.host}:{settings.port}"


def _sign_in(settings: Settings, secret: bytes, chains: list[Chain]) -> SignIn:
    url = _origin(settings)
    return SignIn(
        secret=secret,
        domain=urlsplit(url).netloc,
        uri=url,
        chain_id=chains[0].network.chain_id if chains else 1,
        session_ttl_s=settings.payments.session_ttl_s,
    )


async def _sweep(store: Store) -> None:
    """Forget kept answers and used nonces whose time is over."""
    while True:
        await asyncio.sleep(SWEEP_INTERVAL_S)
        try:
            await store.write(lambda tx: recovery.sweep_expired(tx, time.time_ns() // 1_000_000))
        except StoreBusy as error:
            log.warning("what has expired is swept away later", error=str(error))
        except Exception:
            # What has expired since is swept away the next time.
            log.exception("sweeping away what has expired failed")


def _gauges(chains: list[Chain]) -> Iterator[tuple[str, str, dict[str, str], float]]:
    for chain in chains:
        labels = {"network": chain.network.caip2}
        yield (
            "farebox_settlements_in_flight",
            "Settlements neither paid nor failed",
            labels,
            chain.settlements.in_flight,
        )
        yield "farebox_settlements_paid", "Settlements with evidence since the start", labels, chain.settlements.paid
        yield "farebox_settlements_failed", "Settlements that failed since the start", labels, chain.settlements.failed
        yield "farebox_rpc_round_trips", "POSTs to the chain's nodes since the start", labels, chain.rpc.round_trips
        yield "farebox_rpc_available", "1 if the last POST was answered", labels, float(chain.rpc.available)
        for name, text, own_labels, value in (*chain.rpc.gauges(), *chain.alarms.gauges()):
            yield name, text, labels | own_labels, value
        raised = len(chain.alarms.raised())
        yield "farebox_alarms", "Alarms that /readyz shows", labels, raised
