"""Chapter 4's tools: what ranks hold and send, memory by phase, strategies side by side, several hosts."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from ch01_intro.memory import MIB
from ch02_hardware_parallelism import virtual_cluster
from ch03_ddp import slurm_cluster
from ch04_fsdp import hybrid_on_two_hosts, inspect_shards, resident, step
from ch04_fsdp.sharding import Sharding, shard
from ch04_fsdp.traffic import Collective, Traffic, expected, rows_of, unit_parameters
from common import dist, lm, process, script
from common.process import ROOT
from tests.spawn import fork_script, rank_environment, run_ranks, values

NO_NETWORKS, NO_SLURM = virtual_cluster.why_not(), slurm_cluster.why_not()
NANO = 3_737_856  # parameters
LAYERS = NANO - 256 * (2048 + 1)  # of those, without the tied embedding and the last norm


def odd_model(*, tied: bool = False) -> torch.nn.Module:
    """Nothing of it divides by 4: 130 tokens, width 18, 50 in the MLP."""
    config = transformers.LlamaConfig(
        vocab_size=130, hidden_size=18, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, tie_word_embeddings=tied, pad_token_id=None,
    )  # fmt: skip
    return lm.build(config, seed=1)


# ---------------------------------------------------------------- who holds what


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64])
def test_rows_are_dealt_as_torch_chunks(ranks: int) -> None:
    for rows in (1, 3, 18, 64, 130):
        chunks = [c.tolist() for c in torch.arange(rows).chunk(ranks)]
        chunks += [[]] * (ranks - len(chunks))
        assert [list(rows_of(rank, rows, ranks)) for rank in range(ranks)] == chunks


def test_the_collectives_of_a_step_by_hand() -> None:
    """One tensor of 6 rows of 5 on 4 ranks: 8 rows travel, 2 of them padding."""
    units = {"layers.0": [torch.nn.Parameter(torch.zeros(6, 5))]}
    bf16 = Sharding("hybrid", 4, torch.bfloat16)
    gather, scatter = 8 * 5 * 2, 8 * 5 * 4
    assert expected(units, bf16, replicas=2, ranks=4) == [
        Collective("all_gather", "layers.0", "forward", gather, 4),
        Collective("all_gather", "layers.0", "backward", gather, 4),
        Collective("reduce_scatter", "layers.0", "backward", scatter, 4),
        Collective("all_reduce", "layers.0", "backward", scatter // 4, 2),
        Collective("all_reduce", "", "update", 4, 4),
    ]
    assert expected(units, Sharding("grad"), replicas=1, ranks=1) == [], "one rank sends nothing"
    assert Collective("all_gather", "", "", 400, 4).sent_bytes == 300
    assert Collective("all_reduce", "", "", 400, 4).sent_bytes == 600


def watch_live_models() -> dict:
    """On 4 ranks: for each strategy, what differs from the rule."""
    found: dict = {"wrong_rows": [], "wrong_calls": [], "held": {}, "losses": []}
    with dist.session("cpu") as ctx:
        tokens = torch.arange(24).view(2, 12) + 7 * ctx.rank
        for strategy, tied in itertools.product(("full", "grad", "hybrid", "hybrid-grad"), (False, True)):
            sharding = Sharding(strategy, 2 if strategy.startswith("hybrid") else None)
            mesh = sharding.mesh(4, ctx.device)
            whole = odd_model(tied=tied)
            originals = {name: p.detach().clone() for name, p in whole.named_parameters()}
            model = shard(whole, sharding, mesh)
            ranks, group_rank = mesh.size(-1), mesh.get_local_rank(-1)
            for name, parameter in model.named_parameters():
                rows = rows_of(group_rank, parameter.shape[0], ranks)
                if not torch.equal(parameter.to_local(), originals[name][rows.start : rows.stop]):
                    found["wrong_rows"].append((strategy, name))
            found["held"][strategy, tied] = sum(p.to_local().numel() for p in model.parameters())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for micro_batches, sync_each in ((1, False), (2, False), (2, True)):
                with Traffic(model) as traffic:
                    batches = [(tokens, tokens)] * micro_batches
                    loss = step.backward(model, batches, 96 * micro_batches, 4, sharding, sync_each=sync_each)
                    step.update(model, optimizer, 1.0)
                rule = expected(unit_parameters(model), sharding, replicas=4 // ranks, ranks=ranks,
                                micro_batches=micro_batches, sync_each=sync_each)  # fmt: skip
                if (seen := Counter(traffic.seen)) != Counter(rule):
                    missing, more = Counter(rule) - seen, seen - Counter(rule)
                    found["wrong_calls"].append((strategy, tied, micro_batches, sync_each, missing, more))
            torch.distributed.all_reduce(loss)
            found["losses"].append((tied, loss.item()))
    return found


def test_live_models_hold_and_send_what_the_rule_says() -> None:
    by_rank = values(run_ranks(watch_live_models, 4))
    numbers = {tied: sum(p.numel() for p in odd_model(tied=tied).parameters()) for tied in (False, True)}
    for found in by_rank:
        assert found["wrong_rows"] == []
        assert found["wrong_calls"] == []
        for tied in (False, True):
            losses = [loss for of, loss in found["losses"] if of == tied]
            assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    for strategy, tied in by_rank[0]["held"]:
        copies = 2 if strategy.startswith("hybrid") else 1
        assert sum(found["held"][strategy, tied] for found in by_rank) == copies * numbers[tied]


def test_a_plan_for_a_cluster_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--plan", "64", "--preset", "8b", "--dtype", "bf16", "--run-dir", str(tmp_path)]
    hybrid = inspect_shards.main([*flags, "--strategy", "hybrid", "--ranks-a-node", "8"])
    said = capsys.readouterr().out
    assert "layers.0 and 31 more like it" in said
    assert re.search(r"mlp\.gate_proj\.weight +\[14336, 4096\] +- +0-1791 +1792-3583 .* 12544-14335", said)
    full = inspect_shards.main([*flags, "--strategy", "full"])
    parameters = lm.parameter_count(lm.config("8b"))
    assert full["held_mib"] == pytest.approx(16 * parameters / 64 / MIB)
    assert hybrid["held_mib"] == pytest.approx(16 * parameters / 8 / MIB)
    assert (hybrid["copies"], hybrid["shards"], hybrid["collectives"]) == (8, 8, 34 * 3 + 32 + 1)
    with pytest.raises(script.UserError, match="64 ranks do not divide into groups of 7; "):
        inspect_shards.main([*flags, "--strategy", "hybrid", "--shard-ranks", "7"])
    with pytest.raises(script.UserError, match="belongs to a hybrid strategy; "):
        inspect_shards.main([*flags, "--strategy", "full", "--shard-ranks", "8"])
    with pytest.raises(script.UserError, match="--ranks-a-node belongs to --plan: "):
        inspect_shards.main([*flags[2:], "--strategy", "hybrid", "--ranks-a-node", "8"])


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(not resident.return_at_once(False), reason="needs glibc 2.33 or newer")
def test_freed_memory_is_gone_from_the_process() -> None:
    found = values(run_ranks(grow_and_shrink, 1))[0]
    size = 64 * MIB
    for what in ("malloc", "resident"):
        _, before, during, after = found[what]  # the first time code is loaded too
        assert during - before == pytest.approx(size, rel=0.05), what  # a page more for each
        assert after - before < 0.02 * size, what


def grow_and_shrink() -> dict[str, list[int]]:
    """512 tensors of 128 KiB, which glibc would keep for later by itself."""
    import psutil

    resident.return_at_once()
    found: dict[str, list[int]] = {"malloc": [], "resident": []}
    tensors: list[torch.Tensor] = []
    for count in (512, 0, 512, 0):
        tensors = [torch.ones(2**15) for _ in range(count)]
        found["malloc"].append(resident.malloc_bytes() or 0)
        found["resident"].append(psutil.Process().memory_info().rss)
    del tensors
    return found


def profile_twice() -> dict:
    """On one rank: the line's peak, and the same step's exact peak by the allocations that torch.profiler records."""
    from ch04_fsdp import profile_memory_fsdp as tool

    args = argparse.Namespace(preset="nano", seq_len=128, seed=0, on_gpu=False, world_size=1, offload_dir=None)
    now = tool.Setting(Sharding("full"), 8, 1, False)
    resident.return_at_once()
    with dist.session("cpu") as ctx:
        tool.measure(now, args, ctx)
        found = tool.measure(now, args, ctx)
        remedy = tool.remedies(now, found, args, lm.config("nano", 128))[0]
        tried = tool.measure(remedy.setting, args, ctx)
        with torch.profiler.profile(profile_memory=True) as profiler:
            tool.measure(now, args, ctx)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    exact = max(itertools.accumulate(size for _, size in changes))
    return {
        "peak": found.peak, "exact": exact, "phase": found.line.peak.label, "labels": [m.label for m in found.second],
        "kept": found.line.kept(), "saved": sum(found.activations[kind] for kind in ("attention", "MLP", "norms")),
        "states": {name: sum(getattr(row, name) for row in found.states.values())
                   for name in ("parameters", "gradients", "optimizer")},
        "held": found.line.moments[-1].malloc, "remedy": remedy.name, "kept_then": tried.line.kept(),
        "estimate": remedy.estimate(found.second), "off": found.peak - tried.peak,
    }  # fmt: skip


@pytest.mark.skipif(not resident.return_at_once(False), reason="needs glibc 2.33 or newer")
def test_the_line_of_memory_is_true() -> None:
    (found,) = values(run_ranks(profile_twice, 1, timeout_s=100))
    assert found["peak"] == pytest.approx(found["exact"], rel=0.06)
    layers = [f"forward layers.{i}" for i in range(4)]
    back = [f"backward layers.{i}" for i in (3, 2, 1, 0)]
    wanted = ["zero_grad", "forward embed_tokens", *layers, "forward head", "loss", "backward head", *back]
    assert found["labels"] == [*wanted, "backward embed_tokens", "clip", "optimizer", "zero_grad"]
    assert found["states"] == {"parameters": 4 * NANO, "gradients": 4 * NANO, "optimizer": 8 * NANO}
    assert found["held"] == pytest.approx(12 * NANO, rel=0.05), "gradients are gone at the end"
    # What the layers' forward left in memory is what autograd saved (the last norm and RoPE's angles are elsewhere).
    assert sum(found["kept"]) == pytest.approx(found["saved"], rel=0.06)
    assert found["remedy"] == "recompute block"
    layer_input = 8 * 128 * 256 * 4
    assert max(found["kept_then"]) < 1.2 * layer_input
    assert found["estimate"] == pytest.approx(found["off"], rel=0.25)


def test_strategies_side_by_side(tmp_path: Path) -> None:
    flags = ["--strategies", "full,grad,replicate", "--recompute", "none,block", "--rounds", "1", "--steps", "1"]
    done, _ = fork_script("ch04_fsdp/compare_strategies.py", 2, [*flags, "--run-dir", tmp_path], timeout_s=100)
    result = done.value
    assert result, done.stderr
    assert result["largest_loss_difference"] < 1e-5
    assert result["loss_drop"] > 0.1, "the gradients are used"
    whole = 4 * NANO / MIB
    for strategy, held, sent in (("full", 2, 1), ("grad", 2, 1), ("replicate", 4, 1)):
        row = {key.removeprefix(f"{strategy}_none_"): value for key, value in result.items()}
        assert row["held_mib"] == pytest.approx(whole * held, rel=1e-3)
        again = 4 * LAYERS / MIB * (strategy == "full") / 2  # gathered in backward too, half of it by each
        assert row["sent_mib"] == pytest.approx(whole * sent + again, rel=1e-3)
        assert row["peak_mib"] > row["held_mib"]
        assert result[f"{strategy}_block_peak_mib"] < row["peak_mib"]
        assert result[f"{strategy}_block_sent_mib"] == row["sent_mib"], "recomputation sends nothing more"
    assert result["full_none_collectives"] == 15
    assert result["grad_none_collectives"] == 11
    assert result["fsdp1_compared"] == 3
    assert result["fsdp1_largest_norm_difference"] < 1e-4
    assert re.search(r"^SHARD_GRAD_OP .* grad$", done.stdout, re.MULTILINE)


# ---------------------------------------------------------------- several hosts


@pytest.mark.skipif(NO_NETWORKS is not None, reason=NO_NETWORKS or "")
def test_hybrid_sends_less_over_the_thin_link(tmp_path: Path) -> None:
    flags = ["--strategies", "full,hybrid", "--rates", "10gbit", "--steps", "2", "--run-dir", str(tmp_path)]
    line = [sys.executable, "ch04_fsdp/hybrid_on_two_hosts.py", *flags, "--batch-size", "1", "--seq-len", "16"]
    done = process.run(line, timeout_s=100)
    result = done.result
    assert result, done.stderr
    whole = 4 * NANO / MIB
    assert (result["world_size"], result["hosts"]) == (4, 2)
    assert result["largest_loss_difference"] < 1e-5
    wanted = 0.75 * (whole + 4 * LAYERS / MIB) + 1.5 * whole  # gathered, the layers twice; reduced
    assert result["full_formula_mib_10gbit"] == pytest.approx(wanted, rel=1e-3)
    assert result["hybrid_formula_mib_10gbit"] == pytest.approx(whole, rel=1e-3)
    for strategy in ("full", "hybrid"):
        assert 1 < result[f"{strategy}_card_mib_10gbit"] / result[f"{strategy}_formula_mib_10gbit"] < 1.06
    assert result["hybrid_card_mib_10gbit"] < 0.37 * result["full_card_mib_10gbit"]
    inside = 3 * whole + 4 * LAYERS / MIB
    assert result["hybrid_loopback_mib_10gbit"] > 0.975 * inside, "what stays inside a host goes over its loopback"


def test_one_host_has_no_thin_link(no_launcher: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in rank_environment(0, 2, 29500).items():
        no_launcher.setenv(name, value)
    with pytest.raises(script.UserError, match="all ranks are on one host, and no link is thin; "):
        hybrid_on_two_hosts.main(["--run-dir", str(tmp_path)])


@pytest.mark.skipif(NO_SLURM is not None, reason=NO_SLURM or "")
def test_a_sharded_training_under_slurm(tmp_path: Path) -> None:
    flags = ["--preset", "nano", "--steps", "3", "--batch-size", "1", "--seq-len", "16", "--val-tokens", "64",
             "--sample-tokens", "0", "--dtype", "fp32", "--run-dir", str(tmp_path / "run")]  # fmt: skip
    command = ["sbatch", "ch04_fsdp/launch/fsdp.sbatch", *flags]
    env = {"NPROC_PER_NODE": "2", "SBATCH_OUTPUT": str(tmp_path / "job.out")}
    done = slurm_cluster.run(command, timeout_s=150, env=env)
    assert done.returncode == 0, done.stderr
    # a job whose torchrun spoke after it repeats its RESULT: the same line, last
    (line,) = {line for line in done.stdout.splitlines() if line.startswith("RESULT ")}
    assert done.stdout.splitlines()[-1] == line
    result = json.loads(line[7:])
    assert (result["world_size"], result["steps"], result["strategy"]) == (4, 3, "hybrid")
    assert result["ranks_agree"]
    held = result["held_parameters_gib"] * 2**30
    assert held == pytest.approx(4 * NANO / 2, rel=1e-4), "two copies: one on each node, shared by its two ranks"


@pytest.mark.parametrize("path", sorted((ROOT / "ch04_fsdp/launch").iterdir()), ids=lambda path: path.name)
def test_launch_files_are_sound(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word in ("Prerequisites", "Start", "Check", "Stop"):
        assert re.search(rf"^# {word}\b", text, re.MULTILINE), f"{path.name} does not say {word}"
    for name in re.findall(r"\bch0\d_\w+/[\w./-]+\.\w+", text):
        assert (ROOT / name).is_file(), f"{path.name} names {name}"
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_the_sbatch_file_has_its_parents_directives() -> None:
    def directives(file: str) -> set[str]:
        return {line for line in (ROOT / file).read_text().splitlines() if line.startswith("#SBATCH")}

    own, parents = directives("ch04_fsdp/launch/fsdp.sbatch"), directives("ch03_ddp/launch/train.sbatch")
    assert own ^ parents == {"#SBATCH --job-name=fsdp", "#SBATCH --job-name=train"}
