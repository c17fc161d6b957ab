"""Random calls of every public function, module and raw operator, right and wrong ones, in child processes.

    python -m tests.fuzz --calls 20000            every target, each 20,000 calls (hours on two cores); make fuzz
    python -m tests.fuzz --target stage_tap --calls 500 --seed 3
    python -m tests.fuzz --target stage_tap --only 1234 --seed 3      one call again, in this process, with its arguments

A call is drawn from (seed, target, number) alone. It must return what the definition in fp64 gives, within the tolerance table, with
NaN and infinities in the same places, or raise an error of a known kind with one sentence. A crash, a hang, an unknown error, a difference,
or a result where the definition refuses is a finding; the command prints each with what draws it again and ends with exit code 1.

    values.py    tensors of every kind, sizes, switches, and wrong ones
    oracle.py    what should come out: the definitions in fp64, and which errors are known
    targets.py   a drawer of calls for each raw operator and public function
    ends.py      the same for the stage end
    modules.py   the same for the modules
    child.py     the process that makes the calls; __main__.py starts it again where it died
"""
