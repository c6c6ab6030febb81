"""Parsers for `nvidia-smi topo -m`, `nvidia-smi --query-gpu` and `lscpu`. Text in, facts out; no machine is touched.

Every parser raises UserError with one line for input that it cannot read for certain: a wrong graph is worse than none.

The matrix of `nvidia-smi topo -m` has changed with the driver, and all forms are read here:

    drivers up to 4xx   NIC columns carry the device's name (mlx5_0); one column "CPU Affinity"; SOC instead of SYS
    450 to 510          "NUMA Affinity" beside it
    from 515            columns NIC0, NIC1, … and a "NIC Legend:" that maps them to device names
    from 535            "GPU NUMA ID" too: the NUMA node of the GPU's own memory (Grace), N/A elsewhere

Cells are separated by tabs, or by spaces once pasted; on a terminal the header is underlined with ANSI codes.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from typing import Any

from common.script import UserError

from .model import Cpu, is_link_kind, parse_cpu_list

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
DEVICE = re.compile(r"[A-Za-z][\w.:-]*")
GPU = re.compile(r"GPU(\d{1,3})")
NIC_NUMBER = re.compile(r"NIC\d{1,3}")
OLD_WORDS = {"SOC": "SYS"}  # up to driver 384: "socket-level link"
AFFINITY_COLUMNS = ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")
SAVE_AGAIN = "save it again with: nvidia-smi topo -m > topo.txt"


@dataclass
class TopoMatrix:
    """`links` maps a pair of labels (GPU0, mlx5_0) to its kind; `cpus` and `numa` map a GPU index to its affinity."""

    gpus: list[int]
    nics: list[str]
    links: dict[tuple[str, str], str] = field(default_factory=dict)
    cpus: dict[int, tuple[int, ...]] = field(default_factory=dict)
    numa: dict[int, int] = field(default_factory=dict)
    nics_named: bool = True  # False: NIC0, NIC1 without a legend, so which device they are is unknown


def parse_topo(text: str, where: str = "topo.txt") -> TopoMatrix:
    """Read the output of `nvidia-smi topo -m`. Raises UserError, naming `where`."""

    def fail(what: str) -> UserError:
        return UserError(f"{where}: {what}; {SAVE_AGAIN}")

    lines = [ANSI.sub("", line).rstrip() for line in text.splitlines()]
    if not any(lines):
        raise fail("the file is empty")
    start = next((n for n, line in enumerate(lines) if _is_header(line)), None)
    if start is None:
        raise fail("no header line that starts with GPU0")
    labels, tail_columns = _read_header(lines[start], fail)
    rows: dict[str, list[str]] = {}
    tails: dict[str, tuple[list[str], str]] = {}
    for line in lines[start + 1 :]:
        cells = line.split()
        if not cells:
            continue
        if cells[0] not in labels:
            if GPU.fullmatch(cells[0]) or NIC_NUMBER.fullmatch(cells[0]):
                raise fail(f"a row for {cells[0]} but no such column")
            break  # the legend, or what else was pasted: the count below tells if rows are missing
        label, values = cells[0], cells[1 : 1 + len(labels)]
        if label in rows:
            raise fail(f"two rows are named {label}")
        if len(values) < len(labels):
            raise fail(f"row {label} has {len(values)} cells for {len(labels)} columns (cut short, or wrapped)")
        rows[label], tails[label] = values, (cells[1 + len(labels) :], line)
    missing = [label for label in labels if label not in rows]
    if missing:
        raise fail(f"{len(labels)} columns but {len(rows)} rows, {missing[0]} is the first one missing")

    legend = _nic_legend(lines, labels, fail)
    names = {label: legend.get(label, label) for label in labels}
    gpus = [int(found[1]) for label in labels if (found := GPU.fullmatch(label))]
    nics = [names[label] for label in labels if not GPU.fullmatch(label)]
    if len(set(names.values())) < len(names):
        raise fail("the NIC legend names one device twice")
    matrix = TopoMatrix(gpus, nics, nics_named=not any(NIC_NUMBER.fullmatch(nic) for nic in nics))
    for row in labels:  # each row by itself first: its own X shows a lost cell best
        own = rows[row][labels.index(row)]
        if own != "X":
            raise fail(f"row {row} has {own[:20]!r} in its own column, not X (a cell is missing, or one too many)")
        for column, cell in zip(labels, rows[row], strict=True):
            if column != row and not is_link_kind(OLD_WORDS.get(cell, cell)):
                raise fail(f"{cell[:20]!r} between {row} and {column} is no link kind (NV#, PIX, PXB, PHB, NODE, SYS)")
    for y, row in enumerate(labels):
        for x, column in enumerate(labels[y + 1 :], start=y + 1):
            kind, mirrored = rows[row][x], rows[column][y]
            if kind != mirrored:
                raise fail(f"not symmetric: {row}-{column} is {kind}, {column}-{row} is {mirrored}")
            if kind.startswith("NV") and not (GPU.fullmatch(row) and GPU.fullmatch(column)):
                raise fail(f"{kind} between {row} and {column}: NVLink joins GPUs only")
            matrix.links[names[row], names[column]] = OLD_WORDS.get(kind, kind)
    for label, index in zip((label for label in labels if GPU.fullmatch(label)), gpus, strict=True):
        affinity = _affinity(label, *tails[label], tail_columns, fail)
        _store_affinity(matrix, index, label, affinity, fail)
    for label in labels:
        if not GPU.fullmatch(label) and tails[label][0]:
            raise fail(f"row {label} has {len(tails[label][0])} cells too many")
    return matrix


def _is_header(line: str) -> bool:
    cells = line.split()
    return bool(cells) and GPU.fullmatch(cells[0]) is not None and "X" not in cells


def _read_header(line: str, fail: Any) -> tuple[list[str], list[str]]:
    """Device labels and affinity columns, in order."""
    first = min((line.find(name) for name in AFFINITY_COLUMNS if name in line), default=len(line))
    labels, tail = line[:first].split(), line[first:]
    columns = re.findall("|".join(AFFINITY_COLUMNS), tail)
    if re.sub("|".join(AFFINITY_COLUMNS), "", tail).strip():
        raise fail(f"unknown column in the header: {tail.strip()[:60]!r}")
    for label in labels:
        if not DEVICE.fullmatch(label):
            raise fail(f"{label[:20]!r} in the header is no device name")
    if len(set(labels)) < len(labels):
        raise fail("a device stands twice in the header")
    return labels, columns


def _nic_legend(lines: list[str], labels: list[str], fail: Any) -> dict[str, str]:
    """NIC0 → mlx5_0. A legend that lacks a NIC of the header was cut short."""
    numbered = [label for label in labels if NIC_NUMBER.fullmatch(label)]
    start = next((n for n, line in enumerate(lines) if line.strip() == "NIC Legend:"), None)
    if start is None or not numbered:
        return {}
    found = (re.fullmatch(r"\s*(NIC\d+):\s+(\S+)\s*", line) for line in lines[start + 1 :])
    legend = {entry[1]: entry[2] for entry in found if entry}
    for label in numbered:
        if label not in legend:
            raise fail(f"{label} is missing in the NIC legend")
    return {label: legend[label] for label in numbered}


def _affinity(label: str, cells: list[str], line: str, columns: list[str], fail: Any) -> dict[str, str]:
    """Affinity cells by column name. Virtual machines leave cells empty, so there may be fewer than columns."""
    if len(cells) == len(columns):
        return dict(zip(columns, cells, strict=True))
    if len(cells) > len(columns):
        raise fail(f"row {label} has {len(cells) - len(columns)} cells too many")
    if not cells:
        return {}
    left = list(columns)
    values = {}
    if left[-1] == "GPU NUMA ID":  # always printed, so the last cell is its
        values[left.pop()] = cells[-1]
        cells = cells[:-1]
    if not cells:
        return values
    if len(cells) == 1 and "\t" in line:
        # The CPU list comes right after the last device. Behind it the number of tabs varies, for alignment.
        fields = [field.strip() for field in line.split("\t")]
        devices = max(n for n, field in enumerate(fields) if field == "X" or is_link_kind(OLD_WORDS.get(field, field)))
        values[left[0] if fields[devices + 1] else left[-1]] = cells[0]
        return values
    raise fail(f"row {label}: {' '.join(cells)!r} could be any of {', '.join(left)}")


def _store_affinity(matrix: TopoMatrix, index: int, label: str, affinity: dict[str, str], fail: Any) -> None:
    for column, store in (("CPU Affinity", "cpus"), ("NUMA Affinity", "numa")):
        cell = affinity.get(column, "N/A")
        if cell == "N/A":
            continue
        try:
            numbers = parse_cpu_list(cell)
        except ValueError:
            raise fail(f"row {label}: {column} {cell[:40]!r} is no list of numbers") from None
        if store == "cpus":
            matrix.cpus[index] = numbers
        elif len(numbers) == 1:  # a GPU near several nodes has no node of its own
            matrix.numa[index] = numbers[0]


def parse_gpu_query(text: str, where: str = "gpus.csv") -> dict[int, tuple[str, int | None, str]]:
    """GPU index → (name, memory in MiB, PCI address).

    Reads `nvidia-smi --query-gpu=index,name,memory.total,pci.bus_id --format=csv,noheader,nounits`.
    """
    command = "nvidia-smi --query-gpu=index,name,memory.total,pci.bus_id --format=csv,noheader,nounits > gpus.csv"
    gpus: dict[int, tuple[str, int | None, str]] = {}
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if not row:
            continue
        if len(row) != 4 or not row[0].isdigit() or not (row[2].isdigit() or "N/A" in row[2] or "Supported" in row[2]):
            raise UserError(f"{where}: cannot read the line {','.join(row)[:60]!r}; save it again with: {command}")
        gpus[int(row[0])] = (row[1], int(row[2]) if row[2].isdigit() else None, pci_address(row[3]))
    if not gpus:
        raise UserError(f"{where}: no GPU in it; save it again with: {command}")
    return gpus


def pci_address(text: str) -> str:
    """`00000000:1B:00.0` (NVIDIA, 8-digit domain) as the kernel writes it: `0000:1b:00.0`."""
    found = re.fullmatch(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", text.strip().lower())
    if not found:
        raise UserError(f"{text.strip()[:30]!r} is no PCI address; expected one such as 0000:1b:00.0")
    return f"{int(found[1] or '0', 16):04x}:{found[2]}"


def parse_lscpu(text: str, where: str = "lscpu") -> tuple[Cpu, dict[int, tuple[int, ...]]]:
    """The CPU and the CPUs of each NUMA node, from `lscpu` or `lscpu -J` (flat, or nested from util-linux 2.37 on)."""
    again = "save it again with: LC_ALL=C lscpu -J > lscpu.json"
    if text.lstrip().startswith(("{", "[")):
        try:
            fields = dict(_json_fields(json.loads(text)["lscpu"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{where}: not the JSON of lscpu -J (cut short?); {again}") from None
    else:
        pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in pairs}

    def number(name: str) -> int | None:
        value = fields.get(name, "")
        return int(value) if value.isdigit() else None  # "-" on some ARM machines

    cpus = number("CPU(s)")
    if not cpus:
        raise UserError(f"{where}: no line CPU(s) with a number; {again}")
    sockets = number("Socket(s)")
    per_socket = number("Core(s) per socket")
    threads = number("Thread(s) per core")
    cores = sockets * per_socket if sockets and per_socket else cpus // (threads or 1)
    if cores > cpus:
        cores = cpus  # lscpu in a container that sees part of a socket
    nodes: dict[int, tuple[int, ...]] = {}
    for name, value in fields.items():
        if found := re.fullmatch(r"NUMA node(\d+) CPU\(s\)", name):
            try:
                nodes[int(found[1])] = parse_cpu_list(value)
            except ValueError as error:
                raise UserError(f"{where}: {name}: {error}; {again}") from None
    expected = number("NUMA node(s)")
    if expected is not None and nodes and len(nodes) != expected:
        raise UserError(f"{where}: says {expected} NUMA nodes but lists {len(nodes)} (cut short?); {again}")
    return Cpu(fields.get("Model name"), fields.get("Architecture"), cpus, cores, threads, sockets), nodes


def _json_fields(items: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = []
    for item in items:
        if item.get("data") is not None:
            found.append((item["field"].rstrip(":"), str(item["data"])))
        found += _json_fields(item.get("children", []))
    return found
