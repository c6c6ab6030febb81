"""Chapter 5: train_deepspeed.py is the training of chapters 3 and 4, whatever the config file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ch02_hardware_parallelism.harness import Case, check
from ch05_deepspeed_megatron.strategies import Averaged, RaggedLlama, option
from common import lm
from tests.spawn import fork_script

CONFIGS = "ch05_deepspeed_megatron/configs"
SHORT = [
    "--steps", "3", "--ragged", "--global-batch", "8", "--batch-size", "2", "--seq-len", "32", "--dtype", "fp32", "--clip", "0.5",
    "--val-tokens", "512", "--sample-tokens", "4", "--warmup", "1",
]  # fmt: skip


def losses(script: str, out: Path, *flags: str) -> tuple[list[float], dict]:
    done, _ = fork_script(script, 2, [*SHORT, "--out", out, "--run-dir", out / "run", *flags], timeout_s=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.value
    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], done.value


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses("ch04_fsdp/train_fsdp.py", tmp_path_factory.mktemp("fsdp"))[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_the_losses_are_those_of_fsdp_and_the_model_is_a_folder(stage: int, fsdp: list[float], tmp_path: Path) -> None:
    found, result = losses(
        "ch05_deepspeed_megatron/train_deepspeed.py", tmp_path, "--deepspeed-config", f"{CONFIGS}/zero{stage}.json"
    )
    assert found == pytest.approx(fsdp, rel=2e-6)
    assert result["stage"] == stage
    assert result["ranks_agree"]
    assert lm.weights_sha256(lm.load(str(tmp_path / "model"))) == result["weights_sha256"]
    assert result["val_loss"] < found[0]


def test_each_option_is_one_process_and_a_planted_fault_is_named() -> None:
    names = ["zero-1", "zero-2+all-reduce", "zero-2+cpu", "zero-3", "zero-3+free-at-once", "zero-3+cpu-params"]
    cases = [
        Case(2, 4, "float32", tied=True, frozen=True, uneven=True, by_hand=False),
        Case(2, 1, "float32", tied=False, by_hand=False),
    ]
    outcomes = check([*map(option, names), option("zero-2", Averaged)], cases, RaggedLlama())
    planted = [outcome for outcome in outcomes if "averaged" in outcome.strategy]
    right = [outcome for outcome in outcomes if outcome not in planted]
    assert len(right) == 2 * len(names)
    assert all(outcome.ok for outcome in right), [outcome.diagnosis() for outcome in right]
    with_four, with_one = planted
    assert "0.25 times too large" in with_four.diagnosis()
    assert with_one.ok  # there is nothing to divide by
