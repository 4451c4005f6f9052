"""The simulator in its own process, once per worker, and clients for each dialect."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from gateway.dev.simulator.process import Simulator


@pytest.fixture(scope="session")
def running_simulator() -> Iterator[Simulator]:
    with Simulator.start() as simulator:
        yield simulator


@pytest.fixture
def simulator(running_simulator: Simulator) -> Simulator:
    """With an empty log and default behaviour."""
    running_simulator.clear()
    running_simulator.reset_behaviours()
    return running_simulator


@pytest.fixture
def sdk(simulator: Simulator) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=simulator.openai_url, api_key="secret-key", max_retries=0, timeout=10) as client:
        yield client


@pytest.fixture
def anthropic(simulator: Simulator) -> Iterator[httpx.Client]:
    headers = {"x-api-key": "secret-key", "anthropic-version": "2023-06-01"}
    with httpx.Client(base_url=simulator.anthropic_url, headers=headers, timeout=10) as client:
        yield client


@pytest.fixture
def gemini(simulator: Simulator) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=simulator.gemini_url, headers={"x-goog-api-key": "secret-key"}, timeout=10) as client:
        yield client
