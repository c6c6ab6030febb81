"""The logs of all ranks of a job, merged, each line with its rank; pods that come later join in."""

from __future__ import annotations

import threading
import time
from typing import IO, Any

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes.cluster.rest import Json, reason_of
from ch08_kubernetes.doctor.facts import containers, name, namespace, phase, text
from ch08_kubernetes.doctor.gangs import ranks
from ch08_kubernetes.doctor.workloads import finished

IDLE_S = 600  # a follower asks again when its pod has printed nothing for so long


class Printer:
    """Whole lines, from several threads."""

    def __init__(self, out: IO[str]) -> None:
        self.out, self.lock, self.count = out, threading.Lock(), 0

    def line(self, prefix: str, line: str) -> None:
        with self.lock:
            self.count += 1
            print(f"{prefix}{line}", file=self.out, flush=True)


def follow_pod(api: ApiClient, pod: Json, prefix: str, printer: Printer, *, follow: bool, tail: int | None) -> None:
    """Print a pod's log as it comes, until it ends. A line that says why, if there is none."""
    query = {"container": text(containers(pod)[:1], 0, "name"), "follow": str(follow).lower()}
    query |= {} if tail is None else {"tailLines": str(tail)}
    path = f"/api/v1/namespaces/{namespace(pod)}/pods/{name(pod)}/log"
    try:
        answer = api.call_api(
            path,
            "GET",
            query_params=list(query.items()),
            auth_settings=["BearerToken"],
            header_params={"Accept": "*/*"},
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=(30, IDLE_S),
        )
        rest = b""
        while chunk := answer.read1(2**16):  # what is there, whether the server sends in chunks or not
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                printer.line(prefix, line.decode("utf-8", "replace"))
        if rest:
            printer.line(prefix, rest.decode("utf-8", "replace"))
    except ApiException as error:
        printer.line(prefix, f"(no log: {reason_of(error)})")
    except HTTPError as error:
        printer.line(prefix, f"(the log broke off: {type(error).__name__})")


def logs(
    api: ApiClient, space: str, called: str, *, follow: bool, tail: int | None, out: IO[str], every_s: float = 1
) -> dict[str, Any]:
    """Print the logs of all ranks; with follow, until the job has ended.

    Raises:
        UserError: there is no such job.
    """
    from ch08_kubernetes.jobs import job_of, outcome, pods_of

    printer, threads = Printer(out), {}
    while True:
        job = job_of(api, space, called)
        pods = pods_of(api, job)
        number_of = {name(pod): rank for rank, pod in ranks(job, pods).items()}
        for pod in pods:
            if name(pod) not in threads and phase(pod) in ("Running", "Succeeded", "Failed"):
                prefix = f"[rank {number_of[name(pod)]}] " if name(pod) in number_of else f"[{name(pod)}] "
                given = {"follow": follow, "tail": tail}
                threads[name(pod)] = threading.Thread(
                    target=follow_pod, args=(api, pod, prefix, printer), kwargs=given, daemon=True
                )
                threads[name(pod)].start()
        if finished(job) or not follow:
            break
        time.sleep(every_s)
    for thread in threads.values():
        thread.join()
    return outcome(job, pods) | {"pods": len(threads), "lines": printer.count}
