"""How many examples hypothesis draws: on a GPU each is a new compilation of a second or so."""

import os

VARIABLE = "INTERFLOW_EXAMPLES"


def examples(otherwise: int) -> int:
    """The number in INTERFLOW_EXAMPLES, or `otherwise` where it is not set. Raises ValueError for anything but a number of at least 1."""
    value = os.environ.get(VARIABLE, "")
    if value and not (value.isdecimal() and int(value) > 0):
        raise ValueError(f"{VARIABLE} must be a number of examples, at least 1, got {value!r}")
    return int(value) if value else otherwise
