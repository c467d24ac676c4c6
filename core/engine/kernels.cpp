// Small operators of a forward pass on a CPU, each in one pass over its memory. Knows no models, requests or Python.
//
// All numbers are float32. A row is what one token has; what it becomes depends on that row alone, whichever others
// there are, and is the same to the last bit on any number of threads. core/engine/compiled.py builds and calls this.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int TILE = 4;           // tokens that read an adapter's weights together
constexpr int64_t SHARED = 32768; // numbers from which a second thread pays

// Of no alignment but a float's: a load or store wherever it is dereferenced.
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(LANES / 2 * sizeof(float))));
typedef float Quarter __attribute__((vector_size(LANES / 4 * sizeof(float))));

inline Lanes load(const float *from) { return *reinterpret_cast<const Lanes *>(from); }
inline void store(float *to, Lanes lanes) { *reinterpret_cast<Lanes *>(to) = lanes; }

inline float sum(Lanes lanes) {
    Half half[2];
    std::memcpy(half, &lanes, sizeof lanes);
    const Half halves = half[0] + half[1];
    Quarter quarter[2];
    std::memcpy(quarter, &halves, sizeof halves);
    const Quarter quarters = quarter[0] + quarter[1];
    return (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
}

// e to the x in operators that a compiler applies to many numbers at once: 2^n times a polynomial (Cephes), to 2e-7.
inline float power(float whole) {
    const float x = whole < -87.3f ? -87.3f : whole > 88.3f ? 88.3f : whole;  // what is no number stays none
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
        y = y * r + next;
    y = y * r * r + r + 1;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return whole < -87.3f ? 0.0f : whole > 88.3f ? INFINITY : y * scale;
}

// The bits of |x|.
inline int32_t magnitude(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

// out[r][t] = a[r] . x[t] for ROWS rows of a and COUNT tokens of x; out lies `step` apart by token.
template <int ROWS, int COUNT>
inline void dots(const float *a, const float *const *x, int64_t width, float *out, int64_t step) {
    Lanes sums[ROWS][COUNT] = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Lanes seen[COUNT];
        for (int t = 0; t < COUNT; ++t) seen[t] = load(x[t] + i);
        for (int r = 0; r < ROWS; ++r) {
            const Lanes weight = load(a + r * width + i);
            for (int t = 0; t < COUNT; ++t) sums[r][t] += weight * seen[t];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < COUNT; ++t) {
            float whole = sum(sums[r][t]);
            for (int64_t rest = i; rest < width; ++rest) whole += a[r * width + rest] * x[t][rest];
            out[t * step + r] = whole;
        }
}

// y[t][0, width) += h[t][0, rank) b, b of (rank, stride).
template <int COUNT>
inline void add_products(float *const *y, const float *h, int64_t step, const float *b, int64_t rank, int64_t stride,
                         int64_t width) {
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
            for (int64_t r = 0; r < rank; ++r) added += h[t * step + r] * b[r * stride + j];
            y[t][j] = added;
        }
}

struct Stack {
    const float *a, *b;  // (slots, parts * rank, in) and (slots, parts * rank, all outs)
    int64_t in, parts, rank, all;
    const int64_t *outs;  // of each part
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

extern "C" {

// x += delta, where there is one; out = x / sqrt(mean(x^2) + eps) * weight. All of (rows, width).
void add_norm(float *x, const float *delta, const float *weight, float eps, float *out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width >= SHARED)
    for (int64_t row = 0; row < rows; ++row) {
        float *own = x + row * width, *to = out + row * width;
        if (delta != nullptr) {
            const float *added = delta + row * width;
            for (int64_t i = 0; i < width; ++i) own[i] += added[i];
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += own[i] * own[i];
        const float scale = 1 / std::sqrt(squares / width + eps);
        for (int64_t i = 0; i < width; ++i) to[i] = own[i] * scale * weight[i];
    }
}

// (rows, 2 * width), gates before ups -> out (rows, width) = silu(gate) * up.
void silu_mul(const float *gate_up, float *out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width >= SHARED / 8)
    for (int64_t row = 0; row < rows; ++row) {
        const float *gate = gate_up + 2 * row * width, *up = gate + width;
        float *to = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] = gate[i] / (1 + power(-gate[i])) * up[i];
    }
}

// out = x / largest, each row by its own largest value.
void scale_rows(const float *x, float *out, float *largest, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width >= SHARED)
    for (int64_t row = 0; row < rows; ++row) {
        const float *from = x + row * width;
        float *to = out + row * width;
        int32_t bits = 0;  // in their order as integers, what is no number is the largest of all
        for (int64_t i = 0; i < width; ++i) bits = std::max(bits, magnitude(from[i]));
        float most;
        std::memcpy(&most, &bits, sizeof most);
        for (int64_t i = 0; i < width; ++i) to[i] = from[i] / most;
        largest[row] = most;
    }
}

