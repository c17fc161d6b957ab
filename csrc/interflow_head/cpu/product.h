// The products: scores and logits forward; gradients of the pooled features and of the weight backward.
//
// Each output element is summed in one order whatever the tile it is computed in, so that bits depend neither on B nor on
// the thread count: forward along d in one vector of partial sums a stage, backward along k or b one after the other; runs of
// kProductRun or kImageRun steps in Acc, the runs in the second level of long_sum.h.
//
// y[b,k] = sum_i A_ik z_i + c is summed in lanes, and nxn's A is the sum of M's columns. Where that is not finite, `careful_logit` finds it
// again as the definition says, so that NaN and infinities stand where the definition puts them.

namespace interflow::INTERFLOW_ISA {

template <class Acc>
INTERFLOW_INLINE Acc at(const Aggregation<Acc>& a, int64_t i, int64_t k) {
  return a.a ? a.a[i * a.stage + k * a.klass] : Acc(1);
}

// Steps of a product that are summed in Acc: vectors of columns (64 of fp32 are 512 columns) or classes, and images. Images are often
// alike, and their terms then round alike.
constexpr int64_t kProductRun = 64, kImageRun = 32;
// Tiles of the weight's gradient whose products with the weight, which mostly cancel, are summed in Acc.
constexpr int64_t kDotRun = 4;

template <class Acc>
INTERFLOW_INLINE bool is_finite(Acc x) {
  return x - x == 0;
}

// Tiles of sums whose runs are carried out of the registers: MB x NV vectors.
template <int MB, int NV, class Acc, int64_t kRunsHere = kRunsInAcc<Acc>>
struct LongTile {
  Vec<Acc> more[MB][NV];        // of whole runs, up to kRunsHere of them; undefined before the first
  LongVector<Acc> all[MB][NV];  // of the runs before; undefined before the first
  int64_t runs = 0;             // in `more`
  bool carried = false;

  INTERFLOW_INLINE LongTile() { asm("" : "=m"(more), "=m"(all)); }  // writes nothing: without it GCC warns of what `runs` and `carried` rule out

