"""What devices tell each other, read off a compiled program's text."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

INSTRUCTION = re.compile(
    r"= (?P<shape>.+?) (?P<name>all-reduce|all-gather|all-to-all|collective-permute|"
    r"reduce-scatter)(?:-start)?\("
)
ARRAY = re.compile(r"(?P<type>f64|f32|s64|s32|u32|pred)\[(?P<sizes>[\d,]*)\]")
BYTES = {"f64": 8, "f32": 4, "s64": 8, "s32": 4, "u32": 4, "pred": 1}
HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Exchange(NamedTuple):
    """One exchange of a program.

    Attributes:
        kind: its name in XLA, such as "all-reduce".
        sizes: numbers in each of its arrays.
        num_bytes: of all of them.
        times: how often it happens, as far as loops know their length; a loop that
            ends by itself counts once.
    """

    kind: str
    sizes: list[int]
    num_bytes: int
    times: int


def exchanges(text: str) -> list[Exchange]:
    """Every exchange between devices in a program, in its text's order."""
    found, calls, entry = _read(text)
    times = _times(calls, entry)
    return [
        exchange._replace(times=times[name]) for name, exchange in found if times[name]
    ]


def _read(text: str) -> tuple[list, dict[str, list[tuple[str, int]]], str]:
    found, calls, entry, here = [], defaultdict(list), "", ""
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            here = header["name"]
            entry = here if header["entry"] else entry
            continue
        trips = TRIPS.search(line)
        each = int(trips[1]) if trips and " while(" in line else 1
        branches = [x.strip(" %") for y in BRANCHES.findall(line) for x in y.split(",")]
        calls[here] += [(name, each) for name in CALLED.findall(line) + branches]
        match = INSTRUCTION.search(line)
        if match:
            found.append((here, _exchange(match["name"], match["shape"])))
    return found, calls, entry


def _exchange(kind: str, shape: str) -> Exchange:
    arrays = [
        (BYTES[x["type"]], math.prod(int(n) for n in x["sizes"].split(",") if n))
        for x in ARRAY.finditer(shape)
    ]
    total = sum(width * size for width, size in arrays)
    return Exchange(kind, [size for _, size in arrays], total, 1)


def _times(calls: dict[str, list[tuple[str, int]]], entry: str) -> dict[str, int]:
    """How often each computation runs; both branches of a condition count."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for called, each in calls[name]:
            visit(called, factor * each)

    visit(entry, 1)
    return times
