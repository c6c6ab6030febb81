"""Tensor parallelism: parity with one process, the bytes it sends, its loss over a cut vocabulary, and bad input.

Every combination of the settings is what `harness.all_cases` gives; here are those in which the strategies differ.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor.debug import CommDebugMode

from ch02_hardware_parallelism import harness, sequence_parallel, tensor_data, tensor_parallel
from ch02_hardware_parallelism import model as models
from ch02_hardware_parallelism.bugs import MissingReplicatedAllReduce, NormCountsCopies, RowBiasOnEveryRank
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.harness import Case, Outcome, Problem
from ch02_hardware_parallelism.model import Shape
from ch02_hardware_parallelism.tensor_layers import VocabCrossEntropy
from ch02_hardware_parallelism.tensor_parallel import TensorParallel
from common import dist
from common.script import UserError
from tests import spawn

SCRIPT = "ch02_hardware_parallelism/tensor_parallel.py"
SCRATCH = {"tensor-parallel": tensor_parallel, "sequence-parallel": sequence_parallel, "tensor-x-data": tensor_data}
LIBRARY = ("library-tensor", "library-sequence")
CASES = [
    Case(2),
    Case(2, accumulation=4, tied=False, frozen=True, uneven=True),
    Case(2, dtype="float32", by_hand=False, accumulation=4, frozen=True, uneven=True),
    Case(3, accumulation=4, uneven=True),
    Case(4, accumulation=4, uneven=True),
    Case(4, dtype="float32", by_hand=False, tied=False, frozen=True),
]
LIBRARY_CASES = [Case(2, by_hand=False, accumulation=4, frozen=True, uneven=True), Case(3, by_hand=False, tied=False)]


class Small(Problem):
    shape = Shape(layers=3)


BUGS = (RowBiasOnEveryRank, NormCountsCopies, MissingReplicatedAllReduce)


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, Case], Outcome]:
    found = harness.check(list(SCRATCH), CASES, Small())
    found += harness.check(BUGS, CASES[:1], Small())
    found += harness.check(LIBRARY, LIBRARY_CASES, Small())
    return {(outcome.strategy, outcome.case): outcome for outcome in found}


@pytest.mark.parametrize("strategy", [*SCRATCH, *LIBRARY])
def test_parity(outcomes: dict[tuple[str, Case], Outcome], strategy: str) -> None:
    mine = [outcome for (name, _), outcome in outcomes.items() if name == strategy]
    run = [outcome for outcome in mine if not outcome.skipped]
    assert [outcome.diagnosis() for outcome in run if not outcome.ok] == []
    for outcome in mine:
        assert bool(outcome.skipped) == (strategy == "tensor-x-data" and outcome.case.ranks < 4)
    assert len(run) >= 2


def test_planted_bugs_are_seen(outcomes: dict[tuple[str, Case], Outcome]) -> None:
    plain = CASES[0]
    assert "loss" in outcomes["RowBiasOnEveryRank", plain].failures
    # gradients, losses and weights are right: only clipping would go wrong
    assert outcomes["NormCountsCopies", plain].failures == ["norm"]
    forgotten = outcomes["MissingReplicatedAllReduce", plain]
    copies = {name for name, _ in models.build(Small.shape).named_parameters()
              if "norm" in name or "position" in name or name.endswith(("out.bias", "down.bias"))}  # fmt: skip
    # The weights of the second step are wrong too, so by then all gradients are.
    assert copies <= set(forgotten.wrong)
    assert "gradient" in forgotten.failures


# ---------------------------------------------------------------- bytes


def test_bytes_are_those_of_the_formula(outcomes: dict[tuple[str, Case], Outcome]) -> None:
    counted = [o for (name, case), o in outcomes.items() if name in SCRATCH and case.by_hand and not o.skipped]
    assert [(o.bytes_exact, o.wire_bytes > 0) for o in counted] == [(True, True)] * (4 + 4 + 1)


def test_bytes_of_a_model_by_hand() -> None:
    # 8 tokens, 1 layer of width 4: 6 all_reduces of 8 x 4 and 3 of 8 numbers, each sent 2 (N - 1) times
    model, batch = models.build(Shape(vocab=8, width=4, heads=2, layers=1, context=4)), (torch.zeros(2, 4),) * 2
    assert tensor_parallel.wire_bytes(model, [batch], 2) == 2 * (6 * 32 + 3 * 8) * 4
    copies = 3 * 8 + 2 * 4 + 16  # norms, biases of row layers, positions
    assert sequence_parallel.wire_bytes(model, [batch], 2) == 2 * (6 * 32 + 3 * 8 + copies) * 4
    assert [module.wire_bytes(model, [batch], 1) for module in (tensor_parallel, sequence_parallel)] == [0, 0]
    matrices = 12 * 16 + (3 * 4 + 16) + 8 * 4  # with the biases of column layers, and the tied vocabulary
    across = 2 * (matrices + 2 * (copies + 1)) * 4
    assert tensor_data.wire_bytes(model, [batch], 4) == 2 * (6 * 32 + 3 * 8) * 4 + across
    model.embedding.position.weight.requires_grad = model.blocks[0].attention.k.bias.requires_grad = False
    copies, matrices = copies - 16, matrices - 4
    assert sequence_parallel.wire_bytes(model, [batch], 2) == 2 * (6 * 32 + 3 * 8 + copies) * 4
    across = 2 * (matrices + 2 * (copies + 1)) * 4
    assert tensor_data.wire_bytes(model, [batch], 4) == 2 * (6 * 32 + 3 * 8) * 4 + across


class FrozenStart(Small):
    """Nothing learns before an attention's output matrix in the second layer: no gradient comes back beyond it."""

    frozen_names = tuple(
        name
        for name, _ in models.build(Shape(tied=False)).named_parameters()
        if name.startswith(("embedding", "blocks.0", "blocks.1.norm1")) or name.split(".")[3:4] in (["q"], ["k"], ["v"])
    )


