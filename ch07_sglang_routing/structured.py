"""Structured output in SGLang: a grammar decides which tokens may come next, so every answer parses.

You learn   how a JSON schema, a regular expression and an EBNF grammar become a mask over the vocabulary at each step,
            and what that costs a token; a model with random weights obeys as well as any other
Laptop      python -m ch07_sglang_routing.structured
GPU node    python -m ch07_sglang_routing.structured --model 1b
Cluster     --url of a server that runs there
You see     for each constraint how many answers parse: all of them, and without it none
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

from ch06_vllm.serve_vllm import post
from ch07_sglang_routing import running
from common import script

# Bounded on all sides: a model that never wants to stop would fill an open list or string to its limit of tokens.
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Lima", "Cairo"]},
        "celsius": {"type": "integer", "minimum": -40, "maximum": 50},
        "sky": {"type": "array", "items": {"enum": ["clear", "rain", "snow"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["city", "celsius", "sky"],
    "additionalProperties": False,
}
DATE = r"20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9])"
SUM = """
root ::= term " + " term | term " * " term
term ::= number | "(" number " - " number ")"
number ::= [1-9] | [1-9] [0-9]
"""


def is_weather(text: str) -> bool:
    """By the schema, checked by hand: with nothing that made the answer."""
    found = json.loads(text)
    return (
        list(found) == SCHEMA["required"]
        and found["city"] in SCHEMA["properties"]["city"]["enum"]  # type: ignore[index]
        and type(found["celsius"]) is int
        and -40 <= found["celsius"] <= 50
        and 1 <= len(found["sky"]) <= 3
        and set(found["sky"]) <= {"clear", "rain", "snow"}
    )


def is_sum(text: str) -> bool:
    """Python reads it, as one operation of + or * over numbers and differences."""
    found = ast.parse(text, mode="eval").body
    parts = (
        (found.left, found.right) if isinstance(found, ast.BinOp) and isinstance(found.op, ast.Add | ast.Mult) else ()
    )
    return len(parts) == 2 and all(
        isinstance(part, ast.Constant) or (isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub))
        for part in parts
    )


# The request's own field, and who judges the answer. json_schema and regex are OpenAI's and SGLang's words.
SHAPE = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
CONSTRAINTS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "JSON schema": ({"response_format": SHAPE}, is_weather),
    "regex": ({"regex": DATE}, lambda text: re.fullmatch(DATE, text) is not None),
    "EBNF": ({"ebnf": SUM}, is_sum),
}


def parses(judge: Callable[[str], bool], text: str) -> bool:
    try:
        return judge(text)
    except (ValueError, SyntaxError, KeyError, TypeError, AttributeError):
        return False


def ask(
    url: str, model: str, count: int, seed: int, fields: dict[str, Any], max_tokens: int
) -> tuple[list[str], list[float]]:
    """`count` answers, sampled, and the milliseconds a token of each took."""
    texts, times = [], []
    for number in range(count):
        body = {"model": model, "max_tokens": max_tokens, "temperature": 1.0, "seed": seed + number, **fields}
        body["messages"] = [{"role": "user", "content": f"Answer {number}."}]
        began = time.perf_counter()
        answer = post(f"{url}/v1/chat/completions", body)
        times.append(1e3 * (time.perf_counter() - began) / max(1, answer["usage"]["completion_tokens"]))
        texts.append(answer["choices"][0]["message"]["content"] or "")
    return texts, times


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    running.add_flags(parser)
    parser.add_argument("--answers", type=script.at_least(1), default=6, help="of each kind")
    args = parser.parse_args(argv)
    script.start(__file__, args)
    found: dict[str, Any] = {"answers": args.answers}
    with running.sglang(args, {"constrained-json-disable-any-whitespace": True}) as (url, model):
        free, free_ms = ask(url, model, args.answers, args.seed, {}, 24)
        for name, (fields, judge) in CONSTRAINTS.items():
            texts, ms = ask(url, model, args.answers, args.seed, fields, 96)
            good = sum(parses(judge, text) for text in texts)
            by_chance = sum(parses(judge, text) for text in free)
            print(f"{name:12} {good} of {len(texts)} parse, without it {by_chance}: {texts[0]}")
            key = name.lower().replace(" ", "_")
            found |= {f"{key}_parsed": good, f"{key}_without": by_chance, f"{key}_ms_per_token": statistics.median(ms)}
    return found | {"free_ms_per_token": statistics.median(free_ms)}


if __name__ == "__main__":
    script.run(main)
