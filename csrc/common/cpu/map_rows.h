// Maps [B, C, H, W] on their way into vectors: runs of any strides, ends of maps, bias and ReLU. Nothing about one operator.
// No include guard: see vector.h.

namespace interflow::INTERFLOW_ISA {

// Vectors that n elements fill, `each` of them to a vector.
INTERFLOW_INLINE int64_t vectors_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

// n elements (one to N) from p; zeros behind them unless more may be read.
template <int N, class T>
struct Readable {
  Padded<N, T> padded;
  const T* p;
  INTERFLOW_INLINE Readable(const T* from, int64_t n, const T* end) : padded(from, from + N <= end ? 0 : n), p(from + N <= end ? from : padded.values) {}
};

template <class T>
void gather(T* to, const T* from, int64_t n, int64_t stride) {
  for (int64_t j = 0; j < n; ++j) to[j] = from[j * stride];
}

template <class T>
struct Plane {
  const T* data;
  int64_t height, width, stride_h, stride_w;
  const T* end;

  bool is_one_run() const { return stride_w == 1 && (height == 1 || stride_h == width); }

  // Elements [first, first + n) in row-major order.
  void gather_run(T* to, int64_t first, int64_t n) const {
    for (int64_t h = first / width, x = first % width; n > 0; ++h, x = 0) {
      int64_t count = std::min(n, width - x);
      gather(to, data + h * stride_h + x * stride_w, count, stride_w);
      to += count, n -= count;
    }
  }
};

// --- arithmetic ---------------------------------------------------------------------------------------------------------
// relu(x). NaN stays NaN, -0 stays -0.
template <class Acc>
INTERFLOW_INLINE Vec<Acc> rectify(Vec<Acc> x) {
  return select(less(x, Vec<Acc>{}), Vec<Acc>{}, x);
}

// relu(u + shift), rounded to T at each step.
template <class T, class Acc>
INTERFLOW_INLINE Vec<Acc> rectified(Vec<Acc> u, Vec<Acc> shift) {
  return rectify<Acc>(rounded_sum<T, Acc>(u + shift));
}

// Whether the gradient passes a rectified value: not v <= 0.
template <class Acc>
INTERFLOW_INLINE Lanes<Acc> passes(Vec<Acc> v) {
  return ~less_equal(v, Vec<Acc>{});
}

}  // namespace interflow::INTERFLOW_ISA
