"""Train a mixture of experts with DeepSpeed: chapter 3's script, with the experts of every second layer spread out.

You learn   what a mixture of experts adds to a training: a gate and its balancing loss, capacity and dropped tokens,
            two all-to-alls a layer, gradients of which each kind is summed over other ranks, a norm that knows it
Laptop      torchrun --standalone --nproc-per-node=2 ch05_deepspeed_megatron/train_moe.py --ep-size 2
Options     ... train_moe.py --experts 8 --top-k 2 --residual; --no-drop-tokens; --stage 2; --aux-weight 0
GPU node    torchrun --standalone --nproc-per-node=gpu ch05_deepspeed_megatron/train_moe.py --preset small --experts 8 \
                --ep-size 2 --top-k 2 --batch-size 16 --seq-len 1024 --lr 6e-4
Cluster     sbatch ch03_ddp/launch/train.sbatch ch05_deepspeed_megatron/train_moe.py --preset 1b --experts 8 --ep-size 8
You see     the loss fall as the dense model's does, or a little faster; how many tokens each expert got and the share
            that was dropped, in metrics.jsonl and load.png; one hash of all experts, whoever holds them
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as td
from torch import nn

from ch01_intro import training
from ch03_ddp import options as ddp_options
from ch03_ddp.feed import StepBatch
from ch03_ddp.report import Report
from ch03_ddp.train_ddp import open_feed
from ch04_fsdp.options import agree, of_all_ranks
from ch05_deepspeed_megatron import ds_config, moe_model, moe_step
from ch05_deepspeed_megatron.moe_model import Experts
from common import data, dist, lm, profiling, script
from common.dist import Context

CONFIG = Path(__file__).with_name("configs") / "moe.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """
    Raises:
        UserError: a flag is wrong, or two contradict each other.
    """
    made = training.training_parser(__doc__)
    ddp_options.add_step_flags(made)
    group = made.add_argument_group("experts")
    group.add_argument("--deepspeed-config", type=Path, default=CONFIG, help="(default: configs/moe.json)")
    group.add_argument("--stage", type=int, choices=(0, 1, 2), help="of ZeRO, instead of the config's")
    group.add_argument("--experts", type=script.at_least(1), default=4, help="of each MoE layer")
    group.add_argument("--every", type=script.at_least(1), default=2, help="each so-manyth layer has experts")
    group.add_argument("--ep-size", type=script.at_least(1), default=1, help="ranks that share the experts out")
    group.add_argument("--top-k", type=script.at_least(1), default=1, help="experts that a token goes to, 1 or 2")
    group.add_argument(
        "--capacity-factor", type=script.positive, default=1.25, help="room of an expert, in fair shares"
    )
    group.add_argument("--min-capacity", type=script.at_least(1), default=4, help="but room for so many tokens")
    group.add_argument("--drop-tokens", action=argparse.BooleanOptionalAction, default=True, help="what finds no room")
    group.add_argument("--residual", action="store_true", help="a dense MLP beside the experts")
    group.add_argument("--aux-weight", type=not_negative, default=0.01, help="of the loss that balances the load")
    group.add_argument("--noise", choices=moe_model.NOISE, default="none", help="on the gate while training")
    args = made.parse_args(argv)
    if args.save_every or args.resume != "never":
        raise script.UserError("train_moe.py keeps no checkpoints; leave out --save-every and --resume")
    if args.compile:
        raise script.UserError("--compile is not for DeepSpeed's gate, which asks the device for sizes; leave it out")
    if args.ragged:
        raise script.UserError("--ragged is not for experts: padding would take their room; leave it out")
    if not lm.is_preset(args.preset):
        raise script.UserError(
            f"experts are drawn at random here, and a folder has none; take of {', '.join(lm.PRESETS)}"
        )
    args.record_samples = False
    return args


def not_negative(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else script.positive(text)


def experts_of(args: argparse.Namespace) -> Experts:
    return Experts(
        args.experts, args.ep_size, args.top_k, args.capacity_factor, args.min_capacity, args.drop_tokens,
        args.residual, args.noise, args.every,
    ).check()  # fmt: skip


def settings_of(args: argparse.Namespace, ctx: Context) -> dict[str, Any]:
    """The engine's settings: the file, its "auto" filled in, checked.

    Raises:
        UserError: something in the file is wrong, or MoE does not go with it.
    """
    known = ds_config.known_by(
        ranks=ctx.world_size, global_batch=args.global_batch, micro_batch=args.batch_size, clip=args.clip, lr=args.lr,
        hidden=lm.config(args.preset).hidden_size, dtype=training.compute_dtype(args.dtype, ctx.device),
    )  # fmt: skip
    settings = ds_config.prepare(args.deepspeed_config, known, ctx.world_size)
    settings.setdefault("gradient_clipping", args.clip)  # DeepSpeed's own default is 1
    zero = settings.setdefault("zero_optimization", {})
    zero["stage"] = zero.get("stage", 0) if args.stage is None else args.stage
    if zero["stage"] > 2:
        raise script.UserError(
            f"{args.deepspeed_config}: DeepSpeed's MoE knows ZeRO stages 0 to 2, not 3; take one of them"
        )
    if not zero.get("reduce_scatter", True) or (zero["stage"] == 2 and not zero.get("contiguous_gradients", True)):
        raise script.UserError(
            f"{args.deepspeed_config}: MoE needs reduce_scatter and contiguous_gradients; leave them out"
        )
    if "optimizer" in settings:
        raise script.UserError(
            f"{args.deepspeed_config}: the optimizer is chapter 1's AdamW here; leave out the section"
        )
    return settings


def check_validation(args: argparse.Namespace, corpus: data.Corpus, ctx: Context) -> None:
    """Cut --val-tokens so that all ranks make equal passes: capacity, and so the all-to-all, depends on their size.

    Raises:
        UserError: there are fewer sequences than ranks.
    """
    blocks = training.validation_blocks(corpus, args) // ctx.world_size * ctx.world_size
    if not blocks:
        raise script.UserError(
            f"--val-tokens {args.val_tokens} make less than a sequence of {args.seq_len} for each of {ctx.world_size} "
            "ranks; raise it"
        )
    args.val_tokens = blocks * args.seq_len


class MoEReport(Report):
    """Beside the losses: who got how many tokens. The counts stay on the device as long as the losses do."""

    def __init__(self, model: nn.Module, *rest: Any) -> None:
        super().__init__(*rest)
        self.layers = moe_model.sparse_layers(model)
        self.waiting: list[torch.Tensor] = []  # of each step: balance, dropped, then counts [layers, experts]
        self.loads: list[np.ndarray] = []  # of each step [layers, experts]: share of the layer's tokens
        self.dropped: list[float] = []
        self.balances: list[float] = []

    def note(self, balance: torch.Tensor) -> None:
        """Of the step that has just been computed, before `step`."""
        counts = torch.stack([layer.counts for layer in self.layers]).double()
        dropped = torch.stack([torch.as_tensor(layer.dropped, device=balance.device) for layer in self.layers]).sum()
        self.waiting.append(torch.cat([torch.stack([balance.double(), dropped.double()]), counts.flatten()]))
        for layer in self.layers:
            layer.clear()

    def flush(self) -> None:
        first = self.pending[0][0] if self.pending else 0
        super().flush()
        if not self.waiting:
            return
        rows = torch.stack(self.waiting)
        td.all_reduce(rows)
        self.waiting = []
        for number, (balance, dropped, *counts) in enumerate(rows.tolist(), first):
            load = np.array(counts).reshape(len(self.layers), -1)
            self.loads.append(load / load.sum(1, keepdims=True))
            self.dropped.append(dropped / load.sum())
            self.balances.append(balance)
            if script.Run.current:
                script.Run.current.log(step=number, balance=balance, dropped=self.dropped[-1], tokens=load.tolist())

    def evaluate(self, model: nn.Module) -> float:
        with moe_model.settled(model):
            return super().evaluate(model)

    def weights_sha256(self, model: nn.Module) -> str:
        return moe_model.sha256(model)

    def save_model(self, model: nn.Module) -> None:
        """Transformers' Llama has no experts: there is no folder to save it as."""

    def sample(self, model: nn.Module) -> None:
        if self.args.sample_tokens:  # all ranks: a pass is a collective
            with moe_model.settled(model):
                self.show_sample(model, to_the_end=True)

    def result(self) -> dict[str, Any]:
        last = np.mean(self.loads[-10:], axis=0)
        return {
            "balance_first": self.balances[0],
            "balance_last": float(np.mean(self.balances[-10:])),
            "dropped_share": float(np.mean(self.dropped[-10:])),
            "fullest_expert": float(last.max() * last.shape[1]),  # times the fair share, of the last ten steps
            "emptiest_expert": float(last.min() * last.shape[1]),
        }


