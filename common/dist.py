"""One way into torch.distributed: the same script under plain python, torchrun and srun, on CPUs and on GPUs.

    with dist.session(args.device) as ctx:
        model.to(ctx.device)
        ctx.barrier("checkpoint written")

The session finds its rank, binds the device, meets the other ranks with a timeout whose error names the ones that are
missing, and takes the process group down again without hanging, also when this or another rank failed.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common import script
from common.logs import get_logger
from common.script import UserError, usable_cores

log = get_logger()
STUCK_HINT = "look at its own log: it failed, is stuck elsewhere (py-spy dump --pid PID shows where), or is much slower"
_closed: list[Any] = []  # process groups of sessions that are over, see _leave
FAILED = "failed"  # key under which a rank that leaves with an error says so: the others need not wait for it
EVERYONE = "everyone"  # set under a meeting's key by the last who comes
LOST_PEER = re.compile(r"gloo/transport|Connection (closed|reset) by peer|ncclRemoteError|ncclSystemError")
LOST_HINT = "that rank ended or the network failed: look at the log of the first that did"
NETWORK_HINT = (
    "check that every node was started, that MASTER_ADDR and MASTER_PORT are the same everywhere and reachable "
    "(firewall), that all nodes agree on the world size, and the interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
)


@dataclass(frozen=True)
class Launch:
    """What the launcher said. world_size counts processes over all nodes, local_* those on this node."""

    launcher: str
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500


def read_launch(env: dict[str, str] | None = None) -> Launch:
    """Read torchrun's variables, else srun's, else one plain process.

    Raises:
        UserError: a variable is missing, is not a number, or contradicts another.
    """
    env = dict(os.environ) if env is None else env
    if "RANK" in env or "WORLD_SIZE" in env:
        names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
        launcher = "torchrun"
        address, port = env.get("MASTER_ADDR", "127.0.0.1"), env.get("MASTER_PORT", "29500")
        # Started by hand or by an operator that sets the global variables only: on one host all ranks are local ones,
        # with a master elsewhere there is one a node.
        one_host = address in ("127.0.0.1", "localhost", "::1")
        defaults = {"LOCAL_RANK": env.get("RANK", "0") if one_host else "0"}
        everywhere = env.get("WORLD_SIZE", "1") if one_host or "LOCAL_RANK" in env else "1"
        local_world = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or everywhere  # the latter by `deepspeed`
    elif "SLURM_STEP_NUM_TASKS" in env:  # set by srun for its tasks, and not in a batch script itself
        names = {"rank": "SLURM_PROCID", "world_size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}
        defaults = {}
        launcher = "srun"
        # "2(x3),1": tasks per node, in node order
        per_node = _expand_slurm_counts(env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]))
        node = _whole_number(env, "SLURM_NODEID", "0")
        if node >= len(per_node):
            raise UserError(f"SLURM_NODEID is {node}, but the step has {len(per_node)} nodes; start it with srun")
        local_world = str(per_node[node])
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        address = env.get("MASTER_ADDR") or first_slurm_host(nodes)
        # one port a job, the same on all nodes, away from the ports that others on a shared node would pick
        port = env.get("MASTER_PORT") or str(20000 + _whole_number(env, "SLURM_JOB_ID", "0") % 10000)
    else:
        return Launch("python")
    values = {key: _whole_number(env, name, defaults.get(name, "")) for key, name in names.items()}
    if not local_world.isdecimal() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"LOCAL_WORLD_SIZE {local_world!r} or MASTER_PORT {port!r} is not such a number; set it right")
    launch = Launch(launcher, local_world_size=int(local_world), address=address, port=int(port), **values)
    if launch.rank >= launch.world_size:
        raise UserError(f"rank {launch.rank} does not exist in a world of {launch.world_size}; ranks start at 0")
    if not launch.local_rank < launch.local_world_size <= launch.world_size:
        raise UserError(
            f"local rank {launch.local_rank} of {launch.local_world_size} on this node does not fit a world of "
            f"{launch.world_size}; let torchrun or srun set LOCAL_RANK and LOCAL_WORLD_SIZE, or unset them"
        )
    return launch


def _whole_number(env: dict[str, str], name: str, default: str) -> int:
    text = env.get(name, default)
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, not a number; start the script with torchrun or srun, or unset it")
    return int(text)


def _expand_slurm_counts(text: str) -> list[int]:
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, not like '2(x3),1'; start the script with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_slurm_host(nodes: str) -> str:
    """First host of a Slurm node list: gpu[003-007,9],login -> gpu003."""
    match = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0]) if match else nodes


@dataclass(frozen=True)
class Context:
    """This rank's place in the job. Collectives go through torch.distributed itself."""

    launch: Launch
    device: torch.device
    backend: str
    store: Store
    timeout_s: float
    _calls: dict[str, int] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def local_rank(self) -> int:
        return self.launch.local_rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self, label: str) -> None:
        """Wait for all ranks. Through the store, so that the timeout can name the ranks that did not come.

        Raises:
            UserError: a rank did not arrive within the session's timeout, or left the session with an error.
        """
        number = self._calls[label] = self._calls.get(label, 0) + 1
        key, what = f"barrier/{label}/{number}", f"the barrier {label!r}"
        _meet(self.store, key, self.launch, self.timeout_s, what, alarm=FAILED)

    def exchange(self, label: str, said: str) -> list[str]:
        """Everybody's word, in rank order. Needs no collective, so it can compare ranks before one that might hang.

        Raises:
            UserError: a rank did not arrive within the session's timeout, or left the session with an error.
        """
        number = self._calls[label] = self._calls.get(label, 0) + 1
        key = f"exchange/{label}/{number}"
        self.store.set(f"{key}/said/{self.rank}", said)
        _meet(self.store, key, self.launch, self.timeout_s, repr(label), alarm=FAILED)
        return [self.store.get(f"{key}/said/{rank}").decode() for rank in range(self.world_size)]

    def mesh(self, **sizes: int) -> DeviceMesh:
        """A named device mesh, outermost dimension first: ctx.mesh(dp=-1, tp=2). One size may be -1.

        Raises:
            UserError: the sizes do not multiply to the world size.
        """
        known = 1
        for size in sizes.values():
            known *= size if size > 0 else 1
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) == 1 and self.world_size % known == 0:
            sizes[free[0]] = self.world_size // known
            known = self.world_size
        if known != self.world_size or min(sizes.values()) < 1:
            shape = " x ".join(f"{name}={size}" for name, size in sizes.items())
            raise UserError(f"a mesh {shape} does not fill {self.world_size} ranks; the sizes must multiply to it")
        return init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def gather(self, value: object) -> list[Any]:
        """One picklable object a rank, in rank order, on rank 0; an empty list elsewhere."""
        out: list[Any] = [None] * self.world_size if self.is_main else []
        dist.gather_object(value, out if self.is_main else None, dst=0)
        return out


