"""Real SGLang as chapter 7 serves it: the same tokens as transformers, its cache to the token, and how it goes wrong."""

from __future__ import annotations

import http.server
import json
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

from ch06_vllm import options, servers
from ch06_vllm.scrape import scrape
from ch06_vllm.serve_vllm import post
from ch06_vllm.servers import Server
from ch07_sglang_routing import frontend, prefill_decode, radix_cache, serve_sglang, sglang_engine, structured
from common import bootstrap, exercises, lm, process
from common.script import UserError
from tests import serving
from tests.serving import Starter

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [path for path in sorted((ROOT / "ch07_sglang_routing/configs").glob("*.yaml")) if path.stem != "ray_serve"]
LACKING = exercises.missing_for("sglang")
needs_sglang = pytest.mark.skipif(bool(LACKING), reason=f"needs {LACKING}")
PROMPT = [40, 7, 300, 12, 90, 411, 5, 17]


@pytest.fixture
def client(sglang_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{sglang_server.url}/v1", api_key="none", max_retries=0, timeout=120)


# ---------------------------------------------------------------- the environment


def test_the_cpu_environment_depends_on_its_pins_and_stand_ins(own_cache: Path) -> None:
    names = [path.name for path in bootstrap.engine_pins("sglang")]
    assert names == ["constraints.txt", "overrides-cpu.txt", "requirements-cpu.txt", "stand_ins.py"]
    with pytest.raises(UserError, match="there is no SGLang here; run make setup-sglang"):
        servers.program("sglang", "python")
    assert not any(path.name == "stand_ins.py" for path in bootstrap.engine_pins("vllm"))


def test_a_stand_in_is_imported_and_none_of_its_kernels_runs() -> None:
    code = """
import torch, stand_ins
import triton, triton.language as tl
from sgl_kernel import rmsnorm
from torchvision.transforms import functional, InterpolationMode
@triton.jit
def kernel(x: tl.constexpr): pass
@triton.autotune(configs=[], key=[])
@triton.jit(do_not_specialize=["x"])
def tuned(x): pass
assert not list(triton.backends.backends)
for broken in (lambda: rmsnorm(torch.ones(2)), lambda: kernel[(1,)](3), lambda: tuned[(1,)](3)):
    try:
        broken()
    except RuntimeError as error:
        print(error)
import json
assert json.__file__, "what is there comes first"
"""
    folder = ROOT / "ch07_sglang_routing"
    done = process.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}){code}"], timeout_s=60)
    assert done.returncode == 0, done.stderr
    said = "a GPU kernel of {} was called, and this is SGLang's CPU environment"
    names = ["sgl_kernel", "triton (kernel)", "triton (tuned)"]
    assert done.stdout.splitlines() == [said.format(name) for name in names]


# ---------------------------------------------------------------- options


@needs_sglang
@pytest.mark.timeout(300)
def test_sglang_itself_takes_every_config(served_model: Path) -> None:
    """Its parser and its own checks of the options, on the words that a Server starts it with."""
    commands = {}
    for config in CONFIGS:
        wanted = options.read(config, laptop=True, engine="sglang")
        assert wanted.pop("model") == "made:nano"
        commands[config.stem] = sglang_engine.command(str(served_model), wanted.pop("port"), wanted)[3:]
        full = options.read(config, laptop=False, engine="sglang")
        assert not str(full["model"]).startswith("made:")
    code = """
import json, sys
from sglang.srt.server_args import prepare_server_args
for name, words in json.loads(sys.argv[1]).items():
    args = prepare_server_args(words)
    print(name, args.host, args.tp_size, args.dp_size, args.disaggregation_mode, args.max_total_tokens, sep="|")
"""
    python = [servers.program("sglang", "python"), "-c", code, json.dumps(commands)]
    done = process.run(python, timeout_s=240, env=sglang_engine.environment(1))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "|" in line] == [
        "decode|0.0.0.0|1|1|decode|16384",
        "dp2|127.0.0.1|1|2|null|16384",
        "multi_node|0.0.0.0|2|1|null|16384",
        "prefill|0.0.0.0|1|1|prefill|16384",
        "single|127.0.0.1|1|1|null|32768",
        "tp2|127.0.0.1|2|1|null|16384",
    ]


