"""Mutations of the settlement engine: what is lost, done twice, or believed too easily."""

from __future__ import annotations

from mutations.mutation import Mutation

MACHINE = ("tests/payments/test_settlement_machine.py",)
PAYOUTS = ("tests/payments/test_payouts_once.py",)
RETRIES = ("tests/payments/test_upto_retries.py",)
HOLD_UPS = ("tests/payments/test_hold_ups.py",)
PERMIT2 = ("tests/payments/test_permit2_evidence.py",)
EVIDENCE = ("tests/payments/test_evidence.py", *MACHINE)

_ENGINE, _JUDGE = "payments/settlement/engine.py", "payments/settlement/judge.py"
_OUTBOX, _OUTGOING = "payments/settlement/outbox.py", "payments/settlement/outgoing.py"
_REPAIRS, _DISPATCHER = "payments/settlement/repairs.py", "payments/settlement/dispatcher.py"
_FINALITY, _COURIER = "payments/settlement/finality.py", "payments/settlement/courier.py"
_EVIDENCE, _LOADING = "payments/settlement/evidence.py", "payments/settlement/loading.py"
_PERMIT2 = "payments/settlement/permit2_evidence.py"
_SECOND_LOOKS, _RETRIES = "payments/settlement/second_looks.py", "payments/settlement/retries.py"

