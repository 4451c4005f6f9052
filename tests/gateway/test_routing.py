"""The engine: who is excluded and why, in which order the rest comes, and what callers may say about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.errors import ApiError
from gateway.dialects.canonical import ChatRequest, MediaBlock, Message, TextBlock, Tool, ToolCallBlock
from gateway.planning import Planner
from gateway.routing.catalog import Candidate, Catalog, normal_name
from gateway.routing.engine import Engine, NoRoute, Preferences, Route
from gateway.routing.estimates import Estimate
from gateway.routing.features import Features
from gateway.routing.preferences import MaxPrice, parse_preferences
from gateway.routing.tokens import count_input
from gateway.settings import ModelSettings, PaymentSettings, ProviderSettings, RoutingSettings, Settings
from payments.money import NANO_PER_USD, Usage
from payments.quotes import route_mark


def model(id: str, provider: str = "p", input_usd: str = "1", output_usd: str = "2", **fields: Any) -> ModelSettings:
    return ModelSettings(id=id, provider=provider, input_usd=input_usd, output_usd=output_usd, **fields)


DEAR = model("dear", input_usd="10", output_usd="50", quality=0.95, first_token_ms=1500)
CHEAP = model("cheap", input_usd="0.05", output_usd="0.2", quality=0.5, first_token_ms=700)
FAST = model("fast", input_usd="2", output_usd="9", quality=0.6, first_token_ms=90, tokens_per_second=400)
STEADY = model("steady", input_usd="4", output_usd="20", quality=0.7, first_token_ms=1500, failure_rate=0.0)


def settings_of(models: list[ModelSettings], dialects: dict[str, str] | None = None, **fields: Any) -> Settings:
    """Settings with a provider for each model, OpenAI's dialect unless said otherwise."""
    providers = {
        entry.provider: ProviderSettings(
            dialect=(dialects or {}).get(entry.provider, "openai_chat"),  # type: ignore[arg-type]
            base_url="https://upstream.example/v1",
        )
        for entry in models
    }
    return Settings(models=models, providers=providers, **fields)


def engine_of(*models: ModelSettings, is_open: set[str] | None = None, **routing: Any) -> Engine:
    settings = settings_of(models=list(models), routing=RoutingSettings(**routing))
    return Engine(Catalog.from_settings(settings), settings, is_open=lambda candidate: candidate in (is_open or set()))


def asking(name: str, *models: str, **fields: Any) -> ChatRequest:
    messages = fields.pop("messages", (Message("user", (TextBlock("hi"),)),))
    return ChatRequest("openai_chat", name, models, messages, **fields)


def ids(route: Route) -> list[str]:
    return [candidate.id for candidate in route.candidates]


def reasons(route: Route) -> dict[str, str | None]:
    return {entry.candidate_id: entry.excluded_by for entry in route.explanation}


def route(
    engine: Engine,
    request: ChatRequest,
    preferences: Preferences | None = None,
    tokens: int = 100,
    output: int = 1000,
) -> Route:
    return engine.route(request, preferences or Preferences(), tokens, output)


# --- catalog ---------------------------------------------------------------------------------------------------------


def test_price_is_the_providers_own_per_million_tokens() -> None:
    (candidate,) = Catalog.from_settings(settings_of(models=[model("m", input_usd="0.15", output_usd="0.6")])).all()
    assert candidate.price.cost(Usage(1_000_000, output_tokens=1_000_000)) == 750_000_000
    assert candidate.price.cached_input is None


def test_markup_is_exact_and_rounds_up() -> None:
    settings = settings_of(
        models=[model("m", input_usd="0.000000003", output_usd="1", cached_input_usd="0", request_usd="0.5")],
        payments=PaymentSettings(markup_percent=15),
    )
    (candidate,) = Catalog.from_settings(settings).all()
    price = candidate.price
    assert (price.input, price.output, price.cached_input, price.request) == (4, 1_150_000_000, 0, 575_000_000)


def test_candidate_is_found_by_the_mark_that_a_quote_carries() -> None:
    catalog = Catalog.from_settings(settings_of(models=[DEAR, CHEAP]))
    assert catalog.by_mark(route_mark("cheap@p")) is catalog.candidates("cheap")[0]
    assert catalog.by_mark(b"gone!!") is None


NAMES = ["gpt-5.4", "gpt-5.4-mini", "claude-opus-4.7", "qwen3.7-flash", "meta/llama_3.3-70b", "o3"]


