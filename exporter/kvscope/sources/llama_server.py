"""llama-server over HTTP: /props, /slots, /metrics, /health.

Read-only: nothing is ever posted. What the answers say is read in llama_server_answers.py.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

import aiohttp
from yarl import URL

from kvscope.observed.server import ServerCounters, ServerProps, SlotSeen, Source, SourceAnswer
from kvscope.settings import ServerSettings, is_loopback
from kvscope.sources.llama_server_answers import ParseError, parse_counters, parse_props, parse_slots

DEADLINE_SECONDS = 5.0
LARGEST_ANSWER_BYTES = 8 * 1024 * 1024

_Parsed = TypeVar("_Parsed")


class Failure(StrEnum):
    """Why a request gave nothing."""

    UNREACHABLE = "unreachable"
    LATE = "late"
    UNAUTHORIZED = "unauthorized"
    LOADING = "loading"
    NOT_OFFERED = "not offered"
    NOT_FOUND = "not found"
    CUT_OFF = "cut off"
    BROKEN = "broken"


class AnswerError(Exception):
    """A request that gave nothing: why, and one line for the log."""

    def __init__(self, failure: Failure, problem: str) -> None:
        super().__init__(problem)
        self.failure = failure
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes of one answer and the one header that matters."""

    body: bytes
    process_identity: str | None = None


class LlamaServer:
    """One llama-server, reached over HTTP; one request at a time.

    Each method returns the parsed answer or raises AnswerError; how each request went is kept until
    `take_answers`. deadline_seconds: of each request. notes: what was odd in the last answer.
    """

    def __init__(self, settings: ServerSettings, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self._settings = settings
        self.deadline_seconds = deadline_seconds
        self._base = settings.url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._answers: list[SourceAnswer] = []
        self.notes: tuple[str, ...] = ()

    async def props(self) -> ServerProps:
        """Return /props. Does not wake a sleeping model."""
        return await self._ask(Source.PROPS, "/props", lambda answer: self._noted(parse_props(answer.body)))

    async def slots(self) -> tuple[SlotSeen, ...]:
        """Return /slots. Wakes a sleeping model and restarts its idle timer: ask /props first."""
        return await self._ask(Source.SLOTS, "/slots", lambda answer: self._noted(parse_slots(answer.body)))

    async def counters(self) -> ServerCounters:
        """Return /metrics. Resets the server's two `*_tokens_seconds` averages for everybody."""
        return await self._ask(
            Source.METRICS, "/metrics", lambda answer: parse_counters(answer.body, answer.process_identity)
        )

    async def healthy(self) -> bool:
        """Return whether /health answers 200 in time (it does even while a long prompt is read)."""
        try:
            await self._get("/health")
        except AnswerError:
            return False
        return True

    def take_answers(self) -> tuple[SourceAnswer, ...]:
        """Return how the requests since the last call went, and forget them."""
        answers, self._answers = tuple(self._answers), []
        return answers

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _noted(self, parsed: tuple[_Parsed, tuple[str, ...]]) -> _Parsed:
        value, self.notes = parsed
        return value

    async def _ask(self, source: Source, path: str, parse: Callable[[Answer], _Parsed]) -> _Parsed:
        started = time.monotonic()
        problem: str | None = None
        try:
            try:
                return parse(await self._get(path))
            except ParseError as error:
                raise AnswerError(Failure.BROKEN, f"{path}: {error}") from None
        except AnswerError as error:
            problem = error.problem
            raise
        finally:
            self._answers.append(SourceAnswer(source, time.monotonic() - started, problem))

    async def _get(self, path: str) -> Answer:
        try:
            async with asyncio.timeout(self.deadline_seconds):
                session = self._session or self._open()
                async with session.get(self._base + path, allow_redirects=False) as response:
                    if response.status != 200:
                        raise _refused(response.status, path)
                    if response.headers.get("Content-Encoding", "identity") != "identity":
                        raise AnswerError(Failure.BROKEN, f"{path}: the answer is compressed, unasked")
                    body = await _bounded_body(response, path)
                    return Answer(body, response.headers.get("Process-Start-Time-Unix"))
        except aiohttp.ConnectionTimeoutError:
            raise AnswerError(
                Failure.UNREACHABLE, f"cannot connect: no answer within {self.deadline_seconds / 2:g} s"
            ) from None
        except TimeoutError:
            raise AnswerError(
                Failure.LATE, f"{path} did not answer within {self.deadline_seconds:g} s"
            ) from None
        except aiohttp.ClientConnectorCertificateError:
            raise AnswerError(
                Failure.UNREACHABLE, "its TLS certificate does not verify; name its CA with --ca-file"
            ) from None
        except aiohttp.ClientConnectorDNSError:
            raise AnswerError(Failure.UNREACHABLE, "its host name does not resolve") from None
        except aiohttp.ClientConnectorSSLError:
            raise AnswerError(
                Failure.UNREACHABLE, "it does not speak TLS; write http:// if it is meant to be plain"
            ) from None
        except aiohttp.ClientConnectorError as error:
            number = error.os_error.errno
            reason = os.strerror(number) if number else type(error.os_error).__name__
            raise AnswerError(Failure.UNREACHABLE, f"cannot connect: {reason}") from None
        except aiohttp.ServerDisconnectedError:
            raise AnswerError(Failure.UNREACHABLE, f"{path}: the server closed the connection") from None
        except aiohttp.ClientPayloadError:
            raise AnswerError(Failure.CUT_OFF, f"{path}: the answer was cut off in the middle") from None
        except aiohttp.ClientResponseError:
            raise AnswerError(Failure.BROKEN, f"{path}: the answer is not HTTP") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # ValueError: a host name that is none, found out by whoever resolves it.
            raise AnswerError(Failure.UNREACHABLE, f"{path}: {type(error).__name__}") from None

    def _open(self) -> aiohttp.ClientSession:
        settings = self._settings
        # Compressed, an answer of a few kilobytes could unfold to gigabytes.
        headers = {"User-Agent": "kvscope", "Accept-Encoding": "identity", **settings.headers}
        if settings.api_key:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        url = urlsplit(settings.url)
        connector: aiohttp.BaseConnector
        # A kept connection would hold one of the server's few HTTP threads between two looks;
        # a new one costs next to nothing, except where TLS has to be set up each time.
        force_close = url.scheme != "https"
        if settings.unix_socket:
            connector = aiohttp.UnixConnector(settings.unix_socket, limit=1, force_close=force_close)
        else:
            context = _tls(settings.ca_file) if url.scheme == "https" else True
            connector = aiohttp.TCPConnector(limit=1, force_close=force_close, ssl=context)
        proxy = None if settings.unix_socket else _proxy(url)
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            auto_decompress=False,
            # A connection that is not even taken is no late answer: that machine is away.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.deadline_seconds / 2),
            proxy=proxy.with_user(None) if proxy else None,
            proxy_auth=aiohttp.BasicAuth(proxy.user, proxy.password or "") if proxy and proxy.user else None,
            cookie_jar=aiohttp.DummyCookieJar(),
            raise_for_status=False,
        )
        return self._session


