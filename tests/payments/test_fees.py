"""What is offered for gas: as much as the chain takes, and never more than the operator allows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from payments.chain.signers import FeeEstimate
from payments.chain.transactions import Fees

GWEI = 10**9
CAP = Fees(50 * GWEI, 5 * GWEI)
wei = st.integers(0, 2**70)


def history(base_fee: int, priority_fee: int) -> dict[str, list[object]]:
    return {"baseFeePerGas": [hex(base_fee)], "reward": [[hex(priority_fee)]]}


def test_a_quiet_chain_is_offered_twice_its_base_fee() -> None:
    fees = FeeEstimate(1.0, CAP)
    fees.read(history(GWEI, GWEI))
    assert fees.fees == Fees(3 * GWEI, GWEI)
    assert not fees.capped


@given(base_fee=wei, priority_fee=wei)
def test_no_answer_of_a_node_makes_us_offer_more_than_the_cap(base_fee: int, priority_fee: int) -> None:
    fees = FeeEstimate(1.0, CAP)
    fees.read(history(base_fee, priority_fee))
    assert fees.fees is not None
    assert fees.fees.priority_fee <= min(fees.fees.max_fee, CAP.priority_fee)
    assert fees.fees.max_fee <= CAP.max_fee
    assert fees.capped == (base_fee + fees.fees.priority_fee > CAP.max_fee)


@given(max_fee=st.integers(10**6, 2 * CAP.max_fee), priority_fee=st.integers(10**6, CAP.priority_fee))
def test_a_raise_is_one_that_nodes_accept_and_stays_below_the_cap(max_fee: int, priority_fee: int) -> None:
    fees, before = FeeEstimate(1.0, CAP), Fees(max_fee, priority_fee)
    fees.read(history(20 * GWEI, GWEI))
    raised = fees.raised(before)
    if raised is None:
        assert before.max_fee * 1.12 > CAP.max_fee or before.priority_fee * 1.12 > CAP.priority_fee
        return
    assert raised.max_fee * 10 >= before.max_fee * 11
    assert raised.priority_fee * 10 >= before.priority_fee * 11
    assert raised.max_fee <= CAP.max_fee
    assert raised.priority_fee <= CAP.priority_fee
