"""What the chain says about a payment before it is settled: the last and dearest check.

All checks that arrive within half a millisecond are one `eth_call` to Multicall3 (0.5 ms singly, 0.1 ms each in a batch of 50).
A payment that fails in such company is asked about again alone, so that nobody can make another's payment look bad, for
instance with an account whose code burns the whole call's gas.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from payments.chain.networks import MULTICALL3_ADDRESS, PERMIT2_ADDRESS, Network, Token
from payments.chain.rpc import Request, Rpc, RpcError, RpcUnavailable
from payments.chain.transactions import (
    WORD,
    decode_aggregate3,
    decode_revert,
    encode_aggregate3,
    encode_allowance,
    encode_authorization_state,
    encode_balance_of,
    encode_basis_points_rate,
    encode_nonce_bitmap,
    nonce_is_set,
    settle_call,
)
from payments.errors import AllowanceRequired, PaymentError, PaymentRefused, SettlementUnavailable
from payments.promises import Cover, Earlier, Funds, InUse, Needed
from payments.settlement.outbox import gas_limit
from payments.store import StoreBusy
from payments.verification.wallet_signatures import unwrap
from payments.x402.wire import Payment, Permit2Authorization, UptoAuthorization

WINDOW_S = 0.0005
BATCH_MAX = 50
"""Payments in one call: about 6 million gas, which every node allows an eth_call."""

WOULD_FAIL = "transfer_would_fail"

FRESH_S = 3600.0
"""How old the last block of a chain may be on which a payment is valid from its signing on."""

LOOKS_MAX = 3
LOOK_AGAIN_S = 0.1

CallResult = tuple[bool, bytes]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the chain says of the payer of a payment that would succeed now."""

    has_code: bool
    """Whether the payer is a contract: then the chain's word may be another one in the next block, at no cost to the payer."""
    cover: Cover | None = None
    """What it has and what the payment needs, where it was asked for beside what was promised before."""


@dataclass(frozen=True, slots=True)
class _Check:
    payment: Payment
    token: Token
    verdict: asyncio.Future[PaymentError | Seen]
    earlier: Earlier | None
    unproven: PaymentError | None
    amount: int
    """What is to be moved, in atomic units: of `upto`, it may be less than what is authorised."""
    looks: int = 1

    def calls(self) -> list[tuple[str, bytes]]:
        authorization, token = self.payment.authorization, self.token.address
        payer, nonce = authorization.payer, authorization.nonce
        calls = [(token, encode_balance_of(payer))]
        if isinstance(authorization, Permit2Authorization):
            calls.append((PERMIT2_ADDRESS, encode_nonce_bitmap(payer, nonce)))
            calls.append((token, encode_allowance(payer, PERMIT2_ADDRESS)))
            calls.append((token, encode_basis_points_rate()))
        else:
            calls.append((token, encode_authorization_state(payer, nonce)))
        if self.unproven is None and not self.apart:
            calls.append(settle_call(self.payment, self.token))
        return calls

    @property
    def apart(self) -> bool:
        """Whether the call is simulated by itself, though in the same round trip: only its facilitator can make it."""
        return isinstance(self.payment.authorization, UptoAuthorization)

    def simulation(self, *, deploy: bool = False, block: Literal["latest", "pending"] = "latest") -> Request:
        """The very call, under the gas limit that the settlement will have.

        Args:
            deploy: The payer has no code yet.
            block: In the state after the last block, or in the one that is being made.
        """
        authorization = self.payment.authorization
        to, data = settle_call(self.payment, self.token, deploy=deploy, amount=self.amount)
        call = {"to": to, "data": "0x" + data.hex(), "gas": hex(gas_limit(to, data, self.token.address))}
        if isinstance(authorization, UptoAuthorization):
            call["from"] = authorization.facilitator
        return "eth_call", (call, block)

    @property
    def needed(self) -> Needed:
        permit2 = isinstance(self.payment.authorization, Permit2Authorization)
        return Needed(self.amount, self.amount if permit2 else 0, self.payment.permit is not None)

    def funds(self, results: Sequence[CallResult]) -> Funds:
        permit2 = isinstance(self.payment.authorization, Permit2Authorization)
        return Funds(_number(results[0]), _number(results[2]) if permit2 else 0)

    def seen(self, results: Sequence[CallResult], has_code: bool) -> Seen:
        if self.earlier is None:
            return Seen(has_code)
        return Seen(has_code, Cover(self.funds(results), self.needed, self.earlier))

    def conclude(self, verdict: PaymentError | Seen) -> None:
        if not self.verdict.done():
            self.verdict.set_result(verdict)


