// The stage tap on NCHW maps, plane after plane, and on maps of any other strides, gathered a few rows at a time.

namespace interflow::INTERFLOW_ISA {

// Elements of a row of windows, or of a run, that are summed in Acc and gathered at a time: even, whole bytes of the mask.
template <class Acc>
constexpr int64_t kRowPiece = kRun<Acc> * 2 * kLanes<Acc>;
template <class Acc>
constexpr int64_t kRunPiece = kRun<Acc> * kLanes<Acc>;

// Bytes that a plane's reads are asked for ahead: with this much arithmetic a load, the processor alone looks too little ahead.
constexpr int64_t kPlanesAhead = 2048;

// --- forward: two rows with stride 1 -------------------------------------------------------------------------------------
// Windows of `width` columns; bottom null for the last row of an odd H. Writes complete windows to m, all to mask; returns
// sums of v by lane.
template <bool kMask, class Acc, class T>
INTERFLOW_INLINE Vec<Acc> tap_rows(const T* top, const T* bottom, int64_t width, const T* end, Vec<Acc> shift, T* m, uint8_t* mask) {
  constexpr int64_t L = kLanes<Acc>;
  Vec<Acc> sum{};
  Lanes<Acc> byte{};
  int64_t x = 0;

  // Whole vectors of complete windows
  if (bottom) {
    for (; x + 2 * L <= width; x += 2 * L) {
      // Rows mostly follow each other: both are one stream, read at twice the pace of x
      prefetch(top + 2 * x, kPlanesAhead);
      prefetch(top + 2 * x, kPlanesAhead + 64);
      Pair<Acc> a = load_split(top + x), b = load_split(bottom + x);
      TapWindow<Acc> window{{rectified<T, Acc>(a.first, shift), rectified<T, Acc>(a.second, shift), rectified<T, Acc>(b.first, shift), rectified<T, Acc>(b.second, shift)}};
      sum += window.sum();
      store_exact(m + x / 2, window.template maximum<kMask>(byte));
      if constexpr (kMask) {
        Bytes<Acc> narrow = to_bytes<Acc>(byte);
        __builtin_memcpy(mask + x / 2, &narrow, sizeof narrow);
      }
    }
  }

  // The rest: what lies outside the map becomes 0 and passes nothing
  for (; x < width; x += 2 * L) {
    int64_t columns = std::min(width - x, 2 * L), windows = (columns + 1) / 2, complete = bottom ? columns / 2 : 0;
    Lanes<Acc> in_first = first_lanes<Acc>(windows), in_second = first_lanes<Acc>(columns / 2);
    Pair<Acc> a = load_split(Readable<2 * L, T>(top + x, columns, end).p), b{};
    if (bottom) b = load_split(Readable<2 * L, T>(bottom + x, columns, end).p);
    Lanes<Acc> below = Lanes<Acc>{} - int(bottom != nullptr);
    auto inside = [&](Lanes<Acc> in, Vec<Acc> u) INTERFLOW_LAMBDA { return select(in, rectified<T, Acc>(u, shift), Vec<Acc>{}); };
    TapWindow<Acc> window{{inside(in_first, a.first), inside(in_second, a.second), inside(in_first & below, b.first), inside(in_second & below, b.second)}};
    sum += window.sum();
    Vec<Acc> maximum = window.template maximum<kMask>(byte);
    if (complete > 0) store_partial(m + x / 2, maximum, complete);
    if constexpr (kMask) {
      Bytes<Acc> narrow = to_bytes<Acc>(byte & (first_lanes<Acc>(complete) | 0x0f));
      copy_few<L>(mask + x / 2, &narrow, windows);
    }
  }
  return sum;
}

// Mean only: a run of elements with stride 1, beginning at a whole byte of the mask.
template <bool kMask, class Acc, class T>
INTERFLOW_INLINE Vec<Acc> tap_run(const T* p, int64_t n, const T* end, Vec<Acc> shift, uint8_t* mask) {
  constexpr int64_t L = kLanes<Acc>;
  Vec<Acc> sums[8 / L] = {};
  auto eight = [&](const T* from, int64_t j, int64_t count) {
    unsigned found = 0;
#pragma GCC unroll 2
    for (int64_t q = 0; q < 8 / L; ++q) {
      Vec<Acc> v = rectified<T, Acc>(load(from + q * L), shift);
      if (count < 8) v = select(first_lanes<Acc>(count - q * L), v, Vec<Acc>{});
      sums[q] += v;
      if constexpr (kMask) found |= sign_bits<Acc>(passes<Acc>(v)) << (q * L);
    }
    if constexpr (kMask) mask[j / 8] = uint8_t(found);
  };
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) eight(p + j, j, 8);
  if (j < n) eight(Readable<8, T>(p + j, n - j, end).p, j, n - j);
  return L == 8 ? sums[0] : sums[0] + sums[8 / L - 1];
}

