"""Chapter 4 beside DeepSpeed: its stages compute what one process does, and a rank holds what each promises."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from ch03_ddp import step as ddp_step
from ch03_ddp.feed import IGNORE, Batch, StepBatch
from ch04_fsdp import compare_report, compare_zero, contestants, zero_peers
from common import dist, lm
from common.script import UserError
from tests.spawn import run_ranks, values

RANKS, MICRO_BATCHES, LR, MAX_NORM = 2, 2, 0.1, 0.5


def tiny_config() -> Any:
    config = lm.config("nano")
    config.vocab_size, config.hidden_size, config.intermediate_size = 512, 64, 128
    config.num_hidden_layers, config.head_dim = 2, 32
    config.num_attention_heads = config.num_key_value_heads = 2
    return config


def ragged(step: int) -> list[list[Batch]]:
    """By rank its micro-batches, of unequal numbers of tokens."""
    generator = torch.Generator().manual_seed(step)
    every = torch.randint(512, (RANKS, MICRO_BATCHES, 2, 25), generator=generator)
    found: list[list[Batch]] = []
    for rank in range(RANKS):
        found.append([])
        for number in range(MICRO_BATCHES):
            inputs, targets = every[rank, number, :, :-1], every[rank, number, :, 1:].clone()
            targets[0, 3 + 7 * rank + 5 * number :] = IGNORE
            found[-1].append((inputs, targets))
    return found


def token_count(micro_batches: list[list[Batch]]) -> int:
    return sum(int((targets != IGNORE).sum()) for mine in micro_batches for _, targets in mine)


def one_process_steps(model: nn.Module, steps: int) -> list[dict[str, Any]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    done = []
    for number in range(steps):
        batch = ragged(number)
        for inputs, targets in (pair for mine in batch for pair in mine):
            (ddp_step.loss_sum(model, inputs, targets) / token_count(batch)).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        done.append({"gradients": gradients, "norm": norm,
                     "weights": {name: p.detach().clone() for name, p in model.named_parameters()}})  # fmt: skip
    return done


def furthest(found: Any, wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest element of its tensor; all tensors must be there."""
    got = dict(found)
    assert got.keys() == wanted.keys()
    return max(float((got[name] - x).abs().max() / x.abs().max()) for name, x in wanted.items())


def stages_beside_one_process() -> dict[str, Any]:
    """On each rank: two clipped steps of SGD by each stage, and how far they are from one process's."""
    with dist.session("cpu") as ctx:
        model = lm.build(tiny_config())
        wanted = one_process_steps(copy.deepcopy(model), 2)
        assert wanted[0]["norm"] > MAX_NORM  # else nothing would be clipped
        apart: dict[str, Any] = {}
        for name, stage, keep in (("1", 1, False), ("2", 2, False), ("3", 3, False), ("3-keep", 3, True)):
            mine = copy.deepcopy(model)
            settings = zero_peers.config(
                stage, micro_batch=2, micro_batches=MICRO_BATCHES, max_norm=MAX_NORM, hidden=64, keep=keep
            )
            settings["zero_allow_untested_optimizer"] = True  # it does not know SGD
            engine = zero_peers.initialize(mine, torch.optim.SGD(mine.parameters(), lr=LR), settings, ctx)
            apart[name] = {"gradients": 0.0, "norm": 0.0, "weights": 0.0}
            for number, want in enumerate(wanted):
                batch = ragged(number)
                zero_peers.backward(engine, batch[ctx.rank], token_count(batch), RANKS)
                did = {"gradients": furthest(zero_peers.gradients(engine), want["gradients"])}
                did["norm"] = abs(float(zero_peers.update(engine) / want["norm"]) - 1)
                did["weights"] = furthest(zero_peers.weights(engine), want["weights"])
                apart[name] = {what: max(apart[name][what], did[what]) for what in did}
        with pytest.raises(UserError, match="a step of 1 micro-batches"):
            zero_peers.backward(engine, batch[ctx.rank][:1], 10, RANKS)
        return apart


def states_and_traffic() -> dict[str, Any]:
    """On each rank: what each contestant holds between backward and update, and the collectives of a step."""
    found: dict[str, Any] = {}
    with dist.session("cpu") as ctx:
        batch = [mine[:1] for mine in ragged(0)]
        job = contestants.Job(tiny_config(), ctx, micro_batch=2)
        step = StepBatch(batch[ctx.rank], token_count(batch), 0, None)  # type: ignore[arg-type]
        for name in contestants.NAMES:
            one = contestants.build(name, job)
            contestants.train(one, step)
            one.backward(step)
            held = contestants.held_bytes(one)
            one.update()
            found[name] = {"held": held, "calls": compare_zero.count(one, step)}
            one.close()
    return found


def test_each_stage_computes_what_one_process_does_and_prints_nothing() -> None:
    ranks = run_ranks(stages_beside_one_process, RANKS, timeout_s=120)
    for apart in values(ranks):
        assert apart.keys() == {"1", "2", "3", "3-keep"}
        for stage, found in apart.items():
            assert max(found.values()) < 1e-5, (stage, found)
    assert [rank.stdout for rank in ranks] == ["", ""], "a script's stdout belongs to its RESULT"
    assert all("built successfully" not in rank.stderr and "deprecated" not in rank.stderr for rank in ranks)


