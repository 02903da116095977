"""The demo's server is a real one: flags as llama-server has them, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvscope.demo.running_server import RunningServer, ServerDidNotStart, start_server

StartServer = Callable[..., RunningServer]

pytestmark = pytest.mark.real_server


def get(url: str, key: str = "") -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})) as answer:
        return json.load(answer)


def status(url: str) -> int:
    try:
        get(url)
    except urllib.error.HTTPError as error:
        return error.code
    except ValueError:
        pass
    return 200


def test_without_np_it_has_four_slots_in_one_pool_and_no_metrics(start: StartServer) -> None:
    server = start("-c", "4096")
    assert [slot["n_ctx"] for slot in get(f"{server.url}/slots")] == [4096] * 4
    assert status(f"{server.url}/metrics") == 501


@pytest.mark.parametrize("spelling", [("-np", "2", "-c", "4096"), ("--parallel=2", "--ctx-size=4096")])
def test_separate_slots_divide_the_context(start: StartServer, spelling: tuple[str, ...]) -> None:
    server = start(*spelling, "--metrics")
    assert [slot["n_ctx"] for slot in get(f"{server.url}/slots")] == [2048] * 2
    assert status(f"{server.url}/metrics") == 200


def test_no_slots_key_prefix_and_alias_reach_the_server(start: StartServer) -> None:
    server = start("-c", "2048", "--no-slots", "--api-key", "a-key", "--api-prefix", "/here", "-a", "tiny")
    assert server.url.endswith("/here")
    assert status(f"{server.url}/slots") == 401
    with pytest.raises(urllib.error.HTTPError, match="501"):
        get(f"{server.url}/slots", "a-key")
    assert get(f"{server.url}/v1/models", "a-key")["data"][0]["id"] == "tiny"


def test_an_unknown_flag_ends_with_2() -> None:
    command = [sys.executable, "-m", "kvscope.demo.llama_server", "-m", "x.gguf", "--no-such-flag"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--no-such-flag" in ended.stderr


def test_a_file_that_is_no_model_is_told_with_the_servers_own_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(ServerDidNotStart, match="model loading error"), start_server(broken):
        pass


def test_a_library_that_a_bare_machine_lacks_is_named_with_the_way_out(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('libgomp.so.1: cannot open it')")
    environment = {"PYTHONPATH": str(tmp_path)}
    with (
        pytest.raises(ServerDidNotStart, match=r"\(libgomp\.so\.1: .+\): sudo apt install libgomp1") as told,
        start_server(tiny_model, environment=environment),
    ):
        pass
    assert "Traceback" not in str(told.value)


def test_it_ends_with_the_process_that_started_it(tiny_model: Path) -> None:
    starter = (
        "import os, sys, pathlib; from kvscope.demo.running_server import RunningServer;"
        f"print(RunningServer(pathlib.Path({str(tiny_model)!r}), '-c', '512').wait().pid, flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, check=False)
    try:
        left = psutil.Process(int(ended.stdout))
    except psutil.NoSuchProcess:
        return
    assert psutil.wait_procs([left], timeout=10)[1] == []
