// y = W x + b with float32 weights in blocks of outputs.

#include <algorithm>

#include "simd.h"
#include "kernels.h"

namespace {

// UNROLL rows by WIDE vectors of outputs fill the vector registers: 32 of them, or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int UNROLL = 8, WIDE = 2;
#else
constexpr int UNROLL = 4, WIDE = 3;
#endif
constexpr int OUTS = WIDE * LANES;  // outputs per block

// Stops the compiler from loading the value again for each row.
inline void keep_in_register(Lanes &lanes) {
#if defined(__SSE2__)
    asm("" : "+v"(lanes));
#endif
}

// COUNT rows by one block of weights (in, OUTS). PREFETCH: prefetches `next`, `step` floats per input.
template <int COUNT, bool PREFETCH>
inline void multiply(const float *x, const float *weights, const float *bias, float *y, int64_t in, int64_t outs,
                     int64_t first, const float *next, int64_t step) {
    Lanes sums[COUNT][WIDE] = {};
    for (int64_t i = 0; i < in; ++i, weights += OUTS, next += step) {
        Lanes own[WIDE];
        for (int w = 0; w < WIDE; ++w) own[w] = load(weights + w * LANES), keep_in_register(own[w]);
        if (PREFETCH) __builtin_prefetch(next, 0, 2);
        for (int r = 0; r < COUNT; ++r)
            for (int w = 0; w < WIDE; ++w) sums[r][w] += x[r * in + i] * own[w];
    }
    const int64_t left = std::min<int64_t>(outs - first, OUTS);
    for (int r = 0; r < COUNT; ++r) {
        float *to = y + r * outs + first;
        if (left == OUTS && bias == nullptr) {
            for (int w = 0; w < WIDE; ++w) store(to + w * LANES, sums[r][w]);
            continue;
        }
        float whole[OUTS];
        for (int w = 0; w < WIDE; ++w) store(whole + w * LANES, sums[r][w]);
        for (int64_t i = 0; i < left; ++i) to[i] = whole[i] + (bias == nullptr ? 0 : bias[first + i]);
    }
}

// Floats of the next block that each pass over a block prefetches per input. Below TILE rows the pass is bound by
// memory, and the hardware prefetcher keeps up.
int64_t prefetch_step(int64_t rows) { return rows < TILE ? 0 : OUTS / ((rows + UNROLL - 1) / UNROLL); }

}  // namespace

// y (rows, outs) = W x + bias (may be null) for x (rows, in). weights is (outs / OUTS, in, OUTS), padded with zeros.
extern "C" void float_matmul(const float *x, const float *weights, const float *bias, float *y, int64_t rows,
                               int64_t in, int64_t outs) {
    const int64_t step = prefetch_step(rows);
#pragma omp parallel for if (rows * in * outs >= MIN_PARALLEL)
    for (int64_t block = 0; block < (outs + OUTS - 1) / OUTS; ++block) {
        const float *own = weights + block * OUTS * in, *next = own + OUTS * in;
        for (int64_t row = 0; row < rows; row += UNROLL, next += in * step)
            dispatch_count<UNROLL>(rows - row, [&](auto count) {
                constexpr int COUNT = decltype(count)::value;
                const auto product = step > 0 ? multiply<COUNT, true> : multiply<COUNT, false>;
                product(x + row * in, own, bias, y + row * outs, in, outs, block * OUTS, next, step);
            });
    }
}

// Outputs per block.
extern "C" int float_block() { return OUTS; }