class ChainStates:
    """Checks payments against the state of one network."""

    def __init__(self, rpc: Rpc, network: Network) -> None:
        self.network = network
        self.checks = 0
        self.refusals = 0
        self._rpc = rpc
        self._waiting: list[_Check] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def check(
        self,
        payment: Payment,
        token: Token,
        pay_to: str,
        earlier: Earlier | None = None,
        unproven: PaymentError | None = None,
        amount: int | None = None,
    ) -> Seen:
        """Return if the payment would succeed now: nonce unused, balance and allowance there, the very call succeeds.

        Args:
            payment: Already verified offline.
            token: What it pays in.
            pay_to: Whom it pays, lower-case hex.
            earlier: What is promised before it of the same balance and allowance.
            unproven: What is wrong with the signature if the payer is no contract: no key of its own made it.
            amount: Of `upto`, what is to be taken, in atomic units; None for all that may be.

        Raises:
            PaymentError: `unproven`.
            PaymentRefused: ``authorization_used``, ``insufficient_funds``, ``token_takes_fee`` or ``transfer_would_fail``.
            AllowanceRequired: Permit2 may not move the token yet.
            SettlementUnavailable: The chain cannot be asked.
        """
        assert payment.authorization.recipient == pay_to
        loop = asyncio.get_running_loop()
        verdict: asyncio.Future[PaymentError | Seen] = loop.create_future()
        if not self._waiting:
            loop.call_later(WINDOW_S, self._depart)
        moved = payment.authorization.value if amount is None else amount
        self._waiting.append(_Check(payment, token, verdict, earlier, unproven, moved))
        self.checks += 1
        found = await verdict
        if isinstance(found, PaymentError):
            self.refusals += 1
            raise found
        return found

    def _depart(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), BATCH_MAX):
            task = asyncio.get_running_loop().create_task(self._run(waiting[start : start + BATCH_MAX]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, checks: Sequence[_Check]) -> None:
        try:
            await self._ask(checks)
        except (RpcUnavailable, RpcError, ValueError) as error:
            if len(checks) > 1:
                await asyncio.gather(*(self._run([check]) for check in checks))
                return
            checks[0].conclude(_unavailable(error))
        except BaseException:
            # Nobody may wait for ever for a verdict that cannot come, nor be cancelled for what is not its own fault.
            for check in checks:
                check.conclude(_unavailable())
            raise

    async def _ask(self, checks: Sequence[_Check]) -> None:
        calls = [check.calls() for check in checks]
        flat = [call for each in calls for call in each]
        data = "0x" + encode_aggregate3(flat).hex()
        requests: list[Request] = [("eth_call", ({"to": MULTICALL3_ADDRESS, "data": data}, "latest"))]
        requests += [("eth_getCode", (check.payment.payer, "latest")) for check in checks]
        apart = [index for index, check in enumerate(checks) if check.apart]
        requests += [checks[index].simulation() for index in apart]
        replies = await self._rpc.batch(requests)
        simulated = dict(zip(apart, replies[1 + len(checks) :], strict=True))
        answers: list[Any] = replies[: 1 + len(checks)]
        for answer in answers:
            if isinstance(answer, RpcError):
                raise answer
        reply, *codes = answers
        if not all(isinstance(answer, str) and answer.startswith("0x") for answer in (reply, *codes)):
            raise ValueError("a node answered with something that is not bytes")
        results = iter(decode_aggregate3(bytes.fromhex(reply[2:]), len(flat)))
        again = []
        for index, check in enumerate(checks):
            own = [next(results) for _ in calls[index]]
            in_use = InUse() if check.earlier is None else check.earlier.in_use
            verdict = _judge(check, own, in_use)
            if verdict is None and isinstance(failure := simulated.get(index), RpcError):
                verdict = _would_fail(failure.message)
            if verdict is not None and check.looks < LOOKS_MAX and _judge(check, own, InUse()) is None:
                # Perhaps what is promised has just left the balance, and only we do not know yet.
                again.append(self._look_again(check))
                continue
            has_code = len(codes[index]) > 2
            seen = check.seen(own, has_code)
            if check.unproven is not None and not has_code and unwrap(check.payment.signature)[1] is None:
                check.conclude(check.unproven)
            elif verdict is not None and len(checks) > 1:
                again.append(self._run([check]))
            elif verdict is None and not check.apart and (has_code or check.unproven is not None):
                again.append(self._simulate_alone(check, seen))
            elif (
                verdict is not None and verdict.code == WOULD_FAIL and is_fresh(check.payment.authorization.valid_after)
            ):
                again.append(self._simulate_alone(check, seen, "pending"))
            else:
                check.conclude(verdict or seen)
        await asyncio.gather(*again)

    async def _look_again(self, check: _Check) -> None:
        await asyncio.sleep(LOOK_AGAIN_S)
        try:
            earlier = None if check.earlier is None else await check.earlier.again()
        except StoreBusy as error:
            check.conclude(SettlementUnavailable("database_busy", "send the same payment again"))
            log.warning("what is promised cannot be asked now: %s", error)
            return
        await self._run([replace(check, earlier=earlier, looks=check.looks + 1)])

    async def _simulate_alone(self, check: _Check, seen: Seen, block: Literal["latest", "pending"] = "latest") -> None:
        """A contract wallet, or a payment for the next block: the chain's own judgement of the very call.

        A wallet's code may see who calls and how much gas there is, and behave for a simulation only.
        """
        method, parameters = check.simulation(deploy=not seen.has_code, block=block)
        try:
            await self._rpc.call(method, parameters)
        except RpcError as error:
            if block == "latest" and is_fresh(check.payment.authorization.valid_after):
                await self._simulate_alone(check, seen, "pending")
                return
            check.conclude(_would_fail(error.message))
        except RpcUnavailable as error:
            check.conclude(_unavailable(error))
        else:
            check.conclude(seen)


def _judge(check: _Check, results: Sequence[CallResult], in_use: InUse) -> PaymentError | None:
    used, authorization, token = _number(results[1]), check.payment.authorization, check.token
    permit2 = isinstance(authorization, Permit2Authorization)
    consumed = nonce_is_set(used, authorization.nonce) if permit2 else used == 1
    if consumed:
        return PaymentRefused(
            "authorization_used", "this authorization is used or cancelled on the chain; sign a new one"
        )
    funds, needed = check.funds(results), check.needed
    if funds.balance - in_use.balance < needed.balance:
        return insufficient_funds(funds.balance - in_use.balance, needed.balance, token)
    if permit2 and _takes_a_fee(results[3]):
        return PaymentRefused(
            "token_takes_fee",
            f"{token.symbol} takes a fee of every transfer now, so that less than is paid would arrive: pay in another token",
        )
    if not funds.allow(needed, in_use):
        return lacks_allowance(needed, in_use, token)
    if check.unproven is not None or check.apart:
        return None  # simulated by itself
    succeeded, returned = results[-1]
    return None if succeeded else _would_fail(decode_revert(returned))


def _takes_a_fee(result: CallResult) -> bool:
    """By Tether's own word; other tokens do not know the question. What is not mined yet may meet a fee all the same."""
    succeeded, returned = result
    return succeeded and len(returned) == WORD and any(returned)


def is_fresh(valid_after: int) -> bool:
    """Whether what is valid from a time on (unix seconds) may be so by now and was not in the last block.

    Where little happens the last block is old. Then the block that is being made has to be asked; not always, because it
    counts what is under way a second time.
    """
    return valid_after > time.time() - FRESH_S


def insufficient_funds(free: int, needed: int, token: Token) -> PaymentRefused:
    """A payer's balance does not cover a payment beside its others; both in atomic units."""
    return PaymentRefused(
        "insufficient_funds",
        f"the payer has {max(free, 0)} atomic units of {token.symbol} that are not in use, and {needed} are needed",
    )


def lacks_allowance(needed: Needed, in_use: InUse, token: Token) -> PaymentError:
    """A payer's allowance for Permit2, which everything that it has under way draws on, does not do for a payment."""
    if needed.permit:
        # Each permit is for one payment's amount and uses up the token's nonce: of two at once the second is worth nothing.
        return PaymentRefused(
            "permit_in_use",
            "another payment of this wallet is under way, after which this permit gives no allowance any more: sign anew"
            f" once it is settled, or approve Permit2 for {token.symbol}",
        )
    return AllowanceRequired(
        "permit2_allowance_required",
        f"the payer must once approve Permit2 for {token.symbol}: call approve({PERMIT2_ADDRESS}, amount) on"
        f" {token.address} with at least {needed.allowance + in_use.allowance}, then send the same payment again",
    )


def _unavailable(cause: Exception | None = None) -> SettlementUnavailable:
    unavailable = SettlementUnavailable("chain_unavailable", "the chain cannot be asked; send the same payment again")
    unavailable.__cause__ = cause
    return unavailable


def _would_fail(reason: str) -> PaymentRefused:
    return PaymentRefused(WOULD_FAIL, f"the token refuses the transfer: {reason}")


def _number(result: CallResult) -> int:
    succeeded, returned = result
    if not succeeded or len(returned) < 32:
        raise ValueError("a contract that should be there did not answer")
    return int.from_bytes(returned[:32], "big")
