// Attention of one token of each row over its slot, as in decoding. Knows no prompts.

#include <algorithm>
#include <vector>

#include "lanes.h"
#include "power.h"

namespace {

struct Past {
    const float *keys, *values;  // (length, size)
    int64_t length, size;
    float scale;
};

// What COUNT queries (COUNT, size) of one key find: out (COUNT, size). Scores are room for (COUNT, length).
template <int COUNT>
void look_up(const Past &past, const float *queries, float *out, float *scores) {
    const int64_t length = past.length, size = past.size;
    const float *query[COUNT];
    float *to[COUNT];
    for (int t = 0; t < COUNT; ++t) query[t] = queries + t * size, to[t] = out + t * size;
    int64_t at = 0;
    for (; at + TILE <= length; at += TILE) dots<TILE, COUNT>(past.keys + at * size, query, size, scores + at, length);
    for (; at < length; ++at) dots<1, COUNT>(past.keys + at * size, query, size, scores + at, length);
    std::fill(out, out + COUNT * size, 0.0f);
    for (int t = 0; t < COUNT; ++t) {
        float *own = scores + t * length, most = -INFINITY, whole = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < length; ++i) most = own[i] > most ? own[i] : most;
#pragma omp simd reduction(+ : whole)
        for (int64_t i = 0; i < length; ++i) whole += own[i] = power((own[i] - most) * past.scale);
        for (int64_t i = 0; i < length; ++i) own[i] /= whole;
    }
    add_products<COUNT>(to, scores, length, past.values, length, size, size);
}

}  // namespace

// One token of each row: its key and value are written to the row's slot at its position, and its queries look at all
// of that slot up to there, or at the last `window` of it, if that is not zero.
//
// qkv (rows, heads + 2 * kv, size), turned; keys and values (slots, kv, capacity, size) from the first row's slot on;
// out (rows, heads * size).
extern "C" void attend(const float *qkv, float *keys, float *values, const int64_t *positions, float *out,
                       int64_t rows, int64_t heads, int64_t kv, int64_t size, int64_t capacity, int64_t window,
                       float scale) {
    const int64_t group = heads / kv, all = heads + 2 * kv;
    int64_t read = 0;
    for (int64_t row = 0; row < rows; ++row) read += positions[row] * kv * size;
#pragma omp parallel for collapse(2) schedule(dynamic) if (read >= SHARED / 2)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t shared = 0; shared < kv; ++shared) {
            const float *own = qkv + row * all * size;
            const int64_t stop = positions[row] + 1, start = window > 0 && window < stop ? stop - window : 0;
            float *key = keys + (row * kv + shared) * capacity * size;
            float *value = values + (row * kv + shared) * capacity * size;
            std::memcpy(key + (stop - 1) * size, own + (heads + shared) * size, size * sizeof(float));
            std::memcpy(value + (stop - 1) * size, own + (heads + kv + shared) * size, size * sizeof(float));
            const Past past{key + start * size, value + start * size, stop - start, size, scale};
            std::vector<float> scores(TILE * past.length);
            for (int64_t head = shared * group; head < (shared + 1) * group; head += TILE) {
                const float *queries = own + head * size;
                float *to = out + (row * heads + head) * size;
                with_constant<TILE>((shared + 1) * group - head, [&](auto count) {
                    look_up<decltype(count)::value>(past, queries, to, scores.data());
                });
            }
        }
}
