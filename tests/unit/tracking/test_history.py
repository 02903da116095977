"""What a history says after a sequence of looks."""

from dataclasses import replace

import pytest
from tests.unit.tracking.looks import (
    Watch,
    counted,
    decode,
    idle,
    never_used,
    prefill,
)

from kvscope.observed.server import Phase, ServerCounters, ServerProcess, ServerProps, ServerState
from kvscope.tracking.history import MOST_CLAIMS, MOST_MODELS, counters_moved, looks_restarted
from kvscope.tracking.publish import box, expires_at


def started(unified: bool | None = False) -> Watch:
    """Two slots, none ever used, counters at 0."""
    watch = Watch(unified=unified)
    watch.see(never_used(0), never_used(1), counters=counted())
    return watch


def test_what_the_server_counted_before_the_first_look_is_not_ours() -> None:
    watch = Watch()
    watch.see(idle(0, 5, 100), counters=counted(1000, 50, 60, prefill_seconds=9.0))
    assert watch.counts.slots[0].prompt_tokens == {"computed": 0, "unknown": 0}
    assert watch.counts.unattributed_tokens == {"computed": 0, "reused": 0, "generated": 0}
    assert watch.counts.prefill_seconds == 0


def test_a_request_seen_from_its_start_to_its_end_is_exact() -> None:
    watch = started()
    watch.see(never_used(0), prefill(1, 1, 512, 0, 1024))
    watch.see(never_used(0), decode(1, 1, 1000, 0, 5))
    watch.see(never_used(0), idle(1, 1, 1015))
    watch.see(never_used(0), idle(1, 1, 1015), counters=counted(1000, 0, 16, 0.8, 0.3), after=0)
    counts = watch.counts
    assert counts.observations == {"exact": 1, "apportioned": 0}
    assert counts.requests == {"unknown": 1}
    assert counts.slots[1].prompt_tokens == {"computed": 1000, "unknown": 0}
    assert counts.slots[1].generated_tokens == 16
    assert (counts.prefill_seconds, counts.decode_seconds) == (0.8, 0.3)
    slot = box(watch.history, watch.now).slots[1]
    assert (slot.context_tokens, slot.last_prefill_seconds) == (1015, 0.8)
    assert slot.last_prompt_tokens == {"computed": 1000, "unknown": 0}
    assert sum(counts.request_prefill_seconds.counts) == 1
    assert counts.request_prefill_seconds.counts[4] == 1  # 0.5 < 0.8 <= 1


def test_phase_seconds_go_to_the_phase_a_slot_was_last_seen_in() -> None:
    watch = started()
    watch.see(never_used(0), prefill(1, 1, 512, 0, 1024), after=2)
    watch.see(never_used(0), decode(1, 1, 1000, 0, 5), after=3)
    watch.see(never_used(0), idle(1, 1, 1015), after=4)
    seconds = watch.counts.slots[1].phase_seconds
    assert seconds == {Phase.IDLE: 2, Phase.PREFILL: 3, Phase.DECODE: 4}


def test_a_lost_poll_gives_no_phase_seconds_unless_the_slot_still_does_the_same() -> None:
    watch = started()
    watch.see(never_used(0), prefill(1, 1, 512, 0, 1024), after=1)
    watch.lose_a_poll()
    watch.see(never_used(0), prefill(1, 1, 800, 0, 1024), after=4)
    assert watch.counts.slots[1].phase_seconds[Phase.PREFILL] == pytest.approx(4.5)
    watch.lose_a_poll()
    watch.see(never_used(0), idle(1, 1, 1015), after=9)
    assert watch.counts.slots[1].phase_seconds[Phase.PREFILL] == pytest.approx(4.5)


def test_a_stall_counts_as_the_prefill_it_is() -> None:
    watch = started()
    watch.see(never_used(0), prefill(1, 1, 512, 0, 1024), after=1)
    watch.lose_a_poll(ServerState.STALLED)
    watch.see(never_used(0), decode(1, 1, 2000, 0, 1), after=59.5)
    assert watch.counts.slots[1].phase_seconds[Phase.PREFILL] == pytest.approx(60)


def test_a_request_is_counted_once_across_a_lost_poll() -> None:
    watch = started()
    watch.see(never_used(0), decode(1, 1, 100, 0, 5))
    watch.lose_a_poll()
    watch.see(never_used(0), idle(1, 1, 109), counters=counted(100, 0, 10))
    watch.see(never_used(0), idle(1, 1, 109), counters=counted(100, 0, 10))
    assert watch.counts.requests == {"unknown": 1}
    assert watch.counts.slots[1].generated_tokens == 10


