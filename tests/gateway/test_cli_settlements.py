"""`farebox settlements`: finding them, telling one's story, asking for another look."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from payments.chain.signers import Signer
from payments.chain.transactions import Call, Fees
from payments.leases import signer_name
from payments.ledger import transfers
from payments.settlement import outbox, outgoing, states
from payments.settlement.orders import SettlementOrder
from payments.store import Transaction
from tests.databases import open_store
from tests.gateway.command_line import Run, parsed, run

__all__ = ["run"]

PAYER, OTHER, TOKEN = "0x" + "11" * 20, "0x" + "22" * 20, "0x" + "33" * 20
EVIDENCE = "0x" + "ee" * 32
HOUR_MS = 3_600_000


def order(name: str, payer: str, kind: str = "payment") -> SettlementOrder:
    return SettlementOrder(
        id=f"{kind}:{name}",
        kind=kind,
        reference=f"rcpt_{name}",
        chain_id=84532,
        token=TOKEN,
        payer=payer,
        pay_to="0x" + "44" * 20,
        value=1_000,
        authorization_nonce=7,
        call_to=TOKEN,
        call_data=b"call",
        valid_before=2_000_000_000,
    )


def fill(tx: Transaction) -> None:
    """A batch that paid one order and failed another, and two orders that wait, one of them for an hour."""
    signer = Signer.from_hex("0x" + "55" * 32)
    signer.nonce_floor = 5
    lease = (signer_name(84532, signer.address), tx.instance, 2**53)
    tx.execute("INSERT INTO lease (name, owner, expires_ms) VALUES (?, ?, ?)", lease)
    call = Call("0x" + "66" * 20, b"batch", 500_000)
    batch = outgoing.write(tx, id="tx_1", chain_id=84532, kind="batch", call=call, signer=signer, fees=Fees(30, 10))
    entries = [
        outbox.submit(tx, order(name, PAYER), "tx_1", place, 90) for place, name in enumerate(("paid", "failed"))
    ]
    outbox.carry(tx, batch, [entry for entry in entries if entry is not None])
    outgoing.replace(tx, batch, Fees(60, 20))
    receipt = {"blockNumber": "0x64", "gasUsed": "0x186a0", "effectiveGasPrice": "0x3b9aca00"}
    outgoing.include(tx, batch, receipt)
    evidence = {"transaction_hash": EVIDENCE, "transfer_log_index": 3, "received_value": "1000", "block_number": 100}
    assert states.move(tx, "payment:paid", "mined", **evidence)
    assert states.move(tx, "payment:failed", "failed", reason="the authorization was cancelled")
    transfers.post(tx, id="settle:paid", debit="custody@A", credit=f"payer:{PAYER}@A", amount=1, reference="rcpt_paid")
    outbox.enqueue(tx, order("old", OTHER, "refund"))
    outbox.enqueue(tx, order("new", OTHER))
    tx.execute("UPDATE settlement SET created_ms=created_ms-? WHERE id='refund:old'", (HOUR_MS,))


@pytest.fixture
def filled(run: Run) -> None:
    Path("data").mkdir()
    store = open_store(Path("data"))
    asyncio.run(store.write(fill))
    store.close()


def listed(run: Run, *arguments: str) -> set[str]:
    return {row["id"] for row in parsed(run("settlements", "list", "--json", *arguments))["settlements"]}


@pytest.mark.usefixtures("filled")
def test_settlements_are_found_by_state_kind_payer_and_age(run: Run) -> None:
    paid, failed, old, new = "payment:paid", "payment:failed", "refund:old", "payment:new"
    assert listed(run) == {paid, failed, old, new}
    assert listed(run, "--state", "open") == {old, new}
    assert listed(run, "--state", "paid") == {paid}
    assert listed(run, "--state", "failed") == {failed}
    assert listed(run, "--kind", "refund") == {old}
    assert listed(run, "--payer", OTHER.upper().replace("X", "x")) == {old, new}
    assert listed(run, "--older-than", "30m") == {old}
    assert listed(run, "--older-than", "30m", "--state", "open", "--payer", PAYER) == set()
    assert len(listed(run, "--limit", "2")) == 2
    text = run("settlements", "list").output
    assert EVIDENCE in text
    assert "the authorization was cancelled" in text


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    "arguments", [("--state", "odd"), ("--older-than", "soon"), ("--kind", "foo"), ("--payer", "0xfoo")]
)
def test_a_wrong_filter_says_what_is_right(run: Run, arguments: tuple[str, str]) -> None:
    assert listed(run, "--kind", "sweep") == set()
    result = run("settlements", "list", *arguments)
    assert result.exit_code == 2
    assert arguments[1] in result.stderr


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("name", ["payment:paid", "rcpt_paid", EVIDENCE])
def test_a_story_has_the_order_the_transaction_the_evidence_and_what_is_next(run: Run, name: str) -> None:
    story = parsed(run("settlements", "explain", name, "--json"))
    assert story["settlement"]["id"] == "payment:paid"
    assert story["evidence"] == {
        "transaction_hash": EVIDENCE,
        "block_number": 100,
        "transfer_log_index": 3,
        "received_value": "1000",
    }
    transaction = story["transaction"]
    assert (transaction["kind"], transaction["state"], transaction["settlements"]) == ("batch", "included", 2)
    assert [sent["max_fee"] for sent in transaction["broadcasts"]] == ["30", "60"]
    assert transaction["gas_used"] == 100_000
    assert transaction["fee_wei"] == str(100_000 * 10**9)
    assert [transfer["id"] for transfer in story["transfers"]] == ["settle:paid"]
    text = run("settlements", "explain", name).output
    for part in (EVIDENCE, "batch of 2", transaction["broadcasts"][1]["hash"], "settle:paid", "Next: it is final once"):
        assert part in text


@pytest.mark.usefixtures("filled")
def test_values_have_their_units(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = f"1000 units of {TOKEN}"
    assert unknown in run("settlements", "list").output
    assert f"brought {unknown}" in run("settlements", "explain", "payment:paid").output
    coin = {"symbol": "COIN", "address": TOKEN, "decimals": 6, "transfer_method": "permit2"}
    network = {"chain_id": 84532, "rpc_urls": ["http://127.0.0.1:9"], "tokens": [coin]}
    monkeypatch.setenv("FAREBOX_NETWORKS", json.dumps([network]))
    for name, value in (("SECRET", "s" * 32), ("SIGNER_KEYS", json.dumps(["0x" + "55" * 32]))):
        monkeypatch.setenv(f"FAREBOX_{name}", value)
    text = run("settlements", "explain", "payment:paid").output
    assert "brought 0.001 COIN" in text
    assert "0.000000001 USD" in text
    assert "0.001 COIN" in run("settlements", "list").output
    story = parsed(run("settlements", "explain", "payment:paid", "--json"))
    order = story["settlement"]
    assert (order["value"], order["value_usd"], order["asset"]) == ("1000", "0.001", "eip155:84532/COIN")
    assert story["transfers"][0]["amount_usd"] == "0.000000001"


@pytest.mark.usefixtures("filled")
def test_a_story_without_evidence_says_why(run: Run) -> None:
    story = parsed(run("settlements", "explain", "payment:failed", "--json"))
    assert story["evidence"] is None
    assert "the authorization was cancelled" in run("settlements", "explain", "payment:failed").output
    text = run("settlements", "explain", "rcpt_new").output
    assert "No transaction carries it" in text
    assert "it waits for a signer" in text


@pytest.mark.usefixtures("filled")
def test_another_look_is_wished_for_what_is_not_paid(run: Run) -> None:
    assert parsed(run("settlements", "retry", "payment:failed", "--json"))["state"] == "failed"
    assert parsed(run("settlements", "explain", "payment:failed", "--json"))["settlement"]["look_again_ms"] is not None
    refused = run("settlements", "retry", "payment:paid")
    assert refused.exit_code == 1
    assert "mined already" in refused.stderr
    assert parsed(run("settlements", "explain", "payment:paid", "--json"))["settlement"]["look_again_ms"] is None
    assert "there is no settlement" in run("settlements", "retry", "nothing").stderr
