"""One frozen Settings; flag > environment > file > default. No I/O here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT_LISTEN = "127.0.0.1:10188"
DEFAULT_SERVER = "http://127.0.0.1:8080"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How one server is reached.

    url: http(s)://host:port[/prefix]; with unix_socket, the host in it is only a name.
    api_key never leaves the Authorization header: it is left out of repr and of every output.
    sleep_idle: "auto", "off", or the seconds after which the server sleeps.
    """

    name: str
    url: str = DEFAULT_SERVER
    unix_socket: str | None = None
    api_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca_file: str | None = None
    sleep_idle: str | float = "auto"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything `kvscope serve` can be told."""

    servers: tuple[ServerSettings, ...] = (ServerSettings("main"),)
    listen_host: str = "127.0.0.1"
    listen_port: int = 10188
    busy_interval_seconds: float = 0.5
    idle_interval_seconds: float = 2.0
    server_metrics: bool = True
    log_level: str = "info"
    log_format: str = "text"
