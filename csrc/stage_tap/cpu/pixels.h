// The stage tap on NHWC maps: a vector of channels at a time, window after window; and the choice of the kernel.

namespace interflow::INTERFLOW_ISA {

constexpr int64_t kTapSlab = 512;  // channels that a unit sums at a time: 6-8 KB of sums in L1

// Bytes that a window's reads are asked for ahead; measured in docs/decisions/cpu-tap.md.
constexpr int64_t kPixelsAhead = 256;

// --- forward: the channels of one window or pixel -------------------------------------------------------------------------
// pixel[j] null: outside the map. sums[c] += sum of v.
template <bool kMask, bool kComplete, class Acc, class T>
INTERFLOW_INLINE void tap_channels(const T* const pixel[4], int64_t channels, const Acc* shift, Acc* sums, T* m, uint8_t* mask) {
  constexpr int64_t L = kLanes<Acc>;
  auto vector = [&](auto read, int64_t c, int64_t count) {
    TapWindow<Acc> window;
    Vec<Acc> s = load(shift + c);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      if constexpr (kComplete) prefetch(pixel[j] + c, kPixelsAhead);
      window.v[j] = kComplete || pixel[j] ? rectified<T, Acc>(read(pixel[j] + c), s) : Vec<Acc>{};
    }
    store(sums + c, load(sums + c) + window.sum());
    Lanes<Acc> byte{};
    Vec<Acc> maximum = window.template maximum<kMask>(byte);
    if (!kComplete) byte &= 0x0f;
    Bytes<Acc> narrow = to_bytes<Acc>(byte);
    if (count == L) {
      if constexpr (kComplete) store_exact(m + c, maximum);
      if constexpr (kMask) __builtin_memcpy(mask + c, &narrow, sizeof narrow);
    } else {
      if constexpr (kComplete) store_partial(m + c, maximum, count);
      if constexpr (kMask) copy_few<L>(mask + c, &narrow, count);
    }
  };
  int64_t c = 0;
  for (; c + L <= channels; c += L) vector([](const T* p) INTERFLOW_LAMBDA { return load(p); }, c, L);
  if (c < channels) vector([&](const T* p) INTERFLOW_LAMBDA { return load_partial<Acc>(p, channels - c); }, c, channels - c);
}

template <bool kMask, class Acc, class T>
INTERFLOW_INLINE void tap_pixel(const T* pixel, int64_t channels, const Acc* shift, Acc* sums, uint8_t* mask) {
  constexpr int64_t L = kLanes<Acc>;
  for (int64_t c = 0; c < channels; c += 8) {
    unsigned found = 0;
#pragma GCC unroll 2
    for (int64_t q = c; q < c + 8; q += L) {
      if (q >= channels) break;
      int64_t count = std::min(L, channels - q);
      Vec<Acc> v = rectified<T, Acc>(count == L ? load(pixel + q) : load_partial<Acc>(pixel + q, count), load(shift + q));
      if (count < L) v = select(first_lanes<Acc>(count), v, Vec<Acc>{});
      store(sums + q, load(sums + q) + v);
      if constexpr (kMask) found |= sign_bits<Acc>(passes<Acc>(v)) << (q - c);
    }
    if constexpr (kMask) mask[c / 8] = uint8_t(found);
  }
}

