"""INTERFLOW_WATCHDOG=1, in the host emulation: a wait that never ends says for what it waits; without it nothing changes."""

import cuda_emulation
import pytest
import torch
from cuda_emulation import Edit, emulated

from interflow_kernels.testing import HeadCase, head_inputs

if reason := cuda_emulation.why_not():
    pytest.skip(reason, allow_module_level=True)

FORWARD = cuda_emulation.sources("library.cpp", "common/cuda/host.cpp", "interflow_head/cuda/forward.cpp", "interflow_head/cuda/forward.cu")
TURN = "    if (more && ticket.pool) {\n"
LOST = f"""    if (more && ticket.pool && drawn == 1) {{
      __syncthreads();
      if (threadIdx.x == 0) *slot = draw_ticket(P.counters + HeadSchedule::kNext);
      continue;
    }}
{TURN}"""
CASE = HeadCase(batch=20, maps=((16, 24, 24), (8, 3, 3)), layout="channels_last", classes=9)


def run(library):
    head = CASE.head()
    return library.ops.interflow_head(head_inputs(CASE), head.weight, head.bias, head.attention_weight, None, "nxn", [1, 1], False, None)


@pytest.mark.slow
def test_a_lost_ticket_traps_with_a_sentence(monkeypatch):
    """A mutant that forgets what ticket 1 was for. Without the watchdog the launch would hang, which the emulation calls a deadlock."""
    mutant = cuda_emulation.load(FORWARD, [Edit("csrc/interflow_head/cuda/forward.cu", TURN, LOST)])
    for blocks in (1, 3):
        with emulated(mutant, blocks, 0):
            monkeypatch.delenv("INTERFLOW_WATCHDOG", raising=False)
            with pytest.raises(RuntimeError, match="waits for a word that stays|deadlock"):
                run(mutant)
            monkeypatch.setenv("INTERFLOW_WATCHDOG", "1")
            sentence = (
                r"interflow_head_forward_kernel, ticket:\d+: counter of its group's events: Assertion `all units of the group were done within two seconds`"
            )
            with pytest.raises(RuntimeError, match=sentence):
                run(mutant)


def test_nothing_changes_where_all_is_well(monkeypatch):
    library = cuda_emulation.load(cuda_emulation.operator_sources())
    results = []
    for value in ("", "0", "1"):
        monkeypatch.setenv("INTERFLOW_WATCHDOG", value)
        with emulated(library, 3, 1):
            results.append(run(library))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_wrong_value_is_named(monkeypatch):
    library = cuda_emulation.load(cuda_emulation.operator_sources())
    monkeypatch.setenv("INTERFLOW_WATCHDOG", "yes")
    with pytest.raises(RuntimeError, match="INTERFLOW_WATCHDOG must be 0 or 1, got 'yes'"):
        run(library)
