"""What the tests of payment channels share: a gateway's part of them, and what an official client signs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

from contracts.devnet import Devnet, Wallet, send_signed
from payments.chain import channel_contract
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, Network, Token
from payments.chain.transactions import selector, word
from payments.channels import book
from payments.channels.book import Channel
from payments.channels.keeper import ChannelKeeper
from payments.channels.services import ChannelServices
from payments.leases import Leases
from payments.ledger import transfers
from payments.settlement.engine import Settlements
from payments.tenders.base import Outcome
from payments.tenders.channel import ChannelHold
from payments.tenders.channel_scheme import ChannelScheme
from payments.verification import vouchers
from payments.verification.signatures import checksum_address
from payments.x402.channels import ChannelConfig, ChannelPayment, Deposit, Erc3009Deposit, PayloadType, Voucher, hex32
from tests.payments.desks import opened
from tests.payments.exact_samples import DETAILS, QUOTED, quote_of
from tests.payments.settling import PAY_TO, sign

PRICE = QUOTED // 1000
DELAY_S = 900
PAYER = 3
INITIATE = "initiateWithdraw((address,address,address,address,address,uint40,bytes32),uint128)"
FINALIZE = "finalizeWithdraw((address,address,address,address,address,uint40,bytes32))"


@dataclasses.dataclass(frozen=True, slots=True)
class Gateway:
    """What a gateway opens, as far as channels go."""

    services: ChannelServices
    settlements: Settlements
    scheme: ChannelScheme
    keeper: ChannelKeeper
    token: Token
    wallet: Wallet
    salt: int = 0

    @property
    def config(self) -> ChannelConfig:
        payer, signer = self.wallet.address.lower(), self.services.authorizer.address
        return ChannelConfig(payer, payer, PAY_TO, signer, self.token.address, DELAY_S, self.salt)

    @property
    def number(self) -> int:
        return vouchers.channel_id(self.config, self.token.chain_id)

    def payment(
        self,
        amount: int,
        *,
        deposit: int = 0,
        valid_after: int = 0,
        type: PayloadType | None = None,
        refund: int | None = None,
    ) -> ChannelPayment:
        """A payment as an official client signs it."""
        chain_id = self.token.chain_id
        signed: Deposit | None = None
        if deposit:
            unsigned = Erc3009Deposit(deposit, valid_after, int(time.time()) + 300, secrets.randbits(256), b"")
            digest = vouchers.erc3009_deposit_digest(unsigned, self.config, self.number, self.token)
            signed = dataclasses.replace(unsigned, signature=sign(self.wallet, digest))
        voucher = sign(self.wallet, vouchers.voucher_digest(self.number, amount, chain_id))
        return ChannelPayment(
            version=2,
            scheme="batch-settlement",
            network=f"eip155:{chain_id}",
            accepted=self.scheme.requirement(self.token, QUOTED, 300),
            quote_token=None,
            digest=secrets.token_bytes(32),
            type=type or ("deposit" if deposit else "voucher"),
            config=self.config,
            voucher=Voucher(self.number, amount, voucher),
            deposit=signed,
            refund_amount=refund,
        )

    async def take(self, payment: ChannelPayment, request: bytes = b"request", *, ready: bool = True) -> ChannelHold:
        requirement = self.scheme.requirement(self.token, QUOTED, 300)
        digest = hashlib.sha256(request).digest()
        tender = self.scheme.tender(payment, self.token, requirement, digest, int(time.time()))
        hold = await tender.authorize(quote_of(QUOTED), dict(DETAILS))
        if ready:
            await hold.ready()
        return hold

    async def pay(self, amount: int, cost: int, *, deposit: int = 0) -> ChannelPayment:
        payment = self.payment(amount, deposit=deposit)
        hold = await self.take(payment)
        await hold.capture(cost * 1000, Outcome())
        return payment

    async def channel(self) -> Channel:
        found = await self.services.store.read(lambda tx: book.find(tx, hex32(self.number)))
        assert found is not None
        return found

    async def receivable(self) -> int:
        account = (await self.channel()).account
        return (await self.services.store.read(lambda tx: transfers.balance(tx, account))).balance

    async def settle_open(self) -> None:
        """Wait for the claims under way."""
        async with asyncio.timeout(20):
            while await self.services.store.read(  # noqa: ASYNC110 - there is no event to wait for
                lambda tx: book.select(tx, "claim_id IS NOT NULL", ())
            ):
                await asyncio.sleep(0.01)

    def payer_calls(self, url: str, function: str, *more: int) -> None:
        """A transaction of the payer's own."""
        data = selector(function) + channel_contract.encode_config(self.config) + b"".join(word(each) for each in more)
        send_signed(url, self.wallet.private_key, checksum_address(BATCH_SETTLEMENT_ADDRESS), "0x" + data.hex())


@contextlib.asynccontextmanager
async def gateway(
    database: Path | str, chain: Devnet, network: Network, *, owner: str = "one"
) -> AsyncIterator[Gateway]:
    async with opened(database, chain, network) as (payers, settlements):
        leases = Leases(payers.store, owner)
        services = ChannelServices(
            store=payers.store,
            settlements=settlements,
            rpc=settlements.rpc,
            network=network,
            receiver=PAY_TO,
            authorizers=settlements.signers,
            withdraw_delay_s=DELAY_S,
            payers=payers,
        )
        keeper = ChannelKeeper(services, settlements, leases, claim_nano_usd=10**15, claim_age_s=3600)
        assert await leases.acquire(f"channels:{network.chain_id}")
        try:
            yield Gateway(
                services, settlements, ChannelScheme(services), keeper, network.tokens[0], chain.wallets[PAYER]
            )
        finally:
            await leases.stop()
