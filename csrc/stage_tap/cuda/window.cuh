// 2x2 windows of the stage tap in words of Packed<T>: one word for each place of the window, so two windows at a time where T has
// 16 bits. NHWC: two channels; NCHW: two neighbours of a row. The bytes of the mask: see ../contract.h.
#pragma once
#include "common/cuda/packed.cuh"
#include "stage_tap/cuda/kernels.h"

namespace interflow {

template <class T, bool kPool>
constexpr int kTapVector = tap_vector(sizeof(T) == 4 ? DType::F32 : DType::BF16, kPool);

template <class T>
constexpr int kTopBit = Packed<T>::kPer == 2 ? 15 : 31;

// Bits 4-7 of the mask's byte in the highest byte of each element.
template <class T>
constexpr uint32_t kMaximumBits = Packed<T>::kTops | Packed<T>::kTops >> 1 | Packed<T>::kTops >> 2 | Packed<T>::kTops >> 3;

// --- forward ---------------------------------------------------------------------------------------------------------------
// In the highest bit of each element: whether a place passes the gradient; whether places 1 to 3 replace the maximum before them,
// being greater or NaN. The other bits mean nothing.
struct TapChoice {
  uint32_t passes[4], replaces[3];
};

// x: u + shift, one word for each place; v: the same, rectified (0 outside the map).
template <class T>
struct TapWindow {
  uint32_t v[4];
  uint32_t first;  // x[0]: where the maximum is 0 it is the first of equals, which may be -0

  __device__ __forceinline__ float sum(int i) const {
    using P = Packed<T>;
    return (P::get(v[0], i) + P::get(v[1], i)) + (P::get(v[2], i) + P::get(v[3], i));
  }

  // The maximum, and what the mask is made of where it is asked for.
  __device__ __forceinline__ uint32_t maximum(bool need_mask, TapChoice& choice) const {
    using P = Packed<T>;
    uint32_t of_two = P::maximum(v[0], v[1]), of_three = P::maximum(of_two, v[2]), m = P::maximum(of_three, v[3]);
    if (need_mask) {
#pragma unroll
      for (int j = 0; j < 4; ++j) choice.passes[j] = not_zero<T>(v[j]);
      choice.replaces[0] = above<T>(v[1], P::nan_to_infinity(v[0]));
      choice.replaces[1] = above<T>(v[2], P::nan_to_infinity(of_two));
      choice.replaces[2] = above<T>(v[3], P::nan_to_infinity(of_three));
    }
    uint32_t negative_zero = first & ~not_zero<T>(first & ~P::kTops) & ~not_zero<T>(m) & P::kTops;
    return m | negative_zero;
  }
};

// The highest bytes of all elements of words, in order: the lowest bytes of the result, four at most.
template <class T>
__device__ __forceinline__ uint32_t top_bytes(uint32_t a, uint32_t b) { return kPer<T> == 2 ? permute_bytes<0x7531>(a, b) : permute_bytes<0x7373>(a, b); }
template <class T>
__device__ __forceinline__ uint32_t top_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return permute_bytes<0x5410>(top_bytes<T>(a, b), top_bytes<T>(c, d));
}

// The mask's bytes of N words of windows.
template <class T, int N>
__device__ __forceinline__ Vector<uint8_t, N * kPer<T>> mask_bytes(const TapChoice (&choice)[N]) {
  constexpr int kBytes = N * kPer<T>, kGroup = kBytes < 4 ? kBytes : 4, kWords = kGroup / kPer<T>;
  Vector<uint8_t, kBytes> bytes;
#pragma unroll
  for (int i = 0; i < N; i += kWords) {
    auto gather = [&](auto member) {
      if constexpr (kWords == 2)
        return top_bytes<T>(member(choice[i]), member(choice[i + 1]));
      else
        return top_bytes<T>(member(choice[i]), member(choice[i + 1]), member(choice[i + 2]), member(choice[i + 3]));
    };
    uint32_t plane[8], replaces[3];
#pragma unroll
    for (int j = 0; j < 4; ++j) plane[j] = gather([&](const TapChoice& c) { return c.passes[j]; });
#pragma unroll
    for (int j = 0; j < 3; ++j) replaces[j] = gather([&](const TapChoice& c) { return c.replaces[j]; });
    // What replaced another is not 0 and passes; the first element may be 0
    uint32_t later = replaces[1] | replaces[2];
    plane[4] = plane[0] & ~replaces[0] & ~later, plane[5] = replaces[0] & ~later, plane[6] = replaces[1] & ~replaces[2], plane[7] = replaces[2];
    uint32_t four = plane[0] & 0x80808080;
#pragma unroll
    for (int k = 1; k < 8; ++k) four = four >> 1 | (plane[k] & 0x80808080);
    memcpy(&bytes[i * kPer<T>], &four, kGroup);
  }
  return bytes;
}

