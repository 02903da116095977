"""The exporter's pages: scrapes, health, the snapshot as JSON, and a page for people.

Nothing here waits for a poll: a page shows the boxes that hang on the board when it is asked for.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from hashlib import sha256
from html import escape
from math import isfinite
from typing import Any

from aiohttp import web

from kvscope.metrics.collector import ALL_FAMILIES, Exposition, Format
from kvscope.metrics.family import Family
from kvscope.metrics.health import package_version
from kvscope.snapshot import SNAPSHOT_VERSION, Board, ServerBox, Snapshot

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --quiet: #57606a; --ground: #fff; --line: #d0d7de;
  --link: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --quiet: #9da7b3; --ground: #0d1117;
  --line: #30363d; --link: #79c0ff; } }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: var(--text); background: var(--ground);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; }
p, caption { color: var(--quiet); }
a { color: var(--link); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding-bottom: .5rem; }
th, td { text-align: left; padding: .4rem 1.5rem .4rem 0; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 600; }
"""
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; "
    f"frame-ancestors 'none'; style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Server": "kvscope",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(board: Board, families: Iterable[Family] = ALL_FAMILIES) -> web.Application:
    """Return the web application that shows what hangs on the board."""
    exposition = Exposition(families)
    pages = {form: RenderedOnce(board, partial(exposition.render, form=form)) for form in Format}
    json_page = RenderedOnce(board, as_json)

    async def metrics(request: web.Request) -> web.Response:
        form = accepted_format(request.headers.get("Accept", ""))
        return await pages[form].response(request, form.value, vary="Accept, Accept-Encoding")

    async def snapshot(request: web.Request) -> web.Response:
        return await json_page.response(request, "application/json; charset=utf-8", vary="Accept-Encoding")

    async def healthy(_: web.Request) -> web.Response:
        return web.Response(text="kvscope is running\n")

    async def ready(_: web.Request) -> web.Response:
        if missing := board.missing():
            return web.Response(status=503, text=f"waiting for the first look at: {', '.join(missing)}\n")
        return web.Response(text="every server was looked at\n")

    async def landing(_: web.Request) -> web.Response:
        page = landing_page(board.snapshot(), board.missing())
        return web.Response(body=page.encode("utf-8", "replace"), content_type="text/html", charset="utf-8")

    async def add_security_headers(_: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(SECURITY_HEADERS)

    app = web.Application()
    app.on_response_prepare.append(add_security_headers)
    app.router.add_get("/", landing)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/snapshot.json", snapshot)
    app.router.add_get("/-/healthy", healthy)
    app.router.add_get("/-/ready", ready)
    return app


class RenderedOnce:
    """A page that is rendered when it is first asked for after the board changed, and kept as bytes.

    It is rendered in a thread, so that a large page delays no poll; who asks meanwhile waits for the
    same bytes.
    """

    def __init__(self, board: Board, render: Callable[[Snapshot], bytes]) -> None:
        self._board = board
        self._render = render
        self._rendering = asyncio.Lock()
        self._version: int | None = None
        self._plain = b""
        self._gzipped: bytes | None = None

    async def response(self, request: web.Request, content_type: str, vary: str) -> web.Response:
        """Return the page for this request, compressed where the client takes gzip."""
        gzipped = _quality(request.headers.get("Accept-Encoding", ""), "gzip") > 0
        headers = {"Content-Type": content_type, "Vary": vary}
        if gzipped:
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=await self._body(gzipped=gzipped), headers=headers)

    async def _body(self, *, gzipped: bool) -> bytes:
        async with self._rendering:
            version, snapshot = self._board.version, self._board.snapshot()
            if version != self._version:
                self._plain = await asyncio.to_thread(self._render, snapshot)
                self._gzipped = None
                self._version = version
            if not gzipped:
                return self._plain
            if self._gzipped is None:
                self._gzipped = await asyncio.to_thread(gzip.compress, self._plain, 6, mtime=0)
            return self._gzipped


def accepted_format(accept: str) -> Format:
    """Return the format that an Accept header asks for: text, unless it names OpenMetrics 1.0.0 with at
    least as high a quality as text/plain."""
    openmetrics = _quality(accept, "application/openmetrics-text", {"1.0.0", None})
    text = _quality(accept, "text/plain", {"0.0.4", None})
    return Format.OPENMETRICS if openmetrics > 0 and openmetrics >= text else Format.TEXT


def _quality(header: str, wanted: str, versions: Iterable[str | None] = (None,)) -> float:
    """Return the highest quality that a header of the Accept family gives to a value, 0 if none."""
    best = 0.0
    for item in header.split(","):
        value, *parameters = (part.strip().lower() for part in item.split(";"))
        given = {name.strip(): text.strip() for name, _, text in (p.partition("=") for p in parameters)}
        if value != wanted or given.get("version") not in versions:
            continue
        try:
            best = max(best, float(given.get("q", "1")))
        except ValueError:
            continue
    return best


def as_json(snapshot: Snapshot) -> bytes:
    """Return the snapshot as JSON; what is unknown is left out, keys of several parts are joined by /."""
    return json.dumps(
        {"version": SNAPSHOT_VERSION, **_plain(snapshot)}, separators=(",", ":"), allow_nan=False
    ).encode()


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        named: Iterable[tuple[Any, Any]] = (
            (field.name, getattr(value, field.name)) for field in fields(value)
        )
    elif isinstance(value, Mapping):
        named = value.items()
    elif isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    elif isinstance(value, Enum):
        return value.value
    else:
        return None if isinstance(value, float) and not isfinite(value) else value
    plain = ((_key(key), _plain(part)) for key, part in named)
    return {key: part for key, part in plain if part is not None}


def _key(key: object) -> str:
    parts = key if isinstance(key, tuple) else (key,)
    return "/".join(str(part) for part in parts if part is not None)


def landing_page(snapshot: Snapshot, missing: tuple[str, ...]) -> str:
    """Return the page for people: each server's name, state, model and busy slots, and links.

    Addresses of the servers are left out: a path or a user in them may be private.
    """
    rows = "".join(map(_landing_row, snapshot.servers)) + "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>not looked at yet</td><td></td><td></td></tr>\n'
        for name in missing
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvscope</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>kvscope</h1>
<p>Version {escape(package_version())}. Watches the KV cache of llama.cpp servers, slot by slot.</p>
<div class="wide">
<table>
<caption>Watched servers, as of now; load the page again for a newer look.</caption>
<thead>
<tr><th scope="col">Server</th><th scope="col">State</th><th scope="col">Model</th>
<th scope="col">Busy slots</th></tr>
</thead>
<tbody>
{rows}</tbody>
</table>
</div>
<nav aria-label="Pages">
<ul>
<li><a href="metrics">Metrics</a> for Prometheus</li>
<li><a href="snapshot.json">Snapshot</a> as JSON, for other views</li>
<li><a href="-/healthy">Health</a>: whether the exporter runs</li>
<li><a href="-/ready">Readiness</a>: whether every server was looked at</li>
</ul>
</nav>
</main>
</body>
</html>
"""


def _landing_row(box: ServerBox) -> str:
    state = box.state.value.replace("_", " ")
    model = "unknown" if box.model is None else box.model
    known = box.slots_busy is not None and box.slots_total is not None
    busy = f"{box.slots_busy} of {box.slots_total}" if known else "unknown"
    return (
        f'<tr><th scope="row">{escape(box.name)}</th><td>{escape(state)}</td>'
        f"<td>{escape(model)}</td><td>{escape(busy)}</td></tr>\n"
    )
