"""Chapter 8: the words with which the inference manifests start engines are words that these engines know."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ch06_vllm.servers import ENGINES
from ch07_sglang_routing import sglang_engine  # noqa: F401  it is an engine from here on
from ch08_kubernetes import accept
from ch08_kubernetes.lint.objects import pods, read
from common import process
from common.bootstrap import engine_environment
from common.exercises import missing_for

FOLDER = Path(accept.__file__).parent / "inference"
# Run by the engine's python, once for all of its commands.
PARSE = """
import json, sys
for words in json.loads(sys.argv[1]):
    try:
        print("KNOWN", json.dumps(sorted(vars(parser.parse_args(words)))))
    except SystemExit:
        print("UNKNOWN")
"""


def commands(name: str) -> list[list[str]]:
    """What each container is started with; $(VAR) is a number where one is wanted."""
    found = []
    for owner in read(FOLDER / name)[0]:
        for pod in pods(owner):
            for container in pod.containers:
                words = [*container["command"], *container.get("args", [])]
                found.append([re.sub(r"\$\(\w+\)", "1", str(word)) for word in words])
    return found


@pytest.mark.parametrize(
    ("engine", "names", "start"),
    [
        ("vllm", ["vllm.yaml", "lws-vllm.yaml"], ["vllm", "serve"]),
        ("sglang", ["sglang.yaml"], ["python3", "-m", "sglang.launch_server"]),
    ],
)
@pytest.mark.timeout(300)
def test_the_engine_knows_the_manifests_words(engine: str, names: list[str], start: list[str]) -> None:
    if lacking := missing_for(engine):
        pytest.skip(f"needs {lacking}")
    found = [words for name in names for words in commands(name)]
    assert len(found) == {"vllm": 3, "sglang": 1}[engine]
    assert all(words[: len(start)] == start for words in found)
    asked = [words[len(start) :] for words in found]
    planted = [*asked[0], "--no-such-option=1"]
    python = engine_environment(engine) / "bin" / "python"
    command = [str(python), "-c", ENGINES[engine].parser + PARSE, json.dumps([*asked, planted])]
    done = process.run(command, timeout_s=250, env=ENGINES[engine].environment(1))
    said = [line for line in done.stdout.splitlines() if line.startswith(("KNOWN", "UNKNOWN"))]
    assert said[-1] == "UNKNOWN", done.stderr[-500:]
    for words, line in zip(asked, said[:-1], strict=True):
        known = set(json.loads(line.removeprefix("KNOWN")))
        assert {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")} <= known
