"""A real llama.cpp server out of the package `xllamacpp`, with llama-server's own flags.

Run as `python -m kvscope.demo.llama_server -m MODEL --port 0 ...`: for machines without a
llama-server. It prints `listening on http://HOST:PORT` on stdout once the model is loaded, logs
on stderr (or --log-file) as llama-server does, and ends on SIGTERM and SIGINT.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path


def flags() -> argparse.ArgumentParser:
    """Return the parser of those flags of llama-server that demo and tests need, in its spelling."""
    parser = argparse.ArgumentParser(prog="llama-server", allow_abbrev=False)
    parser.add_argument("-m", "--model", required=True, type=Path)
    parser.add_argument("-a", "--alias")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0: any free port")
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--api-prefix", default="")
    parser.add_argument("-to", "--timeout", type=int)

    parser.add_argument("-c", "--ctx-size", type=int, default=0, help="0: as the model was trained")
    parser.add_argument("-np", "--parallel", type=int, default=-1, help="-1: four slots, unified")
    parser.add_argument("-kvu", "--kv-unified", action="store_true")
    parser.add_argument("-no-kvu", "--no-kv-unified", dest="kv_unified", action="store_false")
    parser.add_argument("-ctk", "--cache-type-k", default="f16")
    parser.add_argument("-ctv", "--cache-type-v", default="f16")
    parser.add_argument("-cram", "--cache-ram", type=int, default=8192, metavar="MIB")
    parser.add_argument("--cache-idle-slots", action="store_true", default=True)
    parser.add_argument("--no-cache-idle-slots", dest="cache_idle_slots", action="store_false")
    parser.add_argument("--cache-prompt", action="store_true", default=True)
    parser.add_argument("--no-cache-prompt", dest="cache_prompt", action="store_false")
    parser.add_argument("--cache-reuse", type=int, default=0)
    parser.add_argument("-sps", "--slot-prompt-similarity", type=float, default=0.1)
    parser.add_argument("--slot-save-path", default="")
    parser.add_argument("--sleep-idle-seconds", type=int, default=-1)
    parser.add_argument("--context-shift", action="store_true", default=False)
    parser.add_argument("--no-context-shift", dest="context_shift", action="store_false")

    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--slots", action="store_true", default=True)
    parser.add_argument("--no-slots", dest="slots", action="store_false")
    parser.add_argument("--props", action="store_true")

    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-tb", "--threads-batch", type=int)
    parser.add_argument("--threads-http", type=int)
    parser.add_argument("-b", "--batch-size", type=int, default=2048)
    parser.add_argument("-ub", "--ubatch-size", type=int, default=512)
    parser.add_argument("-s", "--seed", type=int)
    parser.add_argument("--no-warmup", dest="warmup", action="store_false")
    parser.add_argument("-lv", "--verbosity", "--log-verbosity", type=int, default=3)
    parser.add_argument("--log-file", type=Path)
    parser.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="not llama-server's: end when whoever started this process is gone",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal comes; exit 2 for a flag that is not known, 1 when the server does not start."""
    given = flags().parse_args(arguments)
    if not given.model.is_file():
        sys.exit(f"llama-server: --model {given.model}: no such file")
    for end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(end, lambda *_: os._exit(0))
    if given.until_stdin_closes:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    if given.log_file:
        # llama.cpp writes its log to the file descriptor, past Python.
        with given.log_file.open("ab", buffering=0) as log:
            os.dup2(log.fileno(), sys.stderr.fileno())

    try:
        import xllamacpp
    except ImportError as error:  # of its own libraries, on a bare machine
        sys.exit(f"llama-server: xllamacpp cannot be loaded ({error}): sudo apt install libgomp1")

    try:
        server = xllamacpp.Server(_params(given))
    except (RuntimeError, ValueError) as error:
        sys.exit(f"llama-server: does not start: {error}")
    print(f"listening on {server.listening_address}", flush=True)
    while True:
        time.sleep(3600)


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def _params(given: argparse.Namespace) -> object:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(given.model)
    if given.alias:
        params.model_alias = {given.alias}
    params.hostnames = [given.host]
    params.port = given.port
    params.api_keys = given.api_key
    params.api_prefix = given.api_prefix
    if given.timeout is not None:
        params.timeout_read = params.timeout_write = given.timeout

    params.n_ctx = given.ctx_size
    params.n_parallel = given.parallel
    params.kv_unified = given.kv_unified
    params.cache_type_k = _cache_type(given.cache_type_k)
    params.cache_type_v = _cache_type(given.cache_type_v)
    params.cache_ram_mib = given.cache_ram
    params.cache_idle_slots = given.cache_idle_slots
    params.cache_prompt = given.cache_prompt
    params.n_cache_reuse = given.cache_reuse
    params.slot_prompt_similarity = given.slot_prompt_similarity
    if given.slot_save_path:
        # llama-server appends the file name as it is.
        params.slot_save_path = given.slot_save_path.rstrip("/") + "/"
    params.sleep_idle_seconds = given.sleep_idle_seconds
    params.ctx_shift = given.context_shift

    params.endpoint_metrics = given.metrics
    params.endpoint_slots = given.slots
    params.endpoint_props = given.props

    if given.threads is not None:
        params.cpuparams.n_threads = given.threads
    if given.threads_batch is not None or given.threads is not None:
        params.cpuparams_batch.n_threads = given.threads_batch or given.threads
    if given.threads_http is not None:
        params.n_threads_http = given.threads_http
    params.n_batch = given.batch_size
    params.n_ubatch = given.ubatch_size
    if given.seed is not None:
        params.sampling.seed = given.seed
    params.warmup = given.warmup
    params.verbosity = given.verbosity
    return params


def _cache_type(name: str) -> object:
    import xllamacpp

    try:
        return getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}")
    except AttributeError:
        sys.exit(f"llama-server: cache type {name!r} is not known; f16, f32, q8_0, q4_0 are")


if __name__ == "__main__":
    main()
