"""A server that keeps folders, data sources and dashboards as Grafana does, and records what it was asked."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import trustme

TOKEN = "glsa_good"

Answer = tuple[int, Any]


@dataclass
class FakeGrafana:
    """What it holds and does. answers: instead of its own, by method and path; text goes out as HTML."""

    url: str = ""
    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    folders: dict[str, Any] = field(default_factory=dict)
    data_sources: list[dict[str, Any]] = field(default_factory=list)
    dashboards: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[tuple[str, str], Answer] = field(default_factory=dict)
    redirect: str | None = None
    prefix: str = ""

    def wrote(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path, _ in self.calls if method != "GET"]

    def answer(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Answer:
        self.calls.append((method, path, body))
        if (method, path) in self.answers:
            return self.answers[method, path]
        if not path.startswith(f"{self.prefix}/api/"):
            return 404, "404 page not found"
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"message": "Invalid API key"}
        match method, path.removeprefix(f"{self.prefix}/api/").split("/"):
            case "GET", ["folders", uid]:
                return (200, self.folders[uid]) if uid in self.folders else _missing("folder not found")
            case "POST", ["folders"]:
                self.folders[body["uid"]] = {"uid": body["uid"], "title": body["title"]}
                return 200, self.folders[body["uid"]]
            case "GET", ["datasources"]:
                return 200, self.data_sources
            case "POST", ["datasources"]:
                added = {**body, "uid": f"uid-of-{body['name']}"}
                self.data_sources.append(added)
                return 200, {"datasource": added, "message": "Datasource added", "name": body["name"]}
            case "GET", ["dashboards", "uid", uid]:
                return (
                    (200, self.dashboards[uid]) if uid in self.dashboards else _missing("Dashboard not found")
                )
            case "POST", ["dashboards", "db"]:
                return self._save(body)
        return _missing("Not found")

    def _save(self, body: Any) -> Answer:
        if "folderId" in body or not body["overwrite"]:
            return 412, {"message": "a dashboard is sent with folderUid, to be overwritten"}
        dashboard = body["dashboard"]
        before = self.dashboards.get(dashboard["uid"], {"dashboard": {"version": 0}})
        version = before["dashboard"]["version"] + 1
        self.dashboards[dashboard["uid"]] = {
            "dashboard": {**dashboard, "id": 7, "version": version},
            "meta": {"folderUid": body["folderUid"]},
        }
        return 200, {"status": "success", "uid": dashboard["uid"], "version": version}


def _missing(message: str) -> Answer:
    return 404, {"message": message}


@contextmanager
def running(grafana: FakeGrafana, authority: trustme.CA | None = None) -> Iterator[FakeGrafana]:
    """Give it an address while inside, https with a certificate of the authority."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, content = grafana.answer(self.command, self.path, body, self.headers)
            if grafana.redirect:
                status, content = 302, ""
            as_text = isinstance(content, str)
            payload = content.encode() if as_text else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if as_text else "application/json")
            self.send_header("Content-Length", str(len(payload)))
            if grafana.redirect:
                self.send_header("Location", grafana.redirect)
            self.end_headers()
            self.wfile.write(payload)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scheme = "http"
    if authority:
        scheme = "https"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    grafana.url = f"{scheme}://127.0.0.1:{server.server_port}"
    try:
        yield grafana
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