@given(st.sampled_from(NAMES), st.data())
def test_spelling_variants_name_the_same_model(name: str, data: st.DataObject) -> None:
    catalog = Catalog.from_settings(settings_of(models=[model(entry) for entry in NAMES]))
    separators = data.draw(st.lists(st.sampled_from(".-_ "), min_size=len(name), max_size=len(name)))
    varied = "".join(other if char in ".-_" else char for char, other in zip(name, separators, strict=True))
    varied = data.draw(st.sampled_from([varied, varied.upper(), varied.title(), f" {varied} "]))
    if "/" not in name:
        varied = data.draw(st.sampled_from(["", "openai/", "vendor.x/"])) + varied.strip()
    assert catalog.resolve(varied) == name


def test_a_vendors_prefix_may_be_left_out() -> None:
    assert Catalog.from_settings(settings_of(models=[model("meta/llama-3")])).resolve("Llama_3") == "meta/llama-3"


def test_ambiguous_spelling_means_no_model_and_the_exact_one_still_does() -> None:
    catalog = Catalog.from_settings(settings_of(models=[model("m-4.7"), model("m-4-7")]))
    assert catalog.resolve("m-4.7") == "m-4.7"
    assert catalog.resolve("m-4-7") == "m-4-7"
    assert catalog.resolve("M-4_7") is None


def test_different_versions_are_different_models() -> None:
    assert Catalog.from_settings(settings_of(models=[model("m-4.7")])).resolve("m-47") is None


@given(st.text(max_size=300))
def test_any_text_can_be_looked_up(name: str) -> None:
    catalog = Catalog.from_settings(settings_of(models=[model(entry) for entry in NAMES]))
    assert catalog.resolve(name) in (None, *NAMES)
    assert set(catalog.closest(name)) <= set(NAMES)
    assert normal_name(normal_name(name)) == normal_name(name)


# --- strategies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "first"),
    [("cost-first", "cheap@p"), ("latency-first", "fast@p"), ("availability-first", "steady@p")],
)
def test_each_strategy_puts_its_own_virtue_first(strategy: Any, first: str) -> None:
    engine = engine_of(DEAR, CHEAP, FAST, STEADY)
    chosen = route(engine, asking("auto"), Preferences(strategy=strategy))
    assert ids(chosen)[0] == first
    assert chosen.strategy == strategy


def test_balanced_buys_quality_only_at_a_fair_price() -> None:
    best = model("best", input_usd="30", output_usd="150", quality=0.92)
    good = model("good", input_usd="1", output_usd="4", quality=0.88)
    poor = model("poor", input_usd="0.9", output_usd="3.6", quality=0.3)
    assert ids(route(engine_of(best, good, poor), asking("auto"))) == ["good@p", "best@p", "poor@p"]


def test_request_strategy_wins_over_the_configured_one() -> None:
    engine = engine_of(DEAR, CHEAP, FAST, strategy="cost-first")
    assert ids(route(engine, asking("auto")))[0] == "cheap@p"
    assert ids(route(engine, asking("auto"), Preferences(strategy="latency-first")))[0] == "fast@p"


@pytest.mark.parametrize(("sort", "first"), [("price", "b"), ("latency", "c"), ("throughput", "a")])
def test_sort_goes_by_one_property_alone(sort: Any, first: str) -> None:
    engine = engine_of(
        model("m", "a", tokens_per_second=900),
        model("m", "b", input_usd="0.5", quality=0.0, failure_rate=0.9),
        model("m", "c", first_token_ms=1),
    )
    assert ids(route(engine, asking("m"), Preferences(sort=sort)))[0] == f"m@{first}"


def test_long_system_prompt_and_idle_words_do_not_change_the_choice() -> None:
    engine = engine_of(DEAR, CHEAP, FAST)
    system = Message("system", (TextBlock("You are a mathematician who proves theorems in code. " * 50),))
    user = Message("user", (TextBlock("hi"),))
    assert ids(route(engine, asking("auto", messages=(system, user)))) == ids(route(engine, asking("auto")))


def test_estimates_can_come_from_elsewhere() -> None:
    class Learned:
        def estimates(self, features: Features, candidates: Sequence[Candidate]) -> Sequence[Estimate]:
            return [Estimate(1.0 if c.model == "cheap" else 0.0, 100, 100.0, 10.0, 0.0) for c in candidates]

    settings = settings_of(models=[DEAR, CHEAP, FAST])
    catalog = Catalog.from_settings(settings)
    assert (
        ids(Engine(catalog, settings, signals=Learned()).route(asking("auto"), Preferences(), 10, 10))[0] == "cheap@p"
    )


