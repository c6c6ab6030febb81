"""Chapter 3, DDP's reducer: buckets, readiness, where gradients are synchronised, communication hooks, bucket sizes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ch02_hardware_parallelism import virtual_cluster
from ch03_ddp import comm_hooks, hooks, recorder, reducer, sweep_buckets
from common import dist
from common.process import run
from common.script import UserError
from tests.spawn import run_ranks, values

SMALL = argparse.Namespace(preset="nano", bucket_mib=1.0, batch_size=1, seq_len=8, steps=3, seed=0)


def bits(tensors: Iterator[torch.Tensor | None]) -> bytes:
    return torch.cat([t.flatten() for t in tensors if t is not None]).numpy().tobytes()


def grads(ddp: DistributedDataParallel) -> bytes:
    return bits(p.grad for p in ddp.parameters())


# ---------------------------------------------------------------- the reducer


def observed() -> dict[str, Any]:
    """What one rank sees of three steps, of two micro-batches, and of each of DDP's options."""
    seen: dict[str, Any] = {}
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        lab = reducer.Lab(SMALL, ctx)
        seen["weights"] = lab.weights_before, lab.weights_after
        steps = [lab.step() for _ in range(3)]
        seen["defined"] = list(lab.recorder.name_of.values())
        seen["sizes"] = {name: p.nbytes for name, p in lab.model.named_parameters()}
        seen["ready"] = [list(step.gradients_ms) for step in steps]
        seen["buckets"] = [[(b.index, b.names, b.bytes, b.is_last) for b in step.buckets] for step in steps]
        seen["expected"] = recorder.expected_buckets(lab.ddp, seen["ready"][0])
        seen["logged"] = lab.ddp._get_ddp_logging_data()
        seen["times"] = [
            (b.ready_ms, b.launched_ms, b.finished_ms, steps[-1].backward_ms, steps[-1].end_ms)
            for b in steps[-1].buckets
        ]
        with lab.ddp.no_sync():
            lab.backward()
        seen["first micro-batch"] = grads(lab.ddp), len(lab.recorder.buckets)
        lab.backward()
        seen["second micro-batch"] = grads(lab.ddp), len(lab.recorder.buckets)
        lab.optimizer.step()
        seen["optimizer.step"] = grads(lab.ddp), len(lab.recorder.buckets)
        for option, chosen in reducer.OPTIONS.items():
            lab = reducer.Lab(SMALL, ctx, **chosen)
            counts = [len(lab.step().buckets) for _ in range(3)]
            lab.backward()
            memory, in_bucket = lab.held()
            of_buckets = {t.untyped_storage().data_ptr() for t in lab.recorder.buffers}
            of_grads = {p.grad.untyped_storage().data_ptr() for p in lab.model.parameters() if p.grad is not None}
            assert in_bucket == (of_grads <= of_buckets)
            seen[option] = counts, in_bucket, memory
    return seen


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[str, Any]]:
    return values(run_ranks(observed, 2, timeout_s=120))


def test_construction_broadcasts_rank_0(of_ranks: list[dict[str, Any]]) -> None:
    (before_0, after_0), (before_1, after_1) = (seen["weights"] for seen in of_ranks)
    assert before_0 != before_1
    assert after_0 == after_1 == before_0


def test_buckets_are_those_of_ddps_rule_and_are_rebuilt_once(of_ranks: list[dict[str, Any]]) -> None:
    for seen in of_ranks:
        first, second, third = seen["buckets"]
        assert [names for _, names, _, _ in first] == [seen["defined"]]  # all in one, as they are defined
        assert [names for _, names, _, _ in second] == of_ranks[0]["expected"]
        assert second == third
        assert len(second) > 5
        assert seen["logged"]["has_rebuilt_buckets"] == 1
        assert [int(size) for size in seen["logged"]["rebuilt_bucket_sizes"].split(",")] == [b[2] for b in second]
        for index, (number, names, size, is_last) in enumerate(second):
            assert (number, is_last) == (index, index == len(second) - 1)
            assert size == sum(seen["sizes"][name] for name in names)
            if not is_last:  # closed by the parameter that reached 1 MiB
                assert size >= 2**20 > size - seen["sizes"][names[-1]]


