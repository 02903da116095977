"""Looks at one server again and again, feeds its history, publishes its box.

How often, and which endpoints are left alone when, is docs/decisions/0011-polling.md.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from kvscope.model_watch import MODEL_EVERY_SECONDS, ModelWatch
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
from kvscope.sources.model_file import ModelFile
from kvscope.sources.server_process import NotReadableError, find_server_process, is_alive
from kvscope.tracking.history import History, advance, counters_moved, looks_restarted, of_another_process
from kvscope.tracking.machine import ServerOnMachine
from kvscope.tracking.publish import STATES_UP, box, expires_at
from kvscope.tracking.vram import ServerLoad
from kvscope.words import Words

COUNTERS_AT_LEAST_EVERY_SECONDS = 30.0
COUNTERS_WHILE_ALL_BUSY_SECONDS = 5.0
PROPS_EVERY_SECONDS = 30.0
PROCESS_EVERY_SECONDS = 30.0
LONGEST_BACK_OFF_SECONDS = 30.0
FAILURES_UNTIL_BROKEN = 2
SHORTEST_SLEEP_SECONDS = 1.0
"""A slot that worked less than this ago cannot be asleep: the least that --sleep-idle-seconds takes."""
COUNTER_READINGS_A_LOOK = 2
"""A second one only when a request ended between the two looks around the first."""

_WORTH_BACKING_OFF = frozenset(
    {ServerState.UNREACHABLE, ServerState.UNAUTHORIZED, ServerState.NOT_LLAMA_SERVER}
)

_MAY_HAVE_BEEN_REPLACED = frozenset(ServerState) - {ServerState.READY, ServerState.SLEEPING}


class Poller:
    """Watches one server: asynchronous, one look at a time, read-only.

    publish is called with the server's box after each look, and again when a reading ages out.
    clock: Unix seconds; monotonic: seconds of a clock that never jumps.
    """

    def __init__(
        self,
        server: ServerSettings,
        settings: Settings,
        publish: Callable[[ServerBox], None],
        *,
        client: LlamaServer | None = None,
        find_process: Callable[[ServerSettings], ServerProcess] = find_server_process,
        process_lives: Callable[[ServerProcess], bool] = is_alive,
        model_file: ModelFile | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._settings = settings
        self._publish = publish
        self._client = client or LlamaServer(server)
        self._find_process = find_process
        self._process_lives = process_lives
        self._clock = clock
        self._monotonic = monotonic
        self._history = History(server.name, given=server.arguments)
        self._model = ModelWatch(server, model_file or ModelFile(server, settings.model_path_map), monotonic)
        self._failed_looks = 0
        self._pause_seconds = settings.idle_interval_seconds
        self._intervals: tuple[tuple[Source, float], ...] = ()
        self._restart_seen = False
        self._slots_are_new = False
        self._process: ServerProcess | None = None
        self._process_looked_at: float | None = None
        self._answers: list[SourceAnswer] = []
        self._asked: frozenset[Source] = frozenset()
        self._advanced_by: tuple[History, ServerLook] | None = None
        self._metrics_offered: bool | None = None
        self._metrics_asked_at: float | None = None
        self._metrics_failures = 0
        self._aging: asyncio.TimerHandle | None = None
        self._words = Words(server.name, monotonic)

    async def run(self) -> None:
        """Look for ever; cancel to stop. Closes the client's connections at the end."""
        try:
            while True:
                await self.look_once()
                await asyncio.sleep(self.pause_seconds())
        finally:
            if self._aging is not None:
                self._aging.cancel()
            self._model.stop()
            await self._client.close()

    async def look_once(self) -> ServerBox:
        """Look once at everything that is due, publish the server's box and return it."""
        before = self._history
        self._asked = frozenset()
        await self._look()
        after = self._history
        self._failed_looks = self._failed_looks + 1 if after.state in _WORTH_BACKING_OFF else 0
        if after.restarts > before.restarts:
            # Another process may serve another model and offer other endpoints.
            self._restart_seen = self._slots_are_new = self._model.may_be_new = True
            self._metrics_offered = None
            self._metrics_failures = 0
        self._decide_how_long_to_wait()
        self._words.tell_look(before if before.looks else None, after)
        self._tell_of_memory(after)
        return self._publish_now()

    def on_machine(self) -> ServerOnMachine:
        """Return the server's process and its load, as they are known at present."""
        history = self._history
        process = history.process
        return ServerOnMachine(
            history.name,
            process.pid if process else None,
            ServerLoad(
                logged=history.logged,
                memory=history.memory if history.memory.known else None,
                settings=history.settings,
                model=history.model_seen,
                asleep=history.state is ServerState.SLEEPING,
            ),
        )

    def pause_seconds(self) -> float:
        """Return how long to wait before the next look: longer while idle, and with each failure."""
        return self._pause_seconds

    # --- one look ---------------------------------------------------------------------------------

    async def _look(self) -> None:
        self._check_process()
        props: ServerProps | None = None
        if self._props_due():
            try:
                props = await self._props()
            except AnswerError as error:
                self._advance(await self._state_without_props(error))
                return
        await self._look_at_process()
        self._answers += await self._model.look(props or self._history.props, self._process)
        slept = self._history.state is ServerState.SLEEPING
        if props is not None and props.sleeping:
            readable = self._metrics_readable(props)
            self._advance(ServerState.SLEEPING, props=props, counters=await self._counters(props, readable))
            return
        if self._slots_offered(props) is False:
            counters = await self._counters(props, self._counters_due())
            self._advance(ServerState.SLOTS_DISABLED, props=props, counters=counters, consistent=False)
            return
        self._tell_what_sleep_hides(props)
        if not self._slots_left_alone(props):
            await self._look_at_slots(props)
        elif self._metrics_readable(props):
            counters = await self._counters(props)
            if counters is not None and counters_moved(self._history, counters):
                replaced = of_another_process(self._history, counters)
                await self._look_at_slots(props, moved=True, replaced=replaced)
            else:
                self._advance(ServerState.READY, props=props, counters=counters, quiet=counters is not None)
        elif slept:
            await self._look_at_slots(props)  # something woke it: there is work to be seen
        else:
            self._advance(ServerState.READY, props=props)

    async def _look_at_slots(
        self, props: ServerProps | None, *, moved: bool = False, replaced: bool = False
    ) -> None:
        slots, state = await self._slots()
        if slots is None:
            # The server works all the same: what it counts is not lost with its slots.
            due = state in (ServerState.SLOTS_DISABLED, ServerState.READY) and self._counters_due()
            counters = await self._counters(props, due)
            self._advance(state, props=props, counters=counters, consistent=False)
            return
        replaced = replaced or self._history.state in _MAY_HAVE_BEEN_REPLACED
        new = bool(slots) and (not self._history.tracks or replaced or looks_restarted(self._history, slots))
        before = self._history
        if not new:
            self._advance(ServerState.READY, slots, props=props)
            props = None
        elif props is None:
            props = await self._props_of_new_process()
        if self._counters_wanted(props, new=new, moved=moved):
            await self._settle(slots, props, new, before)
        elif new:
            self._advance(ServerState.READY, slots, props=props)

    async def _settle(
        self, slots: tuple[SlotSeen, ...], props: ServerProps | None, new: bool, before: History
    ) -> None:
        """Read the counters between two looks at /slots, so that both belong together.

        before: the history without these slots, which are a new process's if the counters say so.
        """
        counters: ServerCounters | None = None
        consistent = False
        for _ in range(COUNTER_READINGS_A_LOOK):
            newer = await self._counters(props)
            if newer is None:
                break
            counters = newer
            if not new and of_another_process(before, counters):
                self._history, new = before, True
                props = await self._props_of_new_process()
            after, state = await self._slots()
            if after is None:
                self._advance(state, props=props)
                return
            consistent = _signature(slots) == _signature(after)
            ended_between = _busy(slots) - _busy(after) or _tasks(after) != _tasks(slots)
            slots = after
            if consistent or not ended_between:
                break
        if counters is None and new and self._history.tracks and self._metrics_readable(props):
            # Only the counters tell whether this is a new process: ask once more before the slots
            # are believed without them.
            self._advance(ServerState.READY, props=props)
            return
        self._advance(ServerState.READY, slots, props=props, counters=counters, consistent=consistent)

    async def _props(self) -> ServerProps:
        props = await self._client.props()
        self._restart_seen = False
        self._words.tell_notes(self._client.notes)
        return props

    async def _props_of_new_process(self) -> ServerProps | None:
        """What is counted from now on may be another model's."""
        try:
            return await self._props()
        except AnswerError:
            return None

    async def _slots(self) -> tuple[tuple[SlotSeen, ...] | None, ServerState]:
        try:
            slots = await self._client.slots()
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
        self._slots_are_new = False
        self._words.tell_notes(self._client.notes)
        return slots, ServerState.READY

    async def _counters(self, props: ServerProps | None, wanted: bool = True) -> ServerCounters | None:
        if not wanted or self._metrics_usable(props) is False:
            return None
        self._metrics_asked_at = self._monotonic()
        try:
            counters = await self._client.counters()
        except AnswerError as error:
            self._metrics_failures += 1
            if error.failure in (Failure.NOT_OFFERED, Failure.NOT_FOUND):
                self._metrics_offered = False
            return None
        self._metrics_failures = 0
        self._metrics_offered = True
        return counters

    async def _state_without_props(self, error: AnswerError) -> ServerState:
        match error.failure:
            case Failure.UNAUTHORIZED:
                return ServerState.UNAUTHORIZED
            case Failure.LOADING:
                return ServerState.LOADING
            case Failure.LATE if self._history.props is not None:
                return await self._state_when_late()
            case Failure.LATE | Failure.UNREACHABLE | Failure.CUT_OFF:
                return ServerState.UNREACHABLE
            case Failure.NOT_FOUND | Failure.NOT_OFFERED | Failure.BROKEN:
                return ServerState.NOT_LLAMA_SERVER

    async def _state_when_late(self) -> ServerState:
        """Older builds answer only between two batches: late is not down while a prompt is read.

        A prompt that began since the last look makes it late as well: /health tells then.
        """
        if self._history.any_prefill or await self._client.healthy():
            return ServerState.STALLED
        return ServerState.UNREACHABLE

    # --- what is due --------------------------------------------------------------------------------

    def _props_due(self) -> bool:
        history = self._history
        if history.props_seen is None or self._passed(history.props_seen, PROPS_EVERY_SECONDS):
            return True
        if self._restart_seen or self._props_at_each_look():
            return True
        return self._may_sleep(None) is not False and self._passed(history.slots_seen, SHORTEST_SLEEP_SECONDS)

    def _props_at_each_look(self) -> bool:
        """Whether /props has to say each time whether the server sleeps, or what it offers."""
        state = self._history.state
        if state not in (ServerState.READY, ServerState.SLOTS_DISABLED) or self._slots_offered(None) is False:
            return True
        if self._may_sleep(None) is False:
            return False
        return self._idle() or self._pause_seconds >= SHORTEST_SLEEP_SECONDS

    def _counters_every(self) -> float:
        soon = self._history.all_busy or self._metrics_failures == 1
        return COUNTERS_WHILE_ALL_BUSY_SECONDS if soon else COUNTERS_AT_LEAST_EVERY_SECONDS

    def _counters_due(self) -> bool:
        return self._metrics_asked_at is None or self._passed(self._metrics_asked_at, self._counters_every())

    def _counters_wanted(self, props: ServerProps | None, *, new: bool, moved: bool) -> bool:
        if self._metrics_usable(props) is False:
            return False
        if new and self._metrics_failures < FAILURES_UNTIL_BROKEN:
            return True
        ended = moved or self._history.awaits_counters
        return self._counters_due() or (ended and self._metrics_failures == 0)

    def _idle(self) -> bool:
        awaited = self._history.awaits_counters and self._metrics_failures < FAILURES_UNTIL_BROKEN
        return not self._history.any_busy and not awaited

    def _passed(self, since: float | None, seconds: float) -> bool:
        return since is not None and self._monotonic() - since >= seconds

    def _slots_offered(self, props: ServerProps | None) -> bool | None:
        """Whether the server offers /slots; None where /props does not say."""
        props = props or self._history.props
        return None if props is None else props.slots_endpoint

    def _metrics_usable(self, props: ServerProps | None) -> bool | None:
        """Whether /metrics may be asked: it is offered, and no setting turned it off."""
        return self._metrics_available(props) if self._settings.server_metrics else False

    def _metrics_available(self, props: ServerProps | None) -> bool | None:
        """Whether the server offers /metrics, asked or not: by /props, else by its last answer."""
        props = props or self._history.props
        if props is not None and props.metrics_endpoint is not None:
            return props.metrics_endpoint
        return self._metrics_offered

    def _metrics_readable(self, props: ServerProps | None) -> bool:
        """Whether /metrics can stand in for /slots now; one that only fails is tried now and then."""
        if self._metrics_usable(props) is False:
            return False
        return self._metrics_failures < FAILURES_UNTIL_BROKEN or self._counters_due()

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

    def _slots_left_alone(self, props: ServerProps | None) -> bool:
        """Whether a request to /slots might keep an idle server from its sleep."""
        may_sleep = self._may_sleep(props)
        if may_sleep is False or (may_sleep is None and not self._metrics_readable(props)):
            return False
        return bool(self._history.tracks) and not self._slots_are_new and self._idle()

    async def _look_at_process(self) -> None:
        looked_at = self._process_looked_at
        if self._process is not None or (
            looked_at is not None and not self._passed(looked_at, PROCESS_EVERY_SECONDS)
        ):
            return
        started = self._process_looked_at = self._monotonic()
        try:
            self._process = await asyncio.to_thread(self._find_process, self._server)
        except NotReadableError as error:
            # A server on another machine has no process here: that is no failure of a source.
            self._words.tell_once(
                logging.INFO,
                f"its process cannot be read, so its start time and its flags stay unknown: {error}",
            )
        else:
            self._answers.append(SourceAnswer(Source.PROCESS, self._monotonic() - started))

    def _tell_of_memory(self, history: History) -> None:
        away = history.state not in STATES_UP or history.state is ServerState.LOADING
        if away or history.props is None or self._model.reading or self._model.problem:
            return  # of a server that is gone there is nothing to read, and no setting would help
        for warning in history.memory.warnings:
            self._words.tell_once(logging.WARNING, warning)
        if history.memory.problem is not None:
            self._words.tell_once(logging.INFO, history.memory.problem)
        for remark in history.memory.remarks:
            self._words.tell_once(logging.INFO, remark)

    def _check_process(self) -> None:
        """A process that is gone is looked for again; one that still runs was seen once more."""
        if self._process is None:
            return
        started = self._monotonic()
        alive = self._process_lives(self._process)
        problem = None if alive else "its process ended"
        self._answers.append(SourceAnswer(Source.PROCESS, self._monotonic() - started, problem))
        if not alive:
            self._process = self._process_looked_at = None

    # --- how long to wait ------------------------------------------------------------------------------

    def _decide_how_long_to_wait(self) -> None:
        """Decide it once a look, so that what is published is what is waited."""
        busy, idle = self._settings.busy_interval_seconds, self._settings.idle_interval_seconds
        self._pause_seconds = idle
        if self._failed_looks:
            longest = min(LONGEST_BACK_OFF_SECONDS, idle * 2.0 ** min(self._failed_looks - 1, 10))
            self._pause_seconds = longest * random.uniform(0.5, 1.0)
        elif self._history.state is ServerState.READY and not self._idle():
            self._pause_seconds = busy
        intervals = tuple(self._sources_asked_now())
        if intervals != self._intervals and self._advanced_by is not None:
            self._intervals = intervals
            before, look = self._advanced_by
            self._history = advance(before, replace(look, intervals=intervals))

    def _sources_asked_now(self) -> Iterator[tuple[Source, float]]:
        """Each source that is asked in the state the server is in, and how often at the least."""
        pause, state = self._pause_seconds, self._history.state
        if self._process is not None:
            yield Source.PROCESS, pause
        if self._model.known:
            yield Source.MODEL_FILE, max(pause, MODEL_EVERY_SECONDS)
        if state not in (ServerState.READY, ServerState.SLEEPING, ServerState.SLOTS_DISABLED):
            # Each look begins with /props and goes on only where that answers.
            yield Source.PROPS, pause
            if {Source.PROPS, Source.SLOTS} <= self._asked:
                yield Source.SLOTS, pause
            return
        offered = self._slots_offered(None) is not False
        left_alone = state is ServerState.SLEEPING or (offered and self._slots_left_alone(None))
        if offered and not left_alone:
            yield Source.SLOTS, pause
        yield Source.PROPS, pause if self._props_at_each_look() else max(pause, PROPS_EVERY_SECONDS)
        if self._metrics_usable(None) is not False:
            stand_in = left_alone and self._metrics_failures < FAILURES_UNTIL_BROKEN
            yield Source.METRICS, pause if stand_in else max(pause, self._counters_every())

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
        answers = (*self._answers, *self._client.take_answers())
        self._answers = []
        self._words.note_answers(answers)
        self._asked |= {answer.source for answer in answers}
        self._advanced_by = (
            self._history,
            ServerLook(
                at=self._clock(),
                monotonic=self._monotonic(),
                state=state,
                slots=slots,
                counters=counters,
                consistent=consistent,
                quiet=quiet,
                props=props,
                process=self._process,
                process_readable=self._process is not None,
                model=self._model.of(props or self._history.props, self._process),
                metrics_available=self._metrics_available(props),
                counters_readable=True if counters is not None else self._metrics_usable(props),
                answers=answers,
                intervals=self._intervals,
            ),
        )
        self._history = advance(*self._advanced_by)

    def _publish_now(self) -> ServerBox:
        """Publish, and again when the next reading ages out, however long a look takes by then."""
        now = self._monotonic()
        published = box(self._history, now)
        self._publish(published)
        if self._aging is not None:
            self._aging.cancel()
        expiry = expires_at(self._history, now)
        if expiry is not None:
            loop = asyncio.get_running_loop()
            self._aging = loop.call_later(expiry - now + 0.01, self._publish_now)
        return published

    def _tell_what_sleep_hides(self, props: ServerProps | None) -> None:
        if self._metrics_usable(props) is not False:
            return
        may_sleep = self._may_sleep(props)
        if may_sleep:
            self._words.tell_once(
                logging.WARNING,
                "it may sleep and no /metrics is read: /slots is left alone once it is idle, so requests "
                "are seen only after it slept. Start it with --metrics to see them all",
            )
        elif may_sleep is None:
            self._words.tell_once(
                logging.INFO,
                "whether it may sleep is not known, and no /metrics is read: /slots is looked at as usual. "
                "If it was started with --sleep-idle-seconds, say so with --sleep-idle, or it stays awake",
            )


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
