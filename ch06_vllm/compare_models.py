"""Different models and engines under the same load, one server after the other, in one table.

You learn   what a model's size costs at each load: time to the first token, pace of the others, what a machine serves
Laptop      python -m ch06_vllm.compare_models --server vllm:nano --server vllm:small --rate 1 --requests 30
GPU node    python -m ch06_vllm.compare_models --server vllm:1b --server vllm:8b --rate 20 --requests 400 --slo tpot:30
Cluster     servers that run elsewhere: bench_serve.py with --url again and again
You see     a row for each server: seconds until it answers, requests and tokens per second, percentiles of TTFT, TPOT,
            ITL and E2E; load.png with all of them. Every request is in requests-NAME.jsonl

ENGINE:MODEL is ours or vllm, and a preset (random weights, made once) or a model's folder. Each is started, measured
and stopped before the next: none of them shares the machine.
"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

from ch06_vllm import bench_serve, load, options
from ch06_vllm.started import HELP, engine_and_model, folder_of, server
from common import script


def parameters(folder: Path) -> int | None:
    """Numbers in the headers of its safetensors; None if it has none."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total or None


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--server", type=engine_and_model, action="append", help=f"{HELP}; again for more")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of vLLM's, for all")
    bench_serve.add_load_flags(parser)
    args = parser.parse_args(argv)
    changes: dict[str, Any] = {}
    for change in args.set:
        options.apply(changes, change)
    contestants = {
        ":".join(asked): asked for asked in args.server or map(engine_and_model, ("vllm:nano", "vllm:small"))
    }
    folders = {name: folder_of(model) for name, (_, model) in contestants.items()}
    loads = {name: bench_serve.make_load(args, load.usable_ids(folder)) for name, folder in folders.items()}
    run = script.start(__file__, args)
    width = max(map(len, folders)) + 2
    measured: dict[str, list[load.Record]] = {}
    figures: dict[str, script.Result] = {}
    print(bench_serve.header(width))
    for name, asked in contestants.items():
        with server(asked, changes) as running:
            how = {"model": running.model, "bounds_ms": dict(args.slo), "temperature": args.temperature}
            work = bench_serve.measure(running.url, loads[name], timeout_s=args.timeout_s, label=name, **how)
            measured[name], found = asyncio.run(work)
        figures[name] = {"parameters": parameters(folders[name]), "start_s": running.start_s, **found}
        bench_serve.save(run, name, measured[name])
        print(bench_serve.row(name, figures[name], width), flush=True)
    bench_serve.draw(run.path("load.png"), measured)
    return {"compared": len(figures), "failed": sum(f["failed"] for f in figures.values()), "servers": figures}


if __name__ == "__main__":
    script.run(main)
