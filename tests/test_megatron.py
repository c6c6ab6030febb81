"""Chapter 5, Megatron-Core: layouts, weights from Hugging Face and back, gradients, training and its checkpoints."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.harness import Case
from ch05_deepspeed_megatron import (
    megatron_convert,
    megatron_mapping,
    megatron_model,
    megatron_options,
    megatron_parity,
    megatron_step,
    train_megatron,
)
from ch05_deepspeed_megatron.megatron_checkpoints import Keeper
from ch05_deepspeed_megatron.megatron_layout import Layout
from ch05_deepspeed_megatron.megatron_strategies import PLANTED, RaggedLlama, option
from common import dist, lm, ranks, script

ROOT = Path(__file__).parents[1]
SOUND = ["dp+zero1+overlap", "tp2+sp", "pp2"]
FAULTS = [option(name).__name__ for name in PLANTED]
LAUNCH = ROOT / "ch05_deepspeed_megatron/launch/megatron_3d.sbatch"
TRAIN = [
    "--preset", "nano", "--steps", "4", "--batch-size", "1", "--global-batch", "8", "--seq-len", "16", "--val-tokens",
    "64", "--ragged", "--dtype", "fp32", "--keep", "9", "--threads", "1",
]  # fmt: skip


def llama(**changes: object) -> transformers.LlamaConfig:
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    return transformers.LlamaConfig(**shape | changes)


@pytest.mark.parametrize(
    ("layout", "changes", "world_size", "said"),
    [
        (Layout(2, 2), {}, 6, "6 ranks do not divide by --tp 2 x --pp 2 = 4; "),
        (Layout(3), {}, 3, "4 attention heads do not divide by --tp 3; "),
        (Layout(4), {}, 4, "2 key-value heads do not divide by --tp 4; "),
        (Layout(2), {"vocab_size": 65}, 2, "65 words of the vocabulary do not divide by --tp 2; "),
        (Layout(2), {"intermediate_size": 49}, 2, "49 columns of the feed-forward do not divide by --tp 2; "),
        (Layout(pp=3), {}, 3, "4 layers do not divide by --pp 3; "),
        (Layout(sequence_parallel=True), {}, 1, "--sequence-parallel shares the sequence out .*; pass --tp 2 too"),
        (Layout(2, sequence_parallel=True), {}, 2, "--seq-len 33 does not divide by --tp 2 for --sequence-parallel; "),
        (Layout(), {"max_position_embeddings": 32}, 1, "--seq-len 33 is longer than the model's 32 positions; "),
        (Layout(), {"attention_bias": True}, 1, "has biases in its matrices"),
    ],
)
def test_a_layout_that_does_not_divide_is_one_line(layout: Layout, changes: dict, world_size: int, said: str) -> None:
    with pytest.raises(script.UserError, match=said):
        layout.check(llama(**changes), world_size, 33)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tp", "2"], "1 ranks do not divide by --tp 2 x --pp 1 = 2; start a multiple of that"),
        (["--tp", "3"], "1 ranks do not divide"),
        (["--compile"], "--compile is not for Megatron-Core"),
        (["--async-save"], "--async-save is not offered here"),
        (["--micro-batches", "2", "--global-batch", "8"], "say the same; pass one of them"),
        (["--preset", "nope"], "no model 'nope'"),
    ],
)
def test_bad_flags_end_before_anything_starts(no_launcher: object, flags: list[str], said: str) -> None:
    with pytest.raises(script.UserError, match=said):
        train_megatron.main(flags)
    with pytest.raises(script.UserError, match="no option 'tp2x'"):
        megatron_parity.main(["--option", "tp2x"])


def test_ranks_of_a_layout() -> None:
    layout = Layout(tp=2, pp=2)
    assert [layout.owners(stage, 8) for stage in (0, 1)] == [[0, 1], [4, 5]]
    assert layout.dp(8) == 2


def test_merged_matrices_come_apart_again() -> None:
    rule = megatron_mapping.Rule(("q", "k", "v"), 0, groups=2, head_rows=3)
    q, k, v = torch.arange(12.0)[:, None], 100 + torch.arange(6.0)[:, None], 200 + torch.arange(6.0)[:, None]
    joined = rule.join([q, k, v])
    assert joined[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 100, 101, 102, 200, 201, 202, 6, 7, 8, 9, 10, 11, 103, 104, 105,
                                     203, 204, 205]  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(rule.split(joined), (q, k, v), strict=True))


def clipped(name: str, ctx: dist.Context) -> dict[str, float]:
    """A step of SGD with gradients scaled to a tenth of their norm, by Megatron-Core and by one process."""
    problem, case = RaggedLlama(), Case(ctx.world_size, 4, "float32", tied=True, uneven=True, by_hand=False)
    micro_batches = next(problem.steps(case))
    whole = problem.build(case)
    start = {name: p.detach().clone() for name, p in whole.named_parameters()}
    inputs, targets = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
    (problem.loss_sum(whole, inputs, targets) / problem.token_count(micro_batches)).backward()
    norm = torch.nn.utils.get_total_norm(p.grad for p in whole.parameters())
    torch.nn.utils.clip_grads_with_norm_(whole.parameters(), float(norm) / 10, norm)
    problem.make_optimizer(whole.parameters()).step()
    wanted = {name: p.detach() for name, p in whole.named_parameters()}

    clips = type("Clips", (option(name),), {"clip": float(norm) / 10})
    strategy = clips(problem.build(case), Comm(by_hand=False), problem.make_optimizer)
    strategy.backward(micro_batches)
    found = {"norm": megatron_step.update(strategy.optimizer), "wanted": float(norm)}
    found["apart"] = max(float((value - wanted[name]).abs().max()) for name, value in strategy.weights().items())
    found["step"] = max(float((value - start[name]).abs().max()) for name, value in wanted.items())
    strategy.close()
    return found


def decayed(distributed_optimizer: bool, ctx: dist.Context) -> dict[str, float]:
    """By what a step without gradients multiplies each parameter of this rank: by weight decay alone."""
    layout = Layout(tp=2, sequence_parallel=True)
    with layout.groups(ctx):
        model = megatron_model.build(llama(), layout, ctx)
        megatron_convert.initialize(model, 0, ctx)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        ddp, optimizer = megatron_model.wrap(model, ctx, lr=0.1, distributed_optimizer=distributed_optimizer)
        ddp.zero_grad_buffer()
        megatron_step.update(optimizer)
        return {name: float((p.detach() / before[name]).mean()) for name, p in model.named_parameters()}


def kept(dtype: torch.dtype, ctx: dist.Context) -> tuple[float, float]:
    """Bytes that a forward pass keeps for backward, besides parameters; and by formula."""
    layout, config = Layout(tp=2, sequence_parallel=True), llama(max_position_embeddings=256)
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept: a place may be used again
        return tensor

    with layout.groups(ctx):
        model = megatron_model.build(config, layout, ctx, dtype=dtype)
        megatron_convert.initialize(model, 0, ctx)
        tokens = torch.randint(64, (2, 256))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = megatron_step.forward(model, tokens, tokens)
        for parameter in model.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
        assert loss.requires_grad
        found = sum(storage.nbytes() for storage in storages.values())
        return found, megatron_options.activations(config, layout, dtype, 2, 256, 1)


def several(
    what: dict[str, tuple[str, list[str]]], gradients: list[tuple[list[str], list[Case]]], clip: str, alone: bool
) -> dict[str, Any]:
    """On each rank: scripts one after another, then single steps beside one process's. One spawn: Megatron takes
    seconds to import."""
    scripts = {"convert": megatron_convert.main, "train": train_megatron.main}
    done = {name: scripts[which](flags) for name, (which, flags) in what.items()}
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        done["gradients"] = [
            outcome
            for names, cases in gradients
            for outcome in harness.check_here([option(name) for name in names], cases, RaggedLlama(), ctx)
        ]
        done["clipped"] = clipped(clip, ctx)
        done["kept"] = [kept(dtype, ctx) for dtype in (torch.float32, torch.bfloat16) if alone]
        done["decayed"] = [decayed(distributed, ctx) for distributed in (False, True) if alone]
    return done


def training(folder: Path, name: str, *flags: str) -> tuple[str, list[str]]:
    own = ["--out", str(folder / name), "--run-dir", str(folder / "runs" / name), "--sample-tokens", "2"]
    return "train", [*TRAIN, *own, *flags]


def conversion(folder: Path, name: str, *flags: str) -> tuple[str, list[str]]:
    return "convert", ["--seq-len", "16", "--out", str(folder / name), "--run-dir", str(folder / "runs" / name), *flags]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What four ranks did, and where: TP 2 x PP 2."""
    folder = tmp_path_factory.mktemp("four")
    grid = ("--tp", "2", "--pp", "2", "--sequence-parallel")
    what = {
        "copy": conversion(folder, "copy", "--tp", "2", "--pp", "2", "--kv-heads", "2"),
        "whole": training(folder, "whole", *grid, "--save-every", "2"),
        "again": training(folder, "again", *grid, "--resume", str(folder / "whole/checkpoints/step-00000002")),
    }
    case = Case(4, 4, "float32", tied=True, frozen=True, uneven=True, by_hand=False)
    gradients = [(["tp2+pp2", "tp2+sp+zero1"], [case])]
    ended = ranks.run_ranks(several, 4, what, gradients, "tp2+pp2+sp+zero1", False, timeout_s=150)
    return folder, ranks.values(ended)[0]


