// Sums over the rows of a matrix on the host side: over images, over classes. In one order, row after row, and in fp64.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace interflow {

// Sums of `columns` columns of numbers of type Acc. In fp64, where that is Acc itself with what each addition loses beside it (as in
// long_sum.h): Acc alone would round every addition of equal numbers the same way.
template <class Acc>
class ColumnSums {
 public:
  explicit ColumnSums(int64_t columns) : sums_(size_t(columns)), lost_(kCompensated ? size_t(columns) : 0) {}

  template <class T>
  void add(const T* row) {
    if constexpr (kCompensated) {
      for (size_t c = 0; c < sums_.size(); ++c) add_to(c, double(row[c]));
    } else {
      double* sums = sums_.data();  // plain pointers and a plain count: this loop is compiled to vectors
      for (size_t c = 0, columns = sums_.size(); c < columns; ++c) sums[c] += double(row[c]);
    }
  }
  // Adds row[c] * factor[c % period]; the columns are a multiple of the period.
  void add_product(const Acc* row, const Acc* factor, int64_t period) {
    for (size_t c = 0; c < sums_.size(); c += size_t(period))
      for (size_t j = 0; j < size_t(period); ++j) add_to(c + j, double(row[c + j]) * double(factor[j]));
  }
  double sum(int64_t c) const {
    if (!kCompensated) return sums_[size_t(c)];
    double whole = sums_[size_t(c)] + lost_[size_t(c)];
    return whole == whole ? whole : sums_[size_t(c)];  // after an infinity what was lost says nothing
  }
  // The sum of all columns.
  double total() const {
    ColumnSums<Acc> all(1);
    for (size_t c = 0; c < sums_.size(); ++c) all.add(&sums_[c]);
    for (double lost : lost_) all.lost_[0] += lost;
    return all.sum(0);
  }
  template <class T>
  void write(T* out) const {
    for (size_t c = 0; c < sums_.size(); ++c) out[c] = T(sum(int64_t(c)));
  }

 private:
  static constexpr bool kCompensated = sizeof(Acc) == 8;

  void add_to(size_t c, double x) {
    double next = sums_[c] + x;
    if constexpr (kCompensated) {
      double taken = next - sums_[c];
      lost_[c] += (sums_[c] - (next - taken)) + (x - taken);
    }
    sums_[c] = next;
  }

  std::vector<double> sums_, lost_;
};

// The sum of n numbers.
template <class Acc>
double sum_of(const double* values, int64_t n) {
  ColumnSums<Acc> sums(1);
  for (int64_t i = 0; i < n; ++i) sums.add(values + i);
  return sums.sum(0);
}

}  // namespace interflow