  // Loops are unrolled so that `few`, which the caller's inner loop adds to, stays in registers.
  INTERFLOW_INLINE void carry(Vec<Acc> (&few)[MB][NV]) {
#pragma GCC unroll 16
    for (int r = 0; r < MB; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        more[r][v] = runs ? more[r][v] + few[r][v] : few[r][v];
        few[r][v] = Vec<Acc>{};
      }
    if (++runs == kRunsHere) carry_more();
  }
  __attribute__((noinline)) void carry_more() {
#pragma GCC unroll 16
    for (int r = 0; r < MB; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        if (!carried) all[r][v] = LongVector<Acc>{};
        all[r][v].add(more[r][v]);
      }
    carried = true, runs = 0;
  }
  // The sum of all runs and lanes of one vector; `few` is the last run.
  INTERFLOW_INLINE double total(const Vec<Acc> (&few)[MB][NV], int r, int v) {
    Vec<Acc> last = runs ? more[r][v] + few[r][v] : few[r][v];
    if (!carried) return reduce(last);
    all[r][v].add(last);
    return all[r][v].total();
  }
  // `few` becomes the sum of all runs.
  INTERFLOW_INLINE void finish(Vec<Acc> (&few)[MB][NV]) {
    if (!carried && !runs) return;
#pragma GCC unroll 16
    for (int r = 0; r < MB; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        if (runs) few[r][v] += more[r][v];
        if (!carried) continue;
        all[r][v].add(few[r][v]);
        few[r][v] = all[r][v].lanes();
      }
  }
};

// --- forward ---------------------------------------------------------------------------------------------------------
// p_i W_i^T of MB images x MK classes, still to be summed over lanes.
template <int MB, int MK, class Acc, class W>
INTERFLOW_INLINE void branch_product(const ProductParams<Acc>& P, int i, int64_t b, int64_t k, Vec<Acc> (&z)[MB][MK]) {
  constexpr int64_t L = kLanes<Acc>;
  const W* w = static_cast<const W*>(P.weight) + k * P.width + P.columns[i].begin;
  const Acc* p = P.pooled + b * P.width + P.columns[i].begin;
  int64_t width = P.columns[i].end - P.columns[i].begin, whole = width / L * L, d = 0;
  LongTile<MB, MK, Acc, 1> earlier;  // attention's gradient may be a small difference of scores
  for (;;) {
    for (int64_t end = std::min(d + kProductRun * L, whole); d < end; d += L) {
      Vec<Acc> row[MK];
#pragma GCC unroll 16
      for (int q = 0; q < MK; ++q) row[q] = load(w + q * P.width + d);
#pragma GCC unroll 16
      for (int r = 0; r < MB; ++r) {
        Vec<Acc> x = load(p + r * P.width + d);
#pragma GCC unroll 16
        for (int q = 0; q < MK; ++q) z[r][q] = fma(x, row[q], z[r][q]);
      }
    }
    if (d == whole) break;
    earlier.carry(z);
  }
  if (d < width) {
    for (int r = 0; r < MB; ++r)
      for (int q = 0; q < MK; ++q)
        z[r][q] = fma(load_partial<Acc>(p + r * P.width + d, width - d), load_partial<Acc>(w + q * P.width + d, width - d), z[r][q]);
  }
  earlier.finish(z);
}

// y[b, k] of a linear mode, term by term.
template <class Acc, class W>
__attribute__((noinline, cold)) Acc careful_logit(const ProductParams<Acc>& P, int64_t b, int64_t k) {
  Acc y = P.c ? P.c[k * P.c_klass] : Acc(0);
  for (int i = 0; i < P.count; ++i) {
    Vec<Acc> z[1][1] = {};
    branch_product<1, 1, Acc, W>(P, i, b, k, z);
    Acc score = reduce(z[0][0]) + (P.bias ? P.bias[i * P.classes + k] : Acc(0));
    if (P.mixing)
      for (int j = 0; j < P.count; ++j) y += P.mixing[j * P.count + i] * score;
    else
      y += at(P.a, i, k) * score;
  }
  return y;
}

// MB images x MK classes: z in registers for one stage, y gathers a_ik * z over the stages; lanes are added at the end.
template <int MB, int MK, class Acc, class W>
void score_tile(const ProductParams<Acc>& P, int64_t b, int64_t k) {
  Vec<Acc> y[MB][MK] = {};
  Acc constant[MK];
  for (int q = 0; q < MK; ++q) constant[q] = P.c ? P.c[(k + q) * P.c_klass] : Acc(0);

  for (int i = 0; i < P.count; ++i) {
    Vec<Acc> z[MB][MK] = {};
    branch_product<MB, MK, Acc, W>(P, i, b, k, z);

    // Aggregate, and keep the branch scores where they are wanted
    for (int q = 0; q < MK; ++q) {
      Acc a = at(P.a, i, k + q), bias = P.bias ? P.bias[i * P.classes + k + q] : Acc(0);
      constant[q] += a * bias;
      for (int r = 0; r < MB; ++r) {
        y[r][q] = fma(z[r][q], broadcast(a), y[r][q]);
        if (P.scores || P.branches) {
          Acc score = reduce(z[r][q]) + bias;
          int64_t place = ((b + r) * P.count + i) * P.classes + k + q;
          if (P.scores) P.scores[place] = score;
          if (P.branches) put(P.branches, P.out_dtype, place, score);
        }
      }
    }
  }
  if (!P.y || P.gate_matrix) return;
  for (int r = 0; r < MB; ++r)
    for (int q = 0; q < MK; ++q) {
      Acc logit = reduce(y[r][q]) + constant[q];
      if (!is_finite(logit)) [[unlikely]]
        logit = careful_logit<Acc, W>(P, b + r, k + q);
      put(P.y, P.out_dtype, (b + r) * P.classes + k + q, logit);
    }
}

template <int MK, class Acc, class W>
void score_rows(const ProductParams<Acc>& P, int64_t k, int64_t b0, int64_t b1) {
  int64_t b = b0;
  for (; b + 4 <= b1; b += 4) score_tile<4, MK, Acc, W>(P, b, k);
  for (; b + 2 <= b1; b += 2) score_tile<2, MK, Acc, W>(P, b, k);
  if (b < b1) score_tile<1, MK, Acc, W>(P, b, k);
}

template <class Acc, class W>
void product_typed(const ProductParams<Acc>& P, int64_t k0, int64_t k1, int64_t b0, int64_t b1) {
  int64_t k = k0;
  if (b1 - b0 == 1)  // one image: more rows at once keep the multipliers busy
    for (; k + 8 <= k1; k += 8) score_tile<1, 8, Acc, W>(P, b0, k);
  for (; k + 3 <= k1; k += 3) score_rows<3, Acc, W>(P, k, b0, b1);
  for (; k < k1; ++k) score_rows<1, Acc, W>(P, k, b0, b1);
  if (P.gate_matrix)
    for (int64_t b = b0; b < b1; ++b) gate_forward(P, b, k0, k1);
}

// --- backward: dp[b, d] = sum_k dscores[b, i, k] W[k, d] --------------------------------------------------------------
template <int MB, int NV, class Acc, class W>
INTERFLOW_INLINE void pooled_gradient_tile(const PooledGradientParams<Acc>& P, int stage, int64_t d, int64_t partial, int64_t b) {
  constexpr int64_t L = kLanes<Acc>;
  const W* w = static_cast<const W*>(P.weight) + d;
  const Acc* g = P.dscores + (b * P.count + stage) * P.classes;
  Vec<Acc> sum[MB][NV] = {};
  LongTile<MB, NV, Acc> earlier;
  auto add = [&](int64_t k) INTERFLOW_LAMBDA {
    Vec<Acc> row[NV];
    if (partial) {
      row[0] = load_partial<Acc>(w, partial);
    } else {
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) row[v] = load(w + v * L);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MB; ++r) {
      Vec<Acc> x = broadcast(g[r * P.count * P.classes + k]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) sum[r][v] = fma(x, row[v], sum[r][v]);
    }
  };
  int64_t k = 0;
  for (; P.classes - k > kProductRun; earlier.carry(sum))
    for (int64_t end = k + kProductRun; k < end; ++k, w += P.width) add(k);
  for (; k < P.classes; ++k, w += P.width) add(k);
  if (P.classes > kProductRun) earlier.finish(sum);
  for (int r = 0; r < MB; ++r) {
    Acc* out = P.dpooled + (b + r) * P.width + d;
    if (partial) {
      store_partial(out, sum[r][0], partial);
    } else {
      for (int v = 0; v < NV; ++v) store(out + v * L, sum[r][v]);
    }
  }
}

