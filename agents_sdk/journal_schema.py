"""The tables of the agent's journal, and what counts against the limits in them."""

from __future__ import annotations

SCHEMA = """
CREATE TABLE IF NOT EXISTS payment (
    id TEXT PRIMARY KEY, origin TEXT NOT NULL, payer TEXT NOT NULL, request TEXT NOT NULL, state TEXT NOT NULL,
    amount_nano_usd INTEGER NOT NULL, asset TEXT NOT NULL, recipient TEXT NOT NULL, header TEXT,
    created_ms INTEGER NOT NULL, expires_at INTEGER NOT NULL, claim TEXT, claimed_ms INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS payment_request ON payment (request, state);
CREATE INDEX IF NOT EXISTS payment_created ON payment (payer, created_ms);
CREATE TABLE IF NOT EXISTS receipt (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, payer TEXT NOT NULL, created_ms INTEGER NOT NULL,
    document TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS credit (
    origin TEXT NOT NULL, payer TEXT NOT NULL, asset TEXT NOT NULL, amount_nano_usd INTEGER NOT NULL,
    PRIMARY KEY (origin, payer, asset));
CREATE TABLE IF NOT EXISTS lease (name TEXT PRIMARY KEY, holder TEXT NOT NULL, until_ms INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS intent (name TEXT PRIMARY KEY, key TEXT NOT NULL, created_ms INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS channel (
    id TEXT PRIMARY KEY, origin TEXT NOT NULL, payer TEXT NOT NULL, asset TEXT NOT NULL, terms TEXT NOT NULL,
    balance TEXT NOT NULL, signed TEXT NOT NULL, charged_nano_usd INTEGER NOT NULL, created_ms INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS deposit (
    id TEXT PRIMARY KEY, channel_id TEXT NOT NULL, payer TEXT NOT NULL, state TEXT NOT NULL, amount TEXT NOT NULL,
    amount_nano_usd INTEGER NOT NULL, authorization TEXT, payment_id TEXT NOT NULL, created_ms INTEGER NOT NULL,
    expires_at INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS deposit_channel ON deposit (channel_id, state);
CREATE INDEX IF NOT EXISTS deposit_created ON deposit (payer, created_ms);
CREATE TABLE IF NOT EXISTS voucher (
    payment_id TEXT PRIMARY KEY, channel_id TEXT NOT NULL, amount TEXT NOT NULL, price_nano_usd INTEGER NOT NULL,
    deposit_id TEXT, receipt_id TEXT, closed_ms INTEGER, charged_nano_usd INTEGER);
CREATE INDEX IF NOT EXISTS voucher_open ON voucher (channel_id) WHERE closed_ms IS NULL;
CREATE INDEX IF NOT EXISTS voucher_amount ON voucher (channel_id, amount);
"""
SPENT = """
    SELECT COALESCE(SUM(amount_nano_usd), 0) FROM payment
    WHERE payer = :payer AND created_ms > :since AND
      (id IN (SELECT payment_id FROM voucher) OR (state != 'void' AND (state != 'refused' OR expires_at >= :now)))
"""
"""A voucher counts with what it adds to the highest one, and for good: it has no end."""
LEFT = """
    SELECT (SELECT COALESCE(SUM(amount_nano_usd), 0) FROM payment
            WHERE payer = :payer AND created_ms > :since AND state != 'void' AND NOT (state = 'refused' AND expires_at < :now)
              AND id NOT IN (SELECT payment_id FROM voucher))
         + (SELECT COALESCE(SUM(amount_nano_usd), 0) FROM deposit
            WHERE payer = :payer AND created_ms > :since AND NOT (state = 'failed' AND expires_at < :now))
"""
"""What is paid from a channel left the wallet with the deposit, and not again."""
