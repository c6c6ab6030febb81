"""One rank of a training script in a pod: the script itself, and a failure if it left before its last step.

    python -m ch08_kubernetes.training.rank SCRIPT FLAGS            (agent.sh starts it under torchrun)

When one pod is told to stop, the ranks of all pods save at the same step and leave in good order, with exit code 0.
An Indexed Job would then count every index as done. Here a run that was preempted ends with 1, but in the pod that was
told (agent.sh says so by the file TOLD_TO_LEAVE): torchrun in the pods that stay starts the ranks again, which meet the
replaced pod and go on from the checkpoint.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from common import script


def main(argv: list[str] | None = None) -> dict:
    """The script's own result.

    Raises:
        UserError: there is no such script.
        CheckFailed: it has saved and left, as another pod was told to.
    """
    name, *flags = argv if argv is not None else sys.argv[1:] or [""]
    path = Path(name)
    if path.suffix != ".py" or path.is_absolute() or not path.is_file():
        raise script.UserError(f"there is no script {name!r} in {Path.cwd()}; name one like ch03_ddp/train_ddp.py")
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    result: dict = module.main(flags)
    told = os.environ.get("TOLD_TO_LEAVE")
    if result.get("preempted") and not (told and Path(told).exists()):
        raise script.CheckFailed("another pod was told to stop; saved, and to be started again", result)
    return result


if __name__ == "__main__":
    script.run(main)
