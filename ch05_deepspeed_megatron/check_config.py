"""What does this DeepSpeed config say, line by line, and is it right? Asked of DeepSpeed, before a rank starts.

You learn   what each line does and what "auto" becomes; that DeepSpeed passes over a misspelt key in most sections
Laptop      python -m ch05_deepspeed_megatron.check_config ch05_deepspeed_megatron/configs/zero3.json
GPU node    python -m ch05_deepspeed_megatron.check_config FILE --ranks 8 --preset 8b --batch-size 2 --seq-len 4096
Cluster     the same with the cluster's number of ranks, before sbatch
You see     the file with its meaning beside each line; for a wrong one a line that names the key, and exit code 2
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ch01_intro import training
from ch05_deepspeed_megatron import ds_config, engine
from common import dist, lm, script

EXPLAINED = Path(__file__).with_name("explained.toml")
WIDTH = 58  # of the file's own part of a line


def explanations() -> dict[str, str]:
    """What each key does, by its dotted name."""
    return tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))


def annotated(
    settings: Mapping[str, Any], filled: Mapping[str, Any], known: Mapping[str, str], where: str = ""
) -> Iterator[str]:
    """The file's lines with their meanings, what "auto" became in its place."""
    indent = "  " * (where.count(".") + 1)
    for key, value in settings.items():
        name = f"{where}{key}"
        meaning = known.get(name, "see deepspeed.ai/docs/config-json")
        if isinstance(value, dict):
            yield f"{indent}{json.dumps(key)}: {{".ljust(WIDTH) + f"  {meaning}"
            yield from annotated(value, filled[key], known, f"{name}.")
            yield f"{indent}}}"
        else:
            shown = json.dumps(filled[key]) + (" (auto)" if value == ds_config.AUTO else "")
            yield f"{indent}{json.dumps(key)}: {shown}".ljust(WIDTH) + f"  {meaning}"


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ranks", type=script.at_least(1), default=2)
    parser.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)} or a model folder, for its width")
    parser.add_argument("--batch-size", type=script.at_least(1), default=4, help="sequences a rank and pass")
    parser.add_argument("--global-batch", type=script.at_least(1), help="sequences a step (default: one pass a rank)")
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--dtype", choices=("auto", *training.DTYPES), default="auto")
    parser.add_argument("--nvme-dir", type=Path)
    args = parser.parse_args(argv)
    script.start(__file__, args)
    device = dist.pick_device(args.device, dist.read_launch())
    known = ds_config.known_by(
        ranks=args.ranks, global_batch=args.global_batch or args.ranks * args.batch_size, micro_batch=args.batch_size,
        clip=1.0, lr=2e-3, hidden=lm.config(args.preset, args.seq_len).hidden_size,
        dtype=training.compute_dtype(args.dtype, device), nvme=args.nvme_dir,
    )  # fmt: skip
    settings = ds_config.prepare(args.file, known, args.ranks)
    print("\n".join(["{", *annotated(ds_config.read(args.file), settings, explanations()), "}"]))
    return {
        "stage": engine.stage_of(settings),
        "offload": {what: engine.device_of(settings, what) for what in ("optimizer", "param")},
        "ranks": args.ranks,
        "accumulation": known["gradient_accumulation_steps"],
    }


if __name__ == "__main__":
    script.run(main)
