"""Mutations of payment channels: claiming too much, lending what is not there, forgetting what happened on chain."""

from __future__ import annotations

from mutations.mutation import Mutation

BOOK = ("tests/payments/test_channel_book.py",)
TOPUPS = ("tests/payments/test_channel_topups.py",)
MACHINE = ("tests/payments/test_channels_machine.py",)
ON_CHAIN = ("tests/payments/test_channels_on_chain.py",)
CHANGED = ("tests/payments/test_channels_reconfigured.py",)
REORGANISED = ("tests/payments/test_channels_reorganised.py",)

_BOOK, _KEEPER = "payments/channels/book.py", "payments/channels/keeper.py"
_REQUESTS, _KINDS = "payments/channels/requests.py", "payments/channels/kinds.py"
_REFUNDS = "payments/channels/refunds.py"

CHANNELS = (
    Mutation(
        "a deposit that a reorganisation took away is lent on",
        _KINDS,
        "            on_reopened=books.deposit_reopened,\n",
        "",
        REORGANISED,
    ),
    Mutation(
        "a claim that a reorganisation took away is made twice",
        _KINDS,
        '                book.put(tx, channel_id, claim_id=row["id"])\n',
        "                pass\n",
        REORGANISED,
    ),
    Mutation(
        "a refund that a reorganisation took away is lent on",
        _BOOK,
        "        if int(nonce) >= refund_nonce:\n",
        "        if int(nonce) > refund_nonce:\n",
        (*REORGANISED, *BOOK),
    ),
    Mutation(
        "an event that a reorganisation took away is remembered",
        _KEEPER,
        "                book.mark(tx, channel_id, None)\n            self._set_cursor",
        "                pass\n            self._set_cursor",
        REORGANISED,
    ),
    Mutation(
        "what can never be claimed holds up other claims",
        _KEEPER,
        ' AND charged_nano_usd - lost_nano_usd - claimed_nano_usd >= ?"\n',
        ' AND charged_nano_usd - claimed_nano_usd >= ?"\n',
        ON_CHAIN,
    ),
    Mutation(
        "a hang-up is free while nobody knows of the deposit",
        "payments/tenders/channel.py",
        "        charge_nano_usd = spent_nano_usd\n",
        "        charge_nano_usd = 0\n",
        ON_CHAIN,
    ),
    Mutation(
        "a hang-up is charged although the deposit failed",
        "payments/tenders/channel.py",
        "            charge_nano_usd = 0\n",
        "            charge_nano_usd = spent_nano_usd\n",
        ON_CHAIN,
    ),
    Mutation(
        "whoever withdraws while it is served does not pay",
        "payments/tenders/channel.py",
        "        to_be_withdrawn = min(synced.on_chain.withdraw_amount, self._channel.on_chain.withdraw_amount)\n",
        "        to_be_withdrawn = synced.on_chain.withdraw_amount\n",
        ON_CHAIN,
    ),
    Mutation(
        "a claim is signed by the key that is offered now",
        _KEEPER,
        "        authorizer = self._services.authorizers[config.receiver_authorizer]\n",
        "        authorizer = self._services.authorizer\n",
        CHANGED,
    ),
    Mutation(
        "a claim goes to the treasury of now",
        _KEEPER,
        "encode_claim_and_settle(claims, signature, config.receiver, token.address)",
        "encode_claim_and_settle(claims, signature, self._services.receiver, token.address)",
        CHANGED,
    ),
    Mutation(
        "a channel in a token that is not configured is looked at",
        "payments/channels/services.py",
        "if channel is not None and channel.config.token in tokens]\n",
        "if channel is not None]\n",
        CHANGED,
    ),
    Mutation(
        "less than a unit fills the look for what is due",
        _KEEPER,
        "self._services.authorizers, max(1, atomic_to_nano_down(1, token.decimals))\n",
        "self._services.authorizers, 1\n",
        CHANGED,
    ),
    Mutation(
        "less than a unit is outstanding for ever",
        _BOOK,
        "(owed_before or now_ms()) if owes else None,\n",
        "owed_before or now_ms(),\n",
        BOOK,
    ),
    Mutation(
        "a stranger's channel is remembered",
        "payments/tenders/channel.py",
        "        if unknown and isinstance(decision, PaymentRefused):\n",
        "        if False:\n",
        ON_CHAIN,
    ),
    Mutation(
        "refunds for nothing are not counted",
        _REFUNDS,
        "    book.count_transaction(tx, channel)\n",
        "",
        ON_CHAIN,
    ),
    Mutation(
        "deposits for nothing are not counted",
        "payments/tenders/channel.py",
        "            book.count_transaction(tx, channel)\n",
        "",
        ON_CHAIN,
    ),
    Mutation(
        "transactions for nothing are counted a channel",
        _BOOK,
        ' FROM channel WHERE payer = ? AND unpaid_since_ms > ?"\n',
        ' FROM channel WHERE payer = ? AND unpaid_since_ms > ? AND unpaid_transactions > 1"\n',
        ON_CHAIN,
    ),
    Mutation(
        "a claim exceeds the voucher",
        _KEEPER,
        "    total = min(charged, channel.voucher, channel.on_chain.balance)\n",
        "    total = min(max(charged, channel.voucher + 1), channel.on_chain.balance)\n",
        MACHINE,
    ),
    Mutation(
        "a claim takes the whole voucher",
        _KEEPER,
        "    total = min(charged, channel.voucher, channel.on_chain.balance)\n",
        "    total = min(channel.voucher, channel.on_chain.balance)\n",
        MACHINE,
    ),
    Mutation(
        "a claim rounds up",
        _KEEPER,
        "    charged = nano_to_atomic_down(channel.charged_nano_usd, token.decimals)\n",
        "    charged = nano_to_atomic_down(channel.charged_nano_usd, token.decimals) + 1\n",
        MACHINE,
    ),
    Mutation(
        "a claim exceeds what the channel holds",
        _KEEPER,
        "    total = min(charged, channel.voucher, channel.on_chain.balance)\n",
        "    total = min(charged, channel.voucher)\n",
        BOOK,
    ),
    Mutation(
        "a claim is begun while another is under way",
        _KEEPER,
        "if current is not None and current.claim_id is None and claim.total",
        "if current is not None and claim.total",
        ON_CHAIN,
    ),
    Mutation(
        "a withdrawing channel is not claimed early",
        _KEEPER,
        'if channel.state == "withdrawing" or channel.uncollected_nano_usd]\n',
        "if channel.uncollected_nano_usd]\n",
        ON_CHAIN,
    ),
    Mutation(
        "a top-up is claimed when it is worth it",
        _KEEPER,
        'if channel.state == "withdrawing" or channel.uncollected_nano_usd]\n',
        'if channel.state == "withdrawing"]\n',
        TOPUPS,
    ),
    Mutation(
        "a top-up is withdrawn before it is claimed",
        "payments/withdrawals.py",
        "    uncollected = channels.uncollected_nano_usd(tx, address, token.asset)\n",
        "    uncollected = 0 * channels.uncollected_nano_usd(tx, address, token.asset)\n",
        TOPUPS,
    ),
    Mutation(
        "a voucher that topped up is bound to nothing",
        _REQUESTS,
        "receipt.charged_nano_usd + receipt.paid_nano_usd > 0",
        "receipt.charged_nano_usd > 0",
        TOPUPS,
    ),
    Mutation(
        "what happens on chain is not watched",
        _KEEPER,
        "        await self._services.sync(known)\n",
        "        del known\n        known = []\n",
        (*ON_CHAIN, *MACHINE),
    ),
    Mutation(
        "a failed claim is never tried again",
        _KINDS,
        "            book.put(tx, channel.id, claim_id=None, claim_from_ms=claim_from_ms)\n",
        "            pass\n",
        MACHINE,
    ),
    Mutation(
        "a claim is not booked",
        _BOOK,
        '        _post(tx, channel, "claimed", account_id("custody", channel.asset), change)\n',
        "        pass\n",
        MACHINE,
    ),
    Mutation(
        "a claim is booked twice",
        _BOOK,
        "    put(tx, channel_id, claimed_nano_usd=claimed_nano_usd, unclaimed_since_ms=since)\n",
        "    put(tx, channel_id, unclaimed_since_ms=since)\n",
        MACHINE,
    ),
    Mutation(
        "what is held is lent again",
        _REQUESTS,
        "    needed = channel.charged_nano_usd + held + wanted.price_nano_usd\n",
        "    needed = channel.charged_nano_usd + wanted.price_nano_usd\n",
        BOOK,
    ),
    Mutation(
        "what is charged is lent again",
        _REQUESTS,
        "    needed = channel.charged_nano_usd + held + wanted.price_nano_usd\n",
        "    needed = held + wanted.price_nano_usd\n",
        BOOK,
    ),
    Mutation(
        "one voucher pays two requests",
        _REQUESTS,
        "    if not bound and signed_nano_usd > channel.charged_nano_usd",
        "    if signed_nano_usd > channel.charged_nano_usd",
        BOOK,
    ),
    Mutation(
        "what is to be withdrawn is lent",
        _BOOK,
        "        return self.on_chain.balance - self.on_chain.withdraw_amount - self.refunding\n",
        "        return self.on_chain.balance - self.refunding\n",
        BOOK,
    ),
    Mutation(
        "what is being refunded is lent",
        _BOOK,
        "        return self.on_chain.balance - self.on_chain.withdraw_amount - self.refunding\n",
        "        return self.on_chain.balance - self.on_chain.withdraw_amount\n",
        BOOK,
    ),
    Mutation(
        "a request is counted each time it is captured",
        _REQUESTS,
        '    if before is not None and before.state == "open":\n        book.charge(',
        "    if True:\n        book.charge(",
        MACHINE,
    ),
    Mutation(
        "a top-up is counted each time it is captured",
        _REQUESTS,
        '    if before is not None and before.state == "open":\n        book.credit(',
        "    if True:\n        book.credit(",
        TOPUPS,
    ),
    Mutation(
        "a lower voucher replaces a higher one",
        _REQUESTS,
        "    if voucher.amount > channel.voucher:\n",
        "    if True:\n",
        MACHINE,
    ),
    Mutation(
        "a refund gives back what is charged",
        _REFUNDS,
        "    left = channel.on_chain.balance - owed\n",
        "    left = channel.on_chain.balance - channel.on_chain.total_claimed\n",
        MACHINE,
    ),
    Mutation(
        "a lagging node takes money away",
        _BOOK,
        "    if seen.block < current.synced_block:\n",
        "    if False:\n",
        BOOK,
    ),
)
