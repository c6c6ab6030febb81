"""DeepSpeed's pipeline engine, with the right mean over ragged rows and the right norm to clip by.

    zero_peers.join(ctx.launch, ctx.device)
    module = pipeline_model.build(config, stages, partition)
    engine = initialize(module, optimizer, settings)
    loss = step(engine, batch.micro_batches, batch.tokens)      # forward, backward, clip, optimizer

Two things that DeepSpeed 0.19.8 leaves to its user, or gets wrong:

* It takes the mean of the losses over micro-batches and over data replicas. Where rows are ragged a mean of means is
  not the mean over tokens. So the loss function divides its sum by tokens / (micro-batches x replicas), and the two
  means make of it the sum over all tokens of the step, over all its tokens.
* Without ZeRO and in float32 it clips by the norm of the first stage's gradients alone (deepspeed.runtime.utils'
  clip_grad_norm_ counts a parameter where get_model_parallel_rank() is 0, which for a pipeline is the stage).
  `initialize` puts `clip` in its place. ZeRO 1 and bf16 have norms of their own, which are right.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ch03_ddp.feed import Batch


def initialize(module: Any, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """A PipelineEngine around this rank's stage. It has the weights of data replica 0."""
    import deepspeed

    with contextlib.redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    engine.clip_fp32_gradients = lambda: clip(engine, engine.gradient_clipping())
    return engine


def divisor(tokens: int, micro_batches: int, replicas: int) -> float:
    """What the loss function divides its sum by, so that DeepSpeed's two means make it the mean over all tokens."""
    return tokens / (micro_batches * replicas)


def labelled(micro_batches: Sequence[Batch], tokens: int, replicas: int) -> Iterator[Any]:
    """What the engine takes from its iterator: inputs for the first stage, targets and divisor for the last."""
    by = torch.tensor(divisor(tokens, len(micro_batches), replicas), dtype=torch.float64)
    for inputs, targets in micro_batches:
        yield inputs, (targets, by)


def step(engine: Any, micro_batches: Sequence[Batch], tokens: int) -> torch.Tensor:
    """A whole training step.

    Args:
        micro_batches: those of this rank's data replica, as many as the engine was made for.
        tokens: of all micro-batches of all replicas, padding not counted.

    Returns:
        The mean loss over all tokens, 0-d, on every rank.
    """
    loss = engine.train_batch(labelled(micro_batches, tokens, engine.dp_world_size))
    return loss.float()  # the last stage has it as the loss function made it, the others in float32


def evaluate(engine: Any, micro_batches: Sequence[Batch], tokens: int) -> float:
    """Mean loss over the tokens of all replicas' micro-batches, of which each replica must have as many."""
    batches = labelled(micro_batches, tokens, engine.dp_world_size)
    loss = engine.eval_batch(batches, num_micro_batches=len(micro_batches))
    engine.module.train()
    return float(loss)


def squared_norm(engine: Any) -> torch.Tensor:
    """Of the gradients of all stages, a tied one once; 0-d, on every rank. Replicas hold the same already."""
    own = [p.grad for p in engine.module.parameters() if p.grad is not None and not p.ds_pipe_replicated]
    total = torch.zeros((), device=engine.device, dtype=own[0].dtype if own else torch.float32)
    for gradient in own:
        total += gradient.square().sum()
    total = total.double()  # the ranks must agree on it, and a stage without gradients knows no better
    dist.all_reduce(total, group=engine.mpu.get_pipe_parallel_group())
    return total


def clip(engine: Any, max_norm: float) -> torch.Tensor:
    """Scale all gradients by one factor, so that their norm over all stages is at most max_norm. Returns it before."""
    norm = squared_norm(engine).sqrt()
    torch.nn.utils.clip_grads_with_norm_(engine.module.parameters(), max_norm, norm)
    engine._global_grad_norm = norm  # where get_global_grad_norm() looks
    return norm
