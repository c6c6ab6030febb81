"""Chapter 5, mixture of experts: gating by hand, experts' gradients, what travels, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td

from ch02_hardware_parallelism.harness import Case, Outcome
from ch03_ddp.feed import IGNORE
from ch04_fsdp import zero_peers
from ch05_deepspeed_megatron import ds_config, moe_gating, moe_model, moe_parity, moe_step, moe_strategies, train_moe
from ch05_deepspeed_megatron.moe_model import Experts, SparseMLP
from ch05_deepspeed_megatron.moe_reference import OneProcessMoE
from common import dist, lm
from common.script import UserError
from tests.spawn import run_ranks, values

CPU = torch.device("cpu")


def small() -> Any:
    config = lm.config("nano")
    config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers = 128, 32, 48, 2
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim = 16
    return config


# ---------------------------------------------------------------- the reference itself, by numbers on paper


def by_hand(spec: Experts, wanted: list[list[float]]) -> OneProcessMoE:
    """A layer whose gate's probabilities are those given, for tokens that are unit vectors; expert e multiplies by e + 1."""
    tokens = len(wanted)
    layer = OneProcessMoE(torch.nn.Linear(tokens, tokens, bias=False), tokens, spec)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor(wanted).log().T)
        for number, expert in enumerate(layer.experts, 1):
            expert.weight.copy_(number * torch.eye(tokens))  # type: ignore[union-attr,operator]
    return layer


def test_the_reference_weighs_drops_and_balances_as_on_paper() -> None:
    wanted = [[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.5, 0.3, 0.2]]  # all like expert 0 best
    one = by_hand(Experts(3, top_k=1, capacity_factor=2.0, min_capacity=1), wanted)
    out = one(torch.eye(3)[None])[0]
    # room for ceil(3 / 3 x 2) = 2 tokens: the third is dropped
    assert torch.allclose(out, torch.diag(torch.tensor([0.7, 0.6, 0.0])))
    assert one.auxiliary.item() == pytest.approx(3 * 0.6 * 1.0)  # mean probability of expert 0, which has all of them
    two = by_hand(Experts(3, top_k=2, capacity_factor=1.0, min_capacity=1), wanted)
    out = two(torch.eye(3)[None])[0]
    # room for 2 each. First choices: tokens 0 and 1. Second: 1, 2, 1. Token 2 has only its second left, with weight 1
    expected = [(0.7 * 1 + 0.2 * 2) / 0.9, (0.6 * 1 + 0.3 * 3) / 0.9, 2.0]
    assert torch.allclose(out.diag(), torch.tensor(expected))
    assert Experts(4, capacity_factor=1.25).capacity(10) == 4
    assert Experts(4, capacity_factor=1.25, min_capacity=1, top_k=2).capacity(10) == 7


@pytest.mark.parametrize("spec", [Experts(top_k=1, drop_tokens=False), Experts(top_k=2, capacity_factor=0.5)])
def test_deepspeeds_gate_does_what_the_reference_does(spec: Experts) -> None:
    zero_peers.library(CPU)
    spec = replace(spec, random=False, min_capacity=1)
    torch.manual_seed(3)
    x_sh, weight_eh = torch.randn(40, 8), torch.randn(4, 8)
    reference = OneProcessMoE(torch.nn.Linear(8, 8), 8, spec)
    with torch.no_grad():
        reference.gate.weight.copy_(weight_eh)
    probability = reference.gate(x_sh).softmax(-1)
    chosen = probability.topk(spec.top_k).indices
    accepted = reference.accept(chosen)
    found = moe_gating.choices(spec, x_sh, weight_eh)
    assert torch.equal(torch.tensor(found["chosen"]), torch.where(accepted, chosen, -1))
    assert torch.allclose(torch.tensor(found["weights"]), reference.weights(probability, chosen, accepted), atol=1e-6)
    assert found["balance"] == pytest.approx(reference.balance(probability, chosen[:, 0]).item(), rel=1e-5)
    assert found["dropped"] == int((~accepted).sum())
    assert (found["dropped"] > 0) == spec.drop_tokens


# ---------------------------------------------------------------- parity


def compared() -> list[tuple[str, Outcome]]:
    """On each of 4 ranks: experts over 2 of them and a copy of each, in every ZeRO stage, and the two faults."""
    cases = [
        Case(4, 4, "float64", tied=True, frozen=True, uneven=True, by_hand=False),
        Case(4, 1, "float32", tied=True, frozen=False, uneven=True, by_hand=False),
    ]
    healthy = ["ep2+zero0", "ep2+zero1", "ep2+zero2"]
    return moe_parity.on_a_rank(
        [
            ("top1-residual", healthy, cases),
            ("top2-drops", ["ep4+zero0", "ep2+zero1"], cases),
            ("top2-whole", ["ep1+zero2"], cases),
            ("top1", moe_parity.FAULTY, cases[1:]),
        ]
    )


