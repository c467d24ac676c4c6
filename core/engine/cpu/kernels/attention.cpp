// Causal attention of a batch's tokens over the key/value slots of their rows.

#include <omp.h>

#include <algorithm>

#include "simd.h"
#include "kernels.h"
#include "exp.h"

namespace {

struct Past {
    const float *keys, *values;  // (length, size)
    int64_t size;
    float scale;
};

int64_t whole_blocks(int64_t length) { return (length + BLOCK - 1) / BLOCK * BLOCK; }

// Length of a score buffer that fits every row, in whole blocks.
int64_t score_stride(const Row *rows, int64_t count) {
    int64_t longest = 0;
    for (const Row *row = rows; row < rows + count; ++row) longest = std::max(longest, row->start + row->tokens);
    return whole_blocks(longest);
}

// Softmax of scale * scores, in place.
void softmax(float *scores, int64_t length, float scale) {
    float most = -INFINITY, whole = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < length; ++i) most = scores[i] > most ? scores[i] : most;
#pragma omp simd reduction(+ : whole)
    for (int64_t i = 0; i < length; ++i) whole += scores[i] = fast_exp((scores[i] - most) * scale);
    for (int64_t i = 0; i < length; ++i) scores[i] /= whole;
}

// One token, COUNT query heads (COUNT, size) that share a key head -> out (COUNT, size). Keys are read once, in order.
template <int COUNT>
void decode_attention(const Past &past, int64_t length, const float *queries, float *out, float *scores) {
    const int64_t size = past.size;
    const float *query[COUNT];
    float *to[COUNT];
    for (int t = 0; t < COUNT; ++t) query[t] = queries + t * size, to[t] = out + t * size;
    int64_t at = 0;
    for (; at + TILE <= length; at += TILE) {
        for (int64_t i = 0; i < TILE * size; i += LINE) __builtin_prefetch(past.values + at * size + i, 0, 2);
        dots<TILE, COUNT>(past.keys + at * size, query, size, scores + at, length);
    }
    for (; at < length; ++at) dots<1, COUNT>(past.keys + at * size, query, size, scores + at, length);
    for (int t = 0; t < COUNT; ++t) softmax(scores + t * length, length, past.scale);
    std::fill(out, out + COUNT * size, 0.0f);
    add_products<COUNT>(to, scores, length, past.values, length, size, size);
}

// Copies keys [from, stop) to `to`, each block of BLOCK keys transposed to (size, BLOCK).
void pack_keys(const float *keys, int64_t from, int64_t stop, int64_t size, float *to) {
    for (int64_t first = from / BLOCK * BLOCK; first < stop; first += BLOCK)
        for (int64_t key = first; key < first + BLOCK; ++key)
            for (int64_t i = 0; i < size; ++i)
                to[first * size + i * BLOCK + key - first] = key < stop ? keys[key * size + i] : 0;
}

struct Query {
    const float *from;
    float *to;
    int64_t start, stop;  // visible positions of its row
};

// COUNT queries of a prompt, ordered by token, over packed keys. scores is (COUNT, stride).
template <int COUNT>
void prefill_attention(const Past &past, const float *packed, const Query *queries, float *scores, int64_t stride) {
    const int64_t size = past.size, start = queries[0].start, stop = queries[COUNT - 1].stop;
    const float *from[COUNT];
    float *to[COUNT];
    for (int t = 0; t < COUNT; ++t) from[t] = queries[t].from, to[t] = queries[t].to;
    for (int64_t block = start / BLOCK * BLOCK; block < stop; block += BLOCK) {
        Lanes sums[COUNT][2] = {};
        const float *keys = packed + block * size;
        for (int64_t i = 0; i < size; ++i, keys += BLOCK) {
            const Lanes low = load(keys), high = load(keys + LANES);
            for (int t = 0; t < COUNT; ++t) {
                sums[t][0] += from[t][i] * low;
                sums[t][1] += from[t][i] * high;
            }
        }
        for (int t = 0; t < COUNT; ++t) {
            store(scores + t * stride + block, sums[t][0]);
            store(scores + t * stride + block + LANES, sums[t][1]);
        }
    }
    for (int t = 0; t < COUNT; ++t) {
        float *own = scores + t * stride;
        std::fill(own + start, own + queries[t].start, 0.0f);
        softmax(own + queries[t].start, queries[t].stop - queries[t].start, past.scale);
        std::fill(own + queries[t].stop, own + stop, 0.0f);
        std::fill(to[t], to[t] + size, 0.0f);
    }
    add_products<COUNT>(to, scores + start, stride, past.values + start * size, stop - start, size, size);
}

}  // namespace

