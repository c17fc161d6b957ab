// Runs the stage end's kernels of two instruction sets on the same inputs, in buffers that end where they must, and compares
// every byte. Built with AddressSanitizer by tests/test_native.py, so that a read or write outside a tensor ends it.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "stage_end/cpu/kernels.h"

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
    default: return float(int(next_random() % 41) - 20) / 8;
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
  bool channels_last, relu, both;  // both: with a residual, with dv
  int64_t gap;                     // unused elements between those of a row (between channels of the residual and dv), so that they are gathered
};

template <class Acc, class T>
struct Results {
  std::vector<T> v, du;
  std::vector<Acc> p, dshift;
};

// A map [B, C, H, W] whose elements lie `gap` apart, and whose last element ends the buffer.
template <class T>
StridedMap strided(const std::vector<T>& data, const Case& c, int64_t gap) {
  StridedMap m{};
  int64_t element = gap + 1;
  m.data = data.data(), m.end = data.data() + data.size();
  if (c.channels_last)
    m.stride_c = element, m.stride_w = c.channels * element, m.stride_h = c.width * m.stride_w, m.stride_b = c.height * m.stride_h;
  else
    m.stride_w = element, m.stride_h = c.width * element, m.stride_c = c.height * m.stride_h, m.stride_b = c.channels * m.stride_c;
  return m;
}

template <class Acc, class T>
Results<Acc, T> run(const EndKernels& kernels, const Case& c, DType dtype, const std::vector<T>& u, const std::vector<T>& other, const std::vector<Acc>& shift,
                    const std::vector<Acc>& dp) {
  MapShape shape{c.batch, c.channels, c.height, c.width, c.channels_last};
  EndPlan plan{shape, dtype, 0, 3};
  plan.parts = ((c.channels_last ? shape.pixels() : c.channels) + plan.part_size - 1) / plan.part_size;
  auto sized = [](int64_t n) { return size_t(n); };
  int64_t elements = c.batch * c.channels * shape.pixels(), rows = c.channels_last ? plan.parts : 1, u_gap = c.channels_last ? 0 : c.gap;
  Results<Acc, T> r{std::vector<T>(sized(elements), T(77)), std::vector<T>(sized(elements), T(77)), std::vector<Acc>(sized(c.batch * c.channels), Acc(77)),
                    std::vector<Acc>(sized(c.batch * rows * c.channels), Acc(77))};
  std::vector<Acc> partial(sized(c.batch * plan.parts * c.channels));
  std::vector<std::atomic<int>> arrivals(sized(c.batch));

  EndParams P{};
  P.plan = plan, P.relu = c.relu, P.u = strided(u, c, u_gap), P.shift = shift.data();
  if (c.both) P.residual = strided(other, c, c.gap);
  P.v = r.v.data(), P.p = r.p.data(), P.partial = partial.data(), P.arrivals = arrivals.data();
  for (int64_t i = 0; i < c.batch * plan.parts; ++i) kernels.forward(P, i / plan.parts, i % plan.parts);

  EndBackwardParams B{};
  B.plan = plan, B.dp = dp.data(), B.du = r.du.data(), B.dshift = r.dshift.data();
  if (c.relu) B.v = strided(r.v, c, 0);
  if (c.both) B.dv = strided(other, c, c.gap);
  for (int64_t i = 0; i < c.batch * plan.parts; ++i) kernels.backward(B, i / plan.parts, i % plan.parts);
  return r;
}

template <class T>
void compare(const char* name, const std::vector<T>& a, const std::vector<T>& b, const Case& c) {
  for (size_t i = 0; i < a.size(); ++i) {
    double x = double(a[i]), y = double(b[i]);
    if (std::memcmp(&a[i], &b[i], sizeof(T)) == 0 || (x != x && y != y)) continue;
    std::printf("%s[%zu]: %g and %g for [%ld, %ld, %ld, %ld], channels_last %d, relu %d\n", name, i, x, y, long(c.batch), long(c.channels), long(c.height), long(c.width),
                c.channels_last, c.relu);
    std::exit(1);
  }
}

template <class Acc, class T>
void check(const Case& c, DType dtype) {
  int64_t elements = c.batch * c.channels * c.height * c.width, u_gap = c.channels_last ? 0 : c.gap;
  auto u = values<T>((elements - 1) * (u_gap + 1) + 1), other = values<T>((elements - 1) * (c.gap + 1) + 1);
  auto dp = values<Acc>(c.batch * c.channels);
  std::vector<Acc> shift(size_t(c.channels) + 8, Acc(-0.0));
  for (int64_t i = 0; i < c.channels; ++i) shift[size_t(i)] = Acc(T(next_value()));
  auto first = run<Acc, T>(end_kernels_baseline, c, dtype, u, other, shift, dp);
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return;
  auto second = run<Acc, T>(end_kernels_avx2, c, dtype, u, other, shift, dp);
  compare("v", first.v, second.v, c), compare("p", first.p, second.p, c);
  compare("du", first.du, second.du, c), compare("dshift", first.dshift, second.dshift, c);
#endif
}

}  // namespace

int main() {
  long cases = 0;
  for (int64_t height : {1, 2, 5})
    for (int64_t width : {1, 2, 7, 34, 130})
      for (int64_t channels : {2, 3, 21})
        for (int form = 0; form < 16; ++form) {
          Case c{2, channels, height, width, bool(form & 1), bool(form & 2), bool(form & 4), form & 8 ? 1 : 0};
          check<float, float>(c, DType::F32), check<double, double>(c, DType::F64);
          check<float, c10::BFloat16>(c, DType::BF16), check<float, c10::Half>(c, DType::F16);
          cases += 4;
        }
  std::printf("%ld cases\n", cases);
}
