"""What a llama-server command line and its environment say of the context: one pure parser.

Flags, variables and what their values may be: llama.cpp common/arg.cpp at build b11549, as that build itself
lists and reads them. Flags of older builds are known too. `--flag=value`, which llama.cpp refuses, is
read as `--flag value`.
"""

from __future__ import annotations

import difflib
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from kvscope.observed.model import ContextSettings

_Reader = Callable[[str], Any]
"""From a value's text to what it says; raises ValueError with what is wrong with it."""

_YES = ("on", "enabled", "true", "1")
_NO = ("off", "disabled", "false", "0")
_AUTO = ("auto", "-1")
_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_DRAFTS = ("draft-simple", "draft-eagle3", "draft-mtp", "draft-dflash", "draft-dspark")
_NGRAMS = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
_DRAFT_KINDS = ("none", *_DRAFTS, *_NGRAMS)
_LEADING_INTEGER = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)")
_LARGEST_INTEGER = 2**31 - 1
_LONGEST_SHOWN = 24
_MOST_NAMED = 5
_FLAG_NAME = re.compile(r"--[A-Za-z][\w.-]{0,39}|-[A-Za-z]{1,6}", re.ASCII)


class ArgumentsError(ValueError):
    """Arguments that llama-server would not take; the message names the flag and the value."""


def _integer(text: str) -> int:
    # std::stoi: white space, a sign, digits; what follows them is not looked at.
    found = _LEADING_INTEGER.match(text)
    if found is None:
        raise ValueError("no whole number")
    number = int(found[1]) if len(found[1]) <= 11 else _LARGEST_INTEGER + 1
    if not -_LARGEST_INTEGER - 1 <= number <= _LARGEST_INTEGER:
        raise ValueError(f"not between {-_LARGEST_INTEGER - 1} and {_LARGEST_INTEGER}")
    return number


def _at_least(lowest: int) -> _Reader:
    def read(text: str) -> int:
        number = _integer(text)
        if number < lowest:
            raise ValueError(f"below {lowest}")
        return number

    return read


def _slots(text: str) -> int:
    number = _integer(text)
    if number == 0:
        raise ValueError("neither -1, for the server's own choice, nor a number of slots")
    return number


def _seconds(text: str) -> float:
    number = _integer(text)
    if number == 0 or number < -1:
        raise ValueError("neither -1, for never, nor a number of seconds")
    return float(number)


def _gpu_layers(text: str) -> str:
    if text in ("auto", "all"):
        return text
    number = _integer(text)
    return str(number) if number >= 0 else "auto" if number == -1 else "all"


def _one_of(names: Sequence[str]) -> _Reader:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"none of {', '.join(names)}")
        return text

    return read


def _word(meanings: Mapping[Any, Sequence[str]]) -> _Reader:
    def read(text: str) -> Any:
        for meaning, words in meanings.items():
            if text in words:
                return meaning
        raise ValueError(f"none of {', '.join(words[0] for words in meanings.values())}")

    return read


def _draft_kinds(text: str) -> tuple[str, ...]:
    kinds = text.split(",")
    for kind in kinds:
        if kind == "none":  # undoes its list, but no other one
            return ()
        if kind not in _DRAFT_KINDS:
            raise ValueError(f"{_shown(kind)} is none of {', '.join(_DRAFT_KINDS)}")
    return tuple(kinds)


def _path(text: str) -> str | None:
    return text or None


_on_or_off = _word({True: _YES, False: _NO})
_on_off_or_auto = _word({"on": _YES, "off": _NO, "auto": _AUTO})


@dataclass(frozen=True, slots=True)
class _Valued:
    """A setting that a value says. gathers: every flag and variable adds to what was said before."""

    field: str
    flags: str
    read: _Reader
    variables: str = ""
    gathers: bool = False


@dataclass(frozen=True, slots=True)
class _Switch:
    """A setting that flags without a value say, one group of them yes, the other no."""

    field: str
    on: str
    off: str
    variable: str


@dataclass(frozen=True, slots=True)
class _LeftOut:
    """What is not followed. decides: the settings that are not known from there on.

    decides_the_unsaid: besides, whatever neither a flag nor a variable says.
    """

    flags: str
    why: str
    decides: str = ""
    values: int = 0
    variables: str = ""
    decides_the_unsaid: bool = False