def test_a_request_under_way_at_the_first_look_is_never_exact() -> None:
    watch = Watch(unified=False)
    watch.see(decode(0, 4, 100, 50, 5), counters=counted(100, 50, 0))
    watch.see(idle(0, 4, 169), counters=counted(100, 50, 20))
    assert watch.counts.observations == {"exact": 0, "apportioned": 1}
    assert watch.counts.slots[0].prompt_tokens == {"computed": 0, "unknown": 0}
    assert watch.counts.slots[0].generated_tokens == 20


class TestEvictions:
    """The table of docs/decisions: what polls saw -> reason."""

    def main_holds(self, held: int = 3000, unified: bool | None = False) -> Watch:
        watch = started(unified)
        watch.see(never_used(0), idle(1, 1, held), counters=counted(held - 15, 0, 16))
        return watch

    def test_a_growing_conversation_loses_nothing(self) -> None:
        watch = self.main_holds()
        watch.see(never_used(0), prefill(1, 20, 0, 3000, 3512))
        watch.see(never_used(0), idle(1, 20, 3616), counters=counted(3485, 3000, 32))
        assert watch.evictions == {}

    def test_the_same_prompt_again_loses_only_what_was_generated(self) -> None:
        watch = self.main_holds()
        watch.see(never_used(0), idle(1, 20, 3000), counters=counted(2986, 2984, 32))
        assert watch.evictions == {"diverged": (1, 16)}

    def test_one_token_computed_again_is_no_loss(self) -> None:
        watch = self.main_holds(held=1000)
        watch.see(never_used(0), decode(1, 20, 1, 999, 3))
        assert watch.evictions == {}

    def test_a_sub_agent_with_the_same_system_prompt_diverges(self) -> None:
        watch = self.main_holds()
        watch.see(never_used(0), prefill(1, 20, 0, 1000, 1200))
        assert watch.evictions == {"diverged": (1, 2000)}
        assert watch.counts.slots[1].evictions["diverged"] == 1

    def test_the_reused_tokens_of_a_task_that_did_not_begin_yet_are_not_believed(self) -> None:
        watch = self.main_holds()
        watch.see(never_used(0), prefill(1, 20, 0, 0, 3000))
        assert watch.evictions == {}
        watch.see(never_used(0), prefill(1, 20, 100, 3000, 3200))
        assert watch.evictions == {}

    def test_an_unrelated_prompt_on_the_least_recently_used_slot_is_a_takeover(self) -> None:
        watch = self.main_holds()
        watch.see(idle(0, 20, 515), idle(1, 1, 3000), counters=counted(3485, 0, 32))
        watch.see(idle(0, 20, 515), prefill(1, 40, 0, 0, 700))
        assert watch.evictions == {"takeover": (1, 3000)}

    def test_of_slots_released_in_one_look_any_may_be_the_least_recently_used(self) -> None:
        watch = Watch(unified=False)
        watch.see(never_used(0), never_used(1), counters=counted())
        watch.see(idle(0, 1, 900), idle(1, 2, 800), counters=counted(1668, 0, 34))
        watch.see(idle(0, 1, 900), prefill(1, 9, 0, 0, 500))
        assert watch.evictions == {"takeover": (1, 800)}

    def test_a_slot_that_was_busy_when_last_seen_has_no_known_place(self) -> None:
        watch = self.main_holds()
        watch.see(never_used(0), decode(1, 9, 100, 3000, 5))
        watch.see(never_used(0), prefill(1, 20, 0, 0, 500))
        assert watch.evictions == {"unknown": (1, 3105)}

    def test_the_least_recently_used_slot_with_something_reused_has_two_possible_reasons(self) -> None:
        watch = self.main_holds()
        watch.see(idle(0, 20, 515), idle(1, 1, 3000), counters=counted(3485, 0, 32))
        watch.see(idle(0, 20, 515), prefill(1, 40, 0, 900, 1700))
        assert watch.evictions == {"unknown": (1, 2100)}

    def test_more_reused_than_the_slot_held_came_from_host_ram_and_replaced_all_of_it(self) -> None:
        watch = self.main_holds(held=300)
        watch.see(idle(0, 20, 515), idle(1, 1, 300), counters=counted(785, 0, 32))
        watch.see(idle(0, 20, 515), prefill(1, 40, 0, 2000, 2400))
        assert watch.evictions == {}
        watch.see(idle(0, 20, 515), idle(1, 40, 2415), counters=counted(1185, 2000, 48))
        assert watch.evictions == {"unknown": (1, 300)}

    def test_more_reused_than_was_seen_proves_nothing_where_another_task_ran_in_between(self) -> None:
        watch = self.main_holds(held=300)
        watch.see(never_used(0), prefill(1, 40, 0, 2000, 2400))
        watch.see(never_used(0), idle(1, 40, 2415), counters=counted(3000, 2300, 64))
        assert watch.evictions == {}

    def test_cache_prompt_false_on_a_recently_used_slot_is_no_eviction(self) -> None:
        watch = self.main_holds()
        watch.see(never_used(0), prefill(1, 40, 512, 0, 1024))
        watch.see(never_used(0), idle(1, 40, 3015), counters=counted(5985, 0, 32))
        assert watch.evictions == {}

    def test_a_task_that_nobody_saw_at_work_is_judged_by_the_counters_when_they_close(self) -> None:
        watch = self.main_holds()
        watch.see(never_used(0), idle(1, 40, 1219))
        watch.see(never_used(0), idle(1, 40, 1219), counters=counted(3185, 1000, 36), after=0)
        assert watch.evictions == {"diverged": (1, 2000)}

    def test_of_tasks_that_nobody_saw_only_what_is_certainly_gone_counts(self) -> None:
        watch = self.main_holds()
        watch.see(never_used(0), idle(1, 60, 1219))
        watch.see(never_used(0), idle(1, 60, 1219), counters=counted(9000, 0, 99), after=0)
        assert watch.evictions == {"unknown": (1, 1781)}

    def test_a_rejected_request_is_no_eviction(self) -> None:
        watch = self.main_holds()
        watch.see(never_used(0), idle(1, 40, 3000), counters=counted(2985, 0, 16))
        assert watch.evictions == {}
        assert watch.counts.slots[1].prompt_tokens["computed"] == 2985

    def test_an_idle_slot_emptied_as_another_task_starts_is_idle_clear(self) -> None:
        watch = self.main_holds(unified=True)
        watch.see(prefill(0, 20, 0, 0, 512), idle(1, 1, 0))
        assert watch.evictions == {"idle_clear": (1, 3000)}

    def test_when_the_pool_may_have_been_full_idle_clear_and_purge_cannot_be_told_apart(self) -> None:
        watch = self.main_holds(held=9000, unified=True)
        watch.see(prefill(0, 20, 7000, 0, 7500), idle(1, 1, 0))
        assert watch.evictions == {"unknown": (1, 9000)}

    def test_with_separate_slots_no_task_elsewhere_can_empty_a_slot(self) -> None:
        watch = self.main_holds(unified=False)
        watch.see(prefill(0, 20, 0, 0, 512), idle(1, 1, 0))
        assert watch.evictions == {"unknown": (1, 3000)}

    def test_a_slot_emptied_while_nothing_started_was_erased(self) -> None:
        watch = self.main_holds()
        watch.see(never_used(0), idle(1, 1, 0))
        assert watch.evictions == {"erase": (1, 3000)}

    def test_a_child_of_n_above_1_that_is_cleared_at_its_end_is_no_eviction(self) -> None:
        watch = started()
        watch.see(decode(0, 2, 320, 0, 3), decode(1, 3, 0, 320, 3))
        watch.see(idle(0, 2, 327), idle(1, 3, 0), counters=counted(320, 0, 16))
        assert watch.evictions == {}

    def test_with_separate_slots_a_child_is_no_eviction_even_as_another_task_begins(self) -> None:
        watch = Watch(unified=False)
        watch.see(never_used(0), never_used(1), never_used(2), counters=counted())
        watch.see(never_used(0), decode(1, 2, 320, 0, 3), decode(2, 3, 0, 320, 3))
        watch.see(prefill(0, 9, 0, 0, 100), idle(1, 2, 327), idle(2, 3, 0), counters=counted(320, 0, 16))
        assert watch.evictions == {}

    def test_a_cancelled_request_that_takes_its_batch_back_is_no_eviction(self) -> None:
        watch = started()
        watch.see(never_used(0), prefill(1, 3, 512, 0, 2048))
        watch.see(never_used(0), idle(1, 3, 512), counters=counted())
        assert watch.evictions == {}

    def test_a_context_that_shrinks_while_generating_was_shifted(self) -> None:
        watch = started()
        watch.see(never_used(0), decode(1, 3, 1500, 0, 225, held=1725))
        watch.see(never_used(0), decode(1, 3, 1500, 0, 639, held=1116))
        assert watch.evictions == {"context_shift": (1, 1023)}

    def test_a_sleep_is_one_eviction_for_all_that_was_held_and_waking_is_none(self) -> None:
        watch = started()
        watch.see(idle(0, 1, 500), idle(1, 2, 300), counters=counted(770, 0, 32))
        watch.see(state=ServerState.SLEEPING, counters=counted(770, 0, 32))
        watch.see(state=ServerState.SLEEPING, counters=counted(770, 0, 32))
        assert watch.evictions == {"sleep": (1, 800)}
        assert [slot.context_tokens for slot in box(watch.history, watch.now).slots] == [0, 0]
        watch.see(never_used(0), idle(1, 9, 115), counters=counted(870, 0, 48))
        assert watch.evictions == {"sleep": (1, 800)}
        assert watch.counts.observations["exact"] == 1
        assert watch.counts.slots[0].evictions["sleep"] == 1
        assert watch.counts.slots[1].evictions["sleep"] == 1

    def test_a_sleep_that_nobody_saw_is_told_by_empty_slots_in_the_same_process(self) -> None:
        watch = self.main_holds()
        watch.see(idle(0, 50, 115), never_used(1), counters=counted(3085, 0, 32))
        assert watch.evictions == {"sleep": (1, 3000)}

    def test_nothing_held_nothing_evicted(self) -> None:
        watch = started()
        watch.see(state=ServerState.SLEEPING)
        assert watch.evictions == {}


