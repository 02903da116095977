"""The whole stack on a Docker engine, beside a real llama.cpp server on this machine: `make compose-test`.

The tests go in the order in which somebody meets the stack, and each leaves it running for the next.
docs/COMPOSE.md says where images come from without a registry.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvscope.demo.running_server import RunningServer, start_server
from kvscope.demo.tiny_model import write_tiny_model
from tests.compose import compose

PROJECT = "kvscope-stack-test"
SERVICES = ("exporter", "alertmanager", "prometheus", "grafana")
HAPPENS_WITHIN_SECONDS = 120.0
NOT_READY = (OSError, ValueError, KeyError, IndexError, StopIteration)

CONTEXT = 16384
BYTES_PER_TOKEN = 4 * 2 * 64 * 2
"""Of the tiny model: 4 layers, K and V, 2 heads of 32 numbers, 2 bytes each."""

PROMPT_TOKENS = 1000
ANSWER_TOKENS = 10


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)


def missing() -> str | None:
    if compose.program() is None:
        return "Docker Compose is not on PATH: run `make tools`"
    try:
        engine = docker("info", "--format", "{{.ServerVersion}}")
    except FileNotFoundError:
        return "docker is not on PATH: install Docker"
    return None if engine.returncode == 0 else "no Docker engine answers: start one"


REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Stack(NamedTuple):
    """The running stack: its settings, and where each part is reached."""

    env_file: Path
    ports: dict[str, int]
    server: RunningServer

    def compose(self, *arguments: str) -> str:
        """Run Compose; the test fails with its words where it fails."""
        answer = compose.run(*arguments, env_file=self.env_file, project=PROJECT)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    def ask(self, service: str, path: str, data: object = None, **headers: str) -> Any:
        """Return what a part answers, read as JSON where it is."""
        body = self.text(service, path, data, **headers)
        return json.loads(body)

    def text(self, service: str, path: str, data: object = None, **headers: str) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[service]}{path}",
            data=None if data is None else json.dumps(data).encode(),
            headers={"Content-Type": "application/json", **headers},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    def status(self, service: str, path: str, data: object = None, **headers: str) -> int:
        """Return the HTTP status that a part answers with."""
        try:
            self.text(service, path, data, **headers)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return what Prometheus says now: labels and value of each series."""
        answer = self.ask("prometheus", "/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def up(self) -> dict[str, float]:
        """Return the exporters that Prometheus scrapes, and whether they answer."""
        return {labels["instance"]: value for labels, value in self.query('up{job="kvscope"}')}

    def health(self) -> dict[str, str]:
        """Return each running part's health."""
        lines = self.compose("ps", "--format", "json").splitlines()
        return {each["Service"]: each["Health"] for each in map(json.loads, lines)}

    def in_container(self, service: str, command: str) -> str:
        """Return what a shell in a part's container says."""
        answer = compose.run(
            "exec", "-T", service, "sh", "-c", command, env_file=self.env_file, project=PROJECT
        )
        return answer.stdout + answer.stderr


def soon(what: str, found: Callable[[], Any]) -> Any:
    """Return the first true value of found; a part that does not answer yet is asked again."""
    deadline = time.monotonic() + HAPPENS_WITHIN_SECONDS
    while True:
        try:
            value = found()
        except NOT_READY:
            value = None
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {HAPPENS_WITHIN_SECONDS:.0f} s: {what}"
        time.sleep(0.5)


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("compose")
    models = folder / "models"
    models.mkdir()
    for path in (models, folder, *folder.parents[:2]):
        path.chmod(0o755)  # the exporter is another user
    models.chmod(0o777)
    model = write_tiny_model(models / "tiny.gguf")
    ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
    with start_server(
        model, "--host", "0.0.0.0", "-c", str(CONTEXT), "-np", "2", "--metrics", "-a", "tiny"
    ) as server:
        settings = {
            "LLAMA_SERVER_URL": f"http://host.docker.internal:{urllib.parse.urlsplit(server.url).port}",
            "LLAMA_SERVER_ARGS": f"-c {CONTEXT} -np 2",
            "LLAMA_SERVER_SLEEP_IDLE": "off",
            "MODELS_DIR": str(models),
            **{f"{service.upper()}_PORT": str(port) for service, port in ports.items()},
        }
        env_file = folder / "settings.env"
        env_file.write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))
        running = Stack(env_file, ports, server)
        try:
            running.compose("--profile", "demo", "build", "--quiet")
            running.compose("up", "--detach", "--wait", "--no-build")
            yield running
        finally:
            compose.run(
                "--profile", "demo", "down", "--volumes", "--timeout", "5", env_file=env_file, project=PROJECT
            )


def exporter_figures(stack: Stack) -> dict[str, float]:
    lines = stack.text("exporter", "/metrics").splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_every_part_is_healthy(stack: Stack) -> None:
    assert stack.health() == dict.fromkeys(SERVICES, "healthy")


@pytest.mark.parametrize("service", SERVICES)
def test_a_part_is_no_root_and_cannot_change_its_own_files(service: str, stack: Stack) -> None:
    assert stack.in_container(service, "id -u").strip() not in ("", "0")
    assert "Read-only file system" in stack.in_container(service, "touch /probe")
    status = stack.in_container(service, "cat /proc/1/status")
    assert "NoNewPrivs:\t1\n" in status
    for kind in ("CapPrm", "CapEff", "CapBnd"):
        assert f"{kind}:\t{0:016x}\n" in status


def test_models_cannot_be_changed(stack: Stack) -> None:
    assert "Read-only file system" in stack.in_container("exporter", "touch /models/probe")


