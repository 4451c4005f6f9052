"""Evidence is watched until it is deep enough, and until that is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from payments.settlement import outbox, states
from payments.settlement.finality import Finality
from payments.settlement.orders import SettlementOrder
from payments.settlement.outbox import Entry
from payments.store import Store, StoreBusy, Transaction
from payments.tenders.exact import PAYMENT
from tests.databases import open_store
from tests.payments.exact_samples import NETWORK, PAY_TO, PAYER, USDC
from tests.payments.fake_chain import FakeChain, FakeRpc

CONFIRMATIONS, BLOCK = 2, 4
ORDER = SettlementOrder(
    id="pay:1",
    kind="payment",
    reference="1",
    chain_id=NETWORK.chain_id,
    token=USDC.address,
    payer=PAYER,
    pay_to=PAY_TO,
    value=5,
    authorization_nonce=1,
    call_to=USDC.address,
    call_data=b"",
    valid_before=2**40,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def executed(tx: Transaction, state: str) -> Entry:
    assert outbox.enqueue(tx, ORDER)
    assert states.move(tx, ORDER.id, "submitted")
    assert states.move(tx, ORDER.id, state, transaction_hash="0x01", transfer_log_index=0, block_number=BLOCK)
    entry = outbox.find(tx, ORDER.id)
    assert entry is not None
    return entry


@pytest.mark.parametrize(("state", "following"), [("mined", "final"), ("superseded", "queued")])
async def test_what_could_not_be_recorded_is_found_by_the_next_look(
    store: Store, monkeypatch: pytest.MonkeyPatch, state: str, following: str
) -> None:
    chain = FakeChain(USDC.address, "0x" + "ba" * 20, {})
    entry = await store.write(lambda tx: executed(tx, state))
    entry.block_hash = chain.blocks[BLOCK].hash
    told: list[tuple[str, Entry]] = []
    finality = Finality(
        store,
        FakeRpc(chain),
        NETWORK.chain_id,
        {},
        {ORDER.kind: PAYMENT},
        confirmations=CONFIRMATIONS,
        interval_s=0,
        finalised=lambda entry: told.append(("final", entry)),
        reopened=lambda entry: told.append(("queued", entry)),
        adopt=lambda transaction: pytest.fail(f"{transaction} is not ours"),
    )
    finality.watch(entry)
    await finality.round(chain.head.number)
    assert entry.state == state, "not deep enough yet"
    if following == "queued":
        chain.reorganise(1, keep=False)
    for _ in range(CONFIRMATIONS):
        chain.mine()

    async def takes_nothing(_: Any) -> Any:
        raise StoreBusy("the database takes nothing now")

    with monkeypatch.context() as busy:
        busy.setattr(store, "write", takes_nothing)
        await finality.round(chain.head.number)
    assert (told, entry.state, list(finality.watched)) == ([], state, [ORDER.id])
    for _ in range(2):
        await finality.round(chain.head.number)
    assert told == [(following, entry)]
    assert finality.watched == {}
    row = await store.read(lambda tx: tx.execute("SELECT state FROM settlement").fetchone())
    assert row[0] == following
