// The gated attention: g = softmax_i(sum_j M_ij z_j + c_i), y = sum_i g_i z_i, a vector of classes at a time.
// Ours, see the table in interflow_kernels/reference.py; with dg_i = dy z_i, ds_i = g_i (dg_i - sum_l g_l dg_l) = dy g_i (z_i - y),
// dz_i = dy g_i + sum_l M_li ds_l, dM_ij = sum ds_i z_j, dc_i = sum ds_i.

namespace interflow::INTERFLOW_ISA {

// exp(x) for x <= 0: x = n ln 2 + r, a polynomial of degree 6 in r (S. Moshier's Cephes coefficients), n into the exponent.
INTERFLOW_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  Vec<float> lowest = broadcast(-87.0f);
  auto underflow = less(x, lowest);
  Vec<float> clamped = select(underflow, lowest, x);
  Vec<float> shifted = fma(clamped, broadcast(1.44269504088896341f), broadcast(12582912.0f));  // 1.5 * 2^23: rounds to an integer
  Vec<float> n = shifted - broadcast(12582912.0f);
  Vec<float> r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec<float> e = broadcast(1.9875691500e-4f);
  e = fma(e, r, broadcast(1.3981999507e-3f));
  e = fma(e, r, broadcast(8.3334519073e-3f));
  e = fma(e, r, broadcast(4.1665795894e-2f));
  e = fma(e, r, broadcast(1.6666665459e-1f));
  e = fma(e, r, broadcast(5.0000001201e-1f));
  e = fma(e, r * r, r + broadcast(1.0f));
  U32x8 power = (bits<U32x8>(shifted) - 0x4b400000u + 127u) << 23;
  Vec<float> result = e * bits<Vec<float>>(power);
  return select(underflow, Vec<float>{}, result);
}
INTERFLOW_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int j = 0; j < kLanes<double>; ++j) x[j] = std::exp(x[j]);
  return x;
}

template <class Acc>
INTERFLOW_INLINE Vec<Acc> load_some(const Acc* p, int64_t n) {
  return n >= kLanes<Acc> ? load(p) : load_partial<Acc>(p, n);
}
template <class Acc>
INTERFLOW_INLINE void store_some(Acc* p, Vec<Acc> v, int64_t n) {
  n >= kLanes<Acc> ? store(p, v) : store_partial(p, v, n);
}

// gate[i] of z[i], both [n] vectors of classes; returns y.
template <class Acc>
INTERFLOW_INLINE Vec<Acc> gates(const Vec<Acc>* z, Vec<Acc>* gate, int n, const Acc* matrix, const Acc* offset) {
  Vec<Acc> highest{};
  for (int i = 0; i < n; ++i) {
    Vec<Acc> s = broadcast(offset[i]);
    for (int j = 0; j < n; ++j) s = fma(broadcast(matrix[i * n + j]), z[j], s);
    gate[i] = s;
    highest = i == 0 ? s : select(less(highest, s), s, highest);
  }
  Vec<Acc> sum{};
  for (int i = 0; i < n; ++i) {
    gate[i] = exp_nonpositive(gate[i] - highest);
    sum += gate[i];
  }
  Vec<Acc> y{};
  for (int i = 0; i < n; ++i) {
    gate[i] /= sum;
    y = fma(gate[i], z[i], y);
  }
  return y;
}

template <class Acc>
void gate_forward(const ProductParams<Acc>& P, int64_t b, int64_t k0, int64_t k1) {
  constexpr int64_t L = kLanes<Acc>;
  const Acc* scores = P.scores + b * P.count * P.classes;
  Vec<Acc> z[kMaxStages], gate[kMaxStages];
  for (int64_t k = k0; k < k1; k += L) {
    int64_t lanes = std::min(L, k1 - k);
    for (int i = 0; i < P.count; ++i) z[i] = load_some(scores + i * P.classes + k, lanes);
    Vec<Acc> y = gates(z, gate, P.count, P.gate_matrix, P.gate_offset);
    if (P.y)
      for (int64_t j = 0; j < lanes; ++j) put(P.y, P.out_dtype, b * P.classes + k + j, Acc(y[j]));
  }
}

template <class Acc>
void gate_backward(const GateBackwardParams<Acc>& P, int64_t b) {
  constexpr int64_t L = kLanes<Acc>;
  int n = P.count;
  int64_t base = b * n * P.classes;
  Vec<Acc> z[kMaxStages], gate[kMaxStages], ds[kMaxStages];
  Vec<Acc> dmatrix[kMaxStages * kMaxStages], doffset[kMaxStages];
  LongVector<Acc> all_dmatrix[kMaxStages * kMaxStages], all_doffset[kMaxStages];  // of runs before
  auto carry = [&](Vec<Acc>* few, LongVector<Acc>* all, int count) {
    for (int i = 0; i < count; ++i) all[i].add(few[i]), few[i] = Vec<Acc>{};
  };
  std::fill(dmatrix, dmatrix + n * n, Vec<Acc>{});
  std::fill(doffset, doffset + n, Vec<Acc>{});
  std::fill(all_dmatrix, all_dmatrix + n * n, LongVector<Acc>{});
  std::fill(all_doffset, all_doffset + n, LongVector<Acc>{});

  for (int64_t k = 0; k < P.classes; k += L) {
    if (k > 0 && k % (kRun<Acc> * L) == 0) carry(dmatrix, all_dmatrix, n * n), carry(doffset, all_doffset, n);
    int64_t lanes = std::min(L, P.classes - k);
    for (int i = 0; i < n; ++i) z[i] = load_some(P.scores + base + i * P.classes + k, lanes);
    Vec<Acc> y = gates(z, gate, n, P.matrix, P.offset);
    Vec<Acc> dy = load_some(P.dy + b * P.classes + k, lanes);
    for (int i = 0; i < n; ++i) {
      ds[i] = dy * gate[i] * (z[i] - y);
      doffset[i] += ds[i];
      for (int j = 0; j < n; ++j) dmatrix[i * n + j] = fma(ds[i], z[j], dmatrix[i * n + j]);
    }
    for (int i = 0; i < n; ++i) {
      int64_t place = base + i * P.classes + k;
      Vec<Acc> dz = dy * gate[i];
      for (int l = 0; l < n; ++l) dz = fma(broadcast(P.matrix[l * n + i]), ds[l], dz);
      if (P.dbranches) dz += load_some(P.dbranches + place, lanes);
      store_some(P.dscores + place, dz, lanes);
    }
  }
  carry(dmatrix, all_dmatrix, n * n), carry(doffset, all_doffset, n);
  for (int i = 0; i < n * n; ++i) P.dmatrix[b * n * n + i] = Acc(all_dmatrix[i].total());
  for (int i = 0; i < n; ++i) P.doffset[b * n + i] = Acc(all_doffset[i].total());
}

}  // namespace interflow::INTERFLOW_ISA
