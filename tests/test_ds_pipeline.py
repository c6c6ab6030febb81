"""DeepSpeed's pipeline: one process's gradients, one global norm, exact resumes, one Hugging Face folder; bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.harness import Case
from ch02_hardware_parallelism.schedules import bubble_formula, peak_live, schedule
from ch03_ddp import step as ddp_step
from ch03_ddp.feed import IGNORE, Batch
from ch03_ddp.strategies import RaggedLlama
from ch04_fsdp import weights, zero_peers
from ch05_deepspeed_megatron import (
    parity,
    pipeline_bubble,
    pipeline_checkpoints,
    pipeline_engine,
    pipeline_model,
    pipeline_options,
    train_pipeline,
)
from ch05_deepspeed_megatron.pipeline_strategies import OPTIONS, PLANTED
from common import dist, lm, script
from common.script import UserError
from tests.spawn import run_ranks, values

MICRO_BATCHES, LR, MAX_NORM = 3, 0.1, 0.5


def tiny_config(*, tied: bool) -> Any:
    config = lm.config("nano")
    config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 64, 128, 2
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim, config.tie_word_embeddings = 32, tied
    return config


def ragged() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (MICRO_BATCHES, 2, 25), generator=generator)
    found = []
    for number, batch in enumerate(tokens):
        inputs, targets = batch[:, :-1], batch[:, 1:].clone()
        targets[0, 3 + 7 * number :] = IGNORE
        found.append((inputs.contiguous(), targets))
    return found


# ---------------------------------------------------------------- two stages beside one process


def two_stages(folder: Path) -> dict[str, Any]:
    """On each rank, in one session, as that costs seconds."""
    with dist.session("cpu") as ctx:
        zero_peers.join(ctx.launch, ctx.device)
        return beside_one_process(folder / "model", ctx) | {"resume": resumed_in_bf16(folder / "saved", ctx)}


def resumed_in_bf16(folder: Path, ctx: dist.Context) -> dict[str, dict[str, Any]]:
    """AdamW with dropout: two steps, a save, two more; and again from the save on, by an engine of other weights."""
    config, batches = tiny_config(tied=True), ragged()
    config.attention_dropout = 0.1
    tokens = sum(int((targets != IGNORE).sum()) for _, targets in batches)
    settings = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICRO_BATCHES, "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }  # fmt: skip
    keeper = pipeline_checkpoints.Keeper(folder, {}, ctx, keep=1)

    def engine_of(seed: int) -> Any:
        module = pipeline_model.build(config, 2, "parameters").train()
        pipeline_model.initialize(module, seed)
        script.seed_everything(seed + ctx.rank)
        return pipeline_engine.initialize(module, torch.optim.AdamW(module.parameters(), lr=1e-2), settings)

    def two_steps(engine: Any) -> dict[str, Any]:
        losses = [float(pipeline_engine.step(engine, batches, tokens)) for _ in range(2)]
        return {"losses": losses, "sha256": pipeline_model.sha256(engine.module)}

    alone = engine_of(3)
    before = two_steps(alone)
    keeper.save(2, alone, 0)
    found = {"before": before, "alone": two_steps(alone)}
    alone.destroy()
    again, path = engine_of(4), folder / "step-00000002"
    assert keeper.load(path, keeper.check(path), again) == (2, 0)
    found["loaded"] = {"sha256": pipeline_model.sha256(again.module)}
    found["again"] = two_steps(again)
    again.destroy()
    return found


def beside_one_process(folder: Path, ctx: dist.Context) -> dict[str, Any]:
    """A clipped step of SGD with DeepSpeed's norm and with ours, and of ZeRO 1, beside one process's."""
    found: dict[str, Any] = {}
    batches = ragged()
    tokens = sum(int((targets != IGNORE).sum()) for _, targets in batches)
    for kind in ("tied", "untied", "zero-1", "bf16", "deepspeed"):
        config = tiny_config(tied=kind != "untied")
        whole = lm.build(config)
        weights.initialize(whole, 3)
        module = pipeline_model.build(config, 2, "parameters")
        if kind == "untied" and ctx.is_main:
            whole.save_pretrained(folder)
        ctx.barrier("saved")
        if kind == "untied":
            pipeline_model.load(module, folder)
        else:
            pipeline_model.initialize(module, 3)
        same_weights = pipeline_model.sha256(module) == lm.weights_sha256(whole)

        start = {name: p.detach().clone() for name, p in whole.named_parameters()}
        want = sum((ddp_step.loss_sum(whole, *batch) / tokens for batch in batches), torch.zeros(()))
        want.backward()
        norm = nn.utils.clip_grad_norm_(whole.parameters(), MAX_NORM)
        torch.optim.SGD(whole.parameters(), lr=LR).step()

        settings = {
            "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": MAX_NORM, "zero_allow_untested_optimizer": True, "steps_per_print": None,
            "zero_optimization": {"stage": int(kind in ("zero-1", "bf16")), "reduce_bucket_size": 100_000},
            "bf16": {"enabled": kind == "bf16"}, "data_types": {"grad_accum_dtype": "fp32"},
        }  # fmt: skip
        engine = pipeline_engine.initialize(module, torch.optim.SGD(module.parameters(), lr=LR), settings)
        if kind == "deepspeed":
            del engine.clip_fp32_gradients  # the class's own again
        evaluated = pipeline_engine.evaluate(engine, batches, tokens)
        loss = pipeline_engine.step(engine, batches, tokens)
        after = dict(whole.named_parameters())
        found[kind] = {
            "same_weights": same_weights,
            "parts": list(module.parts) == pipeline_model.split(config, 2, "parameters"),
            "loss": (float(loss), evaluated, float(want)),
            "norm": (float(engine.get_global_grad_norm() or 0), float(norm)),
            "apart": max(
                float((pipeline_model.master(p) - after[name]).abs().max())
                for name, p in pipeline_model.named_parameters(module)
            ),
            "step": max(float((p - start[name]).abs().max()) for name, p in after.items()),
            "names": sorted(name for name, _ in pipeline_model.whole_parameters(module)),
        }
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return values(run_ranks(two_stages, 2, tmp_path_factory.mktemp("two"), timeout_s=120))


def test_a_resume_in_bf16_is_exact(both: list[dict[str, Any]]) -> None:
    """Of the float32 copies of the weights and their moments, which lie apart from the bf16 weights, and of dropout."""
    for told in (found["resume"] for found in both):
        assert told["loaded"]["sha256"] == told["before"]["sha256"]
        assert told["again"] == told["alone"]
        assert len({*told["before"]["losses"], *told["alone"]["losses"]}) == 4


def test_two_stages_take_the_step_of_one_process(both: list[dict[str, Any]]) -> None:
    for found in both:
        for kind in ("tied", "untied", "zero-1"):
            said = found[kind]
            assert said["same_weights"], kind
            assert said["parts"], kind
            loss, evaluated, wanted = said["loss"]
            assert loss == pytest.approx(wanted, rel=1e-5) == evaluated, kind
            assert said["norm"][1] > MAX_NORM  # else nothing would be clipped
            assert said["norm"][0] == pytest.approx(said["norm"][1], rel=1e-5), kind
            assert said["apart"] < 1e-6, kind
        # In bf16 the same to its eight bits, the clipped step on float32 copies of the weights too.
        said = found["bf16"]
        assert said["loss"][0] == pytest.approx(said["loss"][2], rel=5e-3)
        assert said["norm"][0] == pytest.approx(said["norm"][1], rel=5e-3)
        assert 0 < said["apart"] < 1e-3 < said["step"]
        # DeepSpeed's own clipping in float32: the same gradients, and another step.
        assert found["deepspeed"]["loss"][0] == pytest.approx(found["deepspeed"]["loss"][2], rel=1e-5)
        assert found["deepspeed"]["apart"] > 1e-4
    # The first stage has all names; the others have what they hold.
    first, last = (found["untied"]["names"] for found in both)
    assert first == sorted(name for name, _ in lm.build(tiny_config(tied=False), "meta").named_parameters())
    assert set(last) < set(first)
    assert "lm_head.weight" in last
    assert "model.embed_tokens.weight" not in last


# ---------------------------------------------------------------- the harness


def test_parity_of_each_option() -> None:
    options = [OPTIONS[name] for name in ("pipeline", "zero-1", "recompute", "four-stages")]
    cases = parity.cases([2, 4], [1, 4])
    assert {case.ranks for case in cases} == {2, 4}
    assert len({case.tied for case in cases}) == 2
    outcomes = harness.check(options, cases, RaggedLlama(), in_turn=True, timeout_s=120)
    done = [outcome for outcome in outcomes if not outcome.skipped]
    assert len(done) >= 7
    assert all(outcome.ok for outcome in done), [outcome.diagnosis() for outcome in done]


def test_the_harness_names_each_planted_bug() -> None:
    case = Case(4, 4, "float32", tied=True, by_hand=False)
    outcomes = harness.check(list(PLANTED.values()), [case], RaggedLlama(), timeout_s=120)
    said = dict(zip(PLANTED, outcomes, strict=True))
    assert not any(outcome.ok or outcome.skipped for outcome in outcomes)
    four = said["loss-not-divided"]
    assert set(four.factors) == set(four.wrong) == {name for name, _ in RaggedLlama().build(case).named_parameters()}
    assert all(factor == pytest.approx(4, rel=1e-4) for factor in four.factors.values())
    before = said["divided-in-every-stage"].factors  # the first stage's: once too often; the last stage's are right
    assert "model.layers.0.mlp.up_proj.weight" in before
    assert "model.norm.weight" not in said["divided-in-every-stage"].wrong
    assert all(factor == pytest.approx(0.25, rel=1e-4) for factor in before.values())
    assert set(said["tied-not-summed"].wrong) == {"model.embed_tokens.weight"}
    assert said["mean-of-means"].gradient_error > 1e-3
    for norm_alone in ("first-stages-norm", "tied-counted-twice"):
        assert said[norm_alone].failures == ["norm"], norm_alone


# ---------------------------------------------------------------- the script


def train(*flags: str) -> dict[str, Any]:
    return train_pipeline.main(list(flags))


def test_training_resumes_exactly_and_leaves_one_folder(tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    flags = [
        "--device", "cpu", "--dtype", "fp32", "--steps", "4", "--batch-size", "2", "--global-batch", "8", "--seq-len",
        "32", "--val-tokens", "512", "--sample-tokens", "0", "--save-every", "2", "--ragged", "--dropout", "0.1",
        "--keep", "5",
    ]  # fmt: skip
    first = values(run_ranks(train, 4, *flags, "--out", str(whole), timeout_s=120))[0]
    assert first["ranks_agree"]
    assert first["replicas"] == 2
    assert first["stages"] == 2
    assert first["micro_batches"] == 2
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints/step-00000004")
    shutil.rmtree(again / "model")
    second = values(run_ranks(train, 4, *flags, "--out", str(again), "--resume", "auto", timeout_s=120))[0]
    assert second["resumed_at_step"] == 2
    assert second["weights_sha256"] == first["weights_sha256"]
    assert second["loss_last"] == first["loss_last"]

    model = lm.load(str(again / "model"))
    assert lm.weights_sha256(model) == first["weights_sha256"]
    with pytest.raises(UserError, match="made with stages 2, this run has 1"):
        train(*flags, "--stages", "1", "--out", str(again), "--resume", "auto")
    spoilt = next((again / "checkpoints/step-00000002").glob("layer_01*"))
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"x")
    shutil.rmtree(again / "checkpoints/step-00000004")
    with pytest.raises(UserError, match="corrupt"):
        train(*flags, "--stages", "1", "--out", str(again), "--resume", "auto")


BAD = {
    "3 stages do not divide 2 ranks": ["--stages", "3"],
    "--global-batch 6 is no multiple of 4": ["--global-batch", "6"],
    "no partition method 'best'; one of uniform": ["--partition", "best"],
    "matches 0 of the layers": ["--partition", "type:mamba"],
    "is not a regular expression": ["--partition", "type:("],
    "is longer than the": ["--seq-len", "64", "--preset", "{model}"],
    "--compile is not made for a pipeline": ["--compile"],
    "asks for ZeRO 2": ["--deepspeed-config", "{zero2}"],
    "enables fp16": ["--deepspeed-config", "{fp16}"],
    "has a section 'optimizer'": ["--deepspeed-config", "{optimizer}"],
    "is not JSON": ["--deepspeed-config", "{broken}"],
    "cannot read": ["--deepspeed-config", "{missing}"],
    "with ZeRO 1 only": ["--deepspeed-config", "{zero0}", "--dtype", "bf16"],
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_found_before_a_rank_builds(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    files = {
        "zero2": {"zero_optimization": {"stage": 2}},
        "zero0": {},
        "fp16": {"fp16": {"enabled": True}},
        "optimizer": {"optimizer": {"type": "AdamW"}},
    }
    paths = {name: tmp_path / f"{name}.json" for name in (*files, "broken", "missing")}
    for name, text in files.items():
        batch = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        paths[name].write_text(json.dumps(batch | text))
    paths["broken"].write_text("{")
    config = tiny_config(tied=True)
    config.max_position_embeddings = 32
    config.save_pretrained(tmp_path / "model")
    flags = [flag.format(**paths, model=tmp_path / "model") for flag in BAD[said]]
    with pytest.raises(UserError) as error:
        pipeline_options.parse(None, ["--device", "cpu", *flags])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_more_stages_than_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="8 stages for 4 decoder layers"):
        pipeline_options.parse(None, ["--device", "cpu", "--stages", "8"])


# ---------------------------------------------------------------- pure functions


def test_split_and_names() -> None:
    zero_peers.library(torch.device("cpu"))
    config = lm.config("nano")  # 7 layers: embedding, 4 decoder layers, norm, head
    assert pipeline_model.split(config, 2, "uniform") == [0, 4, 7]
    assert pipeline_model.split(config, 4, "type:decoderlayer")[1:-1] == [2, 3, 4]
    sizes = pipeline_model.layer_parameters(config)
    ends = 2048 * 256
    assert sum(sizes) == lm.parameter_count(config) + ends  # the tied copy
    names = {pipeline_model.hf_name(name, 4) for name in ("tied_modules.embedding.weight", "5.weight", "6.weight")}
    assert names == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_schedules_hold_what_is_said(count: int) -> None:
    """DeepSpeed's order is chapter 2's, from which the bubble and the activations in flight follow."""
    zero_peers.library(torch.device("cpu"))
    from deepspeed.runtime.pipe import schedule as ds

    def order(made: Any) -> list[tuple[str, int]]:
        kinds = {"ForwardPass": "forward", "BackwardPass": "backward"}
        done: list[tuple[str, int]] = []
        for command in (command for commands in made.steps() for command in commands):
            if kind := kinds.get(type(command).__name__):
                done.append((kind, sum(kind == had for had, _ in done)))
        return done

    for stage in range(4):
        own = order(ds.TrainSchedule(micro_batches=count, stages=4, stage_id=stage))
        assert peak_live(own) == min(4 - stage, count)
        assert own == schedule("1f1b", stage, 4, count)
        engine = SimpleNamespace(micro_batches=count, num_stages=4, stage_id=stage)
        assert order(pipeline_bubble.gpipe(engine)) == schedule("gpipe", stage, 4, count)
    assert bubble_formula(4, count) == 3 / (count + 3)
