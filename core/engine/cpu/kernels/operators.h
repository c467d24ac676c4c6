// What the files beside this one give each other. Knows no models.
#pragma once

#include <cstdint>

// The row in `slot` had `start` tokens before this pass, which brings `tokens` more: the pass's from `first` on. Where
// its packed keys lie is `packed`. The last two are told by lay_out.
struct Row {
    int64_t slot, start, tokens, first, packed;
};

extern "C" {

void add_norm(float *x, const float *delta, const float *weight, float eps, float *out, int64_t rows, int64_t width);
void silu_mul(const float *gate_up, float *out, int64_t rows, int64_t width);
void turn(float *qkv, const float *cos, const float *sin, int64_t rows, int64_t turned, int64_t heads, int64_t size);

void multiply_floats(const float *x, const float *weights, const float *bias, float *y, int64_t rows, int64_t in,
                     int64_t outs);
void multiply_bytes(const float *x, const uint8_t *bytes, const float *scales, const float *bias, float *y,
                    int64_t rows, int64_t in, int64_t outs);

void add_lora(const float *x, int64_t x_stride, float *y, int64_t y_stride, const float *a, const float *b,
              const int64_t *tiles, int64_t count, int64_t in, int64_t parts, int64_t rank, const int64_t *outs);

int64_t lay_out(Row *rows, int64_t count, int64_t kv, int64_t size, int64_t threads);
void attend(const float *qkv, float *keys, float *values, const Row *rows, int64_t count, float *out, int64_t heads,
            int64_t kv, int64_t size, int64_t capacity, int64_t window, float scale, float *room, int64_t threads);

}  // extern "C"
