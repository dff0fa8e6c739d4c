// The product of a layer with a few rows, laid out as the caller has them: the head's, see decoder.py.
#include "product.h"

using namespace tether;

namespace {

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
        AsRows to{y, linear.outputs, rows, range.to};
        product<W>(linear, inputs, in, lanes, range, nullptr, to);
    }
}
}  // namespace

extern "C" {

// scratch: (1 + threads) * inputs * (rows, rounded up to 16) floats.
void tether_product(const Linear *linear, int64_t inputs, const float *x, int64_t rows, float *y, float *scratch,
                    int64_t threads, int64_t rounded) {
#ifdef __AVX512BF16__
    if (rounded) return rows_product<Pair>(*linear, inputs, x, rows, y, scratch, int(threads));
#endif
    rows_product<float>(*linear, inputs, x, rows, y, scratch, int(threads));
}
}