# --- which candidates ------------------------------------------------------------------------------------------------


def test_explicit_model_goes_to_its_providers_and_then_its_fallbacks() -> None:
    engine = engine_of(
        model("a", "slow", first_token_ms=5000), model("a", "quick"), CHEAP, DEAR, fallbacks={"a": ["dear", "cheap"]}
    )
    assert ids(route(engine, asking("a"))) == ["a@quick", "a@slow", "dear@p", "cheap@p"]
    assert ids(route(engine, asking("A"))) == ["a@quick", "a@slow", "dear@p", "cheap@p"]


def test_models_are_tried_in_the_callers_order_whatever_they_score() -> None:
    engine = engine_of(DEAR, CHEAP, FAST, fallbacks={"dear": ["fast"]})
    assert ids(route(engine, asking("dear", "cheap"))) == ["dear@p", "cheap@p"]
    assert ids(route(engine, asking("cheap", "cheap", "dear"))) == ["cheap@p", "dear@p"]


def test_auto_chooses_from_the_configured_models() -> None:
    engine = engine_of(DEAR, CHEAP, FAST, auto_models=["dear", "fast"])
    assert set(ids(route(engine, asking("auto")))) == {"dear@p", "fast@p"}


def test_one_provider_of_a_model_can_be_named() -> None:
    engine = engine_of(model("a", "x"), model("a", "y"))
    assert ids(route(engine, asking("a@y"))) == ["a@y"]
    with pytest.raises(NoRoute) as caught:
        route(engine, asking("a@z"))
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("request_", [asking("claude-opus-4.8"), asking("cheap", "cheap", "claude-opus-4.8")])
def test_unknown_model_is_refused_with_what_it_may_have_meant(request_: ChatRequest) -> None:
    engine = engine_of(model("claude-opus-4.7"), CHEAP)
    with pytest.raises(NoRoute) as caught:
        route(engine, request_)
    assert (caught.value.code, caught.value.status) == ("model_not_found", 404)
    assert "did you mean claude-opus-4.7?" in caught.value.message


def test_settings_that_name_an_unknown_fallback_make_no_engine() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        engine_of(CHEAP, fallbacks={"cheap": ["nowhere"]})


def test_a_route_has_no_more_candidates_than_attempts() -> None:
    engine = engine_of(*(model("m", f"p{i}") for i in range(6)), attempts_max=2)
    chosen = route(engine, asking("m"))
    assert len(chosen.candidates) == 2
    assert list(reasons(chosen).values()).count("attempts_max") == 4


def test_who_asks_for_a_free_model_is_not_sent_to_a_paid_one() -> None:
    free = model("free", input_usd="0", output_usd="0")
    engine = engine_of(free, CHEAP, fallbacks={"free": ["cheap"]})
    chosen = route(engine, asking("free"))
    assert ids(chosen) == ["free@p"]
    assert reasons(chosen)["cheap@p"] == "free_to_paid"
    assert ids(route(engine, asking("free", "free", "cheap"))) == ["free@p", "cheap@p"], "consent by naming it"


# --- filters ---------------------------------------------------------------------------------------------------------

PLAIN = model("plain", capabilities=[], quality=1.0)
ABLE = model("able", capabilities=["tools", "json_schema", "vision", "audio"], quality=0.1)
TOOL = Tool("t", None, {})


def media(kind: Any) -> tuple[Message, ...]:
    return (Message("user", (MediaBlock(kind, url="https://example.com/x"),)),)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (asking("auto", tools=(TOOL,)), "no_tools"),
        (asking("auto", messages=(Message("assistant", (ToolCallBlock("1", "t", "{}"),)),)), "no_tools"),
        (asking("auto", response_format="json_object"), "no_json_object"),
        (asking("auto", response_format="json_schema", response_schema={}), "no_json_schema"),
        (asking("auto", messages=media("image")), "no_vision"),
        (asking("auto", messages=media("file")), "no_vision"),
        (asking("auto", messages=media("audio")), "no_audio"),
    ],
)
def test_a_model_that_lacks_what_the_request_needs_is_excluded(request_: ChatRequest, reason: str) -> None:
    chosen = route(engine_of(PLAIN, ABLE), request_)
    assert ids(chosen) == ["able@p"]
    assert reasons(chosen) == {"able@p": None, "plain@p": reason}