@pytest.fixture(scope="module")
def two(four: tuple[Path, Any]) -> tuple[Path, dict[str, Any]]:
    """What two ranks did: TP 2, and the training of the four gone on with as two replicas of a whole model."""
    folder, _ = four
    what = {
        "untied": conversion(folder, "untied", "--tp", "2", "--sequence-parallel", "--untied"),
        "other": training(folder, "other", "--resume", str(folder / "whole/checkpoints/step-00000002")),
    }
    cases = [
        Case(2, accumulation, "float32", tied=tied, frozen=frozen, uneven=True, by_hand=False)
        for accumulation, tied, frozen in ((4, True, False), (1, False, True))
    ]
    gradients = [(SOUND, cases), (list(PLANTED), cases[:1])]
    return folder, ranks.values(ranks.run_ranks(several, 2, what, gradients, "dp+zero1", True, timeout_s=150))[0]


@pytest.mark.parametrize(("ran", "name", "most"), [("four", "copy", 0.36), ("two", "untied", 0.53)])
def test_the_same_logits_and_the_same_weights_after(
    request: pytest.FixtureRequest, ran: str, name: str, most: float
) -> None:
    folder, done = request.getfixturevalue(ran)
    result = done[name]
    assert result["largest_logit"] > 1
    assert result["largest_logit_difference"] < 2e-5
    assert result["logits_after_equal"]
    assert result["weights_equal"]
    assert result["tied"] is lm.config(str(folder / name)).tie_word_embeddings is (name == "copy")
    # No rank read or held more than its shards: here the half or a quarter, and its norms and a tied embedding's copy.
    assert result["largest_read_gib"] == pytest.approx(result["largest_held_gib"])
    assert result["largest_held_gib"] < most * 4 * result["parameters"] / 2**30


