"""The `farebox` command: what it prints, its exit status, and that a person can act on what goes wrong."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest

from contracts.devnet import Devnet, rpc
from gateway import config
from payments import accounts, receipts
from payments.ledger import transfers
from payments.store import Transaction
from tests.databases import open_store
from tests.gateway.command_line import FILE, KEY_ADDRESS, Run, on_chain, parsed, run

__all__ = ["on_chain", "run"]

# --- help and errors -------------------------------------------------------------------------------------------------

COMMANDS = [
    ["serve"],
    ["dev"],
    ["contracts", "deploy"],
    ["doctor"],
    ["explain"],
    ["ask"],
    ["config", "check"],
    ["config", "example"],
    ["config", "reference"],
    ["keys", "create"],
    ["keys", "list"],
    ["keys", "revoke"],
    ["keys", "fund"],
    ["ledger", "check"],
    ["ledger", "statement"],
    ["ledger", "export"],
    ["receipts", "show"],
    ["settlements", "list"],
    ["settlements", "explain"],
    ["settlements", "retry"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_json(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output


def test_help_shows_every_command_and_how_to_begin(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in {command[0] for command in COMMANDS}:
        assert name in result.output
    assert "farebox dev" in result.output


@pytest.mark.parametrize("arguments", [["frobnicate"], ["keys", "create"], ["serve", "--port", "x"], ["ask"], []])
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["receipts", "show", "\udcff"],
        ["keys", "create", "\udcff"],
        ["keys", "create", "a", "--pool", "\udcff"],
        ["keys", "revoke", "\udcff"],
        ["keys", "fund", "default", "1", "--reference", "\udcff"],
        ["settlements", "explain", "\udcff"],
        ["settlements", "list", "--payer", "\udcff"],
        ["ledger", "export", "\udcff"],
        ["withdrawals", "reject", "\udcff"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_an_argument_that_is_no_text_is_wrong_usage(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "is not UTF-8 text: '\\udcff'" in result.stderr
    assert "Write it in UTF-8" in parsed(run(*arguments, "--json"), 2)["error"]["fix"]


@pytest.mark.parametrize(
    "command",
    [["serve"], ["doctor"], ["explain"], ["keys", "list"], ["ledger", "check"], ["receipts", "show", "rcpt_1"]],
)
def test_a_broken_configuration_stops_every_command_with_its_mistakes(run: Run, command: list[str]) -> None:
    Path("farebox.toml").write_text("port = 'x'\n" + FILE.replace('provider = "open"', 'provider = "opne"', 1))
    result = run(*command)
    assert result.exit_code == 1
    assert "farebox.toml:1:1: port" in result.stderr
    assert "farebox.toml:10:1: provider 'opne' is not defined. Did you mean 'open'?" in result.stderr
    assert result.stdout == ""
    error = parsed(run(*command, "--json"), 1)["error"]
    assert "2 mistakes" in error["message"]
    assert "config check" in error["fix"]


def test_a_failure_of_the_machine_is_a_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the data directory should be")
    result = run("keys", "create", "a")
    assert result.exit_code == 1
    assert "error" in result.stderr
    assert "data" in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_database_that_is_none_is_a_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "farebox.db").write_bytes(b"not a database, whatever its name says" * 100)
    assert "the database cannot be used" in parsed(run("keys", "list", "--json"), 1)["error"]["message"]


# --- config ----------------------------------------------------------------------------------------------------------


def test_config_check_says_what_was_read(run: Run) -> None:
    result = run("config", "check")
    assert result.exit_code == 0
    assert "farebox.toml: 2 models at 1 providers" in result.stdout
    value = parsed(run("config", "check", "--json"))
    assert value["config"] == "farebox.toml"
    assert value["settings"] == {"networks": [], "providers": ["open"], "models": ["small", "large-4.7"]}
    assert value["problems"] == []


def test_config_check_lists_mistakes_and_warnings(run: Run) -> None:
    Path("farebox.toml").write_text(
        FILE.replace("0.1", "-1").replace("input_usd = 3\noutput_usd = 15", "input_usd=0\noutput_usd=0")
    )
    value = parsed(run("config", "check", "--json"), 1)
    assert value["settings"] is None
    assert [problem["warning"] for problem in value["problems"]] == [False, True]
    assert value["problems"][0]["place"] == "farebox.toml:10:1"
    result = run("config", "check")
    assert result.exit_code == 1
    assert "farebox.toml:10:1" in result.stderr
    assert "1 mistake" in result.stderr


def test_the_reference_is_there_for_programs_too(run: Run) -> None:
    settings = {entry["setting"]: entry for entry in parsed(run("config", "reference", "--json"))["settings"]}
    assert settings["port"]["default"] == "8402"
    assert "| `port` |" in run("config", "reference").stdout


def test_another_file_can_be_named_by_option_and_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("other.toml").write_text(FILE)
    assert parsed(run("config", "check", "-c", "other.toml", "--json"))["config"] == "other.toml"
    monkeypatch.setenv("FAREBOX_CONFIG", "other.toml")
    assert parsed(run("config", "check", "--json"))["config"] == "other.toml"
    assert "missing.toml" in run("config", "check", "-c", "missing.toml").stderr


def test_without_a_file_the_environment_alone_is_checked(run: Run) -> None:
    Path("farebox.toml").unlink()
    result = run("config", "check")
    assert result.exit_code == 0
    assert "there is no farebox.toml here" in result.stdout


def test_the_example_passes_its_own_check(run: Run) -> None:
    result = run("config", "example")
    assert result.stdout == config.example()
    Path("farebox.toml").write_text(result.stdout)
    value = parsed(run("config", "check", "--json"))
    assert value["settings"]["networks"] == ["eip155:8453"]
    assert all(problem["warning"] for problem in value["problems"])


def test_without_models_there_is_nothing_to_serve(run: Run, tmp_path: Path) -> None:
    Path("farebox.toml").unlink()
    result = run("serve")
    assert result.exit_code == 1
    assert "names no models" in result.stderr
    assert "farebox config example" in result.stderr
    assert list(tmp_path.iterdir()) == []


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_created_listed_and_revoked(run: Run) -> None:
    made = parsed(run("keys", "create", "search team", "--pool", "search", "--fund-usd", "2.5", "--json"))
    assert made["key"].startswith("fbk_")
    assert (made["name"], made["pool"]) == ("search team", "search")
    admin = run("keys", "create", "root", "--admin")
    assert admin.exit_code == 0
    assert admin.stdout.startswith("fba_")

    listed = run("keys", "list")
    assert "search team" in listed.stdout
    assert "2.50" in listed.stdout
    assert made["key"] not in listed.stdout
    value = parsed(run("keys", "list", "--json"))
    assert [(key["name"], key["admin"], key["revoked_ms"]) for key in value["keys"]] == [
        ("search team", False, None),
        ("root", True, None),
    ]
    assert value["pools"] == {"default": "0.00", "search": "2.50"}
    assert made["key"] not in json.dumps(value)

    assert parsed(run("keys", "revoke", made["id"], "--json"))["revoked_ms"] is not None
    assert "is revoked" in run("keys", "revoke", made["id"]).stdout
    assert "revoked" in run("keys", "list").stdout


def test_a_pool_is_funded_once_for_each_reference(run: Run) -> None:
    run("keys", "create", "a", "--pool", "team")
    for _ in range(2):
        value = parsed(run("keys", "fund", "team", "10", "--reference", "invoice-7", "--json"))
        assert value["available_usd"] == "10.00"
    assert parsed(run("keys", "fund", "team", "0.5", "--json"))["available_usd"] == "10.50"
    other = run("keys", "fund", "team", "11", "--reference", "invoice-7")
    assert other.exit_code == 1
    assert "has granted this pool 10.00 USD already" in other.stderr
    assert "another --reference" in other.stderr


def test_a_pool_that_no_key_draws_on_is_not_funded(run: Run) -> None:
    run("keys", "create", "a", "--pool", "team")
    assert "no key draws on a pool 'TYPO'; there are team" in run("keys", "fund", "TYPO", "5").stderr
    assert "TYPO" not in run("ledger", "statement").stdout


def test_a_list_shows_whom_a_key_of_the_facilitator_settles_for(run: Run) -> None:
    run("keys", "create", "a")
    assert "settles for" not in run("keys", "list").stdout
    run("keys", "create", "b", "--pay-to", KEY_ADDRESS)
    assert KEY_ADDRESS in run("keys", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        (["keys", "fund", "team", "ten"], "not a dollar amount", 2),
        (["keys", "fund", "team", "0"], "the amount is 0", 2),
        (["keys", "fund", "a@b", "1"], "cannot be a pool's name", 2),
        (["keys", "create", "x", "--fund-usd", "-1"], "not a dollar amount", 2),
        (["keys", "create", "x", "--pool", ""], "cannot be a pool's name", 2),
        (["keys", "create", " "], "name is empty", 2),
        (["keys", "create", "x", "--pay-to", "0x1"], "is no address", 2),
        (["dev", "--block-time", "5", "--automine"], "exclude each other", 2),
        (["keys", "list"], "there is no database", 1),
        (["keys", "revoke", "key_1"], "there is no database", 1),
        (["receipts", "show", "rcpt_1"], "there is no database", 1),
    ],
)
def test_what_cannot_be_done_is_said_with_a_way_out(run: Run, arguments: list[str], says: str, status: int) -> None:
    result = run(*arguments)
    assert result.exit_code == status
    assert says in result.stderr
    assert "→" in result.stderr
    assert says in parsed(run(*arguments, "--json"), status)["error"]["message"]


def test_an_unknown_key_cannot_be_revoked(run: Run) -> None:
    run("keys", "create", "a")
    assert "there is no API key key_0" in run("keys", "revoke", "key_0").stderr


# --- ledger and receipts ---------------------------------------------------------------------------------------------


@pytest.fixture
async def receipt(tmp_path: Path) -> str:
    """A database with a funded pool, and the captured receipt of one request that drew on it."""
    (tmp_path / "data").mkdir()
    store = open_store(tmp_path / "data")
    id = receipts.new_receipt_id()

    def unit(tx: Transaction) -> None:
        accounts.fund_pool(tx, "default", 5_000_000_000, "test")
        transfers.ensure_account(tx, "revenue@USD")
        details = {"model": "small", "provider": "open", "attempts": [{"candidate": "small@open", "status": "ok"}]}
        receipts.open_receipt(
            tx, id=id, tender="account", payer="key:key_1", asset="USD", quoted_nano_usd=3_000_000, details=details
        )
        transfers.hold(
            tx, id=f"hold:{id}", debit="pool:default@USD", credit="revenue@USD", amount=3_000_000, reference=id
        )
        transfers.capture(tx, f"hold:{id}", 1_250_000)
        receipts.close_receipt(tx, id, 1, "captured", charged_nano_usd=1_250_000)

    await store.write(unit)
    store.close()
    return id


def test_receipt_is_shown_with_its_attempts(run: Run, receipt: str) -> None:
    shown = run("receipts", "show", receipt)
    assert shown.exit_code == 0
    for text in (receipt, "captured", "0.00125", "small@open"):
        assert text in shown.stdout
    value = parsed(run("receipts", "show", receipt, "--json"))["receipt"]
    assert (value["id"], value["charged_usd"], value["quoted_usd"]) == (receipt, "0.00125", "0.003")
    assert "there is no receipt rcpt_0" in run("receipts", "show", "rcpt_0").stderr


def test_statement_lists_accounts_and_their_transfers(run: Run, receipt: str) -> None:
    listed = {entry["account"]: entry for entry in parsed(run("ledger", "statement", "--json"))["accounts"]}
    assert listed["pool:default@USD"]["balance_usd"] == "4.99875"
    assert listed["grants@USD"]["balance_usd"] == "-5.00"
    value = parsed(run("ledger", "statement", "pool:default@USD", "--json"))
    assert [(row["amount_usd"], row["state"]) for row in value["transfers"]] == [
        ("-0.00125", "posted"),
        ("5.00", "posted"),
    ]
    assert (
        parsed(run("ledger", "statement", "pool:default@USD", "--limit", "1", "--json"))["transfers"]
        == value["transfers"][:1]
    )
    assert receipt in run("ledger", "statement", "pool:default@USD").stdout
    assert "there is no account" in run("ledger", "statement", "pool:nobody@USD").stderr
    assert parsed(run("ledger", "statement", "POOL:Default@USD", "--json"))["account"] == "pool:default@USD"


def test_statement_shows_gas_in_coins_and_not_in_dollars(run: Run, receipt: str, tmp_path: Path) -> None:
    store = open_store(tmp_path / "data")
    gas, signer = "gas@eip155:84532/native", f"signer:{KEY_ADDRESS}@eip155:84532/native"

    def pay_gas(tx: Transaction) -> None:
        transfers.post(tx, id="fee:1", debit=signer, credit=gas, amount=2_194_866, reference="tx_1")

    asyncio.run(store.write(pay_gas))
    store.close()
    listed = {entry["account"]: entry for entry in parsed(run("ledger", "statement", "--json"))["accounts"]}
    assert listed[gas] == {"account": gas, "balance_native": "0.002194866", "held_native": "0.00"}
    value = parsed(run("ledger", "statement", gas, "--json"))
    assert (value["balance_native"], value["transfers"][0]["amount_native"]) == ("0.002194866", "0.002194866")
    shown = run("ledger", "statement", gas).stdout
    assert "balance 0.002194866 coins" in shown
    assert "USD" not in shown
    assert [line.split()[-1] for line in run("ledger", "statement").stdout.splitlines() if gas in line] == ["coins"]


def test_export_writes_the_posted_transfers_for_accountants(run: Run, receipt: str, tmp_path: Path) -> None:
    lines = run("ledger", "export").stdout.splitlines()
    assert lines[0] == "time,transfer,debit_account,credit_account,asset,amount,state,reference"
    assert sorted(line.split(",")[5] for line in lines[1:]) == ["0.00125", "5.00"]
    assert run("ledger", "export", "revenue@USD", "--format", "jsonl", "-o", str(tmp_path / "out")).exit_code == 0
    (row,) = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert (row["transfer"], row["credit_account"], row["amount"]) == (f"hold:{receipt}", "revenue@USD", "0.00125")
    assert len(run("ledger", "export", "--to", "2020-01-01").stdout.splitlines()) == 1
    assert "is not a day" in run("ledger", "export", "--from", "yesterday").stderr
    crossed = run("ledger", "export", "--from", "2026-11-29", "--to", "2026-11-27")
    assert (crossed.exit_code, "--from 2026-11-29 is after --to 2026-11-27" in crossed.stderr) == (2, True)
    assert "there is no account 'nope@USD'" in run("ledger", "export", "nope@USD").stderr
    lines = run("ledger", "export", "REVENUE@usd", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [row]


def test_ledger_check_finds_books_that_do_not_balance(run: Run, receipt: str, tmp_path: Path) -> None:
    assert "the books balance" in run("ledger", "check").stdout
    assert parsed(run("ledger", "check", "--json")) == {"ok": True, "tokens": [], "findings": []}
    with sqlite3.connect(tmp_path / "data" / "farebox.db") as connection:
        connection.execute("UPDATE ledger_account SET balance = balance + 1 WHERE id = 'revenue@USD'")
    connection.close()
    value = parsed(run("ledger", "check", "--json"), 1)
    assert "revenue@USD" in {finding["subject"] for finding in value["findings"]}
    assert "wrong" in run("ledger", "check").stdout


# --- chain -----------------------------------------------------------------------------------------------------------


def test_doctor_looks_at_the_chain_and_spends_nothing(run: Run, on_chain: Devnet) -> None:
    block = rpc(on_chain.rpc_url, "eth_blockNumber")
    findings = parsed(run("doctor", "--json"))["findings"]
    assert {finding["status"] for finding in findings} == {"ok"}
    text = json.dumps(findings)
    for expected in ("USDC", "USDT", KEY_ADDRESS, "Permit2"):
        assert expected in text
    assert "1.00 coins" in run("doctor").stdout
    assert rpc(on_chain.rpc_url, "eth_blockNumber") == block


def test_doctor_finds_what_is_wrong(run: Run, on_chain: Devnet, monkeypatch: pytest.MonkeyPatch) -> None:
    rpc(on_chain.rpc_url, "anvil_setBalance", KEY_ADDRESS, "0x0")
    findings = parsed(run("doctor", "--json"), 1)["findings"]
    assert any(finding["status"] == "fail" and "gas" in finding["what"] for finding in findings)
    monkeypatch.setenv("FAREBOX_NETWORKS__0__RPC_URLS", '["http://127.0.0.1:9"]')
    result = run("doctor")
    assert result.exit_code == 1
    assert "no node of chain 84532 answers" in result.stdout


def test_ledger_check_compares_with_the_chain(run: Run, on_chain: Devnet, monkeypatch: pytest.MonkeyPatch) -> None:
    run("keys", "create", "a")
    tokens = parsed(run("ledger", "check", "--json"))["tokens"]
    assert {token["asset"]: token["on_chain_usd"] for token in tokens} == {
        "eip155:84532/USDC": "0.00",
        "eip155:84532/USDT": "0.00",
    }
    assert "agree with the chain" in run("ledger", "check").stdout
    monkeypatch.setenv("FAREBOX_NETWORKS__0__RPC_URLS", '["http://127.0.0.1:9"]')
    result = run("ledger", "check")
    assert result.exit_code == 1
    assert "--offline" in result.stderr
    assert run("ledger", "check", "--offline").exit_code == 0
