// What lies around the products of the head: see head.py. Tensors are [rows][columns], columns a multiple of 16.
#include <cmath>

#include "kernels.h"

using namespace tether;

extern "C" {

// out[row] = log of the sum of exp x.
void tether_log_sums(const float *x, float *out, int64_t rows, int64_t columns, int64_t threads) {
    each_piece(rows, threads, [&](long first, long last) {
        for (long row = first; row < last; row++) {
            const float *from = x + row * columns;
            vec top = load(from), total{};
            for (long c = LANES; c < columns; c += LANES) top = larger(top, load(from + c));
            const float most = largest(top);
            for (long c = 0; c < columns; c += LANES) total += exponential(load(from + c) - most);
            out[row] = most + std::log(sum(total));
        }
    });
}

// grad = -toward[row] exp(logits - log_z[row]), and the same turned round. `grad` may be where the logits are.
void tether_pulled(const float *logits, const float *log_z, const float *toward, float *grad, float *turned,
                   int64_t rows, int64_t columns, int64_t threads) {
    each_piece(rows, threads, [&](long first, long last) {
        vec block[LANES];
        for (long at = first; at < last; at += LANES) {
            const long count = last - at < LANES ? last - at : LANES;
            for (long c = 0; c < columns; c += LANES) {
                for (long row = 0; row < count; row++) {
                    const long i = (at + row) * columns + c;
                    block[row] = exponential(load(logits + i) - log_z[at + row]) * -toward[at + row];
                    store(grad + i, block[row]);
                }
                store_turned(block, count, turned + c * rows + at, rows);
            }
        }
    });
}
}
