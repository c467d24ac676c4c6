// Row-wise kernels: RMSNorm, SiLU, rotary positions.

#include "simd.h"
#include "kernels.h"
#include "exp.h"

extern "C" {

// x += delta (may be null); out = x / sqrt(mean(x^2) + eps) * weight. x, delta and out are (rows, width).
void add_norm(float *x, const float *delta, const float *weight, float eps, float *out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width >= MIN_PARALLEL)
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

// gate_up (rows, 2 * width), gates first -> out (rows, width) = silu(gate) * up.
void silu_mul(const float *gate_up, float *out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width >= MIN_PARALLEL / 8)
    for (int64_t row = 0; row < rows; ++row) {
        const float *gate = gate_up + 2 * row * width, *up = gate + width;
        float *to = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] = gate[i] / (1 + fast_exp(-gate[i])) * up[i];
    }
}

// Rotary positions (Su et al. 2021) on the first `rotated` of `heads` heads of each row of qkv (rows, heads, size), in
// place: x cos + roll(x) sin. cos and sin are (rows, size); the first half of sin is negated.
void rope(float *qkv, const float *cos, const float *sin, int64_t rows, int64_t rotated, int64_t heads, int64_t size) {
    const int64_t half = size / 2;
#pragma omp parallel for if (rows * rotated * size >= MIN_PARALLEL)
    for (int64_t row = 0; row < rows; ++row) {
        const float *c = cos + row * size, *s = sin + row * size;
        for (int64_t head = 0; head < rotated; ++head) {
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

}  // extern "C"
