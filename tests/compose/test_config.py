"""What the compose files promise, as Compose itself reads them; no engine is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kvscope.cli import kvscope
from tests.compose import compose
from tests.compose.compose import FILES, ROOT

pytestmark = pytest.mark.skipif(
    compose.program() is None, reason="Docker Compose is not on PATH: run `make tools`"
)

GROUPS = {"RENDER_GROUP_ID": "992", "VIDEO_GROUP_ID": "44"}
EVERY_SERVICE = {"exporter", "prometheus", "alertmanager", "grafana"}
COMPOSE_FILES = sorted({name for names in FILES.values() for name in names})
DOCKERFILE = (ROOT / "exporter/Dockerfile").read_text()
PROMETHEUS = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())

Config = Callable[..., dict[str, Any]]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    def read(case: str = "plain", settings: Mapping[str, str] = GROUPS, **options: Any) -> dict[str, Any]:
        return compose.config(case, settings, tmp_path, **options)

    return read


@pytest.fixture
def exporter_settings(config: Config) -> Callable[[Mapping[str, str]], dict[str, str]]:
    """The exporter's environment with these settings in .env."""

    def read(settings: Mapping[str, str]) -> dict[str, str]:
        variables: dict[str, str] = config(settings=settings)["services"]["exporter"]["environment"]
        return variables

    return read


@pytest.mark.parametrize("case", FILES)
def test_compose_reads_every_overlay_without_a_word(case: str, config: Config) -> None:
    assert set(config(case)["services"]) == EVERY_SERVICE
    assert set(config(case, profiles=["demo"])["services"]) == EVERY_SERVICE | {"demo"}