class TestRestarts:
    def test_a_restart_whose_counters_already_passed_the_old_ones_is_told_by_the_header(self) -> None:
        watch = started()
        watch.see(never_used(0), idle(1, 3, 315), counters=counted(300, 0, 16))
        watch.see(never_used(0), idle(1, 9, 615), counters=counted(600, 0, 16, identity="second"))
        assert watch.history.restarts == 1
        assert watch.evictions == {"restart": (1, 315)}
        assert watch.counts.slots[1].prompt_tokens["computed"] == 900
        assert watch.counts.slots[1].generated_tokens == 32
        assert box(watch.history, watch.now).last_restart_at == watch.now + 1e9

    def test_counters_that_went_back_are_a_restart_where_no_header_tells(self) -> None:
        watch = Watch()
        watch.see(never_used(0), counters=counted(identity=None))
        watch.see(idle(0, 9, 315), counters=counted(300, 0, 16, identity=None))
        watch.see(idle(0, 2, 115), counters=counted(100, 0, 16, identity=None))
        assert watch.history.restarts == 1
        assert watch.counts.slots[0].prompt_tokens["computed"] == 400

    def test_without_metrics_task_numbers_that_went_back_are_a_restart(self) -> None:
        watch = Watch()
        watch.see(idle(0, 90, 315), counters_readable=False)
        watch.see(idle(0, 2, 115), counters_readable=False)
        assert watch.history.restarts == 1
        assert watch.evictions == {"restart": (1, 315)}

    def test_slots_of_a_new_process_ask_for_the_counters_first(self) -> None:
        watch = started()
        watch.see(never_used(0), idle(1, 9, 315), counters=counted(300, 0, 16))
        assert looks_restarted(watch.history, (never_used(0), never_used(1)))
        assert looks_restarted(watch.history, (never_used(0), idle(1, 3, 315)))
        assert looks_restarted(watch.history, (never_used(0),))
        assert not looks_restarted(watch.history, (never_used(0), idle(1, 10, 315)))

    def test_another_number_of_slots_loses_what_the_old_ones_held(self) -> None:
        watch = started()
        watch.see(never_used(0), idle(1, 9, 315), counters=counted(300, 0, 16))
        watch.see(idle(0, 1, 115), counters=counted(100, 0, 16, identity="second"))
        assert watch.evictions == {"restart": (1, 315)}
        assert len(box(watch.history, watch.now).slots) == 1

    def test_counters_of_a_model_that_left_stay_and_go_on_when_it_returns(self) -> None:
        watch = Watch(model="a")
        watch.see(never_used(0), counters=counted())
        watch.see(idle(0, 1, 115), counters=counted(100, 0, 16))
        watch.model = "b"
        watch.see(idle(0, 1, 65), counters=counted(50, 0, 16, identity="second"))
        watch.model = "a"
        watch.see(idle(0, 1, 25), counters=counted(10, 0, 16, identity="third"))
        computed = {model: counts.slots[0].prompt_tokens["computed"] for model, counts in
                    watch.history.counts.items()}  # fmt: skip
        assert computed == {"a": 110, "b": 50}
        assert watch.counts.evictions["slot", "restart", "unknown"].tokens == 115


