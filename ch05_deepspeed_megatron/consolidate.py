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
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ch04_fsdp import checkpoints as sharded
from ch04_fsdp import export, weights, zero_peers
from ch05_deepspeed_megatron import checkpoints, zero_files
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
        tensors = zero_files.parameters(args.checkpoint / checkpoints.TAG)
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
