"""SGLang's frontend language on a program that branches: the branches share what stands before them.

You learn   how gen, fork and join write a program of many model calls as if it were one text, and that the radix cache
            makes its branches cheap: each finds all that came before the fork
Laptop      python -m ch07_sglang_routing.frontend
GPU node    python -m ch07_sglang_routing.frontend --model 1b --words 800 --branches 8
Cluster     --url of a server that runs there
You see     tokens that each generation read and found in the cache, and what the program would have read without it
"""

from __future__ import annotations

import json
from typing import Any

from ch06_vllm import started
from ch06_vllm.servers import ENGINES, program
from ch07_sglang_routing import running
from common import lm, process, script


def common_prefix(one: list[int], other: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    running.add_flags(parser)
    parser.add_argument("--branches", type=script.at_least(2), default=4, help="at most 8")
    parser.add_argument("--tokens", type=script.at_least(1), default=12, help="of each generation")
    parser.add_argument("--words", type=script.at_least(1), default=100, help="of the text in front of all")
    parser.add_argument("--timeout-s", type=script.positive, default=300)
    args = parser.parse_args(argv)
    if args.branches > 8:
        raise script.UserError(f"{args.branches} branches: the program has 8 questions; take fewer")
    script.start(__file__, args)
    encode = lm.load_tokenizer(str(started.folder_of(args.model))).encode
    python = str(program("sglang", "python"))
    with running.sglang(args) as (url, _):
        running.flush(url)
        page = running.info(url)["page_size"]
        words = [python, "ch07_sglang_routing/branching.py", url]
        words += [str(number) for number in (args.branches, args.tokens, args.words)]
        done = process.run(words, timeout_s=args.timeout_s, env=ENGINES["sglang"].environment(1))
    told = [line for line in done.stdout.splitlines() if line.startswith("READ ")]
    if done.returncode or not told:
        raise script.UserError(f"the program did not end well ({done.reason(args.timeout_s)}); see branching.py")
    program_read = json.loads(told[-1].removeprefix("READ "))
    first, *branches, verdict = program_read["generations"]
    # The language sends text, and text of random tokens becomes other tokens when it is read again: what is surely
    # shared is what a branch's tokens have in common with those of the first prompt.
    shared = min(common_prefix(encode(program_read["asked"]), encode(text)) for text in program_read["branches"])
    shared = shared // page * page

    print(f"{'':12}{'prompt':>8}{'cached':>8}{'read':>8}")
    rows = {"short": first} | {f"branch {n}": row for n, row in enumerate(branches)} | {"verdict": verdict}
    for name, row in rows.items():
        read = row["prompt_tokens"] - row["cached_tokens"]
        print(f"{name:12}{row['prompt_tokens']:8}{row['cached_tokens']:8}{read:8}")
    asked = sum(row["prompt_tokens"] for row in rows.values())
    cached = sum(row["cached_tokens"] for row in rows.values())
    print(f"read {asked - cached} tokens of {asked}")
    found: dict[str, Any] = {"branches": len(branches), "prompt_tokens": asked, "cached_tokens": cached}
    found |= {"shared_tokens": shared, "branch_cached_min": min(row["cached_tokens"] for row in branches)}
    found |= {"branches_share": all(row["cached_tokens"] >= shared for row in branches)}
    return found | {"read_times": asked / (asked - cached)}


if __name__ == "__main__":
    script.run(main)
