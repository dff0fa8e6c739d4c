// One token of a few rows through the trunk of a Llama-shaped network: see decoder.py, which lays out these structures.
#include <omp.h>

#include "kernels.h"

using namespace tether;

extern "C" {

// A linear layer [outputs, inputs] as it lies in memory; bias [outputs] or null.
struct Linear {
    const void *weight;
    const float *bias;
    int64_t outputs;
};

// weight [n]; null: there is no such norm.
struct Norm {
    const float *weight;
    float epsilon;
};

// keys and values of prompts [prompts, shared, prompt_room, depth], and of rows [rows, shared, room, depth].
struct Layer {
    Linear qkv[3], out, gate, up, down;
    Norm before_attention, before_mlp, q_norm, k_norm;
    const float *prompt_keys, *prompt_values;
    float *keys, *values;
};

// `members`: rows, prompt after prompt, the g-th beginning at first[g]. `lengths`: tokens that a row holds, the new one
// not counted. `cosine`, `sine` [rows, depth]; `x` [rows, width]: embeddings, then states after the last norm.
struct Step {
    int64_t layers, width, heads, shared, depth, inner, rounded, threads;
    float scale;
    Norm last;
    int64_t rows, prompts, prompt_room, room;
    const int64_t *members, *first, *prompt_lengths, *lengths;
    const float *cosine, *sine;
    float *x, *scratch;
};
}

namespace {

long lanes_of(long rows) { return (rows + LANES - 1) / LANES * LANES; }

// Floats of each piece of scratch memory.
struct Sizes {
    long lanes, states, heads, seen, hidden, input, scores, own, thread;

