"""docs/METRICS.md, written from the metric rows: `python -m kvscope.metrics.document` prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from kvscope.metrics.collector import SUBJECTS
from kvscope.metrics.family import Family
from kvscope.observed.server import ServerState, Source

INTRODUCTION = """\
# Metrics

<!-- Written by `make docs` from the rows in exporter/kvscope/metrics/; a change here is lost. -->

Names and labels are a promise: new ones may come, and a rename is named in the changelog.

- **Unknown is absent.** A series exists only while its value is known: never 0, NaN or an old value in its
  place. A reading stays valid for three polls of its source, at least 10 s, so that one lost poll blanks
  nothing. A known nothing is 0: a sleeping server holds 0 tokens. `kvscope_server_up` and
  `kvscope_server_state` are there for every server in the settings from the first look on.
- **Counters** count from the exporter's first look, not from the server's start. They stand at 0 for every
  label set that can occur, so `increase()` sees the first event, and never go back while the exporter lives:
  a restarted server goes on where it was. Without the source they need they are absent. When a server gets
  another model, the counters of the earlier one stay, under its own name; with more than 64 models the one
  known longest goes. Since when each counts is in its `_created` series, in the OpenMetrics format only.
- **Booleans** are 1 and 0. A **state set** has one series for each state, exactly one of them 1.
- **Times** are in seconds; a time of day is in seconds since 1970, so `time() - ..._timestamp_seconds` is an
  age. Tokens are tokens of the served model.
- **Several exporters** may both name a server `main`: join on `(job, instance, server, model, slot)`.
- A failed source loses its readings, keeps its counters and costs no other source anything: `/metrics`
  stays 200.

"Needs" names the sources that must be readable for a metric to appear. `slots`, `metrics` and `props` are the
server's endpoints of these names (`/metrics` needs the server's flag `--metrics`); `process` is the server's
process on the same machine. The process metrics of Prometheus' Python client (`process_...`: CPU, memory and
files of the exporter itself, on Linux) come besides.

## Labels

Values come from small closed sets: never a task, a session, a process, a path or a word of a prompt.
A label whose value is unknown is left out.

"""

LABELS: tuple[tuple[str, str], ...] = (
    ("server", "the server's name in the settings"),
    (
        "model",
        "the model's name as served, without directories, `.gguf` and shard suffix; left out while unknown",
    ),
    ("slot", "the slot's number, from 0"),
    ("state", ", ".join(f"`{state}`" for state in ServerState)),
    ("phase", "`idle`; `prefill`: it reads a prompt; `decode`: it generates"),
    (
        "source",
        "of tokens: `computed`; `unknown`: reused, from which tier is not known; of unattributed tokens: "
        "`computed`, `reused`, `generated`; in `kvscope_source_...` and `kvscope_poll_interval_seconds`: "
        + ", ".join(f"`{source}`" for source in Source)
        + ", and without a server `gpu`, `host`"
        + "; in `kvscope_kv_source_info`: `setting`: given to kvscope; `log`; `process`: its command line "
        "and environment; `props`: what /props says; `default`: llama.cpp's own, as nothing else was said",
    ),
    ("outcome", "how a request ended: `unknown`, because polls do not tell"),
    (
        "precision",
        "`exact`: one slot changed and computed + reused + generated - 1 equals the tokens it holds; "
        "`apportioned`: shared out among the slots that worked, so that the sum stays exact",
    ),
    ("tier", "`slot`: the KV cache of the slots"),
    (
        "reason",
        "`takeover`: another prompt took the slot; `diverged`: only the common start was kept, after an "
        "edited history, a compaction or a sub-agent with the same system prompt; `idle_clear`: the server "
        "cleared an idle slot for another task; `context_shift`: the oldest part was dropped; `erase`: a "
        "client asked for it; `sleep`; `restart`; `unknown`: two reasons fit, or none. "
        "Of a GPU held back: `power`, `thermal`, `other`",
    ),
    ("kept", "whether a copy lives on: `unknown`, because polls do not tell"),
    (
        "cache",
        "`full`: attention over the whole context; `window`: over a sliding or chunked window; `compressed`; "
        "`indexer`: what sparse attention looks up; `recurrent`: state of a fixed size",
    ),
    ("device", "as llama.cpp names it; left out where only model and settings tell"),
    (
        "gpu",
        "the GPU's index as text, `0:1` for an instance of one in MIG mode; where several backends read, "
        "with its backend's name before it but for the first; `pretend0` for the pretend one",
    ),
    ("uuid, name, vendor, driver", "of the GPU"),
    ("process", "a program's name, without path and arguments"),
    ("clock", "`graphics`, `memory`"),
    ("direction", "`rx`: to the GPU; `tx`: from it"),
    (
        "kind",
        "of a GPU's memory: `weights`, `kv`, `compute`: what the server allocated at load; "
        "`server_rest`: what else its process holds; `server_unsplit`: of its process, and cannot be "
        "told apart; `other_processes`; `unattributed`: in use, by whom is not readable; `reserved`; "
        "`free`. Of a GPU's errors: `ecc_corrected`, `ecc_uncorrected`, `xid`. Of a process' memory: "
        "`resident`, `shared`, `swapped`; of the host's: `total`, `available`, `swap_used`; of its "
        "pressure: `some` or all (`full`) tasks waited",
    ),
    (
        "setting",
        "`context`, `slots`, `unified`, `cache_type`, `swa_full`, `flash_attention`, `batch`: of the "
        "context; `shape`: of the model",
    ),
    ("result", "`accepted`, `rejected`"),
    (
        "build, ftype, architecture",
        "llama.cpp's build, the type of the weights, the model's architecture where its file can be read",
    ),
    ("version, python", "of the exporter"),
    ("le", "upper bound of a histogram's bucket"),
)


def document() -> str:
    """Return docs/METRICS.md as Markdown."""
    parts = [
        INTRODUCTION,
        _table(("label", "values"), ((f"`{name}`".replace(", ", "`, `"), text) for name, text in LABELS)),
    ]
    for subject, families in SUBJECTS:
        parts.append(f"\n## {subject}\n\n")
        parts.append(_table(("name", "type", "labels", "meaning", "needs"), map(_row, families)))
    return "".join(parts)


def _row(family: Family) -> tuple[str, ...]:
    labels = ", ".join(family.labels)
    return f"`{family.name}`", family.kind, labels, family.help, family.needs


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(document())
