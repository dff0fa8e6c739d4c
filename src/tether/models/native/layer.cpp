// What lies between the matrix products of a layer, and its gradient: see layer.py. Tensors are [rows][features], rows
// and features next to each other, features a multiple of 16. Each number is one sum in an order that neither the
// number of threads nor the rows beside it change.
#include <cmath>

#include "kernels.h"

using namespace tether;

extern "C" {

// out = w x / r with r = sqrt(mean x² + epsilon); inverse[row] = 1 / r.
void tether_norm(const float *x, const float *w, float epsilon, float *out, float *inverse, int64_t rows, int64_t width,
                 int64_t threads) {
    each_piece(rows, threads, [&](long first, long last) {
        for (long row = first; row < last; row++) {
            const float *from = x + row * width;
            vec squares{};
            for (long c = 0; c < width; c += LANES) squares += load(from + c) * load(from + c);
            const float scale = 1 / std::sqrt(sum(squares) / float(width) + epsilon);
            inverse[row] = scale;
            for (long c = 0; c < width; c += LANES) store(out + row * width + c, load(from + c) * scale * load(w + c));
        }
    });
}

// of_x = beside + (w g - x̂ mean(w g x̂)) / r; of_w = Σ g x̂, in `partial` [pieces of rows][width] first.
void tether_norm_backward(const float *x, const float *w, const float *inverse, const float *grad, const float *beside,
                          float *of_x, float *of_w, float *partial, int64_t rows, int64_t width, int64_t threads) {
    each_piece(rows, threads, [&](long first, long last) {
        float *of_weight = partial + first / ROWS * width;
        std::memset(of_weight, 0, sizeof(float) * width);
        for (long row = first; row < last; row++) {
            const float *from = x + row * width, *g = grad + row * width;
            const float scale = inverse[row];
            vec pulled{};
            for (long c = 0; c < width; c += LANES) {
                const vec pull = load(g + c) * (load(from + c) * scale);
                store(of_weight + c, load(of_weight + c) + pull);
                pulled += pull * load(w + c);
            }
            const float mean = sum(pulled) / float(width);
            for (long c = 0; c < width; c += LANES) {
                const vec own = (load(g + c) * load(w + c) - load(from + c) * scale * mean) * scale;
                store(of_x + row * width + c, load(beside + row * width + c) + own);
            }
        }
    });
    const long pieces = (rows + ROWS - 1) / ROWS;
    for (long c = 0; c < width; c += LANES) {
        vec total{};
        for (long piece = 0; piece < pieces; piece++) total += load(partial + piece * width + c);
        store(of_w + c, total);
    }
}

// t [rows][heads][depth] in place: (a, b) -> (a cos - b sin, b cos + a sin) for the halves of each head (Su 2021);
// `back`: the transposed of that, which is a gradient's. cosine, sine [rows][depth].
void tether_rotate(float *t, const float *cosine, const float *sine, int64_t rows, int64_t heads, int64_t depth,
                   int64_t back, int64_t threads) {
    const long half = depth / 2;
    each_piece(rows, threads, [&](long first, long last) {
        for (long row = first; row < last; row++) {
            const float *cos = cosine + row * depth, *sin = sine + row * depth;
            for (long head = 0; head < heads; head++) {
                float *low = t + (row * heads + head) * depth, *high = low + half;
#pragma omp simd
                for (long c = 0; c < half; c++) {
                    const float a = low[c], b = high[c];
                    low[c] = back ? a * cos[c] + b * sin[c + half] : a * cos[c] - b * sin[c];
                    high[c] = back ? b * cos[c + half] - a * sin[c] : b * cos[c + half] + a * sin[c + half];
                }
            }
        }
    });
}

// h = silu(gate) up.
void tether_gate(const float *gate, const float *up, float *h, int64_t rows, int64_t width, int64_t threads) {
    each_piece(rows, threads, [&](long first, long last) {
        for (long i = first * width; i < last * width; i += LANES) {
            const vec g = load(gate + i);
            store(h + i, g / (1.f + exponential(-g)) * load(up + i));
        }
    });
}

// From of_h, the gradient of h = silu(gate) up: that of gate, [rows][width] and turned round [width][rows], that of up,
// turned round and (in of_h's place) not, and h itself.
void tether_gate_backward(const float *gate, const float *up, float *of_h, float *of_gate, float *h,
                          float *of_gate_turned, float *of_up_turned, int64_t rows, int64_t width, int64_t threads) {
    each_piece(rows, threads, [&](long first, long last) {
        vec of_gates[LANES], of_ups[LANES];
        for (long block = first; block < last; block += LANES) {
            const long count = last - block < LANES ? last - block : LANES;
            for (long c = 0; c < width; c += LANES) {
                for (long row = 0; row < count; row++) {
                    const long i = (block + row) * width + c;
                    const vec g = load(gate + i), u = load(up + i), pull = load(of_h + i);
                    const vec open = 1.f / (1.f + exponential(-g)), silu = g * open;
                    store(h + i, silu * u);
                    of_ups[row] = pull * silu;
                    of_gates[row] = pull * u * (open + silu * (1.f - open));
                    store(of_h + i, of_ups[row]);
                    store(of_gate + i, of_gates[row]);
                }
                store_turned(of_gates, count, of_gate_turned + c * rows + block, rows);
                store_turned(of_ups, count, of_up_turned + c * rows + block, rows);
            }
        }
    });
}

// [rows][width] -> [width][rows].
void tether_turn(const float *from, float *to, int64_t rows, int64_t width, int64_t threads) {
    each_piece(rows, threads, [&](long first, long last) {
        vec block[LANES];
        for (long at = first; at < last; at += LANES) {
            const long count = last - at < LANES ? last - at : LANES;
            for (long c = 0; c < width; c += LANES) {
                for (long row = 0; row < count; row++) block[row] = load(from + (at + row) * width + c);
                store_turned(block, count, to + c * rows + at, rows);
            }
        }
    });
}
}