def _tls(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError:
        raise AnswerError(
            Failure.UNREACHABLE, "its CA file cannot be read; name one in PEM format with --ca-file"
        ) from None


def _proxy(url: SplitResult) -> URL | None:
    """The environment's proxy, which is for the world outside, never for this machine.

    Not aiohttp's trust_env: it would also send what ~/.netrc holds, in place of the API key.
    """
    host = url.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxy = urllib.request.getproxies().get(url.scheme)
    return URL(proxy) if proxy else None


_STATUS_FAILURES = {
    401: Failure.UNAUTHORIZED,
    403: Failure.UNAUTHORIZED,
    404: Failure.NOT_FOUND,
    500: Failure.UNREACHABLE,
    501: Failure.NOT_OFFERED,
    # What stands in front of it answers for it.
    502: Failure.UNREACHABLE,
    503: Failure.LOADING,
    504: Failure.LATE,
}


def _refused(status: int, path: str) -> AnswerError:
    failure = _STATUS_FAILURES.get(status, Failure.BROKEN)
    problem = f"{path} answered with status {status}"
    if failure is Failure.UNAUTHORIZED:
        problem += "; name its API key with --api-key-file"
    elif 300 <= status < 400:
        problem += "; name the address that it leads to with --server"
    return AnswerError(failure, problem)


async def _bounded_body(response: aiohttp.ClientResponse, path: str) -> bytes:
    too_large = AnswerError(
        Failure.BROKEN, f"{path} is larger than {LARGEST_ANSWER_BYTES // 2**20} MB and was refused"
    )
    if (response.content_length or 0) > LARGEST_ANSWER_BYTES:
        response.close()
        raise too_large
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > LARGEST_ANSWER_BYTES:
            response.close()
            raise too_large
    return bytes(body)
