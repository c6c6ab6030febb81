"""Chapter 5: offload to the CPU and to a disk, activation checkpointing, ZeRO's stages side by side, the aio sweep."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from ch01_intro import training
from ch04_fsdp import activations, resident, short_run, zero_peers
from ch04_fsdp.sharding import Sharding
from ch05_deepspeed_megatron import (
    activation_checkpointing,
    activation_memory,
    aio_sweep,
    ds_config,
    engine,
    infinity,
    offload_run,
    ops,
    options,
    stages,
)
from ch05_deepspeed_megatron.offload_run import Job
from common import dist, exercises, lm
from common.script import UserError
from tests.spawn import run_ranks, values

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(900)  # DeepSpeed's operators are compiled where they are not yet: minutes
MIB = 2**20
needs_aio = pytest.mark.skipif(bool(exercises.missing_for("aio")), reason=f"needs {exercises.missing_for('aio')}")


# ---------------------------------------------------------------- what goes where


def nvme(**more: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {
            "stage": 3, "sub_group_size": 2**20,
            "offload_param": {"device": "nvme", "buffer_count": 5, "buffer_size": 2**20},
            "offload_optimizer": {"device": "nvme"},
        } | more,
        "aio": {"block_size": MIB, "intra_op_parallelism": 1},
    }  # fmt: skip


def test_what_lies_where_counted_by_hand():
    shapes = [torch.Size([2048, 1024]), torch.Size([512, 512]), torch.Size([1024])]  # 2 Mi, 256 Ki, 1 Ki numbers
    found = infinity.place(shapes, nvme(), ranks=2, dtype=torch.float32)
    # Shares: 1 Mi, 128 Ki and 512 numbers; the first is a file of 4 MiB and a sub-group, the others are below 1 MiB.
    assert found.weights_on_disk == 4 * MIB
    assert found.weights_in_memory == 4 * (2**17 + 512)
    assert found.gradients == 4 * (2**20 + 2**17 + 512)
    assert found.optimizer_in_memory == (4 + 8 + 4) * (2**17 + 512)
    assert found.optimizer_on_disk == 3 * 4 * MIB + 4 * MIB  # weights, two means, and the gradient
    assert found.pinned == 5 * 4 * MIB + 4 * MIB + 4 * 4 * MIB
    plain = infinity.place(shapes, {"zero_optimization": {"stage": 3}}, ranks=2, dtype=torch.float32)
    assert plain.memory == (4 + 4 + 4 + 8) * (2**20 + 2**17 + 512)
    assert plain.disk == plain.pinned == 0


def test_a_block_larger_than_a_share_keeps_it_in_memory():
    settings = nvme() | {"aio": {"block_size": 8 * MIB}}
    found = infinity.place([torch.Size([2048, 1024])], settings, ranks=2, dtype=torch.float32)
    assert found.disk == 0


def test_auto_sizes_suit_the_largest_share(tmp_path: Path):
    for preset, ranks in (("nano", 2), ("8b", 8)):
        config = lm.config(preset)
        shapes = infinity.shapes_of(config)
        known = ds_config.known_by(
            ranks=ranks, global_batch=ranks, micro_batch=1, clip=1.0, lr=1e-3, hidden=config.hidden_size,
            largest=max(shape.numel() for shape in shapes), layers=config.num_hidden_layers, dtype=torch.bfloat16,
            nvme=tmp_path,
        )  # fmt: skip
        settings = ds_config.prepare(options.CONFIGS / "zero3_nvme.json", known, ranks)
        size = settings["zero_optimization"]["offload_param"]["buffer_size"]
        assert size == -(-max(shape.numel() for shape in shapes) // ranks)
        assert 4 * settings["zero_optimization"]["sub_group_size"] >= infinity.LEAST_IN_A_FILE


def test_the_operators_that_a_config_needs():
    def needed(name: str) -> list[str]:
        return ops.needed(ds_config.read(options.CONFIGS / f"{name}.json"))

    assert needed("zero3") == needed("activations") == []
    assert needed("zero2_cpu_offload") == needed("zero3_cpu_offload") == [ops.ADAM]
    assert needed("zero3_nvme") == [ops.ADAM, ops.AIO]
    by_torch = ds_config.read(options.CONFIGS / "zero2_cpu_offload.json")
    by_torch["optimizer"]["params"]["torch_adam"] = True
    assert ops.needed(by_torch) == []


# ---------------------------------------------------------------- mistakes, before a rank starts


def settings_of(*argv: str) -> dict[str, Any]:
    args = options.parse(None, ["--device", "cpu", *argv])
    return options.settings(args)


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_launcher: pytest.MonkeyPatch):
    config = ["--deepspeed-config", str(options.CONFIGS / "zero3_nvme.json")]
    with pytest.raises(UserError, match="no disk is named; pass --nvme-dir"):
        settings_of(*config)
    with pytest.raises(UserError, match="make it on the disk to offload to"):
        settings_of(*config, "--nvme-dir", str(tmp_path / "missing"))
    with monkeypatch.context() as patch:
        patch.setattr(infinity, "_may_lock_all", lambda: False)
        patch.setattr(infinity.resource, "getrlimit", lambda _: (MIB, MIB))
        with pytest.raises(UserError, match=r"this user may lock 1 MiB; raise that \(ulimit -l"):
            settings_of(*config, "--nvme-dir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("CXX", raising=False)
        with pytest.raises(UserError, match=r"needs for it g\+\+ \(make system-deps\)"):
            settings_of("--deepspeed-config", str(options.CONFIGS / "zero2_cpu_offload.json"))
        with pytest.raises(UserError, match="make system-deps"):
            settings_of(*config, "--nvme-dir", str(tmp_path))

    def refused(*args: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(infinity.os, "open", refused)
        with pytest.raises(UserError, match=r"has no direct I/O \(Invalid argument\)"):
            infinity.check_direct(tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("deepspeed-")]
    section = {"contiguous_memory_optimization": True, "partition_activations": True}
    with pytest.raises(UserError, match="needs number_checkpoints; set it to the number of layers"):
        activation_checkpointing.check(section)


def test_compiling_waits_for_nobody_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another process that compiles is waited for as long as was said; the mark of a dead one is not."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    seen = []

    class Builder:
        name = "cpu_adam"

        def load(self, verbose: bool) -> None:
            seen.append((tmp_path / "cpu_adam" / "lock").exists())

    zero_peers.library(CPU)
    from deepspeed.ops import op_builder

    monkeypatch.setattr(op_builder, ops.ADAM, Builder)
    monkeypatch.setattr(ops, "check", lambda names, device: None)
    ops.build([ops.ADAM], CPU)
    assert seen == [False]
    with (tmp_path / ".building").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process has been compiling"):
            ops.build([ops.ADAM], CPU, timeout_s=0.2)


@needs_aio
def test_what_stands_compiled_is_taken_as_it_is_unless_it_is_of_another_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """ninja would compile it anew in each environment."""
    ops.build([ops.ADAM], CPU)
    from deepspeed.ops.op_builder import CPUAdamBuilder, builder

    shutil.copytree(Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam", tmp_path / "cpu_adam")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(builder.OpBuilder, "_loaded_ops", {})

    def compiler(**_: Any) -> None:
        raise RuntimeError("compiles")

    monkeypatch.setattr(cpp_extension, "load", compiler)
    assert CPUAdamBuilder().load().create_adam
    builder.OpBuilder._loaded_ops.clear()
    (tmp_path / "cpu_adam" / "complete").write_text("another torch")
    with pytest.raises(RuntimeError, match="compiles"):
        CPUAdamBuilder().load()


def test_a_job_takes_its_own_folder_away_and_no_other(tmp_path: Path):
    launch = dist.Launch("torchrun", rank=1, world_size=2, local_rank=1, local_world_size=2, port=1234)
    folder = infinity.folder_for(tmp_path, launch)
    for rank in (0, 1):
        (folder / "zero_stage_3" / "optimizer" / f"rank{rank}").mkdir(parents=True)
    infinity._leave(folder, 1)
    assert [path.name for path in folder.glob("**/rank*")] == ["rank0"]
    infinity._leave(folder, 0)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- NVMe


@needs_aio
def test_nvme_holds_the_parameters_on_disk_and_memory_is_lower_by_what_was_predicted(tmp_path: Path):
    """On one rank: its files are what the formula says to the byte, its losses those without offload."""
    training.load_corpus(argparse.Namespace(preset="nano", data="stdlib", seq_len=32))
    job = Job(
        Sharding(), steps=3, seq_len=32, global_batch=2, device="cpu", layers=6, hidden=512, folder=tmp_path,
    )  # fmt: skip
    found, places = {}, {}
    for name in ("zero3", "zero3_cpu_offload", "zero3_nvme"):
        (tmp_path / name).mkdir()
        own = dataclasses.replace(job, settings=name, folder=tmp_path / name)
        if name == "zero3_cpu_offload":  # Adam's kernel rounds by the place in a sub-group: with equal ones, equal bits
            part = dataclasses.replace(own, settings="zero3_nvme").filled()["zero_optimization"]["sub_group_size"]
            own = dataclasses.replace(own, sub_group_size=part)
        ops.build(ops.needed(own.filled()), CPU)
        done = short_run.run(own, 120, offload_run.train)
        assert done.result, done.error
        found[name], places[name] = done.result, own.place()
    assert found["zero3"]["disk_bytes"] == found["zero3_cpu_offload"]["disk_bytes"] == 0
    assert found["zero3_nvme"]["disk_bytes"] == places["zero3_nvme"].disk
    assert places["zero3_nvme"].weights_on_disk > 0.95 * 4 * lm.parameter_count(job.config())
    predicted = places["zero3"].memory - places["zero3_nvme"].memory
    saved = found["zero3"]["held_bytes"] - found["zero3_nvme"]["held_bytes"]
    assert predicted > 100 * MIB
    assert saved == pytest.approx(predicted, rel=0.1)
    assert found["zero3_nvme"]["losses"] == pytest.approx(found["zero3"]["losses"], abs=1e-5)
    assert found["zero3_nvme"]["losses"] == found["zero3_cpu_offload"]["losses"]
    assert found["zero3_nvme"]["weights_sha256"] == found["zero3_cpu_offload"]["weights_sha256"]


@needs_aio
def test_the_sweep_writes_a_section_that_is_valid(tmp_path: Path):
    ops.build([ops.AIO], CPU)
    argv = [
        "--device", "cpu", "--mib", "8", "--block-kib", "512,1024", "--queue-depth", "4", "--threads", "1", "--rounds", "1",
    ]  # fmt: skip
    result = aio_sweep.main([*argv, "--run-dir", str(tmp_path), "--nvme-dir", str(tmp_path)])
    written = json.loads((tmp_path / "zero3_nvme.json").read_text())
    assert written["aio"]["block_size"] == result["best_block_size"] in (512 * 1024, MIB)
    assert result["settings"] == 6
    assert result["best_read_gib_per_s"] > 0 < result["plain_write_gib_per_s"]
    assert not list(tmp_path.glob("aio-sweep-*"))


@needs_aio
def test_aio_reads_back_what_it_wrote(tmp_path: Path):
    ops.build([ops.AIO], CPU)
    one = aio_sweep.Aio({"block_size": 2**18, "queue_depth": 4, "intra_op_parallelism": 2}, MIB)
    one.buffer.copy_(torch.arange(MIB) % 251)
    one.write(tmp_path / "file")
    one.buffer.zero_()
    one.read(tmp_path / "file")
    assert torch.equal(one.buffer, (torch.arange(MIB) % 251).to(torch.uint8))
    assert (tmp_path / "file").read_bytes() == bytes(n % 251 for n in range(MIB))
    one.close()


# ---------------------------------------------------------------- activations


def _activations() -> dict[str, Any]:
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        library = zero_peers.join(ctx.launch, ctx.device)
        library.init_distributed(dist_backend="gloo", verbose=False)
        mpu = activation_checkpointing.ModelParallel(torch.distributed.group.WORLD)
        config = lm.config("nano", 64)
        model = lm.build(config).train()
        tokens = torch.randint(config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
        batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        resident.return_at_once()
        found: dict[str, Any] = {}
        for frozen in (False, True):
            model.model.embed_tokens.weight.requires_grad = not frozen
            for way in activation_memory.WAYS:
                activation_memory.switch(model, way, mpu)
                activation_memory.one_step(model, batch, ctx.device)
                did = activation_memory.one_step(model, batch, ctx.device)
                reference = did["gradients"] if way == "all kept" else reference  # noqa: F821 (it comes first)
                found[f"{way}{' frozen' if frozen else ''}"] = (
                    did["kept"], activation_memory.apart(did["gradients"], reference)
                )  # fmt: skip
        return found


def test_checkpoints_change_no_gradient_and_each_rank_keeps_its_half():
    for found in values(run_ranks(_activations, 2, timeout_s=120)):
        assert all(apart == 0 for _, apart in found.values()), found
        config = lm.config("nano", 64)
        stream = activations.Layer(config, 2 * 64, "fp32").stream
        for way in activation_memory.WAYS:
            predicted = activation_memory.formula(config, way, 2, 64, 2, CPU)
            assert found[way][0] == pytest.approx(predicted, rel=0.05, abs=120 * 1024), way  # random states, graph
        saved = found["checkpointed"][0] - found["partitioned"][0]
        assert saved == pytest.approx(config.num_hidden_layers * stream / 2, rel=0.1)


def _configured(folder: str) -> dict[str, Any]:
    """A step by zero2.json, and one by activations.json, which is the same with checkpoints."""
    with dist.session("cpu", timeout_s=60, threads=1) as ctx:
        found = {}
        for name in ("zero2", "activations"):
            job = stages.Job(lm.config("nano", 32), seq_len=32, device="cpu")
            known = ds_config.known_by(
                ranks=2, global_batch=4, micro_batch=2, clip=1.0, lr=1e-3, hidden=256, layers=4, dtype=torch.float32
            )
            settings = ds_config.prepare(options.CONFIGS / f"{name}.json", known, 2)
            model = engine.build(job.config, settings, ctx, seq_len=32)
            zero = engine.initialize(model, settings, ctx)
            stage = object.__new__(stages.Stage)
            stage.name, stage.job, stage.ctx, stage.zero = name, job, ctx, zero
            said = [stage.train(batch) for batch, _ in zip(job.batches(ctx), range(2), strict=False)]
            found[name] = (said, model.model.layers[0].gradient_checkpointing)
            stage.close()
        return found


def test_the_section_is_put_to_work_by_the_engine():
    found = values(run_ranks(_configured, 2, "", timeout_s=120))[0]
    assert found["activations"][0] == found["zero2"][0]
    assert (found["zero2"][1], found["activations"][1]) == (False, True)


# ---------------------------------------------------------------- stages


def test_a_stage_weighed_is_as_predicted():
    config = lm.config("nano", 32)
    job = stages.Job(config, seq_len=32, device="cpu")
    weighed = values(run_ranks(stages.weigh, 2, "3", job, timeout_s=120))
    predicted = stages.predicted("3", job)
    for rank in weighed:
        for kind in ("parameters", "gradients", "optimizer", "master"):
            assert rank["held"][kind] == pytest.approx(predicted[kind], rel=0.01), kind
        assert rank["sent"] == pytest.approx(predicted["sent"], rel=0.01)
