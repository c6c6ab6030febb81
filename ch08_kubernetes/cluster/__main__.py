"""One command for a cluster to learn on, whatever this machine has. No root.

python -m ch08_kubernetes.cluster up        a cluster with 52 fake GPUs, until Ctrl-C: in Docker with kind where that
                                            is there, else the control plane of `make setup-kube`; with --kubeconfig,
                                            --context or KUBECONFIG it checks yours and starts nothing
python -m ch08_kubernetes.cluster status    which cluster commands mean, its version, nodes and GPUs
python -m ch08_kubernetes.cluster apply ch08_kubernetes/scheduling/quotas.yaml
                                            as kubectl apply; an old server gets what it knows, the rest is named
eval "$(python -m ch08_kubernetes.cluster env)"    lets kubectl mean the cluster of `up`
python -m ch08_kubernetes.cluster down      ends it from another terminal
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes.cluster import apply, target, up
from ch08_kubernetes.cluster.nodes import FLEET
from ch08_kubernetes.cluster.rest import as_user_error, get
from ch08_kubernetes.doctor.facts import condition
from common.script import UserError


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "up" and not target.pointed_at(args):
        up.up(args.folder, [] if args.no_nodes else FLEET, args.port, args.local)
        return
    if args.command == "down":
        print(up.down(args.folder))
        return
    found = target.connect(args, args.folder)
    try:
        if args.command in ("up", "status"):
            status(found)
            if args.command == "up":
                print("it is yours, and runs already: nothing was started")
        elif args.command == "env":
            if found.kubeconfig is None:
                raise UserError("inside a pod kubectl finds the cluster by itself; run it without KUBECONFIG")
            paths = (os.path.abspath(part) for part in str(found.kubeconfig).split(os.pathsep))
            print(f"export KUBECONFIG={os.pathsep.join(paths)}")
        else:
            how = {"namespace": args.namespace, "dry_run": args.dry_run, "define": found.ours}
            print(apply.apply(found.api, args.manifests, **how))
    except (ApiException, HTTPError) as error:
        raise as_user_error(error, found.url) from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        prog="python -m ch08_kubernetes.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True)
    each = {name: commands.add_parser(name) for name in ("up", "down", "status", "apply", "env")}
    for command in each.values():
        command.add_argument(
            "--folder", type=Path, default=target.FOLDER, help="of the cluster that `up` starts (one a checkout)"
        )
    for name in ("up", "status", "apply", "env"):
        target.add_flags(each[name])
    each["up"].add_argument(
        "--local", action="store_true", help="the control plane on this machine, also where kind is"
    )
    each["up"].add_argument("--port", type=int, help="of the local API server (default: a free one)")
    each["up"].add_argument("--no-nodes", action="store_true", help="without the fake nodes")
    each["apply"].add_argument(
        "manifests", nargs="+", type=Path, help="files, or folders (a kustomization is rendered)"
    )
    each["apply"].add_argument("--namespace", "-n", default="default", help="of objects that name none")
    each["apply"].add_argument("--dry-run", action="store_true", help="let the server check, and keep nothing")
    return made.parse_args(argv)


def status(found: target.Target) -> None:
    """Version, address, and the nodes with their GPUs."""
    print(f"Kubernetes {found.version} at {found.url} ({found.origin})")
    nodes = get(found.api, "/api/v1/nodes")["items"]
    ready = [n for n in nodes if condition(n, "Ready").get("status") == "True"]
    print(f"{len(ready)} of {len(nodes)} nodes ready")
    gpus: Counter[str] = Counter()
    holders: Counter[str] = Counter()
    for node in ready:
        if count := int(node["status"].get("allocatable", {}).get("nvidia.com/gpu", 0)):
            product = node["metadata"].get("labels", {}).get("nvidia.com/gpu.product", "unlabelled")
            gpus[product] += count
            holders[product] += 1
    for product, count in gpus.most_common():
        print(f"  {count:4} x {product} on {holders[product]} nodes")
    if not gpus:
        print("  no node offers nvidia.com/gpu: is the device plugin there? (ch08_kubernetes/setup)")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ended", flush=True)
        sys.exit(130)