class TestOlderBuilds:
    def test_without_a_counter_of_reused_tokens_there_is_no_unattributed_reuse(self) -> None:
        watch = Watch()
        watch.see(never_used(0), counters=counted(reused=None))
        watch.see(decode(0, 1, 100, 50, 5), counters=counted(100, None, 0))
        watch.see(idle(0, 1, 165), counters=counted(100, None, 16))
        assert watch.counts.unattributed_tokens == {"computed": 0, "generated": 0}
        assert watch.counts.slots[0].prompt_tokens == {"computed": 100, "unknown": 50}


class TestLruRank:
    def watch(self, unified: bool = False) -> Watch:
        watch = Watch(unified=unified)
        watch.see(*map(never_used, range(4)), counters=counted())
        watch.see(*map(never_used, range(3)), idle(3, 1, 115), counters=counted(100, 0, 16))
        return watch

    def ranks(self, watch: Watch) -> list[int | None]:
        return [slot.lru_rank for slot in box(watch.history, watch.now).slots]

    def test_it_is_unknown_until_a_second_release_was_seen(self) -> None:
        assert self.ranks(self.watch()) == [None] * 4

    def test_never_used_slots_go_first_highest_id_first_then_by_release(self) -> None:
        watch = self.watch()
        watch.see(*map(never_used, range(2)), idle(2, 9, 65), idle(3, 1, 115), counters=counted(150, 0, 32))
        assert self.ranks(watch) == [2, 1, 4, 3]

    def test_two_releases_in_one_look_have_no_order(self) -> None:
        watch = self.watch()
        watch.see(
            never_used(0), idle(1, 8, 65), idle(2, 9, 65), idle(3, 1, 115), counters=counted(200, 0, 48)
        )
        assert self.ranks(watch) == [1, None, None, 2]

    def test_a_busy_slot_has_none(self) -> None:
        watch = self.watch()
        watch.see(*map(never_used, range(2)), idle(2, 9, 65), idle(3, 1, 115), counters=counted(150, 0, 32))
        watch.see(*map(never_used, range(2)), idle(2, 9, 65), prefill(3, 12, 0, 115, 200))
        assert self.ranks(watch) == [2, 1, 3, None]

    def test_unified_slots_have_none(self) -> None:
        watch = self.watch(unified=True)
        watch.see(*map(never_used, range(2)), idle(2, 9, 65), idle(3, 1, 0), counters=counted(150, 0, 32))
        assert self.ranks(watch) == [None] * 4


