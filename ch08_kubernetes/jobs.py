"""Training jobs from the command line: submit, watch, logs, list, cancel.

You learn   what a job's life looks like in the API: pods by phase, the rank that all wait for, restarts, its end
Laptop      python -m ch08_kubernetes.jobs demo           (on a local cluster: one job that ends, one that waits)
            python -m ch08_kubernetes.jobs submit --overlay 8xh100 --nodes 4 --dry-run -- ch04_fsdp/train_fsdp.py
Cluster     python -m ch08_kubernetes.jobs submit --overlay 8xh100 --name llama --nodes 4 -- ch04_fsdp/train_fsdp.py
            python -m ch08_kubernetes.jobs watch llama; python -m ch08_kubernetes.jobs logs llama --follow
You see     a line when something changes, the doctor's finding if nothing does, and an exit code: 0 if the job
            completed, 1 if it failed, 2 for a mistake
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import yaml
from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes import job_logs, job_spec
from ch08_kubernetes.cluster import target
from ch08_kubernetes.cluster.apply import apply
from ch08_kubernetes.cluster.rest import Json, as_user_error, call, find, get
from ch08_kubernetes.doctor import read
from ch08_kubernetes.doctor.diagnosis import diagnose
from ch08_kubernetes.doctor.facts import (
    Facts,
    at,
    condition,
    is_gpu,
    labels,
    name,
    namespace,
    number,
    phase,
    ref,
    requests,
    statuses,
    table,
    text,
)
from ch08_kubernetes.doctor.findings import concerning, lines
from ch08_kubernetes.doctor.gangs import ranks, state
from ch08_kubernetes.doctor.workloads import finished
from common import script

NOT_INDEXED = (
    "this server has no Indexed Jobs (1.21 and newer have): pods get no index and no host name, so "
    "{name}-0.{name} does not resolve and the ranks do not meet; ranks are shown by order of creation"
)


def job_path(space: str, called: str) -> str:
    return f"/apis/batch/v1/namespaces/{space}/jobs/{called}"


def job_of(api: ApiClient, space: str, called: str) -> Json:
    """
    Raises:
        UserError: there is none.
    """
    found = find(api, job_path(space, called))
    if found is None:
        raise script.UserError(f"there is no job {called} in namespace {space}; see: jobs list -n {space}, or -A")
    return {**found, "kind": "Job"}


def pods_of(api: ApiClient, job: Json) -> list[Json]:
    """Its pods, the oldest first."""
    query = {"labelSelector": f"controller-uid={text(job, 'metadata', 'uid')}"}
    found = get(api, f"/api/v1/namespaces/{namespace(job)}/pods", **query)["items"]
    return sorted(
        ({**pod, "kind": "Pod"} for pod in found), key=lambda p: (text(p, "metadata", "creationTimestamp"), name(p))
    )


def submit(api: ApiClient, objects: list[Json]) -> Iterator[str]:
    """Send a job's objects; what the server made of them.

    Raises:
        UserError: the job is there already, or the server refuses an object.
    """
    job = next(body for body in objects if body["kind"] == "Job")
    space, called = namespace(job), name(job)
    if find(api, job_path(space, called)):
        raise script.UserError(
            f"job {called} is in namespace {space} already; jobs cancel {called}, or take another --name"
        )
    report = apply(api, objects)
    yield str(report)
    if any("completionMode" in fields for lost in report.dropped.values() for fields in lost):
        yield f"note: {NOT_INDEXED.format(name=called)}"


def progress(job: Json, pods: list[Json]) -> str:
    """A job's state in a line: pods by phase, ranks that are not there, restarts."""
    phases = Counter(phase(pod) or "Pending" for pod in pods)
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(phases.items())) or "no pods"
    parts = [f"pods: {shown}"]
    total = number(job, "spec", "completions") or number(job, "spec", "parallelism") or 1
    of_rank = ranks(job, pods)
    fine = ("Running", "Succeeded")
    waits = [r for r in range(total) if r not in of_rank or phase(of_rank[r]) not in fine]
    if waits and not finished(job):
        each = [f"{r} ({state(of_rank[r]) if r in of_rank else 'no pod'})" for r in waits[:6]]
        parts.append(f"waiting for rank {', '.join(each)}" + (f" and {len(waits) - 6} more" if len(waits) > 6 else ""))
    restarts = sum(number(s, "restartCount") for pod in pods for s in statuses(pod)) + number(job, "status", "failed")
    return "; ".join([*parts, *([f"restarts: {restarts}"] if restarts else [])])


