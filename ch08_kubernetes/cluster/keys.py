"""A key and a certificate that it has signed itself, for servers on this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from common.script import UserError

HOST = "127.0.0.1"


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Write tls.crt and tls.key, readable by their owner, for a server on the loopback address.

    Raises:
        UserError: there is no openssl, or one that is too old.
    """
    if shutil.which("openssl") is None:
        raise UserError("openssl is missing, which makes a server's key; run make system-deps (Debian), or install it")
    certificate, key = folder / "tls.crt", folder / "tls.key"
    key.touch(mode=0o600)
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "365", "-subj", "/CN=local-cluster"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    names = f"IP:{HOST},DNS:localhost,DNS:kubernetes.default.svc"
    for extension in (f"subjectAltName={names}", "keyUsage=critical,digitalSignature,keyCertSign"):
        command += ["-addext", extension]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise UserError(f"openssl made no key ({made.stderr.strip()[-200:]}); it must be 1.1.1 or newer")
    return certificate, key
