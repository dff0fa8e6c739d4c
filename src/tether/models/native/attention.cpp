// Attention of a packed row and its gradient: see attention.py, which lays out these structures.
//
// 16 queries of up to four heads that share a key head are taken at a time, a query to a lane. Keys and values are read
// as they lie; the scores of those queries stand in the open, [keys][lanes], and never leave the second-level cache.
#include <omp.h>

#include <cmath>
#include <vector>

#include "kernels.h"

using namespace tether;

extern "C" {

// [heads, tokens, depth], tokens and heads any number of floats apart.
struct Heads {
    float *data;
    int64_t by_head, by_token;
};

// 16 or fewer queries of one causal piece, that begins at token `start`; they see its tokens up to themselves and all of
// [prompt, prompt + seen).
struct Queries {
    int64_t start, first, count, prompt, seen;
};

// `log_sum` [heads, tokens]. Groups of `queries` [group[g], group[g + 1]) share no key with another group.
struct Attention {
    Heads q, k, v, out, grad, of_q, of_k, of_v;
    float *log_sum;
    const Queries *queries;
    const int64_t *group;
    int64_t groups, heads, shared, depth, tokens, threads;
    float scale;
};
}

namespace {

const float *at(const Heads &t, long head, long token) { return t.data + head * t.by_head + token * t.by_token; }
float *to(const Heads &t, long head, long token) { return t.data + head * t.by_head + token * t.by_token; }

// Memory of a thread, kept from call to call.
float *scratch(size_t floats) {
    static thread_local std::vector<float> kept;
    if (kept.size() < floats) kept.resize(floats);
    return kept.data();
}

// B heads of 16 queries, from head `first` on, and the memory to work on them.
template <int B>
struct Chunk {
    static constexpr long wide = B * LANES;
    const Attention &a;
    const Queries &queries;
    const long shared, first, D = a.depth;
    // Keys of the prompt, then of the piece itself up to the last query.
    const long own = queries.first - queries.start + queries.count, keys = queries.seen + own;

    // rows [wide][D] times `scale`, with zeros after the last query, and across [D][wide], the same turned round.
    void gather(const Heads &t, float scale, float *rows, float *across) const {
        for (int b = 0; b < B; b++)
            for (long i = 0; i < LANES; i++) {
                float *row = rows + (b * LANES + i) * D;
                const float *from = at(t, first + b, queries.first + i);
                for (long c = 0; c < D; c += LANES) store(row + c, i < queries.count ? load(from + c) * scale : vec{});
            }
        for (int b = 0; b < B; b++)
            for (long c = 0; c < D; c += LANES)
                transpose(rows + b * LANES * D + c, D, across + c * wide + b * LANES, wide);
    }

    // across [D][wide] -> the queries' own rows of t.
    void scatter(const Heads &t, const float *across, float *row) const {
        for (int b = 0; b < B; b++) {
            for (long c = 0; c < D; c += LANES) transpose(across + c * wide + b * LANES, wide, row + c, D);
            for (long i = 0; i < queries.count; i++)
                std::memcpy(to(t, first + b, queries.first + i), row + i * D, sizeof(float) * D);
        }
    }

    // done(j, tile): keys j, j + 1, ... of t times what stands across.
    template <class Done>
    void each_key(const Heads &t, const float *across, Done &&done) const {
        const float *none = nullptr;
        const auto behind = [&](long j, auto &tile) { done(queries.seen + j, tile); };
        tiles<outputs(B), B>(at(t, shared, queries.prompt), t.by_token, 1L, D, across, wide, 0, queries.seen, none, done);
        tiles<outputs(B), B>(at(t, shared, queries.start), t.by_token, 1L, D, across, wide, 0, own, none, behind);
    }

    // across [D][wide] = sum over keys of t[key] weights[key].
    void over_keys(const Heads &t, const float *weights, float *across) const {
        const float *none = nullptr;
        std::memset(across, 0, sizeof(float) * D * wide);
        const auto add = [&](long c, auto &tile) {
            for (auto &row : tile) {
                for (int b = 0; b < B; b++) {
                    float *there = across + c * wide + b * LANES;
                    store(there, load(there) + row[b]);
                }
                c++;
            }
        };
        tiles<outputs(B), B>(at(t, shared, queries.prompt), 1L, t.by_token, queries.seen, weights, wide, 0, D, none, add);
        tiles<outputs(B), B>(at(t, shared, queries.start), 1L, t.by_token, own, weights + queries.seen * wide, wide, 0, D,
                             none, add);
    }

    // t[key] += sum over lanes of weights[key][lane] rows[lane].
    void onto_keys(const Heads &t, const float *weights, const float *rows) const {
        onto(to(t, shared, queries.prompt), t.by_token, weights, rows, queries.seen);
        onto(to(t, shared, queries.start), t.by_token, weights + queries.seen * wide, rows, own);
    }

    void onto(float *t, long by_token, const float *weights, const float *rows, long n) const {
        long c = 0;
        for (; c + 4 * LANES <= D; c += 4 * LANES) onto_part<4>(t + c, by_token, weights, rows + c, n);
        for (; c + 2 * LANES <= D; c += 2 * LANES) onto_part<2>(t + c, by_token, weights, rows + c, n);
        for (; c < D; c += LANES) onto_part<1>(t + c, by_token, weights, rows + c, n);
    }

    template <int C>
    void onto_part(float *t, long by_token, const float *weights, const float *rows, long n) const {
        const float *none = nullptr;
        tiles<outputs(C), C>(weights, wide, 1L, wide, rows, D, 0, n, none, [&](long j, auto &tile) {
            for (auto &row : tile) {
                for (int c = 0; c < C; c++) {
                    float *there = t + j * by_token + c * LANES;
                    store(there, load(there) + row[c]);
                }
                j++;
            }
        });
    }

