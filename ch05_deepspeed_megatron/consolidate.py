"""From a checkpoint of ZeRO 1, 2 or 3 to one Hugging Face folder, tensor by tensor: no ranks, no GPU, little memory.

You learn   where in DeepSpeed's files the pieces of a weight lie in each stage, and why its own zero_to_fp32.py needs
            the memory of the whole model in stages 1 and 2
Laptop      torchrun --standalone --nproc-per-node=2 ch05_deepspeed_megatron/train_deepspeed.py --steps 20 \
                --out /tmp/run
            python ch05_deepspeed_megatron/consolidate.py /tmp/run/checkpoints/step-00000020 /tmp/exported --compare
GPU node    the same: it needs no GPU
Cluster     the same, on any host that sees the folder
You see     the folder's size and the most memory that it took, about one file's tensors; with --compare time, memory
            and bytes of zero_to_fp32.py on the same checkpoint, and whether the tensors are the same bits
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ch04_fsdp import checkpoints as sharded
from ch04_fsdp import export, weights, zero_peers
from ch05_deepspeed_megatron import checkpoints, universal_format
from common import lm, process, profiling, script

# Runs a script of ours or of DeepSpeed, and tells the most memory that its process had, imports and all.
MEASURED = """
import resource, runpy, sys
script, *sys.argv = sys.argv[1], *sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print("PEAK_KIB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr, flush=True)
"""


Keys = tuple[Any, ...]
Groups = list[dict[str, torch.Size]]  # name and shape of each parameter, by group of the optimizer


@dataclass(frozen=True)
class Piece:
    """Elements of a parameter in a file: of the flat tensor at these keys, or all of it where `numel` is None."""

    file: Path
    keys: Keys
    start: int = 0
    numel: int | None = None


def stored_parameters(
    folder: Path, state: str = "fp32", keep_open_bytes: int = 2**26
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole float32 value of each parameter that DeepSpeed has saved to `folder`, a tied one once.

    Args:
        state: fp32, or what the optimizer holds of each parameter that it trains: exp_avg, exp_avg_sq.
        keep_open_bytes: files are mapped, not read; after so many bytes they are mapped anew, so that the pages go.
    """
    opened: dict[Path, Any] = {}
    taken = 0
    for name, shape, pieces in _plan(folder, state):
        parts = []
        for piece in pieces:
            if piece.file not in opened:
                opened[piece.file] = _open(piece.file)
            found = opened[piece.file]
            for key in piece.keys:
                found = found[key]
            flat = found.detach().reshape(-1)
            parts.append(flat if piece.numel is None else flat.narrow(0, piece.start, piece.numel))
        whole = torch.cat(parts).float()[: math.prod(shape)].view(tuple(shape))
        taken += whole.numel() * whole.element_size()
        if taken > keep_open_bytes:
            opened, taken = {}, 0
        yield name, whole


Planned = tuple[str, torch.Size, list[Piece]]


def _open(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _plan(folder: Path, state: str) -> Iterator[Planned]:
    """Name, shape and pieces of each parameter, in the order in which they lie in the files."""
    stage = universal_format.stage_of(folder)
    models = sorted(
        folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_*"), key=_rank
    )
    shards = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
    model = _open(models[0])
    if stage == 0:
        tied = set(model.get("shared_params") or {})
        for name, tensor in model["module"].items():
            if name not in tied:
                yield name, tensor.shape, [Piece(models[0], ("module", name))]
        return
    if state == "fp32":
        for name, shape in (model["frozen_param_shapes"] or {}).items():  # of which no optimizer has a copy
            yield name, shape, [Piece(file, ("frozen_param_fragments", name)) for file in models]
        for name in model["buffer_names"]:
            yield name, model["module"][name].shape, [Piece(models[0], ("module", name))]
    flat = [_keys(stage, state, number) for number in range(len(model["param_shapes"]))]
    yield from (_of_stage_3 if stage == 3 else _of_stage_2)(model["param_shapes"], flat, shards)


def _rank(path: Path) -> int:
    return int(path.name.partition("pp_rank_")[2].partition("_")[0] or 0)


def _keys(stage: int, state: str, group: int) -> Keys:
    """Where in a shard's file the flat tensor of a group lies."""
    if state == "fp32":
        return "optimizer_state_dict", "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups", group
    within = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    return "optimizer_state_dict", within, "state", group, state


def _of_stage_3(groups: Groups, flat: list[Keys], shards: list[Path]) -> Iterator[Planned]:
    """Each rank has a part of every parameter, the last ones padded; the parts lie one behind the other."""
    for shapes, keys in zip(groups, flat, strict=True):
        start = 0
        for name, shape in shapes.items():
            part = math.ceil(math.prod(shape) / len(shards))
            yield name, shape, [Piece(file, keys, start, part) for file in shards]
            start += part


def _of_stage_2(groups: Groups, flat: list[Keys], shards: list[Path]) -> Iterator[Planned]:
    """All parameters one behind the other, cut into as many parts as ranks: a rank says what it has of which."""
    mappings = [_open(file)["optimizer_state_dict"]["param_slice_mappings"] for file in shards]
    for number, (shapes, keys) in enumerate(zip(groups, flat, strict=True)):
        for name, shape in shapes.items():
            found = zip(shards, (mapping[number].get(name) for mapping in mappings), strict=True)
            yield name, shape, [Piece(file, keys, at.start, at.numel) for file, at in found if at]


def compare(checkpoint: Path, file_mib: float, timeout_s: float) -> dict[str, Any]:
    """This script and zero_to_fp32.py, each in a process of its own, on the same checkpoint."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="consolidate-") as name:
        for who in ("ours", "deepspeed"):
            out = Path(name) / who
            words = {
                "ours": [__file__, str(checkpoint), str(out), "--file-mib", str(file_mib)],
                # Not --safe_serialization: it fails on tied weights (0.19.8), which safetensors refuses to write twice.
                "deepspeed": [
                    str(checkpoint / "zero_to_fp32.py"), str(checkpoint), str(out), "-t", checkpoints.TAG,
                    "--max_shard_size", f"{max(1, round(file_mib))}MB",
                ],
            }[who]  # fmt: skip
            done = process.run([sys.executable, "-c", MEASURED, *words], timeout_s=timeout_s)
            if done.returncode:
                raise script.UserError(f"{Path(words[0]).name} failed ({done.reason(timeout_s)}); run it by itself")
            peak = next(line.split()[1] for line in done.stderr.splitlines() if line.startswith("PEAK_KIB"))
            size = sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in out.glob(pattern))
            found |= {f"{who}_s": done.seconds, f"{who}_peak_gib": int(peak) / 2**20, f"{who}_gib": size / 2**30}
        found["same_tensors"] = _same(Path(name) / "ours", Path(name) / "deepspeed")
    return found


def _same(ours: Path, theirs: Path) -> bool:
    """Each tensor of ours is in their files, bit for bit."""
    found = {key: value for path in theirs.glob("*.bin") for key, value in torch.load(path, mmap=True).items()}
    for name, path in weights.files_of_tensors(ours).items():
        with safe_open(path, framework="pt") as file:
            if not torch.equal(file.get_tensor(name), found[name]):
                return False
    return True


def main(argv: list[str] | None = None) -> dict:
    import transformers

    parser = script.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a folder step-NNNNNNNN that train_deepspeed.py has written")
    parser.add_argument("folder", type=Path, help="the Hugging Face folder to make")
    parser.add_argument("--tokenizer", help="a folder or hub id whose tokenizer goes with it (default: none)")
    parser.add_argument("--file-mib", type=script.positive, default=export.FILE_BYTES / 2**20, help="largest file")
    parser.add_argument("--compare", action="store_true", help="also run DeepSpeed's zero_to_fp32.py")
    parser.add_argument("--timeout-s", type=script.positive, default=3600, help="for each of the two of --compare")
    args = parser.parse_args(argv)
    script.start(__file__, args)
    for name in ("meta.json", checkpoints.TAG, "config.json"):
        if not (args.checkpoint / name).exists():
            raise script.UserError(
                f"{args.checkpoint} is no checkpoint of train_deepspeed.py ({name} is missing); give one"
            )
    if reason := sharded.fault(args.checkpoint):
        raise script.UserError(f"{args.checkpoint} is corrupt ({reason}); take another one")
    if args.folder.exists():
        raise script.UserError(f"{args.folder} is there already; give a new one")
    zero_peers.library(torch.device("cpu"))  # its classes are in the files
    config = transformers.AutoConfig.from_pretrained(args.checkpoint)
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.dtype = torch.float32
    tokenizer = lm.load_tokenizer(args.tokenizer) if args.tokenizer else None
    cpu = torch.device("cpu")
    before = profiling.memory(cpu).current
    profiling.reset_peak_memory(cpu)
    try:
        tensors = stored_parameters(args.checkpoint / checkpoints.TAG)
        total = export.write_folder(args.folder, config, tokenizer, tensors, int(args.file_mib * 2**20))
    except OSError as error:
        raise script.UserError(f"cannot write {args.folder} ({error.strerror}); give another folder") from None
    peak = profiling.memory(cpu).peak - before
    result = {
        "parameters": lm.parameter_count(config),
        "weights_gib": total / 2**30,
        "peak_memory_gib": peak / 2**30,
        "files": len(list(args.folder.glob("*.safetensors"))),
    }
    if args.compare:
        with contextlib.chdir(process.ROOT):
            result |= compare(args.checkpoint.resolve(), args.file_mib, args.timeout_s)
    return result


if __name__ == "__main__":
    script.run(main)
