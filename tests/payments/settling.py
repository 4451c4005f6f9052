"""What the tests of settlement share: signed payments, an engine on the test chain, and books to see what it credits."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import coincurve
import pytest

from contracts.devnet import Devnet, Wallet, rpc, send_signed
from payments.chain.networks import EXACT_PERMIT2_PROXY_ADDRESS, MULTICALL3_ADDRESS, Network, Token
from payments.chain.rpc import Rpc
from payments.chain.transactions import encode_aggregate3, settle_call
from payments.kinds import every_kind
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.money import atomic_to_nano_down
from payments.settlement.engine import Settlements
from payments.settlement.evidence import PaymentProof
from payments.settlement.orders import Kind, SettlementOrder
from payments.settlement.outbox import order_gas
from payments.store import Store, Transaction
from payments.verification.eip712 import eip3009_digest, permit2_exact_digest
from payments.verification.signatures import checksum_address
from payments.x402.wire import Eip3009Authorization, Payment, Permit2Authorization

PAY_TO = "0x" + "7e" * 20
HOUR_S = 3600
SETTLED_S = 20


def key_of(wallet: Wallet) -> coincurve.PrivateKey:
    return coincurve.PrivateKey(bytes.fromhex(wallet.private_key[2:]))


def sign(wallet: Wallet, digest: bytes) -> bytes:
    signature = key_of(wallet).sign_recoverable(digest, hasher=None)
    return signature[:64] + bytes((27 + signature[64],))


async def later_than_the_last_block(rpc_url: str) -> int:
    """Now, in unix seconds, once it is later than the last block of a chain where nothing happens."""
    last = int(rpc(rpc_url, "eth_getBlockByNumber", "latest", False)["timestamp"], 16)
    await asyncio.sleep(max(0.0, last + 1 - time.time()))
    return int(time.time())


def pay(
    wallet: Wallet,
    token: Token,
    value: int,
    *,
    to: str = PAY_TO,
    nonce: int | None = None,
    valid_s: int = HOUR_S,
    valid_after: int = 0,
) -> Payment:
    """A signed payment by the token's own transfer method."""
    nonce = secrets.randbits(256) if nonce is None else nonce
    deadline = int(time.time()) + valid_s
    payer = wallet.address.lower()
    authorization: Eip3009Authorization | Permit2Authorization
    if token.transfer_method == "eip3009":
        authorization = Eip3009Authorization(payer, to, value, valid_after, deadline, nonce)
        signature = sign(wallet, eip3009_digest(authorization, token))
    else:
        authorization = Permit2Authorization(
            payer, token.address, value, EXACT_PERMIT2_PROXY_ADDRESS, nonce, deadline, to, valid_after
        )
        signature = sign(wallet, permit2_exact_digest(authorization, token.chain_id))
    return Payment(
        2, "exact", f"eip155:{token.chain_id}", None, None, secrets.token_bytes(32), authorization, signature
    )


def order_for(payment: Payment, token: Token) -> SettlementOrder:
    call_to, call_data = settle_call(payment, token)
    authorization = payment.authorization
    name = secrets.token_hex(8)
    return SettlementOrder(
        id=f"pay:{name}",
        kind="payment",
        reference=name,
        chain_id=token.chain_id,
        token=token.address,
        payer=authorization.payer,
        pay_to=authorization.recipient,
        value=authorization.value,
        authorization_nonce=authorization.nonce,
        call_to=call_to,
        call_data=call_data,
        valid_before=authorization.expires_at,
    )


class Books:
    """The callbacks of an engine: credits the payer in the real ledger, and remembers what it was called with."""

    def __init__(self, network: Network) -> None:
        self.tokens = {token.address: token for token in network.tokens}
        self.mined: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []

    @property
    def kind(self) -> Kind:
        """How the engine handles payments for these books."""
        return Kind(PaymentProof(), self.on_mined, self.on_failed, order_gas, batchable=True)

    def on_mined(self, tx: Transaction, row: dict[str, Any]) -> None:
        token = self.tokens[row["token"]]
        transfers.post(
            tx,
            id=f"settle:{row['id']}",
            debit=account_id("custody", token.asset),
            credit=payer_account(row["payer"], token.asset),
            amount=atomic_to_nano_down(int(row["received_value"]), token.decimals),
            reference=row["id"],
        )
        self.mined.append(row)

    def on_failed(self, tx: Transaction, row: dict[str, Any]) -> None:
        self.failed.append(row)


