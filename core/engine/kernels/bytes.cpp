// y = W x + b with int8 weights, on processors with AVX512-VNNI alone. Knows no adapters.

#if defined(__AVX512VNNI__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

namespace {

constexpr int ROWS = 8;     // that read a block of weights together
constexpr int GROUP = 64;   // inputs with a scale of their own: an outlier costs its neighbours alone their precision
constexpr int QUADS = GROUP / 4;

struct Weights {
    const uint8_t *bytes;  // (outs / BLOCK, in / 4, BLOCK, 4), 128 more than the weights, filled up with 128
    const float *scales;   // of each output, filled up to whole blocks
    const float *bias;     // or none
    int64_t groups;
};

// Rows as int8, each group of inputs by its own largest value.
struct Inputs {
    std::vector<int8_t> bytes;   // (rows, groups, GROUP)
    std::vector<float> scales;   // (rows, groups)
    std::vector<int32_t> start;  // (rows, groups): what the 128 more add to a sum, negated

    Inputs(int64_t rows, int64_t groups)
        : bytes(rows * groups * GROUP), scales(rows * groups), start(rows * groups) {}
};

// The bits of |x|. In their order as integers what is no number is the largest of all.
inline int32_t magnitude(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

// Up to GROUP numbers as int8, the largest of them as 127; returns the size of a step. What is not finite makes that
// not finite either, and so all that is multiplied by it.
float to_bytes(const float *from, int64_t width, int8_t *to, int32_t *start) {
    int32_t bits = 0;
    for (int64_t i = 0; i < width; ++i) bits = std::max(bits, magnitude(from[i]));
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    const float divisor = largest == 0 ? 1 : largest;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
        const int32_t near = static_cast<int32_t>(std::nearbyint(from[i] / divisor * 127));
        to[i] = static_cast<int8_t>(near);
        sum += to[i];
    }
    *start = -128 * sum;
    return largest / 127;
}

// COUNT rows by one block of outputs.
template <int COUNT>
inline void multiply(const Inputs &x, int64_t row, const Weights &w, int64_t block, float *y, int64_t outs) {
    const uint8_t *weights = w.bytes + block * w.groups * GROUP * BLOCK;
    __m512 whole[COUNT][2];
    for (int r = 0; r < COUNT; ++r) whole[r][0] = whole[r][1] = _mm512_setzero_ps();
    for (int64_t group = 0; group < w.groups; ++group) {
        const int8_t *own[COUNT];
        __m512i sums[COUNT][2];
        for (int r = 0; r < COUNT; ++r) {
            const int64_t at = (row + r) * w.groups + group;
            own[r] = x.bytes.data() + at * GROUP;
            sums[r][0] = sums[r][1] = _mm512_set1_epi32(x.start[at]);
        }
        for (int quad = 0; quad < QUADS; ++quad, weights += 4 * BLOCK) {
            const __m512i low = _mm512_loadu_si512(weights), high = _mm512_loadu_si512(weights + 4 * LANES);
            for (int r = 0; r < COUNT; ++r) {
                int32_t four;
                std::memcpy(&four, own[r] + 4 * quad, sizeof four);
                const __m512i seen = _mm512_set1_epi32(four);
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], low, seen);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], high, seen);
            }
        }
        for (int r = 0; r < COUNT; ++r) {
            const __m512 scale = _mm512_set1_ps(x.scales[(row + r) * w.groups + group]);
            for (int half = 0; half < 2; ++half)
                whole[r][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][half]), scale, whole[r][half]);
        }
    }
    for (int half = 0; half < 2; ++half) {
        const int64_t first = block * BLOCK + half * LANES, left = std::min<int64_t>(outs - first, LANES);
        if (left <= 0) break;
        const __mmask16 there = static_cast<__mmask16>((1u << left) - 1);
        const __m512 scale = _mm512_loadu_ps(w.scales + first);
        const __m512 bias = w.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, w.bias + first);
        for (int r = 0; r < COUNT; ++r)
            _mm512_mask_storeu_ps(y + (row + r) * outs + first, there, _mm512_fmadd_ps(whole[r][half], scale, bias));
    }
}

}  // namespace

// y (rows, outs) = W x + bias for x (rows, in); the layout of W is that of `Weights`.
extern "C" void multiply_bytes(const float *x, const uint8_t *bytes, const float *scales, const float *bias, float *y,
                               int64_t rows, int64_t in, int64_t outs) {
    const int64_t groups = (in + GROUP - 1) / GROUP;
    const Weights w{bytes, scales, bias, groups};
    Inputs inputs(rows, groups);
#pragma omp parallel if (rows * in * outs >= SHARED)
    {
#pragma omp for
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t at = row * groups + group, begin = group * GROUP;
                inputs.scales[at] = to_bytes(x + row * in + begin, std::min<int64_t>(in - begin, GROUP),
                                             inputs.bytes.data() + at * GROUP, &inputs.start[at]);
            }
#pragma omp for
        for (int64_t block = 0; block < (outs + BLOCK - 1) / BLOCK; ++block)
            for (int64_t row = 0; row < rows; row += ROWS)
                with_constant<ROWS>(rows - row, [&](auto count) {
                    multiply<decltype(count)::value>(inputs, row, w, block, y, outs);
                });
    }
}

// How many inputs share a scale.
extern "C" int group_size() { return GROUP; }

#endif
