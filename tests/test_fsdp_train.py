"""Chapter 4's training: the same computation however it is spread, weights read by rows, checkpoints for any ranks."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as td
import transformers
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ch01_intro import checkpoint, training
from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism import model as models
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.harness import Case
from ch04_fsdp import checkpoints, export, model, options, parity, step, train_fsdp, weights
from ch04_fsdp.shard_by_hand import FullShardByHand, GradShardByHand
from ch04_fsdp.sharding import FSDP1_NAMES, STRATEGIES, Sharding, shard
from ch04_fsdp.strategies import OPTIONS, RaggedLlama, Sharded, option
from common import dist, lm, script
from common.script import UserError
from tests.inprocess import run_script
from tests.spawn import fork_script, run_ranks, values

TRAIN = "ch04_fsdp/train_fsdp.py"
TOKENS = torch.arange(48).view(2, 24) * 7 % 128


def small(**more) -> transformers.LlamaConfig:
    kept = {
        "vocab_size": 129, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True, **more,
    }  # fmt: skip
    return transformers.LlamaConfig(**kept)  # 129 rows divide by neither 2 nor 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders as transformers itself writes them: tied in one file, untied in several."""
    made = {}
    for name, tied in (("tied", True), ("untied", False)):
        made[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(7)
        llama = transformers.LlamaForCausalLM(small(tie_word_embeddings=tied))
        llama.save_pretrained(made[name], max_shard_size="5GB" if tied else "40KB")
    assert (made["untied"] / "model.safetensors.index.json").exists()
    return made


# ---------------------------------------------------------------- the same computation


def test_every_option_computes_what_one_process_does() -> None:
    """On four ranks, where a hybrid has two groups of two; each option in one of eight cases, the next in the next."""
    names = [name for name in OPTIONS if "compile" not in name]
    assert len(names) >= 5 * 3 * 5 - 10
    outcomes = harness.check(
        [option(name) for name in names], parity.pairs([4], [1, 4]), problem=RaggedLlama(), in_turn=True
    )
    assert sorted(o.strategy for o in outcomes) == sorted(names)
    assert not [f"{o.strategy}: {o.skipped or o.diagnosis()}" for o in outcomes if not o.ok]


def test_eight_cases_hold_every_pair_of_settings() -> None:
    cases = parity.pairs([2, 4], [1, 4])
    fields = ("ranks", "accumulation", "dtype", "tied", "frozen", "uneven")
    for number, one in enumerate(fields):
        for other in fields[:number]:
            assert len({(getattr(case, one), getattr(case, other)) for case in cases}) == 4, (one, other)


class Summed(Sharded):
    """What FSDP2 did over gloo in older versions of torch."""

    def backward(self, micro_batches):  # type: ignore[no-untyped-def]
        for unit in self.model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_gradient_divide_factor(1.0)
        return super().backward(micro_batches)


class OwnNorm(Sharded):
    """The norm of a rank's own shards, as .to_local() would tell it."""

    def grad_norm(self) -> torch.Tensor:
        return super().grad_norm() / self.comm.size**0.5


class CountedTwice(Sharded):
    """The norm summed over the copies of a hybrid as well."""

    sharding = Sharding("hybrid", 1)

    def grad_norm(self) -> torch.Tensor:
        return super().grad_norm() * self.comm.size**0.5


def test_the_harness_sees_a_sum_and_a_wrong_norm() -> None:
    found = harness.check([Summed, OwnNorm, CountedTwice], [Case(2, by_hand=False)], problem=RaggedLlama())
    by_name = {outcome.strategy: outcome.diagnosis() for outcome in found}
    assert "2 times too large" in by_name["Summed"]
    assert by_name["OwnNorm"].startswith("grad-norm off")
    assert by_name["CountedTwice"].startswith("grad-norm off")


def bf16_gradients() -> dict[str, tuple[float, float]]:
    """By strategy: the smallest and the largest relative error of a parameter's gradient, of float32 in one process."""
    with dist.session("cpu", threads=1) as ctx:
        batches = [(TOKENS, TOKENS.roll(-1, 1)), (TOKENS.flip(0), TOKENS.roll(-3, 1))]
        mine = [(x[ctx.rank :: ctx.world_size], y[ctx.rank :: ctx.world_size]) for x, y in batches]
        count, found = 2 * TOKENS.numel(), {}
        for name, dtype in (("float32", torch.float32), *((s, torch.bfloat16) for s in (*STRATEGIES, "summed"))):
            strategy = name if name in STRATEGIES else "full"
            sharding = Sharding(strategy, 1 if strategy.startswith("hybrid") else None, dtype)
            built = lm.build(small(tie_word_embeddings=False), seed=1)
            if name == "float32":
                step.backward(built, batches, count, 1, Sharding("replicate"))
                wanted = {name: p.grad for name, p in built.named_parameters()}
                continue
            wrapped = shard(built, sharding, sharding.mesh(ctx.world_size, ctx.device))
            divided_by = ctx.world_size ** (
                2 if name == "summed" else 1
            )  # a sum over ranks that is no mean is so wrong
            step.backward(wrapped, mine, count, divided_by, sharding)
            errors = []
            for parameter, gradient in ((n.removeprefix("module."), p.grad) for n, p in wrapped.named_parameters()):
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                assert whole.dtype == torch.float32, "shards and their gradients stay float32"
                errors.append(float((whole - wanted[parameter]).norm() / wanted[parameter].norm()))
            found[name] = min(errors), max(errors)
        return found


def test_gradients_in_bf16_are_those_of_float32_but_for_rounding() -> None:
    """bf16 has 8 bits of a number: half a unit in the last place is 0.2 %. Losses would not tell a factor of 2."""
    for found in values(run_ranks(bf16_gradients, 2)):
        smallest, _ = found.pop("summed")
        assert smallest == pytest.approx(1, abs=0.03), "a planted factor of 2 is seen in every parameter"
        assert sorted(found) == sorted(STRATEGIES)
        for strategy, (smallest, largest) in found.items():
            assert largest < 2e-2, strategy
            assert smallest > 1e-4, f"{strategy}: this was not computed in 16 bits"


def test_by_hand_computes_the_same_with_the_bytes_of_its_formula() -> None:
    cases = [replace(case, by_hand=True) for case in parity.pairs([2, 3], [1, 4])]
    found = harness.check([FullShardByHand, GradShardByHand], cases)
    assert not [f"{o.strategy}: {o.skipped or o.diagnosis()}" for o in found if not o.ok]
    assert all(o.bytes_exact for o in found)


def units_in_memory(make: type[FullShardByHand]) -> tuple[int, int, int]:
    """Layers whose weights are whole: at most in forward, at most in backward, and after the step."""
    with dist.session("cpu", threads=1):
        shape = models.Shape()
        strategy = make(models.build(shape), Comm(), lambda p: torch.optim.SGD(p, lr=0.1))
        layers = [flat for unit in strategy.units[1:] for flat in unit.flats]
        forward, backward = [], []

        def note(into: list[int]) -> None:
            into.append(sum(flat.whole.untyped_storage().nbytes() > 0 for flat in layers))

        for block in strategy.model.blocks:
            block.mlp.register_forward_hook(lambda *_: note(forward))
            block.mlp.register_full_backward_hook(lambda *_: note(backward))
        batch = torch.arange(2 * shape.context).view(2, -1)
        strategy.backward([(batch, batch)])
        after: list[int] = []
        note(after)
        return max(forward), max(backward), after[0]


def test_by_hand_holds_one_whole_layer_at_a_time() -> None:
    assert values(run_ranks(units_in_memory, 2, FullShardByHand)) == [(1, 1, 0)] * 2
    assert values(run_ranks(units_in_memory, 2, GradShardByHand)) == [(4, 4, 0)] * 2


def accumulate(sync_each: bool) -> list[tuple[int, int]]:
    """After each of three micro-batches: how many parameters have a gradient shard, how many reductions were made."""
    with dist.session("cpu", threads=1) as ctx:
        sharding = Sharding()
        built = weights.plan(small())
        shard(built, sharding, sharding.mesh(ctx.world_size, ctx.device))
        weights.allocate(built, ctx.device)
        weights.initialize(built, 0)
        seen: list[tuple[int, int]] = []
        reductions = 0
        original = td.reduce_scatter_single

        def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal reductions
            reductions += 1
            return original(*args, **kwargs)

        td.reduce_scatter_single = counted
        original_loss = step.ddp_step.loss_sum

        def note(*args):  # type: ignore[no-untyped-def]
            seen.append((sum(p.grad is not None for p in built.parameters()), reductions))
            return original_loss(*args)

        step.ddp_step.loss_sum = note
        batches = [(TOKENS, TOKENS.roll(-1, 1))] * 3
        step.backward(
            built, batches, 3 * TOKENS.numel() * ctx.world_size, ctx.world_size, sharding, sync_each=sync_each
        )
        seen.append((sum(p.grad is not None for p in built.parameters()), reductions))
        return seen


@pytest.mark.parametrize("sync_each", [False, True])
def test_gradients_travel_when_they_should(sync_each: bool) -> None:
    units, parameters = 4, 3 * 9 + 2  # three layers and the root
    wanted = [(parameters * (sync_each and n > 0), units * n * sync_each) for n in range(3)]
    wanted.append((parameters, units * (3 if sync_each else 1)))
    for seen in values(run_ranks(accumulate, 2, sync_each)):
        assert seen == wanted


# ---------------------------------------------------------------- weights


def initialized(strategy: str, tied: bool) -> tuple[str, bool, list[int], int]:
    """Hash of the random weights, whether the tie held, this rank's rows of the embedding, meta tensors left."""
    with dist.session("cpu", threads=1) as ctx:
        built = model.build("nano", Sharding(strategy), ctx, seq_len=32, seed=3)
        inner = model.inner(built)
        embedding = inner.model.embed_tokens.weight
        own = embedding.to_local() if isinstance(embedding, DTensor) else embedding
        left = sum(t.is_meta for t in [*inner.parameters(), *inner.buffers()])
        return weights.sha256(inner), inner.lm_head.weight is embedding, list(own.shape), left


def test_random_weights_depend_on_the_seed_alone() -> None:
    found = {
        (strategy, ranks): values(run_ranks(initialized, ranks, strategy, True))
        for strategy, ranks in (("full", 1), ("full", 3), ("hybrid", 2), ("replicate", 2))
    }
    assert len({hash_ for ranks in found.values() for hash_, *_ in ranks}) == 1
    assert all(tied and not left for ranks in found.values() for _, tied, _, left in ranks)
    assert [rows for *_, (rows, _), _ in found["full", 3]] == [683, 683, 682]


def loaded(folder: str, strategy: str) -> tuple[torch.Tensor, int, int]:
    """Logits of a checkpoint read row by row, and the bytes that this rank has read and holds."""
    with dist.session("cpu", threads=1) as ctx, torch.no_grad():
        sharding = Sharding(strategy)
        built = model.build(folder, sharding, ctx, seq_len=32)
        logits = built(input_ids=TOKENS, use_cache=False).logits
        read = weights.load(model.inner(built), Path(folder))
        return logits, read, model.held_bytes(model.inner(built))["parameters"]


@pytest.mark.parametrize(("name", "strategy"), [("tied", "full"), ("untied", "full"), ("untied", "replicate")])
def test_each_rank_reads_its_own_rows_of_a_checkpoint(folders: dict[str, Path], name: str, strategy: str) -> None:
    with torch.no_grad():
        whole = transformers.LlamaForCausalLM.from_pretrained(folders[name])
        wanted = whole(input_ids=TOKENS).logits
    total = sum(p.numel() * 4 for p in whole.parameters())
    for logits, read, held in values(run_ranks(loaded, 3, str(folders[name]), strategy)):
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
        assert read == held
        assert held == total if strategy == "replicate" else held < total * 0.36


def evaluated() -> tuple[set[torch.dtype], bool]:
    """A model whose config says 16 bits, after a forward pass that no backward follows."""
    with dist.session("cpu", threads=1) as ctx, torch.no_grad():
        config = small(dtype=torch.bfloat16)
        built = model.build(config, Sharding("grad", dtype=torch.bfloat16), ctx, seq_len=32)
        before = weights.sha256(built)
        built(input_ids=TOKENS, use_cache=False)
        return {p.dtype for _, p in weights.whole_parameters(built)}, before == weights.sha256(built)


def test_no_weight_loses_bits_to_a_config_or_an_evaluation() -> None:
    assert values(run_ranks(evaluated, 2)) == [({torch.float32}, True)] * 2


def spoilt(folder: Path, how: str) -> None:
    if how == "missing":
        (folder / "model.safetensors").unlink()
    elif how == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"layers": {"num_hidden_layers": 4}, "width": {"intermediate_size": 96}}[how]
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "no safetensors checkpoint"),
        ("truncated", "no safetensors checkpoint"),
        ("layers", "has no tensor model.layers.3"),
        ("width", "checkpoint of another model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    folders: dict[str, Path], tmp_path: Path, how: str, says: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["tied"], folder)
    spoilt(folder, how)
    with pytest.raises(UserError, match=says):
        built = weights.plan(lm.config(str(folder)))
        weights.allocate(built, torch.device("cpu"))
        weights.load(built, folder)


# ---------------------------------------------------------------- checkpoints


def trained(built: torch.nn.Module, sharding: Sharding, optimizer: torch.optim.Optimizer, world_size: int) -> None:
    batch = (TOKENS, TOKENS.roll(-1, 1))
    step.backward(built, [batch], TOKENS.numel() * world_size, world_size, sharding)
    step.update(built, optimizer, 1.0)


def state_of(inner: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for _, parameter in sorted(inner.named_parameters()):
        for tensor in (parameter, optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]):
            yield (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def keeper(folder: str, ctx: dist.Context, **more) -> checkpoints.Keeper:  # type: ignore[no-untyped-def]
    return checkpoints.Keeper(Path(folder), {"preset": "tied"}, ctx, **{"keep": 2, **more})


def saved(folder: str, source: str, strategy: str, in_background: bool) -> list[torch.Tensor]:
    with dist.session("cpu", threads=1) as ctx:
        sharding = Sharding(strategy, 2 if strategy == "hybrid" else None)
        built = model.build(source, sharding, ctx, seq_len=32)
        inner = model.inner(built)
        optimizer = training.make_optimizer(inner, 1e-3)
        keep = keeper(folder, ctx, in_background=in_background)
        for number in range(1, 4):
            trained(built, sharding, optimizer, ctx.world_size)
            keep.save(number, inner, optimizer, position=10 * number)
        expected = list(state_of(inner, optimizer))
        if in_background:  # what is written must be the state of then
            trained(built, sharding, optimizer, ctx.world_size)
        keep.wait()
        return expected


def resumed(folder: str, source: str, strategy: str) -> tuple[tuple[int, int], list[torch.Tensor]]:
    with dist.session("cpu", threads=1) as ctx:
        built = model.build(source, Sharding(strategy), ctx, seq_len=32)
        inner = model.inner(built)
        optimizer = training.make_optimizer(inner, 1e-3)
        keep = keeper(folder, ctx)
        found = keep.find(argparse.Namespace(resume="auto", out=Path(folder)))
        assert found is not None
        return keep.load(found, inner, optimizer), list(state_of(inner, optimizer))


def gone_back(folder: str, source: str) -> list[tuple[list[str], str]]:
    """Saved at 4, 8 and 12, gone back to 4, and saved at 5 and 6: what there is after each, and which is the best."""
    with dist.session("cpu", threads=1) as ctx:
        built = model.build(source, Sharding(), ctx, seq_len=32)
        optimizer = training.make_optimizer(built, 1e-3)
        trained(built, Sharding(), optimizer, ctx.world_size)
        found = []
        for keep, saves in ((3, ((4, 3.0), (8, 2.0), (12, 1.0))), (2, ((5, 4.0), (6, 4.5)))):
            one = keeper(folder, ctx, keep=keep)
            for number, loss in saves:
                one.save(number, built, optimizer, position=number, val_loss=loss)
                found.append(([path.name for path in checkpoint.every(Path(folder))], one.best_before(99)[0]))
        return found


def test_a_resume_from_an_older_checkpoint_keeps_what_it_writes(folders: dict[str, Path], tmp_path: Path) -> None:
    [found] = values(run_ranks(gone_back, 1, str(tmp_path / "checkpoints"), str(folders["tied"])))
    four, five, six, twelve = (f"step-{number:08d}" for number in (4, 5, 6, 12))
    assert found[2][1] == twelve
    assert found[3:] == [([four, five], five), ([five, six], five)], "8 and 12, the best, are of a course that was left"


@pytest.mark.parametrize(("strategy", "in_background"), [("full", False), ("hybrid", True)])
def test_saved_on_four_ranks_and_read_on_two_and_one(
    folders: dict[str, Path], tmp_path: Path, strategy: str, in_background: bool
) -> None:
    source, folder = str(folders["tied"]), tmp_path / "checkpoints"
    wanted = values(run_ranks(saved, 4, str(folder), source, strategy, in_background))[0]
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000002", "step-00000003"], "two are kept"
    for ranks, other in ((2, "full"), (1, "replicate")):
        for (number, position), state in values(run_ranks(resumed, ranks, str(folder), source, other)):
            assert (number, position) == (3, 30)
            assert all(torch.equal(a, b) for a, b in zip(state, wanted, strict=True)), f"on {ranks} ranks"
    # The newest is spoilt: the one before it.
    name = "__1_0.distcp"
    data = bytearray((folder / "step-00000003" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "step-00000003" / name).write_bytes(data)
    ended = run_ranks(resumed, 2, str(folder), source, "full")
    assert [start for start, _ in values(ended)] == [(2, 20)] * 2
    assert f"step-00000003 is corrupt ({name} is not what was saved)" in ended[0].stderr
    # And out of it, by one process that has no ranks.
    done = run_script("ch04_fsdp/export.py", [folder / "step-00000002", tmp_path / "hf", "--file-mib", "0.05"])
    assert done.result is not None, done.stderr
    assert done.result["files"] > 1
    exported = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    (tmp_path / "hf2").mkdir()
    held = dict(export.stored_parameters(folder / "step-00000002"))
    assert all(torch.equal(p, held[name]) for name, p in exported.named_parameters())
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    [(logits, _, _)] = values(run_ranks(loaded, 1, str(tmp_path / "hf"), "full"))
    with torch.no_grad():
        assert torch.equal(logits, exported(input_ids=TOKENS).logits)


def killed_in_a_save(folder: str, source: str) -> None:
    """Rank 1 gets SIGKILL in the background's second save: its part is written, and not yet known to be."""
    with dist.session("cpu", threads=1) as ctx:
        built = model.build(source, Sharding(), ctx, seq_len=32)
        optimizer = training.make_optimizer(built, 1e-3)
        keep = keeper(folder, ctx, in_background=True)
        for number in (1, 2):
            trained(built, Sharding(), optimizer, ctx.world_size)
            if (number, ctx.rank) == (2, 1):
                checkpoints._sha256 = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
            keep.save(number, built, optimizer, position=10 * number)
            if number == 1:
                keep.wait()
        keep.wait()


def test_a_kill_in_a_save_in_the_background_leaves_the_one_before(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, source = tmp_path / "checkpoints", str(folders["tied"])
    ended = run_ranks(killed_in_a_save, 2, str(folder), source, timeout_s=60)
    assert ended[1].returncode == -signal.SIGKILL, ended[1].stderr
    assert ended[0].returncode not in (0, -signal.SIGKILL), "the other rank has noticed"
    assert not ended[0].timed_out
    assert sorted(path.name for path in folder.iterdir()) == [".step-00000002.partial", "step-00000001"]
    assert list((folder / ".step-00000002.partial").glob("__1_*.distcp")), "it was killed in the save"
    for start, _ in values(run_ranks(resumed, 2, str(folder), source, "full")):
        assert start == (1, 10)


# ---------------------------------------------------------------- the script and its mistakes

BRIEF = [
    "--device",
    "cpu",
    "--steps",
    "4",
    "--seq-len",
    "32",
    "--val-tokens",
    "640",
    "--sample-tokens",
    "4",
    "--batch-size",
    "2",
]


def test_every_strategy_tells_the_same_story(tmp_path: Path) -> None:
    """Losses and weights, with an uneven share of the validation text and a sample, which all ranks must take part in."""
    told = {}
    for strategy, *more in (["full"], ["grad", "--recompute", "ops"], ["replicate"]):
        out = tmp_path / strategy
        ranks = fork_script(
            TRAIN,
            2,
            [*BRIEF, "--dtype", "fp32", "--strategy", strategy, *more, "--global-batch", "8", "--out", str(out)],
        )
        assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
        told[strategy] = ranks[0].value
        assert "--- the model continues" in ranks[0].stdout
        assert ranks[1].stdout == ""
        assert lm.weights_sha256(lm.load(str(out / "model"))) == ranks[0].value["weights_sha256"]
    for strategy in ("grad", "replicate"):
        for name in ("loss_first", "loss_last", "val_loss"):
            assert told[strategy][name] == pytest.approx(told["full"][name], abs=2e-5)
    half = told["replicate"]["held_parameters_gib"] / 2
    assert told["full"]["held_parameters_gib"] == pytest.approx(half, rel=0.01)


def mixed() -> None:
    with dist.session("cpu", threads=1) as ctx:
        torch.__version__ = f"2.1{3 - ctx.rank}.0"  # type: ignore[assignment]
        options.agree(ctx, None, {"preset": "nano"})


def test_mixed_versions_of_torch_are_named() -> None:
    for rank in run_ranks(mixed, 2):
        assert rank.returncode != 0
        assert "different torch: 2.13.0 and 2.12.0" in rank.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--strategy hybrid --shard-ranks 3", "2 ranks do not divide into groups of 3; take --shard-ranks 1 or 2"),
        ("--global-batch 5", "--global-batch 5 does not divide by 2 ranks"),
    ],
)
def test_what_does_not_divide_is_one_line_on_every_rank(flags: str, says: str) -> None:
    for rank in fork_script(TRAIN, 2, [*BRIEF, *flags.split()]):
        assert rank.returncode == 2
        lines = [line for line in rank.stderr.splitlines() if line.startswith("error")]
        assert len(lines) == 1, rank.stderr
        assert says in lines[0] or "left with an error" in lines[0]
        assert "Traceback" not in rank.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--strategy full --shard-ranks 2", "belongs to a hybrid strategy"),
        ("--strategy replicate --sync-each", "--sync-each belongs to a strategy with shards"),
        ("--strategy replicate --offload cpu", "replicate has no shards to offload"),
        ("--recompute sometimes", "cannot recompute 'sometimes'"),
        ("--recompute every-0", "cannot recompute 'every-0'"),
        ("--resume /nowhere/step-1", "no checkpoint at /nowhere/step-1"),
        ("--preset nanoo", "no model 'nanoo'"),
        ("--preset nano --seq-len 1000000", "too few for --seq-len"),
        ("--run-dir /proc/nowhere", "cannot write to /proc/nowhere"),
    ],
)
def test_a_mistake_is_one_line(flags: str, says: str) -> None:
    done = run_script(TRAIN, [*BRIEF, *flags.split()])
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert says in line
    assert "Traceback" not in done.stderr