    explicit Sizes(const Step &s) {
        lanes = lanes_of(s.rows);
        states = s.width * lanes;
        heads = (s.heads + 2 * s.shared) * s.depth * lanes;
        seen = s.heads * s.depth * lanes;
        hidden = s.inner * lanes;
        input = states > seen ? states : seen;
        input = input > hidden ? input : hidden;
        const long block = WIDEST * LANES;
        scores = (2 * s.depth + s.prompt_room) * block;
        own = block * (s.depth + lanes_of(s.room) + 1);
        thread = input + scores + own;
    }
    long shared() const { return states + heads + seen + hidden; }
};

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

// y = w x / sqrt(mean x² + ε) (Zhang 2019, eq. 4), feature by feature.
void normed(float *to, const float *x, Norm norm, long features, long lanes) {
    for (long l = 0; l < lanes; l += LANES) {
        vec squares{};
        for (long k = 0; k < features; k++) {
            const vec v = load(x + k * lanes + l);
            squares += v * v;
        }
        const vec inverse = 1.f / root(squares / float(features) + norm.epsilon);
        for (long k = 0; k < features; k++)
            store(to + k * lanes + l, load(x + k * lanes + l) * inverse * norm.weight[k]);
    }
}

struct Range {
    long from, to;
};

// The part of `n` outputs that falls to a thread.
Range part(long n, int thread, int threads) {
    const long units = (n + 15) / 16;
    const long from = units * thread / threads * 16, to = units * (thread + 1) / threads * 16;
    return {from < n ? from : n, to < n ? to : n};
}

// y = W x + b of outputs [range): done(n, lane, y) for each 16 lanes of each output.
template <class W, class Done>
void product(const Linear &linear, long inputs, const float *x, long lanes, Range range, const void *next, Done &&done) {
    const long words = inputs / inputs_of<W>;
    const W *w = static_cast<const W *>(linear.weight);
    const auto finish = [&](long lane) {
        return [&, lane](long n, auto &tile) {
            for (auto &row : tile) {
                long l = lane;
                for (vec y : row) {
                    done(n, l, linear.bias ? y + linear.bias[n] : y);
                    l += LANES;
                }
                n++;
            }
        };
    };
    long lane = 0;
    const W *after = static_cast<const W *>(next);
    for (; lane + 4 * LANES <= lanes; lane += 4 * LANES)
        tiles<outputs(4), 4>(w, words, 1, words, x + lane, lanes, range.from, range.to, after, finish(lane));
    for (; lane + 2 * LANES <= lanes; lane += 2 * LANES)
        tiles<outputs(2), 2>(w, words, 1, words, x + lane, lanes, range.from, range.to, after, finish(lane));
    for (; lane < lanes; lane += LANES)
        tiles<outputs(1), 1>(w, words, 1, words, x + lane, lanes, range.from, range.to, after, finish(lane));
}

// A head of one row, out of [features][lanes]: normed if it has a norm, turned by its position (Su 2021, eq. 34).
void turned(float *to, const float *column, long lanes, long depth, Norm norm, const float *cosine, const float *sine) {
    float head[512];
    float scale = 1;
    float squares = 0;
    for (long c = 0; c < depth; c++) {
        head[c] = column[c * lanes];
        squares += head[c] * head[c];
    }
    if (norm.weight) {
        scale = 1 / __builtin_sqrtf(squares / float(depth) + norm.epsilon);
        for (long c = 0; c < depth; c++) head[c] *= scale * norm.weight[c];
    }
    const long half = depth / 2;
    for (long c = 0; c < half; c++) {
        to[c] = head[c] * cosine[c] - head[c + half] * sine[c];
        to[c + half] = head[c + half] * cosine[c + half] + head[c] * sine[c + half];
    }
}

// Attention of rows [from, to) of `members`, which share a prompt, and of the query heads that share key head `h`.
// A lane is one query: the heads of the first row, of the second and so on. To the prompt all lanes attend at once.
template <int B>
void attend(const Step &s, const Layer &layer, long prompt, long h, long from, long to, const float *heads, float *seen,
            long lanes, float *scratch) {
    const long D = s.depth, repeat = s.heads / s.shared, P = s.prompt_lengths[prompt], wide = B * LANES;
    const long used = (to - from) * repeat;
    float *across = scratch, *scores = across + D * wide, *out = scores + s.prompt_room * wide;
    float *q = scratch + Sizes(s).scores, *own = q + WIDEST * LANES * D;
    const long room = lanes_of(s.room);
    std::memset(across, 0, sizeof(float) * D * wide);
    for (long i = from; i < to; i++) {
        const long row = s.members[i];
        const float *cosine = s.cosine + row * D, *sine = s.sine + row * D;
        const long place = (row * s.shared + h) * s.room + s.lengths[row];
        turned(layer.keys + place * D, heads + (s.heads + h) * D * lanes + row, lanes, D, layer.k_norm, cosine, sine);
        for (long c = 0; c < D; c++)
            layer.values[place * D + c] = heads[((s.heads + s.shared + h) * D + c) * lanes + row];
        for (long r = 0; r < repeat; r++) {
            const long lane = (i - from) * repeat + r;
            turned(q + lane * D, heads + (h * repeat + r) * D * lanes + row, lanes, D, layer.q_norm, cosine, sine);
            for (long c = 0; c < D; c++) across[c * wide + lane] = q[lane * D + c] *= s.scale;
        }
    }
    const long held = (prompt * s.shared + h) * s.prompt_room * D;
    vec top[B];
    for (vec &t : top) t = all(-3e38f);
    tiles<outputs(B), B>(layer.prompt_keys + held, D, 1L, D, across, wide, 0, P, static_cast<const float *>(nullptr),
                         [&](long n, auto &tile) {
                             for (auto &row : tile) {
                                 for (int b = 0; b < B; b++) {
                                     store(scores + n * wide + b * LANES, row[b]);
                                     top[b] = larger(top[b], row[b]);
                                 }
                                 n++;
                             }
                         });
    float highest[B * LANES], total[B * LANES] = {};
    for (int b = 0; b < B; b++) store(highest + b * LANES, top[b]);
    for (long lane = 0; lane < used; lane++) {
        const long row = s.members[from + lane / repeat], n = s.lengths[row] + 1;
        const float *keys = layer.keys + (row * s.shared + h) * s.room * D;
        float *mine = own + lane * room;
        // After the last key: nothing, which is what an exponential makes of it.
        for (long l = n; l < lanes_of(n); l++) mine[l] = -3e38f;
        for (long l = 0; l < n; l++) {
            vec dot{};
            for (long c = 0; c < D; c += LANES) dot += load(q + lane * D + c) * load(keys + l * D + c);
            mine[l] = sum(dot);
        }
        vec most = all(highest[lane]);
        for (long l = 0; l < n; l += LANES) most = larger(most, load(mine + l));
        highest[lane] = largest(most);
        vec parts{};
        for (long l = 0; l < n; l += LANES) {
            const vec e = exponential(load(mine + l) - highest[lane]);
            parts += e;
            store(mine + l, e);
        }
        total[lane] = sum(parts);
    }
    for (int b = 0; b < B; b++) {
        const vec most = load(highest + b * LANES);
        vec parts = load(total + b * LANES);
        for (long p = 0; p < P; p++) {
            float *at = scores + p * wide + b * LANES;
            const vec e = exponential(load(at) - most);
            parts += e;
            store(at, e);
        }
        store(total + b * LANES, parts);
    }
    tiles<outputs(B), B>(layer.prompt_values + held, 1L, D, P, scores, wide, 0, D, static_cast<const float *>(nullptr),
                         [&](long n, auto &tile) {
                             for (auto &row : tile) {
                                 for (int b = 0; b < B; b++) store(out + n * wide + b * LANES, row[b]);
                                 n++;
                             }
                         });
    for (long lane = 0; lane < used; lane++) {
        const long row = s.members[from + lane / repeat], n = s.lengths[row] + 1;
        const float *values = layer.values + (row * s.shared + h) * s.room * D, *mine = own + lane * room;
        float *to_column = seen + (h * repeat + lane % repeat) * D * lanes + row;
        for (long c = 0; c < D; c += LANES) {
            vec y{};
            for (long l = 0; l < n; l++) y += mine[l] * load(values + l * D + c);
            for (long i = 0; i < LANES; i++)
                to_column[(c + i) * lanes] = (out[(c + i) * wide + lane] + y[i]) / total[lane];
        }
    }
}

template <class W>
void run(const Layer *layers, const Step &s) {
    const Sizes sizes(s);
    const long lanes = sizes.lanes, repeat = s.heads / s.shared;
    float *x = s.scratch, *heads = x + sizes.states, *seen = heads + sizes.heads, *hidden = seen + sizes.seen;
    // Rows that share one call of `attend`, and how many such calls there are for a prompt and a key head.
    const long together = WIDEST * LANES / repeat;
    long calls = 0;
    for (long g = 0; g < s.prompts; g++) {
        const long n = (s.first[g + 1] - s.first[g] + together - 1) / together;
        calls = calls > n ? calls : n;
    }
#pragma omp parallel num_threads(int(s.threads))
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float *input = s.scratch + sizes.shared() + thread * sizes.thread, *scratch = input + sizes.input;
        const auto mine = [&](long n) { return part(n, thread, threads); };
        const auto start = [&](const Linear &linear, long inputs) -> const void * {
            return static_cast<const char *>(linear.weight) + mine(linear.outputs).from * inputs * (s.rounded ? 2 : 4);
        };
#pragma omp for
        for (long k = 0; k < s.width; k++)
            for (long l = 0; l < lanes; l++) x[k * lanes + l] = l < s.rows ? s.x[l * s.width + k] : 0;
#pragma omp for
        for (long k = 0; k < s.heads * s.depth; k++)
            for (long l = s.rows; l < lanes; l++) seen[k * lanes + l] = 0;
        const auto onto_x = [&](long n, long l, vec y) { store(x + n * lanes + l, load(x + n * lanes + l) + y); };
        const auto into = [&](float *to) {
            return [to, lanes](long n, long l, vec y) { store(to + n * lanes + l, y); };
        };
        for (const Layer *layer = layers; layer < layers + s.layers; layer++) {
            normed(input, x, layer->before_attention, s.width, lanes);
            const float *in = rounded<W>(input, input, s.width, lanes);
            float *to = heads;
            for (int i = 0; i < 3; i++) {
                const Linear &linear = layer->qkv[i];
                const void *next = i < 2 ? start(layer->qkv[i + 1], s.width) : start(layer->out, s.heads * s.depth);
                product<W>(linear, s.width, in, lanes, mine(linear.outputs), next, into(to));
                to += linear.outputs * lanes;
            }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) collapse(3)
            for (long g = 0; g < s.prompts; g++)
                for (long h = 0; h < s.shared; h++)
                    for (long i = 0; i < calls; i++) {
                        const long from = s.first[g] + i * together;
                        const long until = from + together < s.first[g + 1] ? from + together : s.first[g + 1];
                        const long wide = (until - from) * repeat;
                        if (wide <= 0) continue;
                        const auto call = wide <= LANES ? attend<1> : wide <= 2 * LANES ? attend<2> : attend<4>;
                        call(s, *layer, g, h, from, until, heads, seen, lanes, scratch);
                    }
            in = rounded<W>(input, seen, s.heads * s.depth, lanes);
            product<W>(layer->out, s.heads * s.depth, in, lanes, mine(s.width), start(layer->gate, s.width), onto_x);
#pragma omp barrier
            normed(input, x, layer->before_mlp, s.width, lanes);
            in = rounded<W>(input, input, s.width, lanes);
            product<W>(layer->gate, s.width, in, lanes, mine(s.inner), start(layer->up, s.width), into(hidden));
            product<W>(layer->up, s.width, in, lanes, mine(s.inner), start(layer->down, s.inner),
                       [&](long n, long l, vec y) {
                           float *at = hidden + n * lanes + l;
                           const vec gate = load(at);
                           store(at, gate / (1.f + exponential(-gate)) * y);
                       });
#pragma omp barrier
            in = rounded<W>(input, hidden, s.inner, lanes);
            const void *next = layer + 1 < layers + s.layers ? start(layer[1].qkv[0], s.width) : nullptr;
            product<W>(layer->down, s.inner, in, lanes, mine(s.width), next, onto_x);
#pragma omp barrier
        }
        normed(input, x, s.last, s.width, lanes);
#pragma omp for
        for (long l = 0; l < s.rows; l++)
            for (long k = 0; k < s.width; k++) s.x[l * s.width + k] = input[k * lanes + l];
    }
}

