// Declarations that the kernels share.
#pragma once

#include <cstdint>

// A row of a batch: its slot holds `start` tokens, and `tokens` more come with this pass, from index `first` of it on.
// `packed` is the offset of its packed keys in scratch. lay_out fills in `first` and `packed`.
struct Row {
    int64_t slot, start, tokens, first, packed;
};

extern "C" {

void add_norm(float *x, const float *delta, const float *weight, float eps, float *out, int64_t rows, int64_t width);
void silu_mul(const float *gate_up, float *out, int64_t rows, int64_t width);
void rope(float *qkv, const float *cos, const float *sin, int64_t rows, int64_t rotated, int64_t heads, int64_t size);

void float_matmul(const float *x, const float *weights, const float *bias, float *y, int64_t rows, int64_t in,
                     int64_t outs);
void int8_matmul(const float *x, const uint8_t *bytes, const float *scales, const float *bias, float *y,
                    int64_t rows, int64_t in, int64_t outs);

void add_lora(const float *x, int64_t x_stride, float *y, int64_t y_stride, const float *a, const float *b,
              const int64_t *tiles, int64_t count, int64_t in, int64_t parts, int64_t rank, const int64_t *outs);

int64_t lay_out(Row *rows, int64_t count, int64_t kv, int64_t size, int64_t threads);
void attend(const float *qkv, float *keys, float *values, const Row *rows, int64_t count, float *out, int64_t heads,
            int64_t kv, int64_t size, int64_t capacity, int64_t window, float scale, float *scratch, int64_t threads);

}  // extern "C"
