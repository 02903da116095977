"""Alerts on a real stack: what is staged reaches Alertmanager, and a healthy session alerts nobody.

The staged servers are judged by a copy of the rules in which every duration is shorter by one factor; the
healthy ones by the rules as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import promql_parser as promql
import pytest
import yaml
from stack import MODES
from tests.alerts.rules import RULE_FILES, Rule, rules
from tests.truth.driver import DidNotHappen, Exporter, Server, free_port, until

from kvscope.commands.demo import SLOW_FLAGS
from kvscope.demo.session import AgentSession
from kvscope.demo.tiny_model import write_tiny_model

FACTOR = 15
"""A scrape a second instead of one in 15 s, and all else as much faster."""
FAST = "fast"
ALERT_SECONDS = 240.0
"""The pretend GPU's game needs 80 s to take the memory."""
SLOT_TOKENS = 4096
POOL_TOKENS = 8192

LONGER_THAN_THE_STAGE = "|".join(
    rule.name
    for rule in rules()
    if rule.alerts and promql.parse_duration(rule.fields["for"]) >= timedelta(minutes=5)
)
"""Alerts that cannot fire while it lasts: of the healthy they must not even be pending."""

REACHES = {
    "a game starts": ("VramSqueezedByOtherProcess", {"gpu": "pretend0"}),
    "a game takes all that is left": ("VramAlmostExhausted", {"gpu": "pretend0"}),
    "a slot is nearly full": ("KvSlotNearlyFull", {"server": "slot"}),
    "the pool is nearly full": ("KvPoolNearlyFull", {"server": "pool"}),
    "more is asked than a slot can do": ("SlotsSaturated", {"server": "queue"}),
    "a server dies": ("LlamaServerDown", {"server": "mortal"}),
    "an exporter ends": ("KvExporterDown", {}),
}
"""What is staged: the alert that must reach Alertmanager, and labels that it must have."""


