"""Engines compared fairly: the same requests for all, new ones in each round of each load, ratios within a round."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ch07_sglang_routing import compare_engines
from common.script import UserError
from tests.openai_fake import FakeServer

IDS = np.arange(5, 2000)
ARGUMENTS = ["--rate", "200,400", "--requests", "3", "--warmup", "2", "--output-tokens", "2-4"]


@pytest.fixture
def args(monkeypatch: pytest.MonkeyPatch) -> compare_engines.argparse.Namespace:
    monkeypatch.setattr(compare_engines, "engine_name", str)  # whether they are installed here or not
    return compare_engines.parse_args([*ARGUMENTS, "--engine", "ours,vllm,sglang"])


def test_no_two_rounds_of_any_load_share_a_prompt_and_each_is_the_same_again(
    args: compare_engines.argparse.Namespace,
) -> None:
    args.requests = 20
    turns = [(at, number) for at in range(2) for number in range(4)]
    drawn = [compare_engines.drawn_load(*turn, args, IDS) for turn in turns]
    beginnings = [tuple(request.prompt[:16]) for sent in drawn for request in [*sent.requests, *sent.warmup]]
    assert len(beginnings) == len(set(beginnings)) == 8 * 22  # not even a block of a cache
    again = compare_engines.drawn_load(*turns[5], args, IDS)
    assert again.requests == drawn[5].requests
    assert again.times.tolist() == drawn[5].times.tolist()
    assert drawn[0].times[-1] == pytest.approx(20 / 200)
    assert drawn[4].times[-1] == pytest.approx(20 / 400)


def test_each_engine_in_turn_gets_the_same_requests(args: compare_engines.argparse.Namespace, tmp_path: Path) -> None:
    orders, records = set(), tmp_path / "requests.jsonl"
    with contextlib.ExitStack() as stack:
        fakes = {name: stack.enter_context(FakeServer()) for name in args.engine}
        child = SimpleNamespace(tree=list)
        servers = {name: SimpleNamespace(url=fake.url, model="fake", child=child) for name, fake in fakes.items()}
        for number in range(4):
            before = {name: len(fake.seen) for name, fake in fakes.items()}
            figures, waiting = compare_engines.play(servers, 1, number, args, IDS, records)
            sent = compare_engines.drawn_load(1, number, args, IDS)
            wanted = sorted((one.prompt, one.max_tokens) for one in [*sent.warmup, *sent.requests])
            new = {name: fake.seen[before[name] :] for name, fake in fakes.items()}
            for name, seen in new.items():
                assert sorted((one.body["prompt"], one.body["max_tokens"]) for one in seen) == wanted
                assert figures[name]["completed"] == 3
                assert figures[name]["exact_lengths"]
            orders.add(tuple(sorted(new, key=lambda name: new[name][0].arrived_s)))
            spans = sorted((seen[0].arrived_s, max(one.written_s[-1] for one in seen)) for seen in new.values())
            assert all(ended < begun for (_, ended), (begun, _) in itertools.pairwise(spans))
            assert waiting == 0
    assert len(orders) > 1
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(rows) == 4 * 3 * 3
    assert {(row["engine"], row["rate"]) for row in rows} == {(name, 400.0) for name in args.engine}


def test_ratios_are_taken_within_a_round() -> None:
    def figures(e2e_ms: float) -> dict[str, float]:
        return dict.fromkeys(compare_engines.SHOWN.values(), e2e_ms) | {"failed": 1, "exact_lengths": True}

    pairs = [(1.0, 2.0), (10.0, 30.0), (100.0, 100.0)]  # the machine was ten times as slow from round to round
    rounds = [{"ours": figures(one), "vllm": figures(other)} for one, other in pairs]
    found = compare_engines.show(4, rounds, "ours")
    assert found["vllm"]["e2e_over_first"] == 2.0  # of the medians it would be 3
    assert found["vllm"]["e2e_over_first_range"] == [1.0, 3.0]
    assert found["ours"]["e2e_over_first_range"] == [1.0, 1.0]
    assert found["vllm"]["failed"] == 3


@pytest.mark.parametrize("gpu", [False, True])
def test_limits_cache_and_threads_are_the_same_for_all(
    args: compare_engines.argparse.Namespace, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_engines, "gpus_visible", lambda: gpu)
    monkeypatch.setattr(compare_engines, "own_cores", lambda: [2, 3, 5, 7])
    args.cache_tokens = 16_384
    ours, vllm, sglang = (compare_engines.options_of(name, args) for name in args.engine)
    assert ours["num-blocks"] * ours["block-size"] == sglang["max-total-tokens"] == 16_384
    assert (vllm["num-gpu-blocks-override"] - 1) * vllm["block-size"] == 16_384  # one is never given out
    assert ours["max-model-len"] == vllm["max-model-len"] == sglang["context-length"]
    assert ours["max-num-seqs"] == vllm["max-num-seqs"] == sglang["max-running-requests"]
    assert ours["max-num-batched-tokens"] == vllm["max-num-batched-tokens"] == sglang["chunked-prefill-size"]
    if gpu:  # vLLM's share is of the whole GPU and has to be free: three engines stand on it
        assert 3 * vllm["gpu-memory-utilization"] == pytest.approx(0.9)
        assert [compare_engines.variables_of(name) for name in args.engine] == [{}] * 3
        return
    assert "gpu-memory-utilization" not in vllm
    assert {compare_engines.variables_of(name)["OMP_NUM_THREADS"] for name in args.engine} == {"3"}
    for name, variable in (("vllm", "VLLM_CPU_OMP_THREADS_BIND"), ("sglang", "SGLANG_CPU_OMP_THREADS_BIND")):
        assert compare_engines.variables_of(name)[variable] == "3,5,7"


def test_settings_hold_the_command_and_the_variables_that_it_got() -> None:
    child = SimpleNamespace(command=["python", "-m", "engine", "--port", "1"])
    found = compare_engines.settings_of(SimpleNamespace(engine="ours", child=child, env={"OMP_NUM_THREADS": "1"}))
    assert found == {"versions": {}, "command": child.command, "environment": {"OMP_NUM_THREADS": "1"}}


def test_a_cache_in_which_a_request_does_not_fit_is_one_line(args: compare_engines.argparse.Namespace) -> None:
    with pytest.raises(UserError, match="does not fit into --cache-tokens 1024"):
        compare_engines.parse_args(["--engine", "ours", "--max-len", "2048", "--cache-tokens", "1024"])
