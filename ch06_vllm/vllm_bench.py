"""`vllm bench serve` as a process of turns.py, for all rounds: importing it takes long."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from ch06_vllm.answer import in_turn


def load() -> Callable[[dict[str, Any]], Any]:
    """{"bench": command line} to the figures of that benchmark, {"prompts": command line} to the texts that it sends,
    {"judge": records} to what it makes of our own records."""
    from vllm.benchmarks import serve
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)

    def judge(rows: list[dict[str, Any]], duration_s: float, percentiles: list[float]) -> dict[str, Any]:
        outputs = []
        for row in rows:
            times = row["arrivals_s"]
            output = RequestFuncOutput(
                success=True, latency=times[-1] - row["sent_s"], output_tokens=row["completion_tokens"],
                ttft=times[0] - row["sent_s"], itl=[b - a for a, b in itertools.pairwise(times)],
                prompt_len=row["prompt_tokens"], start_time=row["sent_s"],
            )  # fmt: skip
            outputs.append(output)
        found, _ = serve.calculate_metrics([], outputs, duration_s, None, percentiles, {})
        result = dict(vars(found))
        for name in ("ttft", "tpot", "itl", "e2el"):
            result |= {f"p{p}_{name}_ms": value for p, value in getattr(found, f"percentiles_{name}_ms")}
        return result

    def prompts(words: list[str]) -> list[str]:
        args = parser.parse_args(words)
        return [sample.prompt for sample in serve.get_samples(args, serve.get_tokenizer(args.model))]

    ways = {
        "bench": lambda words: serve.main(parser.parse_args(words)),
        "prompts": prompts,
        "judge": lambda asked: judge(**asked),
    }
    return lambda asked: next(ways[name](value) for name, value in asked.items())


def main() -> None:
    in_turn(load)