def pick_device(choice: str, launch: Launch) -> torch.device:
    """auto -> this rank's GPU if there is one, else the CPU.

    Raises:
        UserError: cuda was asked for and is not there, or there are fewer GPUs than local ranks.
    """
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("no CUDA device is visible; use --device cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if launch.launcher == "srun" and count == 1:
        return torch.device("cuda", 0)  # --gpus-per-task=1 shows each task its own GPU only
    if launch.local_rank >= count:
        raise UserError(
            f"{launch.local_world_size} processes on this node but {count} GPUs; start one a GPU, or pass --device cpu"
        )
    return torch.device("cuda", launch.local_rank)


def set_threads(launch: Launch, threads: int | None) -> None:
    """Share the cores out among the local ranks, unless OMP_NUM_THREADS says otherwise.

    torchrun itself sets it to 1 for several local ranks, however many cores there are: that is nobody's choice.
    """
    torchrun_default = "TORCHELASTIC_RUN_ID" in os.environ and launch.local_world_size > 1
    chosen_by_user = os.environ.get("OMP_NUM_THREADS") not in (None, "1" if torchrun_default else None)
    if threads is not None or not chosen_by_user:
        torch.set_num_threads(threads or max(1, usable_cores() // launch.local_world_size))


@contextmanager
def session(
    device: str = "auto", *, join_timeout_s: float = 120, timeout_s: float = 600, threads: int | None = None
) -> Iterator[Context]:
    """Join the job, yield the Context, leave.

    Args:
        device: auto, cpu or cuda. CUDA talks NCCL (gloo for CPU tensors), the CPU talks gloo.
        join_timeout_s: how long to wait for the other ranks at the start.
        timeout_s: how long a collective or a barrier may take.
        threads: CPU threads of this rank; None shares the cores out among the local ranks.

    Raises:
        UserError: the ranks did not meet; the line says which are missing and what to check.
    """
    launch = read_launch()
    chosen = pick_device(device, launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # before init: else every rank opens a context on GPU 0
    else:
        set_threads(launch, threads)
    if launch.world_size == launch.local_world_size:  # one node: a host name that resolves elsewhere cannot hurt
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    store = join(launch, join_timeout_s)
    script.leave_at_once = True
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("torch", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"rank {launch.rank} cannot open {backend} ({reason}); {NETWORK_HINT}") from error
    ctx = Context(launch, chosen, backend, store, timeout_s)
    log.info("joined", world_size=launch.world_size, device=chosen, backend=backend, launcher=launch.launcher)
    failed = True
    try:
        yield ctx
        failed = False
    except RuntimeError as error:
        if not LOST_PEER.search(str(error)):
            raise
        what = " ".join(str(error).split())[:160]
        raise UserError(f"rank {launch.rank} lost another rank in a collective ({what}); {LOST_HINT}") from error
    finally:
        _leave(ctx, failed)


def join(launch: Launch, timeout_s: float) -> Store:
    """Meet all ranks at a store on rank 0 (or torchrun's agent).

    Raises:
        UserError: the store cannot be reached or opened, ranks are missing, doubled, or disagree on the world size.
    """
    if launch.launcher == "python":
        return HashStore()
    hosts_store = launch.rank == 0 and not _agent_has_store()
    where = f"{launch.address}:{launch.port}"
    try:
        if (launch.address, launch.port) not in _stores:
            if not hosts_store:
                _await_port(launch, timeout_s)
            _stores[launch.address, launch.port] = TCPStore(
                "127.0.0.1" if hosts_store else launch.address,  # rank 0 need not find the way to itself
                launch.port,
                launch.world_size,
                is_master=hosts_store,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(
                f"port {launch.port} is in use on this host; set another MASTER_PORT or --master-port"
            ) from error
        raise UserError(
            f"rank {launch.rank} cannot reach rank 0 at {where} in {timeout_s:g} s; {NETWORK_HINT}"
        ) from error
    # A restarted worker group shares the agent's store with its predecessor: keep their keys apart. Each agent counts
    # the restarts that it has seen, so a node that comes late needs a store that goes with the workers (elastic.py).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _agent_has_store() else "0"
    prefix = f"attempt{attempt}/{_next_session()}"
    store = PrefixStore(prefix, _stores[launch.address, launch.port])
    store.set_timeout(timedelta(seconds=timeout_s))
    try:
        agreed = store.compare_set("world_size", "", str(launch.world_size)).decode()
        wrong = ""
        if agreed != str(launch.world_size):
            wrong = f"was told a world size of {launch.world_size} on {socket.gethostname()}, others {agreed}"
        elif store.add(f"claimed/{launch.rank}", 1) > 1:
            wrong = f"is claimed by two processes at {where}"
        if wrong:
            why = f"rank {launch.rank} {wrong}; start all alike, each node with its own --node-rank"
            store.set("refused", why)  # those that still wait at the start need not
            raise UserError(why)
        _meet(store, "join", launch, timeout_s, f"the start at {where}", alarm="refused")
    except RuntimeError as error:
        raise UserError(f"rank {launch.rank} lost rank 0 at {where}; look at rank 0's own error") from error
    except UserError:
        # In a job that runs, whoever is refused is a stray: by the word "left" rank 0 would not wait for the true rank.
        with suppress(RuntimeError):
            if not store.check([f"join/{EVERYONE}"]):
                _let_others_read(store, launch, 2)
        raise
    return store


def _agent_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


# Kept to the end of the process: a second session meets at the same port, where rank 0's first store still listens.
_stores: dict[tuple[str, int], Store] = {}
_sessions = 0


def _next_session() -> int:
    global _sessions
    _sessions += 1
    return _sessions


def _await_port(launch: Launch, timeout_s: float) -> None:
    """Wait until rank 0's store accepts connections. TCPStore would wait too, and fill the screen with C++ frames."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=timeout_s).close()
            return
        except OSError as error:
            # a name that is not known yet may become so: the DNS entry of a pod appears after the pod
            if time.monotonic() > deadline - 0.2:
                where = f"{launch.address}:{launch.port}"
                raise UserError(
                    f"rank {launch.rank} cannot reach rank 0 at {where} in {timeout_s:g} s ({error}); {NETWORK_HINT}"
                ) from None
            time.sleep(0.1)


def _meet(store: Store, key: str, launch: Launch, timeout_s: float, what: str, *, alarm: str) -> None:
    """Leave a word under `key` and wait for everybody's, or for somebody's under `alarm`.

    The last to come sets one key that the others poll: store.wait would do, but logs C++ warnings when it times out.
    """
    keys = [f"{key}/{rank}" for rank in range(launch.world_size)]
    everyone = f"{key}/{EVERYONE}"
    deadline, pause = time.monotonic() + timeout_s, 0.001
    try:
        store.set(keys[launch.rank], "here")
        if store.add(f"{key}/count", 1) == launch.world_size:
            store.set(everyone, "here")
        while not store.check([everyone]):
            if store.check([alarm]):
                raise UserError(store.get(alarm).decode())
            if time.monotonic() > deadline:
                missing = [rank for rank, name in enumerate(keys) if not store.check([name])]
                came = launch.world_size - len(missing)
                why = (
                    f"{came} of {launch.world_size} ranks reached {what} in {timeout_s:g} s, missing: rank "
                    f"{compress(missing)}; {NETWORK_HINT if key == 'join' else STUCK_HINT}"
                )
                store.set(alarm, why)
                raise UserError(why)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
    except RuntimeError as error:  # the store's host is gone
        raise UserError(f"rank {launch.rank} lost rank 0 at {what}; look at rank 0's own error") from error


def compress(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _leave(ctx: Context, failed: bool) -> None:
    """Destroy the process group, never waiting more than a few seconds for ranks that will not come."""
    if not dist.is_initialized():
        return
    if failed:
        # Peers may wait in a collective or a barrier that this rank will never enter. The word and closed connections
        # tell them.
        with suppress(RuntimeError):
            why = f"rank {ctx.rank} left with an error, so that the others wait in vain; look at that rank's own log"
            ctx.store.compare_set(FAILED, "", why)
        _within(
            5, dist.distributed_c10d._abort_process_group if ctx.device.type == "cuda" else dist.destroy_process_group
        )
        _let_others_read(ctx.store, ctx.launch, 2)
        return
    _let_others_read(ctx.store, ctx.launch, ctx.timeout_s)
    # A gloo thread may hold the tensors of a finished collective for a while yet, and needs the GIL to drop them. Who
    # destroys the group last (DDP's reducer) joins that thread and holds the GIL. So the last reference stays here.
    _closed.extend(dist.distributed_c10d._world.pg_map)
    if not _within(15, dist.destroy_process_group):
        log.warning("the process group did not close in 15 s; leaving without it")


def _let_others_read(store: Store, launch: Launch, timeout_s: float) -> None:
    """Rank 0 serves the store, unless torchrun's agent does: it waits until the others need it no more."""
    if launch.launcher == "python" or _agent_has_store():
        return
    deadline = time.monotonic() + timeout_s
    left = [f"left/{rank}" for rank in range(launch.world_size)]
    with suppress(RuntimeError):  # rank 0 is gone, and this rank needs it no more
        store.set(left[launch.rank], "")
        while launch.rank == 0 and not store.check(left):
            if store.check([FAILED]):
                deadline = min(deadline, time.monotonic() + 2)
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)


def _within(seconds: float, action: Any) -> bool:
    """Run `action` in a thread that may be left behind; whether it finished in time."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
