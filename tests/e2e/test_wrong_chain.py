"""What the configuration may not change under a database with money in it, and what it may."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from eth_account import Account

from contracts.jsonrpc import rpc
from gateway.dev.stack import StackFailed, running
from tests.e2e.clients import ask, ask_and_sign
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import check_books

LOW = {"FAREBOX_PAYMENTS__REFUND_THRESHOLD_USD": "0.000001"}
NEVER = {"FAREBOX_PAYMENTS__REFUND_THRESHOLD_USD": "0"}


def test_a_database_is_not_served_on_a_chain_that_was_begun_anew(tmp_path: Path) -> None:
    with running(tmp_path):
        pass
    (tmp_path / "chain.json").unlink()
    with pytest.raises(StackFailed, match="begun anew"), running(tmp_path):
        pass


def test_a_gateway_that_sends_nothing_back_any_more_still_knows_what_it_sent(tmp_path: Path) -> None:
    """A refund that is mined and not final yet when the operator switches refunds off."""
    with running(tmp_path, environment=LOW) as (stack, gateway), httpx.Client(base_url=stack.gateway_url) as http:
        wallet = Account.from_key(stack.wallets[0]["private_key"])
        assert ask(http, QUESTION, ask_and_sign(http, wallet, QUESTION)).status_code == 200
        for _ in range(100):
            if 'farebox_settlements_paid{network="eip155:84532"} 2.0' in http.get("/metrics").text:
                break
        gateway.kill()
    with running(tmp_path, environment=NEVER) as (stack, gateway), httpx.Client(base_url=stack.gateway_url) as http:
        assert http.get("/readyz").status_code == 200
        for _ in range(3):  # a restarted Anvil has forgotten what the state was in earlier blocks
            rpc(stack.rpc_url, "evm_mine")
        check_books(gateway)