def train_into_its_own(folder: str) -> None:
    argv = [*BRIEF, "--out", f"{folder}/{os.environ['RANK']}"]
    script.run(lambda: train_fsdp.main([*argv, "--run-dir", f"{folder}/run"]))


def test_an_out_that_is_not_shared_is_found_before_training(tmp_path: Path) -> None:
    for rank in run_ranks(train_into_its_own, 2, str(tmp_path)):
        assert rank.returncode == 2, rank.stderr
        [line] = [line for line in rank.stderr.splitlines() if line.startswith("error")]
        assert "rank 1 does not see in its --out what rank 0 writes to its own" in line
        assert "Traceback" not in rank.stderr
        assert "step" not in rank.stdout + rank.stderr
    assert list((tmp_path / "0").iterdir()) == [], "the mark is gone"
    (tmp_path / "file").touch()
    for rank in fork_script(TRAIN, 2, [*BRIEF, "--out", str(tmp_path / "file")]):
        assert rank.returncode == 2
        assert "rank 0 cannot write to" in rank.stderr


def test_checkpoints_of_others_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    first = run_script(TRAIN, [*BRIEF, "--out", tmp_path])
    assert first.result is not None, first.stderr
    newest = tmp_path / "checkpoints/step-00000004"
    for flags, says in (
        (["--lr", "1e-3"], "was made with lr 0.002, this run has 0.001"),
        (["--seq-len", "16"], "was made with seq_len 32"),
    ):
        done = run_script(TRAIN, [*BRIEF, *flags, "--resume", newest])
        assert done.returncode == 2
        assert says in done.stderr
    again = run_script(TRAIN, [*BRIEF, "--out", tmp_path])
    assert again.returncode == 2
    assert "already holds checkpoints" in again.stderr
    (newest / "state.pt").touch()
    third = run_script(TRAIN, [*BRIEF, "--resume", newest])
    assert "was made by chapter 1's or 3's script" in third.stderr
    (newest / "config.json").write_text("{}")
    other = run_script("ch04_fsdp/export.py", [newest, tmp_path / "new"])
    assert other.returncode == 2
    assert "is corrupt (config.json is not what was saved)" in other.stderr
    wrong = run_script("ch04_fsdp/export.py", [folders["tied"], tmp_path / "new"])
    assert wrong.returncode == 2
    assert "is not a sharded checkpoint" in wrong.stderr


def test_fsdp1_names_lead_to_strategies() -> None:
    assert sorted(FSDP1_NAMES.values()) == sorted(STRATEGIES)
