// Pooling: every stage's adaptive windows averaged into pooled [B, D]. Each map is read once, in the order it lies in memory.
//
// Three ways through a map, by where stride 1 is: planes (W), pixels (C), and any strides. Work is cut into units of about
// 64 KB whose bounds and summation order depend on the stage's shape and strides only, never on B or the thread count, so
// that an image's result has the same bits in every batch. A pixel-way map of one bin is cut into runs of pixels; their
// sums meet in `partial` and whoever finishes an image's last run adds them, in order.

namespace interflow::INTERFLOW_ISA {

constexpr int64_t kSlab = 512;  // channels that a pixel-way unit sums at a time: 2-4 KB of sums in L1

// --- runs of elements with stride 1 ----------------------------------------------------------------------------------
template <class Acc, class T>
INTERFLOW_INLINE Acc sum_run(const T* p, int64_t n) {
  constexpr int64_t step = 2 * kLanes<Acc>;
  if (n < step) {
    Acc sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += Acc(p[j]);
    return sum;
  }
  Vec<Acc> s0{}, s1{}, s2{}, s3{};
  int64_t j = 0;
  for (; j + 2 * step <= n; j += 2 * step) {
    auto a = load_pair(p + j), b = load_pair(p + j + step);
    s0 += a.first, s1 += a.second, s2 += b.first, s3 += b.second;
  }
  if (j + step <= n) {
    auto a = load_pair(p + j);
    s0 += a.first, s1 += a.second;
    j += step;
  }
  if (j < n) {
    auto a = load_pair(Padded<step, T>(p + j, n - j).values);
    s2 += a.first, s3 += a.second;
  }
  return reduce((s0 + s1) + (s2 + s3));
}

// --- runs of pixels whose channels have stride 1: sums[c] += sum over pixels of p[pixel * stride + c] ----------------
// One pixel after the other, the sums in L1: a single sequential stream. Adding 2, 4 or 8 pixels at once saves loads of the
// sums but reads as many interleaved streams, which the prefetchers lose (docs/decisions.md).
template <class Acc, class T>
void sum_pixels(Acc* sums, const T* p, int64_t pixels, int64_t stride, int64_t channels) {
  constexpr int64_t step = 2 * kLanes<Acc>;
  auto add = [](Acc* to, Pair<Acc> a) {
    store(to, load(to) + a.first);
    store(to + kLanes<Acc>, load(to + kLanes<Acc>) + a.second);
  };
  for (int64_t j = 0; j < pixels; ++j, p += stride) {
    int64_t c = 0;
    for (; c + step <= channels; c += step) add(sums + c, load_pair(p + c));
    if (c < channels) add(sums + c, load_pair(Padded<step, T>(p + c, channels - c).values));
  }
}

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
      Acc sum = 0;
      for (int64_t h = w.h0; h < w.h1; ++h, p += s.stride_h) {
        if constexpr (way == Way::Planes) {
          sum += sum_run<Acc>(p, w.w1 - w.w0);
        } else {
          Acc row = 0;
          for (int64_t x = 0; x < w.w1 - w.w0; ++x) row += Acc(p[x * s.stride_w]);
          sum += row;
        }
      }
      pooled[image * plan.width + s.column + c * bins + bin] = sum / Acc(w.count());
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
  alignas(64) Acc sums[kSlab];

  for (int64_t c0 = 0; c0 < s.channels; c0 += kSlab) {
    int64_t channels = std::min(kSlab, s.channels - c0);
    constexpr int64_t step = 2 * kLanes<Acc>;
    std::fill(sums, sums + (channels + step - 1) / step * step, Acc(0));

    // Sum this unit's pixels
    if (runs) {
      int64_t first = part * stage.part_size, last = std::min((part + 1) * stage.part_size, s.height * s.width);
      for (int64_t pixel = first; pixel < last;) {
        int64_t h = pixel / s.width, x = pixel % s.width, n = std::min(s.width - x, last - pixel);
        sum_pixels(sums, base + h * s.stride_h + x * s.stride_w + c0, n, s.stride_w, channels);
        pixel += n;
      }
    } else {
      for (int64_t h = w.h0; h < w.h1; ++h) sum_pixels(sums, base + h * s.stride_h + w.w0 * s.stride_w + c0, w.w1 - w.w0, s.stride_w, channels);
    }

    // Bring the channels back into order
    for (int64_t c = 0; c < channels; ++c) {
      Acc sum = sums[c / step * step + pair_position<T>(int(c % step))];
      if (runs)
        partial[part * s.channels + c0 + c] = sum;
      else
        out[(c0 + c) * bins + (bins == 1 ? 0 : part)] = sum / Acc(w.count());
    }
  }

  // The last run of an image to finish adds them all, in order
  if (runs && plan.arrivals[stage.arrival + image].fetch_add(1, std::memory_order_acq_rel) + 1 == stage.parts) {
    for (int64_t c = 0; c < s.channels; ++c) out[c] = partial[c];
    for (int64_t r = 1; r < stage.parts; ++r)
      for (int64_t c = 0; c < s.channels; ++c) out[c] += partial[r * s.channels + c];
    for (int64_t c = 0; c < s.channels; ++c) out[c] /= Acc(w.count());
  }
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
