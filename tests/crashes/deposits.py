"""Deposits by plain transfer, as scripts for the kills: watched, credited once, reorganised, and swept to the treasury."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from eth_account import Account
from eth_account.signers.local import LocalAccount

from contracts.devnet import MULTICALL3_ADDRESS, USDC, USDT, DevToken, call_data, send_signed
from contracts.jsonrpc import rpc
from payments.chain.transactions import encode_aggregate3
from tests.crashes.operations import Operation
from tests.crashes.world import PATIENCE_S, Run
from tests.e2e.clients import sign_in

DOLLAR = 1_000_000
DEEP = 3
"""Blocks after which a deposit is credited, and one more."""


@dataclass(slots=True)
class Deposited(Operation):
    """A wallet asks for its address and sends money there, in both tokens at once."""

    loops: ClassVar[Collection[str]] = ("deposits",)
    tokens: ClassVar[tuple[DevToken, ...]] = (USDC, USDT)
    value: int = DOLLAR // 2
    """Of each token, in atomic units: not worth a sweep."""
    wallets: list[LocalAccount] = field(default_factory=list)
    sessions: list[dict[str, str]] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    sent: str = ""
    """The transaction, once it is in the chain."""

    def prepare(self, run: Run) -> None:
        """Sign in."""
        self.wallets = [run.payer]
        self.sessions = [sign_in(run.http, wallet) for wallet in self.wallets]

    def act(self, run: Run) -> None:
        """Ask for the address and use it."""
        self._register(run)
        self._send(run)

    def done(self, run: Run) -> bool:
        """It is credited."""
        return self._credited(run) == dict.fromkeys(self._accounts(), self.value * 1000)

    def resume(self, run: Run) -> None:
        """Ask again for the address, which is the same one, and use it if that was not done; wait for the credit."""
        known, self.addresses = self.addresses, []
        self._register(run)
        assert known in ([], self.addresses)
        if not self.sent:
            self._send(run)
        run.until(lambda: self.done(run), "the deposit is credited")

    def check(self, run: Run) -> None:
        """Once; and it lies where it was sent to."""
        assert self.done(run)
        assert len(
            run.rows("SELECT id FROM forwarder_movement WHERE state = 'booked' AND direction = 'in'")
        ) == 2 * len(self.wallets)
        for token in self.tokens:
            assert [run.balance(token, address) for address in self.addresses] == [self.value] * len(self.wallets)

    def _register(self, run: Run) -> None:
        for session in self.sessions:
            answer = run.http.post("/v1/wallet/deposit-addresses", headers=session)
            assert answer.status_code == 200, answer.text
            self.addresses.append(answer.json()["deposit_addresses"][0]["address"])

    def _send(self, run: Run) -> None:
        self.sent = send_all(run, [(token, to, self.value) for token in self.tokens for to in self.addresses])
        run.mine(DEEP)

    def _accounts(self) -> list[tuple[str, str]]:
        return [(wallet.address.lower(), token.symbol) for wallet in self.wallets for token in self.tokens]

    def _credited(self, run: Run) -> dict[tuple[str, str], int]:
        rows = run.rows("SELECT owner, asset, balance FROM ledger_account WHERE kind = 'payer' AND balance <> 0")
        return {(owner, asset.partition("/")[2]): balance for owner, asset, balance in rows}


@dataclass(slots=True)
class Reorganised(Deposited):
    """After the credit the chain is another one: the deposit is in a later block, and one that came after it is nowhere."""

    own_chain = True
    reorganised: bool = False

    def prepare(self, run: Run) -> None:
        """Have the address."""
        Deposited.prepare(self, run)
        self._register(run)
        # A reorganisation goes back to a block, not to what was put into the state since.
        for token in self.tokens:
            run.allow(token, MULTICALL3_ADDRESS)
        run.mine(2)

    def act(self, run: Run) -> None:
        """Deposit twice, and rewrite the chain."""
        before = int(rpc(run.world.rpc_url, "eth_blockNumber"), 16)
        self._send(run)
        send_all(run, [(USDC, self.addresses[0], self.value)])
        run.mine(DEEP)
        deadline = time.monotonic() + PATIENCE_S
        account = (run.payer.address.lower(), USDC.symbol)
        while run.gateway.alive and self._credited(run).get(account) != 2 * self.value * 1000:
            assert time.monotonic() < deadline, "the deposits are not credited"
            time.sleep(0.01)
        raw = rpc(run.world.rpc_url, "debug_getRawTransaction", self.sent)
        head = int(rpc(run.world.rpc_url, "eth_blockNumber"), 16)
        rpc(run.world.rpc_url, "anvil_reorg", head - before, [[raw, 2]])
        self.reorganised = True
        run.mine(DEEP)

    def done(self, run: Run) -> bool:
        """The book knows the first deposit at its new place, and the second one no more."""
        head = int(rpc(run.world.rpc_url, "eth_blockNumber"), 16)
        ((cursor,),) = run.rows("SELECT block_number FROM deposit_cursor")
        return self.reorganised and Deposited.done(self, run) and cursor >= head - DEEP + 1

    def resume(self, run: Run) -> None:
        """Wait."""
        run.until(lambda: self.done(run), "the book has followed the chain")

    def check(self, run: Run) -> None:
        """As if it had come there first."""
        Deposited.check(self, run)
        blocks = {int(rpc(run.world.rpc_url, "eth_getTransactionReceipt", self.sent)["blockNumber"], 16)}
        assert set(run.rows("SELECT block_number FROM forwarder_movement WHERE state = 'booked'")) == {
            (block,) for block in blocks
        }


@dataclass(slots=True)
class Swept(Deposited):
    """What several wallets deposit goes to the treasury in one transaction."""

    loops = ("deposits", "sweeps")
    tokens = (USDC,)
    value: int = 2 * DOLLAR

    def prepare(self, run: Run) -> None:
        """Have two addresses."""
        self.wallets = [run.payer, Account.create()]
        self.sessions = [sign_in(run.http, wallet) for wallet in self.wallets]
        self._register(run)

    def act(self, run: Run) -> None:
        """Deposit to both; the sweep is nobody's doing."""
        self._send(run)

    def done(self, run: Run) -> bool:
        """It is in the treasury, and the books say so."""
        # Deep enough to be booked, whatever other runs do to the chain.
        run.mine(1)
        moved = run.rows("SELECT id FROM forwarder_movement WHERE state = 'booked' AND direction = 'out'")
        return Deposited.done(self, run) and len(moved) == len(self.wallets) and not run.open_settlements()

    def resume(self, run: Run) -> None:
        """Wait."""
        if not self.sent:
            self._send(run)
        run.until(lambda: self.done(run), "the deposits are swept")

    def check(self, run: Run) -> None:
        """Everything is the wallets' credit and the treasury's money, moved once."""
        assert Deposited.done(self, run)
        assert run.balance(USDC, run.treasury.address) == self.value * len(self.wallets)
        assert run.rows("SELECT COUNT(*) FROM settlement WHERE kind = 'sweep'") == [(1,)]


def send_all(run: Run, transfers: list[tuple[DevToken, str, int]]) -> str:
    """Send tokens of the payer's in one transaction; returns its hash."""
    for token in {token.symbol: token for token, _, _ in transfers}.values():
        run.allow(token, MULTICALL3_ADDRESS)
    calls = [
        (
            token.address,
            bytes.fromhex(call_data("transferFrom(address,address,uint256)", run.payer.address, to, value)[2:]),
        )
        for token, to, value in transfers
    ]
    key = "0x" + bytes(run.payer.key).hex()
    return send_signed(run.world.rpc_url, key, MULTICALL3_ADDRESS, "0x" + encode_aggregate3(calls).hex())


DEPOSITS: Mapping[str, Callable[[], Operation]] = {
    "deposited": Deposited,
    "deposited and reorganised": Reorganised,
    "swept": Swept,
}
