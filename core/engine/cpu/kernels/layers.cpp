// All layers of a llama-like model over the tokens of one forward pass. core/engine/runtime/compiled_layers.py mirrors
// the structs.

#include "kernels.h"

namespace {

struct Norm {
    const float *weight;  // null: no norm
    float eps;
};

struct Linear {
    const float *floats;  // null: the weights are int8
    const uint8_t *bytes;
    const float *scales, *bias;
    int64_t in, outs;
    const float *a, *b;  // stacked LoRA weights, or null
    int64_t parts, rank;
    const int64_t *widths;
};

struct Layer {
    Norm norm, q_norm, k_norm, mlp_norm;
    Linear qkv, out, gate_up, down;
    float *keys, *values;
    int64_t capacity, window;
};

struct Pass {
    int64_t tokens, rows, tiles, threads;
    int64_t hidden, heads, kv, size, inner;
    float scale;
    Row *row;
    const int64_t *tile;
    const float *cos, *sin;
    float *x;  // (tokens, hidden): embeddings, overwritten
};

// Offsets of the intermediate results in scratch; `end` is its size in floats.
struct ScratchLayout {
    int64_t normed, qkv, mixed, gate_up, active, delta, attention, end;

    explicit ScratchLayout(const Pass &pass) {
        const int64_t tokens = pass.tokens;
        normed = 0;
        qkv = normed + tokens * pass.hidden;
        mixed = qkv + tokens * (pass.heads + 2 * pass.kv) * pass.size;
        gate_up = mixed + tokens * pass.heads * pass.size;
        active = gate_up + tokens * 2 * pass.inner;
        delta = active + tokens * pass.inner;
        attention = delta + tokens * pass.hidden;
        end = attention + lay_out(pass.row, pass.rows, pass.kv, pass.size, pass.threads);
    }
};

void multiply(const Linear &linear, const Pass &pass, const float *x, float *y) {
    const int64_t in = linear.in, outs = linear.outs;
    if (linear.floats != nullptr)
        float_matmul(x, linear.floats, linear.bias, y, pass.tokens, in, outs);
    else
        int8_matmul(x, linear.bytes, linear.scales, linear.bias, y, pass.tokens, in, outs);
    if (linear.a != nullptr)
        add_lora(x, in, y, outs, linear.a, linear.b, pass.tile, pass.tiles, in, linear.parts, linear.rank, linear.widths);
}

// RMSNorm of each head.
void norm_heads(const Norm &norm, const Pass &pass, float *qkv, int64_t first, int64_t count) {
    if (norm.weight == nullptr) return;
#pragma omp parallel for
    for (int64_t token = 0; token < pass.tokens; ++token) {
        float *own = qkv + (token * (pass.heads + 2 * pass.kv) + first) * pass.size;
        add_norm(own, nullptr, norm.weight, norm.eps, own, count, pass.size);
    }
}

}  // namespace

// Floats of scratch that run_layers needs.
extern "C" int64_t scratch_size(const Pass *pass) { return ScratchLayout(*pass).end; }

// states (rows, hidden): the last token of each row, normed by `last`.
extern "C" void run_layers(const Layer *layers, int64_t count, const Norm *last, const Pass *given, float *scratch,
                           float *states) {
    const Pass &pass = *given;
    const ScratchLayout layout(pass);
    float *const normed = scratch + layout.normed, *const qkv = scratch + layout.qkv, *const mixed = scratch + layout.mixed;
    float *const gate_up = scratch + layout.gate_up, *const active = scratch + layout.active;
    float *const delta = scratch + layout.delta;
    const int64_t tokens = pass.tokens, hidden = pass.hidden, heads = pass.heads, kv = pass.kv;
    for (const Layer *layer = layers; layer < layers + count; ++layer) {
        add_norm(pass.x, layer == layers ? nullptr : delta, layer->norm.weight, layer->norm.eps, normed, tokens, hidden);
        multiply(layer->qkv, pass, normed, qkv);
        norm_heads(layer->q_norm, pass, qkv, 0, heads);
        norm_heads(layer->k_norm, pass, qkv, heads, kv);
        rope(qkv, pass.cos, pass.sin, tokens, heads + kv, heads + 2 * kv, pass.size);
        attend(qkv, layer->keys, layer->values, pass.row, pass.rows, mixed, heads, kv, pass.size,
               layer->capacity, layer->window, pass.scale, scratch + layout.attention, pass.threads);
        multiply(layer->out, pass, mixed, delta);
        add_norm(pass.x, delta, layer->mlp_norm.weight, layer->mlp_norm.eps, normed, tokens, hidden);
        multiply(layer->gate_up, pass, normed, gate_up);
        silu_mul(gate_up, active, tokens, pass.inner);
        multiply(layer->down, pass, active, delta);
    }
    for (int64_t row = 0; row < pass.rows; ++row) {
        const int64_t at = (pass.row[row].first + pass.row[row].tokens - 1) * hidden;
        add_norm(pass.x + at, delta + at, last->weight, last->eps, states + row * hidden, 1, hidden);
    }
}
