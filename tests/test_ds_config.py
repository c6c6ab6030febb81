"""Chapter 5: a DeepSpeed config is read, filled in, explained and checked before anything starts."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ch05_deepspeed_megatron import check_config, ds_check, ds_config, options
from common.process import ROOT
from common.script import UserError

CONFIGS = sorted((ROOT / "ch05_deepspeed_megatron" / "configs").glob("*.json"))
GOOD: dict[str, Any] = {
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "activation_checkpointing": {"partition_activations": True},
    "aio": {"block_size": 1048576},
    "checkpoint": {"load_universal": True},
    "pipeline": {"stages": 2},
    "flops_profiler": {"enabled": True},
    "tensorboard": {"enabled": False},
    "timers": {"throughput": {"enabled": False}},
    "wall_clock_breakdown": False,
}
BAD: list[tuple[str, Any, str]] = [  # a key's dotted name, its value, what the line says
    ("gradient_cliping", 1, "no key 'gradient_cliping'; did you mean 'gradient_clipping'"),
    ("train_batchsize", 8, "no key 'train_batchsize'; did you mean 'train_batch_size'"),
    ("zero_optimisation", {"stage": 3}, "no key 'zero_optimisation'; did you mean 'zero_optimization'"),
    ("zero_optimization.stages", 3, "no key 'stages' in zero_optimization; did you mean 'stage'"),
    ("zero_optimization.stage", 4, "zero_optimization.stage is 4; input should be 0, 1, 2"),
    ("zero_optimization.stage", "three", "zero_optimization.stage is 'three'"),
    ("zero_optimization.reduce_bucket_size", -5, "zero_optimization.reduce_bucket_size is -5"),
    ("zero_optimization.overlap_comm", "maybe", "zero_optimization.overlap_comm is 'maybe'"),
    ("zero_optimization.stage3_prefetch_bucket", 5, "did you mean 'stage3_prefetch_bucket_size'"),
    ("zero_optimization.offload_param", {"device": "nvm"}, "offload_param.device is 'nvm'; input should be 'none', 'cpu'"),
    ("zero_optimization.offload_param", {"devic": "cpu"}, "in zero_optimization.offload_param; did you mean 'device'"),
    ("zero_optimization.offload_optimizer", {"device": "nvme"}, "offload_optimizer.nvme_path is None; name a folder"),
    ("zero_optimization", {"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs stage 3 or more"),
    ("zero_optimization", {"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer needs stage 1 or more"),
    ("zero_optimization", 7, "zero_optimization is 7; it is a section"),
    ("zero_optimization", {"stage": 3, "mics_shard_size": 2}, "has been removed"),
    ("optimizer.type", "AdamX", "no value 'AdamX' in optimizer.type; did you mean 'Adam"),
    ("optimizer.type", "OneBitAdam", "no value 'OneBitAdam' in optimizer.type"),
    ("optimizer.type", "sgd", "no value 'sgd' in optimizer.type"),
    ("optimizer.params.weight_decy", 0.1, "in optimizer.params; did you mean 'weight_decay'"),
    ("optimizer.params.betas", [0.9], "optimizer.params: "),
    ("optimizer.params.lr", -1, "optimizer.params: Invalid learning rate: -1"),
    ("fp16.enabled", True, "bfloat16 and fp16 modes cannot be simultaneously enabled"),
    ("bf16.enable", True, "no key 'enable' in bf16; did you mean 'enabled'"),
    ("bf16", "yes", "bf16 is 'yes'; it is a section"),
    ("train_batch_size", 7, "train_batch_size 7 is not"),
    ("train_batch_size", 0, "train_batch_size is 0; take a whole number above 0"),
    ("train_batch_size", "8", "train_batch_size is '8'"),
    ("gradient_clipping", "1.0", "gradient_clipping is '1.0'; take a number"),
    ("gradient_clipping", -1, "gradient_clipping is -1; take a number, 0 or more"),
    ("wall_clock_breakdown", "yes", "wall_clock_breakdown is 'yes'; take true or false"),
    ("aio.blocksize", 1, "no key 'blocksize' in aio; did you mean 'block_size'"),
    ("activation_checkpointing.partition_activation", True, "did you mean 'partition_activations'"),
    ("pipeline.stage", 2, "no key 'stage' in pipeline; did you mean 'stages'"),
    ("checkpoint.load_univesal", True, "did you mean 'load_universal'"),
    ("checkpoint.tag_validation", "Maybe", "tag_validation"),
    ("communication_data_type", "fp8", "Invalid communication_data_type"),
    ("data_types.grad_accum_type", "fp32", "did you mean 'grad_accum_dtype'"),
    ("tensorboard.enbled", True, "no key 'enbled' in tensorboard; did you mean 'enabled'"),
    ("timers.throughput.enbled", True, "no key 'enbled' in timers.throughput; did you mean 'enabled'"),
    ("sparse_gradients", True, "has been removed"),
]  # fmt: skip


def known(**more: Any) -> dict[str, Any]:
    given = {"ranks": 2, "global_batch": 16, "micro_batch": 2, "clip": 0.5, "lr": 1e-3, "hidden": 64}
    return ds_config.known_by(**{**given, "dtype": torch.bfloat16, **more})


def test_what_is_right_passes() -> None:
    ds_check.check(GOOD, ranks=2)


@pytest.mark.parametrize(
    ("kind", "params", "offload", "wrong"),
    [
        ("AdamW", {"lr": 1e-3, "bias_correction": True, "set_grad_none": True}, "none", {"fused": True}),
        ("Adam", {"bias_correction": False, "adam_w_mode": False, "torch_adam": False}, "none", {"foreach": True}),
        ("AdamW", {"bias_correction": True, "fp32_optimizer_states": True}, "cpu", {"set_grad_none": True}),
        ("AdamW", {"torch_adam": True, "foreach": True, "amsgrad": True}, "cpu", {"bias_correction": True}),
        ("Lamb", {"max_coeff": 10.0, "min_coeff": 0.01}, "none", {"torch_adam": True}),
        ("Lion", {"betas": [0.9, 0.99]}, "none", {"eps": 1e-8}),
        ("SGD", {"momentum": 0.9}, "none", {"betas": [0.9, 0.95]}),
    ],
)
def test_an_optimizer_takes_what_the_one_that_deepspeed_makes_takes(
    kind: str, params: dict, offload: str, wrong: dict
) -> None:
    settings = copy.deepcopy(GOOD)
    settings["zero_optimization"]["offload_optimizer"]["device"] = offload
    settings["optimizer"] = {"type": kind, "params": params}
    ds_check.check(settings, ranks=2)
    settings["optimizer"]["params"] = params | wrong
    with pytest.raises(UserError, match=f"no key '{next(iter(wrong))}' in optimizer.params"):
        ds_check.check(settings, ranks=2)


@pytest.mark.parametrize(("name", "value", "words"), BAD, ids=[f"{name}={value}" for name, value, _ in BAD])
def test_each_mistake_is_one_line_that_names_it(name: str, value: Any, words: str) -> None:
    settings = copy.deepcopy(GOOD)
    *sections, key = name.split(".")
    inside = settings
    for section in sections:
        inside = inside.setdefault(section, {})
    inside[key] = value
    with pytest.raises(UserError) as caught:
        ds_check.check(settings, ranks=2)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_file_is_what_deepspeed_takes_and_each_line_is_explained(path: Path, tmp_path: Path) -> None:
    settings = ds_config.prepare(path, known(nvme=tmp_path), ranks=2)
    assert ds_config.AUTO not in json.dumps(settings)
    lines = list(check_config.annotated(ds_config.read(path), settings, check_config.explanations()))
    assert not [line for line in lines if "see deepspeed.ai" in line]


def test_auto_is_what_the_script_knows() -> None:
    filled = ds_config.fill(ds_config.read(ROOT / "ch05_deepspeed_megatron/configs/zero3.json"), known())
    assert filled["train_batch_size"] == 16
    assert filled["gradient_accumulation_steps"] == 4
    assert filled["gradient_clipping"] == 0.5
    assert filled["bf16"] == {"enabled": True}
    with pytest.raises(UserError, match=r'aio.block_size cannot be "auto"'):
        ds_config.fill({"aio": {"block_size": "auto"}}, known())
    with pytest.raises(UserError, match="--global-batch 10 is no multiple of 2 ranks x --batch-size 2"):
        known(global_batch=10)


def test_what_the_file_fixes_holds_for_the_script_too(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    base = ds_config.read(ROOT / "ch05_deepspeed_megatron/configs/zero2.json")
    flags = [
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--batch-size",
        "2",
        "--global-batch",
        "4",
        "--deepspeed-config",
        str(path),
    ]
    path.write_text(json.dumps(base | {"gradient_clipping": 0.25, "bf16": {"enabled": True}}))
    args = options.parse(None, flags)
    options.settings(args)
    assert (args.clip, args.dtype) == (0.25, "bf16")
    path.write_text(json.dumps({key: value for key, value in base.items() if key != "gradient_clipping"}))
    args = options.parse(None, [*flags, "--clip", "0.75"])
    assert options.settings(args)["gradient_clipping"] == 0.75  # DeepSpeed's own would be 1
    path.write_text(json.dumps(base | {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}))
    with pytest.raises(UserError, match='train_batch_size is 8, by the flags 4; say "auto"'):
        options.settings(options.parse(None, flags))


def test_files_that_are_none(tmp_path: Path) -> None:
    for text, words in (
        ('{"a": 1,}', "is not JSON"),
        ("[]", "holds a list"),
        ('{"zero_optimization": {"stage": 1, "stage": 3}}', "has 'stage' twice"),
        (None, "cannot read the DeepSpeed config"),
    ):
        path = tmp_path / f"{words[:6]}.json"
        if text:
            path.write_text(text)
        with pytest.raises(UserError, match=words):
            ds_config.prepare(path, known(), ranks=2)


def test_the_training_script_refuses_before_ranks_meet(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stagee": 3}}))
    command = [sys.executable, "ch05_deepspeed_megatron/train_deepspeed.py", "--deepspeed-config", str(path)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {path}: DeepSpeed knows no key 'stagee' in zero_optimization; did you mean 'stage'"
    ]
    assert not (tmp_path / "out").exists()