template <class Acc, class W>
void pooled_gradient_typed(const PooledGradientParams<Acc>& P, int stage, int64_t d0, int64_t d1, int64_t b0, int64_t b1) {
  constexpr int64_t L = kLanes<Acc>;
  int64_t d = d0;
  for (; d + 2 * L <= d1; d += 2 * L) {
    int64_t b = b0;
    for (; b + 4 <= b1; b += 4) pooled_gradient_tile<4, 2, Acc, W>(P, stage, d, 0, b);
    for (; b < b1; ++b) pooled_gradient_tile<1, 2, Acc, W>(P, stage, d, 0, b);
  }
  for (; d < d1; d += L) {
    int64_t partial = d + L <= d1 ? 0 : d1 - d;
    for (int64_t b = b0; b < b1; ++b) pooled_gradient_tile<1, 1, Acc, W>(P, stage, d, partial, b);
  }
}

// --- backward: dW[k, d] and dA[i, k] ---------------------------------------------------------------------------------
template <int MK, int NV, class Acc, class W>
INTERFLOW_INLINE void weight_gradient_tile(const WeightGradientParams<Acc>& P, int i, int64_t k, int64_t d, int64_t partial, Vec<Acc> (&rowdot)[MK][1]) {
  constexpr int64_t L = kLanes<Acc>;
  Vec<Acc> sum[MK][NV] = {};
  LongTile<MK, NV, Acc, std::min<int64_t>(4, kRunsInAcc<Acc>)> earlier;
  const Acc* u = P.u + i * P.u_stage + k;
  const Acc* p = P.pooled + d;
  auto add = [&]() INTERFLOW_LAMBDA {
    Vec<Acc> x[NV];
    if (partial) {
      x[0] = load_partial<Acc>(p, partial);
    } else {
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) x[v] = load(p + v * L);
    }
#pragma GCC unroll 16
    for (int q = 0; q < MK; ++q) {
      Vec<Acc> scalar = broadcast(u[q]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) sum[q][v] = fma(scalar, x[v], sum[q][v]);
    }
  };
  auto add_images = [&](int64_t count) INTERFLOW_LAMBDA {
    for (; count > 0; --count, u += P.u_image, p += P.width) add();
  };
  int64_t images = P.batch;
  bool several_runs = images > 2 * kImageRun;
  for (; several_runs && images > kImageRun; images -= kImageRun) add_images(kImageRun), earlier.carry(sum);
  add_images(images);
  if (several_runs) earlier.finish(sum);
  for (int q = 0; q < MK; ++q) {
    int64_t place = (k + q) * P.width + d;
    Vec<Acc> scale = broadcast(at(P.scale, i, k + q));
    if (P.da) {
      const W* w = static_cast<const W*>(P.weight) + place;
      for (int v = 0; v < NV; ++v) rowdot[q][0] = fma(partial ? load_partial<Acc>(w, partial) : load(w + v * L), sum[q][v], rowdot[q][0]);
    }
    if (P.dweight) {
      W* out = static_cast<W*>(P.dweight) + place;
      for (int v = 0; v < NV; ++v) {
        if (partial)
          store_partial(out, sum[q][v] * scale, partial);
        else
          store(out + v * L, sum[q][v] * scale);
      }
    }
  }
}