_VALUED = (
    _Valued("context_tokens", "-c --ctx-size", _at_least(0), "LLAMA_ARG_CTX_SIZE"),
    _Valued("unified_slot_tokens", "--kv-unified-per-slot", _at_least(0), "LLAMA_ARG_KV_UNIFIED_PER_SLOT"),
    _Valued("slots", "-np --parallel", _slots, "LLAMA_ARG_N_PARALLEL"),
    _Valued("batch_tokens", "-b --batch-size", _at_least(1), "LLAMA_ARG_BATCH"),
    _Valued("micro_batch_tokens", "-ub --ubatch-size", _at_least(0), "LLAMA_ARG_UBATCH"),
    _Valued("cache_type_k", "-ctk --cache-type-k", _one_of(_CACHE_TYPES), "LLAMA_ARG_CACHE_TYPE_K"),
    _Valued("cache_type_v", "-ctv --cache-type-v", _one_of(_CACHE_TYPES), "LLAMA_ARG_CACHE_TYPE_V"),
    _Valued("flash_attention", "-fa --flash-attn", _on_off_or_auto, "LLAMA_ARG_FLASH_ATTN"),
    _Valued("fit", "-fit --fit", _on_or_off, "LLAMA_ARG_FIT"),
    _Valued("draft_kinds", "--spec-type", _draft_kinds, "LLAMA_ARG_SPEC_TYPE", gathers=True),
    _Valued(
        "draft_tokens_max",
        "--spec-draft-n-max --draft --draft-n --draft-max",
        _at_least(0),
        "LLAMA_ARG_SPEC_DRAFT_N_MAX LLAMA_ARG_DRAFT_MAX",
    ),
    _Valued(
        "draft_cache_type_k",
        "-ctkd --cache-type-k-draft --spec-draft-type-k",
        _one_of(_CACHE_TYPES),
        "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K",
    ),
    _Valued(
        "draft_cache_type_v",
        "-ctvd --cache-type-v-draft --spec-draft-type-v",
        _one_of(_CACHE_TYPES),
        "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V",
    ),
    _Valued("draft_model", "-md --model-draft --spec-draft-model", _path, "LLAMA_ARG_SPEC_DRAFT_MODEL"),
    _Valued("gpu_layers", "-ngl --gpu-layers --n-gpu-layers", _gpu_layers, "LLAMA_ARG_N_GPU_LAYERS"),
    _Valued("model_path", "-m --model", _path, "LLAMA_ARG_MODEL"),
    _Valued("sleep_idle_seconds", "--sleep-idle-seconds", _seconds),
)
_SWITCHES = (
    _Switch("unified", "-kvu --kv-unified", "-no-kvu --no-kv-unified", "LLAMA_ARG_KV_UNIFIED"),
    _Switch("kv_on_gpu", "-kvo --kv-offload", "-nkvo --no-kv-offload", "LLAMA_ARG_KV_OFFLOAD"),
    _Switch("swa_full", "--swa-full", "", "LLAMA_ARG_SWA_FULL"),
)
_PRESET = "a preset of llama.cpp, its settings are left out"
_OTHER_BUILD = "not every build reads it, so it is left out"
_MOVED = "where it puts the weights, only its log tells"
_LEFT_OUT = (
    _LeftOut(
        "--gpt-oss-20b-default --gpt-oss-120b-default",
        _PRESET,
        "model_path context_tokens slots batch_tokens micro_batch_tokens",
    ),
    _LeftOut("--embd-gemma-default", _PRESET, "model_path context_tokens slots micro_batch_tokens"),
    _LeftOut(
        "--fim-qwen-1.5b-default --fim-qwen-3b-default --fim-qwen-7b-default --fim-qwen-30b-default",
        _PRESET,
        "model_path batch_tokens micro_batch_tokens",
    ),
    _LeftOut(
        "--fim-qwen-7b-spec --fim-qwen-14b-spec",
        _PRESET,
        "model_path batch_tokens micro_batch_tokens draft_model",
    ),
    _LeftOut("--vision-gemma-4b-default --vision-gemma-12b-default", _PRESET, "model_path"),
    _LeftOut(
        "--embd-bge-small-en-default --embd-e5-small-en-default --embd-gte-small-default",
        _PRESET,
        "model_path context_tokens",
    ),
    _LeftOut(
        "--models-preset",
        "a file of presets, its settings are left out",
        values=1,
        variables="LLAMA_ARG_MODELS_PRESET",
        decides_the_unsaid=True,
    ),
    _LeftOut(
        "--spec-draft-hf -hfd -hfrd --hf-repo-draft",
        "which file the draft model is in is not known",
        "draft_model",
        values=1,
        variables="LLAMA_ARG_SPEC_DRAFT_HF_REPO",
    ),
    _LeftOut("--override-kv", "keys of the model's header that it changes are left out", values=1),
    _LeftOut(
        "-dev --device",
        "on which devices its cache lies, only its log tells",
        "kv_on_gpu tensor_placement",
        values=1,
        variables="LLAMA_ARG_DEVICE",
    ),
    _LeftOut(
        "--rpc",
        "how much of its cache lies on other machines, only its log tells",
        "kv_on_gpu tensor_placement",
        values=1,
        variables="LLAMA_ARG_RPC",
    ),
    _LeftOut("-cmoe --cpu-moe", _MOVED, "tensor_placement", variables="LLAMA_ARG_CPU_MOE"),
    *(
        _LeftOut(flags, _MOVED, "tensor_placement", values=1, variables=variable)
        for flags, variable in (
            ("-ot --override-tensor", "LLAMA_ARG_OVERRIDE_TENSOR"),
            ("-ncmoe --n-cpu-moe", "LLAMA_ARG_N_CPU_MOE"),
            ("-ncffn --n-cpu-ffn", "LLAMA_ARG_N_CPU_FFN"),
            ("--moe-cache-mib", "LLAMA_ARG_MOE_CACHE_MIB"),
            ("-sm --split-mode", "LLAMA_ARG_SPLIT_MODE"),
            ("-ts --tensor-split", "LLAMA_ARG_TENSOR_SPLIT"),
        )
    ),
    _LeftOut("-cd --ctx-size-draft", "the draft's own context is left out", "draft_model", values=1),
    _LeftOut("", _OTHER_BUILD, "draft_model", variables="LLAMA_ARG_MODEL_DRAFT"),
    _LeftOut("", _OTHER_BUILD, "draft_cache_type_k", variables="LLAMA_ARG_CACHE_TYPE_K_DRAFT"),
    _LeftOut("", _OTHER_BUILD, "draft_cache_type_v", variables="LLAMA_ARG_CACHE_TYPE_V_DRAFT"),
)
"""What each preset decides was measured with b11549; a flag behind it says it anew."""

