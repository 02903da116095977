"""Who did what the server counted: the fusion of /slots with the counters of /metrics.

/slots shows requests in passing, /metrics counts all of them without saying whose they are. A
claim is what /slots showed of one request; settling gives every token that the counters grew by
to a slot, or to nobody, so that sums always equal the server's own.

The identity computed + reused + generated - 1 = tokens held (the last sampled token is never
evaluated; llama.cpp tools/server/server-context.cpp, measured on b11549) tells whether an increase
belongs to one request alone.

llama.cpp prints its counters with six significant digits. Beyond a million they move in steps: what
/slots showed of a lone request then stands in for them, as far as rounding explains the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvscope.tracking.claims import Claim, Claims, Tokens


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that ended and is settled. exact: the identity closed and nothing else worked."""

    slot: int
    claim: Claim
    exact: bool


@dataclass(frozen=True, slots=True)
class Settlement:
    """What settling gave: tokens by slot, tokens of nobody, requests done, claims that go on."""

    credits: Mapping[int, Tokens]
    unattributed: Tokens
    finished: tuple[Finished, ...]
    open: Mapping[int, tuple[Claim, ...]]

    @property
    def given(self) -> Tokens:
        """All tokens that were given out."""
        return sum(self.credits.values(), self.unattributed)


def awaits_counters(claims: Claims) -> bool:
    """Return whether a request ended that the counters were not asked about."""
    return any(claim.ended for of_slot in claims.values() for claim in of_slot)


EXACT = Tokens(1, 1, 1)


def settle(
    claims: Claims,
    increase: Tokens,
    prefill_seconds: float | None = 0.0,
    consistent: bool = True,
    steps: Tokens = EXACT,
) -> Settlement:
    """Give an increase of the server's counters to the slots that were seen at work.

    One slot at work gets all of it; several share it by what /slots showed of each (first what is
    sure, then in proportion to what each may still be owed); what is left over, or moved while no
    slot was seen at work, is unattributed. Sums are exact whatever happens, as exact as the
    counters are printed: in steps. prefill_seconds: None where they are printed too coarsely.

    consistent: the counters were read while no slot changed. If not, a request that ended may be
    counted only by the next reading, so it is kept open once.
    """
    increase, rough = _read_through_rounding(claims, increase, steps)
    work = [_Share(slot, claim) for slot in sorted(claims) for claim in claims[slot]]
    at_work = [share for share in work if share.claim.ended or (share.claim.capacity or 0) > 0]
    places = {share.slot for share in at_work}
    left = increase
    if len(at_work) == 1:
        at_work[0].credit += left
        left = Tokens()
    else:
        left = _apportion(at_work, left)
        if len(places) == 1 and left.total:
            # Whatever else was counted was done by the one slot that changed.
            at_work[0].extra += left
            left = Tokens()
    only = at_work[0] if len(at_work) == 1 and len(work) == 1 else None
    credits: dict[int, Tokens] = {}
    open_claims: dict[int, tuple[Claim, ...]] = {}
    finished: list[Finished] = []
    for share in work:
        gained = share.credit + share.extra
        credits[share.slot] = credits.get(share.slot, Tokens()) + gained
        claim = replace(
            share.claim,
            credited=share.claim.credited + share.credit,
            prefill_seconds=_added(share.claim.prefill_seconds, prefill_seconds if share is only else 0.0),
            rough=share.claim.rough or rough,
            alone=share.claim.alone and len(work) == 1,
        )
        waits = not consistent and not claim.settled_before and not claim.closes
        if claim.ended and not waits:
            exact = claim.alone and claim.whole and claim.closes and not claim.rough
            finished.append(Finished(share.slot, claim, exact))
        else:
            claim = replace(claim, settled_before=claim.settled_before or claim.ended)
            open_claims[share.slot] = (*open_claims.get(share.slot, ()), claim)
    return Settlement(credits, left, tuple(finished), open_claims)


