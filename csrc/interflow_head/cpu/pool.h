// Pooling: every stage's adaptive windows averaged into pooled [B, D]. Each map is read once, in the order it lies in memory.
//
// Three ways through a map, by where stride 1 is: planes (W), pixels (C), and any strides. Work is cut into units of about
// 64 KB whose bounds and summation order depend on the stage's shape and strides only, never on B or the thread count, so
// that an image's result has the same bits in every batch. A pixel-way map of one bin is cut into runs of pixels; their
// sums meet in `partial` and whoever finishes an image's last run adds them, in order. All long sums have two levels (long_sum.h).

namespace interflow::INTERFLOW_ISA {

constexpr int64_t kSlab = 512;  // channels that a pixel-way unit sums at a time: 2-4 KB of sums in L1

// --- runs of elements with stride 1 ----------------------------------------------------------------------------------
// The sum of 2 * kLanes elements at a time, in four vectors.
template <class Acc>
struct FourSums {
  Vec<Acc> s0{}, s1{}, s2{}, s3{};

  template <class T>
  INTERFLOW_INLINE void add_all(const T* p, int64_t n) {  // n: a multiple of 4 * kLanes
    constexpr int64_t step = 2 * kLanes<Acc>;
    for (int64_t j = 0; j < n; j += 2 * step) {
      auto a = load_pair(p + j), b = load_pair(p + j + step);
      s0 += a.first, s1 += a.second, s2 += b.first, s3 += b.second;
    }
  }
  INTERFLOW_INLINE Vec<Acc> together() const { return (s0 + s1) + (s2 + s3); }
};

// Up to a block of elements, in Acc.
template <class Acc, class T>
INTERFLOW_INLINE Acc sum_few(const T* p, int64_t n) {
  constexpr int64_t step = 2 * kLanes<Acc>;
  if (n < step) {
    Acc sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += Acc(p[j]);
    return sum;
  }
  FourSums<Acc> sums;
  int64_t j = n / (2 * step) * (2 * step);
  sums.add_all(p, j);
  if (j + step <= n) {
    auto a = load_pair(p + j);
    sums.s0 += a.first, sums.s1 += a.second;
    j += step;
  }
  if (j < n) {
    auto a = load_pair(Padded<step, T>(p + j, n - j).values);
    sums.s2 += a.first, sums.s3 += a.second;
  }
  return reduce(sums.together());
}

template <class Acc, class T>
INTERFLOW_INLINE double sum_run(const T* p, int64_t n) {
  constexpr int64_t block = kRun<Acc> * 4 * kLanes<Acc>;
  if (n <= block) return sum_few<Acc>(p, n);
  LongVector<Acc> sum{};
  int64_t j = 0;
  for (; j + block <= n; j += block) {
    FourSums<Acc> sums;
    sums.add_all(p + j, block);
    sum.add(sums.together());
  }
  return sum.total() + sum_few<Acc>(p + j, n - j);
}

// --- elements with any stride -----------------------------------------------------------------------------------------
template <class Acc, class T>
INTERFLOW_INLINE void sum_strided(LongSum<Acc>& sum, const T* p, int64_t n, int64_t stride) {
  for (int64_t first = 0; first < n; first += kRun<Acc>) {
    Acc few = 0;
    for (int64_t j = first; j < std::min(first + kRun<Acc>, n); ++j) few += Acc(p[j * stride]);
    sum.add(few);
  }
}

// --- runs of pixels whose channels have stride 1: each channel's sum over p[pixel * stride + c] -------------------------
// One pixel after the other, the sums in L1: a single sequential stream. Adding 2, 4 or 8 pixels at once saves loads of the
// sums but reads as many interleaved streams, which the prefetchers lose (docs/decisions/cpu-head.md).
template <class Acc>
struct PixelSums : LongColumns<Acc, kSlab> {
  int64_t channels, count = 0;  // pixels in `few`

  explicit PixelSums(int64_t channels_) : LongColumns<Acc, kSlab>((channels_ + 2 * kLanes<Acc> - 1) / (2 * kLanes<Acc>) * (2 * kLanes<Acc>)), channels(channels_) {}  // whole pairs

  template <bool kFirst, class T>
  INTERFLOW_INLINE void add_pixel(const T* p) {
    constexpr int64_t step = 2 * kLanes<Acc>;
    auto add = [](Acc* to, Pair<Acc> a) INTERFLOW_LAMBDA {
      store(to, (kFirst ? Vec<Acc>{} : load(to)) + a.first);
      store(to + kLanes<Acc>, (kFirst ? Vec<Acc>{} : load(to + kLanes<Acc>)) + a.second);
    };
    int64_t c = 0;
    for (; c + step <= channels; c += step) add(this->few + c, load_pair(p + c));
    if (c < channels) add(this->few + c, load_pair(Padded<step, T>(p + c, channels - c).values));
  }

  template <class T>
  void add(const T* p, int64_t pixels, int64_t stride) {
    while (pixels > 0) {
      if (count == kRun<Acc>) this->carry(), count = 0;
      int64_t n = std::min(kRun<Acc> - count, pixels);
      pixels -= n;
      if (count == 0) add_pixel<true>(p), p += stride, ++count, --n;
      count += n;
      for (; n > 0; --n, p += stride) add_pixel<false>(p);
    }
  }

