"""Machine code of a kernel, as cuobjdump prints it, and which of its loads are on their way together.

A batch is a run of loads from global memory, along one path through the code, of which none is waited for before the last is issued. What ends
a batch is an instruction that names a register that one of its loads writes, or that waits for the scoreboard of one. Since Volta an instruction's
upper word says which of six scoreboards it signals when its result is there, and for which it waits.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

FIRST_WORD = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);\s*/\* 0x([0-9a-f]{16}) \*/")
SECOND_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    """signals: the scoreboard that tells that its result is there, or None; waits: those that it waits for before it is issued."""

    address: int
    predicate: str
    opcode: str
    operands: str
    signals: int | None
    waits: frozenset[int]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @cached_property
    def registers(self) -> frozenset[int]:
        """Every general register that it names; of an address or a register pair both."""
        named = set()
        for number, pair in re.findall(r"(?<![A-Z\d])R(\d+)((?:\.reuse)?\.64)?", self.operands):
            named |= {int(number), int(number) + 1} if pair else {int(number)}
        return frozenset(named)

    @cached_property
    def loaded(self) -> frozenset[int]:
        """The registers that a load writes."""
        first = re.match(r"R(\d+)", self.operands)
        width = {"64": 2, "128": 4, "256": 8}
        count = max((width.get(part, 1) for part in self.opcode.split(".")), default=1)
        return frozenset(range(int(first[1]), int(first[1]) + count)) if first else frozenset()

    @cached_property
    def touched(self) -> frozenset[int]:
        return self.registers | self.loaded if self.name == "LDG" else self.registers

    @property
    def target(self) -> int | None:
        found = re.search(r"(0x[0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if found else None


def instructions(lines: Iterable[str]) -> Iterator[Instruction | str]:
    """The instructions among `lines`; every other line as it is."""
    pending: re.Match[str] | None = None
    for line in lines:
        if pending is not None and (second := SECOND_WORD.match(line)):
            control = int(second[1], 16) >> 41
            signals, waits = control >> 5 & 7, control >> 11 & 63
            yield Instruction(
                int(pending[1], 16),
                pending[2] or "",
                pending[3],
                pending[4].strip(),
                None if signals == NO_SCOREBOARD else signals,
                frozenset(i for i in range(6) if waits >> i & 1),
            )
            pending = None
        elif first := FIRST_WORD.match(line):
            pending = first
        else:
            yield line


class Code:
    """A kernel's instructions and where each may go on."""

    def __init__(self, code: Sequence[Instruction]):
        self.code = list(code)
        self.at = {x.address: i for i, x in enumerate(self.code)}
        self.following = [self._following(i) for i in range(len(self.code))]

    def _following(self, i: int) -> tuple[int, ...]:
        x = self.code[i]
        on = (i + 1,) if i + 1 < len(self.code) else ()
        if x.name == "BSYNC":  # to where the barrier of the same register that was set up last says
            barrier = x.operands.split()[0]
            meets = next((y.target for y in reversed(self.code[:i]) if y.name == "BSSY" and y.operands.startswith(barrier)), None)
            return (self.at[meets],) if meets in self.at else on
        if x.name in ("EXIT", "RET", "BRX", "BRXU", "JMX", "JMP", "KILL"):
            return on if x.predicate else ()
        if x.name != "BRA":
            return on
        to = (self.at[x.target],) if x.target in self.at else ()
        return tuple(dict.fromkeys((*on, *to) if x.predicate or "," in x.operands else to))

    def longest_batch(self, first: int, pattern: re.Pattern[str]) -> tuple[int, ...]:
        """The loads of the longest batch that begins with `first`, of those that match."""
        best: tuple[int, ...] = ()
        seen: set[tuple[int, tuple[int, ...]]] = set()
        paths: list[tuple[int, tuple[int, ...]]] = [(first, ())]
        while paths:
            i, batch = paths.pop()
            written = {r for load in batch for r in self.code[load].loaded}
            awaited = {self.code[load].signals for load in batch}
            while not (self.code[i].touched & written or self.code[i].waits & awaited or i in batch):
                x = self.code[i]
                if pattern.fullmatch(x.opcode):
                    batch += (i,)
                    written |= x.loaded
                    awaited.add(x.signals)
                    best = max(best, batch, key=len)
                on = self.following[i]
                if len(on) == 1:
                    i = on[0]
                    continue
                ways = [(j, batch) for j in on if (j, batch) not in seen]
                seen.update(ways)
                paths += ways
                break
        return best

    def batches(self, pattern: str) -> Counter[int]:
        """How many batches there are of each number of loads that match, the longest found first; no load is in two."""
        compiled = re.compile(pattern)
        loads = [i for i, x in enumerate(self.code) if compiled.fullmatch(x.opcode)]
        found: Counter[int] = Counter()
        taken: set[int] = set()
        for batch in sorted((self.longest_batch(i, compiled) for i in loads), key=lambda b: (-len(b), b)):
            if taken.isdisjoint(batch):
                taken.update(batch)
                found[len(batch)] += 1
        return found
