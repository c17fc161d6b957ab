// The schemas of every operator: the table of contents of the compiled part. Kernels register under their device's key.
#include <torch/csrc/stable/library.h>

#ifndef INTERFLOW_LIBRARY  // the host emulation of the CUDA part defines the same operators under another name
#define INTERFLOW_LIBRARY interflow_kernels
#endif
#define INTERFLOW_DEFINE_IN(library, m) STABLE_TORCH_LIBRARY(library, m)

INTERFLOW_DEFINE_IN(INTERFLOW_LIBRARY, m) {
  // features: n of [B, C_i, H_i, W_i] or [B, D_i]; weight [K, D]; bias [n, K]; attention_weight, attention_bias by `attention`,
  // one of hard, 1xn, nxn, classwise, gated, folded. dtype: of y and branches; None: that of weight.
  // -> y [B, K], branches [B, n, K] or [0], pooled [B, D] in fp32 (fp64 for fp64 weights).
  m.def(
      "interflow_head(Tensor[] features, Tensor weight, Tensor? bias, Tensor? attention_weight, Tensor? attention_bias, "
      "str attention, int[2] pool_size, bool need_branches, ScalarType? dtype) "
      "-> (Tensor y, Tensor branches, Tensor pooled)");
  // dy [B, K], dbranches [B, n, K], each may be missing; widths: D_i of every stage; feature_stages: whose features need a gradient.
  // -> dpooled [B, D] as pooled (zero in the other stages' columns), dweight [K, D], dbias [n, K], dattention_weight,
  // dattention_bias as their parameters. What is not needed or does not exist comes back as [0].
  m.def(
      "interflow_head_backward(Tensor? dy, Tensor? dbranches, Tensor pooled, Tensor weight, Tensor? bias, "
      "Tensor? attention_weight, Tensor? attention_bias, str attention, int[] widths, int[] feature_stages, "
      "bool need_weight, bool need_bias, bool need_attention) "
      "-> (Tensor dpooled, Tensor dweight, Tensor dbias, Tensor dattention_weight, Tensor dattention_bias)");

  // u [B, C, H, W]; shift [C] in u's dtype or fp32. max_pool: whether m is wanted; need_mask: whether backward will be.
  // -> m [B, C, H/2, W/2] in u's dtype, channels_last where u's channels have stride 1, or [0]; p [B, C] in fp32 (fp64 for
  // fp64 u); mask [bytes] uint8, see stage_tap.h, or [0].
  m.def("stage_tap(Tensor u, Tensor? shift, bool max_pool, bool need_mask) -> (Tensor m, Tensor p, Tensor mask)");
  // dm [B, C, H/2, W/2] in u's dtype and dp [B, C] as p, any strides, each may be missing; like: any tensor of u's shape and dtype,
  // never read; channels_last: of u and du. -> du [B, C, H, W], dshift [C] as p or [0].
  m.def(
      "stage_tap_backward(Tensor? dm, Tensor? dp, Tensor mask, Tensor like, bool max_pool, bool channels_last, bool need_shift) "
      "-> (Tensor du, Tensor dshift)");
}