// --- forward: one unit -----------------------------------------------------------------------------------------------------
template <bool kMask, class Acc, class T>
void tap_pixels(const TapParams& P, int64_t image, int64_t part) {
  const TapShape& s = P.plan.shape;
  bool max_pool = P.plan.max_pool;
  int64_t row = max_pool ? s.windows_w() : s.width, all = max_pool ? s.windows_h() * row : s.pixels();
  int64_t first = part * P.plan.part_size, last = std::min(all, first + P.plan.part_size);
  int64_t bytes = max_pool ? s.channels : (s.channels + 7) / 8;  // of the mask, a window or pixel
  const T* base = static_cast<const T*>(P.u) + image * P.stride_b;
  T* m = static_cast<T*>(P.m) + image * (s.height / 2) * (s.width / 2) * s.channels;
  uint8_t* mask = kMask ? P.mask + image * s.mask_bytes(max_pool) : nullptr;
  Acc* p = static_cast<Acc*>(P.p) + image * s.channels;
  Acc* out = P.plan.parts > 1 ? static_cast<Acc*>(P.partial) + (image * P.plan.parts + part) * s.channels : p;

  for (int64_t c0 = 0; c0 < s.channels; c0 += kTapSlab) {
    int64_t channels = std::min(kTapSlab, s.channels - c0);
    const Acc* shift = static_cast<const Acc*>(P.shift) + c0;
    RunColumns<Acc, kTapSlab> sums(channels);
    for (int64_t i = first; i < last; ++i) {
      if (i > first && (i - first) % kRun<Acc> == 0) sums.next_run();
      uint8_t* at_mask = kMask ? mask + i * bytes + (max_pool ? c0 : c0 / 8) : nullptr;
      int64_t h = i / row, w = i % row;
      if (!max_pool) {
        tap_pixel<kMask, Acc, T>(base + h * P.stride_h + w * P.stride_w + c0, channels, shift, sums.few, at_mask);
        continue;
      }
      const T* corner = base + 2 * h * P.stride_h + 2 * w * P.stride_w + c0;
      bool right = 2 * w + 1 < s.width, below = 2 * h + 1 < s.height;
      const T* pixel[4] = {corner, right ? corner + P.stride_w : nullptr, below ? corner + P.stride_h : nullptr, right && below ? corner + P.stride_h + P.stride_w : nullptr};
      if (right && below)
        tap_channels<kMask, true, Acc, T>(pixel, channels, shift, sums.few, m + (h * (s.width / 2) + w) * s.channels + c0, at_mask);
      else
        tap_channels<kMask, false, Acc, T>(pixel, channels, shift, sums.few, nullptr, at_mask);
    }
    sums.carry();
    double count = P.plan.parts > 1 ? 1.0 : double(s.pixels());
    for (int64_t c = 0; c < channels; ++c) out[c0 + c] = Acc(sums.total(c) / count);
  }

  // The last part of an image to finish adds them all, in order
  if (P.plan.parts > 1 && P.arrivals[image].fetch_add(1, std::memory_order_acq_rel) + 1 == P.plan.parts)
    mean_of_rows(static_cast<const Acc*>(P.partial) + image * P.plan.parts * s.channels, P.plan.parts, s.channels, s.pixels(), p);
}

// --- backward ---------------------------------------------------------------------------------------------------------------
// dm: this window's complete channels, or null. gp [channels]: dp / (H W).
template <class Acc, class T>
INTERFLOW_INLINE void tap_channels_backward(T* const pixel[4], int64_t channels, const uint8_t* mask, const T* dm, const Acc* gp, Acc* sums) {
  constexpr int64_t L = kLanes<Acc>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    TapGradient<Acc> g(from_bytes<Acc>(load_bytes<Bytes<Acc>>(mask + c)), dm ? load(dm + c) : Vec<Acc>{}, load(gp + c));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      if (pixel[j]) store(pixel[j] + c, g.d[j]);
    store(sums + c, load(sums + c) + g.sum());
  }
  if (c < channels) {
    Bytes<Acc> bytes{};
    copy_few<L>(&bytes, mask + c, channels - c);
    TapGradient<Acc> g(from_bytes<Acc>(bytes), dm ? load_partial<Acc>(dm + c, channels - c) : Vec<Acc>{}, load(gp + c));
    for (int j = 0; j < 4; ++j)
      if (pixel[j]) store_partial(pixel[j] + c, g.d[j], channels - c);
    store(sums + c, load(sums + c) + g.sum());
  }
}

template <class Acc, class T>
INTERFLOW_INLINE void tap_pixel_backward(T* pixel, int64_t channels, const uint8_t* mask, const Acc* gp, Acc* sums) {
  constexpr int64_t L = kLanes<Acc>;
  for (int64_t c = 0; c < channels; c += L) {
    Vec<Acc> d = bits<Vec<Acc>>(lanes_of_bits<Acc>(mask[c / 8] >> (c % 8)) & bits<Lanes<Acc>>(load(gp + c)));
    if (c + L <= channels)
      store(pixel + c, d);
    else
      store_partial(pixel + c, d, channels - c);
    store(sums + c, load(sums + c) + d);
  }
}

