// The stage end on NCHW maps, plane after plane, and on maps of any other strides, gathered a run at a time.

namespace interflow::INTERFLOW_ISA {

// Elements of a run that are summed in Acc and gathered at a time.
template <class Acc>
constexpr int64_t kEndPiece = kEndAtOnce * kRun<Acc> * kLanes<Acc>;

// A plane of a map, or none, as runs with stride 1: in place where they have it, else copied a piece at a time.
template <class Acc, class T>
struct Runs {
  Plane<T> plane;
  bool one_run;
  T gathered[kEndPiece<Acc>];
  const T* end = nullptr;  // of the piece: reads up to here are safe

  Runs(const StridedMap& map, const MapShape& s, int64_t image, int64_t c)
      : plane{static_cast<const T*>(map.data) + image * map.stride_b + c * map.stride_c, s.height, s.width, map.stride_h, map.stride_w, static_cast<const T*>(map.end)},
        one_run(map.data && plane.is_one_run()) {
    if (one_run) end = plane.end;
    if (!one_run && map.data) end = gathered + kEndPiece<Acc>;
  }
  // Elements [first, first + n), n at most kEndPiece; null where there is no map.
  INTERFLOW_INLINE const T* piece(int64_t first, int64_t n) {
    if (one_run) return plane.data + first;
    if (end) plane.gather_run(gathered, first, n);
    return end ? gathered : nullptr;
  }
};

// each(at, count, which sum) for the vectors of n elements: `count` of L are there.
template <class Acc, class Each>
INTERFLOW_INLINE Vec<Acc> sum_of_vectors(int64_t n, Each each) {
  constexpr int64_t L = kLanes<Acc>;
  Vec<Acc> sums[kEndAtOnce] = {};
  int64_t j = 0;
  for (; j + kEndAtOnce * L <= n; j += kEndAtOnce * L) {
#pragma GCC unroll 4
    for (int q = 0; q < kEndAtOnce; ++q) sums[q] += each(j + q * L, std::integral_constant<bool, true>{}, L);
  }
  for (; j + L <= n; j += L) sums[0] += each(j, std::integral_constant<bool, true>{}, L);
  if (j < n) sums[1] += each(j, std::integral_constant<bool, false>{}, n - j);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// --- forward -------------------------------------------------------------------------------------------------------------
template <bool kRelu, bool kResidual, class Acc, class T>
double end_plane(Runs<Acc, T>& u, Runs<Acc, T>& residual, int64_t pixels, Vec<Acc> shift, T* v) {
  constexpr int64_t L = kLanes<Acc>;
  RunSum<Acc> sum;
  for (int64_t first = 0; first < pixels; first += kEndPiece<Acc>) {
    int64_t n = std::min(kEndPiece<Acc>, pixels - first);
    const T *from = u.piece(first, n), *added = residual.piece(first, n);
    T* to = v + first;
    sum.add(sum_of_vectors<Acc>(n,
                                [&](int64_t at, auto is_whole, int64_t count) INTERFLOW_LAMBDA {
                                  if constexpr (decltype(is_whole)::value) {
                                    Vec<Acc> x = ended<kRelu, kResidual, T, Acc>(load(from + at), shift, kResidual ? load(added + at) : Vec<Acc>{});
                                    store_exact(to + at, x);
                                    return x;
                                  } else {
                                    Vec<Acc> r = kResidual ? load(Readable<L, T>(added + at, count, residual.end).p) : Vec<Acc>{};
                                    Vec<Acc> x = ended<kRelu, kResidual, T, Acc>(load(Readable<L, T>(from + at, count, u.end).p), shift, r);
                                    store_partial(to + at, x, count);
                                    return select(first_lanes<Acc>(count), x, Vec<Acc>{});
                                  }
                                }),
            kRun<Acc>);
  }
  return sum.total();
}

template <bool kRelu, bool kResidual, class Acc, class T>
void end_planes(const EndParams& P, int64_t image, int64_t part) {
  const MapShape& s = P.plan.shape;
  int64_t first = part * P.plan.part_size, last = std::min(s.channels, first + P.plan.part_size);
  for (int64_t c = first; c < last; ++c) {
    int64_t plane = image * s.channels + c;
    Runs<Acc, T> u(P.u, s, image, c), residual(P.residual, s, image, c);
    double sum = end_plane<kRelu, kResidual, Acc, T>(u, residual, s.pixels(), broadcast(static_cast<const Acc*>(P.shift)[c]), static_cast<T*>(P.v) + plane * s.pixels());
    static_cast<Acc*>(P.p)[plane] = Acc(sum / double(s.pixels()));
  }
}

// --- backward ------------------------------------------------------------------------------------------------------------
template <bool kRelu, bool kUpstream, class Acc, class T>
double end_plane_backward(Runs<Acc, T>& dv, Runs<Acc, T>& v, int64_t pixels, Vec<Acc> gp, T* du) {
  constexpr int64_t L = kLanes<Acc>;
  RunSum<Acc> sum;
  for (int64_t first = 0; first < pixels; first += kEndPiece<Acc>) {
    int64_t n = std::min(kEndPiece<Acc>, pixels - first);
    const T *upstream = dv.piece(first, n), *value = v.piece(first, n);
    T* to = du + first;
    sum.add(sum_of_vectors<Acc>(n,
                                [&](int64_t at, auto is_whole, int64_t count) INTERFLOW_LAMBDA {
                                  if constexpr (decltype(is_whole)::value) {
                                    Vec<Acc> d = end_gradient<kRelu, Acc>(kUpstream ? load(upstream + at) : minus_zero<Acc>(), gp, kRelu ? load(value + at) : Vec<Acc>{});
                                    store(to + at, d);
                                    return d;
                                  } else {
                                    Vec<Acc> g = kUpstream ? load(Readable<L, T>(upstream + at, count, dv.end).p) : minus_zero<Acc>();
                                    Vec<Acc> x = kRelu ? load(Readable<L, T>(value + at, count, v.end).p) : Vec<Acc>{};
                                    Vec<Acc> d = end_gradient<kRelu, Acc>(g, gp, x);
                                    store_partial(to + at, d, count);
                                    return select(first_lanes<Acc>(count), d, Vec<Acc>{});
                                  }
                                }),
            kRun<Acc>);
  }
  return sum.total();
}

template <bool kRelu, bool kUpstream, class Acc, class T>
void end_planes_backward(const EndBackwardParams& P, int64_t image, int64_t part) {
  const MapShape& s = P.plan.shape;
  int64_t first = part * P.plan.part_size, last = std::min(s.channels, first + P.plan.part_size);
  for (int64_t c = first; c < last; ++c) {
    int64_t plane = image * s.channels + c;
    Vec<Acc> gp = P.dp ? broadcast(static_cast<const Acc*>(P.dp)[plane] / Acc(s.pixels())) : minus_zero<Acc>();
    Runs<Acc, T> dv(P.dv, s, image, c), v(P.v, s, image, c);
    double sum = end_plane_backward<kRelu, kUpstream, Acc, T>(dv, v, s.pixels(), gp, static_cast<T*>(P.du) + plane * s.pixels());
    if (P.dshift) static_cast<Acc*>(P.dshift)[plane] = Acc(sum);
  }
}

}  // namespace interflow::INTERFLOW_ISA