template <int MK, class Acc, class W>
void weight_gradient_rows(const WeightGradientParams<Acc>& P, int64_t k) {
  constexpr int64_t L = kLanes<Acc>;
  for (int i = 0; i < P.count; ++i) {
    Vec<Acc> rowdot[MK][1] = {};
    LongTile<MK, 1, Acc, 1> dots;  // what mostly cancels goes straight to the second level
    int64_t d = P.columns[i].begin, end = P.columns[i].end, tile = 0;
    for (; d + 2 * L <= end; d += 2 * L) {
      if (P.da && tile > 0 && tile % kDotRun == 0) dots.carry(rowdot);
      ++tile;
      weight_gradient_tile<MK, 2, Acc, W>(P, i, k, d, 0, rowdot);
    }
    for (; d < end; d += L) weight_gradient_tile<MK, 1, Acc, W>(P, i, k, d, d + L <= end ? 0 : end - d, rowdot);
    if (P.da)
      for (int q = 0; q < MK; ++q) P.da[i * P.classes + k + q] = dots.total(rowdot, q, 0);
  }
}

template <class Acc, class W>
void weight_gradient_typed(const WeightGradientParams<Acc>& P, int64_t k0, int64_t k1) {
  int64_t k = k0;
  for (; k + 4 <= k1; k += 4) weight_gradient_rows<4, Acc, W>(P, k);
  for (; k < k1; ++k) weight_gradient_rows<1, Acc, W>(P, k);
}

// --- the weight's dtype becomes a type -------------------------------------------------------------------------------
template <class Acc, class F>
INTERFLOW_INLINE void with_weight_type(DType dtype, F f) {
  if constexpr (std::is_same_v<Acc, double>) {
    f(double{});
  } else {
    if (dtype == DType::BF16)
      f(BFloat16{});
    else if (dtype == DType::F16)
      f(Half{});
    else
      f(float{});
  }
}
template <class Acc>
void product(const ProductParams<Acc>& P, int64_t k0, int64_t k1, int64_t b0, int64_t b1) {
  with_weight_type<Acc>(P.weight_dtype, [&](auto w) { product_typed<Acc, decltype(w)>(P, k0, k1, b0, b1); });
}
template <class Acc>
void pooled_gradient(const PooledGradientParams<Acc>& P, int stage, int64_t d0, int64_t d1, int64_t b0, int64_t b1) {
  with_weight_type<Acc>(P.weight_dtype, [&](auto w) { pooled_gradient_typed<Acc, decltype(w)>(P, stage, d0, d1, b0, b1); });
}
template <class Acc>
void weight_gradient(const WeightGradientParams<Acc>& P, int64_t k0, int64_t k1) {
  with_weight_type<Acc>(P.weight_dtype, [&](auto w) { weight_gradient_typed<Acc, decltype(w)>(P, k0, k1); });
}

}  // namespace interflow::INTERFLOW_ISA