class TestAgeing:
    def test_readings_age_out_after_three_polls_or_ten_seconds_and_counters_stay(self) -> None:
        watch = started()
        watch.see(never_used(0), idle(1, 1, 115), counters=counted(100, 0, 16))
        for _ in range(3):
            watch.lose_a_poll()
        published = box(watch.history, watch.now + 5)
        assert published.slots[1].context_tokens == 115
        published = box(watch.history, watch.now + 10)
        assert published.slots[1].context_tokens is None
        assert published.slots[1].phase is None
        assert published.slots_busy is None
        assert published.counts[0].slots[1].prompt_tokens["computed"] == 100
        assert published.state is ServerState.UNREACHABLE
        assert not published.up

    def test_the_moment_of_expiry_is_known_so_that_it_can_be_published(self) -> None:
        watch = started()
        assert expires_at(watch.history, watch.now) == watch.now + 10
        assert expires_at(watch.history, watch.now + 11) is None

    def test_while_stalled_idle_slots_keep_their_figures_and_busy_ones_age(self) -> None:
        watch = started()
        watch.see(idle(0, 1, 115), prefill(1, 2, 512, 0, 1024), counters=counted(100, 0, 16))
        watch.lose_a_poll(ServerState.STALLED)
        published = box(watch.history, watch.now + 60)
        assert published.up
        assert published.slots[0].context_tokens == 115
        assert published.slots[1].context_tokens is None

    def test_leaving_slots_alone_keeps_their_figures_while_nothing_moved(self) -> None:
        watch = started()
        watch.see(never_used(0), idle(1, 1, 115), counters=counted(100, 0, 16))
        for _ in range(20):
            assert not counters_moved(watch.history, counted(100, 0, 16))
            watch.see(quiet=True, counters=counted(100, 0, 16), after=2)
        assert box(watch.history, watch.now).slots[1].context_tokens == 115
        assert watch.counts.slots[1].phase_seconds[Phase.IDLE] == pytest.approx(40.5)
        assert counters_moved(watch.history, counted(101, 0, 16))

    def test_requests_can_only_wait_while_every_slot_works(self) -> None:
        watch = started()
        watch.see(decode(0, 1, 10, 0, 1), decode(1, 2, 10, 0, 1), counters=counted(20, 0, 0, deferred=3))
        assert box(watch.history, watch.now).requests_deferred == 3
        watch.see(decode(0, 1, 10, 0, 1), idle(1, 2, 10))
        assert box(watch.history, watch.now).requests_deferred == 0


def test_more_tokens_than_one_pool_holds_prove_separate_slots() -> None:
    watch = Watch()
    watch.see(idle(0, 1, 10_000), idle(1, 2, 10_000))
    assert box(watch.history, watch.now).kv_unified is False


def test_a_server_that_was_never_reached_has_a_state_and_nothing_else() -> None:
    watch = Watch()
    watch.lose_a_poll()
    published = box(watch.history, watch.now)
    assert published.state is ServerState.UNREACHABLE
    assert published.counts == ()
    assert published.slots == ()
    assert published.slots_total is None


