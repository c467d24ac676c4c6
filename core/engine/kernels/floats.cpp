// y = W x + b with float32 weights, laid out in blocks of outputs. Knows no adapters.

#include <algorithm>

#include "lanes.h"
#include "operators.h"

namespace {

// COUNT rows by one block of weights (in, BLOCK). Meanwhile memory brings what comes next, `step` numbers an input.
template <int COUNT, bool FETCHES>
inline void multiply(const float *x, const float *weights, const float *bias, float *y, int64_t in, int64_t outs,
                     int64_t first, const float *next, int64_t step) {
    Lanes sums[COUNT][2] = {};
    for (int64_t i = 0; i < in; ++i, weights += BLOCK, next += step) {
        const Lanes low = load(weights), high = load(weights + LANES);
        if (FETCHES) __builtin_prefetch(next, 0, 2);
        for (int r = 0; r < COUNT; ++r) {
            sums[r][0] += x[r * in + i] * low;
            sums[r][1] += x[r * in + i] * high;
        }
    }
    const int64_t left = std::min<int64_t>(outs - first, BLOCK);
    for (int r = 0; r < COUNT; ++r) {
        float *to = y + r * outs + first;
        if (left == BLOCK && bias == nullptr) {
            store(to, sums[r][0]);
            store(to + LANES, sums[r][1]);
            continue;
        }
        float whole[BLOCK];
        store(whole, sums[r][0]);
        store(whole + LANES, sums[r][1]);
        for (int64_t i = 0; i < left; ++i) to[i] = whole[i] + (bias == nullptr ? 0 : bias[first + i]);
    }
}

}  // namespace

// y (rows, outs) = W x + bias, where there is one, for x (rows, in). Weights are (outs / BLOCK, in, BLOCK), filled up
// with zeros.
extern "C" void multiply_floats(const float *x, const float *weights, const float *bias, float *y, int64_t rows,
                               int64_t in, int64_t outs) {
    const int64_t step = fetched(rows);
#pragma omp parallel for if (rows * in * outs >= SHARED)
    for (int64_t block = 0; block < (outs + BLOCK - 1) / BLOCK; ++block) {
        const float *own = weights + block * BLOCK * in, *next = own + BLOCK * in;
        for (int64_t row = 0; row < rows; row += ROWS, next += in * step)
            with_constant<ROWS>(rows - row, [&](auto count) {
                constexpr int COUNT = decltype(count)::value;
                const auto product = step > 0 ? multiply<COUNT, true> : multiply<COUNT, false>;
                product(x + row * in, own, bias, y + row * outs, in, outs, block * BLOCK, next, step);
            });
    }
}

// How many outputs a block of weights has, here and in bytes.cpp.
extern "C" int block_size() { return BLOCK; }
