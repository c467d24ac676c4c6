// y = W x + b with int8 weights, on processors with AVX512-VNNI alone. Knows no adapters.

#if defined(__AVX512VNNI__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "lanes.h"

namespace {

constexpr int ROWS = 8;  // that read a block of weights together

// The bits of |x|.
inline int32_t magnitude(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

struct Bytes {
    const int8_t *weights;  // (outs / BLOCK, quads, BLOCK, 4), filled up with zeros
    const int32_t *start;   // -128 times the sum of each output's weights, since inputs lie around 128
    const float *scales;    // of each output
    const float *bias;      // or none
    int64_t quads;
};

// A row as bytes around 128, such that its largest value is 127.5 away; returns that value.
float to_bytes(const float *from, uint8_t *to, int64_t width, int64_t padded) {
    int32_t bits = 0;  // in their order as integers, what is no number is the largest of all
    for (int64_t i = 0; i < width; ++i) bits = std::max(bits, magnitude(from[i]));
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        const int32_t near = static_cast<int32_t>(std::nearbyint(from[i] / largest * 127.5f)) + 128;
        to[i] = static_cast<uint8_t>(near < 0 ? 0 : near > 255 ? 255 : near);
    }
    std::fill(to + width, to + padded, uint8_t{0});
    return largest;
}

// COUNT rows of bytes, `quads` times four of them, by BLOCK outputs.
template <int COUNT>
inline void multiply(const uint8_t *x, const float *largest, const Bytes &w, int64_t block, float *y, int64_t outs) {
    const int64_t begin = block * BLOCK, stride = w.quads * 4;
    const int8_t *weights = w.weights + begin * stride;
    __m512i sums[COUNT][2];
    for (int r = 0; r < COUNT; ++r)
        for (int half = 0; half < 2; ++half) sums[r][half] = _mm512_loadu_si512(w.start + begin + half * LANES);
    for (int64_t quad = 0; quad < w.quads; ++quad, weights += 4 * BLOCK) {
        const __m512i low = _mm512_loadu_si512(weights), high = _mm512_loadu_si512(weights + 64);
        for (int r = 0; r < COUNT; ++r) {
            int32_t four;
            std::memcpy(&four, x + r * stride + 4 * quad, sizeof four);
            const __m512i seen = _mm512_set1_epi32(four);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], seen, low);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], seen, high);
        }
    }
    for (int half = 0; half < 2; ++half) {
        const int64_t first = begin + half * LANES, left = std::min<int64_t>(outs - first, LANES);
        if (left <= 0) break;
        const __mmask16 there = static_cast<__mmask16>((1u << left) - 1);
        const __m512 scale = _mm512_loadu_ps(w.scales + first);
        const __m512 bias = w.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, w.bias + first);
        for (int r = 0; r < COUNT; ++r) {
            const __m512 whole = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][half]), scale);
            _mm512_mask_storeu_ps(y + r * outs + first, there,
                                  _mm512_fmadd_ps(whole, _mm512_set1_ps(largest[r]), bias));
        }
    }
}

}  // namespace

// y (rows, outs) = W x + bias, x (rows, in) as bytes, each row by its own largest value; W in the layout of `Bytes`.
extern "C" void multiply_bytes(const float *x, const int8_t *weights, const int32_t *start, const float *scales,
                               const float *bias, float *y, int64_t rows, int64_t in, int64_t outs) {
    const int64_t quads = (in + 3) / 4, padded = 4 * quads;
    const Bytes w{weights, start, scales, bias, quads};
    const std::unique_ptr<uint8_t[]> bytes(new uint8_t[rows * padded]);
    const std::unique_ptr<float[]> largest(new float[rows]);
#pragma omp parallel if (rows * in * outs >= SHARED)
    {
#pragma omp for
        for (int64_t row = 0; row < rows; ++row)
            largest[row] = to_bytes(x + row * in, bytes.get() + row * padded, in, padded);
#pragma omp for
        for (int64_t block = 0; block < (outs + BLOCK - 1) / BLOCK; ++block)
            for (int64_t row = 0; row < rows; row += ROWS)
                with_constant<ROWS>(rows - row, [&](auto count) {
                    multiply<decltype(count)::value>(bytes.get() + row * padded, largest.get() + row, w, block,
                                                     y + row * outs, outs);
                });
    }
}

#endif
