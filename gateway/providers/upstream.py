"""The one seam to upstreams: `send(request) → status, headers, chunks`.

aiohttp is behind it (187 µs of CPU a request where httpx takes 674 and more), and nothing of aiohttp comes out of it, so that
something faster can take its place. No retries, no redirects (a redirect would carry the provider's key elsewhere), no
cookies, no proxies from the environment. Deadlines are the executor's business, except the one for connecting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp
from yarl import URL

CONNECTIONS_MAX: Final = 4096
KEEPALIVE_S: Final = 30.0
DNS_CACHE_S: Final = 60
HEADER_BYTES_MAX: Final = 16_384


class UpstreamFailure(Exception):
    """Base of everything that can go wrong between the gateway and an upstream."""


class ConnectFailed(UpstreamFailure):
    """No connection: name, route, refusal or TLS. The upstream has seen nothing of the request."""


class ConnectTimedOut(ConnectFailed):
    """No connection within the time for it."""


class Disconnected(UpstreamFailure):
    """The connection ended before the answer did."""


class StaleConnection(Disconnected):
    """A connection kept from an earlier request ended before any answer: most likely it had been closed meanwhile."""


class NotHttp(UpstreamFailure):
    """What came is not HTTP, or exceeds its limits."""


class BodyTooLarge(UpstreamFailure):
    """The answer is longer than the gateway holds."""


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """A POST of a JSON body; `headers` include those of authentication and content type."""

    url: str
    headers: Mapping[str, str]
    body: bytes


def _nothing() -> None:
    return


@dataclass(slots=True)
class _Notes:
    """What is learnt of a request while it is sent."""

    sent: Callable[[], object]
    reused: bool = False
    """Whether its connection was used before."""


class UpstreamResponse:
    """An answer whose headers have arrived. `close` must be called; it costs nothing after a body that was read to its end."""

    __slots__ = ("_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        """Case-insensitive."""

    async def chunk(self) -> bytes:
        """The next bytes of the body as they arrive; empty at its end.

        Raises:
            Disconnected: It was cut, or `close` was called meanwhile.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise Disconnected(_words(error)) from error

    async def read(self, bytes_max: int) -> bytes:
        """The whole body.

        Raises:
            Disconnected: It was cut.
            BodyTooLarge: It is longer than `bytes_max`.
        """
        pieces: list[bytes] = []
        size = 0
        while piece := await self.chunk():
            size += len(piece)
            if size > bytes_max:
                raise BodyTooLarge(f"the answer is longer than {bytes_max} bytes")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Drop the connection at once, unless the body was read to its end (then it is already back in the pool)."""
        self._response.close()


class Upstream:
    """Sends requests over a bounded pool of connections. Make it and use it within one event loop.

    Args:
        connect_timeout_s: For name, TCP and TLS together.
    """

    def __init__(self, *, connect_timeout_s: float) -> None:
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        # aiohttp sets TCP_NODELAY itself. The pool's bound is above what the gateway admits, so that it is never waited for.
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        trace.on_request_chunk_sent.append(_note_sent)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=CONNECTIONS_MAX, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=DNS_CACHE_S, use_dns_cache=True
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
            trust_env=False,
            auto_decompress=True,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            max_line_size=HEADER_BYTES_MAX,
            max_field_size=HEADER_BYTES_MAX,
            trace_configs=[trace],
        )

    async def send(self, request: UpstreamRequest, sent: Callable[[], object] = _nothing) -> UpstreamResponse:
        """Send a request and wait for the headers of its answer. Cancelling it closes the connection.

        Args:
            request: What is sent.
            sent: Called when it is on its way: from then on the provider may work on it.

        Raises:
            ConnectFailed: Nothing was sent.
            Disconnected: The connection ended before the headers.
            NotHttp: The headers cannot be read.
        """
        session = self._session
        if session is None:
            session = self._session = self._open()
        notes = _Notes(sent)
        try:
            response = await session.request(
                "POST",
                _url(request.url),
                data=request.body,
                headers=request.headers,
                allow_redirects=False,
                trace_request_ctx=notes,
            )
        except aiohttp.ConnectionTimeoutError as error:
            raise ConnectTimedOut(_words(error)) from error
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as error:
            raise ConnectFailed(_words(error)) from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise (StaleConnection if notes.reused else Disconnected)(_words(error)) from error
        except aiohttp.ClientError as error:
            raise NotHttp(_words(error)) from error
        return UpstreamResponse(response)

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _note_reuse(session: object, context: object, params: object) -> None:
    notes = getattr(context, "trace_request_ctx", None)
    if isinstance(notes, _Notes):
        notes.reused = True


async def _note_sent(session: object, context: object, params: object) -> None:
    notes = getattr(context, "trace_request_ctx", None)
    if isinstance(notes, _Notes):
        notes.sent()


@functools.lru_cache(maxsize=4096)
def _url(url: str) -> URL:
    """Parsed once per model and provider; already quoted by the dialect."""
    return URL(url, encoded=True)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
