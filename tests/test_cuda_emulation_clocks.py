"""The emulation's checker against plain vector clocks, on random programs: it finds exactly the first race of each run."""

import random
import re
from collections import Counter
from enum import IntEnum

import cuda_emulation
import pytest
import torch
from cuda_emulation import emulated

if reason := cuda_emulation.why_not():
    pytest.skip(reason, allow_module_level=True)

PROGRAM = [cuda_emulation.HERE / "sample/program.cpp", cuda_emulation.HERE / "sample/program.cu"]
BLOCK, WARP = 64, 32
ATOMIC_WORDS, PLAIN_WORDS = 2, 6


class Operation(IntEnum):
    NONE, READ, WRITE, BARRIER, WARP_BARRIER, FENCE, RELEASE, ACQUIRE, ACQ_REL, RELAXED, STORE = range(11)


ATOMICS = [Operation.RELEASE, Operation.ACQUIRE, Operation.ACQ_REL, Operation.RELAXED, Operation.STORE]


def random_program(draw: random.Random, steps: int, blocks: int) -> torch.Tensor:
    """[steps, threads]. Few threads act, so that some programs have no race: an access is often followed by what orders it."""
    threads = blocks * BLOCK
    actors = draw.sample(range(threads), 6)
    program = torch.zeros(steps, threads, dtype=torch.int64)
    for row in program:
        kind = draw.random()
        if kind < 0.2:
            row[:] = Operation.BARRIER
        elif kind < 0.3:
            start = draw.choice(actors) // WARP * WARP
            row[start : start + WARP] = Operation.WARP_BARRIER
        elif kind < 0.4:
            row[draw.choice(actors)] = Operation.FENCE
        elif kind < 0.75:
            row[draw.choice(actors)] = draw.choice(ATOMICS) + 16 * draw.randrange(ATOMIC_WORDS)
        else:
            row[draw.choice(actors)] = draw.choice([Operation.READ, Operation.READ, Operation.WRITE]) + 16 * (ATOMIC_WORDS + draw.randrange(PLAIN_WORDS))
    return program


def first_race(program: torch.Tensor, log: list[int]) -> int | None:
    """Which entry of the log races with an earlier one, by vector clocks of all threads, each as long as there are threads."""
    threads = program.shape[1]
    knows = torch.zeros(threads, threads, dtype=torch.int64)  # row t: up to which time t knows each thread
    time = torch.ones(threads, dtype=torch.int64)  # what a thread does now is known to nobody else yet
    fenced = torch.zeros_like(knows)
    unfenced = torch.zeros_like(knows)
    released = torch.zeros(ATOMIC_WORDS, threads, dtype=torch.int64)
    wrote: dict[int, tuple[int, int]] = {}
    read: dict[int, dict[int, int]] = {}
    arrived: Counter[tuple[int, int]] = Counter()

    def known(me: int, thread: int, when: int) -> bool:
        return me == thread or knows[me, thread] >= when

    def publish(me: int | slice) -> torch.Tensor:
        torch.diagonal(knows)[me] = time[me]
        time[me] += 1
        return knows[me].clone()

    for entry, at in enumerate(log):
        step, me = divmod(at, threads)
        word, operation = divmod(int(program[step, me]), 16)
        if operation in (Operation.READ, Operation.WRITE):
            if word in wrote and not known(me, *wrote[word]):
                return entry
            if operation == Operation.READ:
                read.setdefault(word, {})[me] = int(time[me])
                continue
            if any(not known(me, *reader) for reader in read.pop(word, {}).items()):
                return entry
            wrote[word] = me, int(time[me])
        elif operation in (Operation.BARRIER, Operation.WARP_BARRIER):
            size = BLOCK if operation == Operation.BARRIER else WARP
            group = slice(me // size * size, me // size * size + size)
            arrived[step, group.start] += 1
            if arrived[step, group.start] == size:
                publish(group)
                knows[group] = knows[group].amax(0)
        elif operation == Operation.FENCE:
            knows[me] = torch.maximum(knows[me], unfenced[me])
            fenced[me] = publish(me)
        else:
            acquires, releases = operation in (Operation.ACQUIRE, Operation.ACQ_REL), operation in (Operation.RELEASE, Operation.ACQ_REL)
            if operation != Operation.STORE:
                into = knows if acquires else unfenced
                into[me] = torch.maximum(into[me], released[word])
            if operation != Operation.ACQUIRE:
                mine = publish(me) if releases else fenced[me]
                released[word] = mine if operation == Operation.STORE else torch.maximum(released[word], mine)
    return None


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_first_race_is_found_and_nothing_else(blocks):
    library = cuda_emulation.load(PROGRAM)
    outcomes: Counter[str] = Counter()
    for seed in range(100):
        program = random_program(random.Random(1000 * blocks + seed), steps=30, blocks=blocks)
        said = ""
        with emulated(library, 3, seed):
            try:
                library.ops.program(program, ATOMIC_WORDS + PLAIN_WORDS)
            except RuntimeError as fault:
                said = str(fault)
        log = library.ops.program_log(program).tolist()
        race = first_race(program, log)
        outcomes["race" if said else "none"] += 1
        if not said:
            assert race is None, f"seed {seed}: nothing found, yet entry {race} of {log} races"
            continue
        assert race == len(log) - 1, f"seed {seed}: {said}, yet by plain clocks it is entry {race} of {len(log)}"
        where = re.search(r"block (\d+) thread (\d+): (reads|writes) byte", said)
        assert where and int(where[1]) * BLOCK + int(where[2]) == log[-1] % program.shape[1], said
    assert min(outcomes["race"], outcomes["none"]) >= 15, outcomes
