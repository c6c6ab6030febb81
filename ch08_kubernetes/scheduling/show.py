"""Scheduling, shown: eleven cases on the real scheduler with fake GPU nodes, what each must give, and what it gave.

You learn   what labels, taints, quotas, priorities, profiles, gangs and budgets do, each by its own small experiment
Laptop      python -m ch08_kubernetes.scheduling.show                         (make setup-kube first)
            python -m ch08_kubernetes.scheduling.show gang drain
GPU node    the same: the nodes are fake, and the scheduler is the real one
Cluster     the same; on yours apply the manifests beside this file, and look with inventory.py
You see     a line for each case: as it must be, or what came instead
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from ch08_kubernetes.cluster.local import LocalCluster
from ch08_kubernetes.scheduling.cases import CASES
from common import script


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all if none is named")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - set(CASES):
        raise script.UserError(f"there is no case {sorted(unknown)[0]!r}; take some of {', '.join(CASES)}")
    chosen = args.cases or list(CASES)
    right = 0
    # A node without a kubelet stays ready as long as the controller is patient.
    patient = {"node-monitor-grace-period": "30m", "node-startup-grace-period": "30m"}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(Path(folder) / "cluster", controller_manager_options=patient) as cluster,
    ):
        for name in chosen:
            expected, found = CASES[name](cluster)
            right += expected == found
            verdict = "ok" if expected == found else f"WRONG: {found}, not {expected}"
            print(f"{name:<20} {verdict:<4} {(CASES[name].__doc__ or '').strip()}", flush=True)
    result = {"cases": len(chosen), "right": right}
    if right < len(chosen):
        raise script.CheckFailed(f"{len(chosen) - right} cases came out otherwise; see the lines above", result)
    return result


if __name__ == "__main__":
    script.run(main)
