// One token of a few rows through the trunk of a Llama-shaped network: see decoder.py, which lays out these structures.
#include <omp.h>

#include "product.h"

using namespace tether;

extern "C" {

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

// A head of one row: normed if it has a norm, turned by its position (Su 2021, eq. 34), times `scale`.
void turned(float *to, const float *head, long depth, Norm norm, const float *cosine, const float *sine, float scale) {
    float own[512];
    if (norm.weight) {
        float squares = 0;
        for (long c = 0; c < depth; c++) squares += head[c] * head[c];
        const float inverse = 1 / __builtin_sqrtf(squares / float(depth) + norm.epsilon);
        for (long c = 0; c < depth; c++) own[c] = head[c] * inverse * norm.weight[c];
        head = own;
    }
    const long half = depth / 2;
    for (long c = 0; c < half; c++) {
        to[c] = (head[c] * cosine[c] - head[c + half] * sine[c]) * scale;
        to[c + half] = (head[c + half] * cosine[c + half] + head[c] * sine[c + half]) * scale;
    }
}

// Have `count` numbers on their way into the cache: rows are short, and lie where no prefetcher of the processor looks.
void fetch(const float *from, long count) {
    for (long i = 0; i < count; i += LANES) __builtin_prefetch(from + i);
}

// scores[l] = q · keys[l] of n keys.
void own_scores(float *scores, const float *q, const float *keys, long n, long depth) {
    for (long l = 0; l < n; l += LANES) {
        vec dots[LANES], turned[LANES], total{};
        for (long i = 0; i < LANES && l + i < n; i++) {
            dots[i] = vec{};
            for (long c = 0; c < depth; c += LANES) dots[i] += load(q + c) * load(keys + (l + i) * depth + c);
        }
        transpose(reinterpret_cast<const float *>(dots), LANES, reinterpret_cast<float *>(turned), LANES);
        for (vec part : turned) total += part;
        store(scores + l, total);
    }
}

// Attention of rows [from, to) of `members`, which share a prompt, and of the query heads that share key head `h`.
// A lane is one query: the heads of the first row, of the second and so on. To the prompt all lanes attend at once.
// `heads` [rows][features]: what the rows' queries, keys and values are made of; `seen` [rows][features].
template <int B>
void attend(const Step &s, const Layer &layer, long prompt, long h, long from, long to, const float *heads, float *seen,
            float *scratch) {
    const long D = s.depth, repeat = s.heads / s.shared, P = s.prompt_lengths[prompt], wide = B * LANES;
    const long used = (to - from) * repeat, room = lanes_of(s.room), features = (s.heads + 2 * s.shared) * D;
    float *across = scratch, *scores = across + D * wide, *out = scores + s.prompt_room * wide;
    float *q = scratch + Sizes(s).scores, *own = q + WIDEST * LANES * D;
    const auto held_at = [&](long i) { return (s.members[i] * s.shared + h) * s.room * D; };
    const auto tokens = [&](long i) { return s.lengths[s.members[i]] + 1; };
    for (long i = from; i < to; i++) {
        const float *mine = heads + s.members[i] * features;
        fetch(mine + h * repeat * D, repeat * D);
        fetch(mine + (s.heads + h) * D, D);
        fetch(mine + (s.heads + s.shared + h) * D, D);
        fetch(layer.keys + held_at(i) + (tokens(i) - 1) * D, D);
        fetch(layer.values + held_at(i) + (tokens(i) - 1) * D, D);
    }
    for (long i = from; i < to; i++) {
        const long row = s.members[i], place = held_at(i) + s.lengths[row] * D;
        const float *cosine = s.cosine + row * D, *sine = s.sine + row * D, *mine = heads + row * features;
        turned(layer.keys + place, mine + (s.heads + h) * D, D, layer.k_norm, cosine, sine, 1);
        std::memcpy(layer.values + place, mine + (s.heads + s.shared + h) * D, sizeof(float) * D);
        for (long r = 0; r < repeat; r++)
            turned(q + ((i - from) * repeat + r) * D, mine + (h * repeat + r) * D, D, layer.q_norm, cosine, sine,
                   s.scale);
    }
    std::memset(q + used * D, 0, sizeof(float) * (wide - used) * D);
    for (long l = 0; l < wide; l += LANES)
        for (long c = 0; c < D; c += LANES) transpose(q + l * D + c, D, across + c * wide + l, wide);
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
        const long i = from + lane / repeat, n = tokens(i);
        float *mine = own + lane * room;
        if (lane % repeat == 0 && i + 1 < to) fetch(layer.keys + held_at(i + 1), tokens(i + 1) * D);
        own_scores(mine, q + lane * D, layer.keys + held_at(i), n, D);
        // After the last key: nothing, which is what an exponential makes of it.
        for (long l = n; l < lanes_of(n); l++) mine[l] = -3e38f;
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
                                 for (int b = 0; b < B; b++)
                                     store(out + n * wide + b * LANES, row[b] / load(total + b * LANES));
                                 n++;
                             }
                         });
    // The queries are not needed any more: what a row has seen of the prompt, and then of itself as well.
    for (long l = 0; l < wide; l += LANES)
        for (long c = 0; c < D; c += LANES) transpose(out + c * wide + l, wide, q + l * D + c, D);
    for (long i = from; i < to; i++) {
        const long lane = (i - from) * repeat;
        const float *values = layer.values + held_at(i), *of_prompt = q + lane * D;
        float *mine = seen + (s.members[i] * s.heads + h * repeat) * D;
        if (i + 1 < to) fetch(layer.values + held_at(i + 1), tokens(i + 1) * D);
        columns<float>(own + lane * room, room, 1, tokens(i), values, D, {0, repeat}, nullptr,
                       [&](long r, long c, vec y) {
                           store(mine + r * D + c, load(of_prompt + r * D + c) + y / total[lane + r]);
                       });
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
        // Rows that there are not.
#pragma omp single
        std::memset(seen + s.rows * s.heads * s.depth, 0, sizeof(float) * (lanes - s.rows) * s.heads * s.depth);
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
                const Range range = mine(linear.outputs);
                AsRows rows{to, (s.heads + 2 * s.shared) * s.depth, s.rows, range.to};
                product<W>(linear, s.width, in, lanes, range, next, rows);
                to += linear.outputs;
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
                        call(s, *layer, g, h, from, until, heads, seen, scratch);
                    }
            for (long l = 0; l < lanes; l += LANES)
                for (long k = 0; k < s.heads * s.depth; k += LANES)
                    transpose(seen + l * s.heads * s.depth + k, s.heads * s.depth, input + k * lanes + l, lanes);
            in = rounded<W>(input, input, s.heads * s.depth, lanes);
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
}
