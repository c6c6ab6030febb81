"""From a sharded checkpoint to one Hugging Face folder, tensor by tensor: what every other tool reads.

You learn   why the last step of a large training job is not `model.save_pretrained`: it would need the whole model in
            one memory; how a sharded checkpoint is read by a process that has neither the ranks nor a GPU
Laptop      torchrun --standalone --nproc-per-node=2 ch04_fsdp/train_fsdp.py --steps 20 --out /tmp/run
            python ch04_fsdp/export.py /tmp/run/checkpoints/step-00000020 /tmp/exported
GPU node    the same: it needs no GPU
Cluster     the same, on any host that sees the folder
You see     the folder's size and the most memory that it took: about one file's tensors, not a model's
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ch04_fsdp import checkpoints, weights
from common import lm, profiling, script
from common.dist import Context
from common.logs import get_logger

log = get_logger()
FILE_BYTES = 2 * 2**30  # as others write them: a file is what a reader has in memory at a time


def write_folder(
    folder: Path, config: Any, tokenizer: Any, tensors: Iterable[tuple[str, torch.Tensor]], file_bytes: int = FILE_BYTES
) -> int:
    """A Hugging Face folder of the tensors, in files of at most `file_bytes`. It appears only when complete.

    Returns:
        The bytes of all tensors.

    Raises:
        UserError: the disk is full.
    """
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    for left_by_a_kill in (partial, old):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    partial.mkdir(parents=True)
    waiting: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []
    total = 0

    def flush() -> None:
        if waiting:
            try:
                save_file(waiting, partial / f"part-{len(files):05d}", metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk, which is no OSError here
                shutil.rmtree(partial, ignore_errors=True)
                raise script.UserError(f"cannot write {folder} ({error}); make room or give another folder") from None
            files.append(list(waiting))
            waiting.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if sum(t.numel() * t.element_size() for t in waiting.values()) + size > file_bytes:
            flush()
        waiting[name] = tensor.cpu().contiguous()
        total += size
    flush()
    names = (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    )
    for number, name in enumerate(names):
        (partial / f"part-{number:05d}").rename(partial / name)
    if len(files) > 1:
        where = {tensor: name for name, held in zip(names, files, strict=True) for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    config.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    lm.appear(partial, folder, old)
    return total


def export(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    ctx: Context,
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> None:
    """The same of a model in training. A collective: rank 0 writes, all take part in gathering one tensor at a time.

    Args:
        tensors: name and whole value of each parameter, gathered as the iteration comes to it (default: of FSDP).
    """
    tensors = weights.whole_parameters(model) if tensors is None else tensors
    if ctx.is_main:
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        write_folder(folder, model.config, tokenizer, tensors)
        log.info("saved the model", folder=folder)
    else:
        for _ in tensors:
            pass
    ctx.barrier("model saved")


def stored_parameters(checkpoint: Path, *, tied: bool = False) -> Iterable[tuple[str, torch.Tensor]]:
    """Name and whole value of each parameter in a sharded checkpoint, one after another, by a single process.

    Args:
        tied: the head is the embedding, which the checkpoint holds under both names.
    """
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    twice = {"model.lm_head.weight"} if tied else set()
    for key in sorted(key for key in metadata.keys() - twice if key.startswith("model.")):
        stored = metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        state = {key: torch.empty(stored.size, dtype=stored.properties.dtype)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
        yield key.removeprefix("model."), state[key]


def main(argv: list[str] | None = None) -> dict:
    import transformers

    parser = script.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a folder step-NNNNNNNN that train_fsdp.py has written")
    parser.add_argument("folder", type=Path, help="the Hugging Face folder to make")
    parser.add_argument("--tokenizer", help="a folder or hub id whose tokenizer goes with it (default: none)")
    parser.add_argument("--file-mib", type=script.positive, default=FILE_BYTES / 2**20, help="largest file")
    args = parser.parse_args(argv)
    script.start(__file__, args)
    for name in ("meta.json", ".metadata", "config.json"):
        if not (args.checkpoint / name).exists():
            raise script.UserError(f"{args.checkpoint} is not a sharded checkpoint ({name} is missing); give one")
    if reason := checkpoints.fault(args.checkpoint):
        raise script.UserError(f"{args.checkpoint} is corrupt ({reason}); export another one")
    if args.folder.exists():
        raise script.UserError(f"{args.folder} is there already; give a new one")
    config = transformers.AutoConfig.from_pretrained(args.checkpoint)
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    tokenizer = lm.load_tokenizer(args.tokenizer) if args.tokenizer else None
    before = profiling.memory(torch.device("cpu")).current
    profiling.reset_peak_memory(torch.device("cpu"))
    try:
        total = write_folder(
            args.folder,
            config,
            tokenizer,
            stored_parameters(args.checkpoint, tied=config.tie_word_embeddings),
            int(args.file_mib * 2**20),
        )
    except OSError as error:
        raise script.UserError(f"cannot write {args.folder} ({error.strerror}); give another folder") from None
    peak = profiling.memory(torch.device("cpu")).peak - before
    return {
        "parameters": lm.parameter_count(config),
        "weights_gib": total / 2**30,
        "peak_memory_gib": peak / 2**30,
        "files": len(list(args.folder.glob("*.safetensors"))),
    }


if __name__ == "__main__":
    script.run(main)
