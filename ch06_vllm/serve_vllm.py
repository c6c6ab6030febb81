"""Serve a model with real vLLM from a YAML file: one GPU, tensor, pipeline or data parallel, int8, LoRA, speculative.

You learn   which options decide how vLLM uses the hardware, when a server is ready, and how one is stopped so that no
            request is lost
Laptop      make setup-vllm
            python -m ch06_vllm.serve_vllm ch06_vllm/configs/tp2.yaml            (two cores are two ranks)
            python -m ch06_vllm.serve_vllm ch06_vllm/configs/single.yaml --smoke
GPU node    the same command: what the file says under `cpu:` holds without a GPU only
Cluster     ch06_vllm/launch: several nodes
You see     the address once it answers and how long that took. With --smoke a completion and a chat, and the end.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ch06_vllm import options
from ch06_vllm.scrape import scrape
from ch06_vllm.servers import ENGINES, Server, use_device
from common import script

PORT = 8000  # shown by --check where the file names none
PROMPT = "def fibonacci("


def post(url: str, body: dict[str, Any], timeout_s: float = 120) -> dict[str, Any]:
    """The answer to a JSON request.

    Raises:
        UserError: the server refused it, or does not answer.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        reason = error.read(400).decode(errors="replace")
        raise script.UserError(f"{url} says {error.code} ({reason}); see the server's log") from None
    except OSError as error:
        raise script.UserError(f"{url} does not answer ({error}); see the server's log") from None


def smoke(server: Server, tokens: int = 16) -> dict[str, Any]:
    """One completion and one chat; the first adapter completes too."""
    same = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    completed = post(f"{server.url}/v1/completions", same | {"model": server.model, "prompt": PROMPT})
    seconds = time.perf_counter() - began
    messages = [{"role": "user", "content": "What does zip() do?"}]
    chatted = post(f"{server.url}/v1/chat/completions", same | {"model": server.model, "messages": messages})
    text = completed["choices"][0]["text"]
    print(f"{PROMPT}{text}\n{chatted['choices'][0]['message']['content']}", flush=True)
    usage = [answer["usage"]["completion_tokens"] for answer in (completed, chatted)]
    found = {"completion_tokens": usage[0], "chat_tokens": usage[1], "completion_s": seconds}
    if server.adapters:
        body = same | {"model": server.adapters[0], "prompt": PROMPT}
        other = post(f"{server.url}/v1/completions", body)["choices"][0]["text"]
        found |= {"adapters": len(server.adapters), "adapter_changes_text": other != text}
    if quantised := re.search(r"\bquantization=([\w-]+)", "".join(server.child.out)):  # as the engine says of itself
        found["quantization"] = quantised[1]
    return found


def counters(url: str) -> dict[str, int]:
    """From /metrics: the engines behind the address, and the tokens that a draft model proposed and had accepted.

    Names: vllm:num_requests_running has a line for each engine; vllm:spec_decode_* are there with a draft only.
    """
    metrics = scrape(url)
    found = {"engines": len(metrics.samples["vllm:num_requests_running"])}
    for name in ("draft", "accepted"):
        counted = metrics.values.get(f"vllm:spec_decode_num_{name}_tokens_total")
        if counted is not None:
            found[f"{name}_tokens"] = round(counted)
    return found


class Stopped(Exception):
    """Ctrl-C or SIGTERM."""


def stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows takes its time
    raise Stopped


def serve(server: Server, what: str) -> None:
    """Until Ctrl-C or SIGTERM.

    Raises:
        UserError: the engine ended by itself.
    """
    told = f"model {server.model}" if server.model else "node 0 takes the requests"
    print(f"ready: {server.url}  {told}  ({what}, {server.start_s:.1f} s)", flush=True)
    try:
        server.child.process.wait()
    except (KeyboardInterrupt, Stopped):
        print(f"stopping: running requests have {server.grace_s} s to finish", flush=True)
        return
    raise script.UserError(f"{ENGINES[server.engine].title} ended: {server.why()}")


def main(argv: list[str] | None = None) -> dict:
    return serve_from_file(argv, "vllm", __file__, __doc__, counters)


def serve_from_file(
    argv: list[str] | None, engine: str, file: str, doc: str | None, counters: Callable[[str], dict[str, Any]]
) -> dict:
    """What the script `file` does for its engine. `counters`: what the engine at an address counts, for --smoke."""
    parser = script.parser(doc)
    parser.add_argument("config", type=Path, help="a YAML file with the engine's options; see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over the file's, YAML values")
    parser.add_argument("--check", action="store_true", help="check the file, show the command; start nothing")
    parser.add_argument("--smoke", action="store_true", help="send a completion and a chat, then stop")
    parser.add_argument("--grace-s", type=script.at_least(0), default=30, help="for running requests, when stopped")
    parser.add_argument("--timeout-s", type=script.positive, default=1800, help="to be ready; large models load long")
    parser.add_argument("--verbose", action="store_true", help="show the engine's log")
    args = parser.parse_args(argv)
    use_device(args.device)
    wanted = options.read(args.config, args.set, engine=engine)
    sizes = [wanted.get(name, 1) for name in ENGINES[engine].sizes]
    shape = dict(zip(("tensor_parallel", "pipeline_parallel", "data_parallel"), sizes, strict=True))
    if args.check:
        wanted = options.make_models(wanted, make=False)
        model, port = wanted.pop("model"), wanted.pop("port", PORT)
        print(shlex.join(ENGINES[engine].command(model, port, wanted)))
        return shape | {"model": model, "options": len(wanted), "started": False}
    if args.smoke and int(wanted.get("node-rank", 0)) > 0:
        raise script.UserError("only node 0 takes requests; --smoke belongs there")
    script.start(file, args)
    wanted = options.make_models(wanted)
    model, port = wanted.pop("model"), wanted.pop("port", None)
    log = (lambda line: print(line, file=sys.stderr, flush=True)) if args.verbose else None
    signal.signal(signal.SIGTERM, stop)
    try:
        with Server(
            model, engine, wanted, port=None if args.smoke else port, timeout_s=args.timeout_s, grace_s=args.grace_s,
            on_line=log,
        ) as server:  # fmt: skip
            found = {"model": server.model, "start_s": server.start_s, **shape}
            began = time.monotonic()
            if args.smoke:
                return found | smoke(server) | counters(server.url) | {"processes": len(server.child.tree())}
            serve(server, args.config.stem)
            return found | {"served_s": time.monotonic() - began}
    except Stopped:
        raise KeyboardInterrupt from None


if __name__ == "__main__":
    script.run(main)
