// A product of a linear layer, as it lies in memory, with a few rows.
#pragma once

#include "kernels.h"

extern "C" {

// A linear layer [outputs, inputs] as it lies in memory; bias [outputs] or null.
struct Linear {
    const void *weight;
    const float *bias;
    int64_t outputs;
};
}

namespace tether {

inline long lanes_of(long rows) { return (rows + LANES - 1) / LANES * LANES; }

// What one thread reads in a product: `x` itself, or its own copy normed or rounded to pairs of bfloat16.
template <class W>
const float *rounded(float *to, const float *x, long features, long lanes) {
    if constexpr (inputs_of<W> == 2) {
#ifdef __AVX512BF16__
        for (long k = 0; k < features; k += 2)
            for (long l = 0; l < lanes; l += LANES) {
                // bfloat16 of feature k in the low half of each lane, of k + 1 in the high one.
                auto half = [&](long f) {
                    const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(load(x + f * lanes + l)));
                    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h));
                };
                const __m512i pair = _mm512_or_si512(half(k), _mm512_slli_epi32(half(k + 1), 16));
                _mm512_storeu_si512(to + k / 2 * lanes + l, pair);
            }
#endif
        return to;
    } else {
        return x;
    }
}

struct Range {
    long from, to;
};

// The part of `n` outputs that falls to a thread.
inline Range part(long n, int thread, int threads) {
    const long units = (n + 15) / 16;
    const long from = units * thread / threads * 16, to = units * (thread + 1) / threads * 16;
    return {from < n ? from : n, to < n ? to : n};
}

// done(n, column, y) for y = sum over k < K of w[n * by_n + k * by_k] x[k][column ... + 16], of outputs [range).
template <class W, class Done>
void columns(const W *w, long by_n, long by_k, long K, const float *x, long width, Range range, const W *next,
             Done &&done) {
    const auto finish = [&](long column) {
        return [&, column](long n, auto &tile) {
            for (auto &row : tile) {
                long c = column;
                for (vec y : row) {
                    done(n, c, y);
                    c += LANES;
                }
                n++;
            }
        };
    };
    long c = 0;
    for (; c + 4 * LANES <= width; c += 4 * LANES)
        tiles<outputs(4), 4>(w, by_n, by_k, K, x + c, width, range.from, range.to, next, finish(c));
    for (; c + 2 * LANES <= width; c += 2 * LANES)
        tiles<outputs(2), 2>(w, by_n, by_k, K, x + c, width, range.from, range.to, next, finish(c));
    for (; c < width; c += LANES)
        tiles<outputs(1), 1>(w, by_n, by_k, K, x + c, width, range.from, range.to, next, finish(c));
}

// y = W x + b of outputs [range): done(n, lane, y) for each 16 lanes of each output.
template <class W, class Done>
void product(const Linear &linear, long inputs, const float *x, long lanes, Range range, const void *next, Done &&done) {
    const long words = inputs / inputs_of<W>;
    columns<W>(static_cast<const W *>(linear.weight), words, 1, words, x, lanes, range, static_cast<const W *>(next),
               [&](long n, long lane, vec y) { done(n, lane, linear.bias ? y + linear.bias[n] : y); });
}

// The outputs of a product, a row each: to[lane][n], rows `width` numbers apart. They come in the order of n, 16 of them
// are turned round together; `last`: where they end.
struct AsRows {
    float *to;
    long width, rows, last;
    vec block[WIDEST][LANES];

    void operator()(long n, long lane, vec y) {
        const vec *outputs = block[lane / LANES % WIDEST];
        block[lane / LANES % WIDEST][n % LANES] = y;
        if (n % LANES != LANES - 1 && n + 1 != last) return;
        const long first = n / LANES * LANES;
        float turned[LANES * LANES];
        transpose(reinterpret_cast<const float *>(outputs), LANES, turned, LANES);
        for (long l = 0; l < LANES && lane + l < rows; l++)
            std::memcpy(to + (lane + l) * width + first, turned + l * LANES, sizeof(float) * (n + 1 - first));
    }
};

}  // namespace tether