@pytest.mark.parametrize("case", FILES)
def test_every_service_is_fenced_in(case: str, config: Config) -> None:
    for name, service in config(case, profiles=["demo"])["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert re.fullmatch(r"[1-9]\d*:\d+", service["user"]), name
        assert service["restart"] == "unless-stopped", name
        assert not service.get("privileged"), name
        limits = service["deploy"]["resources"]["limits"]
        assert 0 < int(limits["memory"]) <= 2**30, name
        assert 0 < limits["pids"] <= 256, name


def test_every_service_says_whether_it_is_healthy(config: Config) -> None:
    assert 'CMD ["kvscope", "healthcheck"]' in DOCKERFILE
    for name, service in config(profiles=["demo"])["services"].items():
        assert ("build" in service) != ("healthcheck" in service), name


def test_each_waits_until_what_it_needs_is_healthy(config: Config) -> None:
    services = config()["services"]
    needed = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    assert needed == {
        "exporter": {},
        "alertmanager": {},
        "prometheus": {"exporter": "service_healthy", "alertmanager": "service_healthy"},
        "grafana": {"prometheus": "service_healthy"},
    }


def test_every_port_is_on_loopback(config: Config) -> None:
    published = [
        port
        for service in config(profiles=["demo"])["services"].values()
        for port in service.get("ports", [])
    ]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    assert sorted(int(port["published"]) for port in published) == [3000, 9090, 9093, 10188]


@pytest.mark.parametrize("case", [case for case in FILES if "host" in case])
def test_on_the_hosts_network_everything_listens_on_loopback(case: str, config: Config) -> None:
    services = config(case)["services"]
    assert {service["network_mode"] for service in services.values()} == {"host"}
    assert not any(service.get("ports") for service in services.values())
    assert services["exporter"]["environment"]["KVSCOPE_LISTEN"] == "127.0.0.1:10188"
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert "--web.listen-address=127.0.0.1:9093" in services["alertmanager"]["command"]


@pytest.mark.parametrize("name", ["prometheus", "alertmanager"])
def test_on_the_hosts_network_a_command_loses_nothing(name: str, config: Config) -> None:
    plain = config()["services"][name]["command"]
    assert config("host")["services"][name]["command"][: len(plain)] == plain


def test_images_have_fixed_versions(config: Config) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {name: service["image"] for name, service in config(profiles=["demo"])["services"].items()}
    assert all(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image) for image in images.values())
    assert images["grafana"] == "grafana/grafana:12.2.0"
    assert images["exporter"] == f"kvscope:{version}"
    assert images["demo"] == f"kvscope-demo:{version}"
    assert f"ARG VERSION={version}\n" in DOCKERFILE


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_nothing_is_used_that_older_engines_do_not_know(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "start_interval" not in text
    assert "gpus:" not in text


def test_every_setting_is_explained_and_every_explained_one_is_used() -> None:
    used = {
        variable
        for name in COMPOSE_FILES
        for variable in re.findall(r"\$\{([A-Z_]+)", (ROOT / name).read_text())
    }
    explained = set(re.findall(r"^#([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used == explained


def test_what_a_user_writes_beside_the_files_stays_out_of_git() -> None:
    """A receiver's password may be in it."""
    copy = re.search(r"`ALERTMANAGER_CONFIG=\./(.+?)`", (ROOT / "docs/COMPOSE.md").read_text())
    assert copy
    assert {".env", f"/{copy[1]}"} <= set((ROOT / ".gitignore").read_text().splitlines())


def test_every_example_is_a_possible_setting(tmp_path: Path) -> None:
    lines = [
        line.removeprefix("#") if re.match(r"#[A-Z_]+=", line) else line
        for line in (ROOT / ".env.example").read_text().splitlines()
    ]
    env_file = tmp_path / "example.env"
    env_file.write_text("\n".join(lines))
    answer = compose.run("config", "--format", "json", env_file=env_file, files=FILES["amd"])
    assert (answer.returncode, answer.stderr) == (0, "")
    assert '"main=-c 65536 -np 4 -ctk q8_0 -ctv q8_0"' in answer.stdout


def checked(variables: Mapping[str, str]) -> str:
    result = CliRunner().invoke(kvscope, ["serve", "--check-config"], env=dict(variables))
    assert result.exit_code == 0, result.output
    return result.output


def test_without_any_setting_the_exporter_watches_the_machines_own_server(
    exporter_settings: Callable[..., dict[str, str]],
) -> None:
    output = checked(exporter_settings({}))
    assert "server main: http://host.docker.internal:8080 (API key: none; sleep idle: auto)" in output, (
        "no server arguments, no model folder"
    )
    assert "model folder" not in output


def test_settings_reach_the_exporter(exporter_settings: Callable[..., dict[str, str]]) -> None:
    output = checked(
        exporter_settings(
            {
                "LLAMA_SERVER_URL": "https://10.0.0.7:8443/prefix",
                "LLAMA_SERVER_ARGS": "-c 65536 -np 4 -ctk q8_0",
                "LLAMA_SERVER_SLEEP_IDLE": "300",
                "MODELS_DIR": "/srv/models",
            }
        )
    )
    assert "model folder: /srv/models is /models here" in output
    assert (
        "server main: https://10.0.0.7:8443/prefix (API key: none; arguments: given; sleep idle: 300 s)"
        in output
    )


def test_models_are_mounted_read_only_and_never_made_up(config: Config) -> None:
    for settings, source in (({}, str(ROOT / "deploy/models")), ({"MODELS_DIR": "/srv/m"}, "/srv/m")):
        (mount,) = config(settings=settings)["services"]["exporter"]["volumes"]
        assert (mount["source"], mount["target"], mount["read_only"]) == (source, "/models", True)
        assert mount["bind"].get("create_host_path", False) is False


def test_a_key_comes_from_a_file_only(config: Config) -> None:
    without, named = config(settings={}), config(settings={"LLAMA_SERVER_KEY_FILE": "/srv/llama.key"})
    assert without["services"]["exporter"]["environment"]["KVSCOPE_API_KEY_FILE"] == ""
    variable = named["services"]["exporter"]["environment"]["KVSCOPE_API_KEY_FILE"]
    assert variable == "main=/run/secrets/llama-server-key"
    assert named["secrets"]["llama-server-key"]["file"] == "/srv/llama.key"


def test_without_a_password_there_is_no_admin_and_looking_works(config: Config) -> None:
    grafana = (ROOT / "deploy/grafana/grafana.ini").read_text()
    assert "\ndisable_initial_admin_creation = true\n" in grafana
    assert re.search(r"\[auth.anonymous\]\nenabled = true\norg_role = Viewer\n", grafana)

    without = config(settings={})["services"]["grafana"]["environment"]
    assert set(without.values()) == {""}, "Grafana passes over empty variables"
    named = config(settings={"GRAFANA_ADMIN_PASSWORD_FILE": "/srv/password"})
    assert named["services"]["grafana"]["environment"] == {
        "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION": "false",
        "GF_SECURITY_ADMIN_PASSWORD__FILE": "/run/secrets/grafana-admin-password",
    }
    assert named["secrets"]["grafana-admin-password"]["file"] == "/srv/password"


@pytest.mark.parametrize("case", FILES)
def test_what_is_mounted_from_the_checkout_is_there(case: str, config: Config) -> None:
    read = config(case, profiles=["demo"])
    sources = [
        mount["source"]
        for service in read["services"].values()
        for mount in service.get("volumes", [])
        if mount["type"] == "bind"
    ]
    sources += [secret["file"] for secret in read["secrets"].values()]
    assert sources
    missing = [source for source in sources if not Path(source).exists()]
    assert missing == []


def test_figures_and_settings_outlive_a_container(config: Config) -> None:
    services = config()["services"]
    kept = {
        name: [mount["target"] for mount in service["volumes"] if mount["type"] == "volume"]
        for name, service in services.items()
    }
    assert kept == {
        "exporter": [],
        "prometheus": ["/prometheus"],
        "alertmanager": ["/alertmanager"],
        "grafana": ["/var/lib/grafana"],
    }
    command = config(settings={"PROMETHEUS_RETENTION": "90d"})["services"]["prometheus"]["command"]
    assert "--storage.tsdb.retention.time=90d" in command


def test_nvidias_gpus_are_reserved_and_their_processes_seen(config: Config) -> None:
    exporter = config("nvidia")["services"]["exporter"]
    assert exporter["pid"] == "host"
    assert exporter["environment"]["KVSCOPE_GPU"] == "nvml"
    (device,) = exporter["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", -1, ["gpu", "utility"])


def test_amds_devices_are_given_under_numbered_groups(config: Config) -> None:
    exporter = config("amd")["services"]["exporter"]
    assert exporter["pid"] == "host"
    assert exporter["environment"]["KVSCOPE_GPU"] == "amdgpu"
    assert [device["source"] for device in exporter["devices"]] == ["/dev/dri", "/dev/kfd"]
    assert exporter["group_add"] == ["992", "44"]


@pytest.mark.parametrize("missing", GROUPS)
def test_a_missing_group_is_named_with_the_way_out(missing: str, tmp_path: Path) -> None:
    settings = {name: value for name, value in GROUPS.items() if name != missing}
    answer = compose.asked("amd", settings, tmp_path)
    assert answer.returncode != 0
    assert missing in answer.stderr
    assert "getent group" in answer.stderr


def test_prometheus_reads_its_settings() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not on PATH: run `make tools`")
    answer = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", str(ROOT / "deploy/prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr


def test_alertmanager_reads_its_settings() -> None:
    if shutil.which("amtool") is None:
        pytest.skip("amtool is not on PATH: run `make tools`")
    answer = subprocess.run(
        ["amtool", "check-config", str(ROOT / "deploy/alertmanager.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr


def test_all_rules_are_loaded() -> None:
    assert sorted(PROMETHEUS["rule_files"]) == sorted(
        f"alerts/{path.name}" for path in ROOT.glob("alerts/*.yml")
    )


def test_the_demo_tells_where_its_last_five_minutes_are(config: Config) -> None:
    service = config(profiles=["demo"])["services"]["demo"]
    (alias,) = service["networks"]["default"]["aliases"]
    assert alias == "kvscope-demo"
    pages = service["environment"]["KVSCOPE_PAGES"]
    assert pages.startswith("http://127.0.0.1:3000/d/kvscope-session?from=now-5m&to=now&")
    assert (ROOT / "dashboards/generated/kvscope-session.json").is_file()


def test_the_demo_is_found_by_a_name_so_that_its_absence_is_no_target(config: Config) -> None:
    (job,) = [job for job in PROMETHEUS["scrape_configs"] if job["job_name"] == "kvscope"]
    (by_name,) = job["dns_sd_configs"]
    (alias,) = config(profiles=["demo"])["services"]["demo"]["networks"]["default"]["aliases"]
    assert by_name["names"] == [f"{alias}."]
    assert job["static_configs"] == [{"targets": ["exporter:10188"]}]


def test_grafana_knows_how_often_prometheus_looks() -> None:
    text = (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    (source,) = yaml.safe_load(text)["datasources"]
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_the_page_that_grafana_opens_with_is_one_that_is_made() -> None:
    grafana = (ROOT / "deploy/grafana/grafana.ini").read_text()
    name = re.search(r"default_home_dashboard_path = /etc/kvscope/dashboards/(.+)\n", grafana)
    assert name
    assert (ROOT / "dashboards/generated" / name[1]).is_file()
