"""What the CUDA host side does inside a capture, on a stand-in for CUDA's runtime that refuses what a real one refuses there."""

import re
import subprocess

import cuda_emulation
import pytest

if reason := cuda_emulation.why_not():
    pytest.skip(reason, allow_module_level=True)

PROGRAM = r"""
#include <cstdio>
#include "common/cuda/capture.h"

static cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
static bool known[4];
extern "C" cudaError_t CUDARTAPI cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* with) {
  cudaStreamCaptureMode before = mode;
  mode = *with, *with = before;
  return cudaSuccess;
}
// Setting a device up is refused while this thread's mode is that of a global capture.
extern "C" cudaError_t CUDARTAPI cudaSetDevice(int device) {
  if (!known[device] && mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  known[device] = true;
  return cudaSuccess;
}

int main() {
  if (cudaSetDevice(0) != cudaErrorStreamCaptureUnsupported) return 1;  // the stand-in refuses
  if (interflow::choose_device(0) != cudaSuccess) return 2;
  if (mode != cudaStreamCaptureModeGlobal) return 3;  // as it was
  if (interflow::choose_device(0) != cudaSuccess || mode != cudaStreamCaptureModeGlobal) return 4;
  return 0;
}
"""


def test_a_device_may_be_chosen_first_inside_a_capture(tmp_path):
    source, program = tmp_path / "capture.cpp", tmp_path / "capture"
    source.write_text(PROGRAM)
    places = [f"-I{cuda_emulation.ROOT / 'csrc'}", *(f"-isystem{folder}" for folder in cuda_emulation.cuda_headers())]
    cuda_emulation.run([cuda_emulation.compiler(), "-std=c++20", *places, source, "-o", program])
    assert subprocess.run([program]).returncode == 0


def test_nobody_chooses_a_device_otherwise():
    files = sorted(f for f in cuda_emulation.ROOT.glob("csrc/**/*") if f.is_file())
    callers = [f.name for f in files if re.search(r"\bcudaSetDevice\(", f.read_text())]
    assert callers == ["capture.h"]
