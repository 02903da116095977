"""kvscope dashboards: dashboards and rules of the package, written to a folder or sent to a Grafana."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import click

from kvscope.commands.options import Written
from kvscope.commands.settings_file import key_from, path_of, refuse_bad_certificates, shown_path
from kvscope.grafana import Grafana, GrafanaError, NotAnswering, TokenMayNot
from kvscope.settings import SettingsError, api_key, server_address

TOKEN_VARIABLE = "KVSCOPE_GRAFANA_TOKEN"  # noqa: S105 - a variable's name
FOLDER_UID = "kvscope"
DATA_SOURCE_NAME = "Prometheus"
DATA_SOURCE_TYPE = "prometheus"

PACKAGE = Path(__file__).parents[1]

_FOR_IMPORT_BY_HAND = ("__inputs", "__requires", "__elements")
_OF_ONE_GRAFANA = ("id", "version")

GROUP_EXAMPLES = """
\b
Examples:
  kvscope dashboards export monitoring
  kvscope dashboards push --grafana http://127.0.0.1:3000 --token-file grafana.token

\b
docs/GRAFANA.md says how to provision, import by hand, and upgrade.
"""

EXPORT_EXAMPLES = """
\b
Examples:
  kvscope dashboards export monitoring
  kvscope dashboards export --force monitoring      after an upgrade

