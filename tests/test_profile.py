"""Chapter 1: saved activations counted by hand, the memory formula, roofline verdicts, and both scripts as a reader
starts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ch01_intro import memory, profile_memory, roofline, training, workloads
from ch01_intro.decode import generate, generate_uncached
from ch01_intro.roofline import COMPUTE, MEMORY, NETWORK, OVERHEAD, Ceilings, Work, classify
from common import lm, process, profiling
from common.script import UserError
from tests.inprocess import run_script

ROOT = Path(__file__).resolve().parents[1]
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
QUICK = "--preset nano --batch-size 2 --seq-len 32 --data"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus: these tests are not about tokenising."""
    path = tmp_path_factory.mktemp("corpus") / "text.py"
    path.write_text("".join(f"def function_{i}(a, b):\n    return a * {i} + b\n\n" for i in range(2000)))
    return path


def nano(**changes: int) -> nn.Module:
    config = lm.config("nano", 64)
    for name, value in {"num_hidden_layers": 2, **changes}.items():
        setattr(config, name, value)
    return lm.build(config)


def forward_loss(model: nn.Module, batch: int, seq_len: int, dtype: torch.dtype) -> torch.Tensor:
    """As the training loop computes it."""
    ids = torch.randint(2048, (batch, seq_len + 1))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids[:, :-1].contiguous(), use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def test_saved_activations_of_a_module_known_by_hand():
    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu, self.second = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.relu(self.first(x)))

    model = TwoLayers()
    with memory.SavedActivations(model) as saved:
        model(torch.randn(16, 32)).sum()
    # first saves its input; relu saves its result, which second saves again as its input: one storage, counted once.
    # second's weight is saved too, but a parameter lives anyway.
    assert saved.bytes_by_module == {"first": 16 * 32 * 4, "relu": 16 * 64 * 4}


def test_saved_activations_see_no_difference_between_a_view_and_its_storage():
    model = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(3)])
    x = torch.randn(4, 2, 8)
    with memory.SavedActivations(model) as saved:
        sum(layer(x[:, 0]).sum() for layer in model)
    assert saved.bytes_by_module == {"0": x.nbytes}  # half is used, all of it is kept alive, once


def test_frozen_weights_save_no_input():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    with memory.SavedActivations(model) as saved:
        model(torch.randn(4, 8)).sum()
    assert sum(saved.bytes_by_module.values()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activation_formula_equals_what_autograd_saves(dtype: torch.dtype, kv_heads: int):
    model = nano(num_key_value_heads=kv_heads)
    with memory.SavedActivations(model) as saved:
        forward_loss(model, 3, 40, dtype)
    measured, formula = saved.by_kind(), memory.activation_formula(model.config, 3, 40, dtype)
    assert set(measured) == set(formula)
    for kind, expected in formula.items():
        assert measured[kind] == pytest.approx(expected, rel=0.01), kind


def test_state_is_4_4_8_bytes_a_parameter_and_a_tied_weight_counts_once():
    model = nano()
    optimizer = training.make_optimizer(model, 1e-3)
    forward_loss(model, 1, 8, torch.float32).backward()
    before = memory.state_bytes(model, optimizer)
    assert sum(row.optimizer for row in before.values()) == 0  # Adam's moments come with the first step
    optimizer.step()
    table = memory.state_bytes(model, optimizer)
    count = lm.parameter_count(model.config)
    assert sum(row.parameters for row in table.values()) == 4 * count
    assert sum(row.gradients for row in table.values()) == 4 * count
    assert sum(row.optimizer for row in table.values()) == 8 * count
    assert "head" not in table
    assert table["embedding"].parameters == 4 * 2048 * 256


def test_timeline_holds_what_the_meter_measured(tmp_path: Path):
    model = nano()
    optimizer = training.make_optimizer(model, 1e-3)
    timeline = memory.Timeline(model, optimizer, torch.device("cpu"))
    with profiling.trace(tmp_path / "trace.json", torch.device("cpu"), memory=True), timeline.hooks():
        with timeline.phase("forward"):
            loss = forward_loss(model, 2, 32, torch.float32)
        with timeline.phase("backward"):
            loss.backward()
        with timeline.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    assert timeline.read(tmp_path / "trace.json") > 0
    marks = {mark.label: mark for mark in timeline.marks}
    state = 4 * lm.parameter_count(model.config)
    saved = sum(memory.activation_formula(model.config, 2, 32, torch.float32).values())
    after_forward = marks["end forward"].allocated - timeline.weights
    assert saved <= after_forward <= 1.1 * saved
    assert marks["end backward"].gradients == state
    assert marks["end backward"].allocated - timeline.weights == pytest.approx(state, rel=0.01)  # activations are gone
    assert marks["end optimizer"].optimizer == 2 * state
    assert marks["end optimizer"].allocated - timeline.weights == pytest.approx(2 * state, rel=0.01)
    assert [name for name, *_ in timeline.spans()] == ["forward", "backward", "optimizer"]
    assert f"gradient {next(iter(dict(model.named_parameters())))}" in marks


def test_traffic_counts_reads_and_writes_and_no_views():
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    with roofline.Traffic() as traffic:
        (a @ b).t().reshape(-1)  # the transpose is free, its reshape copies
    assert traffic.bytes == 4 * (8 * 16 + 16 * 4 + 8 * 4) + 4 * (2 * 8 * 4)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (Work("matmul", 1.0, flops=60e9, moved=1e9), COMPUTE),
        (Work("copy", 1.0, flops=1e9, moved=8e9), MEMORY),
        (Work("all_reduce", 1.0, moved=1e9, wire=0.9e9), NETWORK),
        (Work("launches", 1.0, flops=1e9, moved=0.1e9), OVERHEAD),
        (Work("waiting", 1.0, wire=0.1e9), OVERHEAD),
        (Work("both, arithmetic nearer", 1.0, flops=80e9, moved=5e9), COMPUTE),
    ],
    ids=lambda value: value.name if isinstance(value, Work) else None,
)
def test_classification(work: Work, expected: str):
    verdict, evidence = classify(work, Ceilings(flops=100e9, memory=10e9, network=1e9))
    assert verdict == expected
    assert "%" in evidence
    assert "\n" not in evidence