def test_gradients_are_ready_from_the_end_but_not_as_defined(of_ranks: list[dict[str, Any]]) -> None:
    for seen in of_ranks:
        ready = seen["ready"][0]
        assert sorted(ready) == sorted(seen["defined"])
        assert ready != list(reversed(seen["defined"]))
        assert seen["ready"][1] == seen["ready"][2] == ready
        assert (ready[0], ready[-1]) == ("model.norm.weight", "model.embed_tokens.weight")  # tied: used first and last
        layers = [int(name.split(".")[2]) for name in ready if ".layers." in name]
        assert layers == sorted(layers, reverse=True)


def test_times_follow_each_other(of_ranks: list[dict[str, Any]]) -> None:
    for seen in of_ranks:
        for ready, launched, finished, backward, end in seen["times"]:
            assert 0 < ready <= launched <= finished <= end
            assert ready <= backward
        assert all(one[1] <= other[1] for one, other in pairwise(seen["times"]))  # they leave in order


def test_backward_of_the_last_micro_batch_synchronises(of_ranks: list[dict[str, Any]]) -> None:
    one, other = of_ranks
    assert one["first micro-batch"][0] != other["first micro-batch"][0]
    assert one["first micro-batch"][1] == 0
    assert one["second micro-batch"][0] == other["second micro-batch"][0]
    assert one["second micro-batch"][1] == len(one["buckets"][-1])
    assert one["optimizer.step"] == one["second micro-batch"]  # sent nothing, changed no gradient


def test_options(of_ranks: list[dict[str, Any]]) -> None:
    for seen in of_ranks:
        gradients = sum(seen["sizes"].values())
        later = len(seen["buckets"][-1])
        assert seen["defaults"] == ([1, later, later], False, 2 * gradients)
        assert seen["static_graph"] == ([1, 1, later], False, 2 * gradients)  # the first step only counts uses
        assert seen["gradient_as_bucket_view"] == ([1, later, later], True, gradients)
        counts, _, _ = seen["find_unused_parameters"]
        assert counts[0] == counts[1] == counts[2] > 1  # buckets from the start, and no rebuild


def whole_script(folder: str) -> dict:
    flags = ["--device", "cpu", "--steps", "3", "--batch-size", "1", "--seq-len", "16", "--run-dir", folder]
    return reducer.main(flags)


