#!/usr/bin/env bash
# Visit 1 of three to a GPU that is there for minutes: correctness and speed of each kernel. bench/gpu/parts.py says what and for how long.
# OUT: where results go. PYTHON, DEVICE=cpu: another interpreter, a rehearsal. Brought along: build/gpu-kit, made by `make gpu-kit`.
cd "$(dirname "$0")/../.." || exit 2
PYTHONPATH=bench exec "${PYTHON:-python3}" -m gpu call1 --device "${DEVICE:-cuda}" ${OUT:+--out "$OUT"} "$@"
