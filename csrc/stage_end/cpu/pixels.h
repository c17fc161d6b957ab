// The stage end on NHWC maps: a vector of channels of a few pixels at a time.

namespace interflow::INTERFLOW_ISA {

constexpr int64_t kEndSlab = 512;  // channels that a unit sums at a time: 6-8 KB of sums in L1

// The pixels of an image, or of none, with their channels one behind the other: in place where they are, else copied.
template <class T>
struct Pixels {
  const T* base;
  int64_t width, stride_c, stride_h, stride_w;
  bool follow;  // each other, over the ends of rows
  T gathered[kEndAtOnce][kEndSlab];

  Pixels(const StridedMap& map, const MapShape& s, int64_t image)
      : base(map.data ? static_cast<const T*>(map.data) + image * map.stride_b : nullptr), width(s.width), stride_c(map.stride_c), stride_h(map.stride_h),
        stride_w(map.stride_w), follow(s.height == 1 || (s.width == 1 ? false : stride_h == stride_w * s.width)) {}

  // Channels [c0, c0 + channels) of the kCount pixels from i on.
  template <int kCount>
  INTERFLOW_INLINE void at(const T* (&pixel)[kCount], int64_t i, int64_t c0, int64_t channels) {
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      pixel[j] = nullptr;
      if (!base) continue;
      int64_t offset = follow ? (i + j) * stride_w : (i + j) / width * stride_h + (i + j) % width * stride_w;
      pixel[j] = base + offset + c0 * stride_c;
      if (stride_c == 1) continue;
      gather(gathered[j], pixel[j], channels, stride_c);
      pixel[j] = gathered[j];
    }
  }
};

// vector(c, is_whole, count) for the vectors of so many channels: `count` of L are there.
template <class Acc, class Vector>
INTERFLOW_INLINE void each_vector(int64_t channels, Vector vector) {
  constexpr int64_t L = kLanes<Acc>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) vector(c, std::integral_constant<bool, true>{}, L);
  if (c < channels) vector(c, std::integral_constant<bool, false>{}, channels - c);
}

template <int kCount, class Acc>
INTERFLOW_INLINE Vec<Acc> tree(const Vec<Acc> (&x)[kCount]) {
  if constexpr (kCount == 4)
    return (x[0] + x[1]) + (x[2] + x[3]);
  else
    return x[0];
}

// Pixels [first, last), a few at a time, then one by one; sums of each run of them are carried on.
template <class Sums, class Few>
INTERFLOW_INLINE void each_few(int64_t first, int64_t last, int64_t run, Sums& sums, Few few) {
  int64_t added = 0;
  auto next = [&] {
    if (added == run) sums.next_run(), added = 0;
    ++added;
  };
  int64_t i = first;
  for (; i + kEndAtOnce <= last; i += kEndAtOnce) next(), few(std::integral_constant<int, kEndAtOnce>{}, i);
  for (; i < last; ++i) next(), few(std::integral_constant<int, 1>{}, i);
}