def test_a_server_that_sleeps_at_the_first_look_is_known_to_hold_nothing_and_waking_is_seen() -> None:
    watch = Watch(unified=False)
    watch.see(
        state=ServerState.SLEEPING,
        props=ServerProps("tiny", total_slots=2, context_limit_tokens=4096, sleeping=True),
        counters=counted(500, 0, 16),
    )
    assert [slot.context_tokens for slot in box(watch.history, watch.now).slots] == [0, 0]
    watch.see(never_used(0), idle(1, 7, 115), counters=counted(600, 0, 32))
    assert watch.counts.observations["exact"] == 1
    assert watch.counts.slots[1].prompt_tokens["computed"] == 100


def test_a_request_that_its_server_took_along_when_it_was_killed_is_not_counted_as_finished() -> None:
    watch = started()
    watch.see(never_used(0), decode(1, 9, 100, 0, 5))
    watch.see(never_used(0), never_used(1), counters=counted(identity="second"))
    watch.see(never_used(0), idle(1, 1, 65), counters=counted(50, 0, 16, identity="second"))
    assert watch.counts.requests == {"unknown": 1}
    assert watch.counts.observations == {"exact": 1, "apportioned": 0}


def test_drafted_tokens_are_accepted_or_rejected() -> None:
    watch = Watch()
    before = replace(counted(), drafted_tokens=100, draft_accepted_tokens=90)
    after = replace(counted(), drafted_tokens=160, draft_accepted_tokens=130)
    watch.see(never_used(0), counters=before)
    watch.see(never_used(0), counters=after)
    assert watch.counts.draft_tokens == {"accepted": 40, "rejected": 20}


class TestWhatCannotBeReadHasNoCounter:
    def test_without_slots_nothing_is_known_of_requests_but_all_tokens_are_counted(self) -> None:
        watch = Watch()
        watch.see(state=ServerState.SLOTS_DISABLED, counters=counted())
        watch.see(state=ServerState.SLOTS_DISABLED, counters=counted(100, 20, 16, prefill_seconds=2.0))
        assert watch.counts.unattributed_tokens == {"computed": 100, "reused": 20, "generated": 16}
        assert watch.counts.prefill_seconds == 2
        assert (watch.counts.requests, watch.counts.observations, watch.counts.evictions) == ({}, {}, {})
        assert watch.counts.request_prefill_seconds is None

    def test_without_metrics_no_request_can_be_exact(self) -> None:
        watch = Watch()
        watch.see(never_used(0), counters_readable=False)
        assert watch.counts.requests == {"unknown": 0}
        assert watch.counts.observations == {"apportioned": 0}
        assert watch.counts.request_prefill_seconds is None
        assert watch.counts.unattributed_tokens is None
        assert watch.counts.prefill_seconds is None

    def test_with_both_everything_stands_at_zero_from_the_first_look(self) -> None:
        counts = started().counts
        assert counts.observations == {"exact": 0, "apportioned": 0}
        assert counts.requests == {"unknown": 0}
        assert {reason for _, reason, _ in counts.evictions} == set(counts.slots[0].evictions)
        assert sum(counts.request_prefill_seconds.counts) == 0


def test_while_the_counters_fail_requests_that_wait_for_them_are_bounded_and_none_is_forgotten() -> None:
    watch = started()
    for task in range(1, 600):
        watch.see(never_used(0), idle(1, task, 100))
    assert sum(len(claims) for claims in watch.history.claims.values()) <= MOST_CLAIMS
    watch.see(never_used(0), idle(1, 599, 100), counters=counted(50_000, 0, 9_000))
    assert watch.counts.requests == {"unknown": 599}
    assert watch.counts.slots[1].prompt_tokens["computed"] == 50_000


def test_a_server_that_names_ever_new_models_costs_no_memory_without_end() -> None:
    watch = Watch()
    for number in range(200):
        watch.model = f"model-{number}"
        watch.see(never_used(0))
    assert len(watch.history.counts) == MOST_MODELS


