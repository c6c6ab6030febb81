"""Build the local control plane once, into the project's cache folder: `make setup-kube`.

    python -m ch08_kubernetes.cluster.build

Its programs come from Debian's source package (build.sh is the recipe), so they are built on Debian only; elsewhere,
run a cluster in Docker with kind, or use your own: `python -m ch08_kubernetes.cluster up` takes any of the three.
"""

from __future__ import annotations

import fcntl
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ch08_kubernetes.cluster.ending import folder_guard, interrupted_by_signals
from common import process
from common.bootstrap import KUBE_RECIPE, ROOT, control_plane
from common.script import UserError

RECIPE = ROOT / KUBE_RECIPE
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
TOOLS = {"apt-get": "apt", "dpkg-deb": "dpkg", "dpkg-source": "dpkg-dev", "xz": "xz-utils"}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ELSEWHERE = "run a cluster with kind, or point --kubeconfig at one of yours"
TIMEOUT_S = 3600
DISK_GB = 3


def built() -> bool:
    return (control_plane() / "bin").is_dir()


def binary(name: str) -> Path:
    """Path of one of PROGRAMS.

    Raises:
        UserError: they are not built.
    """
    if not built():
        raise UserError("the local control plane is not built; run make setup-kube (Debian), or use kind")
    return control_plane() / "bin" / name


def debian_mirror() -> str:
    """The mirror of Debian's main archive that this system itself uses.

    Raises:
        UserError: this is no Debian, or a tool of Debian's is missing; worded with what to do instead.
    """
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    if platform.system() != "Linux" or release.get("ID") != "debian":
        name = release.get("PRETTY_NAME", platform.system())
        raise UserError(f"the control plane is built from Debian's sources, and this is {name}; {ELSEWHERE}")
    if lacking := sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)}):
        raise UserError(f"the build needs {', '.join(lacking)}; run apt-get install {' '.join(lacking)}")
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = [line.split() for line in listed.splitlines()]
    mirrors = [words[0] for words in found if words[1:] == [release.get("VERSION_CODENAME"), "main"]]
    if not mirrors or not KEYRING.exists():
        what = "no mirror of Debian is in apt's sources" if not mirrors else f"{KEYRING} is missing"
        raise UserError(f"{what}, so the sources cannot be fetched; put it there, or {ELSEWHERE}")
    return mirrors[0]


@contextmanager
def only_builder(target: Path) -> Iterator[None]:
    """Hold the lock of a build; whoever else wants the same one waits until it is there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write the cache {target.parent} ({error.strerror}); set XDG_CACHE_HOME") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process builds {target}: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)  # held by a living process only
        yield


def build(target: Path) -> None:
    """Fill `target`/bin: beside, then renamed, so that it is there whole or not at all. Call it under the lock."""
    mirror = debian_mirror()
    if shutil.disk_usage(target.parent).free < DISK_GB * 10**9:
        raise UserError(f"less than {DISK_GB} GB are free in {target.parent}; make room, or set XDG_CACHE_HOME")
    print(f"building the control plane in {target} (about 5 minutes on 2 cores)", flush=True)
    beside = target.with_name(f".{target.name}.partial")
    with folder_guard(beside):
        shutil.rmtree(beside, ignore_errors=True)  # where the machine itself went down
        beside.mkdir()
        with process.Child(["bash", RECIPE, mirror], cwd=beside, on_line=show) as child:
            done = child.wait(TIMEOUT_S)
        if done.returncode or done.timed_out:
            log = target.with_name(f"{target.name}.log")
            log.write_text(done.stdout + done.stderr, encoding="utf-8")
            why = done.reason(TIMEOUT_S)
            raise UserError(f"the control plane could not be built ({why}); see {log}, or {ELSEWHERE}")
        (beside / "made").mkdir()
        (beside / "bin").rename(beside / "made" / "bin")
        (beside / "made").rename(target)


def show(line: str) -> None:
    print(f"  {line}", flush=True)


def main() -> int:
    target = control_plane()
    try:
        with only_builder(target):
            if not built():
                build(target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"kube: {target / 'bin'}")
    return 0


if __name__ == "__main__":
    with interrupted_by_signals():
        code = main()
    sys.exit(code)
