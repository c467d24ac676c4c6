// Vectors of float32 and the two products that the kernels are built from.
//
// The kernels work on rows: the float32 values of one token. A row's result depends on that row alone and is the same to
// the last bit whatever the batch and the number of threads. core/engine/cpu/build.py compiles the kernels into one
// library, core/engine/cpu/compiled.py calls it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8;  // rows per block of weights or keys; their sums fill half of the vector registers
#else
constexpr int ROWS = 6;
#endif

constexpr int BLOCK = 2 * LANES;         // outputs of a product that are computed at once
constexpr int LINE = 16;                 // floats of a cache line
constexpr int TILE = 4;                  // tokens or heads that share one read of weights or keys
constexpr int64_t MIN_PARALLEL = 32768;  // floats from which a second thread pays off

// Aligned as one float, so that every dereference is an unaligned load or store.
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

static inline Lanes load(const float *from) { return *reinterpret_cast<const Lanes *>(from); }
static inline void store(float *to, Lanes lanes) { *reinterpret_cast<Lanes *>(to) = lanes; }

// Calls call(integral_constant<min(count, MOST)>).
template <int MOST, typename Call>
static inline void dispatch_count(int64_t count, Call call) {
    if constexpr (MOST > 1)
        if (count < MOST) return dispatch_count<MOST - 1>(count, call);
    call(std::integral_constant<int, MOST>());
}

// a * b + c with one rounding where the processor has FMA. Left to itself the compiler fuses some loops and not others,
// and a row's result would depend on the size of the batch.
static inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline float sum(Lanes lanes) {
    float parts[LANES];
    std::memcpy(parts, &lanes, sizeof lanes);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
}

// out[t * step + r] = a[r] . x[t] for ROWS rows of a and COUNT tokens.
template <int ROWS, int COUNT>
static inline void dots(const float *a, const float *const *x, int64_t width, float *out, int64_t step) {
    Lanes sums[ROWS][COUNT];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < COUNT; ++t) sums[r][t] = Lanes{};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Lanes seen[COUNT];
        for (int t = 0; t < COUNT; ++t) seen[t] = load(x[t] + i);
        for (int r = 0; r < ROWS; ++r) {
            const Lanes weight = load(a + r * width + i);
            for (int t = 0; t < COUNT; ++t) sums[r][t] += weight * seen[t];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < COUNT; ++t) out[t * step + r] = sum(sums[r][t]);
    for (; i < width; ++i)
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < COUNT; ++t)
                out[t * step + r] = fused(a[r * width + i], x[t][i], out[t * step + r]);
}

// y[t][0, width) += h[t][0, rank) b for COUNT tokens, b (rank, stride).
template <int COUNT>
static inline void add_products(float *const *y, const float *h, int64_t step, const float *b, int64_t rank,
                                int64_t stride, int64_t width) {
    int64_t j = 0;
    for (; j + 2 * LANES <= width; j += 2 * LANES) {
        Lanes low[COUNT], high[COUNT];
        for (int t = 0; t < COUNT; ++t) low[t] = load(y[t] + j), high[t] = load(y[t] + j + LANES);
        for (int64_t r = 0; r < rank; ++r) {
            const Lanes first = load(b + r * stride + j), second = load(b + r * stride + j + LANES);
            for (int t = 0; t < COUNT; ++t) {
                low[t] += h[t * step + r] * first;
                high[t] += h[t * step + r] * second;
            }
        }
        for (int t = 0; t < COUNT; ++t) store(y[t] + j, low[t]), store(y[t] + j + LANES, high[t]);
    }
    for (; j < width; ++j)
        for (int t = 0; t < COUNT; ++t) {
            float added = y[t][j];
            for (int64_t r = 0; r < rank; ++r) added = fused(h[t * step + r], b[r * stride + j], added);
            y[t][j] = added;
        }
}