def draw_load(report: MoEReport, path: Path) -> None:
    """By step the share of each expert, a layer a panel, and what was dropped."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    load = np.stack(report.loads)  # [steps, layers, experts]
    figure, panels = pyplot.subplots(1, load.shape[1] + 1, figsize=(4 * (load.shape[1] + 1), 3.2), layout="constrained")
    for number, axes in enumerate(panels[:-1]):
        axes.stackplot(np.arange(1, len(load) + 1), load[:, number].T, baseline="zero", alpha=0.85)
        axes.set(title=f"MoE layer {number + 1}: share of each expert", xlabel="step", ylim=(0, 1))
    panels[-1].plot(np.arange(1, len(load) + 1), report.dropped, color="#b3541e")
    panels[-1].set(title="share of tokens dropped", xlabel="step")
    panels[-1].set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    spec = experts_of(args)
    run = script.start(__file__, args)
    out = args.out or run.folder
    corpus = training.load_corpus(args)
    with dist.session(args.device, threads=args.threads) as ctx:
        spec.check(ctx.world_size)
        args.global_batch = args.global_batch or args.batch_size * ctx.world_size
        settings = settings_of(args, ctx)
        check_validation(args, corpus, ctx)
        agree(ctx, None, settings | of_all_ranks(args, ctx) | {"data": corpus.folder.name})
        config = lm.config(args.preset, args.seq_len)
        config.attention_dropout = args.dropout
        dtype = training.compute_dtype(args.dtype, ctx.device)
        moe_model.check_memory(config, spec, ctx, settings["zero_optimization"]["stage"], dtype)
        model = moe_model.build(config, spec, ctx.device, seed=args.seed)
        optimizer = moe_model.optimizer(model, args.lr)
        engine = moe_model.initialize(model, optimizer, moe_step.without_its_clipping(settings), ctx.launch, ctx.device)
        script.seed_everything(args.seed + 1 + ctx.rank)
        feed = open_feed(args, corpus, ctx, 0)
        report = MoEReport(model, args, corpus, ctx, out, 0, None)
        for number in range(1, args.steps + 1):
            lr = training.learning_rate(number - 1, args.steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with report.timer.phase("data"):
                batch: StepBatch = next(feed)
            with report.timer.phase("forward_backward"):
                loss, balance = moe_step.backward(
                    engine, batch.micro_batches, batch.tokens, ctx.world_size, args.aux_weight
                )
                report.note(balance)
            with report.timer.phase("optimizer"):
                moe_step.update(engine, settings["gradient_clipping"])
            report.step(number, loss, lr, batch)
        counts = moe_model.parameter_counts(model)
        result = report.finish(model, preempted=False)
        if ctx.is_main:
            draw_load(report, run.path("load.png"))
            dense = profiling.flops_per_token(config, args.seq_len)
            mfu = result["mfu"] and result["mfu"] * moe_model.flops_per_token(config, spec, args.seq_len) / dense
            result |= counts | report.result() | {"mfu": mfu, "stage": engine.zero_optimization_stage()}
            result |= {"experts": spec.experts, "ep_size": spec.ep_size, "top_k": spec.top_k}
        ctx.barrier("report written")
        return result


if __name__ == "__main__":
    script.run(main)