// --- forward: one plane --------------------------------------------------------------------------------------------------
template <bool kMask, class Acc, class T>
double tap_plane(const Plane<T>& plane, Vec<Acc> shift, T* m, uint8_t* mask) {
  RunSum<Acc> sum;
  int64_t windows_w = (plane.width + 1) / 2;
  T gathered[2][kRowPiece<Acc>];
  for (int64_t h = 0; h < plane.height; h += 2, m += plane.width / 2, mask += kMask ? windows_w : 0) {
    const T* top = plane.data + h * plane.stride_h;
    const T* bottom = h + 1 < plane.height ? top + plane.stride_h : nullptr;
    for (int64_t x = 0; x < plane.width; x += kRowPiece<Acc>) {
      int64_t n = std::min(kRowPiece<Acc>, plane.width - x), vectors = vectors_of(n, 2 * kLanes<Acc>);
      T* at_m = m + x / 2;
      uint8_t* at_mask = mask + (kMask ? x / 2 : 0);
      if (plane.stride_w == 1) {
        sum.add(tap_rows<kMask, Acc, T>(top + x, bottom ? bottom + x : nullptr, n, plane.end, shift, at_m, at_mask), vectors);
        continue;
      }
      gather(gathered[0], top + x * plane.stride_w, n, plane.stride_w);
      if (bottom) gather(gathered[1], bottom + x * plane.stride_w, n, plane.stride_w);
      sum.add(tap_rows<kMask, Acc, T>(gathered[0], bottom ? gathered[1] : nullptr, n, gathered[1] + kRowPiece<Acc>, shift, at_m, at_mask), vectors);
    }
  }
  return sum.total();
}

template <bool kMask, class Acc, class T>
double tap_plane_mean(const Plane<T>& plane, Vec<Acc> shift, uint8_t* mask) {
  RunSum<Acc> sum;
  T gathered[kRunPiece<Acc>];
  bool one_run = plane.is_one_run();
  for (int64_t first = 0, pixels = plane.height * plane.width; first < pixels; first += kRunPiece<Acc>) {
    int64_t n = std::min(kRunPiece<Acc>, pixels - first);
    if (!one_run) plane.gather_run(gathered, first, n);
    const T* run = one_run ? plane.data + first : gathered;
    sum.add(tap_run<kMask, Acc, T>(run, n, one_run ? plane.end : gathered + kRunPiece<Acc>, shift, mask + (kMask ? first / 8 : 0)), kRun<Acc>);
  }
  return sum.total();
}

template <bool kMask, class Acc, class T>
void tap_planes(const TapParams& P, int64_t image, int64_t part) {
  const TapShape& s = P.plan.shape;
  int64_t first = part * P.plan.part_size, last = std::min(s.channels, first + P.plan.part_size);
  int64_t maxima = (s.height / 2) * (s.width / 2), bytes = s.mask_bytes(P.plan.max_pool) / s.channels;
  for (int64_t c = first; c < last; ++c) {
    int64_t plane_number = image * s.channels + c;
    Plane<T> plane{static_cast<const T*>(P.u) + image * P.stride_b + c * P.stride_c, s.height, s.width, P.stride_h, P.stride_w, static_cast<const T*>(P.u_end)};
    Vec<Acc> shift = broadcast(static_cast<const Acc*>(P.shift)[c]);
    uint8_t* mask = kMask ? P.mask + plane_number * bytes : nullptr;
    double sum = P.plan.max_pool ? tap_plane<kMask, Acc, T>(plane, shift, static_cast<T*>(P.m) + plane_number * maxima, mask)
                                 : tap_plane_mean<kMask, Acc, T>(plane, shift, mask);
    static_cast<Acc*>(P.p)[plane_number] = Acc(sum / double(s.pixels()));
  }
}

// --- backward ------------------------------------------------------------------------------------------------------------
// Two rows of du; bottom null for the last row of an odd H. dm: the row's complete windows, or null. Returns sums of du by lane.
template <class Acc, class T>
INTERFLOW_INLINE Vec<Acc> tap_rows_backward(T* top, T* bottom, int64_t width, const uint8_t* mask, const T* dm, Vec<Acc> gp) {
  constexpr int64_t L = kLanes<Acc>;
  Vec<Acc> sum{};
  int64_t x = 0;
  if (bottom) {
    for (; x + 2 * L <= width; x += 2 * L) {
      TapGradient<Acc> g(from_bytes<Acc>(load_bytes<Bytes<Acc>>(mask + x / 2)), dm ? load(dm + x / 2) : Vec<Acc>{}, gp);
      Pair<Acc> a = interleave<Acc>(g.d[0], g.d[1]), b = interleave<Acc>(g.d[2], g.d[3]);
      store(top + x, a.first), store(top + x + L, a.second);
      store(bottom + x, b.first), store(bottom + x + L, b.second);
      sum += g.sum();
    }
  }
  for (; x < width; x += 2 * L) {
    int64_t columns = std::min(width - x, 2 * L), complete = bottom ? columns / 2 : 0;
    Bytes<Acc> bytes{};
    copy_few<L>(&bytes, mask + x / 2, (columns + 1) / 2);
    TapGradient<Acc> g(from_bytes<Acc>(bytes), dm && complete ? load_partial<Acc>(dm + x / 2, complete) : Vec<Acc>{}, gp);
    auto write = [&](T* row, Pair<Acc> d) {
      T values[2 * L];
      store(values, d.first), store(values + L, d.second);
      copy_few<int64_t(sizeof values)>(row, values, columns * int64_t(sizeof(T)));
    };
    write(top + x, interleave<Acc>(g.d[0], g.d[1]));
    if (bottom) write(bottom + x, interleave<Acc>(g.d[2], g.d[3]));
    sum += g.sum();  // 0 outside the map: no bit of the mask is set there
  }
  return sum;
}