@dataclass
class Programs:
    """A Prometheus and an Alertmanager on a folder of their own."""

    folder: Path
    prometheus_port: int = field(default_factory=free_port)
    alertmanager_port: int = field(default_factory=free_port)
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, targets: Sequence[str]) -> None:
        """Start both on the rules and their fast copy."""
        fast = self.folder / "fast.yml"
        fast.write_text(json.dumps(faster()))
        settings = self.folder / "prometheus.yml"
        # JSON is YAML too.
        settings.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [*(str(file) for file in RULE_FILES), str(fast)],
                    "alerting": {
                        "alertmanagers": [
                            {"static_configs": [{"targets": [f"127.0.0.1:{self.alertmanager_port}"]}]}
                        ]
                    },
                    "scrape_configs": [
                        {"job_name": "kvscope", "static_configs": [{"targets": list(targets)}]}
                    ],
                }
            )
        )
        receiver = self.folder / "alertmanager.yml"
        receiver.write_text(json.dumps({"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]}))
        self._run(
            "prometheus",
            f"--config.file={settings}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.prometheus_port}",
        )
        self._run(
            "prometheus-alertmanager",
            f"--config.file={receiver}",
            f"--storage.path={self.folder / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{self.alertmanager_port}",
            "--cluster.listen-address=",
        )

    def stop(self) -> None:
        """End both."""
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what Prometheus makes of an expression now."""
        answer = self._ask(self.prometheus_port, "/api/v1/query?" + urlencode({"query": expression}))
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def rule_problems(self) -> dict[str, str]:
        """Return the last error of each rule that has one."""
        groups = self._ask(self.prometheus_port, "/api/v1/rules")["data"]["groups"]
        return {
            rule["name"]: rule.get("lastError", rule["health"])
            for group in groups
            for rule in group["rules"]
            if rule["health"] != "ok"
        }

    def notified(self) -> list[dict[str, Any]]:
        """Return the alerts that Alertmanager has."""
        alerts: list[dict[str, Any]] = self._ask(self.alertmanager_port, "/api/v2/alerts")
        return alerts

    def _run(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.log").open("wb") as log:
            self._running.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def _ask(self, port: int, path: str) -> Any:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return json.load(answer)


def faster() -> Mapping[str, Any]:
    """Return the alerts with every duration divided by the factor, told apart by a label."""
    return {"groups": [{"name": FAST, "rules": [_faster(rule) for rule in rules() if rule.alerts]}]}


def _faster(rule: Rule) -> Mapping[str, Any]:
    def shorter(duration: str) -> str:
        seconds = promql.parse_duration(duration) / timedelta(seconds=FACTOR)
        return f"{round(seconds * 1000)}ms"

    expr = re.sub(r"\[(\w+)\]", lambda found: f"[{shorter(found[1])}]", rule.expr)
    # How far a forecast looks ahead is a number of seconds.
    expr = re.sub(r", (\d+)\)", lambda found: f", {int(found[1]) / FACTOR})", expr)
    return {
        **rule.fields,
        "expr": expr,
        "for": shorter(rule.fields["for"]),
        "labels": {**rule.fields["labels"], "pace": FAST},
    }


class Stage:
    """Healthy servers with their exporters, others to which something happens, and who watches all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ending = contextlib.AsyncExitStack()
        self.programs = Programs(folder)
        self.healthy: dict[str, str] = {}
        self.alerts: dict[str, dict[str, Any] | DidNotHappen] = {}
        self.recovered = False
        self.false_alarms: list[dict[str, Any]] = []
        self.rule_problems: dict[str, str] = {}

    async def play(self) -> None:
        """Stage everything at once, the healthy sessions beside it, and note what came of it."""
        model = await asyncio.to_thread(write_tiny_model, self._folder / "tiny.gguf")
        sessions = {mode: await self._server(model, *SLOW_FLAGS, *flags) for mode, flags in MODES.items()}
        exporters = {
            mode: await self._exporter(mode, {"main": server.url}, "--gpu", "pretend")
            for mode, server in sessions.items()
        }
        self.healthy = {mode: f"127.0.0.1:{exporter.port}" for mode, exporter in exporters.items()}
        slot = await self._server(model, "-np", "2", "-c", str(2 * SLOT_TOKENS))
        pool = await self._server(model, "-c", str(POOL_TOKENS))
        queue = await self._server(model, "-np", "1", "-c", "1024")
        mortal = await self._server(model, "-c", "1024")
        watched = {"slot": slot.url, "pool": pool.url, "queue": queue.url, "mortal": mortal.url}
        staged = await self._exporter("staged", watched, "--gpu", "none")
        ends = await self._exporter("ends", {"main": mortal.url}, "--gpu", "none")
        game = await self._exporter("game", {"main": sessions["default"].url}, "--gpu", "pretend:game")
        everyone = [f"127.0.0.1:{each.port}" for each in (*exporters.values(), staged, ends, game)]
        self._ending.callback(self.programs.stop)
        self.programs.start(everyone)
        await until("a first scrape of every exporter", self._scraped(everyone))

        async with asyncio.TaskGroup() as playing:
            healthy = [
                playing.create_task(AgentSession(server.url, lambda story: None).run())
                for server in sessions.values()
            ]
            happens: Mapping[str, tuple[Exporter, Callable[[], Awaitable[None]]]] = {
                "a game starts": (game, _nothing),
                "a game takes all that is left": (game, _nothing),
                "a slot is nearly full": (staged, lambda: _converse(slot, SLOT_TOKENS)),
                "the pool is nearly full": (staged, lambda: _converse(pool, POOL_TOKENS)),
                "more is asked than a slot can do": (staged, lambda: _crowd(queue)),
                "a server dies": (staged, mortal.kill),
                "an exporter ends": (ends, ends.stop),
            }
            await asyncio.gather(*(self._notified(what, *how) for what, how in happens.items()))
            await self._recovers(mortal, f"127.0.0.1:{staged.port}")
            for session in healthy:
                session.cancel()
        for state in ('alertstate="firing"', f'alertstate="pending", alertname=~"{LONGER_THAN_THE_STAGE}"'):
            self.false_alarms += self.programs.query(
                f'last_over_time(ALERTS{{{state}, pace="", instance=~"{self._healthy}"}}[1h])'
            )
        self.rule_problems = self.programs.rule_problems()

    async def stop(self) -> None:
        """End everything."""
        await self._ending.aclose()

    @property
    def _healthy(self) -> str:
        return "|".join(self.healthy.values())

    async def _server(self, model: Path, *flags: str) -> Server:
        server = Server(model, [*flags, "--metrics", "-t", "1"])
        self._ending.push_async_callback(server.stop)
        await server.start()
        return server

    async def _exporter(self, name: str, servers: Mapping[str, str], *flags: str) -> Exporter:
        exporter = Exporter(servers, self._folder / f"{name}.exporter.log", "--sleep-idle", "off", *flags)
        self._ending.push_async_callback(exporter.stop)
        await exporter.start(*servers)
        return exporter

    def _scraped(self, targets: Sequence[str]) -> Callable[[], Awaitable[bool]]:
        async def scraped() -> bool:
            with contextlib.suppress(OSError):
                up = self.programs.query("kvscope_server_up == 1 and on (instance) up == 1")
                return {each["metric"]["instance"] for each in up} == set(targets)
            return False

        return scraped

    async def _notified(self, what: str, exporter: Exporter, happens: Callable[[], Awaitable[None]]) -> None:
        name, labels = REACHES[what]
        wanted = {"alertname": name, "pace": FAST, "instance": f"127.0.0.1:{exporter.port}"} | labels

        async def notified() -> dict[str, Any] | None:
            for alert in await asyncio.to_thread(self.programs.notified):
                if wanted.items() <= alert["labels"].items():
                    return alert
            return None

        going_on = asyncio.ensure_future(happens())
        try:
            self.alerts[what] = await until(f"{name} in Alertmanager", notified, ALERT_SECONDS)
        except DidNotHappen as missed:
            self.alerts[what] = missed
        finally:
            going_on.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await going_on

    async def _recovers(self, server: Server, instance: str) -> None:
        await server.start()

        async def silent() -> bool:
            firing = f'ALERTS{{alertname="LlamaServerDown", pace="{FAST}", instance="{instance}"}}'
            return not await asyncio.to_thread(self.programs.query, firing)

        with contextlib.suppress(DidNotHappen):
            self.recovered = await until("the server's alert ends", silent, ALERT_SECONDS)


async def _nothing() -> None:
    """What happens is in the script of the pretend GPU."""


async def _converse(server: Server, limit: int) -> None:
    """Go on with a conversation that holds 92 % of what fits, a few tokens a turn."""
    prompt = [3 + number % 200 for number in range(limit)]
    while True:
        for tokens in range(int(0.92 * limit), int(0.98 * limit), 8):
            await server.complete(prompt[:tokens], 4)


async def _crowd(server: Server) -> None:
    """Three ask all the time where one can be served."""

    async def ask(who: int) -> None:
        while True:
            await server.complete([3 + who] * 64, 16)

    await asyncio.gather(*(ask(who) for who in range(3)))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The stage when all is over; Prometheus and Alertmanager still run."""
    for program in ("prometheus", "prometheus-alertmanager"):
        if not shutil.which(program):
            pytest.skip(f"{program} is missing: make tools")
    with asyncio.Runner() as loop:
        stage = Stage(tmp_path_factory.mktemp("alerts"))
        try:
            loop.run(stage.play())
            yield stage
        finally:
            loop.run(stage.stop())


@pytest.mark.parametrize("what", REACHES)
def test_what_is_staged_reaches_alertmanager(stage: Stage, what: str) -> None:
    alert = stage.alerts[what]
    assert not isinstance(alert, DidNotHappen), str(alert)
    name, _ = REACHES[what]
    assert alert["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
    assert alert["annotations"]["summary"]
    assert "<no value>" not in json.dumps(alert["annotations"])


def test_an_alert_ends_when_its_server_is_back(stage: Stage) -> None:
    assert stage.recovered


def test_a_healthy_session_alerts_nobody_in_either_mode(stage: Stage) -> None:
    assert len(stage.healthy) == len(MODES)
    assert stage.false_alarms == []


def test_every_rule_can_be_evaluated(stage: Stage) -> None:
    assert stage.rule_problems == {}


def test_the_fast_copy_changes_durations_only() -> None:
    originals = {rule.name: rule.fields for rule in rules() if rule.alerts}
    copies = {fields["alert"]: fields for fields in faster()["groups"][0]["rules"]}
    assert copies.keys() == originals.keys()
    without = re.compile(r"\[\w+\]|, [\d.]+\)")
    for name, copy in copies.items():
        assert without.sub("", copy["expr"]) == without.sub("", originals[name]["expr"])
        assert copy["expr"] != originals[name]["expr"] or "[" not in copy["expr"]
    assert copies["KvSourceStale"]["for"] == "8000ms"
    assert "[5760000ms]" in copies["KvSourceStale"]["expr"]
    assert ", 240.0) < 0" in copies["VramFillForecast"]["expr"]
    assert yaml.safe_load(json.dumps(faster()))
