// What lies around the products of the head: see head.py. Tensors are [rows][columns], columns a multiple of 16.
#include <cmath>

#include "kernels.h"

using namespace tether;

// A log-probability that a product with the probability leaves finite: of -inf it would make a NaN. A NaN stays one.
static vec bounded(vec log_p) { return log_p < all(-1e4f) ? all(-1e4f) : log_p; }

extern "C" {

// sums[row] = log of the sum of exp x; entropies[row] that of the softmax of x (null: not wanted).
void tether_log_sums(const float *x, float *sums, float *entropies, int64_t rows, int64_t columns, int64_t threads) {
    each_piece(rows, threads, [&](long first, long last) {
        for (long row = first; row < last; row++) {
            const float *from = x + row * columns;
            vec top = load(from), total{}, below{};
            for (long c = LANES; c < columns; c += LANES) top = larger(top, load(from + c));
            const float most = largest(top);
            for (long c = 0; c < columns; c += LANES) {
                const vec under = load(from + c) - most, weight = exponential(under);
                total += weight;
                below += weight * bounded(under);
            }
            const float z = sum(total), log_z = std::log(z);
            sums[row] = most + log_z;
            if (entropies) entropies[row] = log_z - sum(below) / z;
        }
    });
}

// grad = p (constant[row] + slope[row] log p) with log p = logits - log_z[row], and the same turned round. `grad` may be
// where the logits are; `slope` null: zero.
void tether_pulled(const float *logits, const float *log_z, const float *constant, const float *slope, float *grad,
                   float *turned, int64_t rows, int64_t columns, int64_t threads) {
    each_piece(rows, threads, [&](long first, long last) {
        vec block[LANES];
        for (long at = first; at < last; at += LANES) {
            const long count = last - at < LANES ? last - at : LANES;
            for (long c = 0; c < columns; c += LANES) {
                for (long row = 0; row < count; row++) {
                    const long i = (at + row) * columns + c;
                    const float steep = slope ? slope[at + row] : 0;
                    const vec log_p = load(logits + i) - log_z[at + row];
                    block[row] = exponential(log_p) * (bounded(log_p) * steep + constant[at + row]);
                    store(grad + i, block[row]);
                }
                store_turned(block, count, turned + c * rows + at, rows);
            }
        }
    });
}
}
