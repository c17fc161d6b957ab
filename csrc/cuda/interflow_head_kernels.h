// The head's contract between CUDA host code and kernels: parameter structs with a shape for each pointer, launchers. No torch headers.
#pragma once
#include <cuda_runtime_api.h>

#include "interflow_head_schedule.h"

namespace interflow {

// A small contiguous parameter in its own dtype; null where it does not exist.
struct Parameter {
  const void* data;
  DType dtype;
};

// Everything of the head behind the pooled values.
struct HeadTail {
  int count;                          // n
  int64_t batch, width, classes;      // B, D, K
  int64_t begin[kMaxStages + 1];      // first column of each stage in pooled and weight, and the end
  const float* pooled;                // [B, D]
  const void* weight;                 // [K, D]
  DType weight_dtype;
  bool vectors;                       // 16-byte loads of weight and pooled are aligned in every stage
  Attention mode;
  Parameter bias;                     // [n, K]
  Parameter attention_weight;         // as the table of modes has it
  Parameter attention_bias;
};

// A map as the pooling kernels read it.
struct HeadMap {
  const void* data;
  DType dtype;
  int64_t channels, height, width;                 // C, H, W
  int64_t stride_b, stride_c, stride_h, stride_w;  // in elements
  int64_t bins_h, bins_w;                          // Sh, Sw
  int64_t column;                                  // first column in pooled
};

struct HeadForward {
  HeadSchedule schedule;
  HeadMap maps[kMaxStages];
  HeadTail tail;
  float* pooled;       // [B, D], the same memory as tail.pooled
  float* partial;      // [groups, meetings]: of each meeting [parts, width], stage by stage at partial_begin
  int64_t partial_begin[kMaxStages], partial_group;
  uint32_t* counters;  // schedule.counters(), zero
  void* y;             // [B, K]
  void* branches;      // [B, n, K] or null
  DType out;
  bool stream;         // maps larger than the L2 cache
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
  float* epilogue_terms;    // [epilogue blocks, n * n + n + 1]
  uint32_t* counters;       // one, zero
  float* dpooled;           // [B, D] or null
  bool stages[kMaxStages];  // whose columns of dpooled are wanted, the others are zero
  void* dweight;            // [K, D] in the weight's dtype, or null
  void* dbias;              // [n, K] or null
  void* dattention_weight;  // or null
  void* dattention_bias;    // or null
};

constexpr int kProductImages = 16, kProductColumns = 64;    // a tile of dpooled
constexpr int kWeightClasses = 64, kWeightColumns = 128;    // a tile of dweight
constexpr int kEpilogueClasses = 64;

INTERFLOW_HOST_DEVICE inline int64_t score_tiles(const HeadTail& t) { return ceil_div(t.batch, kTileImages) * ceil_div(t.classes, kNarrowClasses); }
INTERFLOW_HOST_DEVICE inline int64_t column_tiles(const HeadTail& t, int stage, int columns) { return ceil_div(t.begin[stage + 1] - t.begin[stage], columns); }
INTERFLOW_HOST_DEVICE inline int64_t all_column_tiles(const HeadTail& t, int columns) {
  int64_t sum = 0;
  for (int i = 0; i < t.count; ++i) sum += column_tiles(t, i, columns);
  return sum;
}
inline int64_t epilogue_blocks(const HeadTail& t) { return ceil_div(t.classes, kEpilogueClasses); }

cudaError_t launch_head_forward(const HeadForward& params, cudaStream_t stream);
cudaError_t launch_head_scores(const HeadBackward& params, cudaStream_t stream);
cudaError_t launch_head_products(const HeadBackward& params, cudaStream_t stream);
cudaError_t launch_head_epilogue(const HeadBackward& params, cudaStream_t stream);

}  // namespace interflow
