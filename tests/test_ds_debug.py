"""Chapter 5's debugging guide: each verdict on its own evidence, and on DeepSpeed itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ch05_deepspeed_megatron import debug_deepspeed, debug_faults, debug_verdicts
from ch05_deepspeed_megatron.debug_verdicts import FirstNotFinite, NoRoom, Step
from common import dist
from common.script import UserError
from tests.spawn import run_ranks, values

P = 2**28  # parameters: 1 GiB in float32
GIB = 2**30


# ---------------------------------------------------------------- verdicts


def test_the_key_that_a_line_names_first() -> None:
    keys = list(debug_verdicts.keys_of({"a": 1, "fp16": {"enabled": True}, "zero": {"stage": 0, "offload": {}}}))
    assert keys == ["a", "fp16", "fp16.enabled", "zero", "zero.stage", "zero.offload"]
    named = debug_verdicts.named_in
    assert named("zero.offload needs stage 1", keys) == "zero.offload"
    assert named("modes bfloat16 and fp16 cannot be enabled", keys) == "fp16"
    assert named("no key 'stage' in zero", keys) == "zero.stage"
    assert named("something else", keys) == ""


@pytest.mark.parametrize(
    ("lost", "stage", "cap_gib", "cause", "cure"),
    [
        ("optimizer", 0, 3.8, "optimizer", "stage 1 would fit: 3.75 GiB"),  # 1 + 1 + 3/2, and 1/4 on top
        ("gradients", 1, 3.4, "gradients", "stage 3 would fit: 3.25 GiB"),
        ("parameters", 2, 1.8, "parameters", "stage 3 with offload_optimizer would fit: 1.75 GiB"),
        ("optimizer", 3, 0.5, "optimizer", "no stage would fit on so many ranks"),
        ("activations", 1, 9.0, "activations", "no stage shards them"),
    ],
)
def test_which_stage_would_fit(lost: str, stage: int, cap_gib: float, cause: str, cure: str) -> None:
    verdict = debug_verdicts.of_memory(NoRoom(lost, "64 MiB"), P, stage, 2, int(cap_gib * GIB), 2**28)
    assert verdict.cause == cause
    assert verdict.cure.startswith(cure)
    assert f"stage {stage}" in verdict.text


def test_states_by_stage_are_those_of_the_paper_and_a_flat_copy() -> None:
    totals = [sum(debug_verdicts.state_bytes(P, stage, 4).values()) / P for stage in range(4)]
    assert totals == [4 + 8 + 8, 4 + 4 + 3, 4 + 2 + 3, 1 + 2 + 3]
    assert sum(debug_verdicts.state_bytes(P, 1, 1).values()) == 24 * P


def test_only_a_lack_of_memory_is_taken_for_one() -> None:
    with pytest.raises(NoRoom) as found, debug_verdicts.part("gradients"):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 524288 bytes. Error code 12"
        )
    assert (found.value.part, found.value.asked) == ("gradients", "524288 bytes")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), debug_verdicts.part("activations"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_scale_that_is_too_high_is_told_from_a_nan() -> None:
    of = debug_verdicts.of_numbers
    fine = [Step(2.0, 2.0**16, False)] * 3
    assert of(fine, "") is None
    falling = [Step(2.0, 2.0**k, True) for k in (20, 19, 18)]
    settled = of([*falling, Step(2.0, 2.0**17, False)], "")
    assert settled
    assert settled.cause == "overflow"
    assert "3 steps skipped while it fell from 1.04858e+06 to 131072" in settled.text
    assert "initial_scale_power 17" in settled.cure
    assert of(falling, "").cause == "overflow"  # type: ignore[union-attr]
    assert of([Step(float("nan"), 2.0**16, True)], "").cause == "nan"  # type: ignore[union-attr]
    assert of([Step(float("inf"), 2.0**16, True)], "layers.1.act (Root)").text.endswith("layers.1.act (Root)")  # type: ignore[union-attr]


def test_the_first_module_that_is_not_finite_is_named_and_not_those_after_it() -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    model = nn.Sequential(nn.Linear(4, 4), Root(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.copy_(-torch.eye(4))
    watch = FirstNotFinite(model)
    model(torch.ones(2, 4))
    assert watch.name == "1 (Root)"
    watch.remove()
    healthy = FirstNotFinite(nn.Sequential(nn.Linear(4, 4)))
    assert healthy.name == ""


def test_a_slow_disk_is_told_from_a_slow_use_of_it() -> None:
    of = debug_verdicts.of_offload
    used_badly = of(2.0, 0.1, 10**8, 10**8, 10**9, 10**9)  # 0.2 s would do, 1.9 are taken
    assert used_badly
    assert used_badly.cause == "aio"
    assert "95% of it the disk's: 200 MB in 1.90 s, which the disk as measured can do in 0.20 s" in used_badly.text
    assert of(0.35, 0.1, 10**8, 10**8, 10**9, 10**9).cause == "disk"  # type: ignore[union-attr]
    assert of(0.35, 0.3, 10**8, 10**8, 10**9, 10**9) is None, "most of the step is arithmetic"


# ---------------------------------------------------------------- DeepSpeed


def on_one_rank() -> dict[str, tuple[str, str]]:
    """Each fault that one rank shows: cause and verdict."""
    found: dict[str, Any] = {}
    with dist.session("cpu", threads=1) as ctx:
        for name in debug_faults.BAD:
            found[name] = debug_faults.bad_config(name, ctx)
        found["overflow"], found["nan"] = debug_faults.overflow(ctx), debug_faults.nan(ctx)
        found["none"] = debug_faults.healthy(ctx)
    return {name: (verdict.cause, str(verdict)) if verdict else ("", "") for name, verdict in found.items()}


def test_config_and_numbers_are_named_on_deepspeed_itself() -> None:
    found = values(run_ranks(on_one_rank, 1, timeout_s=120))[0]
    assert {name: cause for name, (cause, _) in found.items()} == {
        name: debug_deepspeed.CAUSES[name] for name in found
    }  # fmt: skip
    assert "DeepSpeed trains on, clipping at 1.0" in found["unknown-key"][1], "the default, not the 0.5 that was meant"
    assert "did you mean 'gradient_clipping'" in found["unknown-key"][1]
    assert "offloading nothing" in found["offload-stage-0"][1]
    assert "model.layers.1.mlp.act_fn (Root)" in found["nan"][1]


@pytest.mark.parametrize("fault", ["uneven-steps", "oom-stage-2"])
def test_on_two_ranks(fault: str) -> None:
    result = debug_deepspeed.main(["--fault", fault, "--device", "cpu", "--timeout-s", "5"])
    assert result == {
        fault.replace("-", "_"): debug_deepspeed.CAUSES[fault], "faults": 1, "named": 1, "skipped": 0,
        "cures_proven": 0,
    }  # fmt: skip


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no fault 'nane'; one of batch-sizes"):
        debug_deepspeed.main(["--fault", "nane"])
    with pytest.raises(UserError, match="no folder"):
        debug_deepspeed.main(["--nvme-dir", str(tmp_path / "gone")])
