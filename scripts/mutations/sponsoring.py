"""Mutations of sponsored approvals: coin given twice, for nothing, or without bound."""

from __future__ import annotations

from mutations.mutation import Mutation

TESTS = ("tests/payments/test_sponsoring.py",)
FACILITATOR = ("tests/payments/test_facilitator_sponsoring.py",)

_RECORDS, _SPONSOR = "payments/sponsoring/records.py", "payments/sponsoring/sponsor.py"
_PROSPECTS = "payments/sponsoring/prospects.py"

SPONSORING = (
    Mutation(
        "a mined gift is taken for reorganised after a restart",
        "payments/settlement/finality.py",
        "            places = {NO_LOG, *(",
        "            places = {*(",
        TESTS,
    ),
    Mutation(
        "a payer that wasted its coin is given it again",
        _RECORDS,
        "        if before is not None and before.funding_id is not None:\n",
        "        if before is not None and before.state == 'funding':\n",
        TESTS,
    ),
    Mutation(
        "coin that a reorganisation gave again is not booked",
        "payments/sponsoring/funding.py",
        'return transfers.find(tx, f"{row[\'id\']}:{taken_back}" if taken_back else row["id"])',
        'return transfers.find(tx, row["id"])',
        TESTS,
    ),
    Mutation(
        "an hour's budget counts nothing that was given",
        _RECORDS,
        "        spent + cost > hourly\n",
        "        cost > hourly\n",
        TESTS,
    ),
    Mutation(
        "one resource server uses up the whole budget",
        _RECORDS,
        "        or (wanted.client and of_client + cost > hourly // CLIENT_SHARE)\n",
        "",
        FACILITATOR,
    ),
    Mutation(
        "losses do not end the giving",
        _RECORDS,
        "        or int(tx.execute(_LOST, (chain_id, since)).fetchone()[0]) >= LOSSES_MAX\n",
        "",
        TESTS,
    ),
    Mutation(
        "a payment goes out before its approval",
        _RECORDS,
        "        outbox.enqueue(tx, order, from_block, waits_for=wanted.name)\n",
        "        outbox.enqueue(tx, order, from_block)\n",
        TESTS,
    ),
    Mutation(
        "an approval is sent before its coin is there",
        _SPONSOR,
        '            if sponsored.state == "funding":\n',
        '            if sponsored.state == "funding" and funding_state == "queued":\n',
        TESTS,
    ),
    Mutation(
        "a failed approval leaves its payment waiting",
        _SPONSOR,
        "        if sponsored.settlement_id is not None:\n            # First",
        "        if sponsored.settlement_id is None:\n            # First",
        TESTS,
    ),
    Mutation(
        "coin is given to accounts with code",
        _PROSPECTS,
        '    if len(str(code)) > len("0x"):\n',
        '    if str(code) == "":\n',
        TESTS,
    ),
    Mutation(
        "what a settlement would do after the approval is not asked",
        _PROSPECTS,
        '            if call.get("status") != "0x1":\n',
        '            if call.get("status") is None:\n',
        TESTS,
    ),
    Mutation(
        "a node that cannot simulate is believed",
        _PROSPECTS,
        "    elif isinstance(transfer, RpcError):\n",
        "    elif transfer is None:\n",
        TESTS,
    ),
)