def test_work_faster_than_memory_is_said_to_be_cached():
    verdict, evidence = classify(Work("small", 1.0, flops=1e9, moved=30e9), Ceilings(100e9, 10e9))
    assert verdict == MEMORY
    assert "caches" in evidence


def test_decode_reads_all_weights_for_one_token_and_a_batch_shares_them():
    config = lm.config("8b")
    one, many, prefill = (
        roofline.inference_flops(config, *shape) / roofline.inference_bytes(config, *shape, 2)
        for shape in ((1, 1, 512), (64, 1, 512), (1, 2048, 0))
    )
    assert one == pytest.approx(1.0, rel=0.05)  # 2 FLOPs and 2 bytes a weight
    assert 30 < many < 64
    assert prefill > 500
    assert roofline.kv_bytes(config, 1, 1, 2) == 131072  # 2 x 32 layers x 8 heads x 128 x 2 bytes


def test_cached_decode_equals_uncached():
    model = nano().eval()
    prompts = torch.randint(2048, (3, 12))
    done = generate(model, prompts, 10)
    assert torch.equal(done.tokens, generate_uncached(model, prompts, 10))
    assert len(done.times) == 10
    assert len(done.decode_s) == 9


def script(command: str, run_dir: Path) -> dict[str, Any]:
    done = process.run(f"{command} --run-dir {run_dir}", timeout_s=240, env=ENV)
    assert done.returncode == 0, done.stderr
    assert done.result is not None
    return done.result


def test_profile_memory_with_two_ranks(text: Path, tmp_path: Path):
    launch = "torchrun --standalone --nproc-per-node=2 ch01_intro/profile_memory.py"
    result = script(f"{launch} {QUICK} {text} --steps 3 --dtype fp32", tmp_path)
    count = result["parameters"]
    assert result["params_mib"] == pytest.approx(4 * count / 2**20, rel=1e-4)
    assert result["optimizer_mib"] == pytest.approx(2 * result["params_mib"], rel=1e-4)
    assert result["grads_mib"] == pytest.approx(result["params_mib"], rel=1e-4)
    assert result["activations_ratio"] == pytest.approx(1, abs=0.15)
    assert set(result["verdicts"]) == {"forward", "backward", "communication", "optimizer"}
    assert result["trace_events"] > 100
    assert result["timeline_peak_mib"] > 4 * result["params_mib"]
    assert min(result[f"{name}_per_s"] for name in ("matmul_tflop", "mem_gib", "allreduce_gib")) > 0
    for name in ("timeline.png", "roofline.png", "trace.json", "trace-rank1.json", "result.json"):
        assert (tmp_path / name).stat().st_size > 0


def test_workloads(tmp_path: Path):
    sizes = "--batch-size 2 --seq-len 64 --steps 3 --new-tokens 8 --decode-batch 4 --requests 8"
    result = script(f"python ch01_intro/workloads.py {sizes}", tmp_path)
    assert result["kv_cache_exact"] is True
    assert result["intensity_decode"] < result["intensity_decode_batch"] < result["intensity_prefill"]
    assert result["intensity_decode"] < result["intensity_training"]
    assert result["decode_tokens_per_s"] < result["prefill_tokens_per_s"]
    assert result["ttft_ms_p50_light"] < result["ttft_ms_p50_busy"]  # requests that queue wait
    assert result["training_mib"] > 4 * result["weights_mib"]
    assert (tmp_path / "workloads.png").stat().st_size > 0


@pytest.mark.parametrize("command", ["profile_memory.py --preset huge", "workloads.py --model nowhere"])
def test_bad_input_is_one_line_and_exit_code_2(command: str, tmp_path: Path):
    name, *flags = command.split()
    done = run_script(f"ch01_intro/{name}", [*flags, "--run-dir", tmp_path / "run"])
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "; " in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("main", "flags", "says"),
    [
        (profile_memory.main, "--steps 2", "--steps 2 leaves none"),
        (profile_memory.main, "--batch-size 0", "0 is below 1"),
        (workloads.main, "--new-tokens 1", "1 is below 2"),
        (workloads.main, "--preset nothing", "no model 'nothing'"),
        (workloads.main, "--steps 1", "--steps 1 leaves none"),
    ],
)
def test_bad_flags_are_told(main: Callable[[list[str]], dict], flags: str, says: str):
    with pytest.raises(UserError, match=says):
        main(flags.split())