class TestOneOddAnswer:
    def test_slots_without_their_figures_for_one_look_take_no_counter_away(self) -> None:
        watch = started()
        watch.see(never_used(0), idle(1, 1, 500), counters=counted(485, 50, 16))
        watch.see(never_used(0), idle(1, 1, 0))
        assert watch.evictions == {"erase": (1, 500)}
        before = watch.counts
        odd = replace(idle(1, 1, 0), held_tokens=None, reused_tokens=None)
        watch.see(never_used(0), odd, counters=counted(485, None, 16))
        assert watch.evictions == {"erase": (1, 500)}
        assert watch.counts.slots == before.slots | {
            0: replace(before.slots[0], phase_seconds=watch.counts.slots[0].phase_seconds),
            1: replace(before.slots[1], phase_seconds=watch.counts.slots[1].phase_seconds),
        }

    def test_a_counter_that_one_answer_lacks_counts_nothing_twice(self) -> None:
        watch = started()
        full = counted(1000, 500, 16, prefill_seconds=100.0, decode_seconds=10.0)
        watch.see(never_used(0), idle(1, 1, 1515), counters=full)
        lacking = replace(full, reused_tokens=None, prefill_seconds=None, decode_seconds=None)
        watch.see(never_used(0), idle(1, 1, 1515), counters=lacking)
        watch.see(never_used(0), idle(1, 1, 1515), counters=full)
        counts = watch.counts
        assert (counts.prefill_seconds, counts.decode_seconds) == (100.0, 10.0)
        assert counts.slots[1].prompt_tokens["unknown"] == 500
        assert counts.unattributed_tokens["reused"] == 0

    def test_a_counter_that_went_back_in_the_same_process_takes_nothing_back(self) -> None:
        watch = started()
        watch.see(never_used(0), idle(1, 1, 1015), counters=counted(1000, 0, 16))
        watch.see(never_used(0), idle(1, 1, 1015), counters=counted(400, 0, 16))
        watch.see(never_used(0), idle(1, 9, 65), counters=counted(450, 0, 32))
        assert watch.counts.slots[1].prompt_tokens["computed"] == 1000
        watch.see(never_used(0), idle(1, 20, 65), counters=counted(1050, 0, 48))
        assert watch.counts.slots[1].prompt_tokens["computed"] == 1050

    def test_prefill_seconds_that_are_not_told_are_not_zero(self) -> None:
        watch = Watch()
        nothing = replace(counted(), prefill_seconds=None)
        watch.see(never_used(0), counters=nothing)
        watch.see(idle(0, 1, 115), counters=replace(counted(100, 0, 16), prefill_seconds=None))
        assert watch.counts.observations["exact"] == 1
        assert box(watch.history, watch.now).slots[0].last_prefill_seconds is None
        assert sum(watch.counts.request_prefill_seconds.counts) == 0

    def test_prefill_seconds_printed_too_coarsely_are_not_told(self) -> None:
        watch = Watch()
        before = replace(counted(prefill_seconds=20_000.1), prefill_seconds_step=0.1)
        watch.see(never_used(0), counters=before)
        short = replace(counted(100, 0, 16, prefill_seconds=20_000.2), prefill_seconds_step=0.1)
        watch.see(idle(0, 1, 115), counters=short)
        assert box(watch.history, watch.now).slots[0].last_prefill_seconds is None
        long = replace(counted(200, 0, 32, prefill_seconds=20_012.2), prefill_seconds_step=0.1)
        watch.see(idle(0, 9, 115), counters=long)
        assert box(watch.history, watch.now).slots[0].last_prefill_seconds == pytest.approx(12.0)


class TestTheProcess:
    def test_what_a_process_told_goes_with_it(self) -> None:
        watch = started(unified=True)
        assert box(watch.history, watch.now).kv_unified is True
        watch.process = None
        watch.see(never_used(0), never_used(1), counters=counted())
        published = box(watch.history, watch.now)
        assert (published.kv_unified, published.started_at) == (None, None)

    def test_a_restart_that_the_header_told_is_not_told_again_by_the_process(self) -> None:
        watch = started(unified=False)
        watch.see(never_used(0), idle(1, 9, 315), counters=counted(300, 0, 16))
        watch.process = None
        watch.see(never_used(0), idle(1, 1, 65), counters=counted(50, 0, 16, identity="second"))
        watch.process = ServerProcess(2, 2.0)
        watch.see(never_used(0), idle(1, 1, 65))
        assert watch.history.restarts == 1
        assert watch.evictions == {"restart": (1, 315)}

    def test_children_of_one_prompt_share_cells_and_prove_nothing(self) -> None:
        watch = Watch()
        watch.see(*(decode(slot, slot, 10_000, 0, 1) for slot in range(3)))
        assert box(watch.history, watch.now).kv_unified is None

    def test_a_phase_that_a_restart_ended_began_at_the_look_that_saw_it(self) -> None:
        watch = started()
        watch.see(never_used(0), decode(1, 9, 100, 0, 5))
        watch.see(never_used(0), never_used(1), counters=counted(identity="second"), after=7)
        assert box(watch.history, watch.now).slots[1].phase_started_at == watch.now + 1e9

    def test_new_slots_of_a_server_that_was_away_are_a_restart_where_no_counter_tells(self) -> None:
        watch = Watch()
        watch.see(idle(0, 90, 315), counters_readable=False)
        watch.lose_a_poll()
        watch.see(never_used(0), counters_readable=False)
        assert watch.history.restarts == 1
        assert watch.evictions == {"restart": (1, 315)}

    def test_a_restart_into_another_model_is_one_restart_and_one_eviction(self) -> None:
        watch = Watch(model="a")
        watch.see(idle(0, 90, 315), counters=counted(300, 0, 16))
        watch.model = "b"
        watch.see(idle(0, 2, 65), counters=counted(50, 0, 16, identity="second"))
        assert watch.history.restarts == 1
        lost = watch.history.counts["a"].evictions["slot", "restart", "unknown"]
        assert (lost.events, lost.tokens) == (1, 315)


