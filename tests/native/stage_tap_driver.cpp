// Runs the stage tap's kernels of two instruction sets on the same inputs, in buffers that end where they must, and compares
// every byte. Built with AddressSanitizer by tests/test_native.py, so that a read or write outside a tensor ends it.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "stage_tap/cpu/kernels.h"

using namespace interflow;

namespace {

uint32_t next_random() {
  static uint64_t state = 88172645463325252ull;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return uint32_t(state >> 20);
}

float next_value() {
  switch (next_random() % 64) {
    case 0: return -0.0f;
    case 1: return std::numeric_limits<float>::infinity();
    case 2: return -std::numeric_limits<float>::infinity();
    case 3: return std::numeric_limits<float>::quiet_NaN();
    default: return float(int(next_random() % 41) - 20) / 8;  // many ties
  }
}

template <class T>
std::vector<T> values(int64_t n) {
  std::vector<T> filled(static_cast<size_t>(n));
  for (T& x : filled) x = T(next_value());
  return filled;
}

struct Case {
  int64_t batch, channels, height, width;
  bool channels_last, max_pool, with_mask;
  int64_t gap;  // unused elements between those of a row, so that rows are gathered
};

template <class Acc, class T>
struct Results {
  std::vector<T> m, du;
  std::vector<Acc> p, dshift;
  std::vector<uint8_t> mask;
};

template <class Acc, class T>
Results<Acc, T> run(const TapKernels& kernels, const Case& c, DType dtype, const std::vector<T>& u, const std::vector<Acc>& shift, const std::vector<T>& dm,
                    const std::vector<Acc>& dp) {
  TapShape shape{c.batch, c.channels, c.height, c.width, c.channels_last};
  TapPlan plan{shape, dtype, c.max_pool, 0, 3};
  int64_t all = !c.channels_last ? c.channels : c.max_pool ? shape.windows_h() * shape.windows_w() : shape.pixels();
  plan.parts = (all + plan.part_size - 1) / plan.part_size;
  auto sized = [](int64_t n) { return size_t(n); };
  int64_t maxima = c.batch * c.channels * (c.height / 2) * (c.width / 2), rows = c.channels_last ? plan.parts : 1;
  Results<Acc, T> r{std::vector<T>(sized(maxima), T(77)), std::vector<T>(sized(c.batch * c.channels * shape.pixels()), T(77)),
                    std::vector<Acc>(sized(c.batch * c.channels), Acc(77)), std::vector<Acc>(sized(c.batch * rows * c.channels), Acc(77)),
                    std::vector<uint8_t>(sized(c.with_mask ? c.batch * shape.mask_bytes(c.max_pool) : 0), 77)};
  std::vector<Acc> partial(sized(c.batch * plan.parts * c.channels));
  std::vector<std::atomic<int>> arrivals(sized(c.batch));

  TapParams P{};
  P.plan = plan, P.u = u.data(), P.u_end = u.data() + u.size(), P.shift = shift.data();
  int64_t element = c.channels_last ? c.channels : c.gap + 1;
  P.stride_w = element, P.stride_h = c.width * element, P.stride_c = c.channels_last ? 1 : c.height * P.stride_h;
  P.stride_b = c.channels_last ? c.height * P.stride_h : c.channels * P.stride_c;
  P.m = c.max_pool ? r.m.data() : nullptr, P.p = r.p.data(), P.mask = c.with_mask ? r.mask.data() : nullptr;
  P.partial = partial.data(), P.arrivals = arrivals.data();
  for (int64_t i = 0; i < c.batch * plan.parts; ++i) kernels.forward(P, i / plan.parts, i % plan.parts);
  if (!c.with_mask) return r;

  TapBackwardParams B{};
  B.plan = plan, B.dp = dp.data(), B.mask = r.mask.data(), B.du = r.du.data(), B.dshift = r.dshift.data();
  if (c.max_pool) B.dm = dm.data();
  int64_t h = c.height / 2, w = c.width / 2;
  B.dm_stride_b = c.channels * h * w, B.dm_stride_c = c.channels_last ? 1 : h * w;
  B.dm_stride_h = c.channels_last ? w * c.channels : w, B.dm_stride_w = c.channels_last ? c.channels : 1;
  for (int64_t i = 0; i < c.batch * plan.parts; ++i) kernels.backward(B, i / plan.parts, i % plan.parts);
  return r;
}

template <class T>
void compare(const char* name, const std::vector<T>& a, const std::vector<T>& b, const Case& c) {
  for (size_t i = 0; i < a.size(); ++i) {
    double x = double(a[i]), y = double(b[i]);
    if (std::memcmp(&a[i], &b[i], sizeof(T)) == 0 || (x != x && y != y)) continue;
    std::printf("%s[%zu]: %g and %g for [%ld, %ld, %ld, %ld], channels_last %d, max_pool %d\n", name, i, x, y, long(c.batch), long(c.channels), long(c.height), long(c.width),
                c.channels_last, c.max_pool);
    std::exit(1);
  }
}

template <class Acc, class T>
void check(const Case& c, DType dtype) {
  int64_t elements = c.batch * c.channels * c.height * c.width, gap = c.channels_last ? 0 : c.gap;
  auto u = values<T>((elements - 1) * (gap + 1) + 1);  // the last element ends the buffer
  auto dm = values<T>(c.batch * c.channels * (c.height / 2) * (c.width / 2));
  auto dp = values<Acc>(c.batch * c.channels);
  std::vector<Acc> shift(size_t(c.channels) + 8, Acc(-0.0));
  for (int64_t i = 0; i < c.channels; ++i) shift[size_t(i)] = Acc(T(next_value()));
  auto first = run<Acc, T>(tap_kernels_baseline, c, dtype, u, shift, dm, dp);
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return;
  auto second = run<Acc, T>(tap_kernels_avx2, c, dtype, u, shift, dm, dp);
  compare("m", first.m, second.m, c), compare("p", first.p, second.p, c), compare("mask", first.mask, second.mask, c);
  compare("du", first.du, second.du, c), compare("dshift", first.dshift, second.dshift, c);
#endif
}

}  // namespace

int main() {
  long cases = 0;
  for (int64_t height : {1, 2, 5})
    for (int64_t width : {1, 2, 7, 16, 34})
      for (int64_t channels : {2, 3, 21})
        for (int form = 0; form < 16; ++form) {
          Case c{2, channels, height, width, bool(form & 1), bool(form & 2), bool(form & 4), form & 8 ? 1 : 0};
          check<float, float>(c, DType::F32), check<double, double>(c, DType::F64);
          check<float, c10::BFloat16>(c, DType::BF16), check<float, c10::Half>(c, DType::F16);
          cases += 4;
        }
  std::printf("%ld cases\n", cases);
}