_WITHOUT_VALUE = """
    -h --help --usage --version -cl --cache-list --completion-bash --perf --no-perf -e --escape
    --no-escape --repack -nr --no-repack --no-host --list-devices --check-tensors
    --op-offload --no-op-offload --log-disable --log-jsonl --no-log-jsonl -v --verbose --log-verbose
    --offline --log-prefix --no-log-prefix --log-timestamps --no-log-timestamps --ignore-eos -bs
    --backend-sampling --spec-draft-cpu-moe -cmoed --cpu-moe-draft --spec-draft-backend-sampling
    --no-spec-draft-backend-sampling --cache-idle-slots --no-cache-idle-slots --context-shift
    --no-context-shift -sp --special --warmup --no-warmup --spm-infill -cb --cont-batching -nocb
    --no-cont-batching --mmproj-auto --no-mmproj --no-mmproj-auto --mmproj-offload --no-mmproj-offload
    --reuse-port --cors-credentials --no-cors-credentials --ui-mcp-proxy --webui-mcp-proxy
    --no-ui-mcp-proxy --no-webui-mcp-proxy -ag --agent -no-ag --no-agent --ui --webui --no-ui --no-webui
    --embedding --embeddings --rerank --reranking --cache-prompt --no-cache-prompt --metrics --props
    --slots --no-slots --models-autoload --no-models-autoload --jinja --no-jinja --reasoning-preserve
    --no-reasoning-preserve --skip-chat-parsing --no-skip-chat-parsing --prefill-assistant
    --no-prefill-assistant --lora-init-without-apply
"""
_ONE_VALUE = """
    -t --threads -tb --threads-batch -C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll -Cb
    --cpu-mask-batch -Crb --cpu-range-batch --cpu-strict-batch --prio-batch --poll-batch -n --predict
    --n-predict --keep --rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx
    --yarn-ext-factor --yarn-attn-factor --yarn-beta-slow --yarn-beta-fast -dt --defrag-thold -lm
    --load-mode -lzm --lazy-mode --numa -mg --main-gpu -fitt
    --fit-target -fitc --fit-ctx --lora --lora-scaled --control-vector --control-vector-scaled -mu
    --model-url -dr --docker-repo -hf -hfr --hf-repo -hff --hf-file -hft --hf-token --log-file -lv
    --verbosity --log-verbosity --samplers -s --seed --sampler-seq --sampling-seq --temp --temperature
    --top-k --top-p --min-p --top-nsigma --top-n-sigma --xtc-probability --xtc-threshold --typical
    --typical-p --repeat-last-n --repeat-penalty --presence-penalty --frequency-penalty --dry-multiplier
    --dry-base --dry-allowed-length --dry-penalty-last-n --dry-sequence-breaker --adaptive-target
    --adaptive-decay --dynatemp-range --dynatemp-exp --mirostat --mirostat-lr --mirostat-ent -l
    --logit-bias --grammar --grammar-file -j --json-schema -jf --json-schema-file --spec-draft-threads -td
    --threads-draft --spec-draft-threads-batch -tbd --threads-batch-draft --spec-draft-cpu-mask -Cd
    --cpu-mask-draft --spec-draft-cpu-range -Crd --cpu-range-draft --spec-draft-cpu-strict
    --cpu-strict-draft --spec-draft-prio --prio-draft --spec-draft-poll --poll-draft
    --spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft --spec-draft-cpu-strict-batch
    --cpu-strict-batch-draft --spec-draft-prio-batch --prio-batch-draft --spec-draft-poll-batch
    --poll-batch-draft --spec-draft-override-tensor -otd --override-tensor-draft --spec-draft-n-cpu-moe
    --spec-draft-ncmoe -ncmoed --n-cpu-moe-draft --spec-draft-n-min --spec-synth-len --spec-synth-rates
    --spec-draft-p-split --draft-p-split --spec-draft-p-min --draft-p-min --spec-draft-sampling
    --spec-draft-device -devd --device-draft --spec-draft-ngl -ngld --gpu-layers-draft
    --n-gpu-layers-draft --spec-ngram-mod-n-min --spec-ngram-mod-n-max --spec-ngram-mod-n-match
    --spec-ngram-simple-size-n --spec-ngram-simple-size-m --spec-ngram-simple-min-hits
    --spec-ngram-map-k-size-n --spec-ngram-map-k-size-m --spec-ngram-map-k-min-hits
    --spec-ngram-map-k4v-size-n --spec-ngram-map-k4v-size-m --spec-ngram-map-k4v-min-hits --draft-min
    --draft-n-min --spec-ngram-size-n --spec-ngram-size-m --spec-ngram-min-hits -lcs --lookup-cache-static
    -lcd --lookup-cache-dynamic -ctxcp --ctx-checkpoints --swa-checkpoints -cms --checkpoint-min-step
    -cram --cache-ram -r --reverse-prompt --pooling -mm --mmproj -mmu --mmproj-url -mmdev --mmproj-device
    --image-min-tokens --image-max-tokens --mtmd-batch-max-tokens --video-fps --video-timestamp-interval
    --video-ffmpeg-dir -a --alias --tags --embd-normalize --host --port --path --cors-origins
    --cors-methods --cors-headers --api-prefix --ui-config --webui-config --ui-config-file
    --webui-config-file --tools --tools-runtime --mcp-servers-config --mcp-servers-json --api-key
    --api-key-file --ssl-key-file --ssl-cert-file --chat-template-kwargs -to --timeout --sse-ping-interval
    --threads-http --cache-reuse --slot-save-path --media-path --models-dir --models-max
    --reasoning-format -rea --reasoning --reasoning-effort --reasoning-budget --reasoning-budget-message
    --chat-template --chat-template-file -sps --slot-prompt-similarity --log-prompts-dir
"""
_TWO_VALUES = "--control-vector-layer-range"
_VALUE_IN_NEWER_BUILDS = frozenset({"-fa", "--flash-attn", "--log-colors"})
"""Without a value in older builds: what begins with a dash behind them is a flag there."""
_OLDER_WITHOUT_VALUE = """
    --verbose-prompt -dkvc --dump-kv-cache --mlock --mmap --no-mmap -dio --direct-io -ndio --no-direct-io
    --tts-oute-default --tts-use-guide-tokens --models-allow-extra-args --log-enable --log-new --log-append
"""
_OLDER_ONE_VALUE = """
    -p --prompt -f --file -bf --binary-file -gan --grp-attn-n -gaw --grp-attn-w -ns --sequences
    -mv --model-vocoder -hfv -hfrv --hf-repo-v -hffv --hf-file-v --tts-speaker-file --tts-lang
    -spf --system-prompt-file --log-format -ld --logdir --tfs -cpent --checkpoint-every-n-tokens
"""
_OLDER_TWO_VALUES = "--spec-replace --spec-draft-replace"
_OF_THE_DEMO = "--until-stdin-closes"