def test_nothing_is_sent_back_where_nothing_learns() -> None:
    case = Case(4, tied=False, frozen=True, uneven=True)
    assert tensor_parallel.gradients_cross(FrozenStart().build(case)) == (6, 6)  # four layers have 9 of each
    outcomes = harness.check(list(SCRATCH), [case], FrozenStart())
    assert [(o.diagnosis(), o.bytes_exact) for o in outcomes] == [("", True)] * 3


def collectives_of_the_library(name: str) -> dict[str, int]:
    with dist.session("cpu", timeout_s=60, threads=1):
        problem = Small()
        strategy = harness.resolve(name)[1](problem.build(Case()), Comm(), problem.make_optimizer)
        with CommDebugMode() as counted:
            strategy.backward(next(problem.steps(Case())))
        return {str(kind).split(".")[-1]: count for kind, count in counted.get_comm_counts().items()}


def test_the_library_sends_what_the_formula_says() -> None:
    regions = 4 * Small.shape.layers + 2  # the all_reduces of [b, t, d]; three more are the loss's
    (counted, _) = spawn.values(spawn.run_ranks(collectives_of_the_library, 2, "library-tensor"))
    assert counted == {"all_reduce": regions + 3}
    (counted, _) = spawn.values(spawn.run_ranks(collectives_of_the_library, 2, "library-sequence"))
    # The embedding is summed as a whole, then cut: an all_reduce instead of a reduce_scatter. Weight and bias of each
    # norm are summed at the end, one by one.
    norms = 2 * Small.shape.layers + 1
    assert counted == {
        "all_reduce": 4 + 2 * norms,
        "all_gather_into_tensor": regions,
        "reduce_scatter_tensor": regions - 1,
    }


