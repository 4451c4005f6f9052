"""What an operator must act on before payments stop: gas, treasury, nodes. Shown by `/readyz` and in the metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from payments.chain.rpc import Reply, Request, RpcError, RpcUnavailable
from payments.chain.transactions import encode_balance_of
from payments.money import NANO_DECIMALS, atomic_to_nano_down, nano_to_usd
from payments.settlement.engine import Settlements

log = logging.getLogger(__name__)

INTERVAL_S = 30.0
WEI_PER_NANO = 10 ** (18 - NANO_DECIMALS)


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that is too low or away. `subject` is an address, an asset, or a chain."""

    code: Literal["low_gas", "low_treasury", "rpc_unavailable", "fees_unknown", "fees_capped", "unclaimable"]
    subject: str
    message: str


class Alarms:
    """Watches the balances that settlements on one network need.

    Args:
        settlements: Whose accounts pay the gas.
        pay_to: The treasury, lower-case hex.
        gas_minimum_wei: An account below it raises ``low_gas``.
        treasury_minimum_nano_usd: A token of which the treasury has less raises ``low_treasury``; 0 for never.
    """

    def __init__(
        self,
        settlements: Settlements,
        pay_to: str,
        *,
        gas_minimum_wei: int,
        treasury_minimum_nano_usd: int,
    ) -> None:
        self.gas_wei: dict[str, int] = {}
        """By account."""
        self.treasury_nano_usd: dict[str, int] = {}
        """By asset."""
        self.sources: list[Callable[[], list[Alarm]]] = []
        """Who else knows of something to be told."""
        self._rpc, self._chain_id, self._fees = settlements.rpc, settlements.network.chain_id, settlements.fees
        self._accounts, self._tokens = list(settlements.accounts.values()), settlements.network.tokens
        self._pay_to = pay_to
        self._gas_minimum, self._treasury_minimum = gas_minimum_wei, treasury_minimum_nano_usd
        self._task: asyncio.Task[None] | None = None

    def raised(self) -> list[Alarm]:
        """The alarms of now."""
        alarms = [
            Alarm("low_gas", account, f"the signer {account} has {_coins(wei)} left for gas; send it some")
            for account, wei in self.gas_wei.items()
            if wei < self._gas_minimum
        ]
        alarms += [
            Alarm("low_treasury", asset, f"the treasury has ${nano_to_usd(nano)} of {asset} left for refunds")
            for asset, nano in self.treasury_nano_usd.items()
            if nano < self._treasury_minimum
        ]
        if not self._rpc.available:
            message = f"no node of chain {self._chain_id} answers; payments on it wait"
            alarms.append(Alarm("rpc_unavailable", f"eip155:{self._chain_id}", message))
        elif not self._fees.known:
            message = (
                f"no node of chain {self._chain_id} answers eth_feeHistory as EIP-1559 wants it; payments on it wait"
            )
            alarms.append(Alarm("fees_unknown", f"eip155:{self._chain_id}", message))
        if self._fees.capped:
            message = f"gas on chain {self._chain_id} costs more than max_fee_gwei; payments on it wait"
            alarms.append(Alarm("fees_capped", f"eip155:{self._chain_id}", message))
        return alarms + [alarm for source in self.sources for alarm in source()]

    def gauges(self) -> list[tuple[str, str, dict[str, str], float]]:
        """Name, help, labels and value of what the metrics show."""
        gas, treasury = "farebox_signer_gas_native", "farebox_treasury_usd"
        held = "Whether this process sends with an account: of all that share a database one does"
        return [
            *((gas, "Coins that a signer has for gas", {"signer": a}, wei / 1e18) for a, wei in self.gas_wei.items()),
            *(
                (treasury, "Dollars of a token in the treasury", {"asset": asset}, nano / 1e9)
                for asset, nano in self.treasury_nano_usd.items()
            ),
            *(("farebox_signer_held", held, {"signer": each.address}, float(each.mine)) for each in self._accounts),
        ]

    async def start(self) -> None:
        """Look now and then."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """Read the balances once. What a node does not tell stays as it was.

        Raises:
            RpcUnavailable: No node answered.
        """
        data = "0x" + encode_balance_of(self._pay_to).hex()
        requests: list[Request] = [("eth_getBalance", (account.address, "latest")) for account in self._accounts]
        requests += [("eth_call", ({"to": token.address, "data": data}, "latest")) for token in self._tokens]
        replies = [_number(reply) for reply in await self._rpc.batch(requests)]
        for account, wei in zip(self._accounts, replies, strict=False):
            if wei is not None:
                self.gas_wei[account.address] = wei
        for token, atomic in zip(self._tokens, replies[len(self._accounts) :], strict=True):
            if atomic is not None:
                self.treasury_nano_usd[token.asset] = atomic_to_nano_down(atomic, token.decimals)
        if None in replies:
            log.warning("a node does not tell all balances of chain %d", self._chain_id)

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except RpcUnavailable as error:
                log.warning("cannot read the signers' balances: %s", error)
            except Exception:
                # Whatever a node makes up, an account without gas is told of all the same.
                log.exception("reading the signers' balances failed")
            await asyncio.sleep(INTERVAL_S)


def _number(reply: Reply) -> int | None:
    """A balance; None if it is none: a node that is out of step answers a call of a contract with nothing."""
    return None if isinstance(reply, RpcError) or reply == "0x" else int(reply, 16)


def _coins(wei: int) -> str:
    """Wei as coins, to nine decimals."""
    return nano_to_usd(wei // WEI_PER_NANO)