def test_reducer_script_draws_what_it_recorded(tmp_path: Path) -> None:
    result = values(run_ranks(whole_script, 2, str(tmp_path), timeout_s=120))[0]
    assert result["buckets_as_by_rule"]
    assert result["buckets_sent_in_optimizer_step"] == 0
    assert result["gradient_as_bucket_view_gradients_mib"] == result["defaults_gradients_mib"] / 2
    assert 0 <= result["hidden"] <= 1
    for name in ("timeline.png", "timeline-first-step.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_hidden_share_of_a_made_up_step() -> None:
    under, across, behind = (
        recorder.Bucket(n, ["a"], 4, n == 2, None, launched_ms=begin, finished_ms=end)
        for n, (begin, end) in enumerate([(1, 3), (8, 12), (10, 14)])
    )
    assert [b.hidden(10.0) for b in (under, across, behind)] == [1.0, 0.5, 0.0]
    assert recorder.Step(0, 10.0, 14.0, {}, [under, across, behind]).hidden() == pytest.approx(0.4)


# ---------------------------------------------------------------- hooks


class Odd(nn.Module):
    """1,447 parameters: no bucket is a whole number of blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def flat_gradient(ddp: DistributedDataParallel, x: torch.Tensor, *, reset: bool = True) -> torch.Tensor:
    if reset:
        ddp.zero_grad()
    ddp(x).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in ddp.parameters() if p.grad is not None]).clone()


def hooked() -> dict[str, Any]:
    """By hook: gradients of some steps, beside the exact ones and this rank's own."""
    seen: dict[str, Any] = {}
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        draw = torch.Generator().manual_seed(ctx.rank)
        xs = [torch.randn(5, 40, generator=draw) for _ in range(6)]

        def wrapped(name: str, cap_mib: float = 2**-11) -> tuple[DistributedDataParallel, Any]:
            ddp = DistributedDataParallel(Odd(), bucket_cap_mb=cap_mib)
            return ddp, hooks.register(ddp, name)

        exact, _ = wrapped("none")
        with exact.no_sync():
            seen["own"] = flat_gradient(exact, xs[0])
        seen["exact"] = torch.stack([flat_gradient(exact, x) for x in xs])
        seen["buckets"] = len(exact._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))
        for name in hooks.HOOKS:
            ddp, state = wrapped(name)
            seen[name] = torch.stack([flat_gradient(ddp, x) for x in xs])
            if isinstance(state, hooks.Int8):
                left = [state.residual[p] for p in ddp.parameters() if p in state.residual]
                seen[f"{name} residual"] = torch.cat(left) if left else None
        for name in ("none", "identity"):  # gradients that are the bucket already, over two micro-batches
            ddp = DistributedDataParallel(Odd(), bucket_cap_mb=2**-11, gradient_as_bucket_view=True)
            hooks.register(ddp, name)
            for x in xs[:2]:
                ddp.zero_grad(set_to_none=False)
                with ddp.no_sync():
                    flat_gradient(ddp, x, reset=False)
                seen[f"accumulated {name}"] = flat_gradient(ddp, x, reset=False)
        for name in ("int8", "int8-no-feedback"):  # the same gradient, many times
            ddp, _ = wrapped(name)
            steps = torch.stack([flat_gradient(ddp, xs[0]) for _ in range(32)])
            seen[f"repeated {name}"] = steps.double().sum(0) - 32 * seen["exact"][0].double()
        ddp, state = wrapped("int8")
        overflow = flat_gradient(ddp, xs[0] * (math.inf if ctx.rank == 0 else 1))
        seen["overflow"] = overflow.isfinite().all(), all(r.isfinite().all() for r in state.residual.values())
        seen["after the overflow"] = flat_gradient(ddp, xs[0])
    return seen


@pytest.fixture(scope="module", params=[2, 3])
def hooked_ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return values(run_ranks(hooked, request.param, timeout_s=120))


def test_all_ranks_hold_the_same_bits_whatever_the_hook(hooked_ranks: list[dict[str, Any]]) -> None:
    first, *others = hooked_ranks
    assert first["buckets"] > 1
    for name in hooks.HOOKS:
        assert all(torch.equal(first[name], other[name]) for other in others), name


def test_identity_is_ddp_bit_for_bit(hooked_ranks: list[dict[str, Any]]) -> None:
    seen = hooked_ranks[0]
    assert torch.equal(seen["none"], seen["exact"])
    assert torch.equal(seen["identity"], seen["exact"])
    if len(hooked_ranks) == 2:
        assert torch.equal(seen["accumulated identity"], seen["accumulated none"])
    else:
        torch.testing.assert_close(seen["accumulated identity"], seen["accumulated none"])


@pytest.mark.parametrize(("name", "unit", "smallest"), [("fp16", 2**-11, 2**-25), ("bf16", 2**-8, 0.0)])
def test_half_precision_is_off_by_its_roundings(
    hooked_ranks: list[dict[str, Any]], name: str, unit: float, smallest: float
) -> None:
    """Each rank rounds twice at most, and each of N - 1 additions once, none of what is larger than the sum of all."""
    ranks = len(hooked_ranks)
    own = torch.stack([seen["own"] for seen in hooked_ranks]).abs().sum(0) / ranks
    error = (hooked_ranks[0][name][0] - hooked_ranks[0]["exact"][0]).abs()
    assert (error <= 1.05 * (ranks + 1) * (unit * own + smallest)).all()
    assert error.max() > 0


