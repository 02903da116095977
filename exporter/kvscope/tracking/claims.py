"""What /slots showed of each request, until the counters have been settled for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvscope.observed.server import SlotSeen
from kvscope.tracking.transitions import began_task, has_begun


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens by where they came from."""

    computed: int = 0
    reused: int = 0
    generated: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.computed + other.computed, self.reused + other.reused, self.generated + other.generated
        )

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.computed - other.computed, self.reused - other.reused, self.generated - other.generated
        )

    @property
    def total(self) -> int:
        """All of them."""
        return self.computed + self.reused + self.generated

    def at_least_zero(self) -> Tokens:
        """The same without anything below zero."""
        return Tokens(max(0, self.computed), max(0, self.reused), max(0, self.generated))

    def within(self, other: Tokens, steps: Tokens) -> bool:
        """Return whether each kind is as far from the other's as rounding to steps explains."""
        return all(
            mine == its or (step > 1 and abs(mine - its) <= step)
            for mine, its, step in zip(self.kinds, other.kinds, steps.kinds, strict=True)
        )

    @property
    def kinds(self) -> tuple[int, int, int]:
        """(computed, reused, generated)."""
        return self.computed, self.reused, self.generated


@dataclass(frozen=True, slots=True)
class Claim:
    """One request on one slot, as far as /slots showed it.

    begun: it was seen at work, so computed, reused and decoded are what /slots said last.
    held: tokens in the slot when the request was last seen; at_end: that was after its end.
    alone: nothing else was seen at work since it was first seen. whole: the counters had not
    counted any of it before it was first seen. rough: its share rests on counters that were
    printed too coarsely to tell. prefill_seconds: None where that was so for them.
    """

    task: int
    begun: bool = False
    computed: int = 0
    reused: int = 0
    decoded: int = 0
    held: int | None = None
    ended: bool = False
    at_end: bool = False
    alone: bool = True
    whole: bool = True
    credited: Tokens = Tokens()
    prefill_seconds: float | None = 0.0
    settled_before: bool = False
    rough: bool = False

    @property
    def capacity(self) -> int | None:
        """How many more tokens the counters may owe to it; None where that is not known."""
        if not self.ended:
            # Generated tokens are counted at the end, computed ones after each batch at most.
            return max(0, self.computed + self.reused - self.credited.computed - self.credited.reused)
        if not self.at_end or self.held is None:
            return None
        if self.held == 0:
            return 0  # cleared after its end, or rejected: what it was owed cannot be told
        return max(0, self.held + 1 - self.credited.total)

    @property
    def firm(self) -> Tokens:
        """What the counters are sure to owe to it, by what /slots showed."""
        if not self.begun:
            return Tokens()
        computed = self.computed if self.decoded or self.ended else 0
        generated = 0
        if self.ended:
            generated = self.decoded
            if self.decoded and self.at_end and self.held is not None:
                generated = max(generated, self.held + 1 - self.computed - self.reused)
        return (Tokens(computed, self.reused, generated) - self.credited).at_least_zero()

    @property
    def closes(self) -> bool:
        """Whether the identity closes over everything credited to it."""
        return (
            self.ended
            and self.at_end
            and self.credited.generated > 0
            and self.held == self.credited.total - 1
            and (not self.begun or self.credited.reused == self.reused)
        )

    @property
    def shifted_out(self) -> int:
        """Tokens that context shifts dropped while it generated, once it is settled; else 0.

        Where all that was counted is this request's own, what the slot does not hold was dropped.
        """
        own = (self.credited.computed, self.credited.reused) == (self.computed, self.reused)
        known = self.begun and self.alone and self.whole and self.at_end and not self.rough
        if not (known and own and self.held):
            return 0
        return max(0, self.credited.total - 1 - self.held)


Claims = Mapping[int, tuple[Claim, ...]]
"""By slot, oldest first; the last one may still be under way."""


def claims_after(claims: tuple[Claim, ...], before: SlotSeen, now: SlotSeen) -> tuple[Claim, ...]:
    """Return a slot's claims after a look at it: a new task opens one, an end closes it."""
    *done, last = claims if claims else (None,)
    open_claim = last if last is not None and not last.ended else None
    finished = tuple(claim for claim in (*done, None if open_claim else last) if claim is not None)
    if began_task(before, now):
        if open_claim is not None:
            finished = (*finished, replace(open_claim, ended=True))
        claim = Claim(now.task if now.task is not None else -1)
        held_before = before.held_tokens
    elif open_claim is not None:
        claim = open_claim
        held_before = None if claim.begun else before.held_tokens
    else:
        return finished
    if now.processing:
        return (*finished, seen_at_work(claim, now, held_before))
    return (*finished, replace(claim, held=now.held_tokens, ended=True, at_end=now.held_tokens is not None))


def seen_at_work(claim: Claim, now: SlotSeen, held_before: int | None) -> Claim:
    """Return the claim with what /slots shows of its request now."""
    if not claim.begun and not has_begun(now, held_before):
        return claim
    return replace(
        claim,
        begun=True,
        computed=max(claim.computed, now.computed_tokens or 0),
        reused=max(claim.reused, now.reused_tokens or 0),
        decoded=max(claim.decoded, now.decoded_tokens or 0),
        held=now.held_tokens,
    )


def without_past(claims: Claims) -> Claims:
    """Return the claims under way, where all that was done so far was counted before."""
    return {
        slot: tuple(
            replace(claim, whole=False, credited=Tokens(claim.computed, claim.reused))
            for claim in of_slot
            if not claim.ended
        )
        for slot, of_slot in claims.items()
    }