_FIELDS = frozenset(field.name for field in fields(ContextSettings)) - {"notes", "unreadable"}
_VALUED_BY_FLAG = {flag: row for row in _VALUED for flag in row.flags.split()}
_SWITCHED_BY_FLAG = {
    flag: (row, position)
    for row in _SWITCHES
    for position, flags in ((True, row.on), (False, row.off))
    for flag in flags.split()
}
_LEFT_OUT_BY_FLAG = {flag: row for row in _LEFT_OUT for flag in row.flags.split()}
_SPEC_DEFAULT = "--spec-default"

FLAGS: Mapping[str, int] = {
    **dict.fromkeys((_WITHOUT_VALUE + _OLDER_WITHOUT_VALUE).split(), 0),
    **dict.fromkeys((_ONE_VALUE + _OLDER_ONE_VALUE).split(), 1),
    **dict.fromkeys(f"{_TWO_VALUES} {_OLDER_TWO_VALUES}".split(), 2),
    **dict.fromkeys((*_VALUED_BY_FLAG, *_VALUE_IN_NEWER_BUILDS), 1),
    **dict.fromkeys((*_SWITCHED_BY_FLAG, _SPEC_DEFAULT, _OF_THE_DEMO), 0),
    **{flag: row.values for flag, row in _LEFT_OUT_BY_FLAG.items()},
}
"""Every flag of llama-server and the number of its values."""