  // The sum of a channel; T is the type that was read.
  template <class T>
  INTERFLOW_INLINE double channel(int64_t c) const {
    constexpr int64_t step = 2 * kLanes<Acc>;
    int64_t place = c / step * step + pair_position<T>(int(c % step));
    return this->carried ? this->total(place) : double(this->few[place]);
  }
};

// --- one window of one image -----------------------------------------------------------------------------------------
struct Window {
  int64_t h0, h1, w0, w1;
  int64_t count() const { return (h1 - h0) * (w1 - w0); }
};

// PyTorch's adaptive windows: from floor(i * size / bins) to ceil((i + 1) * size / bins).
INTERFLOW_INLINE Window window(const Stage& s, int64_t bin) {
  int64_t i = bin / s.bins_w, j = bin % s.bins_w;
  return {i * s.height / s.bins_h, ((i + 1) * s.height + s.bins_h - 1) / s.bins_h, j * s.width / s.bins_w, ((j + 1) * s.width + s.bins_w - 1) / s.bins_w};
}

// Channel after channel, window after window: rows with stride 1 (Planes), or any stride.
template <class Acc, class T, Way way>
void pool_rows(const PoolPlan& plan, const StagePlan& stage, int64_t image, int64_t part, Acc* pooled) {
  const Stage& s = stage.map;
  const T* base = static_cast<const T*>(s.data) + image * s.stride_b;
  int64_t bins = s.bins_h * s.bins_w, last = std::min(s.channels, (part + 1) * stage.part_size);
  for (int64_t c = part * stage.part_size; c < last; ++c) {
    for (int64_t bin = 0; bin < bins; ++bin) {
      Window w = window(s, bin);
      const T* p = base + c * s.stride_c + w.h0 * s.stride_h + w.w0 * s.stride_w;
      LongSum<Acc> sum;
      for (int64_t h = w.h0; h < w.h1; ++h, p += s.stride_h) {
        if constexpr (way == Way::Planes)
          sum.add(sum_run<Acc>(p, w.w1 - w.w0));
        else
          sum_strided<Acc>(sum, p, w.w1 - w.w0, s.stride_w);
      }
      pooled[image * plan.width + s.column + c * bins + bin] = Acc(sum.total() / double(w.count()));
    }
  }
}

// A unit is one bin, or with a single bin one run of pixels; `part` numbers either.
template <class Acc, class T>
void pool_pixels(const PoolPlan& plan, const StagePlan& stage, int64_t image, int64_t part, Acc* pooled) {
  const Stage& s = stage.map;
  int64_t bins = s.bins_h * s.bins_w;
  bool runs = stage.parts > 1 && bins == 1;
  Window w = window(s, bins == 1 ? 0 : part);
  const T* base = static_cast<const T*>(s.data) + image * s.stride_b;
  Acc* out = pooled + image * plan.width + s.column;
  Acc* partial = runs ? static_cast<Acc*>(plan.partial) + stage.partial + image * stage.parts * s.channels : nullptr;

  for (int64_t c0 = 0; c0 < s.channels; c0 += kSlab) {
    int64_t channels = std::min(kSlab, s.channels - c0);
    PixelSums<Acc> sums(channels);

    // Sum this unit's pixels
    if (runs) {
      int64_t first = part * stage.part_size, last = std::min((part + 1) * stage.part_size, s.height * s.width);
      for (int64_t pixel = first; pixel < last;) {
        int64_t h = pixel / s.width, x = pixel % s.width, n = std::min(s.width - x, last - pixel);
        sums.add(base + h * s.stride_h + x * s.stride_w + c0, n, s.stride_w);
        pixel += n;
      }
    } else {
      for (int64_t h = w.h0; h < w.h1; ++h) sums.add(base + h * s.stride_h + w.w0 * s.stride_w + c0, w.w1 - w.w0, s.stride_w);
    }
    if (sums.carried) sums.carry();

    // Bring the channels back into order
    for (int64_t c = 0; c < channels; ++c) {
      double sum = sums.template channel<T>(c);
      if (runs)
        partial[part * s.channels + c0 + c] = Acc(sum);
      else
        out[(c0 + c) * bins + (bins == 1 ? 0 : part)] = Acc(sum / double(w.count()));
    }
  }

  // The last run of an image to finish adds them all, in order
  if (runs && plan.arrivals[stage.arrival + image].fetch_add(1, std::memory_order_acq_rel) + 1 == stage.parts)
    mean_of_rows(partial, stage.parts, s.channels, w.count(), out);
}

template <class Acc, class T>
void pool_typed(const PoolPlan& plan, const StagePlan& stage, int64_t image, int64_t part) {
  Acc* pooled = static_cast<Acc*>(plan.pooled);
  switch (stage.way) {
    case Way::Planes: return pool_rows<Acc, T, Way::Planes>(plan, stage, image, part, pooled);
    case Way::Pixels: return pool_pixels<Acc, T>(plan, stage, image, part, pooled);
    case Way::Strided: return pool_rows<Acc, T, Way::Strided>(plan, stage, image, part, pooled);
  }
}

void pool_unit(const PoolPlan& plan, const StagePlan& stage, int64_t image, int64_t part) {
  switch (stage.map.dtype) {
    case DType::F32: return pool_typed<float, float>(plan, stage, image, part);
    case DType::F64: return pool_typed<double, double>(plan, stage, image, part);
    case DType::BF16: return pool_typed<float, BFloat16>(plan, stage, image, part);
    case DType::F16: return pool_typed<float, Half>(plan, stage, image, part);
  }
}

}  // namespace interflow::INTERFLOW_ISA
