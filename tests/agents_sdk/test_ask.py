"""`farebox ask`, through typer as the command line does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from agents_sdk.ask import ask_command
from tests.agents_sdk import fake_gateway
from tests.agents_sdk.conftest import KEY
from tests.agents_sdk.fake_gateway import FakeGateway


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("FAREBOX_WALLET_KEY", KEY)


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command("ask")(ask_command)
    return CliRunner().invoke(app, list(arguments))


def test_it_prints_the_answer_and_what_it_cost(gateway: FakeGateway) -> None:
    result = run("Why?", "--gateway", gateway.url)
    assert result.exit_code == 0
    assert result.stdout == "Light scatters.\n"
    assert "sim-fast · cost $0.000113 · credited $0.000387 · transaction" in result.stderr
    assert fake_gateway.TRANSACTION in result.stderr.replace("\n", "")


def test_json_is_one_object(gateway: FakeGateway) -> None:
    result = run("Why?", "--gateway", gateway.url, "--json", "--model", "sim-fast", "--strategy", "cost-first")
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert document["answer"] == "Light scatters."
    assert document["receipt"]["transaction"] == fake_gateway.TRANSACTION


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-usd", "0.0001"], "LimitExceeded: this request may cost 0.0005 USD"),
        (["--token", "USDT"], "TokenNotAllowed"),
    ],
)
def test_a_refusal_is_one_line_and_no_payment(gateway: FakeGateway, options: list[str], says: str) -> None:
    result = run("Why?", "--gateway", gateway.url, *options)
    assert result.exit_code == 1
    assert says in result.stderr.replace("\n", " ")
    assert gateway.nonces == set()


def test_an_error_of_the_gateway_is_told(gateway: FakeGateway) -> None:
    gateway.script = ["failed"]
    result = run("Why?", "--gateway", gateway.url)
    assert result.exit_code == 1
    assert "scripted: all_candidates_failed" in result.stderr


def test_the_key_comes_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAREBOX_WALLET_KEY")
    result = run("Why?")
    assert result.exit_code == 2
    assert "FAREBOX_WALLET_KEY" in result.stderr


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (["--max-usd", "five"], "'five' is not a dollar amount"),
        (["--gateway", "gateway.example"], "is not a URL"),
        (["--gateway", "http://localhost:abc"], "is not a URL"),
        (["--gateway", "http://[::1"], "is not a URL"),
        (["--gateway", "http://127.0.0.1:9/foo"], "has a path"),
        (["--strategy", "é"], "--strategy"),
        (["--model", "\udcff"], "--model is not text"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_options_that_cannot_be_read_are_told(bad: list[str], says: str) -> None:
    result = run("Why?", *bad)
    assert (result.exit_code, says in result.stderr) == (2, True), result.stderr
    result = run("Why?", *bad, "--json")
    assert result.exit_code == 2
    assert says in json.loads(result.stdout)["error"]["message"]


def test_a_question_that_is_no_text_is_wrong_usage() -> None:
    assert run("\udcff").exit_code == 2


@pytest.mark.parametrize(("script", "says"), [("failed", "all_candidates_failed"), ("reset", "does not answer")])
def test_failures_are_json_for_programs(gateway: FakeGateway, script: str, says: str) -> None:
    gateway.script = [script] * 9
    result = run("Why?", "--gateway", gateway.url, "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["ok"]) == (1, False)
    assert says in told["error"]["message"]


def test_a_gateway_that_is_not_there_is_told(gateway: FakeGateway) -> None:
    result = run("Why?", "--gateway", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "does not answer" in result.stderr
    assert "--gateway" in result.stderr
