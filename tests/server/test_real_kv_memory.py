"""What a real server allocates and saves is what the formulas say: each kind of memory, both modes.

Two truths that know nothing of the formulas: the size of the file that `POST /slots/N?action=save` writes,
to the byte, and the lines of the log about what was allocated, as they round it.
"""

from __future__ import annotations

import itertools
import json
import random
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models.kinds import MODELS

from kvscope.demo.running_server import start_server
from kvscope.observed.logged_memory import ROUNDED_BY_BYTES, LoggedMemory
from kvscope.sources.allocation_lines import parse_allocation
from kvscope.sources.gguf_header import read_header
from kvscope.tracking.kv_memory import ContextParameters, KvMemory, kv_memory

pytestmark = pytest.mark.real_server

ROOT = Path(__file__).parents[2]
GENERATED = 3
# Both sides of every window: a sequence holds the prompt and all but the last generated token.
LENGTHS = (1, 2, 17, *(window - 2 + more for window in (64, 80, 96, 112, 128) for more in (0, 1)), 300, 700)
BEYOND_A_CHUNK = (*LENGTHS, 8189, 8190, 8191, 9000)


@dataclass(frozen=True)
class Case:
    """A model, what the server is told, and the same for the formulas."""

    model: str
    cache_types: tuple[str, str] = ("f16", "f16")
    context_tokens: int = 4096
    lengths: Sequence[int] = LENGTHS


CASES = {
    **{name: Case(name) for name in MODELS},
    "chunked": Case("chunked", context_tokens=20480, lengths=BEYOND_A_CHUNK),
    "plain_q8_0": Case("plain", ("q8_0", "q8_0")),
    "plain_q5_1_q4_0": Case("plain", ("q5_1", "q4_0")),
    "window_q4_1_iq4_nl": Case("window", ("q4_1", "iq4_nl")),
    "latent_q8_0": Case("latent", ("q8_0", "q8_0")),
    "hybrid_f32_bf16": Case("hybrid", ("f32", "bf16")),
}

MODES = {
    "default": ((), ContextParameters(sequences=4, unified=True)),
    "separate": (("-np", "2"), ContextParameters(sequences=2, unified=False)),
}


@dataclass(frozen=True)
class Saved:
    """A slot that was saved: what the request and the server's reply say, and the file."""

    held_tokens: int
    reply: dict[str, Any]
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Session:
    """What was asked for, what is predicted from it, and what the server did."""

    asked: ContextParameters
    memory: KvMemory
    saved: tuple[Saved, ...]
    log: LoggedMemory


def ask(url: str, **asked: Any) -> dict[str, Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with opener.open(request, timeout=60) as answer:
        return dict(json.load(answer))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Path of each model by name, written when it is first asked for."""
    directory = tmp_path_factory.mktemp("models")

    class Written(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            path = directory / f"{name}.gguf"
            # In a process of its own: llama.cpp aborts on a model that it cannot build.
            command = [sys.executable, "-m", "tests.tiny_models", name, str(path)]
            written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert written.returncode == 0, written.stderr[-500:]
            self[name] = path
            return path

    return Written()


@pytest.fixture(scope="module", params=[f"{case}-{mode}" for case in CASES for mode in MODES])
def session(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Session:
    """One conversation that grows in a slot and is saved at each length; another slot was used before."""
    name, mode = request.param.rsplit("-", 1)
    case = CASES[name]
    mode_flags, parameters = MODES[mode]
    model = models[case.model]
    directory = tmp_path_factory.mktemp("saved")
    cache_type_k, cache_type_v = case.cache_types
    told = f"-c {case.context_tokens} -ub 64 -ctk {cache_type_k} -ctv {cache_type_v} -t 1 -lv 4".split()
    prompt = random.Random(0).choices(range(3, 259), k=max(case.lengths))
    saved = []
    with start_server(model, *told, *mode_flags, "--slot-save-path", str(directory)) as server:
        ask(f"{server.url}/completion", prompt=prompt[:40][::-1], n_predict=GENERATED, id_slot=0)
        for length in case.lengths:
            answer = ask(
                f"{server.url}/completion",
                prompt=prompt[:length],
                n_predict=GENERATED,
                id_slot=1,
                ignore_eos=True,
            )
            reply = ask(f"{server.url}/slots/1?action=save", filename="slot")
            held = length + answer["tokens_predicted"] - 1
            saved.append(Saved(held, reply, (directory / "slot").read_bytes()))
        log = parse_allocation(server.log_path.read_text().splitlines())
    asked = replace(
        parameters,
        context_tokens=case.context_tokens,
        micro_batch_tokens=64,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
    )
    return Session(asked, kv_memory(read_header(model), asked), tuple(saved), log)


def checkpoints(content: bytes) -> list[tuple[int, int]]:
    """Return tokens and state bytes of each context checkpoint that newer builds write behind the slot.

    llama.cpp tools/server/server-context.cpp, b11549: magic, version and count, 4 bytes each; then
    tokens (8), first and last position (4 each), and the states of target, draft and speculation, each
    behind its length (8). Nothing at all where there is no checkpoint.
    """
    if not content:
        return []
    magic, version, count = struct.unpack_from("<4sII", content)
    assert (magic, version) == (b"SCKP", 1)
    at, found = 12, []
    for _ in range(count):
        tokens, _, _ = struct.unpack_from("<qii", content, at)
        at += 16
        sizes = []
        for _ in range(3):
            (size,) = struct.unpack_from("<Q", content, at)
            sizes.append(size)
            at += 8 + size
        found.append((tokens, sizes[0]))
        assert sizes[1:] == [0, 0]
    assert at == len(content)
    return found


def test_a_saved_slot_and_its_checkpoints_have_exactly_the_predicted_bytes(session: Session) -> None:
    memory = session.memory
    for saved in session.saved:
        slot_bytes = memory.slot_file_bytes(saved.held_tokens)
        assert saved.reply["n_saved"] == saved.held_tokens
        assert saved.reply["n_written"] == len(saved.content) >= slot_bytes
        behind = checkpoints(saved.content[slot_bytes:])
        assert behind == [(tokens, memory.checkpoint_bytes(tokens)) for tokens, _ in behind]


def test_what_the_log_says_was_allocated_is_what_is_predicted(session: Session) -> None:
    memory, main = session.memory, session.log.main
    assert main is not None
    assert session.log.drafts == ()
    assert (main.sequences, main.unified) == (session.asked.sequences, session.asked.unified)
    assert main.micro_batch_tokens == session.asked.micro_batch_tokens
    assert main.context_tokens == memory.context_tokens
    assert main.sequence_context_tokens == memory.sequence_context_tokens
    # llama.cpp makes a cache without layers where a model has none of a kind.
    logged = sorted((c for c in main.caches if c.layers), key=lambda c: (str(c.kind), c.cells))
    predicted = sorted((c for c in memory.caches if c.layers), key=lambda c: (c.kind, c.cells))
    for said, cache in itertools.zip_longest(logged, predicted):
        assert (said.kind, said.cells) == (cache.kind, cache.cells)
        if "K" in said.parts:
            assert (said.layers, said.streams) == (len(cache.layers), cache.streams)
            assert said.parts["K"] == pytest.approx(cache.k_bytes, abs=ROUNDED_BY_BYTES)
            assert said.parts["V"] == pytest.approx(cache.v_bytes, abs=ROUNDED_BY_BYTES)
        assert said.total_bytes == pytest.approx(cache.total_bytes, abs=ROUNDED_BY_BYTES)
        assert sum(said.devices.values()) == pytest.approx(cache.total_bytes, abs=ROUNDED_BY_BYTES)
