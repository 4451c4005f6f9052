"""Simulated model providers, for development and tests: real wire formats, behaviour on demand, no model behind them.

`python -m gateway.dev.simulator --port 0 --json` runs it in a process of its own and prints ``{"url": …}`` once it listens;
`gateway.dev.simulator.process.Simulator` does so from Python. Below the URL:

    POST   /openai/v1/chat/completions                               Authorization: Bearer …
    POST   /anthropic/v1/messages                                    x-api-key: …
    POST   /gemini/v1beta/models/{model}:generateContent             x-goog-api-key: …
    POST   /gemini/v1beta/models/{model}:streamGenerateContent?alt=sse
    GET    /_/attempts              what came and what became of it, oldest first; DELETE forgets it. ?model= chooses a
                                    model, or with a slash at its end all whose names begin so
    PUT    /_/behaviours/{model}    how a model behaves from now on; DELETE, for one model or for all, makes it behave again

Any model name exists. How it behaves is said by a control call, or by the name itself: `behaviours` has the fields and the
grammar, `answers` what is answered and how tokens are counted. Like the real providers, it refuses fields that are not in their
API: what a gateway should have kept to itself is noticed.
"""
