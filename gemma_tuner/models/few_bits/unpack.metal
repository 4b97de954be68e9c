// Weights out of few bits. A thread unpacks four bytes of a row: four columns, or in four bits
// four of the row's left half and four of its right one.
#include <metal_stdlib>
using namespace metal;

// Products and sums are rounded to T each, as torch rounds them; an fma would round once for both.
#pragma METAL fp contract(off)

template <typename T, typename N, int bits, bool is_affine>
inline void unpack_four(device T *out, const device N *numbers, const device T *scales,
                        const device T *biases, long row_bytes, long group_shift, uint2 at) {
  const long row = at.y;
  for (long i = 4 * long(at.x); i < 4 * long(at.x) + 4; ++i) {
    const int both = numbers[row * row_bytes + i];
    for (int side = 0; side < 8 / bits; ++side) {
      const int low = is_affine ? both & 15 : ((both & 15) ^ 8) - 8;
      const int number = bits == 8 ? both : side == 0 ? low : both >> 4;
      const long column = i + side * row_bytes;
      const long weight = row * row_bytes * (8 / bits) + column;
      const long group = weight >> group_shift;  // a row is whole groups
      const T product = T(float(number) * float(scales[group]));
      out[weight] = is_affine ? T(float(product) + float(biases[group])) : product;
    }
  }
}

#define KERNELS(bits, T)                                                                          \
  kernel void unpack_affine_##bits##_##T(                                                         \
      device T *out, const device uchar *numbers, const device T *scales, const device T *biases, \
      constant long &row_bytes, constant long &group_shift,                                       \
      uint2 at [[thread_position_in_grid]]) {                                                     \
    unpack_four<T, uchar, bits, true>(out, numbers, scales, biases, row_bytes, group_shift, at);  \
  }                                                                                               \
  kernel void unpack_symmetric_##bits##_##T(                                                      \
      device T *out, const device char *numbers, const device T *scales,                          \
      constant long &row_bytes, constant long &group_shift,                                       \
      uint2 at [[thread_position_in_grid]]) {                                                     \
    unpack_four<T, char, bits, false>(out, numbers, scales, scales, row_bytes, group_shift, at);  \
  }
KERNELS(4, float)
KERNELS(4, bfloat)
KERNELS(8, float)
KERNELS(8, bfloat)