def outcome(job: Json, pods: list[Json]) -> dict[str, Any]:
    """How it ended: completed or not, the reason, exit codes of its containers."""
    failed = condition(job, "Failed")
    codes = sorted(
        {
            number(s, "state", "terminated", "exitCode")
            for p in pods
            for s in statuses(p)
            if at(s, "state", "terminated")
        }
    )
    completed = condition(job, "Complete").get("status") == "True"
    done, pods_failed = number(job, "status", "succeeded"), number(job, "status", "failed")
    reason = "" if completed else text(failed, "reason")
    return {
        "job": name(job),
        "completed": completed,
        "reason": reason,
        "succeeded": done,
        "failed_pods": pods_failed,
        "exit_codes": codes,
    }


def watch(
    api: ApiClient,
    space: str,
    called: str,
    *,
    stuck_s: float = 20,
    timeout_s: float = 86400,
    every_s: float = 1,
    until_stuck: bool = False,
) -> dict[str, Any]:
    """Print what changes until the job has ended; the doctor's findings when nothing changed for stuck_s.

    Args:
        until_stuck: return at the first finding.

    Raises:
        UserError: there is no such job, it was deleted, or it has not ended in time.
    """
    started = changed = time.monotonic()
    last, told = "", None
    while True:
        job = job_of(api, space, called)
        pods = pods_of(api, job)
        said, now = progress(job, pods), time.monotonic()
        if said != last:
            print(f"{datetime.now():%H:%M:%S}  {said}", flush=True)
            last, changed = said, now
        if finished(job):
            return outcome(job, pods)
        if now - changed > stuck_s:
            findings = why(api, job, pods)
            causes = [finding.cause for finding in findings]
            if causes and causes != told:
                print(f"it has not changed for {stuck_s:g} s; the doctor says:", *lines(findings), sep="\n", flush=True)
                told = causes
                if until_stuck:
                    return {"job": called, "completed": False, "causes": causes}
        if now - started > timeout_s:
            raise script.UserError(
                f"job {called} has not ended after {timeout_s:g} s ({said}); see: python -m "
                f"ch08_kubernetes.doctor -n {space} --job {called}"
            )
        time.sleep(every_s)


def why(api: ApiClient, job: Json, pods: list[Json]) -> list[Any]:
    """The doctor's findings on a job and its pods, with their causes."""
    findings = diagnose(read.take(api, namespace(job)).objects, datetime.now(UTC))
    return concerning(findings, {ref(job), *(ref(pod) for pod in pods)})


def listing(api: ApiClient, space: str | None) -> Iterator[str]:
    """A line for each job."""
    where = f"/namespaces/{space}" if space else ""
    facts = Facts({**body, "kind": "Job"} for body in get(api, f"/apis/batch/v1{where}/jobs")["items"])
    yield (
        f"{'namespace':16} {'job':24} {'team':12} {'pods':>4} {'GPUs':>5} {'active':>6} "
        f"{'done':>5} {'failed':>6}  state"
    )
    for job in facts.all("Job"):
        total = number(job, "spec", "completions") or number(job, "spec", "parallelism")
        gpus = total * sum(int(v) for k, v in requests(table(job, "spec", "template")).items() if is_gpu(k))
        ended = next((kind for kind in ("Complete", "Failed") if condition(job, kind).get("status") == "True"), "")
        held = "Suspended" if at(job, "spec", "suspend") else "Active"
        counts = [number(job, "status", part) for part in ("active", "succeeded", "failed")]
        yield (
            f"{namespace(job):16} {name(job):24} {labels(job).get('team', '-'):12} {total:>4} {gpus:>5} {counts[0]:>6} "
            f"{counts[1]:>5} {counts[2]:>6}  {ended or held}"
        )