// y [rows, outputs] = x [rows, inputs] Wᵀ + b.
template <class W>
void rows_product(const Linear &linear, long inputs, const float *x, long rows, float *y, float *scratch, int threads) {
    const long lanes = lanes_of(rows);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long k = 0; k < inputs; k++)
            for (long l = 0; l < lanes; l++) scratch[k * lanes + l] = l < rows ? x[l * inputs + k] : 0;
        float *copy = scratch + inputs * lanes * (1 + omp_get_thread_num());
        const float *in = rounded<W>(copy, scratch, inputs, lanes);
        const Range range = part(linear.outputs, omp_get_thread_num(), omp_get_num_threads());
        // 16 outputs of 16 rows, turned round together: a row takes them as one line of memory.
        float block[LANES][WIDEST * LANES];
        product<W>(linear, inputs, in, lanes, range, nullptr, [&](long n, long lane, vec v) {
            const long at = lane % (WIDEST * LANES), first = n / LANES * LANES;
            store(block[n - first] + at, v);
            if (n + 1 < first + LANES && n + 1 < range.to) return;
            for (long l = 0; l < LANES && lane + l < rows; l++)
                for (long i = first; i <= n; i++) y[(lane + l) * linear.outputs + i] = block[i - first][at + l];
        });
    }
}
}  // namespace

extern "C" {

int64_t tether_decode_scratch(const Step *step) {
    const Sizes sizes(*step);
    return sizes.shared() + step->threads * sizes.thread;
}

void tether_decode(const Layer *layers, const Step *step) {
#ifdef __AVX512BF16__
    if (step->rounded) return run<Pair>(layers, *step);
#endif
    run<float>(layers, *step);
}

// scratch: (1 + threads) * inputs * (rows, rounded up to 16) floats.
void tether_product(const Linear *linear, int64_t inputs, const float *x, int64_t rows, float *y, float *scratch,
                    int64_t threads, int64_t rounded) {
#ifdef __AVX512BF16__
    if (rounded) return rows_product<Pair>(*linear, inputs, x, rows, y, scratch, int(threads));
#endif
    rows_product<float>(*linear, inputs, x, rows, y, scratch, int(threads));
}
}
