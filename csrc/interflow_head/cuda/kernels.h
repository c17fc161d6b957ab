// The head's contract between CUDA host code and kernels: parameter structs with a shape for each pointer, launchers. No torch headers.
#pragma once
#include <cuda_runtime_api.h>

#include "interflow_head/cuda/schedule.h"

namespace interflow {

constexpr int kWarps = kHeadThreads / 32;
constexpr int kBlockColumns = 32;  // columns of pooled and weight that a warp multiplies at a time

// A small contiguous parameter in its own dtype; null where it does not exist.
struct Parameter {
  const void* data;
  DType dtype;
};

// Everything of the head behind the pooled values. interflow_pool has no more of it than count, batch and width.
struct HeadTail {
  int count;                          // n
  int64_t batch, width, classes;      // B, D, K
  int64_t begin[kMaxStages + 1];      // first column of each stage in pooled and weight, and the end
  int first_block[kMaxStages + 1];    // number of each stage's first block of 32 columns among all
  const float* pooled;                // [B, D]
  const void* weight;                 // [K, D]
  DType weight_dtype;
  bool vectors;                       // 16-byte loads of weight and pooled are aligned in every stage
  Attention mode;
  Parameter bias;                     // [n, K]
  Parameter attention_weight;         // as the table of modes has it
  Parameter attention_bias;
};

struct HeadForward {
  HeadSchedule schedule;
  Stage maps[kMaxStages];
  HeadTail tail;
  float* pooled;       // [B, D], the same memory as tail.pooled
  float* partial;      // [groups, reductions]: of each reduction [parts, width], stage by stage at partial_begin
  int64_t partial_begin[kMaxStages], partial_group;
  uint32_t* counters;  // schedule.counters(), zero
  void* y;             // [B, K]
  void* branches;      // [B, n, K] or null
  DType out;
  bool stream;         // maps larger than the L2 cache
  bool watchdog;       // a wait of more than two seconds traps

  // Whether branch scores are wanted, or make the gates.
  INTERFLOW_HOST_DEVICE bool by_branch() const { return branches || tail.mode == Attention::Gated; }
};

// The gradient of Z [B, n, K] as the product kernels take it: from memory, or dy times the attention's weight plus dbranches.
struct HeadBackward {
  HeadTail tail;
  Parameter dy;             // [B, K]
  Parameter dbranches;      // [B, n, K]
  float* dscores;           // [B, n, K]; null for the linear modes
  float* gate_terms;        // gated: [score tiles, n * n + n], sums of ds_i z_j and of ds_i over a tile
  float* score_terms;       // linear with dbranches: [groups of 16, n, K], sums of dy z over a group
  float* product_terms;     // linear without dbranches: [column tiles, K], sums of W G over a tile's columns
  float* epilogue_terms;    // [epilogue_terms(), epilogue_shares()], where those parameters have no class of their own
  int pooled_tiles[kMaxStages + 1];  // first column tile of each stage, and the end: of dpooled
  int weight_tiles[kMaxStages + 1];  // and of dweight
  uint32_t* counters;       // one, zero
  float* dpooled;           // [B, D] or null
  bool stages[kMaxStages];  // whose columns of dpooled are wanted, the others are zero
  void* dweight;            // [K, D] in the weight's dtype, or null
  void* dbias;              // [n, K] or null
  void* dattention_weight;  // or null
  void* dattention_bias;    // or null
};

constexpr int kProductImages = 16, kProductColumns = 32;    // a tile of dpooled
constexpr int kWeightClasses = 64, kWeightColumns = 128;    // a tile of dweight
constexpr int kEpilogueClasses = 32;
constexpr int kMostShares = 128;                            // blocks that share the gates' terms

INTERFLOW_HOST_DEVICE inline int64_t score_tiles(const HeadTail& t) { return ceil_div(t.batch, kTileImages) * ceil_div(t.classes, kNarrowClasses); }
// First tile of `columns` of each stage, and the end; a stage's last tile may be narrower. The end does not fit where 2^31 columns do not.
inline void column_tiles(int (&first)[kMaxStages + 1], const HeadTail& t, int columns) {
  first[0] = 0;
  for (int i = 0; i < t.count; ++i) first[i + 1] = first[i] + int(ceil_div(t.begin[i + 1] - t.begin[i], columns));
}
// The epilogue has a block for every stage and 32 classes; terms of parameters that have no class of their own are summed over `shares` of them.
inline int64_t epilogue_blocks(const HeadTail& t) { return ceil_div(t.classes, kEpilogueClasses) * t.count; }
INTERFLOW_HOST_DEVICE inline int epilogue_terms(const HeadTail& t) { return t.mode == Attention::Gated ? t.count * t.count + t.count : t.count + 1; }
INTERFLOW_HOST_DEVICE inline int64_t epilogue_shares(const HeadTail& t) {
  int64_t blocks = ceil_div(t.classes, kEpilogueClasses);
  if (t.mode != Attention::Gated) return blocks;
  return blocks * t.count < kMostShares ? blocks * t.count : kMostShares;
}

cudaError_t launch_head_forward(const HeadForward& params, cudaStream_t stream);
cudaError_t launch_head_pool(const HeadForward& params, cudaStream_t stream);  // of a schedule without classes
cudaError_t launch_head_scores(const HeadBackward& params, cudaStream_t stream);
cudaError_t launch_head_products(const HeadBackward& params, cudaStream_t stream);
cudaError_t launch_head_epilogue(const HeadBackward& params, cudaStream_t stream);

}  // namespace interflow