def cancel(api: ApiClient, space: str, called: str, timeout_s: float = 300) -> str:
    """Delete a job, wait until its pods have saved and gone, and delete the service of its rendezvous.

    Raises:
        UserError: there is none, or its pods do not go.
    """
    job = job_of(api, space, called)
    call(api, "DELETE", job_path(space, called), query={"propagationPolicy": "Background"})
    deadline = time.monotonic() + timeout_s
    while pods := pods_of(api, job):
        if time.monotonic() > deadline:
            raise script.UserError(
                f"{len(pods)} pods of {called} are there after {timeout_s:g} s; see: python -m "
                f"ch08_kubernetes.doctor -n {space}"
            )
        time.sleep(0.2)
    service = f"/api/v1/namespaces/{space}/services/{called}"
    domain = text(job, "spec", "template", "spec", "subdomain")
    if domain == called and find(api, service):
        call(api, "DELETE", service)
    return f"job {called} is gone, and its pods with it"


def parse_args(argv: list[str] | None):  # type: ignore[no-untyped-def]
    made = script.parser(__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    each = {key: commands.add_parser(key) for key in ("submit", "watch", "logs", "list", "cancel", "demo")}
    for key in ("watch", "logs", "cancel"):
        each[key].add_argument("name", help="of the job")
    for key in ("submit", "watch", "logs", "list", "cancel"):
        each[key].add_argument("-n", "--namespace", default="training")
        target.add_flags(each[key])
    each["submit"].add_argument("--overlay", default="single-gpu", help="dev, single-gpu, 8xh100 or rdma")
    each["submit"].add_argument("--name", default=job_spec.OLD)
    each["submit"].add_argument("--nodes", type=script.at_least(1), help="pods")
    each["submit"].add_argument("--gpus", type=script.at_least(0), help="of each pod")
    each["submit"].add_argument("--image")
    each["submit"].add_argument("--team", help="a label, which the inventory counts by")
    each["submit"].add_argument("--dry-run", action="store_true", help="print the YAML, and ask no cluster")
    each["submit"].add_argument("script", nargs="*", metavar="-- SCRIPT ARGS", help="instead of the overlay's")
    each["watch"].add_argument("--stuck-s", type=script.positive, default=20, help="then the doctor is asked")
    each["watch"].add_argument("--timeout-s", type=script.positive, default=86400)
    each["logs"].add_argument("--follow", "-f", action="store_true", help="until the job has ended")
    each["logs"].add_argument("--tail", type=script.at_least(0), help="only the last lines of each rank")
    each["list"].add_argument("-A", "--all-namespaces", action="store_true")
    return made.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.command == "demo":
        from ch08_kubernetes import job_demo

        return job_demo.demo()
    if args.command == "submit":
        wish = job_spec.Wish(args.name, args.namespace, args.nodes, args.gpus, args.image, args.team, args.script)
        objects = job_spec.made(args.overlay, wish)
        if args.dry_run:
            print(yaml.safe_dump_all(objects, sort_keys=False), end="")
            return {"objects": len(objects)}
    api = target.connect(args).api
    try:
        if args.command == "submit":
            print(*submit(api, objects), sep="\n")
            return {"job": args.name, "objects": len(objects)}
        if args.command == "watch":
            return ended(watch(api, args.namespace, args.name, stuck_s=args.stuck_s, timeout_s=args.timeout_s))
        if args.command == "logs":
            words = {"follow": args.follow, "tail": args.tail, "out": sys.stdout}
            return ended(job_logs.logs(api, args.namespace, args.name, **words))
        if args.command == "cancel":
            print(cancel(api, args.namespace, args.name))
            return {"cancelled": args.name}
        found = list(listing(api, None if args.all_namespaces else args.namespace))
        print(*found, sep="\n")
        return {"jobs": len(found) - 1}
    except (ApiException, HTTPError) as error:
        raise as_user_error(error, api.configuration.host) from None


def ended(result: dict[str, Any]) -> dict[str, Any]:
    """Raises CheckFailed (exit code 1) for a job that failed."""
    if result.get("reason"):
        raise script.CheckFailed(f"job {result['job']} failed: {result['reason']}", result)
    return result


if __name__ == "__main__":
    script.run(main)