def test_experts_gradients_and_the_norm_are_those_of_one_process_and_faults_are_named() -> None:
    outcomes = values(run_ranks(compared, 4, timeout_s=120))[0]
    healthy = [o for problem, o in outcomes if problem != "top1"]
    done = [o for o in healthy if not o.skipped]
    assert all(o.ok for o in done), [(o.strategy, o.diagnosis()) for o in done if not o.ok]
    assert len(done) == 4 + 3 + 1
    assert {o.skipped for o in healthy} == {"", "ZeRO's own copies of the weights are float32"}
    twice, norm = (o for problem, o in outcomes if problem == "top1")
    assert "12 parameters (model.layers.1.mlp.experts.0" in twice.diagnosis()
    assert "2 times too large" in twice.diagnosis()
    assert norm.failures == ["norm"]
    assert moe_parity.named(twice)
    assert moe_parity.named(norm)
    assert not moe_parity.named(replace(twice, factors={"model.norm.weight": 2.0}, wrong=("model.norm.weight",)))


# ---------------------------------------------------------------- two ranks: what is spread, sent, counted and clipped


def on_two_ranks() -> dict[str, Any]:
    """On each rank: the same model for each ep_size, a step of it clipped, and the bytes of the all-to-alls."""
    found: dict[str, Any] = {}
    known = ds_config.known_by(
        ranks=2, global_batch=4, micro_batch=2, clip=0.1, lr=0.1, hidden=32, dtype=torch.float32
    )  # fmt: skip
    settings = ds_config.prepare(train_moe.CONFIG, known, 2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(128, (4, 9), generator=generator)
    with dist.session("cpu", timeout_s=60) as ctx:
        mine = (tokens[2 * ctx.rank : 2 * ctx.rank + 2, :-1], tokens[2 * ctx.rank : 2 * ctx.rank + 2, 1:])
        for ep_size, stage in ((1, 0), (2, 0), (2, 1)):
            spec = Experts(4, ep_size, drop_tokens=False, random=False, min_capacity=1)
            model = moe_model.build(small(), spec, ctx.device)
            zero = settings["zero_optimization"] | {"stage": stage}
            of_stage = settings | {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
            made = torch.optim.SGD(model.parameters(), lr=1.0)
            made.param_groups = moe_model.parameter_groups(made.param_groups)
            engine = moe_model.initialize(model, made, moe_step.without_its_clipping(of_stage), ctx.launch, ctx.device)
            before = moe_model.sha256(model)
            start = {name: tensor.clone() for name, tensor in moe_model.whole_parameters(model)}
            loss, balance = moe_step.backward(engine, [mine], 32, 2, 0.01)
            norm = moe_step.update(engine, 0.1)
            moved = sum((t - start[n]).square().sum() for n, t in moe_model.whole_parameters(model)).sqrt()
            layer = moe_model.sparse_layers(model)[0]
            parts = torch.stack([loss, balance])
            td.all_reduce(parts)
            found[f"ep{ep_size} zero{stage}"] = {
                "before": before, "after": moe_model.sha256(model), "norm": float(norm), "moved": float(moved),
                "loss": parts.tolist(), "names": [n for n, p in moe_model.named(model) if moe_model.is_expert(p)],
                "counts": layer.counts.sum().item(), "parameters": moe_model.parameter_counts(model),
                "groups": [(g.get("moe", False), len(g["params"])) for g in made.param_groups],
            }  # fmt: skip
        args = moe_gating.argparse.Namespace(tokens=24, hidden=16, experts=4, seed=0)
        x_sh, _ = moe_gating.skewed(args, ctx.device)
        for k in (1, 2):
            found[f"bytes top {k}"] = moe_gating.all_to_alls(Experts(4, 2, k, min_capacity=1, random=False), x_sh)
    return found


def test_experts_are_spread_counted_once_clipped_once_and_sent_by_the_formula() -> None:
    zero, one = values(run_ranks(on_two_ranks, 2, timeout_s=120))
    for name in ("ep1 zero0", "ep2 zero0", "ep2 zero1"):
        here = zero[name]
        assert here["before"] == zero["ep1 zero0"]["before"] == one[name]["before"], "the same model for every ep_size"
        assert here["after"] == one[name]["after"] != here["before"]
        assert here["norm"] == pytest.approx(zero["ep1 zero0"]["norm"], rel=1e-5)
        assert here["norm"] > 0.1, "else nothing was clipped"
        assert here["moved"] == pytest.approx(0.1, rel=1e-3), "SGD moves by the clipped gradient"
        assert here["loss"] == pytest.approx(zero["ep1 zero0"]["loss"], rel=1e-5)
        assert here["counts"] == 16, "each token of this rank once"
    assert {name.split(".experts.")[1][0] for name in zero["ep2 zero0"]["names"]} == {"0", "1"}
    assert {name.split(".experts.")[1][0] for name in one["ep2 zero0"]["names"]} == {"2", "3"}
    assert all(moe for moe, _ in zero["ep2 zero0"]["groups"][1:])
    whole, spread = (zero[name]["parameters"] for name in ("ep1 zero0", "ep2 zero0"))
    mlp = 3 * 32 * 48
    assert whole["parameters"] == spread["parameters"] == lm.parameter_count(small()) + 3 * mlp + 4 * 32
    assert whole["parameters_of_a_rank"] - spread["parameters_of_a_rank"] == 2 * mlp
    assert spread["active_parameters"] == spread["parameters"] - 3 * mlp
    for k in (1, 2):
        sent = zero[f"bytes top {k}"]
        # 4 experts x ceil(24 / 4 x 1.25 k) rows x 16 float32, there and back, forward and backward; half stays at home
        assert sent["calls"] == 4
        assert sent["counted"] == sent["formula"] == 4 * 4 * math.ceil(24 / 4 * 1.25 * k) * 16 * 4 // 2


# ---------------------------------------------------------------- training


def test_the_balancing_loss_alone_evens_out_the_load() -> None:
    zero_peers.library(CPU)
    args = moe_gating.argparse.Namespace(tokens=64, hidden=16, experts=4, seed=1)
    x_sh, weight_eh = moe_gating.skewed(args, CPU)
    found = moe_gating.rebalance(x_sh, weight_eh, Experts(4, random=False), steps=100)
    assert max(found["before"]) > 2 * 16 > max(found["after"]) > 0
    assert found["price"] == pytest.approx([4 * n / 64 for n in found["before"]])


def test_a_layer_counts_what_it_drops_and_settled_draws_nothing() -> None:
    zero_peers.library(CPU)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spec = Experts(4, capacity_factor=0.5, min_capacity=2, every=1)
        layer = SparseMLP(torch.nn.Linear(8, 8), 8, spec)
        x = torch.randn(2, 16, 8)
        out = layer(x)
        empty = int((out == 0).all(-1).sum())
        assert 0 < empty == int(layer.dropped) < int(layer.counts.sum()) == 32
        layer.train(False)
        with moe_model.settled(layer):
            state = torch.get_rng_state()
            assert torch.equal(layer(x), layer(x))
            assert torch.equal(torch.get_rng_state(), state)
            assert layer(x[:1, :1]).shape == (1, 1, 8), "a single token, as in a sample"
        assert int(layer.counts.sum()) == 32, "validation is not counted"
    with pytest.raises(AssertionError):  # DeepSpeed's own, for a pass smaller than min_capacity
        layer(x[:1, :1])


def test_losses_do_not_depend_on_how_a_step_is_cut() -> None:
    """Twice the tokens in two passes of equal balance: the mean stays; padding counts for neither."""
    zero_peers.library(CPU)
    model = moe_model.build(small(), Experts(4, drop_tokens=False, random=False, min_capacity=1), CPU)
    tokens = torch.randint(128, (2, 9))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 4:] = IGNORE
    loss, balance = moe_step.losses(model, inputs, targets)
    again, same = moe_step.losses(model, inputs.repeat(2, 1), targets.repeat(2, 1))
    assert again.item() == pytest.approx(2 * loss.item(), rel=1e-5)
    assert same.item() == pytest.approx(2 * balance.item(), rel=1e-5)
    assert balance.item() / 12 == pytest.approx(moe_model.sparse_layers(model)[0].auxiliary.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--experts", "4", "--ep-size", "3"], "--experts 4 are no multiple of --ep-size 3"),
        (["--top-k", "3"], "--top-k 3: DeepSpeed's gates send a token to 1 expert or to 2"),
        (["--experts", "1"], "--experts 1 leaves the gate nothing to choose"),
        (["--noise", "RSample", "--top-k", "2"], "--noise RSample belongs to --top-k 1"),
        (["--resume", "auto"], "keeps no checkpoints"),
        (["--ragged"], "--ragged is not for experts"),
        (["--aux-weight", "-1"], "--aux-weight"),
    ],
)
def test_bad_flags_are_found_before_anything_starts(argv: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        train_moe.experts_of(train_moe.parse(argv))


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ep-size 3 does not divide 4 ranks; take one that does, such as 2"):
        Experts(6, 3).check(4)
    with pytest.raises(UserError, match="no option 'ep2'"):
        moe_strategies.option("ep2")
    with pytest.raises(UserError, match="faults are those of stage 0; take"):
        moe_strategies.option("ep2+zero1+deepspeeds-norm")
    with pytest.raises(UserError, match="no problem 'top3'"):
        moe_parity.main(["--problem", "top3"])
    config = json.loads(train_moe.CONFIG.read_text())
    args = train_moe.parse(["--deepspeed-config", str(tmp_path / "moe.json")])
    args.global_batch = 4
    ctx = dist.Context(dist.Launch("python"), CPU, "gloo", None, 1)  # type: ignore[arg-type]
    for change, says in (
        ({"stage": 3}, "stages 0 to 2, not 3"),
        ({"stage": 2, "reduce_scatter": False}, "MoE needs reduce_scatter"),
        ({"stages": 1}, "no key 'stages' in zero_optimization; did you mean 'stage'"),
    ):
        args.deepspeed_config.write_text(json.dumps(config | {"zero_optimization": change}))
        with pytest.raises(UserError, match=says):
            train_moe.settings_of(args, ctx)
