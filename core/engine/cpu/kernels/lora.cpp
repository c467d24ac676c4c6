// LoRA for a batch whose tokens use different adapters.

#include <algorithm>
#include <vector>

#include "simd.h"
#include "kernels.h"

namespace {

struct Stack {
    const float *a, *b;  // (slots, parts * rank, in) and (slots, parts * rank, all)
    int64_t in, parts, rank, all;
    const int64_t *outs;  // width of each part; they sum to `all`
};

template <int COUNT>
void add_tile(const Stack &stack, int64_t slot, const float *const *x, float *const *y, std::vector<float> &h) {
    const int64_t ranks = stack.parts * stack.rank;
    const float *a = stack.a + slot * ranks * stack.in;
    int64_t r = 0;
    for (; r + TILE <= ranks; r += TILE) dots<TILE, COUNT>(a + r * stack.in, x, stack.in, h.data() + r, ranks);
    for (; r < ranks; ++r) dots<1, COUNT>(a + r * stack.in, x, stack.in, h.data() + r, ranks);
    const float *b = stack.b + slot * ranks * stack.all;
    float *own[COUNT];
    std::copy(y, y + COUNT, own);
    for (int64_t part = 0; part < stack.parts; ++part) {
        add_products<COUNT>(own, h.data() + part * stack.rank, ranks, b, stack.rank, stack.all, stack.outs[part]);
        for (float *&each : own) each += stack.outs[part];
        b += stack.rank * stack.all + stack.outs[part];
    }
}

}  // namespace

// y += B (A x), each token with the adapter of its slot. Tokens of x and y are x_stride and y_stride floats apart.
//
// tiles (count, 2 + TILE): slot, number of tokens, their indices. outs (parts,): width of each part.
extern "C" void add_lora(const float *x, int64_t x_stride, float *y, int64_t y_stride, const float *a, const float *b,
                         const int64_t *tiles, int64_t count, int64_t in, int64_t parts, int64_t rank,
                         const int64_t *outs) {
    int64_t all = 0;
    for (int64_t part = 0; part < parts; ++part) all += outs[part];
    const Stack stack{a, b, in, parts, rank, all, outs};
#pragma omp parallel if (count > 1)
    {
        std::vector<float> h(TILE * parts * rank);
#pragma omp for schedule(dynamic)
        for (int64_t one = 0; one < count; ++one) {
            const int64_t *tile = tiles + one * (2 + TILE);
            const float *from[TILE];
            float *to[TILE];
            for (int64_t t = 0; t < tile[1]; ++t) {
                from[t] = x + tile[2 + t] * x_stride;
                to[t] = y + tile[2 + t] * y_stride;
            }
            dispatch_count<TILE>(tile[1], [&](auto tokens) {
                add_tile<decltype(tokens)::value>(stack, tile[0], from, to, h);
            });
        }
    }
}
