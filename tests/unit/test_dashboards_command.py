"""kvscope dashboards: what is written to a folder, and what a Grafana is asked for, by either library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
from fake_grafana import TOKEN, FakeGrafana, running

from kvscope import cli
from kvscope.commands import dashboards
from kvscope.grafana import LIBRARIES, NoLibrary, installed_library

ROOT = Path(__file__).parents[2]
GRAFANA_CLIENT = ROOT / ".tools" / "grafana-client"

Run = Callable[..., tuple[int, str, str]]

ONE = {"uid": "kvscope-one", "title": "One", "panels": [{"id": 1, "title": "Saved"}], "schemaVersion": 42}
TWO = {
    "uid": "kvscope-two",
    "title": "Two",
    "__inputs": [{"name": "DS", "type": "datasource"}],
    "id": 12,
    "templating": {
        "list": [
            {"name": "datasource", "type": "datasource", "current": {"value": "${DS}"}},
            {"name": "server", "type": "query"},
        ]
    },
}
RULES = "groups:\n  - name: kvscope\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two dashboards and one file of rules beside its test."""
    package = tmp_path / "package"
    for name, text in (
        ("dashboards/one.json", json.dumps(ONE)),
        ("dashboards/two.json", json.dumps(TWO)),
        ("import/one.json", "{}"),
        ("alerts/rules.yml", RULES),
        ("alerts/tests/rules.yml", "rule_files: [../rules.yml]\n"),
    ):
        path = package / "shipped" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(dashboards, "PACKAGE", package)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in list(os.environ):
        if name.startswith("KVSCOPE_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    return package


@pytest.fixture
def run(package: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(["dashboards", *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(params=[library.package for library in LIBRARIES])
def push(request: pytest.FixtureRequest, package: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Push with one library, the other one not being there; returns exit code, stdout and stderr."""
    monkeypatch.setenv("KVSCOPE_GRAFANA_TOKEN", TOKEN)
    if request.param == "grafana_api":
        return lambda *arguments: run("push", *arguments)
    if not GRAFANA_CLIENT.is_dir():
        pytest.skip("grafana-client is not in .tools: make tools")

    def in_a_process_of_its_own(*arguments: str) -> tuple[int, str, str]:
        # It replaces urllib3, so it is nowhere near the other tests.
        program = (
            "import sys; sys.modules['grafana_api'] = None\n"
            "from pathlib import Path\n"
            "from kvscope import cli, grafana\n"
            "from kvscope.commands import dashboards\n"
            f"dashboards.PACKAGE = Path({str(package)!r})\n"
            "grafana.find_spec = lambda name: name == 'grafana_client'\n"
            "sys.exit(cli.run(['dashboards', 'push', *sys.argv[1:]]))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "PYTHONPATH": str(GRAFANA_CLIENT)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return in_a_process_of_its_own


@pytest.fixture
def grafana() -> Iterator[FakeGrafana]:
    """A Grafana with a Prometheus and nothing else."""
    fake = FakeGrafana(data_sources=[prometheus("Prometheus")])
    with running(fake):
        yield fake


def prometheus(name: str, url: str = "http://prometheus:9090") -> dict[str, Any]:
    return {"name": name, "type": "prometheus", "uid": f"uid-of-{name}", "url": url}


def one_line(answer: tuple[int, str, str], code: int = 1) -> str:
    """Return the one line on stderr of a command that did not do it."""
    assert answer[0] == code, answer
    assert answer[2].startswith("kvscope: "), answer
    assert answer[2].count("\n") == 1, answer
    assert TOKEN not in answer[1] + answer[2]
    return answer[2]


# what comes along


def test_the_checkout_holds_five_dashboards_with_uids_of_their_own_and_rules() -> None:
    pages = [json.loads(file.text) for file in dashboards.shipped_files("dashboards")]
    assert len({page["uid"] for page in pages}) == len(pages) == 5
    assert all(file.text.count("groups:") == 1 for file in dashboards.shipped_files("alerts"))


def test_the_wheel_takes_every_one_of_them_along() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    wheel = build["wheel"]["force-include"]
    assert wheel.pop("dashboards/generated") == "kvscope/shipped/dashboards"
    assert wheel.pop("dashboards/import_by_hand") == "kvscope/shipped/import"
    for folder in ("generated", "import_by_hand"):
        assert {path.suffix for path in (ROOT / "dashboards" / folder).iterdir()} == {".json"}
    assert wheel == {file.name: f"kvscope/shipped/{file.name}" for file in dashboards.shipped_files("alerts")}


# export


def test_export_writes_dashboards_and_rules_but_not_the_rules_tests(run: Run, tmp_path: Path) -> None:
    code, out, err = run("export", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "dashboards/one.json: created",
        "dashboards/two.json: created",
        "import/one.json: created",
        "alerts/rules.yml: created",
    ]
    written = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert written == {"dashboards/one.json", "dashboards/two.json", "import/one.json", "alerts/rules.yml"}
    assert (tmp_path / "out/alerts/rules.yml").read_text() == RULES
    assert json.loads((tmp_path / "out/dashboards/two.json").read_text()) == TWO


def test_export_again_changes_nothing(run: Run, tmp_path: Path) -> None:
    run("export", str(tmp_path / "out"))
    code, out, err = run("export", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert [line.split(": ")[1] for line in out.splitlines()] == ["unchanged"] * 4


def test_a_file_that_was_changed_is_left_and_costs_only_itself(run: Run, tmp_path: Path) -> None:
    changed = tmp_path / "out" / "dashboards" / "one.json"
    changed.parent.mkdir(parents=True)
    changed.write_text("mine")
    answer = run("export", str(tmp_path / "out"))
    assert one_line(answer) == (
        "kvscope: ~/out/dashboards/one.json says something else and is left as it is: --force overwrites it\n"
    )
    created = ["dashboards/two.json", "import/one.json", "alerts/rules.yml"]
    assert answer[1].splitlines() == [f"{name}: created" for name in created]
    assert changed.read_text() == "mine"


def test_force_overwrites_what_was_changed(run: Run, tmp_path: Path) -> None:
    changed = tmp_path / "out" / "dashboards" / "one.json"
    changed.parent.mkdir(parents=True)
    changed.write_text("mine")
    code, out, err = run("export", "--force", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "dashboards/one.json: overwritten"
    assert json.loads(changed.read_text()) == ONE


def test_a_folder_that_is_a_file_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    code, out, err = run("export", str(tmp_path / "out"))
    assert (code, out) == (1, "")
    assert "kvscope: ~/out/dashboards/one.json cannot be written (Not a directory): " in err


def test_an_installation_without_dashboards_says_so(run: Run, package: Path, tmp_path: Path) -> None:
    for path in (package / "shipped" / "dashboards").iterdir():
        path.unlink()
    assert "has no dashboards" in one_line(run("export", str(tmp_path / "out")))


# push


def test_push_makes_a_folder_and_saves_every_dashboard_in_it(push: Run, grafana: FakeGrafana) -> None:
    code, out, err = push("--grafana", grafana.url)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "folder kvscope: created",
        "data source Prometheus: is there",
        "dashboard One: created",
        "dashboard Two: created",
    ]
    assert {uid: saved["meta"]["folderUid"] for uid, saved in grafana.dashboards.items()} == {
        "kvscope-one": "kvscope",
        "kvscope-two": "kvscope",
    }
    bodies = [body for method, path, body in grafana.calls if path == "/api/dashboards/db"]
    assert bodies[0]["dashboard"] == {**ONE, "id": None}
    # What only an import by hand asks for, and the number that it had somewhere else.
    assert "__inputs" not in bodies[1]["dashboard"]
    assert bodies[1]["dashboard"]["id"] is None
    assert all("folderId" not in body for body in bodies)
    assert data_source_variable(grafana)["current"] == {
        "text": "Prometheus",
        "value": "uid-of-Prometheus",
    }
    assert bodies[0]["message"].startswith("kvscope ")


def data_source_variable(grafana: FakeGrafana) -> dict[str, Any]:
    variables = grafana.dashboards["kvscope-two"]["dashboard"]["templating"]["list"]
    assert variables[1] == TWO["templating"]["list"][1]
    return dict(variables[0])


def test_the_default_prometheus_is_taken_among_several(push: Run, grafana: FakeGrafana) -> None:
    grafana.data_sources.append({"name": "Loki", "type": "loki", "uid": "l", "isDefault": False})
    grafana.data_sources.append({**prometheus("Mimir"), "isDefault": True})
    _, out, _ = push("--grafana", grafana.url)
    assert "data source Mimir: is there\n" in out
    assert data_source_variable(grafana)["current"]["value"] == "uid-of-Mimir"


def test_a_second_push_changes_nothing(push: Run, grafana: FakeGrafana) -> None:
    push("--grafana", grafana.url)
    before = len(grafana.wrote())
    code, out, err = push("--grafana", grafana.url)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "folder kvscope: is there",
        "data source Prometheus: is there",
        "dashboard One: unchanged",
        "dashboard Two: unchanged",
    ]
    assert len(grafana.wrote()) == before


def test_only_a_dashboard_that_differs_is_saved_again(push: Run, grafana: FakeGrafana) -> None:
    push("--grafana", grafana.url)
    grafana.dashboards["kvscope-one"]["dashboard"]["panels"][0]["title"] = "Mine"
    grafana.dashboards["kvscope-two"]["meta"]["folderUid"] = "elsewhere"
    grafana.calls.clear()
    _, out, _ = push("--grafana", grafana.url)
    assert out.splitlines()[2:] == ["dashboard One: updated", "dashboard Two: moved"]
    assert grafana.dashboards["kvscope-one"]["dashboard"]["panels"] == ONE["panels"]
    assert grafana.dashboards["kvscope-two"]["meta"]["folderUid"] == "kvscope"


def test_a_data_source_is_added_where_there_is_none_and_the_pages_open_with_it(
    push: Run, grafana: FakeGrafana
) -> None:
    grafana.data_sources.clear()
    code, out, _ = push("--grafana", grafana.url, "--datasource-url", "http://prometheus:9090")
    assert code == 0
    assert "data source Prometheus: created" in out
    [added] = grafana.data_sources
    assert (added["type"], added["url"], added["access"], added["isDefault"]) == (
        "prometheus",
        "http://prometheus:9090",
        "proxy",
        True,
    )
    assert data_source_variable(grafana)["current"] == {"text": "Prometheus", "value": "uid-of-Prometheus"}
    before = len(grafana.wrote())
    code, out, _ = push("--grafana", grafana.url, "--datasource-url", "http://prometheus:9090")
    assert "data source Prometheus: is there\n" in out
    assert len(grafana.wrote()) == before


def test_what_answers_an_added_data_source_with_something_else_is_no_grafana(
    push: Run, grafana: FakeGrafana
) -> None:
    grafana.data_sources.clear()
    grafana.answers["POST", "/api/datasources"] = (200, {"message": "hello"})
    said = one_line(push("--grafana", grafana.url, "--datasource-url", "http://prometheus:9090"))
    assert "does not answer as a Grafana does" in said


def test_a_data_source_that_is_there_is_never_changed(push: Run, grafana: FakeGrafana) -> None:
    grafana.data_sources.append(prometheus("Mimir", "http://mimir"))
    code, out, _ = push("--grafana", grafana.url, "--datasource", "Mimir", "--datasource-url", "http://other")
    assert code == 0
    assert "data source Mimir: is there with the address http://mimir, left as it is" in out
    assert ("POST", "/api/datasources") not in grafana.wrote()
    assert data_source_variable(grafana)["current"]["value"] == "uid-of-Mimir"


@pytest.mark.parametrize(
    ("there", "arguments", "said"),
    [
        ([], (), "there is no data source 'Prometheus' and no address to add it with"),
        ([prometheus("A")], ("--datasource", "B"), "there is no data source 'B'"),
        ([{"name": "Loki", "type": "loki", "uid": "l"}], ("--datasource", "Loki"), "'Loki' is no Prometheus"),
    ],
)
def test_a_data_source_that_cannot_be_had_is_named(
    run: Run,
    grafana: FakeGrafana,
    monkeypatch: pytest.MonkeyPatch,
    there: list[dict[str, Any]],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setenv("KVSCOPE_GRAFANA_TOKEN", TOKEN)
    grafana.data_sources[:] = there
    assert said in one_line(run("push", "--grafana", grafana.url, *arguments))
    assert grafana.dashboards == {}


def test_a_token_that_may_not_see_data_sources_pushes_all_the_same(push: Run, grafana: FakeGrafana) -> None:
    grafana.answers["GET", "/api/datasources"] = (403, {"message": "You'll need additional permissions"})
    code, out, err = push("--grafana", grafana.url)
    assert (code, err) == (0, "")
    assert "data source: the token may not see them" in out
    assert len(grafana.dashboards) == 2
    assert "current" not in data_source_variable(grafana)


def test_an_editor_makes_the_folder_that_grafana_lets_only_administrators_miss(
    push: Run, grafana: FakeGrafana
) -> None:
    grafana.answers["GET", "/api/folders/kvscope"] = (403, {"message": "Permissions needed: folders:read"})
    code, out, err = push("--grafana", grafana.url)
    assert (code, err) == (0, "")
    assert out.startswith("folder kvscope: created\n")
    assert list(grafana.folders) == ["kvscope"]


def test_who_may_not_make_the_folder_is_told(push: Run, grafana: FakeGrafana) -> None:
    grafana.answers["GET", "/api/folders/kvscope"] = (403, {"message": "Permissions needed: folders:read"})
    grafana.answers["POST", "/api/folders"] = (403, {"message": "Permissions needed: folders:create"})
    said = one_line(push("--grafana", grafana.url))
    assert "(403, Permissions needed: folders:create): give its service account the role Editor" in said
    assert grafana.dashboards == {}


def test_a_dashboard_that_grafana_refuses_costs_only_itself(push: Run, grafana: FakeGrafana) -> None:
    push("--grafana", grafana.url)
    grafana.dashboards["kvscope-one"]["dashboard"]["title"] = "Mine"
    grafana.answers["POST", "/api/dashboards/db"] = (400, {"message": "Cannot save provisioned dashboard"})
    answer = push("--grafana", grafana.url)
    assert "dashboards/one.json: " in one_line(answer)
    assert "400, Cannot save provisioned dashboard: it is there from a file, put the new one" in answer[2]
    assert "dashboard Two: unchanged" in answer[1]


def test_a_file_that_is_no_dashboard_costs_only_itself(
    push: Run, grafana: FakeGrafana, package: Path
) -> None:
    (package / "shipped" / "dashboards" / "one.json").write_text("[1]")
    answer = push("--grafana", grafana.url)
    assert "dashboards/one.json: is no dashboard" in one_line(answer)
    assert list(grafana.dashboards) == ["kvscope-two"]


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/api/folders/kvscope", (401, {"message": "Unauthorized"}), "does not take the token (401)"),
        (
            "/api/folders/kvscope",
            (404, "<p>a message: not found</p>"),
            "does not answer as a Grafana does",
        ),
        ("/api/folders/kvscope", (404, {"error": {"code": 404}}), "does not answer as a Grafana does"),
        ("/api/folders/kvscope", (200, "<html>hello</html>"), "does not answer as a Grafana does"),
        ("/api/folders/kvscope", (200, [1]), "does not answer as a Grafana does"),
        ("/api/datasources", (200, {"a": 1}), "does not answer as a Grafana does"),
        ("/api/datasources", (200, [{"type": "prometheus"}]), "does not answer as a Grafana does"),
        ("/api/datasources", (200, ["a"]), "does not answer as a Grafana does"),
        ("/api/dashboards/uid/kvscope-one", (200, {"meta": {}}), "does not answer as a Grafana does"),
        ("/api/folders/kvscope", (502, "<p>bad gateway</p>"), "does not answer as a Grafana does"),
        (
            "/api/folders/kvscope",
            (500, {"message": "database\nis locked"}),
            "answers 500, database is locked",
        ),
    ],
)
def test_what_grafana_does_not_do_is_one_line(
    push: Run, grafana: FakeGrafana, path: str, answer: tuple[int, Any], said: str
) -> None:
    grafana.answers["GET", path] = answer
    assert said in one_line(push("--grafana", grafana.url))
    assert grafana.dashboards == {}


def test_an_address_where_nobody_listens_is_named(push: Run) -> None:
    with running(FakeGrafana()) as gone:
        pass
    assert f"{gone.url} is not reached" in one_line(push("--grafana", gone.url))


def test_the_token_follows_no_redirect(push: Run, grafana: FakeGrafana) -> None:
    with running(FakeGrafana()) as elsewhere:
        grafana.redirect = elsewhere.url
        assert "redirects" in one_line(push("--grafana", grafana.url))
    assert elsewhere.calls == []


def test_a_certificate_is_verified_with_the_authority_that_is_named(push: Run, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with running(FakeGrafana(data_sources=[prometheus("Prometheus")]), authority) as secure:
        assert "--ca-file" in one_line(push("--grafana", secure.url))
        code, _, err = push("--grafana", secure.url, "--ca-file", str(tmp_path / "ca.pem"))
    assert (code, err) == (0, "")


def test_grafana_may_be_served_under_a_path(push: Run) -> None:
    with running(FakeGrafana(prefix="/a/b", data_sources=[prometheus("Prometheus")])) as below:
        assert push("--grafana", below.url + "/a/b/")[0] == 0
        assert "does not answer as a Grafana does" in one_line(push("--grafana", below.url))


if "GRAFANA_URL" in os.environ:

    def test_a_real_grafana_takes_it_and_a_second_time_nothing_changes(
        push: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With GRAFANA_URL and GRAFANA_TOKEN of an administrator; what it makes there is deleted."""
        url, token = os.environ["GRAFANA_URL"], os.environ["GRAFANA_TOKEN"]
        monkeypatch.setenv("KVSCOPE_GRAFANA_TOKEN", token)
        asked = ("--grafana", url, "--folder", "kvscope-test", "--datasource-url", "http://127.0.0.1:9090")
        try:
            first, second = push(*asked), push(*asked)
        finally:
            requests.delete(
                f"{url}/api/folders/kvscope-test", headers={"Authorization": f"Bearer {token}"}, timeout=10
            )
        assert (first[0], second[0]) == (0, 0)
        assert first[1].count(": created\n") >= 3
        ends = [line.split(": ")[-1].partition(" with the address")[0] for line in second[1].splitlines()]
        assert ends == ["is there"] * 2 + ["unchanged"] * 2


# what is refused before anything is asked


def test_the_token_comes_from_a_file_too(run: Run, grafana: FakeGrafana, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert run("push", "--grafana", grafana.url, "--token-file", str(tmp_path / "token"))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no token: name a file with --token-file or set KVSCOPE_GRAFANA_TOKEN"),
        (("--token", TOKEN), "--token is refused"),
        (("--token-file", "nowhere"), "nowhere cannot be read"),
        (("--folder", "a/b"), "no folder's uid"),
        (("--ca-file", "nowhere"), "cannot be read"),
        (("--datasource-url", "prometheus:9090"), "no http://"),
    ],
)
def test_a_wrong_setting_is_refused_before_grafana_is_asked(
    run: Run, grafana: FakeGrafana, arguments: tuple[str, ...], said: str
) -> None:
    assert said in one_line(run("push", "--grafana", grafana.url, *arguments), code=2)
    assert grafana.calls == []


@pytest.mark.parametrize("address", ["http://admin:secret@h:3000", "unix:/run/grafana", "grafana:3000"])
def test_an_address_that_cannot_be_is_refused(run: Run, address: str) -> None:
    assert "secret" not in one_line(run("push", "--grafana", address), code=2)


def test_without_a_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvscope.grafana.find_spec", lambda name: None)
    with pytest.raises(NoLibrary, match=r"kvscope\[grafana\]"):
        installed_library()
