"""What the state machines have in common: one process after another on one database and one chain, what befalls them, and
how long everything may take to be decided once nothing is in the way any more.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from payments import kinds
from payments.chain.networks import Network, Token
from payments.chain.rpc import RpcError, RpcUnavailable
from payments.ledger import books
from payments.reconciliation import open_books
from payments.recovery import recover
from payments.settlement import stories
from payments.settlement.engine import Settlements
from payments.store import StoreBusy
from payments.tenders.exact_services import ExactServices
from payments.verification.chain_state import ChainStates
from tests.databases import sqlite_file
from tests.payments.fake_chain import FakeChain
from tests.payments.simulation import Killed, Process, World

T = TypeVar("T")

CHAIN_ID = 84532
TOKEN = Token("USDC", CHAIN_ID, "0x" + "03" * 20, 6, "eip3009", "USDC", "2")
NETWORK = Network(CHAIN_ID, None, (TOKEN,), block_time_ms=1_000)
BATCH, STRANGER, THIEF = ("0x" + byte * 20 for byte in ("ba", "5a", "7f"))
SIGNER_KEYS = ["0x" + "51" * 32, "0x" + "52" * 32]
CONFIRMATIONS = 2
NANO = 1_000
"""Nano-USD in an atomic unit of the token."""


class Machine(RuleBasedStateMachine):
    """A process with an engine, again and again. Subclasses say what it does (`begin`) and what must be so."""

    undecided: ClassVar[tuple[str, ...]] = (
        "SELECT id, state FROM settlement WHERE state IN ('queued', 'submitted', 'mined')",
    )
    """Queries for what is not decided yet."""
    calm_blocks: ClassVar[int] = CONFIRMATIONS + 3
    """So long is everything decided and unchanged in the end: whatever was reorganised away has been noticed by then."""
    rounds_max: ClassVar[int]
    """Blocks after which everything is decided."""
    engine: Settlements

    def prepare(self, seed: int, balances: dict[str, int]) -> None:
        """Make the world, its chain and an empty database; open the first process."""
        self.world = World(seed)
        self.database = Path(tempfile.mkdtemp(prefix="farebox-machine-")) / "farebox.db"
        sqlite_file(self.database)
        self.chain = FakeChain(TOKEN.address, BATCH, balances, self.world.time)
        self.open_process()

    # --- the process --------------------------------------------------------------------------------------------------

    def open_process(self) -> None:
        while True:
            self.process = Process(self.world, self.database, self.chain)
            try:
                self.process.run(self.begin())
            except (Killed, StoreBusy, RpcUnavailable, RpcError):
                self.process.bury()
                self.world.busy = 0  # whoever runs it tries again when the database is there
            else:
                return

    async def begin(self) -> None:
        """Start what the process is to do; sets `engine`."""
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Do it; after a kill begin anew, with nothing said about what was done."""
        try:
            return self.process.run(work)
        except Killed:
            self.reopen()
            return None
        finally:
            self.check_always()

    def reopen(self) -> None:
        """The process ends without a word, and the next one begins."""
        self.process.bury()
        self.open_process()

    def read(self, query: str) -> list[Any]:
        found: list[Any] = self.process.store._database.read(lambda tx: tx.execute(query).fetchall())
        return found

    # --- what happens besides -----------------------------------------------------------------------------------------

    def let_time_pass(self, seconds: int, blocks: bool, busy: bool) -> None:
        self.world.busy = 1_000_000 if busy else 0
        for _ in range(seconds):
            self.run(asyncio.sleep(1))
            if blocks:
                self.chain.mine()
        self.world.busy = 0

    def mine_and_take_away(self, depth: int, keep: bool, pause_s: float) -> None:
        """The evidence may be seen in the block that is then taken away, or not."""
        self.chain.mine()
        self.run(asyncio.sleep(pause_s))
        self.chain.reorganise(depth, keep=keep)

    @rule(batches=st.integers(1, 2))
    def batches_run_out_of_gas(self, batches: int) -> None:
        self.chain.contracts.batches_out_of_gas = batches

    @rule(refuse=st.integers(0, 3), lose=st.integers(0, 3))
    def the_node_fails(self, refuse: int, lose: int) -> None:
        self.process.rpc.refuse, self.process.rpc.lose = refuse, lose

    # --- what must be so ----------------------------------------------------------------------------------------------

    def check_always(self) -> None:
        """Asked whenever the process has done something and the chain nothing yet."""

    def check(self) -> None:
        """Asked when everything is decided."""
        raise NotImplementedError

    def finish(self) -> None:
        """Bring everything to its end."""
        raise NotImplementedError

    def teardown(self) -> None:
        try:
            self.finish()
            self.check()
        finally:
            self.process.bury()
            shutil.rmtree(self.database.parent)

    def put_right(self) -> None:
        """Nothing more happens but blocks."""
        self.world.kill_in, self.world.busy = None, 0
        self.process.rpc.refuse = self.process.rpc.lose = self.chain.contracts.batches_out_of_gas = 0
        self.chain.mine()

    def wait_until_decided(self) -> None:
        calm = rounds = 0
        while calm < self.calm_blocks:
            self.run(asyncio.sleep(1))
            self.chain.mine()
            undecided = [row for query in self.undecided for row in self.read(query)]
            calm = 0 if undecided or self.engine._care.transactions else calm + 1
            rounds += 1
            assert rounds < self.rounds_max, f"never decided: {undecided}, {self.engine._care.transactions}"

    def ask_again_for_all_that_failed(self) -> None:
        """A person asks for second looks."""
        for (settlement_id,) in self.read("SELECT id FROM settlement WHERE state='failed'"):
            self.run(self.process.store.write(lambda tx, wished=settlement_id: stories.ask_again(tx, wished)))  # type: ignore[misc]
        self.wait_until_decided()