def test_gradients_are_those_of_one_process(four: tuple[Path, Any], two: tuple[Path, Any]) -> None:
    outcomes = [o for _, done in (four, two) for o in done["gradients"] if o.strategy not in FAULTS]
    assert len(outcomes) == 2 + 2 * len(SOUND)
    assert all(outcome.ok for outcome in outcomes), [(o.strategy, o.case, o.diagnosis()) for o in outcomes if not o.ok]


def test_a_clipped_step_is_that_of_one_process(four: tuple[Path, Any], two: tuple[Path, Any]) -> None:
    for told in (done["clipped"] for _, done in (four, two)):
        assert told["norm"] == pytest.approx(told["wanted"], rel=1e-5)
        assert told["apart"] < 1e-3 * told["step"], told


def test_norms_do_not_decay(two: tuple[Path, Any]) -> None:
    for factors in two[1]["decayed"]:
        assert {name for name, factor in factors.items() if factor == 1} == {
            name for name in factors if "layernorm" in name
        }
        assert {round(factor, 4) for factor in factors.values()} == {1, 0.99}  # 1 - lr x weight decay


def test_activations_are_as_predicted(two: tuple[Path, Any]) -> None:
    for found, predicted in two[1]["kept"]:
        assert found == pytest.approx(predicted, rel=0.1)


def test_planted_faults_are_named(two: tuple[Path, Any]) -> None:
    found = {o.strategy: o for o in two[1]["gradients"]}
    norms, tied, means, shards = (found[name] for name in FAULTS)
    assert sorted(norms.wrong) == sorted(
        ["model.norm.weight"]
        + [f"model.layers.{n}.{kind}_layernorm.weight" for n in (0, 1) for kind in ("input", "post_attention")]
    ), norms.diagnosis()
    assert tied.wrong == ("model.embed_tokens.weight",), tied.diagnosis()
    assert len(means.wrong) > 10, means.diagnosis()
    assert shards.failures == ["norm"], shards.diagnosis()


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "losses.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_training_resumes_exactly(four: tuple[Path, Any]) -> None:
    folder, done = four
    assert done["again"]["resumed_at_step"] == 2
    assert losses(folder / "again") == losses(folder / "whole")
    assert done["again"]["weights_sha256"] == done["whole"]["weights_sha256"]
    assert done["whole"]["ranks_agree"]