// --- forward -------------------------------------------------------------------------------------------------------------
template <bool kRelu, bool kResidual, class Acc, class T>
void end_pixels(const EndParams& P, int64_t image, int64_t part) {
  const MapShape& s = P.plan.shape;
  int64_t first = part * P.plan.part_size, last = std::min(s.pixels(), first + P.plan.part_size);
  Pixels<T> u(P.u, s, image), residual(P.residual, s, image);
  T* v = static_cast<T*>(P.v) + image * s.pixels() * s.channels;
  Acc* p = static_cast<Acc*>(P.p) + image * s.channels;
  Acc* out = P.plan.parts > 1 ? static_cast<Acc*>(P.partial) + (image * P.plan.parts + part) * s.channels : p;

  for (int64_t c0 = 0; c0 < s.channels; c0 += kEndSlab) {
    int64_t channels = std::min(kEndSlab, s.channels - c0);
    const Acc* shift = static_cast<const Acc*>(P.shift) + c0;
    RunColumns<Acc, kEndSlab> sums(channels);
    each_few(first, last, kRun<Acc>, sums, [&](auto number, int64_t i) INTERFLOW_LAMBDA {
      constexpr int kCount = decltype(number)::value;
      const T *from[kCount], *added[kCount];
      u.at(from, i, c0, channels);
      if constexpr (kResidual) residual.at(added, i, c0, channels);
      T* to = v + i * s.channels + c0;
      each_vector<Acc>(channels, [&](int64_t c, auto is_whole, int64_t count) INTERFLOW_LAMBDA {
        constexpr bool kWhole = decltype(is_whole)::value;
        auto read = [&](const T* from) INTERFLOW_LAMBDA { return kWhole ? load(from) : load_partial<Acc>(from, count); };
        Vec<Acc> b = load(shift + c), x[kCount];
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) {
          Vec<Acc> r{};
          if constexpr (kResidual) r = read(added[j] + c);
          x[j] = ended<kRelu, kResidual, T, Acc>(read(from[j] + c), b, r);
          if constexpr (kWhole)
            store_exact(to + j * s.channels + c, x[j]);
          else
            store_partial(to + j * s.channels + c, x[j], count);
        }
        store(sums.few + c, load(sums.few + c) + tree<kCount, Acc>(x));
      });
    });
    sums.carry();
    double count = P.plan.parts > 1 ? 1.0 : double(s.pixels());
    for (int64_t c = 0; c < channels; ++c) out[c0 + c] = Acc(sums.total(c) / count);
  }

  // The last part of an image to finish adds them all, in order
  if (P.plan.parts > 1 && P.arrivals[image].fetch_add(1, std::memory_order_acq_rel) + 1 == P.plan.parts)
    mean_of_rows(static_cast<const Acc*>(P.partial) + image * P.plan.parts * s.channels, P.plan.parts, s.channels, s.pixels(), p);
}

// --- backward ------------------------------------------------------------------------------------------------------------
template <bool kRelu, bool kUpstream, class Acc, class T>
void end_pixels_backward(const EndBackwardParams& P, int64_t image, int64_t part) {
  const MapShape& s = P.plan.shape;
  int64_t first = part * P.plan.part_size, last = std::min(s.pixels(), first + P.plan.part_size);
  Pixels<T> dv(P.dv, s, image), v(P.v, s, image);
  T* du = static_cast<T*>(P.du) + image * s.pixels() * s.channels;
  alignas(64) Acc gp[kEndSlab];

  for (int64_t c0 = 0; c0 < s.channels; c0 += kEndSlab) {
    int64_t channels = std::min(kEndSlab, s.channels - c0);
    RunColumns<Acc, kEndSlab> sums(channels);
    std::fill(gp, gp + sums.vectors * kLanes<Acc>, Acc(-0.0));
    if (P.dp)
      for (int64_t c = 0; c < channels; ++c) gp[c] = static_cast<const Acc*>(P.dp)[image * s.channels + c0 + c] / Acc(s.pixels());
    each_few(first, last, kRun<Acc>, sums, [&](auto number, int64_t i) INTERFLOW_LAMBDA {
      constexpr int kCount = decltype(number)::value;
      const T *upstream[kCount], *value[kCount];
      if constexpr (kUpstream) dv.at(upstream, i, c0, channels);
      if constexpr (kRelu) v.at(value, i, c0, channels);
      T* to = du + i * s.channels + c0;
      each_vector<Acc>(channels, [&](int64_t c, auto is_whole, int64_t count) INTERFLOW_LAMBDA {
        constexpr bool kWhole = decltype(is_whole)::value;
        auto read = [&](const T* from) INTERFLOW_LAMBDA { return kWhole ? load(from) : load_partial<Acc>(from, count); };
        Vec<Acc> of_mean = load(gp + c), d[kCount];
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) {
          Vec<Acc> g = minus_zero<Acc>(), x{};
          if constexpr (kUpstream) g = read(upstream[j] + c);
          if constexpr (kRelu) x = read(value[j] + c);
          d[j] = end_gradient<kRelu, Acc>(g, of_mean, x);
          if constexpr (kWhole)
            store(to + j * s.channels + c, d[j]);
          else
            store_partial(to + j * s.channels + c, d[j], count);
        }
        store(sums.few + c, load(sums.few + c) + tree<kCount, Acc>(d));
      });
    });
    if (!P.dshift) continue;
    sums.carry();
    Acc* out = static_cast<Acc*>(P.dshift) + (image * P.plan.parts + part) * s.channels + c0;
    for (int64_t c = 0; c < channels; ++c) out[c] = Acc(sums.total(c));
  }
}

}  // namespace interflow::INTERFLOW_ISA