\b
Grafana provisions monitoring/dashboards, Prometheus takes monitoring/alerts/*.yml as rule_files.
Exit codes: 0 all are there; 1 some could not be written or were changed; 2 a wrong setting.
"""

PUSH_EXAMPLES = """
\b
Examples:
  KVSCOPE_GRAFANA_TOKEN=... kvscope dashboards push --grafana http://127.0.0.1:3000
  kvscope dashboards push --grafana https://grafana.example.org/prefix --token-file grafana.token
  kvscope dashboards push --grafana http://127.0.0.1:3000 --token-file grafana.token \\
    --datasource-url http://127.0.0.1:9090

\b
The token is that of a service account: role Editor, or Admin where the data source is to be added too.
Pushed again, only what differs is saved; what it replaces stays in the dashboard's history in Grafana.
Exit codes: 0 all are there; 1 Grafana is out of reach or refused something; 2 a wrong setting.
"""


class _Place(NamedTuple):
    """Where files of one kind are in a checkout, and which; in the wheel they are in kvscope/shipped."""

    in_checkout: str
    pattern: str


_SHIPPED = {
    "dashboards": _Place("dashboards/generated", "*.json"),
    "import": _Place("dashboards/import_by_hand", "*.json"),
    "alerts": _Place("alerts", "*.yml"),
}


@dataclass(frozen=True)
class ShippedFile:
    """One file of the package: name as in `dashboards/cache.json`, and its text."""

    name: str
    text: str


def shipped_files(kind: str) -> tuple[ShippedFile, ...]:
    """Return files by name: of kind `dashboards`, the same to be imported by hand (`import`), or `alerts`."""
    folder = PACKAGE / "shipped" / kind
    if not folder.is_dir():
        folder = PACKAGE.parents[1] / _SHIPPED[kind].in_checkout
    files = tuple(
        ShippedFile(f"{kind}/{path.name}", path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob(_SHIPPED[kind].pattern))
    )
    if not files:
        raise click.ClickException(f"this installation has no {kind}: install kvscope again")
    return files


@click.group(epilog=GROUP_EXAMPLES, short_help="Write the dashboards and rules to a folder, or push them.")
def dashboards() -> None:
    """Grafana dashboards, and Prometheus' alert and recording rules, as they come with kvscope."""


@dashboards.command(epilog=EXPORT_EXAMPLES)
@click.argument("folder", metavar="DIR")
@click.option("--force", is_flag=True, help="Overwrite files that say something else.")
def export(folder: str, force: bool) -> int:
    """Write dashboards and rules to DIR/dashboards and DIR/alerts; to DIR/import what is imported by hand.

    A file that is there and says something else is left as it is: somebody may have changed it.
    """
    refused = 0
    for file in (each for kind in _SHIPPED for each in shipped_files(kind)):
        try:
            click.echo(f"{file.name}: {_write(path_of(folder) / file.name, file.text, force)}")
        except _Refused as reason:
            refused += 1
            click.echo(f"kvscope: {reason}", err=True)
    return 1 if refused else 0


class _Refused(Exception):
    """One file or dashboard is not written; the text says why and the way out."""


def _write(path: Path, text: str, force: bool) -> str:
    try:
        before = path.read_bytes() if path.exists() else None
        if before == text.encode():
            return "unchanged"
        if before is not None and not force:
            raise _Refused(
                f"{shown_path(path)} says something else and is left as it is: --force overwrites it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    except OSError as error:
        raise _Refused(
            f"{shown_path(path)} cannot be written ({error.strerror}): name another folder"
        ) from None
    return "created" if before is None else "overwritten"


def _grafana_address(text: str) -> str:
    if text[:5].lower() == "unix:":
        raise SettingsError(f"{text!r} is no http:// or https:// address")
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise SettingsError("the address holds a user name or password: leave it out, a token does")
    return server_address(text).url


def _folder_uid(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", text):
        raise SettingsError(f"{text!r} is no folder's uid: up to 40 letters, digits, - and _")
    return text


def _refuse_token(_ctx: click.Context, _param: click.Parameter, value: object) -> None:
    if value is not None:
        raise SettingsError(
            "--token is refused, every program could read the token there: put it in a file for "
            f"--token-file or set {TOKEN_VARIABLE}"
        )


@dashboards.command(epilog=PUSH_EXAMPLES)
@click.option(
    "--grafana",
    "address",
    required=True,
    envvar="KVSCOPE_GRAFANA",
    metavar="URL",
    type=Written("grafana", _grafana_address),
    help="Grafana's address, with the path that it is served under.",
)
@click.option(
    "--token-file",
    metavar="FILE",
    help=f"File with the token in its first line. Or set {TOKEN_VARIABLE}.",
)
@click.option("--token", hidden=True, expose_value=False, callback=_refuse_token)
@click.option("--ca-file", metavar="FILE", help="Certificates (PEM) to trust for an https Grafana.")
@click.option(
    "--folder",
    "folder_uid",
    type=Written("folder", _folder_uid),
    default=FOLDER_UID,
    show_default=True,
    metavar="UID",
    help="Folder of the dashboards; one that is not there is made.",
)
@click.option(
    "--datasource",
    metavar="NAME",
    help="The Prometheus that the pages open with.  [default: Grafana's default one, or its first]",
)
@click.option(
    "--datasource-url",
    type=Written("datasource_url", _grafana_address),
    metavar="URL",
    help="Add it with this address, as Grafana reaches it, if it is not there.",
)
def push(
    address: str,
    token_file: str | None,
    ca_file: str | None,
    folder_uid: str,
    datasource: str | None,
    datasource_url: str | None,
) -> int:
    """Send the dashboards to a Grafana: a folder, a data source if there is none, the dashboards.

    Rules are Prometheus': `kvscope dashboards export` writes them.
    """
    if ca_file:
        refuse_bad_certificates(path_of(ca_file))
    token = _token(token_file)
    try:
        grafana = Grafana(address, token, str(path_of(ca_file)) if ca_file else None)
        click.echo(f"folder {folder_uid}: {_ensure_folder(grafana, folder_uid)}")
        chosen = _ensure_data_source(grafana, datasource, datasource_url)
        refused = 0
        for file in shipped_files("dashboards"):
            try:
                click.echo(_push_one(grafana, file, folder_uid, chosen))
            except NotAnswering:
                raise
            except (GrafanaError, _Refused) as reason:
                refused += 1
                click.echo(f"kvscope: {file.name}: {reason}", err=True)
    except GrafanaError as error:
        raise click.ClickException(str(error)) from None
    return 1 if refused else 0


def _token(token_file: str | None) -> str:
    if token_file is not None:
        return key_from(path_of(token_file))
    if not os.environ.get(TOKEN_VARIABLE):
        raise SettingsError(f"no token: name a file with --token-file or set {TOKEN_VARIABLE}")
    return api_key(os.environ[TOKEN_VARIABLE], TOKEN_VARIABLE)


def _ensure_folder(grafana: Grafana, uid: str) -> str:
    try:
        if grafana.folder(uid) is not None:
            return "is there"
    except TokenMayNot:
        pass  # Grafana's answer to an Editor where there is none; whether that is so, the next one tells
    grafana.create_folder(uid, uid)
    return "created"


def _ensure_data_source(grafana: Grafana, name: str | None, url: str | None) -> Mapping[str, Any] | None:
    """Return the data source that the pages open with; None: Grafana chooses."""
    try:
        all_of_them = grafana.data_sources()
    except TokenMayNot:
        if name or url:
            raise
        click.echo("data source: the token may not see them, Grafana's default Prometheus is taken")
        return None
    found = [each for each in all_of_them if each.get("type") == DATA_SOURCE_TYPE]
    if name is None and url is None and found:
        chosen = next((each for each in found if each.get("isDefault")), found[0])
        click.echo(f"data source {chosen['name']}: is there")
        return chosen
    name = name or DATA_SOURCE_NAME
    for each in all_of_them:
        if each["name"] == name:
            return _chosen(each, url)
    if url is None:
        raise GrafanaError(
            f"there is no data source {name!r} and no address to add it with: name one of Grafana's "
            "with --datasource, or give Prometheus' address with --datasource-url"
        )
    added = grafana.create_data_source(
        {"name": name, "type": DATA_SOURCE_TYPE, "url": url, "access": "proxy", "isDefault": not all_of_them}
    )
    click.echo(f"data source {name}: created")
    return added


def _chosen(data_source: Mapping[str, Any], url: str | None) -> Mapping[str, Any]:
    name = data_source["name"]
    if data_source.get("type") != DATA_SOURCE_TYPE:
        raise GrafanaError(f"data source {name!r} is no Prometheus: name another one with --datasource")
    other = url is not None and str(data_source.get("url", "")).rstrip("/") != url
    click.echo(
        f"data source {name}: is there"
        + (f" with the address {data_source.get('url')}, left as it is" if other else "")
    )
    return data_source


def _push_one(
    grafana: Grafana, file: ShippedFile, folder_uid: str, data_source: Mapping[str, Any] | None
) -> str:
    wanted = ready_to_push(file, data_source)
    there = grafana.dashboard(wanted["uid"])
    if there is None:
        done = "created"
    elif _without(there["dashboard"], _OF_ONE_GRAFANA) != wanted:
        done = "updated"
    elif there["meta"].get("folderUid") != folder_uid:
        done = "moved"
    else:
        return f"dashboard {wanted['title']}: unchanged"
    grafana.save_dashboard(wanted, folder_uid, f"kvscope {version('kvscope')}")
    return f"dashboard {wanted['title']}: {done}"


def ready_to_push(file: ShippedFile, data_source: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a dashboard as Grafana keeps it: without what only an import by hand asks for.

    data_source: the one that it opens with. Raises _Refused for a file that is no dashboard.
    """
    try:
        dashboard = json.loads(file.text)
    except ValueError:
        dashboard = None
    if not isinstance(dashboard, dict) or not dashboard.get("uid") or not dashboard.get("title"):
        raise _Refused("is no dashboard with uid and title: install kvscope again")
    wanted = _without(dashboard, (*_FOR_IMPORT_BY_HAND, *_OF_ONE_GRAFANA))
    for variable in _data_source_variables(wanted):
        # In the file it is what an import by hand asks for.
        variable.pop("current", None)
        if data_source is not None:
            variable["current"] = {"text": data_source["name"], "value": data_source["uid"]}
    return wanted


def _data_source_variables(dashboard: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    return (
        each for each in dashboard.get("templating", {}).get("list", ()) if each.get("type") == "datasource"
    )


def _without(fields: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    left_out = set(names)
    return {key: value for key, value in fields.items() if key not in left_out}
