"""`farebox contracts deploy` creates what the configuration then names, once; `farebox doctor` tells right from wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from contracts import operators
from contracts.devnet import Devnet, call_data, rpc, send_as
from contracts.operators import CREATE2_DEPLOYER
from tests.gateway.command_line import KEY, KEY_ADDRESS, Run, on_chain, parsed, run

__all__ = ["on_chain", "run"]

OTHER_KEY = "0x" + "22" * 32
OTHER_ADDRESS = "0x1563915e194d8cfba1943570603f7606a3115508"


def configure(monkeypatch: pytest.MonkeyPatch, lines: dict[str, Any]) -> None:
    """Write into the network's configuration what the command said."""
    for name, value in lines.items():
        monkeypatch.setenv(f"FAREBOX_NETWORKS__0__{name.upper()}", value)


def failures(run: Run) -> list[str]:
    result = run("doctor", "--json")
    return [each["what"] for each in json.loads(result.stdout)["findings"] if each["status"] == "fail"]


def test_contracts_are_created_once_and_then_found_by_the_doctor(
    run: Run, on_chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = parsed(run("contracts", "deploy", "--json"))
    assert [each["transaction"] is not None for each in first["contracts"]] == [True, True, True]
    block = rpc(on_chain.rpc_url, "eth_blockNumber")

    again = parsed(run("contracts", "deploy", "--json"))

    assert [each["transaction"] for each in again["contracts"]] == [None, None, None]
    assert again["configuration"] == first["configuration"]
    assert rpc(on_chain.rpc_url, "eth_blockNumber") == block
    for_people = run("contracts", "deploy").stdout
    assert "was there already" in for_people
    assert f'batch_contract = "{first["configuration"]["batch_contract"]}"' in for_people

    configure(monkeypatch, first["configuration"])
    findings = parsed(run("doctor", "--json"))["findings"]
    said = [each["what"] for each in findings]
    assert f"FareboxBatch is at {first['configuration']['batch_contract']}, owned by {KEY_ADDRESS}" in said
    assert f"DepositForwarders is at {first['configuration']['deposit_factory']} and pays {KEY_ADDRESS}" in said


def test_a_creation_that_was_cut_short_goes_on_where_it_stopped(run: Run, on_chain: Devnet) -> None:
    data = "0x" + operators.forwarder(KEY_ADDRESS).deployer_data.hex()
    send_as(on_chain.rpc_url, on_chain.wallets[0].address, CREATE2_DEPLOYER, data)
    rpc(on_chain.rpc_url, "anvil_setBalance", KEY_ADDRESS, "0x0")
    failed = run("contracts", "deploy", "--json")
    assert failed.exit_code == 1
    assert KEY_ADDRESS in json.loads(failed.stdout)["error"]["fix"]

    rpc(on_chain.rpc_url, "anvil_setBalance", KEY_ADDRESS, hex(10**18))
    made = parsed(run("contracts", "deploy", "--json"))["contracts"]
    assert made[0]["transaction"] is None
    assert made[-1]["transaction"] is not None


def test_a_new_signer_gets_no_second_batch_contract_and_the_doctor_says_what_to_do(
    run: Run, on_chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = on_chain.wallets[4].address
    lines = parsed(run("contracts", "deploy", "--owner", owner, "--json"))["configuration"]
    configure(monkeypatch, lines)
    monkeypatch.setenv("FAREBOX_SIGNER_KEYS", json.dumps([KEY, OTHER_KEY]))
    rpc(on_chain.rpc_url, "anvil_setBalance", OTHER_ADDRESS, hex(10**18))

    assert parsed(run("contracts", "deploy", "--json"))["configuration"] == lines
    assert failures(run) == [f"the signer {OTHER_ADDRESS} may not send batches"]

    send_as(on_chain.rpc_url, owner, lines["batch_contract"], call_data("setSigner(address,bool)", OTHER_ADDRESS, 1))
    assert failures(run) == []


def test_other_code_and_another_treasury_are_found(run: Run, on_chain: Devnet, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = parsed(run("contracts", "deploy", "--json"))["configuration"]
    configure(monkeypatch, lines)
    monkeypatch.delenv("FAREBOX_TREASURY_KEY")
    monkeypatch.setenv("FAREBOX_NETWORKS__0__PAY_TO", on_chain.wallets[4].address)
    assert any("DepositForwarders for" in what and "other code is" in what for what in failures(run))
    monkeypatch.delenv("FAREBOX_NETWORKS__0__PAY_TO")
    rpc(on_chain.rpc_url, "anvil_setCode", lines["deposit_factory"], "0x")
    rpc(on_chain.rpc_url, "anvil_setCode", lines["batch_contract"], "0x6001")
    assert failures(run) == [
        f"FareboxBatch is not at {lines['batch_contract']}, other code is",
        f"DepositForwarders for {KEY_ADDRESS} is not at {lines['deposit_factory']}: there is no contract",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--network", "10"], "not configured"), (["--owner", "0x12"], "not an address")],
    ids=["network", "owner"],
)
def test_mistakes_are_said_before_anything_is_spent(
    run: Run, on_chain: Devnet, arguments: list[str], said: str
) -> None:
    block = rpc(on_chain.rpc_url, "eth_blockNumber")
    assert said in json.loads(run("contracts", "deploy", *arguments, "--json").stdout)["error"]["message"]
    assert rpc(on_chain.rpc_url, "eth_blockNumber") == block


def test_a_chain_without_the_deployer_is_said_so(run: Run, on_chain: Devnet) -> None:
    rpc(on_chain.rpc_url, "anvil_setCode", CREATE2_DEPLOYER, "0x")
    result = run("contracts", "deploy")
    assert result.exit_code == 1
    assert "lacks the deterministic deployer" in result.stderr
