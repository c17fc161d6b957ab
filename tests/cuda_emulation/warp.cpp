// What the lanes of a warp do together, and the matrix instructions.
#include <cstring>

#include "control.h"
#include "runtime.h"

namespace interflow::emulation {

void sync_warp(uint32_t mask) { meet(WarpOp::Sync, mask, nullptr, 0, __builtin_return_address(0)); }

void shuffle(uint32_t mask, void* value, int bytes, int from_lane) {
  const Warp::Values& values = meet(WarpOp::Shuffle, mask, value, bytes, __builtin_return_address(0));
  uint32_t lanes = current->block->warps[current->index / kWarpLanes].lanes;
  if (from_lane >= 0 && from_lane < kWarpLanes && lanes >> from_lane & 1) std::memcpy(value, values.at[from_lane], size_t(bytes));
}

uint32_t vote(uint32_t mask, bool yes) {
  const Warp::Values& values = meet(WarpOp::Vote, mask, &yes, 1, __builtin_return_address(0));
  uint32_t lanes = current->block->warps[current->index / kWarpLanes].lanes, votes = 0;
  for (uint32_t i = 0; i < kWarpLanes; ++i) votes |= uint32_t(lanes >> i & 1 && values.at[i][0]) << i;
  return votes;
}

// TF32 operands keep the upper 19 bits of their floats, as hardware reads them; exact products, one rounding of the sum.
void mma_16x8x8_tf32(float* c, const uint32_t* a, const uint32_t* b) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Warp::Values& values = meet(WarpOp::Matrix, ~0u, mine, sizeof mine, __builtin_return_address(0));
  uint32_t lane = current->index % kWarpLanes, g = lane / 4, j = lane % 4;
  auto element = [&](uint32_t of_lane, uint32_t i) {
    uint32_t bits;
    std::memcpy(&bits, values.at[of_lane] + 4 * i, 4);
    bits &= 0xffffe000;
    float x;
    std::memcpy(&x, &bits, 4);
    return double(x);
  };
  for (uint32_t i = 0; i < 4; ++i) {
    uint32_t row = g + i / 2 * 8, column = 2 * j + i % 2;
    double sum = 0;
    for (uint32_t k = 0; k < 8; ++k) sum += element(row % 8 * 4 + k % 4, row / 8 + k / 4 * 2) * element(column * 4 + k % 4, 4 + k / 4);
    c[i] = float(double(c[i]) + sum);
  }
}

}  // namespace interflow::emulation
