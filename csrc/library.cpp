// The schemas of every operator: the table of contents of the compiled part. Kernels register under their device's key.
#include "common/registration.h"

// What this library exports, under a name of its own: INTERFLOW_EXPORTED(_version) is interflow_kernels_cpu_version.
#define INTERFLOW_EXPORTED(name) C10_CONCATENATE(INTERFLOW_LIBRARY, _cpu##name)

namespace interflow {
namespace {

constexpr const char* kSchemas[] = {
    // features: n of [B, C_i, H_i, W_i] or [B, D_i]; weight [K, D]; bias [n, K]; attention_weight, attention_bias by `attention`,
    // one of hard, 1xn, nxn, classwise, gated, folded. dtype: of y and branches; None: that of weight.
    // -> y [B, K], branches [B, n, K] or [0], pooled [B, D] in fp32 (fp64 for fp64 weights).
    "interflow_head(Tensor[] features, Tensor weight, Tensor? bias, Tensor? attention_weight, Tensor? attention_bias, "
    "str attention, int[2] pool_size, bool need_branches, ScalarType? dtype) "
    "-> (Tensor y, Tensor branches, Tensor pooled)",
    // dy [B, K], dbranches [B, n, K], each may be missing; widths: D_i of every stage; feature_stages: whose features need a gradient.
    // -> dpooled [B, D] as pooled (zero in the other stages' columns), dweight [K, D], dbias [n, K], dattention_weight,
    // dattention_bias as their parameters. What is not needed or does not exist comes back as [0].
    "interflow_head_backward(Tensor? dy, Tensor? dbranches, Tensor pooled, Tensor weight, Tensor? bias, "
    "Tensor? attention_weight, Tensor? attention_bias, str attention, int[] widths, int[] feature_stages, "
    "bool need_weight, bool need_bias, bool need_attention) "
    "-> (Tensor dpooled, Tensor dweight, Tensor dbias, Tensor dattention_weight, Tensor dattention_bias)",

    // features as above, in any floating dtypes, fp64 only together: the first half of interflow_head.
    // -> pooled [B, D] in fp32 (fp64 for fp64 features), bit for bit interflow_head's.
    "interflow_pool(Tensor[] features, int[2] pool_size) -> Tensor",

    // u [B, C, H, W]; shift [C] in u's dtype or fp32. max_pool: whether m is wanted; need_mask: whether backward will be.
    // -> m [B, C, H/2, W/2] in u's dtype, channels_last where u's channels have stride 1, or [0]; p [B, C] in fp32 (fp64 for
    // fp64 u); mask [bytes] uint8, see stage_tap/contract.h, or [0].
    "stage_tap(Tensor u, Tensor? shift, bool max_pool, bool need_mask) -> (Tensor m, Tensor p, Tensor mask)",
    // dm [B, C, H/2, W/2] in u's dtype and dp [B, C] as p, any strides, each may be missing; like: any tensor of u's shape and dtype,
    // never read; channels_last: of u and du. -> du [B, C, H, W], dshift [C] as p or [0].
    "stage_tap_backward(Tensor? dm, Tensor? dp, Tensor mask, Tensor like, bool max_pool, bool channels_last, bool need_shift) "
    "-> (Tensor du, Tensor dshift)",

    // u [B, C, H, W]; shift [C] in u's dtype or fp32; residual [B, C, H, W] in u's dtype, any strides; activation: relu or none.
    // -> v [B, C, H, W] in u's dtype and memory format; p [B, C] in fp32 (fp64 for fp64 u).
    "stage_end(Tensor u, Tensor? shift, Tensor? residual, str activation) -> (Tensor v, Tensor p)",
    // dv [B, C, H, W] in u's dtype and dp [B, C] as p, any strides, each may be missing; v: what forward returned, or None where
    // nothing is masked (activation none); like: any tensor of u's shape and dtype, never read; channels_last: of u and du.
    // -> du [B, C, H, W], which is also the residual's gradient; dshift [C] as p or [0].
    "stage_end_backward(Tensor? dv, Tensor? dp, Tensor? v, Tensor like, bool channels_last, bool need_shift) "
    "-> (Tensor du, Tensor dshift)",
};

// Owns the definitions until the process ends or the library is closed.
struct Definitions {
  TorchLibraryHandle library = nullptr;
  bool define() {
    if (aoti_torch_library_init_def(C10_STRINGIZE(INTERFLOW_LIBRARY), __FILE__, __LINE__, &library) != AOTI_TORCH_SUCCESS) return false;
    for (const char* schema : kSchemas)
      if (aoti_torch_library_def(library, schema) != AOTI_TORCH_SUCCESS) return false;
    return true;
  }
  ~Definitions() {
    if (library) aoti_torch_delete_library_object(library);
  }
};

Refusal& refusal() {
  static Refusal refusal;
  return refusal;
}

}  // namespace
}  // namespace interflow

extern "C" {
// The version of the package that this library belongs to.
__attribute__((visibility("default"))) const char* INTERFLOW_EXPORTED(_version)() { return INTERFLOW_VERSION; }
// Null where the operators in this process are of this version, else why this library's are not used.
__attribute__((visibility("default"))) const char* INTERFLOW_EXPORTED(_refusal)() { return interflow::refusal().text(); }
}

namespace interflow {

bool registers() {
  static Definitions definitions;
  static const bool first = refusal().first(C10_STRINGIZE(INTERFLOW_LIBRARY) "_cpu_version", &kSchemas, [] { return definitions.define(); });
  return first;
}

namespace {
[[maybe_unused]] const bool registered = registers();
}

}  // namespace interflow
