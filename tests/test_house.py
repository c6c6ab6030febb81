"""The rules of the house, on its files: floors, coverage of the outline, no names of places, shape of scripts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from common import exercises, process

ROOT = Path(__file__).resolve().parents[1]
OUTLINE = tomllib.loads((ROOT / "tests/outline.toml").read_text(encoding="utf-8"))
CHAPTERS = sorted(path.name for path in ROOT.glob("ch[0-9][0-9]_*") if path.is_dir())
MANIFESTS = [path.name for path in exercises.chapters()]
SECTIONS = ("You learn", "Laptop", "You see")
MAX_LINES = 300


def tracked() -> list[Path]:
    """The repository's files, as git lists them with those not yet added."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] == folder)


def is_script(path: Path) -> bool:
    """Something that a reader starts: it runs when it is the main module."""
    return path.parent.name in CHAPTERS and 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")


SCRIPTS = sorted(path for name in CHAPTERS for path in python_files(name) if is_script(path))


def imported(source: str) -> set[str]:
    """Top-level packages that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def too_high(floor: str, source: str) -> set[str]:
    """Imports of chapters that a file on this floor may not make."""
    return {name for name in imported(source) if re.match(r"ch\d\d_", name) and (floor == "common" or name > floor)}


# ---------------------------------------------------------------- floors


def test_the_check_of_floors_sees_a_wrong_import() -> None:
    later = "def f():\n    from ch04_fsdp.shard import x\n"
    assert too_high("ch03_ddp", later) == {"ch04_fsdp"}
    assert too_high("ch04_fsdp", later) == too_high("ch05_deepspeed_megatron", later) == set()
    assert too_high("common", "import ch01_intro.training") == {"ch01_intro"}


@pytest.mark.parametrize("floor", ["common", *CHAPTERS])
def test_floors(floor: str) -> None:
    for path in python_files(floor):
        wrong = too_high(floor, path.read_text(encoding="utf-8"))
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_nothing_below_imports_the_tests() -> None:
    for floor in ("common", "tour", *CHAPTERS):
        for path in python_files(floor):
            assert "tests" not in imported(path.read_text(encoding="utf-8")), path


# ---------------------------------------------------------------- the outline


def test_every_chapter_of_the_outline_has_its_folder() -> None:
    chapters = [name for name, value in OUTLINE.items() if isinstance(value, dict)]
    assert len(chapters) == 11
    missing = [name for name in chapters if not (ROOT / name).is_dir() and not any(tracked_under(name))]
    if missing:
        pytest.skip(f"needs the chapters {', '.join(missing)}")
    assert set(CHAPTERS) <= set(chapters)


def tracked_under(folder: str) -> list[Path]:
    return [path for path in tracked() if path.relative_to(ROOT).parts[0] == folder]


def test_the_outline_is_whole() -> None:
    items = [key for value in OUTLINE.values() if isinstance(value, dict) for key in value]
    assert sum(key[0] in "ec" and key[1:].isdigit() for key in items) == 135


@pytest.mark.parametrize("chapter", sorted(name for name, value in OUTLINE.items() if isinstance(value, dict)))
def test_every_exercise_and_code_example_is_covered(chapter: str) -> None:
    if chapter not in MANIFESTS:
        pytest.skip(f"needs {chapter}/exercises.toml")
    wanted = {key for key in OUTLINE[chapter] if re.fullmatch(r"[ec]\d\d", key)}
    known = {key for key in OUTLINE[chapter] if re.fullmatch(r"[ecto]\d\d", key)}
    covered = {item for exercise in exercises.load(ROOT / chapter) for item in exercise.covers}
    assert covered <= known, f"no such items in the outline: {sorted(covered - known)}"
    assert wanted <= covered, f"no exercise covers {sorted(wanted - covered)}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_readmes_table_lists_the_exercises(chapter: str) -> None:
    readme = ROOT / chapter / "README.md"
    if not readme.is_file() or chapter not in MANIFESTS:
        pytest.skip(f"needs {chapter}/README.md and exercises.toml")
    rows = [line for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    table = "\n".join(rows)
    for exercise in exercises.load(ROOT / chapter):
        assert re.search(rf"(?<![\w-]){re.escape(exercise.id)}(?![\w-])", table), f"{exercise.id} is in no table row"


# ---------------------------------------------------------------- files

# Spelled in pieces, so that this file does not hold them.
PLACES = re.compile(r"(?<![\w.$}~-])/(?:" + "|".join(["root", "work", "home/[a-z]", "Users/[a-z]"]) + r")(?![\w.-])")


def test_the_check_of_places_sees_one() -> None:
    assert PLACES.search("cd /" + "root/x")
    assert PLACES.search('"/' + 'work"')
    assert not PLACES.search("https://example.org/a/" + "work")
    assert not PLACES.search("the /" + "workspace")


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = []
    for path in tracked():
        if path.parent.name == "crds":  # others' published schemas, with their defaults
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if PLACES.search(line)
        ]
    assert found == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shape_of_a_script(script: Path) -> None:
    source = script.read_text(encoding="utf-8")
    tree = ast.parse(source)
    doc = ast.get_docstring(tree) or ""
    for section in SECTIONS:
        assert re.search(rf"^{section}\b", doc, re.MULTILINE), f"the docstring lacks {section!r}"
    assert re.search(r"^(GPU|Two ranks|Cluster)", doc, re.MULTILINE), "the docstring says nothing of GPUs or a cluster"
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [arg.arg for arg in main.args.args] == ["argv"]
    assert len(main.args.defaults) == 1
    assert "script.run(main)" in source
    assert len(source.splitlines()) <= MAX_LINES


def test_there_are_scripts() -> None:
    assert SCRIPTS
    assert "ch01_intro" in CHAPTERS


WITHOUT_GPU = """
import importlib.util, json, sys, traceback
import torch

class Absent:
    "Stands in for torch.cuda: any use at import time fails."
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"torch.cuda.{name} was used at import")

import transformers, torch.distributed.tensor, torch.distributed.fsdp, matplotlib, datasets  # they may ask
import torch.distributed.checkpoint
torch.cuda = Absent()
failed = {}
for number, path in enumerate(sys.argv[1:]):
    try:
        spec = importlib.util.spec_from_file_location(f"imported_{number}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except BaseException:
        failed[path] = traceback.format_exc()[-800:]
print("RESULT " + json.dumps(failed))
"""


def test_scripts_import_without_a_gpu() -> None:
    command = [sys.executable, "-c", WITHOUT_GPU, *map(str, SCRIPTS)]
    done = process.run(command, timeout_s=250, env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.result == {}


def test_outline_and_manifests_agree_on_the_chapters() -> None:
    assert set(MANIFESTS) <= set(OUTLINE)
