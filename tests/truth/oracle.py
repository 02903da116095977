"""The truth: what the driver's own requests did, from responses and token lists alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SIMILARITY = 0.1
"""llama-server's `--slot-prompt-similarity`: from here on a slot is picked by its content."""

Tokens = tuple[int, ...]


class TruthContradictsItself(Exception):
    """Responses, token lists and /slots do not agree: the comparison would prove nothing."""


@dataclass(frozen=True)
class Answer:
    """One request that came to its end. Times in milliseconds, as the server's `timings`."""

    slot: int
    prompt: Tokens
    generated: Tokens
    computed: int
    reused: int
    predicted: int
    prompt_ms: float
    predicted_ms: float

    @property
    def content(self) -> Tokens:
        """What its slot holds afterwards: the last sampled token is never evaluated."""
        return self.prompt + self.generated[:-1]


@dataclass(frozen=True)
class Loss:
    """Tokens that slots held and lost in one event. from_host: what came instead was read from host RAM."""

    slots: tuple[int, ...]
    tokens: int
    reason: str
    from_host: bool = False


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    count = 0
    for ours, theirs in zip(one, other, strict=False):
        if ours != theirs:
            break
        count += 1
    return count


@dataclass
class Truth:
    """Sums of what happened since the exporter's first look, and what each slot holds."""

    requests: int = 0
    computed: int = 0
    reused: int = 0
    generated: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    losses: list[Loss] = field(default_factory=list)
    content: dict[int, Tokens] = field(default_factory=dict)

    def add(self, answer: Answer) -> None:
        """Add one finished request; its slot's content is replaced without looking at what was lost."""
        if answer.computed + answer.reused != len(answer.prompt):
            raise TruthContradictsItself(
                f"a prompt of {len(answer.prompt)} tokens was answered with"
                f" {answer.computed} computed and {answer.reused} reused"
            )
        self.requests += 1
        self.computed += answer.computed
        self.reused += answer.reused
        self.generated += answer.predicted
        self.prefill_seconds += answer.prompt_ms / 1000
        self.decode_seconds += answer.predicted_ms / 1000
        self.content[answer.slot] = answer.content

    def add_alone(self, answer: Answer, before: Mapping[int, int], after: Mapping[int, int]) -> None:
        """Add a request that ran alone; before and after are the tokens held, by slot, from /slots.

        Another slot that holds less than before was cleared for it; its own slot lost what the new
        content does not begin with.
        """
        for slot, held in before.items():
            if slot != answer.slot and after.get(slot, 0) < held:
                self.lose(slot, held - after.get(slot, 0), "idle_clear")
                self.content.pop(slot, None)
        if before.get(answer.slot, 0):
            self.replace(answer)
        self.add(answer)
        if after.get(answer.slot) != len(answer.content):
            raise TruthContradictsItself(
                f"slot {answer.slot} should hold {len(answer.content)} tokens,"
                f" /slots says {after.get(answer.slot)}"
            )

    def replace(self, answer: Answer) -> None:
        """Count what the answer's slot held and what does not begin the answer's content.

        Where more was reused than the slot could give, a prompt out of host RAM took the place of
        all that it held.
        """
        old = self.content.get(answer.slot, ())
        kept = common_prefix(old, answer.content)
        if kept == len(old):
            return
        alike = common_prefix(old, answer.prompt)
        similar = alike / max(len(answer.prompt), 1) > SIMILARITY
        from_host = answer.reused > alike
        self.lose(
            answer.slot,
            len(old) if from_host else len(old) - kept,
            "diverged" if similar else "takeover",
            from_host=from_host,
        )

    def lose(self, slot: int, tokens: int, reason: str, *, from_host: bool = False) -> None:
        """Count tokens that left a slot; nothing held, nothing lost."""
        if tokens:
            self.losses.append(Loss((slot,), tokens, reason, from_host))

    def lose_everything(self, held: Mapping[int, int], reason: str) -> None:
        """Count a sleep or a restart: one event, however many slots held something."""
        holding = tuple(slot for slot, tokens in held.items() if tokens)
        if holding:
            self.losses.append(Loss(holding, sum(held.values()), reason))
        self.content.clear()

    def lost(self, reason: str | None = None) -> tuple[int, int]:
        """Return (events, tokens) lost for one reason, or for any."""
        chosen = [loss for loss in self.losses if reason in (None, loss.reason)]
        return len(chosen), sum(loss.tokens for loss in chosen)

    def slots_lost(self, reason: str) -> int:
        """Return how often a slot lost something for this reason."""
        return sum(len(loss.slots) for loss in self.losses if loss.reason == reason)
