// One tile of an NCHW map: windows that follow each other, 16 bytes of each of two rows. What is done to it, however it is reached.
#pragma once
#include "common/cuda/map_access.cuh"
#include "stage_tap/cuda/window.cuh"

namespace interflow {

template <class T>
constexpr int kTileWindows = kTapVector<T, true> / 2;

constexpr int kTileWords = 4;  // of a row: window i's element is in the words (and halves) that a vector of 16 bytes has for it

template <class T>
using TileBytes = Vector<uint8_t, kTileWindows<T>>;

// --- which elements of a tile there are ------------------------------------------------------------------------------------------
// Bit 4 i + j says it of element j of window i; all of them:
constexpr uint32_t kWholeTile = ~0u;
constexpr uint32_t kUpperHalf = 0x3333;

__device__ __forceinline__ bool is_inside(uint32_t inside, int window, int element) { return inside >> (4 * window + element) & 1; }

// All bits of those elements j of the windows in word q that are there.
template <class T>
__device__ __forceinline__ uint32_t inside_bits(uint32_t inside, int q, int j) {
  if constexpr (kPer<T> == 2)
    return (is_inside(inside, 2 * q, j) ? 0xffffu : 0) | (is_inside(inside, 2 * q + 1, j) ? 0xffff0000u : 0);
  else
    return is_inside(inside, q, j) ? ~0u : 0;
}

// --- forward ---------------------------------------------------------------------------------------------------------------
template <class T>
struct TileChoice {
  uint32_t m[2];
  TileBytes<T> mask;
};

// x: the two rows before shift; sum: its elements' are added to.
template <class T>
__device__ __forceinline__ TileChoice<T> choose_tile(const uint32_t (&x)[2][kTileWords], uint32_t shift, uint32_t inside, bool masked, float& sum) {
  TileChoice<T> tile;
  TapChoice choice[2] = {};
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    TapWindow<T> window;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t a = x[j / 2][2 * q], b = x[j / 2][2 * q + 1], place;
      if constexpr (kPer<T> == 2)
        place = j % 2 ? permute_bytes<0x7632>(a, b) : permute_bytes<0x5410>(a, b);
      else
        place = j % 2 ? b : a;
      uint32_t biased = Packed<T>::add(place, shift);
      if (j == 0) window.first = biased;
      window.v[j] = rectify<T>(biased) & inside_bits<T>(inside, q, j);
    }
#pragma unroll
    for (int k = 0; k < kPer<T>; ++k) sum += window.sum(k);
    tile.m[q] = window.maximum(masked, choice[q]);
  }
  tile.mask = mask_bytes<T>(choice);
#pragma unroll
  for (int i = 0; i < kTileWindows<T>; ++i)
    if (!is_inside(inside, i, 3)) tile.mask[i] &= 0x0f;  // an incomplete window has no maximum
  return tile;
}

// --- backward --------------------------------------------------------------------------------------------------------------
// d: the two rows of du.
template <class T>
__device__ __forceinline__ void place_tile(uint32_t (&d)[2][kTileWords], const TileBytes<T>& mask, const uint32_t (&dm)[2], TapGradient<T>& gradient) {
  uint32_t code[2];
  to_top_bytes<T>(mask, code);
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    uint32_t of_maximum = gradient.window(code[q], dm[q]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t left = gradient.place(code[q], of_maximum, 2 * r), right = gradient.place(code[q], of_maximum, 2 * r + 1);
      if constexpr (kPer<T> == 2)
        d[r][2 * q] = permute_bytes<0x5410>(left, right), d[r][2 * q + 1] = permute_bytes<0x7632>(left, right);
      else
        d[r][2 * q] = left, d[r][2 * q + 1] = right;
    }
  }
}

// --- window by window, where rows are not whole tiles ------------------------------------------------------------------------------
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
// Neighbours of a row, of windows that move together.
template <class T, int kWindows>
using Neighbours = Vector<uint32_t, 2 * kWindows / kPer<T>>;

// How many windows of whole tiles move together: two of 16-bit types where rows have an even number and all is aligned, one where its rows
// can be read at once, else none: each element moves alone.
template <class T>
__device__ __forceinline__ int windows_together(int access, int width, const T* m, const uint8_t* mask) {
  if (width % 2 || access < 2 * int(sizeof(T))) return 0;
  return sizeof(T) == 2 && width % 4 == 0 && access >= 8 && reinterpret_cast<uintptr_t>(m) % 4 == 0 && reinterpret_cast<uintptr_t>(mask) % 2 == 0 ? 2 : 1;
}

template <class T>
__device__ __forceinline__ uint32_t element_of(const uint32_t* words, int i) { return kPer<T> == 2 ? words[i / 2] >> (16 * (i % 2)) & 0xffff : words[i]; }
template <class T>
__device__ __forceinline__ void set_element(uint32_t* words, int i, uint32_t bits) {
  if constexpr (kPer<T> == 2)
    words[i / 2] |= bits << (16 * (i % 2));
  else
    words[i] = bits;
}

// Rows and columns of windows that follow each other, from one window on.
struct TileWalk {
  int h, w, row;
  __device__ __forceinline__ TileWalk(int window, const Divider& by)
      : h(int(divide(uint32_t(window), by))), w(window - h * int(by.divisor)), row(int(by.divisor)) {}
  __device__ __forceinline__ void next(int by) {
    if ((w += by) == row) w = 0, ++h;
  }
};

// The windows from `first` on, or every kStep-th, of a plane of height x width: visit(i, h, w, inside), where inside has window i's four bits,
// none from `last` on.
template <class T, int kStep, class Visit>
__device__ __forceinline__ void walk_tile(int first, int last, int height, int width, const Divider& row, Visit visit) {
  TileWalk at(first, row);
#pragma unroll
  for (int i = 0; i < kTileWindows<T>; i += kStep, at.next(kStep)) {
    uint32_t inside = first + i < last ? (2 * at.w + 1 < width ? 3u : 1u) : 0;
    visit(i, at.h, at.w, 2 * at.h + 1 < height ? inside * 5 : inside);
  }
}

}  // namespace interflow