def test_copies_of_attention_are_among_the_ranks_of_tensor_parallel() -> None:
    ranks = servers.ENGINES["sglang"].ranks
    assert ranks({"tp-size": 2, "dp-size": 2}) == 4
    assert ranks({"tp-size": 8, "dp-size": 8, "enable-dp-attention": True}) == 8
    assert ranks({"tp-size": 16, "nnodes": 2, "node-rank": 1}) == 8


@needs_sglang
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: x\ntp-sise: 2", "SGLang has no option tp-sise; did you mean tp-size"),
        ("model: x\ntp-size: two", "tp-size is 'two'; it must be a whole number"),
        ("model: x\nenable-metrics: 1", "enable-metrics is 1; it must be true or false"),
        ("model: x\ndisaggregation-mode: both", "disaggregation-mode is 'both'; it is one of null, prefill, decode"),
    ],
)
def test_a_wrong_config_is_one_line_before_anything_starts(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        options.read(tmp_path / "c.yaml", engine="sglang")


@needs_sglang
def test_check_shows_the_command_and_starts_nothing(capsys: pytest.CaptureFixture[str], served_model: Path) -> None:
    found = serve_sglang.main(["ch07_sglang_routing/configs/tp2.yaml", "--check", "--set", "max_running_requests=3"])
    line = capsys.readouterr().out
    words = line.splitlines()[0].split()
    assert words[0] == str(servers.program("sglang", "python"))
    assert words[1:5] == ["-m", "sglang.launch_server", "--model-path", str(served_model)]
    assert {"--device", "--enable-metrics", "--sleep-on-idle"} <= set(words)  # what is added to the file's options too
    assert words[words.index("--max-running-requests") + 1] == "3"
    assert found["tensor_parallel"] == 2
    assert found["started"] is False


@needs_sglang
def test_a_false_option_is_left_out_as_sglang_has_no_negative_flags(served_model: Path) -> None:
    words = sglang_engine.command(str(served_model), 1, {"enable-metrics": False, "shutdown-timeout": 3})
    assert not {"--enable-metrics", "--no-enable-metrics", "--shutdown-timeout"} & set(words)
    assert words[words.index("--device") + 1] == "cpu"


# ---------------------------------------------------------------- serving


@pytest.mark.timeout(400)
def test_greedy_tokens_are_as_likely_as_transformers_own(sglang_server: Server, served_model: Path) -> None:
    """In bf16 sums in another order may tip a close choice: each chosen token is a likeliest one of the reference."""
    body = {"model": sglang_server.model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    answer = post(f"{sglang_server.url}/v1/completions", body | {"return_token_ids": True})
    ids = answer["choices"][0]["token_ids"]
    assert len(ids) == answer["usage"]["completion_tokens"] == 24
    model = lm.load(str(served_model), dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1].float()
    chosen = logits[range(24), ids]
    assert (logits.max(dim=-1).values - chosen).max() < 0.05
    assert (logits.argmax(dim=-1) == torch.tensor(ids)).float().mean() > 0.8


def test_an_openai_client_streams_and_is_told_what_was_cached(client: openai.OpenAI, sglang_server: Server) -> None:
    chunks = list(
        client.chat.completions.create(
            model=sglang_server.model,
            messages=[{"role": "user", "content": "What does zip() do?"}],
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"
    again = client.completions.create(model=sglang_server.model, prompt=PROMPT, max_tokens=1, temperature=0)
    again = client.completions.create(model=sglang_server.model, prompt=PROMPT, max_tokens=1, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens == len(PROMPT) - 1  # the last one is computed for its logits


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"max_tokens": -1}, "max_tokens must be positive"),
        ({"prompt": [1] * 5000}, "longer than the model's context length"),
        ({"temperature": -1.0}, "temperature must be a non-negative"),
        ({"extra_body": {"regex": "("}}, "parenthesis is not closed"),
    ],
)
def test_a_wrong_request_is_a_400_that_says_why(
    client: openai.OpenAI, sglang_server: Server, wanted: dict, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.completions.create(**{"model": sglang_server.model, "prompt": "a", "max_tokens": 2, **wanted})


def test_a_model_that_it_does_not_have_is_answered_by_the_one_it_has(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="nobody", prompt=PROMPT, max_tokens=3, extra_body={"ignore_eos": True})
    assert answer.usage
    assert answer.usage.completion_tokens == 3


@needs_sglang
@pytest.mark.timeout(400)
def test_two_ranks_answer_finish_what_runs_and_leave_nothing() -> None:
    with Starter("ch07_sglang_routing.serve_sglang", "tp2", "--grace-s", "120") as starter:
        starter.wait_until_ready()
        assert len(scrape(starter.url).samples["sglang:max_total_num_tokens"]) == 2
        assert serve_sglang.counters(starter.url)["engines"] == 1
        serving.finish_a_stream(starter)


@needs_sglang
@pytest.mark.timeout(400)
def test_two_copies_are_two_engines_and_kill_9_leaves_no_process() -> None:
    with Starter("ch07_sglang_routing.serve_sglang", "dp2") as starter:
        starter.wait_until_ready()
        counted = serve_sglang.counters(starter.url)
        assert (counted["engines"], counted["ranks"]) == (2, 2)
        assert serving.left_by_kill_9(starter) == []


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(client: openai.OpenAI, sglang_server: Server, stream: bool) -> None:
    """Issue 6280 of sglang: cancelled requests went on decoding. By the engine's own count this one does not."""
    running, before = "sglang:num_running_reqs", decoded(sglang_server.url)
    body = {"model": sglang_server.model, "prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    with socket.create_connection(("127.0.0.1", int(sglang_server.url.rsplit(":", 1)[1])), timeout=60) as connection:
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        connection.sendall(f"{head}\r\n\r\n".encode() + data)
        if stream:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        wait_until(lambda: in_flight(sglang_server.url) == 1, "the request to run")
    wait_until(lambda: in_flight(sglang_server.url) == 0, "its end")
    read = decoded(sglang_server.url)
    assert read - before < 2000
    client.completions.create(model=sglang_server.model, prompt=PROMPT, max_tokens=4, temperature=0)
    assert decoded(sglang_server.url) - read <= 4  # nothing else was decoded meanwhile
    assert scrape(sglang_server.url).values[running] == 0


def in_flight(url: str) -> int:
    with urllib.request.urlopen(f"{url}/v1/loads", timeout=60) as answer:
        return sum(load["num_running_reqs"] for load in json.load(answer)["loads"])


def decoded(url: str) -> float:
    samples = scrape(url).samples.get("sglang:realtime_tokens_total", [])
    return sum(sample.value for sample in samples if sample.labels["mode"] == "decode")


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


# ---------------------------------------------------------------- its ideas


def test_what_is_found_in_the_radix_cache_is_known_to_the_token(
    sglang_server: Server, served_model: Path, tmp_path: Path
) -> None:
    flags = ["--url", sglang_server.url, "--model", str(served_model), "--prefix", "96", "--requests", "3"]
    found = radix_cache.main([*flags, "--run-dir", str(tmp_path)])
    assert found["nothing_shared_as_expected"]
    assert found["shared_prefix_as_expected"]
    assert found["conversation_as_expected"]
    assert found["metrics_agree"]
    assert found["shared_prefix_hit_rate"] == pytest.approx(2 * 96 / (3 * (96 + radix_cache.UNIQUE)))


def test_every_constrained_answer_parses(sglang_server: Server, tmp_path: Path) -> None:
    found = structured.main(["--url", sglang_server.url, "--answers", "2", "--run-dir", str(tmp_path)])
    assert [found[f"{key}_parsed"] for key in ("json_schema", "regex", "ebnf")] == [2, 2, 2]
    assert [found[f"{key}_without"] for key in ("json_schema", "regex", "ebnf")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("JSON schema", '{"city":"Oslo","celsius":-40,"sky":["rain"]}', '{"city":"Oslo","celsius":51,"sky":["rain"]}'),
        ("JSON schema", '{"city":"Lima","celsius":0,"sky":["rain","snow"]}', '{"city":"Lima","celsius":0,"sky":[]}'),
        ("regex", "2031-12-29", "2031-13-29"),
        ("EBNF", "(4 - 3) * 17", "4 - 3"),
        ("EBNF", "1 + 2", "1 + 2 + 3"),
    ],
)
def test_the_judges_of_structured_answers_tell_good_from_bad(name: str, good: str, bad: str) -> None:
    judge = structured.CONSTRAINTS[name][1]
    assert structured.parses(judge, good)
    assert not structured.parses(judge, bad)
    assert not structured.parses(judge, "")


@pytest.mark.timeout(300)
def test_branches_of_a_program_find_what_stands_before_the_fork(
    sglang_server: Server, served_model: Path, tmp_path: Path
) -> None:
    flags = [
        "--url",
        sglang_server.url,
        "--model",
        str(served_model),
        "--branches",
        "2",
        "--tokens",
        "4",
        "--words",
        "30",
    ]
    found = frontend.main([*flags, "--run-dir", str(tmp_path)])
    assert found["branches_share"]
    assert found["cached_tokens"] >= 3 * found["shared_tokens"]  # two branches and the verdict
    assert found["shared_tokens"] > 30  # the text in front, a word of it at least a token


# ---------------------------------------------------------------- what cannot start


@needs_sglang
def test_what_is_wrong_is_said_before_anything_starts(served_model: Path) -> None:
    with pytest.raises(UserError, match=r"has 4 attention heads, which 3 ranks .*take a tp-size"):
        Server(served_model, "sglang", {"tp-size": 3}).__enter__()
    with pytest.raises(UserError, match="there is no model folder nowhere"):
        Server("nowhere", "sglang").__enter__()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=r"cannot be taken .*free it"):
        Server(served_model, "sglang", port=taken.getsockname()[1]).__enter__()


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (["[2026-01-01 00:00:00] Scheduler hit an exception: Traceback (most recent call last):",
          "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."],
         "RuntimeError: Not enough memory; raise mem-fraction-static"),
        (["ValueError: Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=0.05"],
         "raise mem-fraction-static"),
        (["AssertionError: 4 is not divisible by 3"], "take a tp-size that divides"),
    ],
    ids=["memory", "no cache", "heads"],
)  # fmt: skip
def test_sglangs_own_words_come_with_what_to_do(printed: list[str], said: str) -> None:
    assert said in servers.why(printed, servers.ENGINES["sglang"].advice)