template <class Acc, class T>
double tap_plane_backward(const TapBackwardParams& P, T* du, const uint8_t* mask, const T* dm, Vec<Acc> gp) {
  const TapShape& s = P.plan.shape;
  RunSum<Acc> sum;
  T gathered[kRowPiece<Acc> / 2];
  for (int64_t h = 0; h < s.height; h += 2, mask += s.windows_w()) {
    T* top = du + h * s.width;
    T* bottom = h + 1 < s.height ? top + s.width : nullptr;
    for (int64_t x = 0; x < s.width; x += kRowPiece<Acc>) {
      int64_t n = std::min(kRowPiece<Acc>, s.width - x);
      const T* row = dm && bottom ? dm + h / 2 * P.dm_stride_h + x / 2 * P.dm_stride_w : nullptr;
      if (row && P.dm_stride_w != 1) {
        gather(gathered, row, n / 2, P.dm_stride_w);
        row = gathered;
      }
      sum.add(tap_rows_backward<Acc, T>(top + x, bottom ? bottom + x : nullptr, n, mask + x / 2, row, gp), vectors_of(n, 2 * kLanes<Acc>));
    }
  }
  return sum.total();
}

// Mean only: a run of elements, beginning at a whole byte of the mask.
template <class Acc, class T>
INTERFLOW_INLINE Vec<Acc> tap_run_backward(T* du, int64_t n, const uint8_t* mask, Vec<Acc> gp) {
  constexpr int64_t L = kLanes<Acc>;
  Vec<Acc> sum{};
  int64_t j = 0;
  for (; j + L <= n; j += L) {
    Vec<Acc> d = bits<Vec<Acc>>(lanes_of_bits<Acc>(mask[j / 8] >> (j % 8)) & bits<Lanes<Acc>>(gp));
    store(du + j, d);
    sum += d;
  }
  if (j < n) {
    Vec<Acc> d = bits<Vec<Acc>>(lanes_of_bits<Acc>(mask[j / 8] >> (j % 8)) & bits<Lanes<Acc>>(gp));
    store_partial(du + j, d, n - j);
    sum += d;
  }
  return sum;
}

template <class Acc, class T>
double tap_plane_mean_backward(T* du, int64_t pixels, const uint8_t* mask, Vec<Acc> gp) {
  RunSum<Acc> sum;
  for (int64_t first = 0; first < pixels; first += kRunPiece<Acc>)
    sum.add(tap_run_backward<Acc, T>(du + first, std::min(kRunPiece<Acc>, pixels - first), mask + first / 8, gp), kRun<Acc>);
  return sum.total();
}

template <class Acc, class T>
void tap_planes_backward(const TapBackwardParams& P, int64_t image, int64_t part) {
  const TapShape& s = P.plan.shape;
  int64_t first = part * P.plan.part_size, last = std::min(s.channels, first + P.plan.part_size);
  int64_t bytes = s.mask_bytes(P.plan.max_pool) / s.channels;
  for (int64_t c = first; c < last; ++c) {
    int64_t plane_number = image * s.channels + c;
    Vec<Acc> gp = P.dp ? broadcast(static_cast<const Acc*>(P.dp)[plane_number] / Acc(s.pixels())) : Vec<Acc>{};
    const uint8_t* mask = P.mask + plane_number * bytes;
    T* du = static_cast<T*>(P.du) + plane_number * s.pixels();
    const T* dm = P.dm ? static_cast<const T*>(P.dm) + image * P.dm_stride_b + c * P.dm_stride_c : nullptr;
    double sum = P.plan.max_pool ? tap_plane_backward<Acc, T>(P, du, mask, dm, gp) : tap_plane_mean_backward<Acc, T>(du, s.pixels(), mask, gp);
    if (P.dshift) static_cast<Acc*>(P.dshift)[plane_number] = Acc(sum);
  }
}

}  // namespace interflow::INTERFLOW_ISA
