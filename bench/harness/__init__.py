"""How things are measured: cases, clocks, the gate, the machine, statistics. Nothing here knows what is measured."""
