"""What the log says of one server: each state when it begins, each problem once, no line twice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from kvscope.observed.server import ServerState, SourceAnswer
from kvscope.tracking.history import History

log = logging.getLogger(__name__)

MOST_NOTES = 20
CALM_SECONDS = 120.0
"""A problem that comes now and then is told once, not each time; after so long without, it is news."""

_WELL = frozenset({ServerState.READY, ServerState.LOADING, ServerState.SLEEPING})
_EXPLAINS_EVERY_PROBLEM = frozenset({ServerState.LOADING, ServerState.UNAUTHORIZED})
_REASONS = {ServerState.SLOTS_DISABLED: "it does not offer /slots, so nothing is known of its slots"}


class Words:
    """What is said of one server: each state when it begins, each problem once."""

    def __init__(self, server: str, monotonic: Callable[[], float]) -> None:
        self._server = server
        self._monotonic = monotonic
        self._told: set[str] = set()
        self._problems: dict[str, float] = {}
        self._news: list[str] = []

    def tell_look(self, before: History | None, after: History) -> None:
        """Say what a look changed: the state with the problem behind it, other problems, a restart."""
        if before is None or after.state is not before.state:
            if after.state in _WELL:
                self._say(logging.INFO, f"is {after.state.value}")
            else:
                reason = after.problem or _REASONS.get(after.state, "no reason given")
                self._say(logging.WARNING, f"is {after.state.value}: {reason}")
                self._news = [problem for problem in self._news if problem != after.problem]
            if after.state is ServerState.UNREACHABLE:
                self._news = []  # an ended process refuses connections: the first problem is the cause
        if after.state not in _EXPLAINS_EVERY_PROBLEM:
            for problem in self._news:
                self._remark(logging.WARNING, problem)
        self._news = []
        if before is not None and after.restarts > before.restarts:
            self._say(logging.INFO, "was restarted; what its slots held is gone")

    def note_answers(self, answers: Iterable[SourceAnswer]) -> None:
        """Keep what is new in them for the end of the look."""
        now = self._monotonic()
        for problem in (answer.problem for answer in answers if answer.problem):
            seen = self._problems.get(problem)
            if seen is None or now - seen >= CALM_SECONDS:
                self._news.append(problem)
            self._problems[problem] = now

    def tell_notes(self, notes: Iterable[str]) -> None:
        """Say what was odd in an answer that was understood; not without end."""
        for note in notes:
            if len(self._told) < MOST_NOTES:
                self.tell_once(logging.WARNING, note)

    def tell_once(self, level: int, words: str) -> None:
        """Say it if it was never said."""
        if words not in self._told:
            self._told.add(words)
            self._remark(level, words)

    def _remark(self, level: int, words: str) -> None:
        """Say what is no predicate of the server: a sentence of its own, or an answer's problem."""
        log.log(level, "server %s: %s", self._server, words, extra={"server": self._server})

    def _say(self, level: int, words: str) -> None:
        log.log(level, "server %s %s", self._server, words, extra={"server": self._server})