@pytest.mark.parametrize(("ranks", "grid"), [(2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (6, (2, 3)), (8, (2, 4))])
def test_grid(ranks: int, grid: tuple[int, int]) -> None:
    assert tensor_data.grid_of(ranks) == grid


# ---------------------------------------------------------------- the loss, and the copies


def loss_of_a_rank(scale: float, by_hand: bool) -> tuple[float, torch.Tensor, int, list[torch.Tensor]]:
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        comm = Comm(by_hand=by_hand)
        logits_btv, targets_bt = numbers(scale)
        part_btV = logits_btv.chunk(ctx.world_size, -1)[ctx.rank].clone().requires_grad_()
        loss_bt = VocabCrossEntropy.apply(part_btV, targets_bt, comm)
        (loss_bt * torch.arange(1.0, 8.0)).sum().backward()
        sent = sum(torch.tensor(ctx.gather(comm.sent_bytes) or [0])).item()
        problem = Small()
        strategy = TensorParallel(problem.build(Case()), Comm(by_hand=by_hand), problem.make_optimizer)
        for micro_batches in problem.steps(Case()):
            strategy.backward(micro_batches)
            strategy.update()
        copies = [p.detach() for name, p in strategy.model.named_parameters() if name not in strategy.shard_dims]
        return loss_bt.detach(), part_btV.grad, sent, copies


def numbers(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(4, 7, 12, generator=generator), torch.randint(12, (4, 7), generator=generator)


@pytest.mark.parametrize(("ranks", "scale", "by_hand"), [(2, 1.0, True), (3, 1e4, True), (2, 1e4, False)])
def test_loss_over_a_cut_vocabulary(ranks: int, scale: float, by_hand: bool) -> None:
    found = spawn.values(spawn.run_ranks(loss_of_a_rank, ranks, scale, by_hand, timeout_s=60))
    logits_btv, targets_bt = numbers(scale)
    logits_btv.requires_grad_()
    wanted_bt = F.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten(), reduction="none").view(4, 7)
    (wanted_bt * torch.arange(1.0, 8.0)).sum().backward()
    for loss_bt, _, _, _ in found:
        torch.testing.assert_close(loss_bt, wanted_bt.detach(), rtol=1e-5, atol=1e-6)
    gradient_btv = torch.cat([gradient for _, gradient, _, _ in found], -1)
    assert gradient_btv.isfinite().all()
    torch.testing.assert_close(gradient_btv, logits_btv.grad, rtol=1e-5, atol=1e-6)
    if by_hand:
        assert found[0][2] == 2 * (ranks - 1) * 3 * 28 * 4  # three numbers a token, whatever the vocabulary
    for _, _, _, copies in found[1:]:  # never sent, and the same to the bit after two updates
        assert all(torch.equal(mine, first) for mine, first in zip(copies, found[0][3], strict=True))
    assert len(found[0][3]) == 1 + 2 * 7 + 2 * 3


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "ranks", "said"),
    [
        ({"heads": 16}, 3, "heads 16 does not divide by 3 ranks; make it a multiple of 3"),
        ({"width": 16, "heads": 3, "vocab": 9}, 3, "MLP width 64"),
        ({"vocab": 97}, 2, "vocabulary 97"),
        ({"context": 13}, 2, "sequence length 13"),
        ({}, 2, None),
    ],
)
def test_why_not(change: dict[str, int], ranks: int, said: str | None) -> None:
    with torch.device("meta"):
        model = models.Transformer(replace(Shape(), **change))
    for name in ("sequence-parallel", "library-sequence"):
        reason = harness.resolve(name)[1].why_not(model, ranks)
        assert reason is None if said is None else said in reason
    without_sequence = harness.resolve("tensor-parallel")[1].why_not(model, ranks)
    assert bool(without_sequence) == (said is not None and "sequence" not in said)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_grid_needs_two_rows(ranks: int) -> None:
    with torch.device("meta"):
        model = models.Transformer(Shape())
    assert f"{ranks} ranks are no grid" in harness.resolve("tensor-x-data")[1].why_not(model, ranks)


def refusal(flags: list[str]) -> str:
    with pytest.raises(UserError) as error:
        tensor_parallel.main(flags)
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sequence-parallel", "--seq-len", "31"], "sequence length 31"),
        (["--strategy", "tensor-x-data"], "2 ranks are no grid"),
        (["--strategy", "library-tensor", "--by-hand"], "--by-hand cannot count what the library sends"),
        (["--heads", "7"], "--heads 7 does not divide --width 256"),
    ],
)
def test_flags_that_do_not_fit(tmp_path: Path, flags: list[str], said: str) -> None:
    ended = spawn.run_ranks(refusal, 2, ["--run-dir", str(tmp_path), "--device", "cpu", "--layers", "1", *flags])
    assert all(said in text for text in spawn.values(ended))


def test_heads_that_do_not_divide_exit_with_2(tmp_path: Path) -> None:
    flags = ["--run-dir", str(tmp_path), "--layers", "1", "--heads", "7", "--width", "56"]
    for rank in spawn.fork_script(SCRIPT, 2, flags):
        assert rank.returncode == 2
        assert "heads 7 does not divide by 2 ranks; make it a multiple of 2" in rank.stderr
        assert "Traceback" not in rank.stderr


def test_the_script(tmp_path: Path) -> None:
    flags = ["--width", "64", "--layers", "2", "--seq-len", "32", "--steps", "3", "--by-hand"]
    done = spawn.fork_script(SCRIPT, 2, ["--run-dir", str(tmp_path), "--sequence-parallel", *flags])
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr
    result = done[0].value
    assert result["largest_loss_difference"] < 1e-4
    assert result["wire_bytes_per_step"] == result["wire_bytes_formula"] > 0
    copies = sequence_parallel.replicated_bytes(models.build(Shape(2048, 64, 4, 2, 32))) // 4
    assert result["parameters_per_rank"] == (result["parameters"] - copies) // 2 + copies
    assert result["loss_last"] < result["loss_first"]
