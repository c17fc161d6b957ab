#!/usr/bin/env bash
# Visit 2 of three to a GPU that is there for minutes: the tests that need a GPU. bench/gpu/parts.py says what and for how long.
# OUT: where results go. PYTHON, DEVICE=cpu: another interpreter, a rehearsal. Brought along: build/gpu-kit, made by `make gpu-kit`.
cd "$(dirname "$0")/../.." || exit 2
PYTHONPATH=bench exec "${PYTHON:-python3}" -m gpu call2 --device "${DEVICE:-cuda}" ${OUT:+--out "$OUT"} "$@"
