"""The truth that `make truth` compares with must be right itself, and its rows must be able to fail."""

import pytest
from tests.truth import report
from tests.truth.driver import Figures
from tests.truth.oracle import Answer, Truth, TruthContradictsItself
from tests.truth.report import Verdict
from tests.truth.stage import evictions, held_row, token_sums


def answer(slot: int, prompt: range, reused: int = 0, generated: int = 3) -> Answer:
    """An answer whose generated tokens are no prompt's."""
    computed = len(prompt) - reused
    return Answer(slot, tuple(prompt), tuple(range(-generated, 0)), computed, reused, generated, 12.0, 6.0)


def alone(truth: Truth, one: Answer, held: dict[int, int]) -> None:
    """Add one answer after which its slot holds what it must and the others what they held."""
    truth.add_alone(one, held, held | {one.slot: len(one.content)})


def test_an_unrelated_prompt_that_takes_a_slot_costs_all_that_it_held() -> None:
    truth = Truth()
    alone(truth, answer(0, range(100)), {0: 0})
    alone(truth, answer(0, range(500, 600)), {0: 102})
    assert truth.lost("takeover") == (1, 102)
    assert truth.lost() == (1, 102)


def test_a_prompt_that_shares_a_beginning_costs_only_the_rest() -> None:
    truth = Truth()
    alone(truth, answer(0, range(100)), {0: 0})
    shared = Answer(0, (*range(60), *range(500, 540)), (-1, -2), 40, 60, 2, 1.0, 1.0)
    alone(truth, shared, {0: 102})
    assert truth.lost("diverged") == (1, 42)


def test_a_continued_conversation_costs_nothing() -> None:
    truth = Truth()
    first = answer(0, range(100))
    alone(truth, first, {0: 0})
    prompt = (*first.prompt, *first.generated, 900)
    alone(truth, Answer(0, prompt, (7,), 2, 102, 1, 1.0, 1.0), {0: 102})
    assert truth.lost() == (0, 0)


def test_what_another_slot_no_longer_holds_was_cleared_for_the_request() -> None:
    truth = Truth()
    truth.add_alone(answer(1, range(100)), {0: 40, 1: 0}, {0: 0, 1: 102})
    assert truth.lost("idle_clear") == (1, 40)


def test_a_sleep_is_one_event_for_all_slots_that_held_something() -> None:
    truth = Truth()
    truth.lose_everything({0: 5, 1: 0, 2: 7}, "sleep")
    assert truth.lost("sleep") == (1, 12)
    assert truth.slots_lost("sleep") == 2


def test_a_response_that_contradicts_its_prompt_proves_nothing() -> None:
    with pytest.raises(TruthContradictsItself):
        Truth().add(Answer(0, (1, 2, 3), (4,), 1, 1, 1, 1.0, 1.0))


def test_slots_that_contradict_the_token_lists_prove_nothing() -> None:
    with pytest.raises(TruthContradictsItself):
        Truth().add_alone(answer(0, range(10)), {0: 0}, {0: 11})


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (report.equal("", 3.0, 3), Verdict.OK),
        (report.equal("", 3.0, 4), Verdict.MISSED),
        (report.equal("", None, 0), Verdict.MISSED),
        (report.within("", 1.02, 1.0, 0.03), Verdict.OK),
        (report.within("", 1.04, 1.0, 0.03), Verdict.MISSED),
        (report.within("", None, 0.0, 0.03), Verdict.MISSED),
        (report.at_most("", 4, 4), Verdict.OK),
        (report.at_most("", 5, 4), Verdict.MISSED),
        (report.between("", 2, 3, 4), Verdict.MISSED),
        (report.between("", 4, 3, 4), Verdict.OK),
        (report.told("", 1, 2), Verdict.TOLD),
    ],
)
def test_a_row_is_judged_by_what_is_wanted_of_it(row: report.Row, verdict: Verdict) -> None:
    assert row.verdict is verdict


def test_token_sums_are_slots_and_unattributed_together() -> None:
    figures = Figures(
        'kvscope_prompt_tokens_total{server="main",slot="0",source="computed"} 10\n'
        'kvscope_prompt_tokens_total{server="main",slot="1",source="computed"} 5\n'
        'kvscope_prompt_tokens_total{server="main",slot="0",source="unknown"} 7\n'
        'kvscope_prompt_tokens_total{server="other",slot="0",source="computed"} 99\n'
        'kvscope_unattributed_tokens_total{server="main",source="reused"} 2\n'
        'kvscope_generated_tokens_total{server="main",slot="0"} 3\n'
    )
    assert token_sums(figures) == (15, 9, 3)
    assert token_sums(figures, "third") == (None, None, None)
    assert evictions(figures) == 0


def test_a_slot_that_is_not_shown_is_not_one_that_holds_nothing() -> None:
    figures = Figures('kvscope_slot_context_tokens{server="main",slot="0"} 12\n')
    assert held_row(figures, {0: 12, 1: 0}).verdict is Verdict.OK
    assert held_row(figures, {0: 12, 1: 4}).verdict is Verdict.MISSED
