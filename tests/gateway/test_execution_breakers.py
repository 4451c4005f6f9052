"""When a candidate is left alone, and when it is tried again. The clock is the test's."""

from __future__ import annotations

import pytest

from gateway.execution.breakers import TRANSITIONS, Breaker, BreakerLimits, Breakers, Signal, State

LIMITS = BreakerLimits(
    consecutive_failures=3,
    window_s=10,
    window_calls_min=6,
    window_failure_share=0.5,
    cooldown_s=5,
    cooldown_s_max=15,
    probe_s_max=60,
)


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(LIMITS, clock)


def trip(breaker: Breaker) -> None:
    for _ in range(LIMITS.consecutive_failures):
        breaker.failed()


def test_consecutive_failures_open_it(breaker: Breaker) -> None:
    breaker.failed()
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    breaker.failed()
    assert breaker.admits()
    breaker.failed()
    assert breaker.state is State.OPEN
    assert not breaker.admits()


def test_share_of_failures_in_the_window_opens_it(breaker: Breaker) -> None:
    for _ in range(3):
        breaker.succeeded()
        breaker.failed()
    assert breaker.state is State.OPEN


def test_failures_before_the_window_do_not_count(breaker: Breaker, clock: Clock) -> None:
    for _ in range(2):
        breaker.succeeded()
        breaker.failed()
    clock.now += LIMITS.window_s + 1
    breaker.succeeded()
    breaker.failed()
    assert breaker.state is State.CLOSED


def test_one_probe_after_the_cooldown_and_its_success_closes(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    clock.now += LIMITS.cooldown_s - 0.1
    assert not breaker.admits()
    clock.now += 0.2
    assert breaker.admits()
    assert not breaker.admits(), "the probe is under way"
    breaker.succeeded()
    assert breaker.state is State.CLOSED
    assert breaker.admits()


def test_failed_probes_double_the_cooldown_up_to_a_bound_and_success_resets_it(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    for cooldown_s in (5, 10, 15, 15):
        clock.now += cooldown_s - 0.1
        assert not breaker.admits()
        clock.now += 0.2
        assert breaker.admits()
        breaker.failed()
    clock.now += 15.1
    assert breaker.admits()
    breaker.succeeded()
    trip(breaker)
    clock.now += 5.1
    assert breaker.admits()


def test_retry_after_opens_at_once_and_for_as_long(breaker: Breaker, clock: Clock) -> None:
    breaker.failed(retry_after_s=40)
    clock.now += 39
    assert not breaker.admits()
    clock.now += 2
    assert breaker.admits()


def test_shorter_retry_after_does_not_shorten_a_longer_one(breaker: Breaker, clock: Clock) -> None:
    breaker.failed(retry_after_s=40)
    breaker.failed(retry_after_s=1)
    clock.now += 30
    assert not breaker.admits()


def test_success_that_began_before_it_opened_does_not_close_it(breaker: Breaker) -> None:
    breaker.failed(retry_after_s=40)
    breaker.succeeded()
    assert not breaker.admits()


def test_abandoned_probe_frees_its_place(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    clock.now += 6
    assert breaker.admits()
    breaker.abandoned()
    assert breaker.admits()


def test_probe_that_never_reports_is_given_up(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    clock.now += 6
    assert breaker.admits()
    clock.now += LIMITS.probe_s_max - 1
    assert not breaker.admits()
    clock.now += 2
    assert breaker.admits()


def test_every_state_has_a_way_out_towards_closed() -> None:
    assert {after for (before, _), after in TRANSITIONS.items() if before is State.OPEN} >= {State.HALF_OPEN}
    assert TRANSITIONS[State.HALF_OPEN, Signal.PROBE_OK] is State.CLOSED
    assert {before for before, _ in TRANSITIONS} == set(State)


def test_number_of_breakers_is_bounded() -> None:
    breakers = Breakers(LIMITS, breakers_max=2)
    first = breakers.of("a")
    breakers.of("b")
    assert breakers.of("a") is first
    breakers.of("c")
    assert breakers.states() == {"a": State.CLOSED, "c": State.CLOSED}