def test_int8_is_off_by_half_a_scale_of_each_rank(hooked_ranks: list[dict[str, Any]]) -> None:
    """In the first step all parameters are in one bucket as they are defined, so the blocks are known."""
    bound = torch.zeros_like(hooked_ranks[0]["own"])
    for seen in hooked_ranks:
        for block in range(0, len(bound), hooks.BLOCK):
            bound[block : block + hooks.BLOCK] += seen["own"][block : block + hooks.BLOCK].abs().max() / 127 / 2
    for name in ("int8", "int8-no-feedback"):
        error = (hooked_ranks[0][name][0] - hooked_ranks[0]["exact"][0]).abs()
        assert (error <= 1.001 * bound / len(hooked_ranks)).all()
        assert error.max() > 0.5 * bound.max() / len(hooked_ranks)


def test_error_feedback_loses_nothing(hooked_ranks: list[dict[str, Any]]) -> None:
    """What was sent over all steps, and what is still owed, is the sum of the gradients, over a rebuild of buckets."""
    seen = hooked_ranks[0]
    owed = torch.stack([s["int8 residual"] for s in hooked_ranks]).double().mean(0)
    sent, wanted = seen["int8"].double().sum(0), seen["exact"].double().sum(0)
    largest = seen["exact"].abs().max()
    assert (sent + owed - wanted).abs().max() < 1e-5 * largest
    assert owed.abs().max() > 1e-4 * largest  # so that without it the sum would not hold
    assert seen["int8-no-feedback residual"] is None


def test_error_feedback_keeps_the_accumulated_error_bounded(hooked_ranks: list[dict[str, Any]]) -> None:
    seen = hooked_ranks[0]
    one_step = (seen["int8-no-feedback"][0] - seen["exact"][0]).abs().max()
    assert seen["repeated int8-no-feedback"].abs().max() > 16 * one_step  # 32 times the same rounding
    assert seen["repeated int8"].abs().max() < 4 * one_step


def test_an_overflow_is_seen_and_then_forgotten(hooked_ranks: list[dict[str, Any]]) -> None:
    for seen in hooked_ranks:
        gradients_finite, residuals_finite = seen["overflow"]
        assert not gradients_finite  # or a GradScaler would take the step
        assert residuals_finite
        assert (seen["after the overflow"] - seen["exact"][0]).norm() < 0.1 * seen["exact"][0].norm()


def test_quantize_handles_zeros_and_keeps_extremes() -> None:
    x = torch.zeros(2, hooks.BLOCK)
    x[1, 0], x[1, 1] = -8.0, 4.0
    quantized, scales = hooks.quantize(x)
    assert quantized[0].tolist() == [0] * hooks.BLOCK
    assert (quantized * scales)[1, :2].tolist() == pytest.approx([-8.0, 4.0], rel=0.01)


def test_bytes_by_formula() -> None:
    buckets = [[torch.Size([512, 256])], [torch.Size([300]), torch.Size([100, 7])]]
    numbers = 512 * 256 + 1000

    def sent(name: str, ranks: int) -> float:
        return hooks.HOOKS[name].sent_bytes(buckets, ranks)

    assert sent("none", 2) == sent("identity", 2) == 4 * numbers
    assert sent("none", 4) == 1.5 * 4 * numbers
    assert sent("bf16", 2) == sent("fp16", 2) == 2 * numbers
    assert sent("int8", 2) == 129 * 1028  # whole blocks, each with its scale
    assert sent("int8", 8) > sent("none", 8)  # everybody's bytes to everybody
    assert sent("powersgd", 2) == 4 * (4 * (512 + 256) + 300 + 700)  # 4 x 107 is not half of 100 x 7


needs_cluster = pytest.mark.skipif(bool(virtual_cluster.why_not()), reason=f"needs netns: {virtual_cluster.why_not()}")