// Fills in `first` and `packed` of each row. Returns the floats of scratch that `attend` needs: scores per thread, then
// the packed keys of rows with more than one token.
extern "C" int64_t lay_out(Row *rows, int64_t count, int64_t kv, int64_t size, int64_t threads) {
    int64_t tokens = 0, scratch = threads * ROWS * score_stride(rows, count);
    for (Row *row = rows; row < rows + count; ++row) {
        row->first = tokens;
        row->packed = scratch;
        tokens += row->tokens;
        if (row->tokens > 1) scratch += kv * size * whole_blocks(row->start + row->tokens);
    }
    return scratch;
}

// Writes the keys and values of all tokens to their rows' slots, then attends: each query sees its row up to its own
// token, or the last `window` tokens of that if window > 0.
//
// qkv (tokens, heads + 2 * kv, size), rotated; keys and values (slots, kv, capacity, size); out (tokens, heads * size).
extern "C" void attend(const float *qkv, float *keys, float *values, const Row *rows, int64_t count, float *out,
                       int64_t heads, int64_t kv, int64_t size, int64_t capacity, int64_t window, float scale,
                       float *scratch, int64_t threads) {
    const int64_t group = heads / kv, all = heads + 2 * kv, stride = score_stride(rows, count);
    int64_t read = 0;
    for (const Row *row = rows; row < rows + count; ++row) read += row->tokens * (row->start + row->tokens) * kv * size;
    const auto start_of = [&](int64_t stop) { return window > 0 && window < stop ? stop - window : 0; };
#pragma omp parallel num_threads(threads) if (read >= MIN_PARALLEL / 2)
    {
        float *const scores = scratch + omp_get_thread_num() * ROWS * stride;
        // Rows with one token attend here. Longer ones pack their keys first, since many queries read each key.
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t one = 0; one < count; ++one)
            for (int64_t shared = 0; shared < kv; ++shared) {
                const Row &row = rows[one];
                const int64_t at = (row.slot * kv + shared) * capacity * size, stop = row.start + row.tokens;
                const float *own = qkv + row.first * all * size;
                for (int64_t token = 0; token < row.tokens; ++token) {
                    const float *from = own + (token * all + heads + shared) * size;
                    std::memcpy(keys + at + (row.start + token) * size, from, size * sizeof(float));
                    std::memcpy(values + at + (row.start + token) * size, from + kv * size, size * sizeof(float));
                }
                if (row.tokens > 1) {
                    pack_keys(keys + at, start_of(row.start + 1), stop, size,
                         scratch + row.packed + shared * size * whole_blocks(stop));
                    continue;
                }
                const int64_t start = start_of(stop);
                const Past past{keys + at + start * size, values + at + start * size, size, scale};
                for (int64_t head = shared * group; head < (shared + 1) * group; head += TILE)
                    dispatch_count<TILE>((shared + 1) * group - head, [&](auto queries) {
                        decode_attention<decltype(queries)::value>(past, stop - start, own + head * size,
                                                          out + (row.first * heads + head) * size, scores);
                    });
            }
        for (const Row *row = rows; row < rows + count; ++row) {
            if (row->tokens == 1) continue;
            const int64_t queries = row->tokens * group;
#pragma omp for collapse(2) schedule(dynamic) nowait
            for (int64_t shared = 0; shared < kv; ++shared)
                for (int64_t first = 0; first < queries; first += ROWS) {
                    const int64_t at = (row->slot * kv + shared) * capacity * size;
                    const Past past{keys + at, values + at, size, scale};
                    Query some[ROWS];
                    for (int64_t query = first; query < std::min(first + ROWS, queries); ++query) {
                        const int64_t token = query / group, head = shared * group + query % group;
                        const int64_t stop = row->start + token + 1;
                        some[query - first] = {qkv + ((row->first + token) * all + head) * size,
                                               out + ((row->first + token) * heads + head) * size, start_of(stop), stop};
                    }
                    dispatch_count<ROWS>(queries - first, [&](auto count) {
                        prefill_attention<decltype(count)::value>(
                            past, scratch + row->packed + shared * size * whole_blocks(row->start + row->tokens), some,
                            scores, stride);
                    });
                }
        }
    }
}