class GatewayMachine(Machine):
    """Requests beside each other at one gateway, which go on in the background when a rule is over."""

    treasury: ClassVar[str]
    treasury_key: ClassVar[str | None] = None
    undecided: ClassVar[tuple[str, ...]] = (*Machine.undecided, "SELECT id, state FROM receipt WHERE state='open'")

    def prepare(self, seed: int, balances: dict[str, int]) -> None:
        self.wrong: list[BaseException] = []
        """What requests ended with and should not have."""
        super().prepare(seed, balances)

    async def open_services(self, exposure_nano_usd: int) -> ExactServices:
        """What every tender needs; the engine is not started."""
        store, rpc = self.process.store, self.process.rpc
        await recover(store)
        await open_books(store, rpc, NETWORK, self.treasury)
        self.engine = Settlements(
            store,
            rpc,
            NETWORK,
            SIGNER_KEYS,
            treasury_key=self.treasury_key,
            batch_contract=BATCH,
            confirmations=CONFIRMATIONS,
        )
        kinds.register(self.engine, store)
        return ExactServices(
            store=store,
            settlements=self.engine,
            chain_states=ChainStates(rpc, NETWORK),
            payer_exposure_nano_usd=exposure_nano_usd,
            settlement_wait_s=8,
        )

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.process.loop.create_task(work).add_done_callback(self.ended)

    def ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.wrong.append(error)

    def check_always(self) -> None:
        assert self.wrong == []
        assert self.process.store._database.read(books.check) == []

    @rule(seconds=st.integers(1, 10), blocks=st.booleans(), busy=st.booleans())
    def time_passes(self, seconds: int, blocks: bool, busy: bool) -> None:
        self.let_time_pass(seconds, blocks, busy)

    @rule(after=st.integers(0, 30), pause_s=st.sampled_from((0.1, 1)), block=st.booleans())
    def a_kill(self, after: int, pause_s: float, block: bool) -> None:
        if block:
            self.chain.mine()
        self.world.kill_in = after
        self.run(asyncio.sleep(pause_s))

    @rule(depth=st.integers(1, CONFIRMATIONS), keep=st.booleans(), pause_s=st.sampled_from((0, 0.3, 2)))
    def mine_and_reorganise(self, depth: int, keep: bool, pause_s: float) -> None:
        self.mine_and_take_away(depth, keep, pause_s)
