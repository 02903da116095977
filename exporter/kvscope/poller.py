"""Looks at one server again and again, feeds its history, publishes its box.

How often, and which endpoints are left alone when, is docs/decisions/0011-polling.md.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable

from kvscope.observed.server import (
    ServerCounters,
    ServerLook,
    ServerProcess,
    ServerProps,
    ServerState,
    SlotSeen,
    Source,
    SourceAnswer,
)
from kvscope.settings import ServerSettings, Settings
from kvscope.snapshot import ServerBox
from kvscope.sources.llama_server import AnswerError, Failure, LlamaServer
from kvscope.sources.server_process import NotReadableError, find_server_process, is_alive
from kvscope.tracking.history import History, advance, counters_moved, looks_restarted
from kvscope.tracking.publish import box, expires_at

log = logging.getLogger(__name__)

COUNTERS_AT_LEAST_EVERY_SECONDS = 30.0
COUNTERS_WHILE_ALL_BUSY_SECONDS = 5.0
PROPS_EVERY_SECONDS = 30.0
PROCESS_EVERY_SECONDS = 10.0
LONGEST_BACK_OFF_SECONDS = 30.0
COUNTER_READINGS_A_LOOK = 2
"""A second one only when a request ended between the two looks around the first."""

_WORTH_BACKING_OFF = frozenset(
    {ServerState.UNREACHABLE, ServerState.UNAUTHORIZED, ServerState.NOT_LLAMA_SERVER}
)


class Poller:
    """Watches one server: asynchronous, one look at a time, read-only.

    publish is called with the server's box after each look, and again when a reading ages out.
    """

    def __init__(
        self,
        server: ServerSettings,
        settings: Settings,
        publish: Callable[[ServerBox], None],
        *,
        client: LlamaServer | None = None,
        find_process: Callable[[ServerSettings], ServerProcess] = find_server_process,
    ) -> None:
        self._server = server
        self._settings = settings
        self._publish = publish
        self._client = client or LlamaServer(server)
        self._find_process = find_process
        self._history = History(server.name)
        self._failed_looks = 0
        self._process: ServerProcess | None = None
        self._process_looked_at: float | None = None
        self._metrics_offered: bool | None = None
        self._told: set[str] = set()
        self._problems: dict[Source, str] = {}

    async def run(self) -> None:
        """Look for ever; cancel to stop. Closes the client's connections at the end."""
        try:
            while True:
                await self.look_once()
                await self._wait(self._delay())
        finally:
            await self._client.close()

    async def look_once(self) -> ServerBox:
        """Look once at everything that is due, publish the server's box and return it."""
        before = self._history.state if self._history.looks else None
        restarts = self._history.restarts
        await self._look()
        state = self._history.state
        self._failed_looks = self._failed_looks + 1 if state in _WORTH_BACKING_OFF else 0
        if state is not before:
            level = logging.INFO if state is ServerState.READY else logging.WARNING
            problem = self._history.problem
            self._say(level, f"is {state.value}" + (f": {problem}" if problem else ""))
        if self._history.restarts > restarts:
            self._say(logging.INFO, "was restarted; its slots are empty")
        return self._publish_now()

    # --- one look ---------------------------------------------------------------------------------

    async def _look(self) -> None:
        history = self._history
        try:
            props = await self._client.props() if self._props_due() else None
        except AnswerError as error:
            self._advance(await self._state_without_props(error))
            return
        if props is not None:
            self._tell_notes()
        await self._look_at_process()
        sleeping_before = history.state is ServerState.SLEEPING
        if props is not None and props.sleeping:
            self._advance(ServerState.SLEEPING, props=props, counters=await self._counters(props))
            return
        moved = False
        if self._slots_better_left_alone(props):
            counters = await self._counters(props)
            if counters is not None:
                moved = counters_moved(history, counters)
                if not moved:
                    self._advance(ServerState.READY, props=props, counters=counters, quiet=True)
                    return
            elif not (sleeping_before and self._metrics_usable(props) is False):
                self._advance(ServerState.READY, props=props)
                return
        await self._look_at_slots(props, moved)

    async def _look_at_slots(self, props: ServerProps | None, moved: bool) -> None:
        slots, state = await self._slots()
        if slots is None:
            counters = None
            if state is ServerState.SLOTS_DISABLED and self._counters_due():
                counters = await self._counters(props)
            self._advance(state, props=props, counters=counters)
            return
        self._tell_notes()
        new = not self._history.tracks or looks_restarted(self._history, slots)
        if not new:
            self._advance(ServerState.READY, slots, props=props)
            props = None
        usable = self._metrics_usable(props)
        if usable is False or not (new or moved or self._history.awaits_counters or self._counters_due()):
            if new:
                self._advance(ServerState.READY, slots, props=props)
            return
        await self._settle(slots, props, new)

    async def _settle(self, slots: tuple[SlotSeen, ...], props: ServerProps | None, new: bool) -> None:
        """Read the counters between two looks at /slots, so that both belong together."""
        counters: ServerCounters | None = None
        consistent = False
        for _ in range(COUNTER_READINGS_A_LOOK):
            newer = await self._counters(props)
            if newer is None:
                break
            counters = newer
            after, state = await self._slots()
            if after is None:
                self._advance(state, props=props)
                return
            consistent = _signature(slots) == _signature(after)
            ended_between = _busy(slots) - _busy(after) or _tasks(after) != _tasks(slots)
            slots = after
            if consistent or not ended_between:
                break
        if counters is None and new and self._history.tracks and self._metrics_usable(props):
            # Whether this is a new process only the counters tell: believe the slots next time.
            self._advance(self._history.state, props=props)
            return
        self._advance(ServerState.READY, slots, props=props, counters=counters, consistent=consistent)

    async def _slots(self) -> tuple[tuple[SlotSeen, ...] | None, ServerState]:
        try:
            return await self._client.slots(), ServerState.READY
        except AnswerError as error:
            match error.failure:
                case Failure.NOT_OFFERED | Failure.NOT_FOUND:
                    return None, ServerState.SLOTS_DISABLED
                case Failure.UNAUTHORIZED:
                    return None, ServerState.UNAUTHORIZED
                case Failure.LOADING:
                    return None, ServerState.LOADING
                case Failure.LATE:
                    return None, await self._state_when_late()
                case Failure.UNREACHABLE:
                    return None, ServerState.UNREACHABLE
            return None, ServerState.READY  # /props was understood: only this source is broken

    async def _counters(self, props: ServerProps | None) -> ServerCounters | None:
        if self._metrics_usable(props) is False:
            return None
        try:
            return await self._client.counters()
        except AnswerError as error:
            if error.failure in (Failure.NOT_OFFERED, Failure.NOT_FOUND):
                self._metrics_offered = False
            return None

    def _metrics_usable(self, props: ServerProps | None) -> bool | None:
        """Whether /metrics can be read: by the settings, by /props, or by its last answer."""
        if not self._settings.server_metrics:
            return False
        props = props or self._history.props
        if props is not None and props.metrics_endpoint is not None:
            return props.metrics_endpoint
        return self._metrics_offered

    async def _state_without_props(self, error: AnswerError) -> ServerState:
        match error.failure:
            case Failure.UNAUTHORIZED:
                return ServerState.UNAUTHORIZED
            case Failure.LOADING:
                return ServerState.LOADING
            case Failure.LATE:
                return await self._state_when_late()
            case Failure.UNREACHABLE | Failure.CUT_OFF:
                return ServerState.UNREACHABLE
            case Failure.NOT_FOUND | Failure.NOT_OFFERED | Failure.BROKEN:
                return ServerState.NOT_LLAMA_SERVER

    async def _state_when_late(self) -> ServerState:
        """Older builds answer only between two batches: late is not down while a prompt is read.

        A prompt that began since the last look makes it late as well: /health tells then.
        """
        if self._history.props is None:
            return ServerState.UNREACHABLE
        if self._history.any_prefill or await self._client.healthy():
            return ServerState.STALLED
        return ServerState.UNREACHABLE

    # --- what is due --------------------------------------------------------------------------------

    def _props_due(self) -> bool:
        history = self._history
        if history.props is None or history.props_seen is None or history.state is not ServerState.READY:
            return True
        if time.monotonic() - history.props_seen >= PROPS_EVERY_SECONDS:
            return True
        return self._idle() and self._may_sleep(None) is not False

    def _idle(self) -> bool:
        return not self._history.any_busy and not self._history.awaits_counters

    def _counters_due(self) -> bool:
        seen = self._history.counters_seen
        if seen is None:
            return True
        wait = COUNTERS_WHILE_ALL_BUSY_SECONDS if self._history.all_busy else COUNTERS_AT_LEAST_EVERY_SECONDS
        return time.monotonic() - seen >= wait

    def _may_sleep(self, props: ServerProps | None) -> bool | None:
        setting = self._server.sleep_idle
        if setting == "off":
            return False
        if setting != "auto":
            return True
        props = props or self._history.props
        if props is not None and props.sleeping is None:
            return False  # a build that cannot sleep
        if self._process is not None:
            return self._process.sleep_idle_seconds is not None
        return None

    def _slots_better_left_alone(self, props: ServerProps | None) -> bool:
        """Whether a request to /slots might keep an idle server from its sleep."""
        may_sleep = self._may_sleep(props)
        usable = self._metrics_usable(props) is not False
        if may_sleep is None and not usable:
            self._tell_once(
                logging.INFO,
                "whether it may sleep is not known, and it has no /metrics: /slots is looked at as usual. "
                "If it was started with --sleep-idle-seconds, say so with --sleep-idle, or it stays awake",
            )
            return False
        if may_sleep and not usable:
            self._tell_once(
                logging.WARNING,
                "may sleep and has no /metrics: /slots is left alone once it is idle, so requests are seen "
                "only after it slept. Start it with --metrics to see them all",
            )
        return may_sleep is not False and bool(self._history.tracks) and self._idle()

    async def _look_at_process(self) -> None:
        now = time.monotonic()
        if self._process is not None and not is_alive(self._process):
            self._process = self._process_looked_at = None
        if self._process_looked_at is not None and now - self._process_looked_at < PROCESS_EVERY_SECONDS:
            return
        if self._process is not None:
            self._process_looked_at = now
            return
        self._process_looked_at = now
        try:
            self._process = await asyncio.to_thread(self._find_process, self._server)
        except NotReadableError as error:
            self._tell_once(
                logging.INFO,
                f"its process cannot be read: {error}. Its start time and its flags stay unknown; "
                "--sleep-idle tells whether it may sleep",
            )

    # --- out ------------------------------------------------------------------------------------------

    def _advance(
        self,
        state: ServerState,
        slots: tuple[SlotSeen, ...] | None = None,
        *,
        props: ServerProps | None = None,
        counters: ServerCounters | None = None,
        consistent: bool = True,
        quiet: bool = False,
    ) -> None:
        answers = self._client.take_answers()
        self._tell_problems(answers)
        usable = self._metrics_usable(props)
        self._history = advance(
            self._history,
            ServerLook(
                at=time.time(),
                monotonic=time.monotonic(),
                state=state,
                slots=slots,
                counters=counters,
                consistent=consistent,
                quiet=quiet,
                props=props,
                process=self._process,
                process_readable=self._process is not None,
                metrics_available=True if counters is not None else usable,
                answers=answers,
                intervals=self._intervals(props),
            ),
        )

    def _intervals(self, props: ServerProps | None) -> tuple[tuple[Source, float], ...]:
        busy, idle = self._settings.busy_interval_seconds, self._settings.idle_interval_seconds
        quiet = self._slots_better_left_alone(props)
        usable = self._metrics_usable(props) is not False
        every = idle if quiet else COUNTERS_AT_LEAST_EVERY_SECONDS
        if self._history.all_busy:
            every = COUNTERS_WHILE_ALL_BUSY_SECONDS
        return (
            (Source.SLOTS, idle if self._idle() else busy),
            (Source.PROPS, idle if quiet else PROPS_EVERY_SECONDS),
            *(((Source.METRICS, every),) if usable else ()),
        )

    def _delay(self) -> float:
        busy, idle = self._settings.busy_interval_seconds, self._settings.idle_interval_seconds
        if self._failed_looks:
            longest = min(LONGEST_BACK_OFF_SECONDS, idle * 2 ** min(self._failed_looks - 1, 10))
            return longest * random.uniform(0.5, 1.0)
        return busy if self._history.state is ServerState.READY and not self._idle() else idle

    async def _wait(self, seconds: float) -> None:
        """Wait for the next look; publish again when a reading ages out meanwhile."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            expiry = expires_at(self._history, time.monotonic())
            if expiry is None or expiry >= until:
                await asyncio.sleep(left)
                return
            await asyncio.sleep(max(0.01, expiry - time.monotonic()) + 0.01)
            self._publish_now()

    def _publish_now(self) -> ServerBox:
        published = box(self._history, time.monotonic())
        self._publish(published)
        return published

    # --- words ----------------------------------------------------------------------------------------

    def _say(self, level: int, words: str) -> None:
        log.log(level, "server %s %s", self._server.name, words, extra={"server": self._server.name})

    def _tell_once(self, level: int, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            self._say(level, words)

    def _tell_notes(self) -> None:
        if self._client.notes and len(self._told) < 100:
            self._tell_once(logging.WARNING, self._client.notes[0])

    def _tell_problems(self, answers: Iterable[SourceAnswer]) -> None:
        """One line when a source begins to fail or fails otherwise; one when it is back."""
        for answer in answers:
            told = self._problems.get(answer.source)
            if answer.problem is None:
                if told is not None:
                    del self._problems[answer.source]
                    self._say(logging.INFO, f"answers /{answer.source.value} again")
            elif told != answer.problem:
                self._problems[answer.source] = answer.problem
                self._say(logging.WARNING, answer.problem)


def _signature(slots: Iterable[SlotSeen]) -> tuple[object, ...]:
    """What must not change around a reading of the counters: who works, on what, how far."""
    return tuple(
        (slot.id, slot.task, slot.processing, slot.phase, None if slot.processing else slot.held_tokens)
        for slot in slots
    )


def _busy(slots: Iterable[SlotSeen]) -> set[int]:
    return {slot.id for slot in slots if slot.processing}


def _tasks(slots: Iterable[SlotSeen]) -> dict[int, int | None]:
    return {slot.id: slot.task for slot in slots if not slot.processing}
