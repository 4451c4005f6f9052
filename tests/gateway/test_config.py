"""The configuration: where values come from, and that every mistake is reported with its place and its fix."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import coincurve
import pytest

from gateway import config
from gateway.config import ConfigError, Problem
from gateway.settings import Settings
from payments.chain.transactions import address_of

KEY = "0x" + "11" * 32
KEY_ADDRESS = address_of(coincurve.PrivateKey(bytes.fromhex(KEY[2:])))

GOOD = f"""
pay_to = "{KEY_ADDRESS}"
port = 9000

[[networks]]
chain_id = 84532
rpc_urls = ["http://localhost:8545"]

[providers.open]
dialect = "openai_chat"
base_url = "http://localhost/v1"

[[models]]
id = "small"
provider = "open"
input_usd = 0.15
output_usd = 1

[[models]]
id = "large"
provider = "open"
input_usd = "2.50"
output_usd = "10"

[routing.fallbacks]
small = ["large"]
"""
ENV = {"FAREBOX_SECRET": "s" * 32, "FAREBOX_SIGNER_KEYS": json.dumps([KEY])}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str) -> Path:
        path = tmp_path / "farebox.toml"
        path.write_text(text)
        return path

    return write_file


def problems_of(path: Path | None, env: dict[str, str] | None = None) -> list[Problem]:
    return config.inspect(path, ENV if env is None else env).problems


def only(path: Path | None, env: dict[str, str] | None = None) -> Problem:
    (problem,) = problems_of(path, env)
    return problem


def test_a_good_configuration_has_no_problem_and_no_warning(write: Any) -> None:
    assert problems_of(write(GOOD)) == []


def test_prices_are_exactly_what_the_file_says(write: Any) -> None:
    settings = config.load(write(GOOD.replace("0.15", "0.100000007")), ENV)
    assert [model.input_usd for model in settings.models] == ["0.100000007", "2.50"]
    assert settings.models[0].output_usd == "1"


def test_environment_wins_over_file_and_file_over_default(write: Any) -> None:
    path = write(GOOD)
    assert config.load(None, {}).port == 8402
    assert config.load(path, {}).port == 9000
    assert config.load(path, {"FAREBOX_PORT": "7000"}).port == 7000


def test_nested_lists_and_tables_of_the_environment_merge_with_the_file(write: Any) -> None:
    settings = config.load(
        write(GOOD),
        {
            "FAREBOX_PAYMENTS__QUOTE_TTL_S": "60",
            "FAREBOX_NETWORKS__0__RPC_URLS": '["https://rpc.example/secret"]',
            "FAREBOX_MODELS__1__OUTPUT_USD": "20",
            "FAREBOX_PROVIDERS__OPEN__BASE_URL": "http://elsewhere/v1",
            "FAREBOX_ROUTING": '{"strategy": "cost-first"}',
        },
    )
    assert settings.payments.quote_ttl_s == 60
    assert settings.networks[0].rpc_urls == ["https://rpc.example/secret"]
    assert settings.networks[0].chain_id == 84532
    assert [model.output_usd for model in settings.models] == ["1", "20"]
    assert settings.providers["open"].base_url == "http://elsewhere/v1"
    assert settings.routing.strategy == "cost-first"
    assert settings.routing.fallbacks == {"small": ["large"]}


def test_everything_can_come_from_the_environment() -> None:
    settings = config.load(
        None,
        {
            "FAREBOX_PAY_TO": KEY_ADDRESS,
            "FAREBOX_NETWORKS__0__CHAIN_ID": "84532",
            "FAREBOX_NETWORKS__0__RPC_URLS": '["http://localhost:8545"]',
            "FAREBOX_PROVIDERS": '{"open": {"dialect": "openai_chat", "base_url": "http://localhost/v1"}}',
            "FAREBOX_MODELS": '[{"id": "m", "provider": "open", "input_usd": "1", "output_usd": 2}]',
        },
    )
    assert settings.networks[0].chain_id == 84532
    assert settings.models[0].output_usd == "2"


def test_settings_made_in_code_do_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_PORT", "1")
    assert Settings().port == 8402


def test_secrets_do_not_appear_when_settings_are_shown() -> None:
    settings = config.load(None, {**ENV, "FAREBOX_TREASURY_KEY": KEY, "FAREBOX_PAY_TO": KEY_ADDRESS})
    assert "s" * 32 not in repr(settings)
    assert KEY not in repr(settings)


@pytest.mark.parametrize("name", ["secret", "signer_keys", "treasury_key"])
def test_a_secret_in_the_file_is_refused_with_its_variable(write: Any, name: str) -> None:
    value = f'["{KEY}"]' if name == "signer_keys" else f'"{KEY}"'
    path = write(f"{name} = {value}\n{GOOD}")
    problem = only(path)
    assert problem.place == f"{path}:1:1"
    assert f"FAREBOX_{name.upper()}" in problem.fix
    assert KEY not in str(problem)


def test_a_key_among_a_providers_headers_is_refused(write: Any) -> None:
    problem = only(write(GOOD.replace('/v1"\n', '/v1"\nheaders = {X-Api-Key = "hunter2"}\n')))
    assert "api_key_env" in problem.fix
    assert "hunter2" not in str(problem)


# Each case: what is replaced in the good file by what; the line, the words of the problem and of its fix.
MISTAKES = [
    ("port = 9000", "prot = 9000", 3, "no setting prot", "Did you mean port?"),
    ("port = 9000", 'port = "high"', 3, "port: 'high'", "integer"),
    ("port = 9000", 'public_url = "example.com"', 3, "public_url is not a URL", "https://"),
    ("port = 9000", 'database_url = "mysql://u@h/d"', 3, "only SQLite and PostgreSQL", "sqlite:///"),
    (KEY_ADDRESS, "0x123", 2, "'0x123' is not an address", "40 hex digits"),
    (KEY_ADDRESS, "0x" + "0" * 40, 2, "zero address", "treasury"),
    (KEY_ADDRESS, "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02914", 2, "typing mistake", "EIP-55"),
    (f'pay_to = "{KEY_ADDRESS}"\n', "\n", 5, "nothing says where payments on chain 84532 go", "pay_to"),
    ("84532", "777", 5, "chain 777 is not known", "block_time_ms"),
    ('["http://localhost:8545"]', "[]", 7, "networks[0].rpc_urls", "at least 1"),
    ('"http://localhost:8545"', '"localhost:8545"', 7, "networks[0].rpc_urls[0] is not a URL", "https://"),
    (
        "[providers.open]",
        '[[networks.tokens]]\nsymbol = "DAI"\n[providers.open]',
        5,
        "token 'DAI' is not known",
        "decimals",
    ),
    ("openai_chat", "openai", 10, "'openai' is not known", "Did you mean 'openai_chat'?"),
    ('"http://localhost/v1"', '"localhost"', 11, "providers.open.base_url is not a URL", "https://"),
    ("localhost/v1", "localhost/v1/chat/completions", 11, "whole endpoint", "Leave out"),
    ('provider = "open"\ninput_usd = 0', 'provider = "opne"\ninput_usd = 0', 15, "'opne' is not defined", "'open'"),
    ("0.15", "1e-3", 16, "'1e-3' is not a dollar amount", "0.05"),
    ("0.15", "-1", 16, "'-1' is not a dollar amount", "not negative"),
    ("0.15", "true", 16, "True is not a dollar amount", "0.05"),
    ("input_usd = 0.15\n", "\n", 13, "models[0].input_usd is missing", "Add input_usd"),
    ("input_usd = 0.15\n", "inptu_usd = 1\ninput_usd = 0.15\n", 16, "models[0].inptu_usd", "Did you mean input_usd?"),
    ("input_usd = 0.15", 'input_usd = 0.15\ntokenizer = "gpt"', 17, "models[0].tokenizer", "o200k_base"),
    ("input_usd = 0.15", 'input_usd = 0.15\ncapabilities = ["tool"]', 17, "capabilities[0]", "Did you mean 'tools'?"),
    (
        "input_usd = 0.15",
        "input_usd = 0.15\nmax_output_tokens = 200_000",
        13,
        "more than its context_tokens",
        "Correct",
    ),
    ('id = "large"', 'id = "small"', 20, "defined twice", "Remove one"),
    ('small = ["large"]', 'smal = ["large"]', 26, "there is no model 'smal'", "Did you mean 'small'?"),
    ('small = ["large"]', 'small = [\n"large",\n"lrge"]', 28, "there is no model 'lrge'", "Did you mean 'large'?"),
    ('small = ["large"]', 'small = ["small"]', 26, "falls back to itself", "another"),
    (
        "[routing.fallbacks]\nsmall",
        "[routing]\nauto_models = ['nano']\nfallbacks.small",
        26,
        "no model 'nano'",
        "[[models]]",
    ),
    (
        "[routing.fallbacks]\nsmall",
        "[routing]\nstrategy = 'cheap'\nfallbacks.small",
        26,
        "'cheap' is not known",
        "balanced",
    ),
    ("port = 9000", 'database_url = "postgresql://u:p@h/d"', 3, "holds a password", "FAREBOX_DATABASE_URL"),
]


@pytest.mark.parametrize(("old", "new", "line", "what", "fix"), MISTAKES, ids=[case[3] for case in MISTAKES])
def test_a_mistake_is_reported_with_its_line_and_its_fix(
    write: Any, old: str, new: str, line: int, what: str, fix: str
) -> None:
    assert old in GOOD
    path = write(GOOD.replace(old, new, 1))
    errors = [problem for problem in problems_of(path) if not problem.warning]
    found = [problem for problem in errors if what in problem.what and fix in problem.fix]
    assert found, [str(problem) for problem in errors]
    assert found[0].place.startswith(f"{path}:{line}:")
    with pytest.raises(ConfigError) as caught:
        config.load(path, ENV)
    assert caught.value.problems == errors


def test_model_ids_that_callers_could_not_use_are_refused(write: Any) -> None:
    for name in ("auto", "a@b", " small "):
        assert any(
            "cannot be a model's id" in p.what
            for p in problems_of(write(GOOD.replace('id = "large"', f'id = "{name}"')))
        )


def test_all_mistakes_are_reported_at_once(write: Any) -> None:
    text = GOOD
    for old, new, *_ in (MISTAKES[1], MISTAKES[10], MISTAKES[12], MISTAKES[15], MISTAKES[16]):
        text = text.replace(old, new, 1)
    places = [
        problem.place.split(":")[1]
        for problem in problems_of(write(text), {**ENV, "FAREBOX_LIMITS__DRAIN_S": "x"})
        if problem.place != "FAREBOX_LIMITS__DRAIN_S"
    ]
    assert sorted(places, key=int) == ["3", "7", "10", "15", "16"]
    assert len(problems_of(write(text), {**ENV, "FAREBOX_LIMITS__DRAIN_S": "x"})) == 6


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [('a = "x\nb = 1', ":1:", "not TOML"), ("a = 1\na = 2", ":2:", "not TOML"), ("[a", "", "not TOML")],
)
def test_what_is_not_toml_is_reported_with_its_line(write: Any, text: str, place: str, what: str) -> None:
    path = write(text)
    problem = only(path)
    assert problem.place.startswith(f"{path}{place}")
    assert what in problem.what


def test_a_file_that_cannot_be_read_is_a_problem_and_not_a_crash(tmp_path: Path) -> None:
    assert "cannot be read" in only(tmp_path / "missing.toml").what
    assert "cannot be read" in only(tmp_path).what
    (tmp_path / "latin.toml").write_bytes(b'host = "\xe9"')
    assert "not UTF-8" in only(tmp_path / "latin.toml").what


@pytest.mark.parametrize(
    ("variables", "place", "what", "fix"),
    [
        ({"FAREBOX_PORT": "high"}, "FAREBOX_PORT", "port", "integer"),
        ({"FAREBOX_PROT": "1"}, "FAREBOX_PROT", "no such setting", "Did you mean FAREBOX_PORT?"),
        ({"FAREBOX_PAYMENTS__QUOTE_TTL": "60"}, "FAREBOX_PAYMENTS__QUOTE_TTL", "payments.quote_ttl", "quote_ttl_s?"),
        ({"FAREBOX_SIGNER_KEYS": KEY}, "FAREBOX_SIGNER_KEYS", "not JSON", "lists"),
        ({"FAREBOX_SIGNER_KEYS": '["0x12"]'}, "FAREBOX_SIGNER_KEYS", "signer_keys[0] is not a private key", "64"),
        ({"FAREBOX_SIGNER_KEYS": json.dumps(["0x" + "f" * 64])}, "FAREBOX_SIGNER_KEYS", "not a private key", "64"),
        ({"FAREBOX_SIGNER_KEYS": json.dumps([KEY, KEY[2:]])}, "FAREBOX_SIGNER_KEYS", "the same key", "its own"),
        ({"FAREBOX_SECRET": "hunter2"}, "FAREBOX_SECRET", "secret", "32"),
        ({"FAREBOX_TREASURY_KEY": "hunter2"}, "FAREBOX_TREASURY_KEY", "not a private key", "64"),
        ({"FAREBOX_TREASURY_KEY": "0x" + "22" * 32}, "FAREBOX_TREASURY_KEY", KEY_ADDRESS, "pay_to"),
        ({"FAREBOX_MODELS__1__PROVIDER": "opn"}, "FAREBOX_MODELS__1__PROVIDER", "'opn' is not defined", "'open'"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(
    write: Any, variables: dict[str, str], place: str, what: str, fix: str
) -> None:
    problem = only(write(GOOD), {**ENV, **variables})
    assert (problem.place, problem.warning) == (place, False)
    assert what in problem.what
    assert fix in problem.fix
    for secret in ("hunter2", KEY, KEY[2:], "22" * 32):
        assert secret not in str(problem)


def test_the_treasury_key_of_pay_to_is_right(write: Any) -> None:
    assert problems_of(write(GOOD), {**ENV, "FAREBOX_TREASURY_KEY": KEY}) == []


def test_a_key_instead_of_its_variable_is_refused_and_not_repeated(write: Any) -> None:
    key = "sk-" + "a1B2" * 8
    problem = only(write(GOOD.replace('/v1"\n', f'/v1"\napi_key_env = "{key}"\n')))
    assert "not the name of a variable" in problem.what
    assert key not in str(problem)


@pytest.mark.parametrize(
    ("old", "new", "env", "what"),
    [
        ("0.15\noutput_usd = 1", "0\noutput_usd = 0.00", {}, "is free"),
        ('http://localhost/v1"', 'http://localhost/v1"\napi_key_env = "OPEN_KEY"', {}, "OPEN_KEY is not set"),
        ("port = 9000", "", {"FAREBOX_SIGNER_KEYS": "[]"}, "cannot be settled"),
        ("port = 9000", "", {"FAREBOX_SECRET": ""}, "quotes cannot outlive a restart"),
        ("port = 9000", "", {"FAREBOX_LICENCE": "x"}, "ignores it"),
    ],
)
def test_what_is_only_doubtful_is_a_warning(write: Any, old: str, new: str, env: dict[str, str], what: str) -> None:
    report = config.inspect(write(GOOD.replace(old, new, 1)), {**ENV, **env})
    assert report.settings is not None
    assert any(problem.warning and what in problem.what for problem in report.problems)


def test_models_that_differ_only_in_spelling_are_a_warning(write: Any) -> None:
    text = GOOD.replace('id = "large"', 'id = "SMALL"').replace('["large"]', '["SMALL"]')
    problem = only(write(text))
    assert problem.warning
    assert "differ only in spelling" in problem.what


def test_a_providers_key_variable_is_no_unknown_setting(write: Any) -> None:
    path = write(GOOD.replace('/v1"\n', '/v1"\napi_key_env = "FAREBOX_OPEN_KEY"\n'))
    assert problems_of(path, {**ENV, "FAREBOX_OPEN_KEY": "x"}) == []


def test_the_example_is_right_and_needs_only_secrets(tmp_path: Path) -> None:
    path = tmp_path / "farebox.toml"
    path.write_text(config.example())
    keys = dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"), "x")
    assert problems_of(path, {**ENV, **keys}) == []
    report = config.inspect(path, {})
    assert report.settings is not None


def test_the_example_states_the_defaults(tmp_path: Path) -> None:
    said = tomllib.loads(config.example(), parse_float=str)
    default = Settings().model_dump(mode="json")
    for section in ("timeouts", "payments", "limits"):
        assert said[section] == default[section], section
    assert {**said["routing"], "fallbacks": {}} == default["routing"]
    assert (said["host"], said["port"]) == (default["host"], default["port"])


def test_paying_to_the_tokens_own_contract_is_refused(write: Any) -> None:
    problem = only(write(GOOD.replace(KEY_ADDRESS, "0x036cbd53842c5426634e7929541ec2318f3dcf7e")))
    assert "contract of USDC itself" in problem.what
