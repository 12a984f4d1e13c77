/* The table of spans per dtype: what kernels.pyx calls. One body per operation (span.h), included once per dtype. */
#ifndef FASTBN_SPANS_H
#define FASTBN_SPANS_H

#include <float.h>
#include <math.h>

#include "half.h"
#include "vectors.h"

/* Parameters of a channel, as the element-wise spans read them */
enum parameter { HI, SCALE, SHIFT, RSTD, DBETA_MEAN, DGAMMA_MEAN, PARAMETERS };

enum { TREE = 8, FAR = -1, OUT = -2, SPREAD_FROM = 1 << 20, LARGE_BLOCK = 8192 }; /* TREE values are added before float64: vectors of a run, or rows of
 * a column. FAR, OUT: an M2 that is not good enough, see block_moments. */

typedef struct {
    ptrdiff_t itemsize;      /* of the arrays */
    ptrdiff_t real_size;     /* of the parameters */
    void (*prepare)(ptrdiff_t c, const double *mean, const double *rstd, const double *gamma, const double *beta,
                    const double *dbeta_mean, const double *dgamma_mean, void *parameters, ptrdiff_t pitch);
    void (*expand)(void *parameters, ptrdiff_t pitch, int count, ptrdiff_t c, ptrdiff_t s, ptrdiff_t total);
    void (*guess_columns)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t c, double *work,
                          void *shifts);
    int (*improve_shifts)(ptrdiff_t c, const double *mean, const double *m2, double count, void *shifts);
    void (*moments_ncs)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len, ptrdiff_t ahead, double *mean,
                        double *m2);
    void (*moments_rc)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t c_stride, ptrdiff_t c, ptrdiff_t s,
                       ptrdiff_t k, const void *shifts, double *work, ptrdiff_t wide, double *mean, double *m2);
    void (*precise_columns)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t c, double *work,
                          void *shifts);
    int (*precise_improve)(ptrdiff_t c, const double *mean, const double *m2, double count, void *shifts);
    void (*precise_ncs)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len, ptrdiff_t ahead, double *mean,
                        double *m2);
    void (*precise_rc)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t c_stride, ptrdiff_t c, ptrdiff_t s,
                       ptrdiff_t k, const void *shifts, double *work, ptrdiff_t wide, double *mean, double *m2);
    void (*normalize)(const char *x, ptrdiff_t x_stride, const char *residual, ptrdiff_t residual_stride, char *y,
                      ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n, const void *parameters, ptrdiff_t pitch,
                      ptrdiff_t step, ptrdiff_t ahead, int varying, int relu, int stream);
    void (*reduce_ncs)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t x_stride,
                       ptrdiff_t len, ptrdiff_t dy_ahead, ptrdiff_t x_ahead, const void *parameters, double *sum,
                       double *product, int relu);
    void (*reduce_rc)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t dy_c_stride,
                      ptrdiff_t x_stride, ptrdiff_t x_c_stride, ptrdiff_t c, ptrdiff_t s, ptrdiff_t k,
                      const void *parameters, ptrdiff_t pitch, double *work, ptrdiff_t wide, double *sum,
                      double *product, int relu);
    double (*dgamma)(double sum, double product, double mean, double rstd);
    void (*backward)(const char *dy, ptrdiff_t dy_stride, const char *x, ptrdiff_t x_stride, char *dx,
                     ptrdiff_t dx_stride, ptrdiff_t rows, ptrdiff_t n, const void *parameters, ptrdiff_t pitch,
                     ptrdiff_t step, ptrdiff_t ahead, int varying, int relu, int frozen, int stream);
    void (*join)(const char *x, ptrdiff_t x_stride, const char *residual, ptrdiff_t residual_stride, char *y,
                 ptrdiff_t y_stride, uint8_t *bits, ptrdiff_t bit, ptrdiff_t bit_stride, ptrdiff_t rows, ptrdiff_t n,
                 const void *parameters, ptrdiff_t pitch, ptrdiff_t step, ptrdiff_t ahead, int varying, int stream);
    void (*mask)(const char *dy, ptrdiff_t dy_stride, const uint8_t *bits, ptrdiff_t bit, ptrdiff_t bit_stride,
                 char *out, ptrdiff_t out_stride, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t ahead);
} span_table;

/* Merge part b, of n_b values, into part a, of n_a, for each of c channels: Chan, Golub & LeVeque 1979. */
static void merge_moments(ptrdiff_t c, double n_a, double *restrict mean_a, double *restrict m2_a, double n_b,
                          const double *restrict mean_b, const double *restrict m2_b) {
    const double share = n_b / (n_a + n_b);
    for (ptrdiff_t i = 0; i < c; i++) {
        const double delta = mean_b[i] - mean_a[i];
        mean_a[i] += delta * share;
        m2_a[i] += m2_b[i] + delta * delta * (n_a * share);
    }
}

