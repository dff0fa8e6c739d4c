// What all kernels are made of: 16 numbers at a time, one tile of a matrix product, and rows spread over threads.
//
// Activations lie as [features][lanes]: the 16 numbers of a vector are one feature of 16 rows, so a weight is read once,
// as it lies in the learner's own tensor, and multiplied with all rows. Each output is one sum in the order of its
// inputs, whatever shares the tile: a row's numbers do not depend on the rows beside it.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>

namespace tether {

using vec = float __attribute__((vector_size(64), aligned(4)));
constexpr long LANES = 16;
// Vectors of lanes that one tile takes at most.
constexpr int WIDEST = 4;

// Two bfloat16 numbers, neighbours along the inputs of a product.
struct Pair {
    uint32_t bits;
};
// Inputs that one word of a weight stands for.
template <class W>
constexpr long inputs_of = 1;
template <>
constexpr long inputs_of<Pair> = 2;

inline vec load(const float *p) { return *reinterpret_cast<const vec *>(p); }
inline void store(float *p, vec x) { *reinterpret_cast<vec *>(p) = x; }
inline vec all(float x) { return x - vec{}; }
inline float sum(vec x) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x)); }
inline float largest(vec x) { return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x)); }
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline vec root(vec x) { return reinterpret_cast<vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x))); }

// exp x to 2 units in the last place: 2^n times the Taylor polynomial of degree 7 of what is left, |x| <= ln 2 / 2. A NaN
// stays one: both comparisons are written so.
inline vec exponential(vec x) {
    x = x < all(-87.3f) ? all(-87.3f) : x;
    x = x > all(88.3f) ? all(88.3f) : x;
    const __m512 n = _mm512_roundscale_ps(reinterpret_cast<__m512>(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
    const vec whole = reinterpret_cast<vec>(n);
    const vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec y = all(1.f / 5040);
    const float rest[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    for (float c : rest) y = y * r + c;
    return reinterpret_cast<vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(y), n));
}

inline void add(vec &to, float w, vec x) { to += w * x; }
#ifdef __AVX512BF16__
inline void add(vec &to, Pair w, vec x) {
    to = reinterpret_cast<vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(to),
                                                reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(w.bits))),
                                                reinterpret_cast<__m512bh>(x)));
}
#endif

// Outputs of a tile that is B vectors wide: as many sums as the registers hold.
constexpr int outputs(int B) { return B == 1 ? 16 : B == 2 ? 12 : B == 3 ? 8 : 6; }

// to[n][b] += sum over k < K of w[n * by_n + k * by_k] x[k][b]. What is read next comes into the cache meanwhile, from
// `ahead`, a line for each line that is used (null: nothing does).
template <int N, int B, class W>
inline __attribute__((always_inline)) void accumulate(vec (&to)[N][B], const W *w, long by_n, long by_k, const float *x,
                                                      long lanes, long K, const W *ahead) {
    vec sums[N][B];
    for (int n = 0; n < N; n++)
        for (int b = 0; b < B; b++) sums[n][b] = to[n][b];
    for (long from = 0; from < K; from += 16) {
        const long until = K - from < 16 ? K : from + 16;
        if (ahead)
            for (int n = 0; n < N; n++) __builtin_prefetch(ahead + from * N + n * 16);
        for (long k = from; k < until; k++) {
            vec xs[B];
            for (int b = 0; b < B; b++) xs[b] = load(x + k * lanes + b * LANES);
#pragma GCC unroll 16
            for (int n = 0; n < N; n++) {
                const W weight = w[n * by_n + k * by_k];
#pragma GCC unroll 4
                for (int b = 0; b < B; b++) add(sums[n][b], weight, xs[b]);
            }
        }
    }
    for (int n = 0; n < N; n++)
        for (int b = 0; b < B; b++) to[n][b] = sums[n][b];
}

// done(n, tile) for each tile of outputs [from, to): rows n, n + 1, ... of W x, for B vectors of lanes.
template <int N, int B, class W, class Done>
inline void tiles(const W *w, long by_n, long by_k, long K, const float *x, long lanes, long from, long to,
                  const W *next, Done &&done) {
    long n = from;
    for (; n + N <= to; n += N) {
        vec tile[N][B] = {};
        const W *ahead = by_k != 1 ? nullptr : n + 2 * N <= to ? w + (n + N) * by_n : next;
        accumulate<N, B>(tile, w + n * by_n, by_n, by_k, x, lanes, K, ahead);
        done(n, tile);
    }
    if constexpr (N > 1)
        if (n < to) tiles<N / 2, B>(w, by_n, by_k, K, x, lanes, n, to, next, done);
}

// [16][16] -> [16][16] transposed: rows `by_row` and `to_row` numbers apart.
inline void transpose(const float *from, long by_row, float *to, long to_row) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(from + i * by_row);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; half++) {
            const __m512d a = _mm512_castps_pd(t[i + half]), b = _mm512_castps_pd(t[i + 2 + half]);
            r[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_ps(to + i * to_row, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_ps(to + (i + 8) * to_row, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    }
}

// Rows of a piece of work; those that share one partial sum of a norm's weight gradient.
constexpr long ROWS = 64;

// run(first, last) for the pieces of `rows`, over the threads.
template <class Run>
inline void each_piece(long rows, long threads, Run &&run) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
    for (long first = 0; first < rows; first += ROWS) run(first, first + ROWS < rows ? first + ROWS : rows);
}

// 16 columns of up to 16 rows `rows` [16][16] -> to[column][row], columns `by_column` apart.
inline void store_turned(const vec *rows, long count, float *to, long by_column) {
    if (count == LANES) return transpose(reinterpret_cast<const float *>(rows), LANES, to, by_column);
    float turned[LANES * LANES];
    transpose(reinterpret_cast<const float *>(rows), LANES, turned, LANES);
    for (long c = 0; c < LANES; c++) std::memcpy(to + c * by_column, turned + c * LANES, sizeof(float) * count);
}

}  // namespace tether
