// Sums of many numbers in levels: runs of a few numbers in Acc, and sums of the runs. Nothing about one operator.
//
// Acc alone rounds every addition of equal numbers the same way, so that errors add up. The second level is fp64 for fp32 numbers. For
// fp64 ones it is fp64 with what each addition loses beside it (D. Knuth's TwoSum, gathered as A. Neumaier does).
// No include guard: see vector.h. A run is at most kRun<Acc> additions long.

namespace interflow::INTERFLOW_ISA {

template <class Acc>
constexpr int64_t kRun = sizeof(Acc) == 4 ? 16 : 8;  // fp64's second level is hardly finer than its first: runs are short

// Where many sums are kept side by side, so many runs are added in Acc before they go to the second level: to bring eight fp32 sums there
// takes some five cycles, an addition in Acc one.
template <class Acc>
constexpr int64_t kRunsInAcc = sizeof(Acc) == 4 ? 16 : 1;

// sum += x; lost += what the addition rounded off.
template <class V>
INTERFLOW_INLINE void add_keeping_loss(V& sum, V& lost, V x) {
  V next = sum + x, taken = next - sum;
  lost += (sum - (next - taken)) + (x - taken);
  sum = next;
}

// sum + lost; once sum has met an infinity or a NaN, `lost` says nothing more.
INTERFLOW_INLINE double with_loss(double sum, double lost) {
  double whole = sum + lost;
  return whole == whole ? whole : sum;
}

// A sum of single numbers of type Acc.
template <class Acc>
struct LongSum {
  double sum = 0, lost = 0;  // lost: fp64 only

  INTERFLOW_INLINE void add(double x) {
    if constexpr (sizeof(Acc) == 4)
      sum += x;
    else
      add_keeping_loss(sum, lost, x);
  }
  INTERFLOW_INLINE double total() const { return sizeof(Acc) == 4 ? sum : with_loss(sum, lost); }
};

// A sum of vectors, lane by lane. Begins as LongVector<Acc>{}.
template <class Acc>
struct LongVector {
  Vec<double> first, second;  // fp32: lanes 0-3 and 4-7; fp64: the sum, and what its additions lost

  INTERFLOW_INLINE void add(Vec<Acc> v) {
    if constexpr (sizeof(Acc) == 4) {
      Pair<double> wide = widened(v);
      first += wide.first, second += wide.second;
    } else {
      add_keeping_loss(first, second, v);
    }
  }
  // The sum of lane j.
  INTERFLOW_INLINE double lane(int64_t j) const {
    if constexpr (sizeof(Acc) == 4)
      return j < 4 ? first[j] : second[j - 4];
    else
      return with_loss(first[j], second[j]);
  }
  // The sums of all lanes, divided by `divisor` if it is given, rounded to Acc.
  INTERFLOW_INLINE Vec<Acc> lanes() const { return rounded(first, second); }
  INTERFLOW_INLINE Vec<Acc> lanes(double divisor) const {
    if constexpr (sizeof(Acc) == 4) return rounded(first / divisor, second / divisor);
    return lanes() / Acc(divisor);
  }
  // The sum over all lanes.
  INTERFLOW_INLINE double total() const {
    if constexpr (sizeof(Acc) == 4) return reduce(first + second);
    LongSum<double> all;
    for (int j = 0; j < kLanes<double>; ++j) all.add(first[j]);
    for (int j = 0; j < kLanes<double>; ++j) all.lost += second[j];
    return all.total();
  }

 private:
  static INTERFLOW_INLINE Vec<Acc> rounded(Vec<double> first, Vec<double> second) {
    if constexpr (sizeof(Acc) == 4) {
      return narrowed(first, second);
    } else {
      Vec<Acc> whole = first + second;
      return select(whole == whole, whole, first);  // as with_loss
    }
  }
};

// A sum of many vectors, as they come: runs of at most kRun<Acc>, then the sum of the runs.
template <class Acc>
struct RunSum {
  Vec<Acc> few{};
  LongVector<Acc> all{};
  int64_t count = 0;

  // v: the sum of so many vectors, at most kRun<Acc>.
  INTERFLOW_INLINE void add(Vec<Acc> v, int64_t vectors) {
    few += v;
    if ((count += vectors) >= kRun<Acc>) carry();
  }
  INTERFLOW_INLINE void carry() {
    all.add(few);
    few = Vec<Acc>{}, count = 0;
  }
  INTERFLOW_INLINE double total() {
    carry();
    return all.total();
  }
};

// Sums of up to kChannels columns of numbers, a row after the other, run after run of at most kRun<Acc> rows.
template <class Acc, int64_t kChannels>
struct RunColumns {
  static constexpr int64_t L = kLanes<Acc>;
  alignas(64) Acc few[kChannels];                  // of this run's rows: the user adds to it
  alignas(64) LongVector<Acc> all[kChannels / L];  // of the runs before
  int64_t vectors;                                 // in use
  bool carried = false;

  explicit RunColumns(int64_t channels) : vectors((channels + L - 1) / L) { clear(); }
  void next_run() { carry(), clear(); }
  // Puts the run into the sums.
  void carry() {
    for (int64_t i = 0; i < vectors; ++i) {
      if (!carried) all[i] = LongVector<Acc>{};
      all[i].add(load(few + i * L));
    }
    carried = true;
  }
  double total(int64_t c) const { return all[c / L].lane(c % L); }

 private:
  void clear() { std::fill(few, few + vectors * L, Acc(0)); }
};

// kVectors vectors of the columns from c on: out = the sum over r of rows[r, :], divided by count.
template <int kVectors, class Acc>
INTERFLOW_INLINE void mean_of_columns(const Acc* rows, int64_t number, int64_t channels, int64_t count, Acc* out, int64_t c) {
  constexpr int64_t L = kLanes<Acc>;
  LongVector<Acc> sum[kVectors] = {};
  for (const Acc *row = rows + c, *end = row + number * channels; row != end; row += channels)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v].add(load(row + v * L));
  for (int v = 0; v < kVectors; ++v) store(out + c + v * L, sum[v].lanes(double(count)));
}

// out[c] = the sum over r of rows[r, c], divided by count. Two cache lines of a row at a time: each line is then read once.
template <class Acc>
void mean_of_rows(const Acc* rows, int64_t number, int64_t channels, int64_t count, Acc* out) {
  constexpr int64_t L = kLanes<Acc>;
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) mean_of_columns<4>(rows, number, channels, count, out, c);
  for (; c + L <= channels; c += L) mean_of_columns<1>(rows, number, channels, count, out, c);
  if (c == channels) return;
  LongVector<Acc> sum{};
  for (int64_t r = 0; r < number; ++r) sum.add(load_partial<Acc>(rows + r * channels + c, channels - c));
  store_partial(out + c, sum.lanes(double(count)), channels - c);
}

}  // namespace interflow::INTERFLOW_ISA