template <class Acc, class T>
void tap_pixels_backward(const TapBackwardParams& P, int64_t image, int64_t part) {
  const TapShape& s = P.plan.shape;
  bool max_pool = P.plan.max_pool;
  int64_t row = max_pool ? s.windows_w() : s.width, all = max_pool ? s.windows_h() * row : s.pixels();
  int64_t first = part * P.plan.part_size, last = std::min(all, first + P.plan.part_size);
  int64_t bytes = max_pool ? s.channels : (s.channels + 7) / 8;
  const uint8_t* mask = P.mask + image * s.mask_bytes(max_pool);
  T* base = static_cast<T*>(P.du) + image * s.pixels() * s.channels;
  const T* dm = P.dm ? static_cast<const T*>(P.dm) + image * P.dm_stride_b : nullptr;
  alignas(64) Acc gp[kTapSlab];
  T gathered[kTapSlab];

  for (int64_t c0 = 0; c0 < s.channels; c0 += kTapSlab) {
    int64_t channels = std::min(kTapSlab, s.channels - c0);
    RunColumns<Acc, kTapSlab> sums(channels);
    std::fill(gp, gp + sums.vectors * kLanes<Acc>, Acc(0));
    if (P.dp)
      for (int64_t c = 0; c < channels; ++c) gp[c] = static_cast<const Acc*>(P.dp)[image * s.channels + c0 + c] / Acc(s.pixels());
    for (int64_t i = first; i < last; ++i) {
      if (i > first && (i - first) % kRun<Acc> == 0) sums.next_run();
      const uint8_t* at_mask = mask + i * bytes + (max_pool ? c0 : c0 / 8);
      int64_t h = i / row, w = i % row;
      if (!max_pool) {
        tap_pixel_backward<Acc, T>(base + i * s.channels + c0, channels, at_mask, gp, sums.few);
        continue;
      }
      T* corner = base + (2 * h * s.width + 2 * w) * s.channels + c0;
      bool right = 2 * w + 1 < s.width, below = 2 * h + 1 < s.height;
      T* pixel[4] = {corner, right ? corner + s.channels : nullptr, below ? corner + s.width * s.channels : nullptr,
                     right && below ? corner + (s.width + 1) * s.channels : nullptr};
      const T* at_dm = dm && right && below ? dm + h * P.dm_stride_h + w * P.dm_stride_w + c0 * P.dm_stride_c : nullptr;
      if (at_dm && P.dm_stride_c != 1) {
        gather(gathered, at_dm, channels, P.dm_stride_c);
        at_dm = gathered;
      }
      tap_channels_backward<Acc, T>(pixel, channels, at_mask, at_dm, gp, sums.few);
    }
    if (!P.dshift) continue;
    sums.carry();
    Acc* out = static_cast<Acc*>(P.dshift) + (image * P.plan.parts + part) * s.channels + c0;
    for (int64_t c = 0; c < channels; ++c) out[c] = Acc(sums.total(c));
  }
}

// --- the kernel of a dtype and layout ---------------------------------------------------------------------------------------
template <class Acc, class T>
void tap_typed(const TapParams& P, int64_t image, int64_t part) {
  if (P.plan.shape.channels_last)
    P.mask ? tap_pixels<true, Acc, T>(P, image, part) : tap_pixels<false, Acc, T>(P, image, part);
  else
    P.mask ? tap_planes<true, Acc, T>(P, image, part) : tap_planes<false, Acc, T>(P, image, part);
}

void tap_unit(const TapParams& P, int64_t image, int64_t part) {
  switch (P.plan.dtype) {
    case DType::F32: return tap_typed<float, float>(P, image, part);
    case DType::F64: return tap_typed<double, double>(P, image, part);
    case DType::BF16: return tap_typed<float, BFloat16>(P, image, part);
    case DType::F16: return tap_typed<float, Half>(P, image, part);
  }
}

template <class Acc, class T>
void tap_backward_typed(const TapBackwardParams& P, int64_t image, int64_t part) {
  P.plan.shape.channels_last ? tap_pixels_backward<Acc, T>(P, image, part) : tap_planes_backward<Acc, T>(P, image, part);
}

void tap_backward_unit(const TapBackwardParams& P, int64_t image, int64_t part) {
  switch (P.plan.dtype) {
    case DType::F32: return tap_backward_typed<float, float>(P, image, part);
    case DType::F64: return tap_backward_typed<double, double>(P, image, part);
    case DType::BF16: return tap_backward_typed<float, BFloat16>(P, image, part);
    case DType::F16: return tap_backward_typed<float, Half>(P, image, part);
  }
}

}  // namespace interflow::INTERFLOW_ISA
