// Sums over the rows of a matrix on the host side: over images, or over classes. One order, two storeys as in long_sum.h.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace interflow {

// Sums of `columns` columns. Rows are added one after the other: runs of kRows in Acc, the runs in fp64, for fp64 numbers with
// what each addition loses beside it.
template <class Acc>
class ColumnSums {
 public:
  explicit ColumnSums(int64_t columns) : few_(size_t(columns)), all_(size_t(columns)), lost_(sizeof(Acc) == 8 ? size_t(columns) : 0) {}

  void add(const Acc* row) {
    next_row();
    for (size_t c = 0; c < few_.size(); ++c) few_[c] += row[c];
  }
  // Adds row[c] * factor[c % period]; the columns are a multiple of the period.
  void add_product(const Acc* row, const Acc* factor, int64_t period) {
    next_row();
    for (size_t c = 0; c < few_.size(); c += size_t(period))
      for (size_t j = 0; j < size_t(period); ++j) few_[c + j] += row[c + j] * factor[j];
  }
  // Rounded to Acc. No row may be added later.
  void write(Acc* out) {
    carry();
    for (size_t c = 0; c < all_.size(); ++c) {
      double whole = lost_.empty() ? all_[c] : all_[c] + lost_[c];
      out[c] = Acc(whole == whole ? whole : all_[c]);  // after an infinity what was lost says nothing
    }
  }

 private:
  static constexpr int kRows = 16;

  void next_row() {
    if (rows_ == kRows) carry();
    ++rows_;
  }
  void carry() {
    rows_ = 0;
    for (size_t c = 0; c < all_.size(); ++c) {
      double x = double(few_[c]);
      few_[c] = 0;
      if constexpr (sizeof(Acc) == 8) {
        double next = all_[c] + x, taken = next - all_[c];
        lost_[c] += (all_[c] - (next - taken)) + (x - taken);
        all_[c] = next;
      } else {
        all_[c] += x;
      }
    }
  }

  int rows_ = 0;
  std::vector<Acc> few_;
  std::vector<double> all_, lost_;
};

// The sum of n numbers.
template <class Acc>
Acc sum_of(const Acc* values, int64_t n) {
  ColumnSums<Acc> sums(1);
  for (int64_t i = 0; i < n; ++i) sums.add(values + i);
  Acc sum;
  sums.write(&sum);
  return sum;
}

}  // namespace interflow
