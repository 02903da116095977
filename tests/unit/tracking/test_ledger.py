"""How an increase of the server's counters is shared out among the slots."""

from hypothesis import given
from hypothesis import strategies as st

from kvscope.tracking.claims import Claim, Tokens
from kvscope.tracking.ledger import settle, settle_without_counters


def ended(task: int, held: int, **seen: int) -> Claim:
    return Claim(task, begun=bool(seen), held=held, ended=True, at_end=True, **seen)


def test_one_request_between_two_looks_is_exact_when_the_identity_closes() -> None:
    settlement = settle({3: (ended(7, held=1015),)}, Tokens(1000, 0, 16), prefill_seconds=0.25)
    (done,) = settlement.finished
    assert done.exact
    assert done.claim.prefill_seconds == 0.25
    assert settlement.credits[3] == Tokens(1000, 0, 16)
    assert settlement.unattributed == Tokens()


def test_two_short_requests_of_one_slot_are_its_own_but_not_exact() -> None:
    """Only the last one left a trace: 115 held, while 200 were computed."""
    settlement = settle({0: (ended(9, held=115),)}, Tokens(200, 0, 32))
    assert settlement.credits[0] == Tokens(200, 0, 32)
    assert not settlement.finished[0].exact


def test_two_slots_share_by_what_each_may_be_owed_and_the_rest_is_nobodys() -> None:
    claims = {0: (ended(1, held=99),), 1: (ended(2, held=299),)}
    settlement = settle(claims, Tokens(500, 0, 100))
    assert settlement.credits[0].total == 100
    assert settlement.credits[1].total == 300
    assert settlement.unattributed.total == 200
    assert not any(done.exact for done in settlement.finished)


def test_what_slots_showed_of_a_request_is_its_own_before_anything_is_shared() -> None:
    claims = {
        0: (ended(1, held=1019, computed=100, reused=900, decoded=5),),
        1: (ended(2, held=519),),
    }
    settlement = settle(claims, Tokens(600, 900, 40))
    assert settlement.credits[0] == Tokens(100, 900, 20)
    assert settlement.credits[1] == Tokens(500, 0, 20)


def test_an_increase_that_no_slot_was_seen_doing_is_unattributed() -> None:
    settlement = settle({}, Tokens(5, 6, 7))
    assert settlement.unattributed == Tokens(5, 6, 7)
    assert not settlement.finished


def test_a_request_under_way_is_owed_no_generated_tokens() -> None:
    """The server counts them at the end of a task only."""
    claims = {
        0: (Claim(1, begun=True, computed=100, reused=0, decoded=50, held=150),),
        1: (ended(2, held=19),),
    }
    settlement = settle(claims, Tokens(110, 0, 10))
    assert settlement.credits[0] == Tokens(100, 0, 0)
    assert settlement.credits[1] == Tokens(10, 0, 10)
    assert settlement.open[0][0].credited == Tokens(100, 0, 0)


def test_nothing_is_exact_while_another_slot_works() -> None:
    claims = {
        0: (Claim(1, begun=True, computed=10, decoded=5, credited=Tokens(10), held=15),),
        1: (ended(2, held=19),),
    }
    settlement = settle(claims, Tokens(10, 0, 10))
    assert settlement.credits[1] == Tokens(10, 0, 10)
    assert not settlement.finished[0].exact


def test_a_request_that_ended_while_the_counters_were_read_waits_for_the_next_reading() -> None:
    first = settle({0: (ended(1, held=115),)}, Tokens(), consistent=False)
    assert not first.finished
    second = settle(first.open, Tokens(100, 0, 16), consistent=False)
    assert second.credits[0] == Tokens(100, 0, 16)
    assert len(second.finished) == 1


def test_without_counters_a_request_seen_generating_is_known_from_what_the_slot_holds() -> None:
    settlement = settle_without_counters({0: (ended(1, held=1019, computed=100, reused=900, decoded=5),)})
    assert settlement.credits[0] == Tokens(100, 900, 20)


def test_without_counters_a_request_never_seen_at_work_gives_no_tokens() -> None:
    settlement = settle_without_counters({0: (ended(1, held=1019),)})
    assert settlement.credits[0] == Tokens()
    assert len(settlement.finished) == 1


tokens = st.builds(Tokens, *[st.integers(0, 10_000)] * 3)
claim = st.builds(
    Claim,
    task=st.integers(0, 99),
    begun=st.booleans(),
    computed=st.integers(0, 3000),
    reused=st.integers(0, 3000),
    decoded=st.integers(0, 300),
    held=st.none() | st.integers(0, 6000),
    ended=st.booleans(),
    at_end=st.booleans(),
    credited=tokens,
    settled_before=st.booleans(),
)


@given(
    claims=st.dictionaries(st.integers(0, 7), st.lists(claim, min_size=1, max_size=3).map(tuple)),
    increase=tokens,
    consistent=st.booleans(),
)
def test_whatever_was_seen_every_token_is_given_out_exactly_once(
    claims: dict[int, tuple[Claim, ...]], increase: Tokens, consistent: bool
) -> None:
    settlement = settle(claims, increase, consistent=consistent)
    given_out = sum(settlement.credits.values(), settlement.unattributed)
    assert given_out == increase
    for gained in (*settlement.credits.values(), settlement.unattributed):
        assert min(gained.computed, gained.reused, gained.generated) >= 0
    still_open = sum(len(of_slot) for of_slot in settlement.open.values())
    assert still_open + len(settlement.finished) == sum(len(of_slot) for of_slot in claims.values())


def test_what_several_requests_of_the_only_slot_that_changed_cannot_explain_is_still_that_slots() -> None:
    claims = {2: (Claim(1, ended=True), ended(2, held=19))}
    settlement = settle(claims, Tokens(500, 100, 50))
    assert settlement.credits[2] == Tokens(500, 100, 50)
    assert settlement.unattributed == Tokens()


def test_a_sum_that_closes_by_chance_is_not_exact_where_slots_showed_another_reuse() -> None:
    settlement = settle(
        {0: (ended(1, held=1019, computed=100, reused=900, decoded=5),)}, Tokens(200, 800, 20)
    )
    assert not settlement.finished[0].exact