def test_training_goes_on_in_another_layout(four: tuple[Path, Any], two: tuple[Path, Any]) -> None:
    folder, whole, other = four[0], four[1]["whole"], two[1]["other"]
    assert (other["tp"], other["pp"], other["dp"], other["resumed_at_step"]) == (1, 1, 2, 2)
    assert losses(folder / "other") == pytest.approx(losses(folder / "whole"), rel=2e-4)
    assert other["ranks_agree"]
    assert other["held_optimizer_gib"] == pytest.approx(other["held_parameters_gib"], rel=1e-3)  # two moments, halved
    assert whole["held_parameters_gib"] < 0.36 * other["held_parameters_gib"]


def test_transformers_loads_what_was_trained(four: tuple[Path, Any]) -> None:
    folder, done = four
    model = lm.load(str(folder / "whole/model"))
    assert lm.weights_sha256(model) == done["whole"]["weights_sha256"]
    assert sum(p.numel() for p in model.parameters()) == done["whole"]["parameters"]


def test_a_spoiled_checkpoint_is_refused(four: tuple[Path, Any], tmp_path: Path, no_launcher: object) -> None:
    path = shutil.copytree(four[0] / "whole/checkpoints/step-00000002", tmp_path / "step-00000002")
    with dist.session("cpu") as ctx:
        with pytest.raises(script.UserError, match="was made with optimizer_states sharded, this run has whole"):
            Keeper(tmp_path, {"optimizer_states": "whole"}, ctx, keep=1).load(path, None, None)
        common = path / "common.pt"
        common.write_bytes(common.read_bytes()[:-1] + b"?")
        with pytest.raises(script.UserError, match=r"corrupt \(common.pt is not what was saved"):
            Keeper(tmp_path, {}, ctx, keep=1).load(path, None, None)


def reference_layouts() -> dict[str, tuple[str, int, int]]:
    """name -> flags, nodes, GPUs a node, as the launch file and its comments say."""
    text = LAUNCH.read_text()
    long = re.search(r'^long="(.*)"$', text, re.MULTILINE)[1]
    found = re.findall(r'^([\w-]+)\) layout="(.*?)" ;; +# (\d+) x (\d+)', text, re.MULTILINE)
    return {name: (flags.replace("$long", long), int(nodes), int(gpus)) for name, flags, nodes, gpus in found}


@pytest.mark.parametrize("name", reference_layouts())
def test_reference_layouts_fit_their_model_and_nodes(
    name: str, monkeypatch: pytest.MonkeyPatch, no_launcher: object
) -> None:

    flags, nodes, gpus = reference_layouts()[name]
    monkeypatch.setenv("WORLD_SIZE", str(nodes * gpus))
    monkeypatch.setenv("RANK", "0")
    args, layout, config = megatron_options.parse("", shlex.split(flags))
    assert nodes * gpus == layout.tp * layout.pp * layout.dp(nodes * gpus)
    assert layout.tp <= gpus, "tensor parallelism stays inside a node"
    shard = lm.parameter_count(config) / (layout.tp * layout.pp)
    held = shard * megatron_options.states(torch.bfloat16, layout.dp(nodes * gpus))
    held += megatron_options.activations(config, layout, torch.bfloat16, args.batch_size, args.seq_len, 16)
    assert held < 60 * 2**30, "of an 80 GiB card"
    assert args.global_batch % layout.dp(nodes * gpus) == 0


def test_the_launch_file(tmp_path: Path) -> None:
    text = LAUNCH.read_text()
    for word in ("Prerequisites", "Start", "Check", "Stop"):
        assert re.search(rf"^# {word}\b", text, re.MULTILINE), word
    for name in re.findall(r"\bch0\d_\w+/[\w./-]+\.\w+", text):
        assert (ROOT / name).is_file(), name
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(LAUNCH)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
    own, parents = (
        {line for line in (ROOT / file).read_text().splitlines() if line.startswith("#SBATCH")}
        for file in (LAUNCH, "ch03_ddp/launch/train.sbatch")
    )
    assert own ^ parents == {"#SBATCH --job-name=megatron", "#SBATCH --job-name=train"}
    # As Slurm would run it, with Slurm's two programs replaced: what would be started on each node?
    for name, line in (("scontrol", "echo n1"), ("srun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(
        ["bash", str(LAUNCH), "nano", "--steps", "3"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("slurm_agent.sh ")[1].split() == [
        "ch05_deepspeed_megatron/train_megatron.py", "--preset", "nano", "--tp", "2", "--pp", "2", "--steps", "3",
    ]  # fmt: skip
    done = subprocess.run(["bash", str(LAUNCH), "70b"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no layout '70b'; one of nano" in done.stderr
