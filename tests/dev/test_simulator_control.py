"""The simulator's log, its control endpoints, behaviour in model names, and its process."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from gateway.dev.simulator.attempts import AttemptLog
from gateway.dev.simulator.behaviours import Behaviour, InvalidBehaviour, behaviour_in_name
from gateway.dev.simulator.process import Simulator, SimulatorFailed

MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]


def post(simulator: Simulator, model: str = "m", **headers: str) -> httpx.Response:
    return httpx.post(
        f"{simulator.openai_url}/chat/completions",
        json={"model": model, "messages": MESSAGES},
        headers={"authorization": "Bearer secret-key"} | headers,
    )


def test_an_attempt_is_logged_with_its_body_but_without_secrets(simulator: Simulator) -> None:
    response = post(simulator, **{"x-payment": "signed", "x-request-id": "abc"})
    (attempt,) = simulator.attempts()
    assert attempt["dialect"] == "openai_chat"
    assert (attempt["model"], attempt["stream"]) == ("m", False)
    assert (attempt["outcome"], attempt["status"], attempt["tokens_sent"]) == ("ok", 200, 40)
    assert attempt["client_disconnected"] is False
    assert attempt["body"]["messages"] == MESSAGES
    assert attempt["body_sha256"] == hashlib.sha256(response.request.content).hexdigest()
    assert attempt["headers"]["x-request-id"] == "abc"
    assert {"authorization", "x-payment"} <= set(attempt["header_names"])
    assert not {"authorization", "x-payment"} & set(attempt["headers"])
    assert abs(attempt["time"] - time.time()) < 60


def test_the_log_can_be_cleared_and_read_by_model(simulator: Simulator) -> None:
    post(simulator, "a")
    post(simulator, "b")
    post(simulator, "b/c")
    assert [attempt["model"] for attempt in simulator.attempts("b")] == ["b"]
    assert [attempt["model"] for attempt in simulator.attempts("b/")] == ["b/c"]
    simulator.clear()
    assert simulator.attempts() == []


def test_the_log_is_bounded_in_number_and_in_bytes() -> None:
    def fill(log: AttemptLog, body: bytes, times: int) -> None:
        for _ in range(times):
            log.open(dialect="d", path="/", authenticated=True, headers=[], body=body)

    log = AttemptLog(attempts_max=3)
    fill(log, b"x", 5)
    assert [attempt.number for attempt in log.kept()] == [3, 4, 5]
    assert log.total == 5
    log = AttemptLog(body_bytes_max=10)
    fill(log, b"four", 5)
    assert [attempt.number for attempt in log.kept()] == [4, 5]
    fill(log, b"x" * 100, 1)
    assert [attempt.number for attempt in log.kept()] == [6]
    log.clear()
    fill(log, b"four", 2)
    assert len(log.kept()) == 2


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"ttft": 5}, "unknown field `ttft`; there are: first_token_ms"),
        ({"status": 200}, "`status`: Input should be greater than or equal to 400"),
        ({"status": "503"}, "`status`: Input should be a valid integer"),
        ({"reset": 1}, "`reset`: Input should be a valid boolean"),
        ({"error": "strange"}, "`error`: Input should be 'context_length'"),
        ({"tokens_per_second": 0}, "`tokens_per_second`: Input should be greater than 0"),
        ({"status": 500, "silence": True}, "only one of these can happen: status, silence"),
        ({"cut_after_tokens": 0, "stall_after_tokens": 3}, "cut_after_tokens, stall_after_tokens"),
    ],
)
def test_a_behaviour_that_cannot_be_is_refused(simulator: Simulator, behaviour: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as refused:
        simulator.configure("m", **behaviour)
    assert words in str(refused.value)
    assert post(simulator).status_code == 200


def test_control_input_has_to_be_a_json_object(simulator: Simulator) -> None:
    for content in (b"{", b"[]"):
        response = httpx.put(f"{simulator.url}/_/behaviours/m", content=content)
        assert response.status_code == 400
        assert response.json()["error"]
    assert httpx.get(f"{simulator.url}/_/nothing").status_code == 404


def test_a_behaviour_is_replaced_read_and_taken_back(simulator: Simulator) -> None:
    simulator.configure("acme/odd name?", status=500)
    assert post(simulator, "acme/odd name?").status_code == 500
    assert post(simulator, "another").status_code == 200
    listed = httpx.get(f"{simulator.url}/_/behaviours").json()
    assert listed == {"behaviours": {"acme/odd name?": {"status": 500}}}
    simulator.configure("acme/odd name?", output_tokens=1)
    assert post(simulator, "acme/odd name?").json()["usage"]["completion_tokens"] == 1
    simulator.reset_behaviours()
    assert post(simulator, "acme/odd name?").json()["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sim", {}),
        ("sim-fast", {}),
        ("SIM-error-503", {"status": 503}),
        ("sim-slow", {"first_token_ms": 1500, "tokens_per_second": 20}),
        ("sim-ttft-300-tps-50-tokens-7", {"first_token_ms": 300, "tokens_per_second": 50, "output_tokens": 7}),
        ("acme/sim-error-429-retry-2-first-1", {"status": 429, "retry_after_s": 2, "fail_first": 1}),
        ("gpt-5.4+sim-cut-5-nousage", {"cut_after_tokens": 5, "missing_usage": True}),
        ("gpt-5.4@sim-silent", {"silence": True}),
    ],
)
def test_a_name_says_its_behaviour(name: str, fields: dict[str, Any]) -> None:
    assert behaviour_in_name(name) == Behaviour(**fields)


@pytest.mark.parametrize("name", ["gpt-5.4", "simple-model", "my-sim-reset", "simulated"])
def test_an_ordinary_name_says_nothing(name: str) -> None:
    assert behaviour_in_name(name) is None


@pytest.mark.parametrize(
    "name", ["sim-strange", "sim-error", "sim-error-x", "sim-error-200", "sim-reset-silent", "sim--"]
)
def test_a_name_that_says_nothing_sensible_is_an_unknown_model(simulator: Simulator, name: str) -> None:
    with pytest.raises(InvalidBehaviour):
        behaviour_in_name(name)
    assert post(simulator, name).status_code == 404


def test_what_is_set_replaces_what_the_name_says(simulator: Simulator) -> None:
    assert [post(simulator, "sim-error-503-first-1").status_code for _ in range(2)] == [503, 200]
    simulator.configure("sim-error-503-first-1", status=500)
    assert post(simulator, "sim-error-503-first-1").status_code == 500
    simulator.reset_behaviours()
    assert post(simulator, "sim-error-503-first-1").status_code == 503


def test_an_unknown_path_is_told_in_the_dialect_and_logged(simulator: Simulator) -> None:
    assert httpx.post(f"{simulator.url}/anthropic/v1/complete").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{simulator.openai_url}/chat/completions").status_code == 404
    assert [attempt["dialect"] for attempt in simulator.attempts()] == ["anthropic_messages", "openai_chat"]


def test_a_body_that_is_not_json_is_refused_and_logged(simulator: Simulator) -> None:
    headers = {"authorization": "Bearer k"}
    response = httpx.post(f"{simulator.openai_url}/chat/completions", content=b"{", headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert simulator.attempts()[0]["body"] is None


def test_stopping_ends_the_process_even_while_an_answer_is_silent() -> None:
    simulator = Simulator.start()
    pid = simulator.pid
    simulator.configure("m", silence=True)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{simulator.openai_url}/chat/completions",
            json={"model": "m", "messages": MESSAGES},
            headers={"authorization": "Bearer k"},
            timeout=0.1,
        )
    simulator.stop()
    simulator.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_port_that_is_taken_is_told(simulator: Simulator, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SimulatorFailed):
        Simulator.start(port=int(simulator.url.rpartition(":")[2]))
    assert "cannot listen on port" in capfd.readouterr().err


def test_the_simulator_does_not_outlive_a_parent_that_is_killed() -> None:
    program = (
        "import sys, time; from gateway.dev.simulator.process import Simulator\n"
        "simulator = Simulator.start(); print(simulator.url, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    url = parent.stdout.readline().decode().strip()
    assert httpx.get(f"{url}/_/attempts").json() == {"attempts": [], "total": 0, "dropped": 0}
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(500):
        try:
            httpx.get(f"{url}/_/attempts")
        except httpx.TransportError:
            return
        time.sleep(0.01)
    raise AssertionError("it is still there")


def test_the_command_prints_one_line_of_json() -> None:
    command = [sys.executable, "-m", "gateway.dev.simulator", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            url = json.loads(process.stdout.readline())["url"]
            assert Simulator.attach(url).attempts() == []
        finally:
            process.terminate()
        assert process.stdout.read() == b""
    assert process.returncode in (0, -signal.SIGTERM)
