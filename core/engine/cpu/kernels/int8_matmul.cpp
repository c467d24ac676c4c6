// y = W x + b with int8 weights. Integer sums are exact, so a row's result does not depend on the processor's width.

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "kernels.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

// load_weights reads the weights of LANES outputs for 32 bits of inputs; multiply_add returns sums + weights * x.
// Weights and inputs lie within [-ABSMAX, ABSMAX].
#if defined(__AVX512VNNI__)
constexpr int ABSMAX = 127;
using Input = int8_t;
inline __m512i load_weights(const uint8_t *weights) { return _mm512_loadu_si512(weights); }
inline Ints multiply_add(Ints sums, __m512i weights, int32_t x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, weights, _mm512_set1_epi32(x));
}
#elif defined(__AVX2__)
constexpr int ABSMAX = 90;  // maddubs adds two products in int16: 2 * (90 + 91) * 90 fits
using Input = int8_t;
#if defined(__AVX512BW__)
inline __m512i load_weights(const uint8_t *weights) { return _mm512_loadu_si512(weights); }
inline Ints multiply_add(Ints sums, __m512i weights, int32_t x) {
    const __m512i pairs = _mm512_maddubs_epi16(weights, _mm512_set1_epi32(x));
    return sums + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#else
inline __m256i load_weights(const uint8_t *weights) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(weights));
}
inline Ints multiply_add(Ints sums, __m256i weights, int32_t x) {
    const __m256i pairs = _mm256_maddubs_epi16(weights, _mm256_set1_epi32(x));
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#endif
#else
constexpr int ABSMAX = 127;
using Input = int32_t;
inline Ints load_weights(const uint8_t *weights) {
    Ints wide;
    for (int i = 0; i < LANES; ++i) wide[i] = weights[i];
    return wide;
}
inline Ints multiply_add(Ints sums, Ints weights, int32_t x) { return sums + weights * x; }
#endif

constexpr int ZERO = ABSMAX + 1;  // zero point of the weights' bytes
constexpr int UNROLL = sizeof(int32_t) / sizeof(Input);  // inputs per multiply_add
constexpr int GROUP = 64;  // inputs per scale: an outlier costs only its group precision

struct Weights {
    const uint8_t *bytes;  // (outs / BLOCK, in / UNROLL, BLOCK, UNROLL), weight + ZERO, padded with ZERO
    const float *scales;   // per output, padded to whole blocks
    const float *bias;     // may be null
    int64_t groups;
};

// Rows quantized to integers, one scale per group of inputs.
struct Inputs {
    std::vector<Input> values;   // (rows, groups, GROUP)
    std::vector<float> scales;   // (rows, groups)
    std::vector<int32_t> start;  // (rows, groups): -ZERO * sum of the group, cancels the weights' zero point

    Inputs(int64_t rows, int64_t groups)
        : values(rows * groups * GROUP), scales(rows * groups), start(rows * groups) {}
};

// The bits of |x|. Ordered as integers, NaN is the largest.
inline int32_t magnitude(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

// Quantizes up to GROUP floats to [-ABSMAX, ABSMAX] and returns the scale. A non-finite input makes the scale, and so
// every output of the row, non-finite.
float quantize(const float *from, int64_t width, Input *to, int32_t *start) {
    int32_t bits = 0;
    for (int64_t i = 0; i < width; ++i) bits = std::max(bits, magnitude(from[i]));
    float absmax;
    std::memcpy(&absmax, &bits, sizeof absmax);
    const float divisor = absmax == 0 ? 1 : absmax;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
        const int32_t near = static_cast<int32_t>(std::nearbyint(from[i] / divisor * ABSMAX));
        to[i] = static_cast<int8_t>(near);
        sum += to[i];
    }
    *start = -ZERO * sum;
    return absmax / ABSMAX;
}

// COUNT rows, one block of outputs.
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
        for (int i = 0; i < GROUP; i += UNROLL, weights += UNROLL * BLOCK) {
            const auto low = load_weights(weights), high = load_weights(weights + UNROLL * LANES);
            for (int r = 0; r < COUNT; ++r) {
                int32_t seen;
                std::memcpy(&seen, own[r] + i, sizeof seen);
                sums[r][0] = multiply_add(sums[r][0], low, seen);
                sums[r][1] = multiply_add(sums[r][1], high, seen);
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
extern "C" void int8_matmul(const float *x, const uint8_t *bytes, const float *scales, const float *bias, float *y,
                               int64_t rows, int64_t in, int64_t outs) {
    const int64_t groups = (in + GROUP - 1) / GROUP;
    const Weights w{bytes, scales, bias, groups};
    Inputs inputs(rows, groups);
#pragma omp parallel if (rows * in * outs >= MIN_PARALLEL)
    {
#pragma omp for
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t at = row * groups + group, begin = group * GROUP;
                inputs.scales[at] = quantize(x + row * in + begin, std::min<int64_t>(in - begin, GROUP),
                                                inputs.values.data() + at * GROUP, &inputs.start[at]);
            }
#pragma omp for
        for (int64_t block = 0; block < (outs + BLOCK - 1) / BLOCK; ++block)
            for (int64_t row = 0; row < rows; row += ROWS)
                dispatch_count<ROWS>(rows - row, [&](auto count) {
                    multiply<decltype(count)::value>(inputs, row, w, block, y, outs);
                });
    }
}

// Outputs per block.
extern "C" int int8_block() { return BLOCK; }

// Largest absolute value of an int8 weight.
extern "C" int absmax() { return ABSMAX; }

// Inputs per scale.
extern "C" int group_size() { return GROUP; }

// Inputs of one output that lie side by side.
extern "C" int unroll() { return UNROLL; }
