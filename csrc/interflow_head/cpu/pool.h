// Pooling: every stage's adaptive windows averaged into pooled [B, D]. Each map is read once, in the order it lies in memory.
//
// Three ways through a map, by where stride 1 is: planes (W), pixels (C), and any strides. Work is cut into units of about
// 64 KB whose bounds and summation order depend on the stage's shape and strides only, never on B or the thread count, so
// that an image's result has the same bits in every batch. A pixel-way map of one bin is cut into runs of pixels; their
// sums meet in `partial` and whoever finishes an image's last run adds them, in order. Long sums of fp32 numbers are kept in fp32 for up to
// 256 numbers, then in fp64 (long_sum.h).

namespace interflow::INTERFLOW_ISA {

constexpr int64_t kSlab = 512;  // channels that a pixel-way unit sums at a time: 2-4 KB of sums in L1

// --- runs of elements with stride 1 ----------------------------------------------------------------------------------
// Sums in four vectors, each of which takes the sum of four vectors at a time: an addition to a long sum for every four loads.
template <class Acc>
struct FourSums {
  static constexpr int64_t kStep = 16 * kLanes<Acc>;
  Vec<Acc> s0{}, s1{}, s2{}, s3{};

  template <class T>
  INTERFLOW_INLINE void add_all(const T* p, int64_t n) {  // n: a multiple of kStep
    constexpr int64_t pair = 2 * kLanes<Acc>;
    auto four = [](const T* q) INTERFLOW_LAMBDA {
      auto a = load_pair(q), b = load_pair(q + pair);
      return (a.first + a.second) + (b.first + b.second);
    };
    for (int64_t j = 0; j < n; j += kStep) {
      s0 += four(p + j), s1 += four(p + j + 2 * pair);
      s2 += four(p + j + 4 * pair), s3 += four(p + j + 6 * pair);
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
  int64_t j = n / sums.kStep * sums.kStep;
  sums.add_all(p, j);
  for (; j + 2 * step <= n; j += 2 * step) {
    auto a = load_pair(p + j), b = load_pair(p + j + step);
    sums.s0 += a.first, sums.s1 += a.second, sums.s2 += b.first, sums.s3 += b.second;
  }
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
  constexpr int64_t block = kRun<Acc> * FourSums<Acc>::kStep;
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
struct PixelSums {
  static constexpr int64_t L = kLanes<Acc>;
  alignas(64) Acc few[kSlab];               // of the pixels of a run
  alignas(64) Acc more[kSlab];              // of whole runs, up to kRunsInAcc<Acc> of them
  alignas(64) LongVector<Acc> all[kSlab / L];  // of the runs before
  int64_t channels, vectors;
  int64_t count = 0, runs = 0;  // pixels in `few`, runs in `more`
  bool carried = false;

  explicit PixelSums(int64_t channels_) : channels(channels_), vectors((channels_ + 2 * L - 1) / (2 * L) * 2) {}  // whole pairs

  // Where a pixel stands in its run of kRun<Acc>: the first needs no sum to add to; the last takes the run into `more` on its way, and
  // the last of the first run has nothing there to add to. So a run costs no more loads and stores than one long sum would.
  enum class Place { First, Inner, Last, LastOfFirstRun };

  template <Place place>
  INTERFLOW_INLINE void add_vector(int64_t c, Vec<Acc> x) {
    if constexpr (place != Place::First) x = load(few + c) + x;
    if constexpr (place == Place::Last) x = load(more + c) + x;
    store((place == Place::First || place == Place::Inner ? few : more) + c, x);
  }

  template <Place place, class T>
  INTERFLOW_INLINE void add_pixel(const T* p) {
    auto add = [&](int64_t c, Pair<Acc> a) INTERFLOW_LAMBDA { add_vector<place>(c, a.first), add_vector<place>(c + L, a.second); };
    int64_t c = 0, end = channels;  // a copy: the compiler cannot know that the sums' stores leave the member alone
    for (; c + 2 * L <= end; c += 2 * L) add(c, load_pair(p + c));
    if (c < end) add(c, load_pair(Padded<2 * L, T>(p + c, end - c).values));
  }

  template <class T>
  void add(const T* p, int64_t pixels, int64_t stride) {
    while (pixels > 0) {
      int64_t inner = std::min(kRun<Acc> - 1 - count, pixels);
      pixels -= inner;
      if (count == 0 && inner > 0) add_pixel<Place::First>(p), p += stride, --inner, ++count;
      count += inner;
      for (; inner > 0; --inner, p += stride) add_pixel<Place::Inner>(p);
      if (pixels == 0) return;
      if (runs > 0)
        add_pixel<Place::Last>(p);
      else
        add_pixel<Place::LastOfFirstRun>(p);
      p += stride, --pixels, count = 0;
      if (++runs == kRunsInAcc<Acc>) carry();
    }
  }

  void carry() {
    for (int64_t i = 0; i < vectors; ++i) {
      if (!carried) all[i] = LongVector<Acc>{};
      all[i].add(load(more + i * L));
    }
    carried = true, runs = 0;
  }

  // Vector i of the sums of all pixels, divided by `divisor` if it is not 1.
  INTERFLOW_INLINE Vec<Acc> result(int64_t i, double divisor) {
    Vec<Acc> last{};
    if (count > 0) last = load(few + i * L);
    if (runs > 0) last += load(more + i * L);
    if (!carried) return divisor == 1 ? last : last / Acc(divisor);
    if (count + runs > 0) all[i].add(last);
    return divisor == 1 ? all[i].lanes() : all[i].lanes(divisor);
  }

  // The sums of all pixels, divided by `divisor`, to out[c * apart]. T is the type that was read: pairs of it may lie in another order.
  template <class T>
  void write(Acc* out, int64_t apart, double divisor) {
    constexpr int64_t pair = 2 * L;
    int64_t c = 0;
    if (pair_position<T>(1) == 1 && apart == 1)
      for (; c + L <= channels; c += L) store(out + c, result(c / L, divisor));
    for (int64_t i = c / L; i < vectors; ++i) store(few + i * L, result(i, divisor));
    for (; c < channels; ++c) out[c * apart] = few[c / pair * pair + pair_position<T>(int(c % pair))];
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
    if (runs)
      sums.template write<T>(partial + part * s.channels + c0, 1, 1);
    else
      sums.template write<T>(out + c0 * bins + (bins == 1 ? 0 : part), bins, double(w.count()));
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
