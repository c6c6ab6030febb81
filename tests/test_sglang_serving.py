"""Real SGLang as chapter 7 serves it: the same tokens as transformers, its cache to the token, and how it goes wrong."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
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
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_sglangs_own_parser_takes_every_config(config: Path) -> None:
    for laptop in (True, False):
        wanted = options.read(config, laptop=laptop, engine="sglang")
        assert str(wanted["model"]).startswith("made:") == laptop
        assert set(wanted) <= set(options.known("sglang"))


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
def test_check_shows_the_command_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found = serve_sglang.main(["ch07_sglang_routing/configs/tp2.yaml", "--check", "--set", "max_running_requests=3"])
    line = capsys.readouterr().out
    assert line.startswith("sglang serve --model-path made:nano --port 30000 --tp-size 2")
    assert "--max-running-requests 3" in line
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


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(client: openai.OpenAI, sglang_server: Server, stream: bool) -> None:
    """Issue 6280 of sglang: cancelled requests went on decoding. The answer would take far longer than the deadline."""
    running = "sglang:num_running_reqs"
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
    client.completions.create(model=sglang_server.model, prompt=PROMPT, max_tokens=4, temperature=0)
    assert decoded(sglang_server.url) - read <= 4  # nothing else was decoded meanwhile
    assert scrape(sglang_server.url).values[running] == 0


def in_flight(url: str) -> int:
    with urllib.request.urlopen(f"{url}/v1/loads", timeout=60) as answer:
        return sum(load["num_running_reqs"] for load in json.load(answer)["loads"])


def decoded(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if "realtime_tokens_total{" in line and 'mode="decode"' in line
    )


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


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "NNODES: how many nodes are there? set it"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "which model? name it first"),
    ],
)
def test_the_launch_script_says_what_it_lacks(env: dict[str, str], said: str) -> None:
    done = process.run(["bash", "ch07_sglang_routing/launch/multi_node.sh"], timeout_s=30, env=env)
    assert done.returncode != 0
    assert said in done.stderr


def test_prefill_and_decode_apart_say_what_they_need() -> None:
    with pytest.raises(UserError, match="needs a GPU's driver; run this where there are two GPUs"):
        prefill_decode.main(["--device", "cpu"])
