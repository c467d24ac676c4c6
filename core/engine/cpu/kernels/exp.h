// Vectorizable exponential.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

// exp(x) = 2^n times a polynomial (Cephes), relative error 2e-7. No branches, so that loops over it vectorize.
static inline float fast_exp(float whole) {
    const float x = whole < -87.3f ? -87.3f : whole > 88.3f ? 88.3f : whole;  // NaN stays NaN
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