def test_tools_that_may_not_be_used_exclude_nobody() -> None:
    assert ids(route(engine_of(PLAIN, ABLE), asking("auto", tools=(TOOL,), tool_choice="none")))[0] == "plain@p"


def test_context_has_to_hold_input_and_output() -> None:
    small, large = model("small", context_tokens=8_000), model("large", context_tokens=9_000)
    engine = engine_of(small, large)
    assert set(ids(route(engine, asking("auto"), tokens=7_000, output=1_000))) == {"small@p", "large@p"}
    chosen = route(engine, asking("auto"), tokens=7_001, output=1_000)
    assert reasons(chosen) == {"large@p": None, "small@p": "context_length"}
    with pytest.raises(NoRoute) as caught:
        route(engine, asking("auto"), tokens=9_000, output=1_000)
    assert caught.value.code == "context_length_exceeded"
    assert "10000 tokens" in caught.value.message
    assert "9000" in caught.value.message


def test_context_is_measured_with_the_models_own_tokenizer() -> None:
    engine = engine_of(model("m", context_tokens=10_000, tokenizer="claude"), model("n", context_tokens=10_000))
    assert reasons(route(engine, asking("auto"), tokens=8_000))["m@p"] == "context_length"


def test_asked_output_excludes_a_model_that_cannot_write_it_and_a_default_does_not() -> None:
    short, long = model("short", max_output_tokens=1_000), model("long", max_output_tokens=8_000)
    engine = engine_of(short, long)
    asked = route(engine, asking("auto", max_output_tokens=4_000), output=4_000)
    assert reasons(asked) == {"long@p": None, "short@p": "max_output"}
    assert len(route(engine, asking("auto"), output=4_000).candidates) == 2


def test_open_breaker_excludes_and_all_open_is_temporary() -> None:
    chosen = route(engine_of(DEAR, CHEAP, is_open={"dear@p"}), asking("auto"))
    assert reasons(chosen) == {"cheap@p": None, "dear@p": "breaker_open"}
    with pytest.raises(NoRoute) as caught:
        route(engine_of(DEAR, is_open={"dear@p"}), asking("dear"))
    assert (caught.value.code, caught.value.status) == ("no_candidate_available", 503)
    settings = settings_of(models=[DEAR])
    catalog = Catalog.from_settings(settings)
    planner = Planner(settings, catalog, Engine(catalog, settings, is_open=lambda _: True), count_input)
    with pytest.raises(ApiError) as told:
        planner.plan(asking("dear"), Preferences(), b"d" * 32, 0)
    assert (told.value.code, told.value.status) == ("no_candidate_available", 503)


def test_nobody_left_says_why_for_each() -> None:
    with pytest.raises(NoRoute) as caught:
        route(engine_of(PLAIN, DEAR), asking("auto", messages=media("audio")))
    assert caught.value.code == "no_suitable_candidate"
    assert "plain@p: it cannot hear audio" in caught.value.message
    assert "dear@p: it cannot hear audio" in caught.value.message


# --- preferences -----------------------------------------------------------------------------------------------------

MANY = [model("m", "Alpha", first_token_ms=3000), model("m", "beta"), model("m", "gamma", input_usd="9")]


def preferring(**provider: Any) -> Preferences:
    return parse_preferences({"provider": provider}, {})


def test_order_comes_before_any_score() -> None:
    assert ids(route(engine_of(*MANY), asking("m"), preferring(order=["gamma", "alpha"]))) == [
        "m@gamma",
        "m@Alpha",
        "m@beta",
    ]


def test_only_and_ignore_keep_providers_out() -> None:
    engine = engine_of(*MANY)
    chosen = route(engine, asking("m"), preferring(only=["alpha", "gamma"], ignore=["Gamma"]))
    assert ids(chosen) == ["m@Alpha"]
    assert reasons(chosen) == {"m@Alpha": None, "m@beta": "provider_not_allowed", "m@gamma": "provider_ignored"}


def test_without_fallbacks_one_candidate_or_the_named_providers() -> None:
    engine = engine_of(*MANY, CHEAP, fallbacks={"m": ["cheap"]})
    assert ids(route(engine, asking("m"), preferring(allow_fallbacks=False))) == ["m@beta"]
    named = preferring(order=["gamma", "alpha"], allow_fallbacks=False)
    assert ids(route(engine, asking("m"), named)) == ["m@gamma", "m@Alpha"]