def test_prefills_error_is_told_first_and_decode_is_not_waited_for() -> None:
    """The decode side never answers, as it waits for blocks; it ends when its server does."""
    asked: dict[str, dict] = {}
    stopped = threading.Event()

    class Side(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            side = "prefill" if self.server is sides[0] else "decode"
            asked[side] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if side == "decode":
                stopped.wait(60)
            self.send_error(500, "no room")

        def log_message(self, *_: object) -> None:
            pass

    sides = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Side) for _ in range(2)]
    urls = [f"http://127.0.0.1:{side.server_port}" for side in sides]
    for side in sides:
        threading.Thread(target=side.serve_forever, daemon=True).start()
    with ThreadPoolExecutor() as pool:
        try:
            with pytest.raises(UserError, match=rf"{urls[0]}/generate says 500"):
                prefill_decode.ask(pool, *urls, 8998, 4)
        finally:
            stopped.set()
            for side in sides:
                side.shutdown()
                side.server_close()
    assert asked["prefill"]["bootstrap_room"] > 1


@needs_sglang
def test_prefill_and_decode_on_one_node_have_a_gpu_each_and_a_context_that_the_model_has() -> None:
    found = prefill_decode.settings("made:1b")
    assert [found[side].get("base-gpu-id") for side in ("prefill", "decode")] == [None, 1]
    assert {own["context-length"] for own in found.values()} == {4096}
    assert "nixl==" in (ROOT / "ch07_sglang_routing/requirements.txt").read_text()


def test_prefill_and_decode_apart_say_what_they_need() -> None:
    with pytest.raises(UserError, match="needs a GPU's driver; run this where there are two GPUs"):
        prefill_decode.main(["--device", "cpu"])
