"""Serve a model with real SGLang from a YAML file: one GPU, tensor or data parallel, prefill and decode apart.

You learn   which options decide how SGLang uses the hardware, when a server is ready, and how one is stopped so that
            no request is lost
Laptop      make setup-sglang
            python -m ch07_sglang_routing.serve_sglang ch07_sglang_routing/configs/single.yaml
            python -m ch07_sglang_routing.serve_sglang ch07_sglang_routing/configs/tp2.yaml --smoke
GPU node    the same command: what the file says under `cpu:` holds without a GPU only
Cluster     ch07_sglang_routing/launch: several nodes
You see     the address once it answers and how long that took. With --smoke a completion and a chat, and the end.
"""

from __future__ import annotations

from ch06_vllm.scrape import scrape
from ch06_vllm.serve_vllm import serve_from_file
from ch07_sglang_routing import sglang_engine  # noqa: F401  it is an engine from here on
from common import script


def counters(url: str) -> dict[str, int]:
    """From /metrics: the copies of the model behind the address, the ranks of all of them (a series each), and the
    tokens they had to compute."""
    metrics = scrape(url)
    ranks = metrics.samples["sglang:max_total_num_tokens"]
    return {
        "engines": len({rank.labels.get("dp_rank") for rank in ranks}),
        "ranks": len(ranks),
        "prompt_tokens": round(metrics["sglang:prompt_tokens_total"]),
        "cached_tokens": round(metrics.values.get("sglang:cached_tokens_total", 0)),
    }


def main(argv: list[str] | None = None) -> dict:
    return serve_from_file(argv, "sglang", __file__, __doc__, counters)


if __name__ == "__main__":
    script.run(main)