@contextlib.asynccontextmanager
async def engine(
    store: Store,
    network: Network,
    url: str,
    signers: list[Wallet],
    books: Books,
    *,
    start: bool = True,
    treasury: Wallet | None = None,
    batch_contract: str | None = None,
    confirmations: int = 2,
    housekeeping_s: float = 0.05,
) -> AsyncIterator[Settlements]:
    async with Rpc([url], timeout_s=5) as chain_rpc:
        settlements = Settlements(
            store,
            chain_rpc,
            network,
            [wallet.private_key for wallet in signers],
            treasury_key=None if treasury is None else treasury.private_key,
            confirmations=confirmations,
            batch_contract=batch_contract,
            housekeeping_s=housekeeping_s,
        )
        kinds = every_kind(store, network) | {"payment": books.kind}
        for name, kind in kinds.items():
            settlements.handle(name, kind)
        if start:
            await settlements.start()
        try:
            yield settlements
        finally:
            await settlements.stop()


async def credit(store: Store, wallet: Wallet, token: Token) -> int:
    """What the books owe a wallet, in nano-USD."""
    account = payer_account(wallet.address.lower(), token.asset)
    return (await store.read(lambda tx: transfers.balance(tx, account))).balance


async def owe(store: Store, wallet: Wallet, token: Token, amount_nano_usd: int) -> None:
    """As if the wallet had paid and not used it."""
    account = payer_account(wallet.address.lower(), token.asset)
    await store.write(
        lambda tx: transfers.post(
            tx,
            id=f"owed:{account}",
            debit=account_id("custody", token.asset),
            credit=account,
            amount=amount_nano_usd,
            reference="test",
        )
    )


async def rows(store: Store, columns: str = "id, state") -> list[tuple[Any, ...]]:
    return await store.read(lambda tx: tx.execute(f"SELECT {columns} FROM settlement ORDER BY created_ms").fetchall())


async def transactions(store: Store, columns: str = "kind, state") -> list[tuple[Any, ...]]:
    """Of the transactions that we signed, in the order of their nonces."""
    query = f"SELECT {columns} FROM chain_transaction ORDER BY signer, signer_nonce"
    return await store.read(lambda tx: tx.execute(query).fetchall())


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait for something that nothing announces."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


async def until_rows(store: Store, expected: list[tuple[Any, ...]], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while await rows(store) != expected:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.02)


async def decided(store: Store) -> None:
    """Wait until no settlement is queued or submitted."""
    async with asyncio.timeout(20):
        while {"queued", "submitted"} & {state for (state,) in await rows(store, "state")}:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def lagging_logs(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Inside, nodes know the state of the last block and none of its logs. Yields what waits until they were asked for logs so
    often."""
    looks, true_call = 0, Rpc.call

    async def call(self: Rpc, method: str, *arguments: Any) -> Any:
        nonlocal looks
        if method != "eth_getLogs":
            return await true_call(self, method, *arguments)
        looks += 1
        return []

    async def asked(times: int) -> None:
        await until(lambda: looks >= times)

    with monkeypatch.context() as lag:
        lag.setattr(Rpc, "call", call)
        yield asked


def submit_elsewhere(chain: Devnet, calls: list[tuple[str, bytes]]) -> str:
    """Somebody else executes calls, in one transaction and in a block before ours."""
    rpc(chain.rpc_url, "anvil_dropAllTransactions")
    to, data = calls[0] if len(calls) == 1 else (MULTICALL3_ADDRESS, encode_aggregate3(calls))
    return send_signed(chain.rpc_url, chain.wallets[9].private_key, checksum_address(to), "0x" + data.hex())


async def submit(settlements: Settlements, payment: Payment, token: Token) -> str:
    """Our own transaction is under way, and not mined."""
    order = order_for(payment, token)
    sent = settlements.courier.broadcasts
    await settlements.submit(order)
    await until(lambda: settlements.courier.broadcasts > sent)
    return order.id


def let_ours_be_mined(chain: Devnet, settlements: Settlements) -> None:
    for entry in list(settlements.courier.carried.values()):
        settlements.courier.carry(entry)
    rpc(chain.rpc_url, "evm_setAutomine", True)


def send(chain: Devnet, sender: Wallet, to: str, data: str, *, bid_gwei: int) -> None:
    """A transaction for the next block, where whoever bids more comes first."""
    rpc(chain.rpc_url, "anvil_impersonateAccount", sender.address)
    fees = {"maxFeePerGas": hex(bid_gwei * 10**9), "maxPriorityFeePerGas": hex(bid_gwei * 10**9)}
    rpc(
        chain.rpc_url, "eth_sendTransaction", {"from": sender.address, "to": to, "data": data, "gas": hex(10**6)} | fees
    )


def mine(url: str, blocks: int = 1) -> None:
    for _ in range(blocks):
        rpc(url, "evm_mine")


def receipt(url: str, transaction_hash: str | None) -> dict[str, Any]:
    assert transaction_hash is not None
    found: dict[str, Any] = rpc(url, "eth_getTransactionReceipt", transaction_hash)
    return found
