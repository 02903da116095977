"""Short ways to write down what a server showed, for tests of the trackers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvscope.observed.model import ContextSettings
from kvscope.observed.server import (
    Phase,
    ServerCounters,
    ServerLook,
    ServerProcess,
    ServerProps,
    ServerState,
    SlotSeen,
)
from kvscope.tracking.history import History, advance

LIMIT = 16384


def never_used(slot: int) -> SlotSeen:
    return SlotSeen(slot, LIMIT, phase=Phase.IDLE, held_tokens=0)


def idle(slot: int, task: int, held: int, limit: int = LIMIT) -> SlotSeen:
    return SlotSeen(slot, limit, phase=Phase.IDLE, task=task, held_tokens=held, computed_tokens=0,
                    reused_tokens=0, decoded_tokens=0)  # fmt: skip


def prefill(slot: int, task: int, computed: int, reused: int, held: int) -> SlotSeen:
    return SlotSeen(slot, LIMIT, True, Phase.PREFILL, task, held, computed, reused, 0)


def decode(
    slot: int, task: int, computed: int, reused: int, decoded: int, held: int | None = None
) -> SlotSeen:
    held = computed + reused + decoded if held is None else held
    return SlotSeen(slot, LIMIT, True, Phase.DECODE, task, held, computed, reused, decoded)


def counted(
    computed: int = 0,
    reused: int | None = 0,
    generated: int = 0,
    prefill_seconds: float = 0.0,
    decode_seconds: float = 0.0,
    identity: str | None = "first",
    deferred: int = 0,
) -> ServerCounters:
    return ServerCounters(
        computed_tokens=computed,
        reused_tokens=reused,
        generated_tokens=generated,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        requests_deferred=deferred,
        process_identity=identity,
    )


def printed(counters: ServerCounters) -> ServerCounters:
    """As llama.cpp prints them: six significant digits."""

    def rounded(value: int) -> tuple[int, int]:
        return int(float(f"{value:.6g}")), 10 ** max(0, len(str(value)) - 6)

    (computed, computed_step) = rounded(counters.computed_tokens)
    (reused, reused_step) = rounded(counters.reused_tokens or 0)
    (generated, generated_step) = rounded(counters.generated_tokens)
    return replace(
        counters,
        computed_tokens=computed,
        reused_tokens=reused,
        generated_tokens=generated,
        computed_step=computed_step,
        reused_step=reused_step,
        generated_step=generated_step,
    )


class Watch:
    """Feeds looks to a history, half a second apart unless told otherwise."""

    def __init__(self, *, unified: bool | None = None, model: str | None = "tiny") -> None:
        self.history = History("main")
        self.now = 1000.0
        settings = ContextSettings(slots=4, unified=unified)
        self.process = None if unified is None else ServerProcess(1, 1.0, settings=settings)
        self.model = model

    def see(
        self,
        *slots: SlotSeen,
        counters: ServerCounters | None = None,
        state: ServerState = ServerState.READY,
        after: float = 0.5,
        **more: Any,
    ) -> History:
        self.now += after
        # The arguments of the process speak of four slots, however few a test shows.
        total = None if self.process else len(slots) or None
        more.setdefault("props", ServerProps(self.model, total_slots=total))
        self.history = advance(
            self.history,
            ServerLook(
                at=self.now + 1e9,
                monotonic=self.now,
                state=state,
                slots=slots or None,
                counters=counters,
                process=self.process,
                process_readable=self.process is not None,
                counters_readable=more.pop("counters_readable", True if counters else None),
                **more,
            ),
        )
        return self.history

    def lose_a_poll(self, state: ServerState = ServerState.UNREACHABLE) -> History:
        return self.see(state=state, props=None)

    @property
    def counts(self) -> Any:
        return self.history.counts[self.history.model]

    @property
    def evictions(self) -> dict[str, tuple[int, int]]:
        """Evictions that happened, reason -> (events, tokens)."""
        return {
            reason: (count.events, count.tokens)
            for (_, reason, _), count in self.counts.evictions.items()
            if count.events or count.tokens
        }