def test_the_exporter_knows_what_the_servers_slots_hold_in_bytes(stack: Stack) -> None:
    request = urllib.request.Request(
        f"{stack.server.url}/completion",
        data=json.dumps(
            {
                "prompt": [7 + number % 200 for number in range(PROMPT_TOKENS)],
                "n_predict": ANSWER_TOKENS,
                "ignore_eos": True,
            }
        ).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["timings"]["prompt_n"] == PROMPT_TOKENS

    # The last token of an answer is sampled but not yet in the cache.
    held = (PROMPT_TOKENS + ANSWER_TOKENS - 1) * BYTES_PER_TOKEN

    def found() -> bool:
        figures = exporter_figures(stack)
        slots = [value for name, value in figures.items() if name.startswith("kvscope_slot_kv_bytes{")]
        return sorted(slots) == [0, held]

    soon(f"{held} bytes in one slot", found)
    figures = exporter_figures(stack)
    allocated = 'kvscope_kv_allocated_bytes{cache="full",model="tiny",server="main"}'
    assert figures[allocated] == CONTEXT * BYTES_PER_TOKEN


def test_prometheus_scrapes_what_is_there_and_misses_nobody(stack: Stack) -> None:
    soon("the exporter is scraped", lambda: stack.up() == {"exporter:10188": 1.0})
    managers = stack.ask("prometheus", "/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
    assert [each["url"] for each in managers] == ["http://alertmanager:9093/api/v2/alerts"]
    groups = stack.ask("prometheus", "/api/v1/rules")["data"]["groups"]
    assert sum(len(group["rules"]) for group in groups) > 0
    assert stack.ask("prometheus", "/api/v1/alerts")["data"]["alerts"] == []


def test_everybody_here_may_look_and_nobody_may_change(stack: Stack) -> None:
    dashboards = {each["uid"] for each in stack.ask("grafana", "/api/search?type=dash-db")}
    generated = {
        json.loads(path.read_text())["uid"] for path in compose.ROOT.glob("dashboards/generated/*.json")
    }
    assert dashboards == generated
    question = {
        "from": "now-1m",
        "to": "now",
        "queries": [
            {
                "refId": "A",
                "datasource": {"uid": "kvscope-prometheus"},
                "expr": "kvscope_server_up",
                "instant": True,
            }
        ],
    }
    result = stack.ask("grafana", "/api/ds/query", question)["results"]["A"]
    assert result["frames"][0]["data"]["values"][-1] == [1]
    assert stack.status("grafana", "/api/admin/settings") == 403
    assert stack.status("grafana", "/api/dashboards/db", {"dashboard": {"title": "mine"}}) == 403
    assert stack.status("grafana", "/login", {"user": "admin", "password": "admin"}) == 401


@pytest.mark.parametrize("service", SERVICES)
def test_a_restarted_part_comes_back(service: str, stack: Stack) -> None:
    before = stack.query('count_over_time(up{instance="exporter:10188"}[1h])')[0][1]
    stack.compose("restart", "--no-deps", service)
    soon(f"{service} is healthy", lambda: stack.health() == dict.fromkeys(SERVICES, "healthy"))
    soon("the exporter is scraped", lambda: stack.up() == {"exporter:10188": 1.0})
    soon(
        "figures from before the restart",
        lambda: stack.query('count_over_time(up{instance="exporter:10188"}[1h])')[0][1] > before,
    )
    assert exporter_figures(stack)['kvscope_server_up{server="main"}'] == 1
    assert stack.status("grafana", "/api/health") == 200


def test_a_password_brings_the_admin_and_only_with_it(stack: Stack, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("correct horse\n")
    password.chmod(0o644)
    named = stack.env_file.with_name("with-password.env")
    named.write_text(stack.env_file.read_text() + f"GRAFANA_ADMIN_PASSWORD_FILE='{password}'\n")
    answer = compose.run("up", "--detach", "--wait", "--no-build", "grafana", env_file=named, project=PROJECT)
    assert answer.returncode == 0, answer.stderr
    assert stack.status("grafana", "/login", {"user": "admin", "password": "admin"}) == 401
    assert stack.status("grafana", "/login", {"user": "admin", "password": "correct horse"}) == 200
    assert stack.status("grafana", "/api/search") == 200


def test_everything_moves_within_a_minute_of_the_demos_start(stack: Stack) -> None:
    stack.compose("--profile", "demo", "up", "--detach", "--wait", "--no-build", "demo")
    soon("both exporters are scraped", lambda: stack.up() == {"exporter:10188": 1.0, "demo:10188": 1.0})
    demo = 'instance="demo:10188"'
    for moving in (
        "kvscope_prompt_tokens_total",
        "kvscope_generated_tokens_total",
        "kvscope_gpu_energy_joules_total",
    ):
        soon(
            f"{moving} grows",
            lambda moving=moving: stack.query(f"sum(increase({moving}{{{demo}}}[1m])) > 0"),
        )
    soon("slots hold bytes", lambda: stack.query(f"sum(kvscope_slot_kv_bytes{{{demo}}}) > 0"))
    kinds = stack.query(f"count by (gpu) (kvscope_gpu_memory_by_kind_bytes{{{demo}}})")
    assert [labels["gpu"] for labels, _ in kinds] == ["pretend0"]


def test_the_demo_is_no_root_either(stack: Stack) -> None:
    assert stack.in_container("demo", "id -u").strip() == "10188"
    assert "Read-only file system" in stack.in_container("demo", "touch /probe")


def test_a_demo_that_ended_is_not_missed(stack: Stack) -> None:
    stack.compose("--profile", "demo", "stop", "demo")
    soon("the demo is no target", lambda: stack.up() == {"exporter:10188": 1.0})
    # For a moment it was one that did not answer: long before that is an alert, it is forgotten.
    soon("no alert is pending", lambda: stack.ask("prometheus", "/api/v1/alerts")["data"]["alerts"] == [])
