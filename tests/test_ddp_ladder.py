"""Chapter 3's ladder, profile, precision and peers: the same training on every rung and in every loop."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ch01_intro import training
from ch02_hardware_parallelism.harness import Case
from ch03_ddp import bench_peers, ladder, peers, precision, rungs, step, step_profile
from ch03_ddp.rungs import Rung, Trainee
from ch03_ddp.strategies import RaggedLlama
from common import data, dist, script
from common.script import CheckFailed, UserError
from tests.spawn import fork_script, run_ranks, values

TINY = ["--seq-len", "16", "--batch-size", "1", "--starts", "2", "--rounds", "1", "--steps", "1"]
NAMES = ["baseline", "prefetch", "fused", "buckets", "overlap", "compile", "accumulation"]  # of fp32


def climb(folder: Path) -> dict[str, Any]:
    """On each rank: the ladder in fp32, accumulation beside one large micro-batch, and an overflow in fp16."""
    args = ladder.parse([*TINY, "--dtype", "fp32", "--profile", "overlap"])
    with dist.session("cpu", timeout_s=120, threads=1) as ctx:
        run = script.Run(folder)
        steps = rungs.ladder(dtype="fp32", bucket_mib=args.bucket_mib, accumulation=4, ranks=2)
        found = ladder.measure(steps, args, ctx, run)
        rows = data.Blocks(training.load_corpus(args).train, args.seq_len)
        several = Trainee(Rung(overlap=True, accumulation=4), args, rows, ctx, micro_batch=1)
        one = Trainee(Rung(overlap=True), args, rows, ctx, micro_batch=4)
        for _ in range(3):
            several.step()
            one.step()
        return {
            "result": ladder.summary(found, args, ctx),
            "losses": {measured.rung.name: measured.losses for measured in found},
            "profiles": {measured.rung.name: measured.profile for measured in found},
            "batches": (several.all_losses(), one.all_losses()),
            "overflow": precision.overflow(args, ctx),
        }


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ladder")
    found: dict[str, Any] = values(run_ranks(climb, 2, folder, timeout_s=240))[0]
    return found | {"folder": folder}


def test_exact_rungs_train_as_the_first_does(climbed: dict[str, Any]) -> None:
    losses, result = climbed["losses"], climbed["result"]
    assert list(losses) == NAMES
    for name in NAMES[:-1]:
        assert losses[name] == pytest.approx(losses["baseline"], abs=1e-5)
    assert losses["baseline"][0] != losses["baseline"][-1]
    assert losses["accumulation"] != pytest.approx(losses["baseline"], abs=1e-2)  # another batch
    assert result["largest_loss_difference"] < 1e-5
    assert result["accumulation_tokens_per_s"] == pytest.approx(4 * 2 * 16 / result["accumulation_step_ms"] * 1e3)
    assert "compile_warm_up_s" in result
    assert sorted(result["pays"] + result["costs"] + result["within_noise"]) == sorted(NAMES[1:])


def test_micro_batches_add_up_to_the_large_batch(climbed: dict[str, Any]) -> None:
    several, one = climbed["batches"]
    assert several == pytest.approx(one, abs=1e-5)


def test_profiles_of_the_rungs(climbed: dict[str, Any]) -> None:
    for name, profile in climbed["profiles"].items():
        assert profile.ms["matrix products"] > 0, name
        assert profile.communication_ms > 0, name
        assert profile.peak_bytes > 2**20, name
    assert climbed["profiles"]["overlap"].hidden > climbed["profiles"]["fused"].hidden
    assert (climbed["folder"] / "trace.json").stat().st_size > 10_000


def test_an_overflow_on_one_rank_is_skipped_by_all(climbed: dict[str, Any]) -> None:
    found = climbed["overflow"]
    assert found["scales"] == [[65536, 32768], [65536, 32768]]
    assert (found["ranks_that_skipped"], found["ranks_that_went_on"]) == (2, 2)
    assert found["ranks_agree"]
    assert found["overflow_on_rank"] == 1


def test_a_change_that_is_not_exact_is_caught() -> None:
    profile = step_profile.Profile(dict.fromkeys(step_profile.KINDS, 0.0), 0.0, 0, "")
    first = ladder.Measured(Rung(), 8, 0, 0, profile, [1.0], [7.0, 6.0])
    fine = ladder.Measured(Rung("fine"), 8, 0, 0, profile, [1.0], [7.0, 6.000001])
    wrong = ladder.Measured(Rung("wrong"), 8, 0, 0, profile, [1.0], [7.0, 6.001])
    rounded = ladder.Measured(Rung("rounded", effect="rounding"), 8, 0, 0, profile, [1.0], [7.0, 6.01])
    nan = ladder.Measured(Rung("nan"), 8, 0, 0, profile, [1.0], [7.0, float("nan")])
    ladder.check_losses([first, fine, rounded], {})
    for bad in (wrong, nan):
        with pytest.raises(CheckFailed, match=bad.rung.name):
            ladder.check_losses([first, fine, bad], {})


def test_losses_that_part_after_the_first_step_are_seen() -> None:
    class FakeJob:
        args = bench_peers.parse(["--peers", "torch-ddp"])
        dtype, global_batch = torch.float32, 8
        ctx = type("ctx", (), {"world_size": 2})

    times = [{"ours": [1.0, 1.0], "torch-ddp": [2.0, 3.0]}, {"ours": [2.0], "torch-ddp": [6.0]}]
    for second, equal in ((6.0, True), (6.1, False), (float("nan"), False)):
        losses = {"ours": [7.0, 6.0], "torch-ddp": [7.0, second]}
        result = bench_peers.summary(times, losses, FakeJob)  # type: ignore[arg-type]
        assert result["losses_equal"] is equal
        assert result["over_torch_ddp"] == 3
        assert (result["over_torch_ddp_lowest_start"], result["over_torch_ddp_highest_start"]) == (2.5, 3)


def test_factors_are_of_tokens_and_of_the_same_round() -> None:
    profile = step_profile.Profile({}, 0.0, 0, "")
    small = ladder.Measured(Rung(), 100, 0, 0, profile, [10.0, 20.0, 40.0])
    large = ladder.Measured(Rung(), 400, 0, 0, profile, [20.0, 40.0, 80.0])
    assert large.over(small) == [2.0, 2.0, 2.0]


def test_a_factor_within_the_noise_is_called_so() -> None:
    quartiles = ([1.01, 1.02, 1.03], [0.97, 1.02, 1.03], [0.97, 0.98, 0.99])
    assert [ladder.verdict(three) for three in quartiles] == ["pays", "within_noise", "costs"]


def test_one_rank_has_no_rungs_of_messages() -> None:
    def names(**settings: Any) -> list[str]:
        return [rung.name for rung in rungs.ladder(bucket_mib=1, accumulation=2, **settings)]

    assert names(dtype="fp32", ranks=2) == NAMES
    assert names(dtype="bf16", ranks=1) == ["baseline", "prefetch", "bf16", "fused", "compile", "accumulation"]
    assert names(dtype="fp32", ranks=1, without=["compile", "prefetch"]) == ["baseline", "fused", "accumulation"]


def event(name: str, category: str, begin: float, length: float, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": length, "tid": tid}


def test_every_moment_of_a_step_belongs_to_one_kind() -> None:
    on_cpu = [
        event(step_profile.STEP, "user_annotation", 0, 10_000),
        event("autograd::engine::evaluate_function: MmBackward0", "cpu_op", 1000, 3000),
        event("aten::mm", "cpu_op", 1500, 2000),
        event("aten::_scaled_dot_product_flash_attention_for_cpu", "cpu_op", 4000, 500),
        event("gloo:all_reduce", "user_annotation", 3000, 3000, tid=7),  # 1500 us beside operators
        event(step_profile.OPTIMIZER, "user_annotation", 7000, 1000),
        event("aten::_fused_adamw_", "cpu_op", 7200, 500),
        event("aten::mm", "cpu_op", 8000, 500, tid=9),  # of another thread
        event("aten::mm", "cpu_op", 12_000, 500),  # after the step
    ]
    ms, communication = step_profile.split(on_cpu, on_gpu=False)
    wanted = [2.0, 0.5, 1.0, 1.0, 1.5, 4.0]
    assert ms == pytest.approx(dict(zip(step_profile.KINDS, wanted, strict=True)))
    assert communication == 3.0
    on_gpu = [
        event(step_profile.STEP, "user_annotation", 0, 10_000),
        event("aten::mm", "cpu_op", 0, 9000),  # the CPU only launches
        event("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "kernel", 1000, 2000, tid=20),
        event("void pytorch_flash::flash_fwd_kernel<...>", "kernel", 3000, 500, tid=20),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", "kernel", 2000, 3000, tid=24),
        event("void at::native::vectorized_elementwise_kernel<4>", "kernel", 3500, 500, tid=20),
        event(step_profile.OPTIMIZER, "gpu_user_annotation", 6000, 1000, tid=20),
        event("void at::native::multi_tensor_apply_kernel<...>", "kernel", 6000, 900, tid=20),
        event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 7000, 100, tid=21),
    ]
    ms, communication = step_profile.split(on_gpu, on_gpu=True)
    wanted = [2.0, 0.5, 1.0, 0.6, 1.0, 4.9]
    assert ms == pytest.approx(dict(zip(step_profile.KINDS, wanted, strict=True)))
    assert communication == 3.0


def test_weights_are_cast_once_a_step() -> None:
    """Under autocast, whatever the number of micro-batches; the gradients are what they were."""

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
            return func(*args, **(kwargs or {}))

    class Anew(step.Precision):
        def whole_step(self) -> Any:
            return contextlib.nullcontext()

    model = RaggedLlama().build(Case(dtype="float32", tied=True))
    tokens = torch.randint(0, 20, (3, 4, 9), generator=torch.Generator().manual_seed(0))
    micro_batches = [(rows[:, :-1], rows[:, 1:]) for rows in tokens]
    found = []
    for kind in (step.Precision, Anew):
        precision = kind.of(torch.bfloat16, torch.device("cpu"))
        with Casts() as casts:
            step.backward(model, micro_batches, 96, 1, precision)
        found.append((casts.count, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    (kept, gradients), (anew, wanted) = found
    assert anew == 3 * kept > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


# ---------------------------------------------------------------- peers


def test_all_loops_do_the_same_work() -> None:
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("needs accelerate")
    flags = ["--seq-len", "32", "--batch-size", "2", "--starts", "2", "--rounds", "1", "--dtype", "fp32"]
    done = fork_script(bench_peers.__file__, 2, flags, timeout_s=120)
    assert done[0].returncode == 0, done[0].stderr
    result = done[0].value
    assert result["losses_equal"] is True
    for name in ("torch_ddp", "accelerate", "trainer", "ours_again"):
        assert result[f"{name}_first_loss_difference"] < 1e-6
        assert result[f"{name}_largest_loss_difference"] < 1e-5  # of six steps: schedule and clipping are the same
        assert result[f"over_{name}"] > 0


def test_loops_take_turns_and_their_errors_come_out() -> None:
    happened = []

    def loop(job: Any, done: peers.Done) -> None:
        for number in range(4):
            happened.append(number)
            done(torch.tensor(float(number)))
        raise ValueError("after the last step")

    class Nothing:
        class ctx:
            device = torch.device("cpu")

    turns = peers.Turns(loop, Nothing(), timeout_s=60)  # type: ignore[arg-type]
    assert happened == []
    turns.take(1)
    assert happened == [0]
    turns.take(3)
    assert happened == [0, 1, 2, 3]
    assert [loss.item() for loss in turns.losses] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="after the last step"):
        turns.take(1)
    stopped = peers.Turns(loop, Nothing(), timeout_s=60)  # type: ignore[arg-type]
    stopped.take(2)
    stopped.stop()
    assert happened[4:] == [0, 1]
    assert not stopped._thread.is_alive()


def test_without_accelerate_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"accelerate is not installed; .*--peers torch-ddp"):
        bench_peers.parse([])
    assert bench_peers.parse(["--peers", "torch-ddp"]).peers == ["torch-ddp"]


@pytest.mark.parametrize(
    ("main", "flags", "says"),
    [
        (ladder.main, ["--without", "nonsense"], "no rung 'nonsense' to leave out; --without takes prefetch"),
        (ladder.main, ["--profile", "overlap"], "no rung 'overlap' here"),  # on one rank
        (ladder.main, ["--preset", "nonsense"], "no model 'nonsense'"),
        (bench_peers.main, ["--peers", "nonsense"], "no peer 'nonsense'; one of torch-ddp"),
        (bench_peers.main, ["--starts", "0"], "0 is below 1"),
        (precision.main, ["--steps", "2"], "2 is below 3"),
    ],
)
def test_bad_input(main: Any, flags: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        main([*flags, "--run-dir", str(tmp_path)])
