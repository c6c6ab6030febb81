"""genai-bench's results read aright, and the server of known truth that it is measured on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from ch06_vllm.client import Client, RequestFailed, Retry
from ch06_vllm.servers import Server
from ch07_sglang_routing import genai_bench
from ch07_sglang_routing.known_truth import KnownServer
from common import bootstrap, exercises
from common.script import UserError

LACKING = exercises.missing_for("genai-bench")


def result(unit: str = "s") -> dict[str, Any]:
    """Ten requests of 20 tokens in 4 s, of which four failed, and a warm-up of three; as genai-bench writes it."""
    scale = 1.0 if unit == "s" else 1e3
    good = {"ttft": 0.05 * scale, "e2e_latency": 0.4 * scale, "num_output_tokens": 20, "error_code": None}
    bad = dict.fromkeys(("ttft", "e2e_latency", "num_output_tokens")) | {"error_code": 500}
    told = {
        "run_duration": 4.0 * scale,
        "error_rate": 0,
        "num_concurrency": 2,
        "mean_output_throughput_tokens_per_s": 15.0,
    }
    told["stats"] = {"ttft": {"p50": 0.05 * scale}}
    return {"aggregated_metrics": told, "individual_request_metrics": [good] * 6 + [bad] * 4, "_time_unit": unit}


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_a_result_is_read_with_its_failures_and_its_warm_up(unit: str) -> None:
    found = genai_bench.read_result(json.dumps(result(unit)))
    assert (found.requests, found.error_rate, found.own_error_rate) == (10, 0, pytest.approx(0.4))
    assert found.tokens_per_s == 15.0
    assert found.own_tokens_per_s == pytest.approx((6 + 2 / 2) * 20 / 4)  # of two, half was served and cut off
    assert found.own_requests_per_s == pytest.approx(7 / 4)
    assert found.ttft_ms_p50 == pytest.approx(50)
    assert found.ttfts_ms == pytest.approx([50] * 6)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps(result() | {"individual_request_metrics": []})])
def test_what_is_no_result_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="no result of genai-bench"):
        genai_bench.read_result(text)


def test_a_python_that_is_too_new_for_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bootstrap.NEWEST_PYTHON["genai-bench"] == (3, 12)
    monkeypatch.setattr(bootstrap, "NEWEST_PYTHON", {"genai-bench": (3, 10)})
    with pytest.raises(SystemExit, match="2"):
        bootstrap.set_up_engine("genai-bench")
    said = capsys.readouterr().err
    assert said.startswith("error: genai-bench takes Python 3.10 at most, this is 3.")
    assert said.endswith("; make PYTHON=python3.10\n")


def test_the_server_does_what_it_says_it_did() -> None:
    async def ask(url: str) -> list[Any]:
        async with Client(url, retry=Retry(attempts=1)) as client:
            asked = [client.complete([1, 2, 3], model="known", max_tokens=5, ignore_eos=True) for _ in range(10)]
            return await asyncio.gather(*asked, return_exceptions=True)

    with KnownServer(0.05, 0.01, fail=2, fail_of=5) as known:
        answers = asyncio.run(ask(known.url))
    refused = [answer for answer in answers if isinstance(answer, RequestFailed)]
    whole = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert (len(refused), len(whole)) == (known.truth.failed, known.truth.completed) == (4, 6)
    assert known.truth.error_rate == 0.4
    assert all(answer.completion_tokens == len(answer.arrivals_s) == 5 for answer in whole)
    assert known.truth.tokens == 30
    assert min(known.truth.ttft_s) >= 0.05  # a token may be late, and is never early
    assert len(known.truth.gaps_s) == 24
    for answer in whole:  # what a client sees holds the server's waits
        assert answer.arrivals_s[-1] - answer.sent_s >= 0.05 + 4 * 0.01


@pytest.mark.skipif(bool(LACKING), reason=f"needs {LACKING}")
def test_genai_bench_itself_has_the_faults_that_are_corrected(tmp_path: Path, served_model: Path) -> None:
    """Should a later version mend them, this says so."""
    args = genai_bench.parse_args(["--requests", "20"])
    with KnownServer(0.02, 0.005, fail=2, fail_of=5) as known:
        out, warm_up = tmp_path / "genai/run", ["--warmup-ratio", "0.3"]
        found = genai_bench.run_genai_bench(known.url, "known", served_model, out, args, warm_up)
    assert found.error_rate == 0
    assert found.own_error_rate == pytest.approx(known.truth.error_rate, abs=0.1)
    assert found.own_tokens_per_s == pytest.approx(genai_bench.TOKENS * found.own_requests_per_s)  # ignore_eos arrives
    true = known.truth.tokens_per_s
    assert abs(found.own_tokens_per_s - true) < abs(found.tokens_per_s - true)


@pytest.mark.skipif(bool(LACKING), reason=f"needs {LACKING}")
def test_real_sglang_is_benchmarked_with_it(sglang_server: Server, served_model: Path, tmp_path: Path) -> None:
    assert genai_bench.parse_args(["--serve", "sglang:nano"]).serve == ("sglang", "nano")
    args, out = genai_bench.parse_args(["--requests", "10"]), tmp_path / "genai/run"
    found = genai_bench.run_genai_bench(sglang_server.url, sglang_server.model, served_model, out, args)
    assert found.requests >= 10
    assert found.own_error_rate == 0
    assert found.own_tokens_per_s == pytest.approx(genai_bench.TOKENS * found.own_requests_per_s)
    assert min(found.ttfts_ms) > 0