def settle_without_counters(claims: Claims) -> Settlement:
    """Credit what /slots itself showed, for a server without `--metrics`: never more than was done."""
    credits: dict[int, Tokens] = {}
    open_claims: dict[int, tuple[Claim, ...]] = {}
    finished: list[Finished] = []
    for slot in sorted(claims):
        for claim in claims[slot]:
            gained = claim.firm
            credits[slot] = credits.get(slot, Tokens()) + gained
            settled = replace(claim, credited=claim.credited + gained)
            if settled.ended:
                finished.append(Finished(slot, settled, exact=False))
            else:
                open_claims[slot] = (*open_claims.get(slot, ()), settled)
    return Settlement(credits, Tokens(), tuple(finished), open_claims)


def _read_through_rounding(claims: Claims, increase: Tokens, steps: Tokens) -> tuple[Tokens, bool]:
    """Return the increase as it was before it was rounded, and whether that is still a rough figure."""
    if steps == EXACT:
        return increase.at_least_zero(), False
    alone = [claim for of_slot in claims.values() for claim in of_slot]
    if not alone:
        nothing_moved = Tokens().within(increase, steps)
        return Tokens() if nothing_moved else increase.at_least_zero(), True
    if len(alone) == 1:
        for candidate in _candidates(alone[0], increase, steps):
            if candidate.within(increase, steps):
                return candidate, False
    return increase.at_least_zero(), True


def _candidates(claim: Claim, increase: Tokens, steps: Tokens) -> Iterable[Tokens]:
    """What a lone request may have added to the counters, by what /slots showed of it."""
    if not claim.ended:
        yield claim.firm
    elif claim.at_end and claim.held:
        if claim.decoded:
            yield claim.firm
        owed = claim.held + 1 - claim.credited.total
        coarse = [kind for kind, step in zip(_KINDS, steps.kinds, strict=True) if step > 1]
        if len(coarse) == 1:  # the identity gives the one that was rounded
            rest = increase.total - getattr(increase, coarse[0])
            yield replace(increase, **{coarse[0]: owed - rest}).at_least_zero()


_KINDS = ("computed", "reused", "generated")


def _added(seconds: float | None, more: float | None) -> float | None:
    return None if seconds is None or more is None else seconds + more


class _Share:
    """One claim while an increase is shared out. extra: its slot's, but not this request's."""

    def __init__(self, slot: int, claim: Claim) -> None:
        self.slot = slot
        self.claim = claim
        self.credit = Tokens()
        self.extra = Tokens()

    def room(self) -> int | None:
        capacity = self.claim.capacity
        return None if capacity is None else max(0, capacity - self.credit.total)


def _apportion(shares: Sequence[_Share], increase: Tokens) -> Tokens:
    left = dict(zip(_KINDS, increase.kinds, strict=True))
    for share in shares:
        firm = share.claim.firm
        for kind in left:
            gained = min(left[kind], getattr(firm, kind))
            left[kind] -= gained
            share.credit += Tokens(**{kind: gained})
    # Reused first: it is counted at the start of a prompt, so it is the surest of the three.
    for kind in ("reused", "generated", "computed"):
        able = [share for share in shares if kind != "generated" or share.claim.ended]
        rooms = [share.room() for share in able]
        amount = left[kind]
        if kind == "generated":
            amount = _fair_part(amount, left["computed"], rooms)
        for share, gained in zip(able, _in_proportion(amount, rooms), strict=True):
            left[kind] -= gained
            share.credit += Tokens(**{kind: gained})
    return Tokens(**left)


def _fair_part(generated: int, computed: int, rooms: Sequence[int | None]) -> int:
    """How many of the generated tokens fit, if computed and generated ones fill the room alike."""
    known = [room for room in rooms if room is not None]
    if len(known) < len(rooms) or generated + computed <= sum(known):
        return generated
    return generated * sum(known) // (generated + computed)


def _in_proportion(amount: int, rooms: Iterable[int | None]) -> list[int]:
    """Split amount by room (None: unlimited), whole numbers, never more than there is room for."""
    limits = [amount if room is None else min(room, amount) for room in rooms]
    total = sum(limits)
    if total <= amount:
        return limits
    shares = [amount * limit // total for limit in limits]
    short = amount - sum(shares)
    for place, limit in enumerate(limits):
        step = min(short, limit - shares[place])
        shares[place] += step
        short -= step
    return shares
