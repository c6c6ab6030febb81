"""The parity harness: does a strategy compute the same gradients as one process? To ten digits, not by its loss curve.

    outcomes = check(["data-parallel", MyStrategy], [Case(ranks=2, accumulation=4, tied=True)])
    assert all(outcome.ok for outcome in outcomes), [outcome.diagnosis() for outcome in outcomes]

One process computes the reference: the whole batch, one backward, SGD with momentum, two steps. Then N ranks compute
the same by the strategy. Compared are the loss, the gradient of every parameter on every rank that holds it, the
global gradient norm as the strategy itself would clip by, and all weights after the last update, so that the second
gradient also depends on the first update.

A later chapter subclasses Strategy, and Problem where it has another model, and calls `check`.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ch02_hardware_parallelism import model as models
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.outcome import STEPS, TOLERANCE, Case, Outcome, merge, worst_of
from ch02_hardware_parallelism.strategy import Batch, Strategy, token_count, trainable
from common import dist, ranks
from common.script import UserError

STRATEGIES = {
    "data-parallel": "data_parallel:DataParallel",
    "data-parallel-buckets": "data_parallel:BucketedDataParallel",
    "zero-1": "zero1:Zero1",
    "tensor-parallel": "tensor_parallel:TensorParallel",
    "sequence-parallel": "sequence_parallel:SequenceParallel",
    "tensor-x-data": "tensor_data:TensorDataParallel",
    "pipeline-gpipe": "pipeline_parallel:GPipe",
    "pipeline-1f1b": "pipeline_parallel:OneFOneB",
    "pipeline-x-data": "pipeline_data_parallel:PipelineDataParallel",
    "library-ddp": "library_data:LibraryDDP",
    "library-tensor": "library_tensor:LibraryTensorParallel",
    "library-sequence": "library_tensor:LibrarySequenceParallel",
    "library-gpipe": "library_pipeline:LibraryGPipe",
    "library-1f1b": "library_pipeline:LibraryOneFOneB",
}


class Problem:
    """The model and the data to compare on. Subclass it to check strategies on another model."""

    shape = models.Shape()  # the least; see shape_for
    frozen_names = ("blocks.1.mlp.up.weight", "blocks.2.norm1.bias", "embedding.position.weight")

    def sequences(self, case: Case, *, last: bool) -> int:
        """Of a micro-batch: 12 and, uneven, 7; more on more than 4 ranks, so that each pipeline has some to cut."""
        return max(7, 2 * case.ranks - 1) if last and case.uneven else max(12, 3 * case.ranks)

    def shape_for(self, case: Case) -> models.Shape:
        """Grown until each rank has a layer, and an equal part of the heads, words and positions."""
        n, small = case.ranks, self.shape
        vocab, heads, context = (-(-size // n) * n for size in (small.vocab, small.heads, small.context))
        width = small.width // small.heads * heads
        return models.Shape(vocab, width, heads, max(small.layers, n), context, case.tied)

    def build(self, case: Case) -> nn.Module:
        """The same weights on every call, in the case's dtype, with the case's parameters frozen."""
        model = models.build(self.shape_for(case), dtype=getattr(torch, case.dtype))
        if case.frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad = name not in self.frozen_names
        return model

    def loss_sum(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return models.loss_sum(model(inputs), targets)

    def token_count(self, micro_batches: list[Batch]) -> int:
        """What the sum of losses is divided by."""
        return token_count(micro_batches)

    def steps(self, case: Case) -> Iterator[list[Batch]]:
        """The micro-batches of each step, those of the whole job."""
        generator, context = torch.Generator().manual_seed(1), self.shape_for(case).context
        for _ in range(STEPS):
            step = []
            for number in range(case.accumulation):
                size = self.sequences(case, last=number == case.accumulation - 1)
                tokens = torch.randint(self.shape.vocab, (size, context + 1), generator=generator)
                step.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
            yield step

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@dataclass(frozen=True)
class Reference:
    """What one process computes: per step the loss, the gradients and their norm; in the end the weights."""

    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]
    weights: dict[str, torch.Tensor]


def reference(problem: Problem, case: Case, device: torch.device) -> Reference:
    model = problem.build(case).to(device)
    optimizer = problem.make_optimizer(p for _, p in trainable(model))
    losses, gradients = [], []
    for micro_batches in problem.steps(case):
        inputs, targets = (torch.cat(parts).to(device) for parts in zip(*micro_batches, strict=True))
        loss = problem.loss_sum(model, inputs, targets) / problem.token_count(micro_batches)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in trainable(model)})
        optimizer.step()
        optimizer.zero_grad()
    return Reference(losses, gradients, {name: p.detach() for name, p in model.named_parameters()})


def resolve(strategy: str | type[Strategy]) -> tuple[str, Callable[..., Strategy]]:
    """Name and class of a strategy given by its name here, or as a class.

    Raises:
        UserError: no strategy of that name.
    """
    if not isinstance(strategy, str):
        return strategy.__name__, strategy
    if strategy not in STRATEGIES:
        raise UserError(f"no strategy {strategy!r}; one of {', '.join(STRATEGIES)}")
    module, name = STRATEGIES[strategy].split(":")
    return strategy, getattr(importlib.import_module(f"ch02_hardware_parallelism.{module}"), name)


def check_here(
    strategies: Sequence[str | type[Strategy]],
    cases: Sequence[Case],
    problem: Problem,
    ctx: dist.Context,
    *,
    in_turn: bool = False,
) -> list[Outcome]:
    """Compare on the ranks that are here, one call a rank. The outcomes are those of all ranks, on every rank.

    in_turn: each strategy in one of the cases, the next in the next, instead of each in all.
    """
    mine = []  # this rank's, told to the others at the end: two messages instead of two a comparison
    for number, case in enumerate(cases):
        wanted = reference(problem, case, ctx.device)
        for strategy in strategies[number :: len(cases)] if in_turn else strategies:
            name, make = resolve(strategy)
            model = problem.build(case).to(ctx.device)
            if reason := make.why_not(model, case.ranks):  # type: ignore[attr-defined]
                mine.append(Outcome(name, case, skipped=reason))
            else:
                mine.append(_compare(name, make, model, case, wanted, problem, ctx))
    told: list[list[Outcome]] = [[]] * ctx.world_size
    torch.distributed.all_gather_object(told, mine)
    return [merge(parts) for parts in zip(*told, strict=True)]


def _compare(name, make, model, case, wanted: Reference, problem: Problem, ctx: dist.Context) -> Outcome:
    comm = Comm(by_hand=case.by_hand)
    steps = list(problem.steps(case))
    formula = make.wire_bytes(model, steps[-1], case.ranks) if case.by_hand else None
    strategy = make(model, comm, problem.make_optimizer)
    losses, norms, gradients = [], [], {}
    wrong, factors = {}, {}
    complete = set(wanted.gradients[0])  # what had a gradient in every step
    wrong_step, sent = STEPS, 0
    for number, micro_batches in enumerate(steps):
        micro_batches = [(x.to(ctx.device), y.to(ctx.device)) for x, y in micro_batches]
        before = comm.total_sent_bytes()
        loss = strategy.backward(micro_batches)
        during = comm.total_sent_bytes() - before
        target = wanted.gradients[number]
        losses.append(_error(loss.item(), wanted.losses[number]))
        norm = torch.stack([g.square().sum() for g in target.values()]).sum().sqrt()
        norms.append(_error(strategy.grad_norm().item(), norm.item()))
        # The gradient of a key's bias is zero but for rounding: relative to itself it would be noise.
        floor = (norm / sum(g.numel() for g in target.values()) ** 0.5).item()
        found = strategy.gradients()
        complete &= found.keys()
        for parameter, gradient in found.items():
            if parameter not in target or gradient.shape != target[parameter].shape:
                wrong[parameter], wrong_step = float("inf"), min(wrong_step, number)
                continue
            error = _distance(gradient, target[parameter], floor)
            gradients[parameter] = max(gradients.get(parameter, 0.0), error)
            # After a wrong update everything is wrong: what counts is what was wrong first.
            if not error <= TOLERANCE[case.dtype] and wrong_step in (STEPS, number):
                wrong_step = number
                wrong[parameter] = error
                if (factor := _factor(gradient, target[parameter])) is not None and number == 0:
                    factors[parameter] = factor
        before = comm.total_sent_bytes()
        strategy.update()
        sent = during + comm.total_sent_bytes() - before
    held = strategy.weights()
    weights = worst_of(
        _distance(w, wanted.weights[p], 1e-3) if p in wanted.weights else float("inf") for p, w in held.items()
    )
    missing = (held.keys() & wanted.gradients[0].keys()) - complete
    strategy.close()
    worst = max(gradients, key=gradients.__getitem__, default="")
    return Outcome(
        name, case, loss_error=worst_of(losses), gradient_error=worst_of([*gradients.values(), *wrong.values()]),
        norm_error=worst_of(norms), weight_error=weights, worst=worst, wrong=tuple(wrong), factors=factors,
        wrong_step=wrong_step, missing=tuple(sorted(missing)), unheld=frozenset(wanted.weights.keys() - held.keys()),
        wire_bytes=sent, wire_bytes_formula=formula,
    )  # fmt: skip


def _error(found: float, wanted: float) -> float:
    return abs(found - wanted) / max(abs(wanted), 1e-30)


def _distance(found: torch.Tensor, wanted: torch.Tensor, floor: float) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=floor)).item()


def _factor(found: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """c if found = c wanted, else None."""
    factor = (found * wanted).sum() / wanted.square().sum()
    return (
        factor.item()
        if torch.allclose(found, factor * wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
        else None
    )


def _on_a_rank(
    strategies: Sequence[str | type[Strategy]], cases: Sequence[Case], problem: Problem, in_turn: bool
) -> list[Outcome]:
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        return check_here(strategies, cases, problem, ctx, in_turn=in_turn)


def check(
    strategies: Sequence[str | type[Strategy]],
    cases: Iterable[Case],
    problem: Problem | None = None,
    *,
    timeout_s: float = 300,
    in_turn: bool = False,
) -> list[Outcome]:
    """Compare each strategy with one process in each case, on CPU ranks that are started here.

    Raises:
        RuntimeError: a rank failed or did not end in time; the message holds its stderr.
    """
    by_ranks: dict[int, list[Case]] = {}
    for case in cases:
        by_ranks.setdefault(case.ranks, []).append(case)
    outcomes: list[Outcome] = []
    for number, group in sorted(by_ranks.items()):
        ended = ranks.run_ranks(
            _on_a_rank, number, strategies, group, problem or Problem(), in_turn, timeout_s=timeout_s,
            env={"CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]},
        )  # fmt: skip
        outcomes += ranks.values(ended)[0]
    return outcomes


def all_cases(
    ranks: Sequence[int] = (2, 3, 4),
    accumulation: Sequence[int] = (1, 4),
    dtypes: Sequence[str] = tuple(TOLERANCE),
    *,
    by_hand: bool = True,
) -> list[Case]:
    """Every combination of the settings."""
    two = (False, True)
    return [
        Case(n, k, dtype, tied, frozen, uneven, by_hand)
        for n, k, dtype, tied, frozen, uneven in itertools.product(ranks, accumulation, dtypes, two, two, two)
    ]