def test_a_rank_holds_its_share_and_the_bytes_are_those_of_the_formula() -> None:
    parameters, again = lm.parameter_count(tiny_config()), contestants.gathered_again(tiny_config())
    for found in values(run_ranks(states_and_traffic, RANKS, timeout_s=120)):
        for name in contestants.NAMES:
            held, ideal = found[name]["held"], contestants.ideal_bytes(name, parameters, RANKS)
            for kind, promised in ideal.items():
                assert 0.99 * promised <= held[kind] <= 1.1 * promised, (name, kind, held, promised)
            sent = sum(call.sent_bytes for call in found[name]["calls"])
            wanted = {
                what: contestants.sent_bytes(
                    what, summed=4 * parameters, gathered=4 * parameters, again=4 * again, ranks=RANKS
                )
                for what in contestants.NAMES
            }
            if name == "zero-3":  # it keeps what it uses again at once, the last layer and the tied head
                assert 0.98 * wanted["zero-3-keep"] < sent < 1.02 * wanted["zero-3"], (sent, wanted)
            else:
                assert sent == pytest.approx(wanted[name], rel=0.02), (name, sent, wanted, found[name]["calls"])
        kinds = [call.kind for call in found["fsdp-full"]["calls"]]
        units = 2 + 1  # each layer, and the embedding with the tied head
        assert kinds.count("all_gather") == 2 * units - 1, "what has the head stays from forward to backward"
        assert kinds.count("reduce_scatter") == units
        assert kinds.count("all_reduce") == 1, "the norm"


def test_the_comparison_sees_a_gradient_that_is_twice_too_large_or_missing() -> None:
    start = {"w": torch.zeros(4)}
    right = {"loss": 2.0, "norm": 1.0, "gradients": {"w": torch.ones(4)}, "weights": {"w": torch.full((4,), -0.1)}}
    assert set(compare_zero.differences(right, right, start).values()) == {0.0}
    twice = right | {"gradients": {"w": 2 * torch.ones(4)}, "norm": 2.0}
    allowed = compare_report.TOLERANCE
    found = compare_zero.differences(twice, right, start)
    for dtype in allowed:
        assert found["gradients"] > allowed[dtype]["gradients"]
        assert found["norm"] > allowed[dtype]["norm"]
    missing = compare_zero.differences(right | {"gradients": {}}, right, start)
    assert min(missing.values()) == float("inf")


def test_a_claim_that_is_missed_fails_and_speed_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {f"{kind}_mib": 1.0 for kind in (*compare_report.KINDS, "held", "ideal", "resident", "peak", "save")}
    fine = kinds | {
        "over_ideal": 1.0, "sent_mib": 4.0, "formula_mib": 4.0, "collectives": 3, "save_s": 0.1, "step_ms": 900.0,
        "tokens_per_s": 1.0, "fsdp_over_it": 0.1, "fsdp_over_it_p25": 0.1, "fsdp_over_it_p75": 0.1, "apart": {},
    }  # fmt: skip
    every = {"ddp": fine, "fsdp-grad": fine, "zero-3": fine | {"over_ideal": 1.25, "sent_mib": 3.0}}
    assert compare_report.missed({"equal": True, "contestants": every}) == [], "slow, but as it should be"
    heavy, chatty = fine | {"over_ideal": 1.2}, fine | {"sent_mib": 5.0}
    found = compare_report.missed({"equal": False, "contestants": {"ddp": chatty, "fsdp-full": heavy}})
    assert [line.split(":")[0] for line in found] == [
        "the first step is not the same", "a rank of ddp sends 1.250 times the bytes of the formula",
        "a rank of fsdp-full holds 1.200 times its share",
    ]  # fmt: skip
    compare_report.show({"contestants": every})
    said = capsys.readouterr().out
    assert "ddp over it" in said, "the first, as FSDP in full does not run"
    assert "fsdp-full" not in said


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: zero_peers.config(4, micro_batch=1), "no ZeRO stage 4; one of 1, 2, 3"),
        (lambda: zero_peers.config(3, micro_batch=1, dtype=torch.float16), "float32 or bfloat16, not in torch.float16"),
        (lambda: compare_zero.main(["--contestants", "ddp,zero-4"]), "no contestant 'zero-4'; of ddp"),
        (lambda: compare_zero.main(["--only", "fsdp"]), "no contestant 'fsdp'"),
        (lambda: compare_zero.main(["--width", "100"]), "--width 100 is not a multiple of 64"),
        (lambda: compare_zero.main(["--save-to", "nowhere"]), "there is no folder nowhere; make it"),
    ],
)
def test_bad_input(call: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()


def test_without_deepspeed_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="deepspeed is not installed; run make setup"):
        zero_peers.library(torch.device("cpu"))