    // Which lanes of a head see key j: those of queries that do not come before it.
    __mmask16 sees(long j) const {
        const long hidden = j - (keys - queries.count);
        return __mmask16(hidden > 0 ? 0xffffu << hidden : 0xffffu);
    }
    vec unless_hidden(long j, vec x, float otherwise) const {
        return reinterpret_cast<vec>(_mm512_mask_mov_ps(reinterpret_cast<__m512>(all(otherwise)), sees(j),
                                                        reinterpret_cast<__m512>(x)));
    }

    void forward() const {
        float *rows = scratch(wide * D * 3 + keys * wide), *across = rows + wide * D, *out = across + wide * D;
        float *scores = out + wide * D;
        gather(a.q, a.scale, rows, across);
        vec top[B];
        for (vec &t : top) t = all(-3e38f);
        each_key(a.k, across, [&](long j, auto &tile) {
            for (auto &row : tile) {
                for (int b = 0; b < B; b++) {
                    const vec s = unless_hidden(j, row[b], -3e38f);
                    store(scores + j * wide + b * LANES, s);
                    top[b] = larger(top[b], s);
                }
                j++;
            }
        });
        vec total[B] = {};
        for (long j = 0; j < keys; j++)
            for (int b = 0; b < B; b++) {
                float *there = scores + j * wide + b * LANES;
                const vec e = exponential(load(there) - top[b]);
                total[b] += e;
                store(there, e);
            }
        over_keys(a.v, scores, out);
        for (int b = 0; b < B; b++) {
            const vec inverse = 1.f / total[b];
            for (long c = 0; c < D; c++) {
                float *there = out + c * wide + b * LANES;
                store(there, load(there) * inverse);
            }
            for (long i = 0; i < queries.count; i++)
                a.log_sum[(first + b) * a.tokens + queries.first + i] = top[b][i] + std::log(total[b][i]);
        }
        scatter(a.out, out, rows);
    }

    // With p = exp(s - log Z): dv = pᵀ g, ds = p (g vᵀ - Σ g o), dq = scale · ds k, dk = scale · dsᵀ q (Dao 2022, algorithm 4).
    void backward() const {
        const long block = wide * D;
        float *q = scratch(block * 5 + 2 * keys * wide), *across = q + block, *grad = across + block;
        float *across_grad = grad + block, *of_q = across_grad + block, *weights = of_q + block;
        float *of_scores = weights + keys * wide;
        gather(a.q, a.scale, q, across);
        gather(a.grad, 1, grad, across_grad);
        float log_sum[wide] = {}, pulled[wide] = {};
        for (int b = 0; b < B; b++)
            for (long i = 0; i < queries.count; i++) {
                const float *out = at(a.out, first + b, queries.first + i);
                vec dot{};
                for (long c = 0; c < D; c += LANES) dot += load(out + c) * load(grad + (b * LANES + i) * D + c);
                pulled[b * LANES + i] = sum(dot);
                log_sum[b * LANES + i] = a.log_sum[(first + b) * a.tokens + queries.first + i];
            }
        each_key(a.k, across, [&](long j, auto &tile) {
            for (auto &row : tile) {
                for (int b = 0; b < B; b++) {
                    const vec p = exponential(row[b] - load(log_sum + b * LANES));
                    store(weights + j * wide + b * LANES, unless_hidden(j, p, 0));
                }
                j++;
            }
        });
        each_key(a.v, across_grad, [&](long j, auto &tile) {
            for (auto &row : tile) {
                for (int b = 0; b < B; b++) {
                    const long there = j * wide + b * LANES;
                    store(of_scores + there, load(weights + there) * (row[b] - load(pulled + b * LANES)));
                }
                j++;
            }
        });
        over_keys(a.k, of_scores, of_q);
        for (long i = 0; i < block; i += LANES) store(of_q + i, load(of_q + i) * a.scale);
        onto_keys(a.of_k, of_scores, q);
        onto_keys(a.of_v, weights, grad);
        scatter(a.of_q, of_q, across);
    }
};

// run(chunk) for every four heads that share key head `shared`, and for those that are left.
template <class Run>
void each_chunk(const Attention &a, const Queries &queries, long shared, Run &&run) {
    const long repeat = a.heads / a.shared;
    long head = shared * repeat;
    const long end = head + repeat;
    for (; head + 4 <= end; head += 4) run(Chunk<4>{a, queries, shared, head});
    if (end - head == 3) run(Chunk<3>{a, queries, shared, head});
    if (end - head == 2) run(Chunk<2>{a, queries, shared, head});
    if (end - head == 1) run(Chunk<1>{a, queries, shared, head});
}
}  // namespace

extern "C" {

void tether_attention(const Attention *a) {
    const long queries = a->group[a->groups];
#pragma omp parallel for num_threads(int(a->threads)) schedule(dynamic, 4) collapse(2)
    for (long i = 0; i < queries; i++)
        for (long h = 0; h < a->shared; h++)
            each_chunk(*a, a->queries[i], h, [](const auto &chunk) { chunk.forward(); });
}

// of_k and of_v must hold zeros.
void tether_attention_backward(const Attention *a) {
#pragma omp parallel for num_threads(int(a->threads)) schedule(dynamic, 1) collapse(2)
    for (long g = 0; g < a->groups; g++)
        for (long h = 0; h < a->shared; h++)
            for (long i = a->group[g]; i < a->group[g + 1]; i++)
                each_chunk(*a, a->queries[i], h, [](const auto &chunk) { chunk.backward(); });
}
}
