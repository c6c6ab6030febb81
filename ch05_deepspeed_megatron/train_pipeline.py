"""Train a transformer with DeepSpeed's pipeline: its layers on several ranks, micro-batches on their way through them.

You learn   what a pipeline needs beside PipelineModule: layers that speak in one tensor, a loss that is a mean over
            tokens, one norm over all stages, data that only the ends read, one Hugging Face folder in the end
Laptop      torchrun --standalone --nproc-per-node=2 ch05_deepspeed_megatron/train_pipeline.py
Replicas    torchrun --standalone --nproc-per-node=4 ch05_deepspeed_megatron/train_pipeline.py --stages 2
GPU node    torchrun --standalone --nproc-per-node=gpu ch05_deepspeed_megatron/train_pipeline.py --preset 1b \
                --stages 4 --partition type:decoderlayer --batch-size 2 --global-batch 64 --seq-len 2048 --lr 3e-4
Two hosts   python -m ch02_hardware_parallelism.virtual_cluster --hosts 2 --ranks-per-host 1 --launch torchrun -- \
                ch05_deepspeed_megatron/train_pipeline.py --steps 20
Cluster     sbatch ch03_ddp/launch/train.sbatch ch05_deepspeed_megatron/train_pipeline.py --preset 8b --stages 8
You see     the losses of train_fsdp.py, to rounding, for any number of stages and replicas, and one hash of the weights
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ch01_intro import training
from ch02_hardware_parallelism.schedules import bubble_formula
from ch03_ddp import preemption
from ch03_ddp.feed import IGNORE, Batch
from ch03_ddp.report import Report
from ch03_ddp.train_ddp import open_feed
from ch04_fsdp import export, weights, zero_peers
from ch04_fsdp.options import agree, check_out, of_all_ranks
from ch05_deepspeed_megatron import pipeline_engine, pipeline_model, pipeline_options
from ch05_deepspeed_megatron.pipeline_checkpoints import Keeper
from common import data, dist, lm, script
from common.logs import get_logger

log = get_logger()


class PipelineReport(Report):
    """What a rank cannot do alone, all do together."""

    engine: Any

    def evaluate(self, model: nn.Module) -> float:
        """As training.evaluate, through the pipeline; a micro-batch that lacks rows is filled up with padding."""
        args, rows, replicas = self.args, self.args.batch_size, self.engine.dp_world_size
        blocks = data.Blocks(self.corpus.validation, args.seq_len)
        count = training.validation_blocks(self.corpus, args)
        mine = np.arange(self.engine.grid.data_parallel_id, count, replicas)
        micro_batches: list[Batch] = []
        for at in range(0, rows * math.ceil(count / (replicas * rows)), rows):
            inputs = torch.zeros(rows, args.seq_len, dtype=torch.int64)
            targets = torch.full_like(inputs, IGNORE)
            if len(share := mine[at : at + rows]):
                inputs[: len(share)], targets[: len(share)] = blocks.batch(share)
            micro_batches.append((inputs, targets))
        return pipeline_engine.evaluate(self.engine, micro_batches, count * args.seq_len)

    def weights_sha256(self, model: nn.Module) -> str:
        return pipeline_model.sha256(model)

    def save_model(self, model: nn.Module) -> None:
        if not self.args.out:
            return
        tensors = pipeline_model.whole_parameters(model)
        if self.ctx.is_main:
            model.config.architectures = ["LlamaForCausalLM"]  # type: ignore[union-attr]
            export.write_folder(self.out / "model", model.config, self.corpus.tokenizer(), tensors)
            log.info("saved the model", folder=self.out / "model")
        else:
            for _ in tensors:
                pass
        self.ctx.barrier("model saved")

    def sample(self, model: nn.Module) -> None:
        """By rank 0 alone, which for that collects the model: a pipeline has no cache to generate with."""
        if not self.args.sample_tokens or lm.parameter_count(model.config) > lm.LARGE:
            return
        found = dict(pipeline_model.whole_parameters(model))
        if self.ctx.is_main:
            whole = lm.build(model.config, self.ctx.device)
            whole.load_state_dict(found, strict=not model.config.tie_word_embeddings)
            self.show_sample(whole)

    def finish(self, model: nn.Module, *, preempted: bool) -> dict[str, Any]:
        result = super().finish(model, preempted=preempted)
        args = self.args
        return result and result | {
            "parameters": lm.parameter_count(model.config),
            "stages": args.stages,
            "replicas": args.replicas,
            "layers_by_stage": [b - a for a, b in zip(args.parts, args.parts[1:], strict=False)],
            "micro_batches": args.micro_batches,
            "bubble_formula": bubble_formula(args.stages, args.micro_batches),
        }


def build(args: argparse.Namespace, ctx: dist.Context) -> Any:
    """The engine around this rank's stage, with the weights of a preset's seed or of a model folder."""
    zero_peers.join(ctx.launch, ctx.device)
    config = lm.config(args.preset, args.seq_len)
    config.attention_dropout, config.dtype = args.dropout, torch.float32
    module = pipeline_model.build(config, args.stages, args.partition, checkpoint_every=args.recompute_layers)
    if lm.is_preset(args.preset):
        pipeline_model.initialize(module, args.seed)
    else:
        pipeline_model.load(module, weights.checkpoint_files(args.preset))
    return pipeline_engine.initialize(module, training.make_optimizer(module, args.lr), args.settings)


def replica(ctx: dist.Context, engine: Any) -> dist.Context:
    """The context by which data are shared out: all stages of a replica are one rank."""
    launch = dataclasses.replace(ctx.launch, rank=engine.grid.data_parallel_id, world_size=engine.dp_world_size)
    return dataclasses.replace(ctx, launch=launch)


def main(argv: list[str] | None = None) -> dict:
    args = pipeline_options.parse(__doc__, argv)
    run = script.start(__file__, args)
    out: Path = args.out or run.folder
    corpus = training.load_corpus(args)
    with dist.session(args.device, threads=args.threads) as ctx:
        if args.out:
            check_out(args.out, ctx)
        keeper = Keeper(out / "checkpoints", pipeline_options.settings(args, corpus, ctx), ctx, keep=args.keep)
        source = keeper.find(args)
        agree(ctx, source, keeper.settings | of_all_ranks(args, ctx))
        meta = keeper.check(source) if source else {}
        pipeline_options.check_memory(args, ctx)
        engine = build(args, ctx)
        script.seed_everything(args.seed + 1 + ctx.rank)
        first, position = keeper.load(source, meta, engine) if source else (0, 0)
        feed = open_feed(args, corpus, replica(ctx, engine), position)
        report = PipelineReport(args, corpus, ctx, out, first, source)
        report.engine = engine
        preempted = preemption.Preemption(args.preempt_signals, ctx)

        leave = None
        for number in range(first + 1, args.steps + 1):
            lr = training.learning_rate(number - 1, args.steps, args.lr, args.warmup)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            preempted.ask()
            with report.timer.phase("data"):
                batch = next(feed)
            with report.timer.phase("train_batch"):  # forward, backward and optimizer: one schedule
                loss = pipeline_engine.step(engine, batch.micro_batches, batch.tokens)
            report.step(number, loss / ctx.world_size, lr, batch)  # all ranks know the whole of it

            leave = preempted.answer()
            last = bool(leave) or number == args.steps
            validated = args.val_every and number % args.val_every == 0 and not last
            val_loss = report.validate(engine.module, number) if validated else None
            due = args.save_every and number % args.save_every == 0
            if args.out and (last or due or validated):
                report.flush()  # what a checkpoint has passed must not be missing from the losses
                keeper.save(number, engine, batch.position, val_loss)
                report.pause()
            if leave:
                break

        result = report.finish(engine.module, preempted=bool(leave))
        if ctx.is_main and leave:
            result["requeued"] = preemption.requeue(leave)
        ctx.barrier("report written")
        return result


if __name__ == "__main__":
    script.run(main)