def test_max_price_excludes_what_is_dearer() -> None:
    engine = engine_of(DEAR, CHEAP, FAST)
    chosen = route(engine, asking("auto"), preferring(max_price={"prompt": 2, "completion": "9.0"}))
    assert reasons(chosen)["dear@p"] == "max_price"
    assert set(ids(chosen)) == {"cheap@p", "fast@p"}
    assert set(ids(route(engine, asking("auto"), preferring(max_price={"completion": 8.99})))) == {"cheap@p"}


def test_preferences_are_read_from_body_and_header() -> None:
    body = {
        "provider": {
            "order": ["OpenAI"],
            "only": ["OpenAI", "azure"],
            "ignore": None,
            "allow_fallbacks": True,
            "sort": "price",
            "max_price": {"prompt": 0.1, "completion": 2, "request": "0.000000001"},
            "require_parameters": True,
            "data_collection": "allow",
            "zdr": False,
        },
        "farebox": {"strategy": "cost-first"},
    }
    assert parse_preferences(body, {"x-farebox-strategy": "Latency-First"}) == Preferences(
        strategy="latency-first",
        sort="price",
        order=("openai",),
        only=("openai", "azure"),
        max_price=MaxPrice(NANO_PER_USD // 10, 2 * NANO_PER_USD, 1),
    )
    assert parse_preferences(body, {}).strategy == "cost-first"
    assert parse_preferences({"model": "m", "provider": None}, {}) == Preferences()


@pytest.mark.parametrize(
    ("body", "headers", "param", "says"),
    [
        ({"provider": []}, {}, "provider", "object"),
        ({"provider": {"ordr": []}}, {}, "provider.ordr", "did you mean order?"),
        ({"provider": {"order": "openai"}}, {}, "provider.order", "list"),
        ({"provider": {"only": [1]}}, {}, "provider.only", "list"),
        ({"provider": {"only": ["x"] * 51}}, {}, "provider.only", "50"),
        ({"provider": {"allow_fallbacks": "no"}}, {}, "provider.allow_fallbacks", "true or false"),
        ({"provider": {"sort": "quality"}}, {}, "provider.sort", "price, latency, throughput"),
        ({"provider": {"max_price": 3}}, {}, "provider.max_price", "object"),
        ({"provider": {"max_price": {"promt": 3}}}, {}, "provider.max_price.promt", "prompt"),
        ({"provider": {"max_price": {"prompt": -1}}}, {}, "provider.max_price.prompt", "dollar"),
        ({"provider": {"max_price": {"prompt": True}}}, {}, "provider.max_price.prompt", "dollars"),
        ({"provider": {"max_price": {"prompt": float("nan")}}}, {}, "provider.max_price.prompt", "dollar"),
        ({"provider": {"data_collection": "deny"}}, {}, "provider.data_collection", "cannot promise"),
        ({"provider": {"zdr": True}}, {}, "provider.zdr", "cannot promise"),
        ({"farebox": {"strategy": "best"}}, {}, "farebox.strategy", "balanced"),
        ({"farebox": {"stratgy": "balanced"}}, {}, "farebox.stratgy", "did you mean strategy?"),
        ({"strategy": "balanced"}, {}, "strategy", "farebox.strategy"),
        ({}, {"x-farebox-strategy": "best"}, "the header x-farebox-strategy", "balanced"),
    ],
)
def test_a_wrong_preference_is_refused_by_name(body: Any, headers: dict[str, str], param: str, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_preferences(body, headers)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert says in caught.value.message


def test_a_dialect_without_words_for_something_is_not_asked_for_it() -> None:
    everything = ["tools", "json_object", "json_schema"]
    models = [model("m", provider, capabilities=everything) for provider in ("claude", "google", "open")]
    dialects = {"claude": "anthropic_messages", "google": "gemini"}
    settings = settings_of(models=models, dialects=dialects)
    engine = Engine(Catalog.from_settings(settings), settings)

    def providers(**asked: Any) -> set[str]:
        route = engine.route(asking("m", **asked), Preferences(), 10, 10)
        return {candidate.provider for candidate in route.candidates}

    assert providers() == {"claude", "google", "open"}
    assert providers(response_format="json_object") == {"google", "open"}
    assert providers(choices=2) == {"open"}
