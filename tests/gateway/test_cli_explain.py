"""`farebox explain`: the route of a request, what excluded the others, and why nothing can serve it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gateway.command_line import Run, parsed, run

__all__ = ["run"]


def test_explain_shows_every_candidate_and_what_excluded_it(run: Run) -> None:
    body = {
        "model": "auto",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "max_tokens": 100,
    }
    Path("request.json").write_text(json.dumps(body))
    value = parsed(run("explain", "request.json", "--json"))
    assert value["route"] == ["large-4.7@open"]
    assert value["max_output_tokens"] == 100
    excluded = {entry["candidate"]: entry["excluded_by"] for entry in value["considered"]}
    assert excluded == {"large-4.7@open": None, "small@open": "no_tools"}
    assert parsed(run("explain", "-", "--json", input=json.dumps(body)))["route"] == value["route"]
    assert "no tools" in run("explain", "request.json").stdout


def test_explain_leaves_out_what_a_quote_for_auto_leaves_out(run: Run) -> None:
    value = parsed(run("explain", "--max-tokens", "5", "--json"))
    assert value["route"] == ["small@open"]
    excluded = {entry["candidate"]: entry["excluded_by"] for entry in value["considered"]}
    assert excluded == {"small@open": None, "large-4.7@open": "dearer_than_auto_may_be"}
    assert "dearer than auto may be" in run("explain", "--max-tokens", "5").stdout
    # Who names the models has agreed to their prices.
    Path("request.json").write_text(
        '{"model": "auto", "models": ["large-4.7"], "messages": [{"role": "user", "content": "hi"}]}'
    )
    assert len(parsed(run("explain", "request.json", "--json"))["route"]) == 2


def test_explain_takes_options_instead_of_a_file(run: Run) -> None:
    value = parsed(run("explain", "-m", "LARGE-4-7", "-p", "word " * 1000, "--max-tokens", "7", "--json"))
    assert value["route"] == ["large-4.7@open"]
    assert value["input_tokens"] > 1000
    cheap = parsed(run("explain", "--strategy", "cost-first", "--json"))
    assert (cheap["strategy"], cheap["route"][0]) == ("cost-first", "small@open")


def test_explain_blames_the_option_for_a_strategy_that_there_is_not(run: Run) -> None:
    result = run("explain", "--strategy", "best")
    assert result.exit_code == 2
    assert "there is no strategy 'best'" in result.stderr
    assert "balanced" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-m", "large-4.8"], "did you mean large-4.7?"),
        (["missing.json"], "missing.json"),
        (["farebox.toml"], "is not JSON"),
        (["-m", "small", "--max-tokens", "999999"], "cannot write as many tokens"),
    ],
)
def test_explain_says_why_nothing_can_serve(run: Run, arguments: list[str], says: str) -> None:
    result = run("explain", *arguments)
    assert result.exit_code == 1
    assert says in result.stderr
