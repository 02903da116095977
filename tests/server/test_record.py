"""What is recorded of a real server can be played back, and shows what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.record.recorder import KEPT_TEXT, Situation, Stage
from tests.replay.replay import replay

pytestmark = pytest.mark.real_server


async def one_request(stage: Stage) -> None:
    await stage.ask(stage.words(200), 10)
    await stage.seen()


async def test_a_recorded_request_is_shown_when_it_is_played_back(tiny_model: Path) -> None:
    situation = Situation(
        one_request, ("-c", "1024", "--metrics"), environment={"LLAMA_SERVER_SLOTS_DEBUG": "1"}
    )
    recording = await Stage(situation, tiny_model).record("one", {"situation": "one"})
    held = [
        sample.value
        for family in text_string_to_metric_families((await replay(recording)).metrics)
        for sample in family.samples
        if sample.name == "kvscope_slot_context_tokens"
    ]
    assert sum(held) == 200 + 10 - 1
    prompts = [
        slot["prompt"]
        for line in json.loads(json.dumps(recording.lines))
        if line.get("path") == "/slots"
        for slot in line["json"]
        if "prompt" in slot
    ]
    assert prompts
    assert all(0 < len(prompt) <= KEPT_TEXT for prompt in prompts)
