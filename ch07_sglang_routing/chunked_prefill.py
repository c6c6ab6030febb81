"""Chunked prefill in SGLang: a long prompt beside running answers, whole, in chunks, and in chunks mixed with decode.

You learn   that cutting a long prompt is not enough: SGLang lets prefill go first, so the chunks follow each other and
            the running answers wait as before; --enable-mixed-chunk puts their next tokens into each chunk's batch.
            Then they wait for one chunk, not for the prompt: with prompts of 100,000 tokens, as DeepSeek's contexts
            allow, that is the difference
Laptop      python -m ch07_sglang_routing.chunked_prefill
GPU node    python -m ch07_sglang_routing.chunked_prefill --model 1b --long-prompt 3900 --chunk 512
Cluster     the same options in configs/*.yaml
You see     for each setting the longest gap between two tokens of the short requests, and the long one's first token
"""

from __future__ import annotations

from typing import Any

from ch06_vllm import stall, started
from ch06_vllm.servers import use_device
from ch07_sglang_routing import running
from common import script


def settings(chunk: int) -> dict[str, dict[str, Any]]:
    return {
        "whole": {"chunked-prefill-size": -1},
        "chunks": {"chunked-prefill-size": chunk},
        "mixed": {"chunked-prefill-size": chunk, "enable-mixed-chunk": True},
    }


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--model", default="nano", help="a preset (random weights, made once) or a model's folder")
    parser.add_argument("--long-prompt", type=script.at_least(2), default=3800)
    parser.add_argument("--chunk", type=script.at_least(1), default=256)
    parser.add_argument("--running", type=script.at_least(1), default=4, help="short requests that decode meanwhile")
    parser.add_argument(
        "--tokens", type=script.at_least(4), default=60, help="of each of them, once the long one comes"
    )
    parser.add_argument("--rounds", type=script.at_least(1), default=3)
    parser.add_argument(
        "--settings", type=script.comma_list(str), default=list(settings(1)), help="of: whole,chunks,mixed"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.settings) - set(settings(1)):
        raise script.UserError(f"no setting {sorted(unknown)[0]!r}; take of {','.join(settings(1))}")
    use_device(args.device)
    started.engine_name("sglang")
    script.start(__file__, args)
    ids = running.ids(args)
    rounds = stall.Rounds(ids, args, args.tokens)
    own = settings(args.chunk)
    rounds.on_servers(
        "sglang",
        started.folder_of(args.model),
        {name: own[name] | {"max-prefill-tokens": 16384} for name in args.settings},
    )
    found: dict[str, Any] = {"long_prompt": args.long_prompt, "chunk": args.chunk}
    for name, row in rounds.medians().items():
        found |= {f"{name}_{key}": value for key, value in row.items()}
    for name in {"whole", "chunks"} & set(args.settings) if "mixed" in args.settings else ():
        found[f"{name}_jump_times"] = found[f"{name}_itl_ms_max"] / found["mixed_itl_ms_max"]
    return found


if __name__ == "__main__":
    script.run(main)