@needs_cluster
def test_compressing_hooks_send_fewer_bytes_over_the_card() -> None:
    flags = "--device cpu --rates 1gbit --steps 4 --probe-steps 1 --batch-size 1 --seq-len 16 --val-tokens 64"
    names = ["none", "bf16", "int8", "powersgd"]
    command = ["python", "ch03_ddp/comm_hooks.py", *flags.split(), "--hooks", ",".join(names)]
    done = run(command, timeout_s=150)
    assert done.returncode == 0, done.stderr[-3000:]
    result = done.result
    assert result
    card = {name: result[f"{name}_card_mib_1gbit"] for name in names}
    for name in ("none", "bf16", "int8"):
        assert 1 < result[f"{name}_card_over_formula_1gbit"] < 1.06
    exact = result["none_sent_mib_1gbit"]
    assert card["bf16"] < 0.53 * exact
    assert card["int8"] < 0.27 * exact
    assert card["powersgd"] < 0.05 * exact
    assert result["none_error_1gbit"] == 0
    assert 0 < result["bf16_error_1gbit"] < 0.01
    assert 0 < result["int8_error_1gbit"] < 0.05


# ---------------------------------------------------------------- bucket sizes


def swept() -> dict:
    flags = "--width 32 --layers 1 --vocab 512 --seq-len 16 --batch-size 4 --steps 2 --device cpu"
    args = sweep_buckets.flags(None).parse_args(flags.split())
    args.sizes = ["1e-06", "0.03125", "one"]
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        return sweep_buckets.measure(args, ctx) | {
            "parameters": len(list(sweep_buckets.make(args, ctx, "one", sweep_buckets.Comm()).model.parameters()))
        }


def test_sweep_measures_each_size_against_its_own_twin() -> None:
    result = values(run_ranks(swept, 2))[0]
    each, some, one = (result["sizes"][size] for size in ("1e-06", "0.03125", "one"))
    assert each["buckets"] == result["parameters"]  # a bucket holds one parameter at least
    assert 1 < some["buckets"] < each["buckets"]
    assert one["buckets"] == 1
    for row in (each, some, one):
        assert row["hidden"] == 1 - row["exposed_ms"] / row["communication_ms"]
        assert row["latency_ms"] == pytest.approx(row["buckets"] * result["alpha_us"] / 1e3)
    assert one["last_bucket_ms"] >= some["last_bucket_ms"]
    assert result["best_step_ms"] == min(row["step_ms"] for row in result["sizes"].values())
    assert result["fewest_over_best"] == one["step_ms"] / result["best_step_ms"]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("script", "flags", "line"),
    [
        (reducer, "", "one rank has nothing to reduce; start it with torchrun"),
        (reducer, "--preset nanoo", "no model 'nanoo'; take a preset"),
        (reducer, "--bucket-mib 0", "0 is not a finite number above 0"),
        (reducer, "--steps 2", "2 is below 3"),
        (sweep_buckets, "--sizes 1", "one size is no sweep; pass two or more"),
        (sweep_buckets, "--sizes 1,all", "'all' is not a number"),
        (sweep_buckets, "--sizes 1,-2", "-2 is not a finite number above 0"),
        (sweep_buckets, "--sizes 1,1e-9", "1e-9 MiB is less than a byte"),
        (sweep_buckets, "--rates fast", "the rate 'fast' is not like 100mbit"),
        (sweep_buckets, "--heads 5", "--heads 5 does not divide --width 192"),
        (comm_hooks, "--hooks none,zip", "there is no hook 'zip'; there are none, identity"),
        (comm_hooks, "--steps 2", "2 is below 3"),
        (comm_hooks, "--preset nanoo", "no model 'nanoo'; take a preset"),
        (comm_hooks, "--rates 1tbit", "a rate of 1tbit cannot be shaped"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(script: ModuleType, flags: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        script.main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_an_unknown_hook_is_refused() -> None:
    with pytest.raises(UserError, match="there is no hook 'gzip'; take one of none, identity"):
        hooks.register(None, "gzip")  # type: ignore[arg-type]