def context_settings(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, *, strict: bool = False
) -> ContextSettings:
    """Return what arguments (without the program's name) and environment say; a flag wins over its variable.

    Values that cannot be read are left out with a note; strict: they, and flags that llama-server does
    not know, raise ArgumentsError instead. Neither names anything of a flag that is not about the context
    but the flag.
    """
    reading = _Reading(strict)
    reading.environment(environment or {})
    reading.arguments(arguments)
    return reading.settings()


def with_file_left_out(settings: ContextSettings, name: str) -> ContextSettings:
    """Return settings for a server that also read a file of settings, which only says what they do not."""
    return replace(
        settings,
        notes=(*settings.notes, f"{name}: settings in this file are left out"),
        unreadable=tuple(sorted(field for field in _FIELDS if getattr(settings, field) is None)),
    )


class _Reading:
    """What was said so far; what is said later replaces it."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._said: dict[str, Any] = {}
        self._unreadable: set[str] = set()
        self._notes: list[str] = []
        self._unknown: list[str] = []
        self._left_unsaid = False

    def environment(self, environment: Mapping[str, str]) -> None:
        """Take the variables: llama.cpp reads all of them before the first flag."""
        for valued in _VALUED:
            for name in valued.variables.split():
                if name in environment:
                    self._take(valued, name, environment[name])
        for switch in _SWITCHES:
            self._take_variable(switch, environment)
        for row in _LEFT_OUT:
            for name in row.variables.split():
                if name in environment:
                    self._leave_out(row, name)

    def arguments(self, arguments: Sequence[str]) -> None:
        """Take flags and their values, in their order."""
        rest = deque(arguments)
        while rest:
            name, value = _spelled(rest.popleft())
            if name not in FLAGS:
                self._refuse_unknown(name)
                # What follows is most likely its value: not to be named, and not to be taken for a flag.
                if name.startswith("-") and value is None and rest and _spelled(rest[0])[0] not in FLAGS:
                    rest.popleft()
                continue
            bare = name in _VALUE_IN_NEWER_BUILDS and value is None and _stands_alone(rest)
            count = 0 if bare else FLAGS[name]
            values = [] if value is None else [value]
            while rest and len(values) < count:
                values.append(rest.popleft())
            self._flag(name, count, values)

    def settings(self) -> ContextSettings:
        """Return what was said, all in all."""
        if self._unknown:
            names = list(dict.fromkeys(self._unknown))
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            self._notes.append(
                f"flags that are not known are passed over: {', '.join(names[:_MOST_NAMED])}{more}"
            )
        unreadable = self._unreadable | (_FIELDS - self._said.keys() if self._left_unsaid else set())
        return ContextSettings(
            **self._said,
            notes=tuple(dict.fromkeys(self._notes)),
            unreadable=tuple(sorted(unreadable)),
        )

    def _flag(self, name: str, count: int, values: Sequence[str]) -> None:
        valued = _VALUED_BY_FLAG.get(name)
        switch, position = _SWITCHED_BY_FLAG.get(name, (None, False))
        if len(values) != count:
            field = valued.field if valued else switch.field if switch else None
            self._refuse(field, f"{name} takes no value" if count == 0 else f"{name} lacks its value")
        elif valued:
            self._take(valued, name, values[0] if values else "on")
        elif switch:
            self._say(switch.field, position)
        elif name in _LEFT_OUT_BY_FLAG:
            self._leave_out(_LEFT_OUT_BY_FLAG[name], name)
        elif name == _SPEC_DEFAULT:
            self._say("draft_kinds", (*self._said.get("draft_kinds", ()), "ngram-mod"))

    def _take(self, row: _Valued, name: str, text: str) -> None:
        try:
            value = row.read(text)
        except ValueError as error:
            self._refuse(row.field, f"{name} {_shown(text)}: {error}")
            return
        if isinstance(value, int | float) and not isinstance(value, bool) and text != str(int(value)):
            self._notes.append(f"{name} {_shown(text)}: llama.cpp reads {int(value)}")
        if not row.gathers:
            self._say(row.field, value)
        elif row.field not in self._unreadable:
            self._say(row.field, (*self._said.get(row.field, ()), *value))

    def _take_variable(self, row: _Switch, environment: Mapping[str, str]) -> None:
        negated = row.variable.replace("LLAMA_ARG_", "LLAMA_ARG_NO_")
        text = environment.get(row.variable)
        if row.off and negated in environment:
            self._say(row.field, False)  # whatever its value is
        elif text in _YES:
            self._say(row.field, True)
        elif text is not None and row.off:
            self._take(_Valued(row.field, "", _on_or_off), row.variable, text)

    def _say(self, field: str, value: object) -> None:
        self._unreadable.discard(field)
        if value is None:
            self._said.pop(field, None)
        else:
            self._said[field] = value

    def _leave_out(self, row: _LeftOut, name: str) -> None:
        self._notes.append(f"{name}: {row.why}")
        self._left_unsaid |= row.decides_the_unsaid
        for field in row.decides.split():
            self._said.pop(field, None)
            self._unreadable.add(field)

    def _refuse(self, field: str | None, line: str) -> None:
        if self._strict:
            raise ArgumentsError(line)
        if field is None:
            return
        self._notes.append(f"{line}; it is left out")
        self._said.pop(field, None)
        self._unreadable.add(field)

    def _refuse_unknown(self, name: str) -> None:
        # Anything else than a flag's name may be part of a prompt or a key.
        named = _FLAG_NAME.fullmatch(name) is not None
        if self._strict:
            if not named:
                raise ArgumentsError("a word has no flag before it; a value with spaces wants quotes")
            close = difflib.get_close_matches(name, FLAGS, n=1)
            raise ArgumentsError(
                f"llama-server has no flag {name}" + (f"; did you mean {close[0]}?" if close else "")
            )
        if named:
            self._unknown.append(name)


def _spelled(written: str) -> tuple[str, str | None]:
    """The flag as the tables have it, and the value that is joined to it by `=`."""
    if _dashed(written) in FLAGS:
        return _dashed(written), None
    name, equals, value = written.partition("=")
    return _dashed(name), value if equals else None


def _dashed(flag: str) -> str:
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _stands_alone(following: Sequence[str]) -> bool:
    return not following or (following[0].startswith("-") and following[0] not in _AUTO)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "...")