SETTLEMENTS = (
    Mutation(
        "an entry of a reverted batch is not requeued",
        _OUTBOX,
        "    return [entry for entry in entries if is_as_known",
        "    return [entry for entry in entries[1:] if is_as_known",
        MACHINE,
    ),
    Mutation(
        "a requeued entry is not dispatched",
        _JUDGE,
        "            self._requeued(entry)\n",
        "            log.debug('forgotten')\n",
        MACHINE,
    ),
    Mutation(
        "a requeued entry goes out among others again",
        _DISPATCHER,
        "return self.entry is not None and self.entry.attempts > 0",
        "return False",
        MACHINE,
    ),
    Mutation(
        "a reverted batch fails its entries",
        _JUDGE,
        "(included.untried if reverted_batch else included.unproven).append(entry)",
        "included.unproven.append(entry)",
        MACHINE,
    ),
    Mutation(
        "an entry's place in its batch is ignored",
        "payments/chain/batches.py",
        "return results[position].logs if results[position].success else None",
        "return receipt['logs'] if results[position].success else None",
        EVIDENCE,
    ),
    Mutation(
        "a call that failed in its batch counts as paid",
        "payments/chain/batches.py",
        "return results[position].logs if results[position].success else None",
        "return [log for each in results for log in each.logs]",
        MACHINE,
    ),
    Mutation(
        "a Transfer proves a payment without its nonce",
        _EVIDENCE,
        "        if _is_eip3009(order) and not any(_uses_nonce(log, order) for log in logs):\n            return None\n",
        "",
        ("tests/payments/test_evidence.py",),
    ),
    Mutation(
        "a foreign Transfer proves a payment without its nonce",
        _EVIDENCE,
        "    return pick(receipt, following[:end], order)",
        "    return pick(receipt, logs, order)",
        ("tests/payments/test_evidence.py",),
    ),
    Mutation(
        "what was signed for counts as what arrived",
        _EVIDENCE,
        "                received_value=value,\n",
        "                received_value=order.value,\n",
        ("tests/payments/test_settlement.py", "tests/payments/test_evidence.py"),
    ),
    Mutation(
        "nobody looks whether somebody else executed it",
        _JUDGE,
        "                found = await self.find(entry, head)\n",
        "                found = NoEvidence(nonce_consumed=False)\n",
        MACHINE,
    ),
    Mutation(
        "an execution before our own transaction is not found",
        "payments/settlement/orders.py",
        "if self.from_block > 0 else (here,)",
        "if False else (here,)",
        MACHINE,
    ),
    Mutation(
        "one Transfer proves two payments",
        _OUTBOX,
        "    return found\n\n\ndef find(",
        "    return {}\n\n\ndef find(",
        ("tests/payments/test_evidence.py",),
    ),
    Mutation(
        "a Transfer of another payment hides one's own",
        _JUDGE,
        "strict=True) if proven.get(place, entry.id) == entry.id]",
        "strict=True)]",
        PERMIT2,
    ),
    Mutation(
        "in a batch of ours the Transfer of another call counts",
        _PERMIT2,
        "if done.success and use.is_made_by(*call)",
        "if done.success",
        PERMIT2,
    ),
    Mutation(
        "what came after the cancellation of a nonce counts as its use",
        _PERMIT2,
        "if ended is None or place_of(log) < ended",
        "if True",
        PERMIT2,
    ),
    Mutation(
        "of what nobody can read any amount counts",
        _PERMIT2,
        "if evidence and evidence.received_value == order.value",
        "if evidence",
        PERMIT2,
    ),
    Mutation(
        "of what nobody can read any block counts",
        _PERMIT2,
        " or await _used_in(whole.block_number, use.nonce, where)",
        " or True",
        PERMIT2,
    ),
    Mutation(
        "evidence that vanished is not noticed",
        _FINALITY,
        "                    verdicts.vanished.append(entry)",
        "                    verdicts.final.append(entry)",
        MACHINE,
    ),
    Mutation(
        "a payment is final one block too early",
        _FINALITY,
        "elif head - number >= self._confirmations:",
        "elif head - number >= self._confirmations - 1:",
        MACHINE,
    ),
    Mutation(
        "what could not be recorded as final is forgotten",
        _FINALITY,
        (
            "            yield verdicts\n"
            "            for entry in (*verdicts.final, *verdicts.vanished):\n"
            "                # Perhaps it was tried again meanwhile, and what came of that is to be watched.\n"
            "                if self.watched.get(entry.id) is entry:\n"
            "                    del self.watched[entry.id]\n"
        ),
        (
            "            for entry in (*verdicts.final, *verdicts.vanished):\n"
            "                self.watched.pop(entry.id, None)\n"
            "            yield verdicts\n"
        ),
        ("tests/payments/test_finality.py",),
    ),
    Mutation(
        "what a reorganisation took away is not sent again",
        _FINALITY,
        "        for transaction in transactions:\n            self._adopt(transaction)\n",
        "        del transactions\n",
        ("tests/payments/test_channels_reorganised.py", *MACHINE),
    ),
    Mutation(
        "gas of a reorganised transaction stays booked",
        _OUTGOING,
        "    if paid is not None:\n        signer, gas = _gas_accounts",
        "    if False:\n        signer, gas = _gas_accounts",
        MACHINE,
    ),
    Mutation(
        "gas is booked without what rounding takes",
        _OUTGOING,
        "    fee_gwei = divide_up(fee_wei, WEI_PER_GWEI)",
        "    fee_gwei = fee_wei // WEI_PER_GWEI",
        MACHINE,
    ),
    Mutation(
        "a stalled transaction's fees are not raised",
        _REPAIRS,
        '        if trouble == "underpriced" or _age(first, now) > self._patience_s:\n',
        "        if False:\n",
        MACHINE,
    ),
    Mutation(
        "a gap in a signer's nonces is not filled",
        _REPAIRS,
        "            await self._fill(signer, chain_nonce, waiting[0].signer_nonce)\n",
        "",
        MACHINE,
    ),
    Mutation(
        "a payout is signed anew because its receipt is late",
        _REPAIRS,
        "        if not await self._is_used_by_another(transaction):\n",
        "        if transaction is None:\n",
        PAYOUTS,
    ),
    Mutation(
        "a payout has to come from the treasury that its order names",
        _EVIDENCE,
        'replace(order, payer=receipt["from"].lower())',
        "order",
        PAYOUTS,
    ),
    Mutation(
        "a stolen nonce is waited for",
        _REPAIRS,
        "        if self._lost[transaction.id] < NONCE_LOST_ROUNDS or self._fees.fees is None:",
        "        if True:",
        MACHINE,
    ),
    Mutation(
        "a nonce is allocated twice",
        _OUTGOING,
        "max(int(highest) + 1, signer.nonce_floor)",
        "max(int(highest), signer.nonce_floor)",
        MACHINE,
    ),
    Mutation(
        "deadlines are not looked at",
        _REPAIRS,
        "        await self._look_at_deadlines()\n",
        "",
        MACHINE,
    ),
    Mutation(
        "a broadcast that failed is not repeated",
        _COURIER,
        (
            "            self._outgoing = {\n"
            "                outgoing.id: outgoing for outgoing in sends if outgoing.id in self.carried\n"
            "            } | self._outgoing\n"
        ),
        "",
        MACHINE,
    ),
    Mutation(
        "a restart forgets what is queued",
        _OUTBOX,
        "WHERE state='queued' AND chain_id=? AND kind IN",
        "WHERE state='queued' AND chain_id<>? AND kind IN",
        MACHINE,
    ),
    Mutation(
        "a restart forgets what is mined and not final",
        _LOADING,
        "if ours.has(signer) and entry.kind in kinds and entry.block_number is not None",
        "if ours.has(signer) and entry.kind in kinds and entry.block_number is None",
        MACHINE,
    ),
    Mutation(
        "a restart leaves undecided what was killed between block and decision",
        _LOADING,
        "    for transaction in outgoing.load(tx, stranded, accounts):\n        outgoing.exclude(tx, transaction)\n",
        "    del stranded\n",
        ("tests/payments/test_second_looks.py",),
    ),
    Mutation(
        "an order is written a second time",
        _OUTBOX,
        '    if not _insert(tx, order, "submitted", from_block, transaction_id, position):\n        return None\n',
        '    _insert(tx, order, "submitted", from_block, transaction_id, position)\n',
        MACHINE,
    ),
    Mutation(
        "who waits is told before it is written",
        _DISPATCHER,
        "        lane.waiting.append(item)\n        lane.changed.set()\n        # Whoever",
        "        lane.waiting.append(item)\n        lane.changed.set()\n        return\n        # Whoever",
        MACHINE,
    ),
    Mutation(
        "queued orders are dropped when the database is busy",
        _DISPATCHER,
        "        if queued and self._running:",
        "        if False:",
        MACHINE,
    ),
    Mutation(
        "a payment that arrives after we gave up is not the payer's",
        "payments/settlement/states.py",
        '    "failed": frozenset({"mined", "superseded", "queued"}),',
        '    "failed": frozenset({"queued"}),',
        ("tests/payments/test_second_looks.py", "tests/payments/test_late_executions.py"),
    ),
    Mutation(
        "a payment's state moves without its booking",
        _JUDGE,
        "        self._kinds[entry.kind].on_paid(tx, entry.row() | columns | told)\n",
        "        del told\n",
        MACHINE,
    ),
    Mutation(
        "a second look changes nothing",
        _SECOND_LOOKS,
        "        if evidence is None or not await self._judge.book(entry, evidence):",
        "        if False:",
        ("tests/payments/test_second_looks.py",),
    ),
    Mutation(
        "a look waits until what it found can be booked",
        _JUDGE,
        "            if await self.book(entry, found):",
        "            if await self.record(entry, found):",
        HOLD_UPS,
    ),
    Mutation(
        "what waits for something else fills a look for queued orders",
        _OUTBOX,
        " AND waits_for IS NULL ORDER BY created_ms",
        " ORDER BY created_ms",
        HOLD_UPS,
    ),
    Mutation(
        "a second look that a node refuses is the first one again",
        _SECOND_LOOKS,
        "states.now_ms() + AGAIN_MS",
        "0",
        HOLD_UPS,
    ),
    Mutation(
        "a failed call is tried again without end",
        _RETRIES,
        "entry.attempts + 1 < TRIES_MAX",
        "entry.attempts + 1 < 99",
        RETRIES,
    ),
    Mutation(
        "a failed call is tried again that would fail again",
        _RETRIES,
        "            if isinstance(answer, RpcError):",
        "            if False:",
        RETRIES,
    ),
    Mutation(
        "a failed call is tried again while the first one may still be mined",
        _OUTGOING,
        "state='included' AND block_number<=?",
        "state='included' AND ?>0",
        RETRIES,
    ),
    Mutation(
        "what is tried again is still told as failed",
        "payments/settlement/care.py",
        "        self._outcomes.forget(entry.id)\n        self.entries.pop",
        "        self.entries.pop",
        RETRIES,
    ),
)
