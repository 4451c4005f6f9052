"""What the tests of the command share: a directory to run it in, what it printed, and a chain that it is configured for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from contracts.devnet import Devnet, rpc
from gateway.cli import app

KEY = "0x" + "11" * 32
KEY_ADDRESS = "0x19e7e376e7c213b7e7e7e46cc70a5dd086daff2a"
FILE = """
pay_to = "0x19e7e376e7c213b7e7e7e46cc70a5dd086daff2a"
data_dir = "data"
[providers.open]
dialect = "openai_chat"
base_url = "http://localhost/v1"
[[models]]
id = "small"
provider = "open"
input_usd = 0.1
output_usd = 0.4
capabilities = []
[[models]]
id = "large-4.7"
provider = "open"
input_usd = 3
output_usd = 15
capabilities = ["tools", "json_schema"]
"""

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in a directory of its own that has a farebox.toml, with a clean environment."""
    for name in list(os.environ):
        if name.startswith("FAREBOX_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "farebox.toml").write_text(FILE)
    runner = CliRunner()

    def run_it(*arguments: str, **options: Any) -> Result:
        return runner.invoke(app, arguments, **options)

    return run_it


def parsed(result: Result, status: int = 0) -> Any:
    """The one line of JSON that a command printed; nothing else is on standard output."""
    assert result.exit_code == status, result.output
    (line,) = result.stdout.splitlines()
    value = json.loads(line)
    assert value["ok"] is (status == 0)
    return value


@pytest.fixture
def on_chain(chain: Devnet, run: Run, monkeypatch: pytest.MonkeyPatch) -> Devnet:
    """The configuration takes payments on the development chain."""
    network = {
        "chain_id": chain.chain_id,
        "rpc_urls": [chain.rpc_url],
        "confirmations": 0,
        "tokens": [
            {"symbol": "USDC"},
            {"symbol": "USDT", "address": chain.usdt.address, "decimals": 6, "transfer_method": "permit2"},
        ],
    }
    monkeypatch.setenv("FAREBOX_NETWORKS", json.dumps([network]))
    monkeypatch.setenv("FAREBOX_SECRET", "s" * 32)
    monkeypatch.setenv("FAREBOX_SIGNER_KEYS", json.dumps([KEY]))
    monkeypatch.setenv("FAREBOX_TREASURY_KEY", KEY)
    rpc(chain.rpc_url, "anvil_setBalance", KEY_ADDRESS, hex(10**18))
    return chain
