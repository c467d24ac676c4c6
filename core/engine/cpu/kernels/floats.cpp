// y = W x + b with float32 weights, laid out in blocks of outputs. Knows no adapters.

#include <algorithm>

#include "lanes.h"
#include "operators.h"

namespace {

// Sums, weights and an input fill the registers: of 32 or of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TOGETHER = 8, WIDE = 2;
#else
constexpr int TOGETHER = 4, WIDE = 3;
#endif
constexpr int OUTS = WIDE * LANES;  // of a block, whose weights TOGETHER rows read together

// What a compiler would else read again for each row stays in a register.
inline void hold(Lanes &lanes) {
#if defined(__SSE2__)
    asm("" : "+v"(lanes));
#endif
}

// COUNT rows by one block of weights (in, OUTS). Meanwhile memory brings what comes next, `step` numbers an input.
template <int COUNT, bool FETCHES>
inline void multiply(const float *x, const float *weights, const float *bias, float *y, int64_t in, int64_t outs,
                     int64_t first, const float *next, int64_t step) {
    Lanes sums[COUNT][WIDE] = {};
    for (int64_t i = 0; i < in; ++i, weights += OUTS, next += step) {
        Lanes own[WIDE];
        for (int w = 0; w < WIDE; ++w) own[w] = load(weights + w * LANES), hold(own[w]);
        if (FETCHES) __builtin_prefetch(next, 0, 2);
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

// How many of the next block's numbers per input each pass over a block is to fetch. A few rows wait for memory, which
// brings what comes next by itself; of many, one pass is as nothing.
int64_t fetched(int64_t rows) { return rows < TILE ? 0 : OUTS / ((rows + TOGETHER - 1) / TOGETHER); }

}  // namespace

// y (rows, outs) = W x + bias, where there is one, for x (rows, in). Weights are (outs / OUTS, in, OUTS), filled up with
// zeros.
extern "C" void multiply_floats(const float *x, const float *weights, const float *bias, float *y, int64_t rows,
                               int64_t in, int64_t outs) {
    const int64_t step = fetched(rows);
#pragma omp parallel for if (rows * in * outs >= SHARED)
    for (int64_t block = 0; block < (outs + OUTS - 1) / OUTS; ++block) {
        const float *own = weights + block * OUTS * in, *next = own + OUTS * in;
        for (int64_t row = 0; row < rows; row += TOGETHER, next += in * step)
            with_constant<TOGETHER>(rows - row, [&](auto count) {
                constexpr int COUNT = decltype(count)::value;
                const auto product = step > 0 ? multiply<COUNT, true> : multiply<COUNT, false>;
                product(x + row * in, own, bias, y + row * outs, in, outs, block * OUTS, next, step);
            });
    }
}

// How many outputs a block of float32 weights has.
extern "C" int float_block() { return OUTS; }
