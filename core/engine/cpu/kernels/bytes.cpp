// y = W x + b with int8 weights. Knows no adapters.
//
// Sums of integers are exact, so a row's numbers do not depend on what a processor multiplies at once.

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"
#include "operators.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

// 32 bits of a row's inputs go to each output, which has its own weights for them: `widened` is these weights for LANES
// outputs, and `added` what they make of the inputs, on top of sums. Both lie within LARGEST of zero.
#if defined(__AVX512VNNI__)
constexpr int LARGEST = 127;
using Input = int8_t;
inline __m512i widened(const uint8_t *weights) { return _mm512_loadu_si512(weights); }
inline Ints added(Ints sums, __m512i weights, int32_t x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, weights, _mm512_set1_epi32(x));
}
#elif defined(__AVX2__)
constexpr int LARGEST = 90;  // two products of (90 + 91) * 90 fit into the 16 bits that they are added in
using Input = int8_t;
#if defined(__AVX512BW__)
inline __m512i widened(const uint8_t *weights) { return _mm512_loadu_si512(weights); }
inline Ints added(Ints sums, __m512i weights, int32_t x) {
    const __m512i pairs = _mm512_maddubs_epi16(weights, _mm512_set1_epi32(x));
    return sums + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#else
inline __m256i widened(const uint8_t *weights) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(weights));
}
inline Ints added(Ints sums, __m256i weights, int32_t x) {
    const __m256i pairs = _mm256_maddubs_epi16(weights, _mm256_set1_epi32(x));
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#endif
#else
constexpr int LARGEST = 127;
using Input = int32_t;
inline Ints widened(const uint8_t *weights) {
    Ints wide;
    for (int i = 0; i < LANES; ++i) wide[i] = weights[i];
    return wide;
}
inline Ints added(Ints sums, Ints weights, int32_t x) { return sums + weights * x; }
#endif

constexpr int ZERO = LARGEST + 1;  // a weight of zero, as its byte
constexpr int TOGETHER = sizeof(int32_t) / sizeof(Input);  // inputs that are multiplied at once
constexpr int GROUP = 64;  // inputs with a scale of their own: an outlier costs its neighbours alone their precision

struct Weights {
    const uint8_t *bytes;  // (outs / BLOCK, in / TOGETHER, BLOCK, TOGETHER), ZERO more than they are, filled with it
    const float *scales;   // of each output, filled up to whole blocks
    const float *bias;     // or none
    int64_t groups;
};

// Rows as integers, each group of inputs by its own largest value.
struct Inputs {
    std::vector<Input> values;   // (rows, groups, GROUP)
    std::vector<float> scales;   // (rows, groups)
    std::vector<int32_t> start;  // (rows, groups): what the ZERO more adds to a sum, negated

    Inputs(int64_t rows, int64_t groups)
        : values(rows * groups * GROUP), scales(rows * groups), start(rows * groups) {}
};

// The bits of |x|. In their order as integers what is no number is the largest of all.
inline int32_t magnitude(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

// Up to GROUP numbers as integers, the largest of them as LARGEST; returns the size of a step. What is not finite makes that
// not finite either, and so all that is multiplied by it.
float to_integers(const float *from, int64_t width, Input *to, int32_t *start) {
    int32_t bits = 0;
    for (int64_t i = 0; i < width; ++i) bits = std::max(bits, magnitude(from[i]));
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    const float divisor = largest == 0 ? 1 : largest;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
        const int32_t near = static_cast<int32_t>(std::nearbyint(from[i] / divisor * LARGEST));
        to[i] = static_cast<int8_t>(near);
        sum += to[i];
    }
    *start = -ZERO * sum;
    return largest / LARGEST;
}

// COUNT rows by one block of outputs.
template <int COUNT>
inline void multiply(const Inputs &x, int64_t row, const Weights &w, int64_t block, float *y, int64_t outs) {
    const uint8_t *weights = w.bytes + block * w.groups * GROUP * BLOCK;
    Lanes whole[COUNT][2] = {};
    for (int64_t group = 0; group < w.groups; ++group) {
        const Input *own[COUNT];
        Ints sums[COUNT][2];
        for (int r = 0; r < COUNT; ++r) {
            const int64_t at = (row + r) * w.groups + group;
            own[r] = x.values.data() + at * GROUP;
            sums[r][0] = sums[r][1] = Ints{} + x.start[at];
        }
        for (int i = 0; i < GROUP; i += TOGETHER, weights += TOGETHER * BLOCK) {
            const auto low = widened(weights), high = widened(weights + TOGETHER * LANES);
            for (int r = 0; r < COUNT; ++r) {
                int32_t seen;
                std::memcpy(&seen, own[r] + i, sizeof seen);
                sums[r][0] = added(sums[r][0], low, seen);
                sums[r][1] = added(sums[r][1], high, seen);
            }
        }
        for (int r = 0; r < COUNT; ++r) {
            const float scale = x.scales[(row + r) * w.groups + group];
            for (int half = 0; half < 2; ++half) whole[r][half] += __builtin_convertvector(sums[r][half], Lanes) * scale;
        }
    }
    const int64_t first = block * BLOCK, left = std::min<int64_t>(outs - first, BLOCK);
    for (int r = 0; r < COUNT; ++r) {
        float *to = y + (row + r) * outs + first, scaled[BLOCK];
        for (int half = 0; half < 2; ++half)
            store(scaled + half * LANES, whole[r][half] * load(w.scales + first + half * LANES));
        for (int64_t i = 0; i < left; ++i) to[i] = scaled[i] + (w.bias == nullptr ? 0 : w.bias[first + i]);
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
                inputs.scales[at] = to_integers(x + row * in + begin, std::min<int64_t>(in - begin, GROUP),
                                                inputs.values.data() + at * GROUP, &inputs.start[at]);
            }
#pragma omp for
        for (int64_t block = 0; block < (outs + BLOCK - 1) / BLOCK; ++block)
            for (int64_t row = 0; row < rows; row += ROWS)
                with_constant<ROWS>(rows - row, [&](auto count) {
                    multiply<decltype(count)::value>(inputs, row, w, block, y, outs);
                });
    }
}

// How many outputs a block of int8 weights has.
extern "C" int byte_block() { return BLOCK; }

// What a weight, as an integer, may be at most.
extern "C" int largest() { return LARGEST; }

// How many inputs share a scale.
extern "C" int group_size() { return GROUP; }

// How many inputs of an output lie together.
extern "C" int together() { return TOGETHER; }
