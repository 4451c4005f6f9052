"""The models of the development stack: real names and prices, simulated answers.

Prices are dollars per million tokens, near those of the real models; here they only make quotes look like quotes. `gpt-5.4`
has two providers, so that failing over can be seen.
"""

from __future__ import annotations

from typing import Any

KEY_VARIABLE = "FAREBOX_DEV_PROVIDER_KEY"


def dev_providers(simulator_url: str) -> dict[str, dict[str, Any]]:
    """The simulated providers, as `[providers]` of a configuration."""
    return {
        "openai": _provider("openai_chat", f"{simulator_url}/openai/v1"),
        "backup": _provider("openai_chat", f"{simulator_url}/openai/v1"),
        "anthropic": _provider("anthropic_messages", f"{simulator_url}/anthropic/v1"),
        "gemini": _provider("gemini", f"{simulator_url}/gemini/v1beta"),
    }


def dev_models() -> list[dict[str, Any]]:
    """What they serve, as `[[models]]` of a configuration."""
    everything = ["tools", "json_object", "json_schema", "vision", "reasoning"]
    return [
        _model("claude-opus-4.7", "anthropic", "5", "25", 0.93, 900, 60, ["tools", "vision", "reasoning"], cached="0.5")
        | {"tokenizer": "claude", "context_tokens": 200_000},
        _model("gpt-5.4", "openai", "2.5", "15", 0.9, 600, 80, everything, cached="0.25"),
        # Another provider's name for the same model, so that a test can make one of them fail.
        _model("gpt-5.4", "backup", "2.5", "15", 0.9, 900, 60, everything, cached="0.25")
        | {"upstream_model": "gpt-5.4-backup"},
        _model("gemini-3.1-pro", "gemini", "2", "12", 0.89, 700, 90, everything, cached="0.2")
        | {"tokenizer": "gemini", "context_tokens": 1_000_000},
        _model("deepseek-v4-flash", "openai", "0.14", "0.28", 0.78, 500, 100, ["tools", "json_object"], cached="0.028")
        | {"tokenizer": "deepseek"},
        _model("qwen3.7-flash", "backup", "0.1", "0.4", 0.74, 400, 140, ["tools", "json_object"])
        | {"tokenizer": "qwen"},
    ]


def _provider(dialect: str, base_url: str) -> dict[str, Any]:
    return {"dialect": dialect, "base_url": base_url, "api_key_env": KEY_VARIABLE}


def _model(
    name: str,
    provider: str,
    input_usd: str,
    output_usd: str,
    quality: float,
    first_token_ms: int,
    tokens_per_second: int,
    capabilities: list[str],
    cached: str | None = None,
) -> dict[str, Any]:
    model: dict[str, Any] = {
        "id": name,
        "provider": provider,
        "input_usd": input_usd,
        "output_usd": output_usd,
        "quality": quality,
        "first_token_ms": first_token_ms,
        "tokens_per_second": tokens_per_second,
        "capabilities": capabilities,
    }
    return model if cached is None else model | {"cached_input_usd": cached}