/* rstd = 1/√(var + eps) */
static void invert_deviations(ptrdiff_t c, double eps, const double *var, double *rstd) {
    for (ptrdiff_t i = 0; i < c; i++) rstd[i] = 1 / sqrt(var[i] + eps);
}

/* var = M2/count and rstd; var may be m2 */
static void finish_moments(ptrdiff_t c, double count, double eps, const double *m2, double *var, double *rstd) {
    for (ptrdiff_t i = 0; i < c; i++) var[i] = m2[i] / count;
    invert_deviations(c, eps, var, rstd);
}

#define SAME(v, ...) (v)

/* Arithmetic in float64: all of float64, and the statistics of Moments. The limit costs at most 3 of 53 bits. */
#define R double
#define RINT int64_t
#define RBITS uint64_t
#define WIDEN SAME
#define REAL_MAX DBL_MAX
#define SUBTRACT subtract_double
#define SHIFT_LIMIT 4
#define SAMPLE_TREES 1
#define SMALLEST_VAR 0
#define RANGE 1000

#define STATISTICS_ONLY
#define T float
#define TINT int32_t
#define SUFFIX float32_precise
#define TO_REAL(v, ...) widen_float(v)
#include "span.h"
#undef T
#undef TINT
#undef SUFFIX
#undef TO_REAL

#define T uint16_t
#define TINT int16_t
#define SUFFIX float16_precise
#define TO_REAL(v, ...) widen_float(FLOAT16_TO_REAL(v, vnarrow, vnarrow_bits))
#include "span.h"
#undef SUFFIX
#undef TO_REAL

#define SUFFIX bfloat16_precise
#define TO_REAL(v, ...) widen_float(BFLOAT16_TO_REAL(v, vnarrow, vnarrow_bits))
#include "span.h"
#undef T
#undef TINT
#undef SUFFIX
#undef TO_REAL
#undef STATISTICS_ONLY

#define T double
#define TINT int64_t
#define SUFFIX float64
#define TO_REAL SAME
#define TO_MEMORY SAME
#define PRECISE(name) name##_float64
#include "span.h"
#undef T
#undef TINT
#undef SUFFIX
#undef TO_REAL
#undef TO_MEMORY
#undef PRECISE

#undef R
#undef RINT
#undef RBITS
#undef WIDEN
#undef REAL_MAX
#undef SUBTRACT
#undef SHIFT_LIMIT
#undef SAMPLE_TREES
#undef SMALLEST_VAR
#undef RANGE

/* Arithmetic in float32. A variance of SMALLEST_VAR on, and factors of 2^RANGE, keep squares in its range. */
#define R float
#define RINT int32_t
#define RBITS uint32_t
#define WIDEN widen_float
#define REAL_MAX FLT_MAX
#define SUBTRACT subtract_float
#define SHIFT_LIMIT 0.2
#define SAMPLE_TREES 4
#define SMALLEST_VAR 1e-36
#define RANGE 120

#define T float
#define TINT int32_t
#define SUFFIX float32
#define TO_REAL SAME
#define TO_MEMORY SAME
#define PRECISE(name) name##_float32_precise
#include "span.h"
#undef T
#undef TINT
#undef SUFFIX
#undef TO_REAL
#undef TO_MEMORY
#undef PRECISE

#define T uint16_t
#define TINT int16_t
#define SUFFIX float16
#define TO_REAL FLOAT16_TO_REAL
#define TO_MEMORY REAL_TO_FLOAT16
#define PRECISE(name) name##_float16_precise
#include "span.h"
#undef SUFFIX
#undef TO_REAL
#undef TO_MEMORY
#undef PRECISE

#define SUFFIX bfloat16
#define TO_REAL BFLOAT16_TO_REAL
#define TO_MEMORY REAL_TO_BFLOAT16
#define PRECISE(name) name##_bfloat16_precise
#include "span.h"
#undef T
#undef TINT
#undef SUFFIX
#undef TO_REAL
#undef TO_MEMORY
#undef PRECISE

#undef R
#undef RINT
#undef RBITS
#undef WIDEN
#undef REAL_MAX
#undef SUBTRACT
#undef SHIFT_LIMIT
#undef SAMPLE_TREES
#undef SMALLEST_VAR
#undef RANGE

/* The table of a dtype: bfloat16 is the one of two bytes that NumPy does not know as its half. */
static const span_table *spans_of(ptrdiff_t itemsize, int is_numpy_half) {
    switch (itemsize) {
    case 2: return is_numpy_half ? &spans_float16 : &spans_bfloat16;
    case 4: return &spans_float32;
    default: return &spans_float64;
    }
}

#endif
