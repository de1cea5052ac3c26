"""Which vLLM arguments an operator may give: an allow-list with a check for every value.

Nothing on it runs foreign code, opens a file of the operator's choice or listens. Names are exact: vLLM's
parser would accept abbreviations, this list does not.
"""

import re
from collections.abc import Sequence

from gateway.engine.errors import EngineError

_NUMBER = re.compile(r"[0-9]{1,9}[kKmM]?")
_FRACTION = re.compile(r"0(\.[0-9]{1,4})?|1(\.0{1,4})?")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,39}")
_LOAD_FORMAT = re.compile(r"auto|safetensors|dummy")
_FLAG = None

ALLOWED: dict[str, re.Pattern[str] | None] = {
    "--max-model-len": _NUMBER,
    "--max-num-seqs": _NUMBER,
    "--max-num-batched-tokens": _NUMBER,
    "--max-num-queued-reqs": _NUMBER,
    "--max-num-queued-tokens": _NUMBER,
    "--max-logprobs": _NUMBER,
    "--tensor-parallel-size": _NUMBER,
    "--pipeline-parallel-size": _NUMBER,
    "--block-size": _NUMBER,
    "--seed": _NUMBER,
    "--stream-interval": _NUMBER,
    "--gpu-memory-utilization": _FRACTION,
    "--dtype": _WORD,
    "--quantization": _WORD,
    "--kv-cache-dtype": _WORD,
    "--load-format": _LOAD_FORMAT,
    "--runner": _WORD,
    "--convert": _WORD,
    "--tool-call-parser": _WORD,
    "--reasoning-parser": _WORD,
    "--enforce-eager": _FLAG,
    "--enable-auto-tool-choice": _FLAG,
    "--enable-prefix-caching": _FLAG,
    "--no-enable-prefix-caching": _FLAG,
    "--enable-chunked-prefill": _FLAG,
    "--no-enable-chunked-prefill": _FLAG,
    "--async-scheduling": _FLAG,
}


def check(arguments: Sequence[str]) -> list[str]:
    """The arguments as given, one word each; raises EngineError that names the first one not allowed."""
    checked: list[str] = []
    words = iter(arguments)
    for word in words:
        name, separator, value = word.partition("=")
        if name not in ALLOWED:
            raise EngineError(f"the engine argument {name!r} is not allowed. Allowed are: {', '.join(sorted(ALLOWED))}")
        pattern = ALLOWED[name]
        checked.append(name)
        if pattern is None:
            if separator:
                raise EngineError(f"the engine argument {name} takes no value")
            continue
        value = value if separator else next(words, "")
        if not pattern.fullmatch(value):
            raise EngineError(f"the engine argument {name} does not take {value!r}")
        checked.append(value)
    return checked