// The inverse: byte i in the highest byte of element i.
template <class T, int N>
__device__ __forceinline__ void to_top_bytes(const Vector<uint8_t, N * kPer<T>>& bytes, uint32_t (&words)[N]) {
  if constexpr (kPer<T> == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      uint32_t four;
      memcpy(&four, &bytes[2 * i], 4);
      words[i] = permute_bytes<0x1404>(four, 0), words[i + 1] = permute_bytes<0x3424>(four, 0);
    }
  } else {
    uint32_t all = 0;
    memcpy(&all, &bytes, N);
#pragma unroll
    for (int i = 0; i < N; ++i) words[i] = all << (24 - 8 * i);
  }
}

// Whether each element is not 0, as bits 0, 1, ... of a byte: eight elements.
template <class T, int N>
__device__ __forceinline__ uint8_t passing_bits(const uint32_t (&v)[N]) {
  static_assert(N * kPer<T> == 8);
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (kPer<T> == 2)
      found |= (not_zero<T>(v[i]) & Packed<T>::kTops) >> (15 - 2 * i);  // even ones at bit 2i, odd ones at bit 2i + 16
    else
      found |= (not_zero<T>(v[i]) & Packed<T>::kTops) >> (31 - i);
  }
  return uint8_t(kPer<T> == 2 ? found | found >> 15 : found);
}

// --- backward --------------------------------------------------------------------------------------------------------------
// What all windows of a word's channels share: gp = dp / (H W), and what sums d(shift): how often gp passed, and the passing dm.
template <class T>
struct TapGradient {
  float gp[kPer<T>];
  uint32_t rounded_gp;  // + 0, as a sum with a missing dm is
  uint32_t count = 0;   // of elements that pass, in each element's bits
  float dm_sum[kPer<T>] = {};

  __device__ __forceinline__ void start(const float* each) {
#pragma unroll
    for (int i = 0; i < kPer<T>; ++i) gp[i] = each[i], dm_sum[i] = 0;
    float alone[kPer<T>];
#pragma unroll
    for (int i = 0; i < kPer<T>; ++i) alone[i] = gp[i] + 0.0f;
    rounded_gp = Packed<T>::pack(alone);
    count = 0;
  }

  // A window begins: its mask (in the highest bytes) and dm count. Returns the gradient of what is the maximum.
  __device__ __forceinline__ uint32_t window(uint32_t code, uint32_t dm) {
    using P = Packed<T>;
    float both[kPer<T>];
#pragma unroll
    for (int i = 0; i < kPer<T>; ++i) both[i] = gp[i] + P::get(dm, i);
    uint32_t any = P::spread_top(not_zero<T>(code >> 1 & kMaximumBits<T> >> 1));
#pragma unroll
    for (int j = 0; j < 4; ++j) count += code >> (kTopBit<T> - 7 + j) & P::kOnes;
#pragma unroll
    for (int i = 0; i < kPer<T>; ++i) dm_sum[i] += P::get(dm & any, i);
    return P::pack(both);
  }

  // Its place j. of_maximum: what window() returned.
  __device__ __forceinline__ uint32_t place(uint32_t code, uint32_t of_maximum, int j) const {
    uint32_t pass = Packed<T>::spread_top(code << (7 - j)), is_maximum = Packed<T>::spread_top(code << (3 - j));
    return (of_maximum & is_maximum) | (rounded_gp & pass & ~is_maximum);
  }

  // Likewise where only the mean was taken; pass: all bits of an element that passes.
  __device__ __forceinline__ uint32_t element(uint32_t pass) {
    count += pass & Packed<T>::kOnes;
    return rounded_gp & pass;
  }

  // The sum of all gradients so far.
  __device__ __forceinline__ float sum(int i) const {
    uint32_t passed = kPer<T> == 2 ? count >> (16 * i) & 0xffff : count;
    return (passed ? float(passed) * gp[i] : 0.0f) + dm_sum[i];
  }
};

// Bits 2i and 2i + 1 (bit i) of a byte as all bits of a word's two elements (of its one).
template <class T>
__device__ __forceinline__ uint32_t spread_bits(uint32_t byte, int i) {
  if constexpr (kPer<T> == 2)
    return Packed<T>::spread_top((byte << (15 - 2 * i) & 0x8000u) | (byte << (30 - 2 * i) & 0x80000000u));
  else
    return Packed<T>::spread_top(byte << (31 - i));
}

}  // namespace interflow