// y *= largest, row by row, and then += bias, where there is one.
void unscale_rows(float *y, const float *largest, const float *bias, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width >= SHARED)
    for (int64_t row = 0; row < rows; ++row) {
        float *own = y + row * width;
        const float scale = largest[row];
        for (int64_t i = 0; i < width; ++i) own[i] *= scale;
        if (bias != nullptr)
            for (int64_t i = 0; i < width; ++i) own[i] += bias[i];
    }
}

// Rotary positions (Su et al. 2021), in place, for the first `turned` of `heads` heads of each row of qkv
// (rows, heads, size): x cos + roll(x) sin. cos and sin are (rows, size), sin's first half with its sign turned.
void turn(float *qkv, const float *cos, const float *sin, int64_t rows, int64_t turned, int64_t heads, int64_t size) {
    const int64_t half = size / 2;
#pragma omp parallel for if (rows * turned * size >= SHARED)
    for (int64_t row = 0; row < rows; ++row) {
        const float *c = cos + row * size, *s = sin + row * size;
        for (int64_t head = 0; head < turned; ++head) {
            float *first = qkv + (row * heads + head) * size, *second = first + half;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float a = first[i], b = second[i];
                first[i] = a * c[i] + b * s[i];
                second[i] = b * c[half + i] + a * s[half + i];
            }
        }
    }
}

// One token of each row: its key and value are written to the row's slot at its position, and its queries look at all
// of that slot up to there, or at the last `window` of it, if that is not zero.
//
// qkv (rows, heads + 2 * kv, size), turned; keys and values (slots, kv, capacity, size) from the first row's slot on;
// out (rows, heads * size).
void attend(const float *qkv, float *keys, float *values, const int64_t *positions, float *out, int64_t rows,
            int64_t heads, int64_t kv, int64_t size, int64_t capacity, int64_t window, float scale) {
    const int64_t group = heads / kv, all = heads + 2 * kv;
#pragma omp parallel for collapse(2) schedule(dynamic) if (rows > 1)
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
                switch ((shared + 1) * group - head) {
                    case 1: look_up<1>(past, queries, to, scores.data()); break;
                    case 2: look_up<2>(past, queries, to, scores.data()); break;
                    case 3: look_up<3>(past, queries, to, scores.data()); break;
                    default: look_up<TILE>(past, queries, to, scores.data());
                }
            }
        }
}

// y += B (A x), each token with the adapter in its slot. x lies x_stride apart by token, y y_stride.
//
// tiles (count, 2 + TILE) are a slot, how many tokens read it together, and which. outs holds the width of each part.
void add_lora(const float *x, int64_t x_stride, float *y, int64_t y_stride, const float *a, const float *b,
              const int64_t *tiles, int64_t count, int64_t in, int64_t parts, int64_t rank, const int64_t *outs) {
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
            switch (tile[1]) {
                case 1: add_tile<1>(stack, tile[0], from, to, h); break;
                case 2: add_tile<2>(stack, tile[0], from, to, h); break;
                case 3: add_tile<3>(stack, tile[0], from, to, h); break;
                default: add_tile<TILE>(stack, tile[0], from, to, h);
            }
        }
    }
}

}  // extern "C"
