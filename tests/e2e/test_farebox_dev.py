"""`farebox dev` prints one line, ends everything that it started, and goes on where it was."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from eth_account import Account
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, balance_of, mint
from contracts.jsonrpc import rpc
from tests.e2e.clients import ask, ask_and_sign, available, sign_in
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import wait_until

DEV_FIELDS = {
    "gateway_url",
    "rpc_url",
    "chain_id",
    "network",
    "tokens",
    "pay_to",
    "wallets",
    "api_key",
    "admin_key",
    "batch_contract",
    "deposit_factory",
    "simulator_url",
    "database_url",
}


FAREBOX = (sys.executable, "-m", "gateway.cli")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("FAREBOX_")}


def start_dev(data_dir: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """`farebox dev --json`, and the line that it prints."""
    process = subprocess.Popen(
        [*FAREBOX, "dev", "--json", "--data-dir", str(data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        return process, json.loads(line)
    except ValueError:
        raise AssertionError(f"not what was promised: {line!r} {end(process)}") from None


def refused(*arguments: str) -> str:
    """What `farebox dev` says that cannot start."""
    done = subprocess.run([*FAREBOX, "dev", *arguments], capture_output=True, text=True, env=CLEAN, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def checked(data_dir: Path) -> str:
    """What `farebox ledger check` says, run as the README has it."""
    command = f". {data_dir / 'dev.env'}; exec {shlex.join(FAREBOX)} ledger check"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=CLEAN, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def children(pid: int) -> dict[int, str]:
    """Every process below this one, with its command."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    found: dict[int, str] = {}
    parents = {pid}
    while parents:
        below = {int(row[0]): row[2] for row in rows if int(row[1]) in parents}
        found |= below
        parents = set(below)
    return found


def alive(pids: dict[int, str]) -> list[str]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    states = {int(pid): state for pid, state in (line.split() for line in listed.splitlines())}
    return [command for pid, command in pids.items() if not states.get(pid, "Z").startswith("Z")]


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """SIGTERM; what was still printed."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=30)
    finally:
        process.kill()


def test_farebox_dev_prints_one_line_ends_everything_and_goes_on_where_it_was(tmp_path: Path) -> None:
    process, first = start_dev(tmp_path)
    try:
        assert set(first) == DEV_FIELDS
        assert set(first["tokens"]) == {"USDC", "USDT"}
        for token in first["tokens"].values():
            assert set(token) == {"address", "decimals", "name", "version", "transfer_method"}
        assert all(set(wallet) == {"address", "private_key"} for wallet in first["wallets"])
        below = children(process.pid)
        for part in ("anvil", "gateway.dev.simulator", "gateway.cli serve"):
            assert any(part in command for command in below.values()), below
        wallet: LocalAccount = Account.from_key(first["wallets"][0]["private_key"])
        with httpx.Client(base_url=first["gateway_url"], timeout=30) as http:
            answer = ask(http, QUESTION, ask_and_sign(http, wallet, QUESTION))
            assert answer.status_code == 200, answer.text
            poll = f"/v1/receipts/{answer.headers['x-farebox-receipt']}"
            receipt = http.get(poll).json()
            credit = available(http, sign_in(http, wallet))
        left = balance_of(first["rpc_url"], USDC, wallet.address)
        variables = (tmp_path / "dev.env").read_text()
        assert f"another farebox dev runs in {tmp_path}" in refused("--data-dir", str(tmp_path))
        assert (tmp_path / "dev.env").read_text() == variables
        taken = str(httpx.URL(first["gateway_url"]).port)
        said = refused("--data-dir", str(tmp_path / "another"), "--port", taken)
        assert f"the gateway cannot listen on port {taken}" in said
    finally:
        printed = end(process)
    assert process.returncode == 0
    assert printed == ("", "")
    assert alive(below) == []

    process, second = start_dev(tmp_path)
    try:
        below = children(process.pid)
        for name in DEV_FIELDS - {"gateway_url", "rpc_url", "simulator_url"}:
            assert second[name] == first[name], name
        with httpx.Client(base_url=second["gateway_url"], timeout=30) as http:
            later = http.get(poll).json()
            assert later["state"] == "captured"
            assert later["charged_usd"] == receipt["charged_usd"]
            assert later["transaction"]["hash"] == receipt["transaction"]["hash"]
            assert "agree with the chain" in checked(tmp_path), "before anything more is mined"
            session = sign_in(http, wallet)
            assert float(credit["USDC"]) > 0
            assert available(http, session) == credit
            assert balance_of(second["rpc_url"], USDC, wallet.address) == left
            transaction = rpc(second["rpc_url"], "eth_getTransactionReceipt", receipt["transaction"]["hash"])
            assert transaction["status"] == "0x1"
            assert ask(http, QUESTION | {"max_tokens": 5}, session).status_code == 200
            assert ask(http, QUESTION, {"Authorization": f"Bearer {first['api_key']}"}).status_code == 200
            # A deposit is deep enough by itself, though no block follows.
            (deposit,) = http.post("/v1/wallet/deposit-addresses", headers=session).json()["deposit_addresses"]
            mint(second["rpc_url"], USDC, deposit["address"], 3_000_000)
            wait_until(lambda: float(available(http, session)["USDC"]) > 2.9, "the deposit is credited")
    finally:
        end(process)
    assert alive(below) == []
