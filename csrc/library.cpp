// The schemas of every operator: the table of contents of the compiled part. Kernels register under their device's key.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(interflow_kernels, m) {
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
}
