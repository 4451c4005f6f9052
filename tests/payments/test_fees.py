"""What is offered for gas: as much as the chain takes, and never more than the operator allows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from payments.chain.gas import BASE_GAS, EXTRA_GAS_MAX, GAS_PER_BYTE, SAMPLE_BYTES, BytesGas
from payments.chain.rpc import RpcError
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


# --- the gas of bytes -------------------------------------------------------------------------------------------------


def measured(gas: int) -> BytesGas:
    bytes_gas = BytesGas()
    bytes_gas.read(hex(BASE_GAS + GAS_PER_BYTE * SAMPLE_BYTES + gas))
    return bytes_gas


def test_a_chain_that_charges_for_bytes_as_ethereum_does_needs_no_more() -> None:
    assert measured(0).besides(300) == 0
    assert BytesGas().besides(300) == 0


def test_what_publishing_costs_is_added_with_a_margin_and_more_for_more_bytes() -> None:
    """Arbitrum, at a time when its L1 part of such a transaction is 70,000 gas."""
    bytes_gas = measured(70_000)
    assert bytes_gas.besides(SAMPLE_BYTES) == 105_000
    assert bytes_gas.besides(40_000) == 3_000_000
    assert 0 < bytes_gas.besides(68) < bytes_gas.besides(300) < bytes_gas.besides(SAMPLE_BYTES)


@given(gas=st.integers(0, 2**64), calldata_bytes=st.integers(0, 2**17))
def test_no_answer_of_a_node_makes_the_limit_unbounded(gas: int, calldata_bytes: int) -> None:
    assert 0 <= measured(gas).besides(calldata_bytes) <= EXTRA_GAS_MAX


def test_a_refusal_leaves_the_last_measurement() -> None:
    bytes_gas = measured(70_000)
    bytes_gas.read(RpcError(-32601, "no such method"))
    assert bytes_gas.besides(SAMPLE_BYTES) == 105_000
