"""A Grafana that dashboards are sent to, through grafana-api or grafana-client, whichever is installed.

Both have the same methods; what differs is the name of the entry and of the exceptions, one table row each.
Folders, data sources and dashboards are known by their uid: Grafana 13 has no other numbers any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

ANSWER_WITHIN_SECONDS = 20.0

_TOO_LATE = f"does not answer within {ANSWER_WITHIN_SECONDS:.0f} s: try again later"
_NO_GRAFANA = "does not answer as a Grafana does: check host, port and path"

Json = dict[str, Any]


class GrafanaError(Exception):
    """Grafana did not do what was asked; the text is one line that says why and the way out."""


class NotAnswering(GrafanaError):
    """Nothing more can be asked: it is out of reach, no Grafana, or does not take the token."""


class NoLibrary(GrafanaError):
    """Neither of the two packages is installed."""


@dataclass(frozen=True)
class Library:
    """Where a package keeps what is needed of it.

    entry: class in entry_module. client: the entry's attribute that holds the HTTP session.
    errors: the module of GrafanaException. http_errors: that of the HTTP package's exceptions.
    """

    package: str
    entry_module: str
    entry: str
    client: str
    errors: str
    http_errors: str


LIBRARIES = (
    Library(
        package="grafana_api",
        entry_module="grafana_api.grafana_face",
        entry="GrafanaFace",
        client="api",
        errors="grafana_api.grafana_api",
        http_errors="requests.exceptions",
    ),
    Library(
        package="grafana_client",
        entry_module="grafana_client.api",
        entry="GrafanaApi",
        client="client",
        errors="grafana_client.client",
        http_errors="niquests.exceptions",
    ),
)


def installed_library() -> Library:
    """Return the package that is installed, grafana-api before grafana-client. Raises NoLibrary."""
    for library in LIBRARIES:
        if find_spec(library.package):
            return library
    raise NoLibrary("what talks to Grafana is missing: install kvscope with its extra, kvscope[grafana]")


class Grafana:
    """One Grafana at an address, asked with one token. ca_file: the certificates to trust."""

    def __init__(self, address: str, token: str, ca_file: str | None = None) -> None:
        library = installed_library()
        parts = urlsplit(address)
        self._address = address
        self._error = import_module(library.errors).GrafanaException
        self._http = import_module(library.http_errors)
        self._grafana = getattr(import_module(library.entry_module), library.entry)(
            token,
            protocol=parts.scheme,
            host=parts.netloc,
            url_path_prefix=parts.path.strip("/") + "/" if parts.path.strip("/") else "",
            verify=ca_file or True,
            timeout=ANSWER_WITHIN_SECONDS,
        )
        # A redirected POST would become a GET, and the token would travel to wherever it points.
        getattr(self._grafana, library.client).s.max_redirects = 0

    def folder(self, uid: str) -> Json | None:
        """Return the folder, or None where there is none. Raises GrafanaError."""
        return self._find(self._grafana.folder.get_folder, uid)

    def create_folder(self, uid: str, title: str) -> None:
        """Make a folder. Raises GrafanaError."""
        self._ask(self._grafana.folder.create_folder, title, uid)

    def data_sources(self) -> list[Json]:
        """Return every data source. Raises GrafanaError, TokenMayNot where the token may not see them."""
        answer = self._ask(self._grafana.datasource.list_datasources)
        if not isinstance(answer, list):
            raise self._no_grafana()
        return [self._data_source(each) for each in answer]

    def create_data_source(self, fields: Mapping[str, Any]) -> Json:
        """Add a data source and return it as Grafana keeps it. Raises GrafanaError."""
        answer = self._ask(self._grafana.datasource.create_datasource, dict(fields))
        return self._data_source(answer.get("datasource") if isinstance(answer, dict) else None)

    def dashboard(self, uid: str) -> Json | None:
        """Return a dashboard with its meta, or None where there is none. Raises GrafanaError."""
        found = self._find(self._grafana.dashboard.get_dashboard, uid)
        if found is not None and not all(isinstance(found.get(key), dict) for key in ("dashboard", "meta")):
            raise self._no_grafana()
        return found

    def save_dashboard(self, dashboard: Mapping[str, Any], folder_uid: str, message: str) -> None:
        """Create or replace a dashboard; the one before stays in Grafana's history. Raises GrafanaError."""
        body = {
            "dashboard": {**dashboard, "id": None},
            "folderUid": folder_uid,
            "overwrite": True,
            "message": message,
        }
        self._ask(self._grafana.dashboard.update_dashboard, body)

    def _data_source(self, answer: object) -> Json:
        if not isinstance(answer, dict) or not {"name", "uid"} <= answer.keys():
            raise self._no_grafana()
        return answer

    def _find(self, call: Callable[..., Any], uid: str) -> Json | None:
        try:
            answer = self._ask(call, uid)
        except _NotThere:
            return None
        if not isinstance(answer, dict):
            raise self._no_grafana()
        return answer

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except self._error as error:
            # Not "from error": its text may be a whole page.
            raise self._refused(error.status_code, error.response) from None
        except self._http.RequestException as error:
            raise self._unreachable(error) from None
        except (ValueError, TypeError):  # not JSON; grafana-api trips over some of these
            raise self._no_grafana() from None

    def _refused(self, status: int, response: object) -> GrafanaError:
        said = response.get("message") if isinstance(response, dict) else None
        if status == 0:  # grafana-client's number for no answer in time
            return NotAnswering(f"{self._address} {_TOO_LATE}")
        if status == 401:
            return NotAnswering(
                f"{self._address} does not take the token (401): make one of a service account in Grafana"
            )
        if said is None:
            return self._no_grafana()
        if status == 403:
            return TokenMayNot(
                f"{self._address} does not let the token do that (403, {_short(said)}): "
                "give its service account the role Editor, or Admin where a data source is to be added"
            )
        if status == 404:
            return _NotThere(f"{self._address} answers 404, {_short(said)}")
        if status == 400 and "provisioned" in _short(said):
            return GrafanaError(
                f"{self._address} answers 400, {_short(said)}: it is there from a file, put the new one in "
                "its place (kvscope dashboards export)"
            )
        return GrafanaError(f"{self._address} answers {status}, {_short(said)}")

    def _unreachable(self, error: Exception) -> GrafanaError:
        for kind, problem in (
            ("SSLError", "has a certificate that does not verify: name the CA's with --ca-file"),
            ("TooManyRedirects", "redirects: name the address that it leads to"),
            ("JSONDecodeError", _NO_GRAFANA),
            ("Timeout", _TOO_LATE),
        ):
            if isinstance(error, getattr(self._http, kind)):
                return NotAnswering(f"{self._address} {problem}")
        return NotAnswering(
            f"{self._address} is not reached ({type(error).__name__}): is Grafana running there?"
        )

    def _no_grafana(self) -> GrafanaError:
        return NotAnswering(f"{self._address} {_NO_GRAFANA}")


class TokenMayNot(GrafanaError):
    """The token is good, but not for this."""


class _NotThere(GrafanaError):
    """Nothing has this uid."""


def _short(text: object) -> str:
    return " ".join(str(text).split())[:200]