class TestWhatARestartLeaves:
    def test_the_time_in_which_a_server_was_away_is_no_phase_of_its_slots(self) -> None:
        watch = started()
        watch.see(never_used(0), idle(1, 9, 315), counters=counted(300, 0, 16))
        before = watch.counts.slots[0].phase_seconds[Phase.IDLE]
        watch.lose_a_poll()
        watch.see(never_used(0), never_used(1), counters=counted(identity="second"), after=600)
        assert watch.counts.slots[0].phase_seconds[Phase.IDLE] == before

    def test_a_server_that_loads_after_it_was_away_was_restarted_even_where_no_counter_tells(self) -> None:
        watch = Watch()
        watch.see(idle(0, 90, 315), counters_readable=False)
        watch.lose_a_poll()
        watch.lose_a_poll(ServerState.LOADING)
        watch.see(never_used(0), counters_readable=False)
        assert watch.history.restarts == 1
        assert watch.evictions == {"restart": (1, 315)}

    def test_a_new_build_without_a_counter_of_reused_tokens_goes_on_by_what_slots_show(self) -> None:
        watch = started()
        watch.see(never_used(0), idle(1, 9, 315), counters=counted(300, 0, 16))
        new = counted(50, None, 16, identity="second")
        watch.see(idle(0, 1, 65), never_used(1), counters=new)
        assert not counters_moved(watch.history, new)
        watch.see(decode(0, 2, 20, 64, 3), never_used(1))
        watch.see(idle(0, 2, 103), never_used(1), counters=counted(70, None, 36, identity="second"))
        assert watch.counts.slots[0].prompt_tokens == {"computed": 70, "unknown": 64}

    def test_all_that_a_new_process_counted_is_new_whatever_the_old_one_offered(
        self,
    ) -> None:
        watch = Watch()
        watch.see(idle(0, 90, 315), counters_readable=False)
        watch.see(idle(0, 2, 665), counters_readable=False)
        watch.see(idle(0, 2, 665), counters=counted(600, 50, 16, identity="second"))
        left = watch.counts.unattributed_tokens
        assert (left["computed"], left["reused"], left["generated"]) == (600, 50, 16)


def test_one_low_answer_of_the_same_process_counts_nothing_twice() -> None:
    watch = started()
    full = counted(1000, 100, 16, prefill_seconds=1.0)
    watch.see(never_used(0), idle(1, 1, 1115), counters=full)
    watch.see(never_used(0), idle(1, 1, 1115), counters=counted(0, 0, 0))
    watch.see(never_used(0), idle(1, 1, 1115), counters=full)
    assert watch.counts.slots[1].prompt_tokens == {"computed": 1000, "unknown": 100}
    assert watch.counts.unattributed_tokens == {"computed": 0, "generated": 0, "reused": 0}
    assert watch.counts.prefill_seconds == 1.0


def test_drafts_printed_coarsely_are_accepted_and_rejected_in_their_true_proportion() -> None:
    watch = Watch()

    def drafts(drafted: int, accepted: int) -> ServerCounters:
        return replace(counted(), drafted_tokens=drafted, draft_accepted_tokens=accepted)

    watch.see(never_used(0), counters=drafts(1_000_000, 900_000))
    drafted, accepted = 1_000_000, 900_000
    for _ in range(300):
        drafted, accepted = drafted + 5, accepted + 4
        watch.see(never_used(0), counters=drafts(round(drafted, -1), accepted))
    assert watch.counts.draft_tokens["accepted"] == 1200
    assert watch.counts.draft_tokens["rejected"] == pytest.approx(300, abs=10)


def test_requests_that_ended_while_the_counters_failed_from_the_start_are_counted() -> None:
    watch = Watch()
    watch.see(never_used(0), counters_readable=None)
    for task in (1, 2, 3):
        watch.see(idle(0, task, 100), counters_readable=None)
    watch.see(idle(0, 3, 100), counters=counted(500, 0, 60))
    assert watch.counts.requests == {"unknown": 3}
    assert watch.counts.slots[0].prompt_tokens["computed"] == 0
