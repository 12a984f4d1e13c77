/* The table of spans per dtype: what kernels.pyx calls. One body per operation (span.h), included once per dtype. */
#ifndef FASTBN_SPANS_H
#define FASTBN_SPANS_H

#include <float.h>
#include <math.h>

#include "half.h"
#include "vectors.h"

/* Parameters of a channel, as the element-wise spans read them */
enum parameter { HI, LO, SCALE, SHIFT, RSTD, DBETA_MEAN, DGAMMA_MEAN, PARAMETERS };

enum { ROW_GROUP = 8 }; /* rows of layout rc that share one load and store of the column sums */

typedef struct {
    ptrdiff_t itemsize;      /* of the arrays */
    ptrdiff_t real_size;     /* of the parameters */
    void (*prepare)(ptrdiff_t c, const double *mean, const double *rstd, const double *gamma, const double *beta,
                    const double *dbeta_mean, const double *dgamma_mean, void *parameters, ptrdiff_t pitch);
    void (*expand)(void *parameters, ptrdiff_t pitch, int count, ptrdiff_t c, ptrdiff_t s, ptrdiff_t total);
    void (*moments_ncs)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len, ptrdiff_t ahead, double *mean,
                        double *m2);
    void (*moments_rc)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t c_stride, ptrdiff_t c, ptrdiff_t s,
                       ptrdiff_t k, double *work, ptrdiff_t wide, double *mean, double *m2);
    void (*normalize)(const char *x, ptrdiff_t x_stride, const char *residual, ptrdiff_t residual_stride, char *y,
                      ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n, const void *parameters, ptrdiff_t pitch,
                      ptrdiff_t ahead, int varying, int relu, int stream);
    void (*reduce_ncs)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t x_stride,
                       ptrdiff_t len, ptrdiff_t dy_ahead, ptrdiff_t x_ahead, double mean, const void *parameters,
                       double *sum, double *product, int relu);
    void (*reduce_rc)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t dy_c_stride,
                      ptrdiff_t x_stride, ptrdiff_t x_c_stride, ptrdiff_t c, ptrdiff_t s, ptrdiff_t k,
                      const double *mean, const void *parameters, ptrdiff_t pitch, double *work, ptrdiff_t wide,
                      double *sum, double *product, int relu);
    void (*backward)(const char *dy, ptrdiff_t dy_stride, const char *x, ptrdiff_t x_stride, char *dx,
                     ptrdiff_t dx_stride, ptrdiff_t rows, ptrdiff_t n, const void *parameters, ptrdiff_t pitch,
                     ptrdiff_t ahead, int varying, int relu, int frozen, int stream);
    void (*join)(const char *x, ptrdiff_t x_stride, const char *residual, ptrdiff_t residual_stride, char *y,
                 ptrdiff_t y_stride, uint8_t *bits, ptrdiff_t bit, ptrdiff_t bit_stride, ptrdiff_t rows, ptrdiff_t n,
                 const void *parameters, ptrdiff_t pitch, ptrdiff_t ahead, int varying, int stream);
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

/* Mean and M2 of c channels from the sums of their differences from K, which has s columns each. Where too much would
 * be lost, M2 is -1; returns whether that happened. */
INLINE int block_moments(ptrdiff_t c, const ptrdiff_t s, double count, double limit, const double *restrict K,
                         const double *restrict s1, const double *restrict s2, double *restrict mean,
                         double *restrict m2) {
    int again = 0;
    for (ptrdiff_t i = 0; i < c; i++) {
        const double shift = s1[i] / count, lost = s1[i] * shift, m = s2[i] < lost ? 0 : s2[i] - lost;
        const int bad = lost > limit * m;
        mean[i] = K[i * s] + shift;
        m2[i] = bad ? -1 : m;
        again |= bad;
    }
    return again;
}

/* The same for the channels that were marked, from a second pass; never asks for a third */
static int repeat_moments(ptrdiff_t c, ptrdiff_t s, double count, const double *K, const double *s1, const double *s2,
                          double *mean, double *m2) {
    for (ptrdiff_t i = 0; i < c; i++) {
        if (!(m2[i] < 0)) continue;
        block_moments(1, 1, count, DBL_MAX, K + i * s, s1 + i, s2 + i, mean + i, m2 + i);
    }
    return 0;
}

#define SAME(v, ...) (v)

/* Arithmetic in float32. The limit costs at most 17 of float64's 53 bits and leaves 12 more than float32 has. */
#define R float
#define RINT int32_t
#define RBITS uint32_t
#define WIDEN widen_float
#define REAL_MAX FLT_MAX
#define SHIFT_LIMIT 65536

#define T float
#define TINT int32_t
#define SUFFIX float32
#define TO_REAL SAME
#define TO_MEMORY SAME
#include "span.h"
#undef T
#undef TINT
#undef SUFFIX
#undef TO_REAL
#undef TO_MEMORY

#define T uint16_t
#define TINT int16_t
#define SUFFIX float16
#define TO_REAL FLOAT16_TO_REAL
#define TO_MEMORY REAL_TO_FLOAT16
#include "span.h"
#undef SUFFIX
#undef TO_REAL
#undef TO_MEMORY

#define SUFFIX bfloat16
#define TO_REAL BFLOAT16_TO_REAL
#define TO_MEMORY REAL_TO_BFLOAT16
#include "span.h"
#undef T
#undef TINT
#undef SUFFIX
#undef TO_REAL
#undef TO_MEMORY

#undef R
#undef RINT
#undef RBITS
#undef WIDEN
#undef REAL_MAX
#undef SHIFT_LIMIT

/* Arithmetic in float64. The limit costs at most 3 of 53 bits. */
#define R double
#define RINT int64_t
#define RBITS uint64_t
#define WIDEN SAME
#define REAL_MAX DBL_MAX
#define SHIFT_LIMIT 4

#define T double
#define TINT int64_t
#define SUFFIX float64
#define TO_REAL SAME
#define TO_MEMORY SAME
#include "span.h"

#undef R
#undef RINT
#undef RBITS
#undef WIDEN
#undef REAL_MAX
#undef SHIFT_LIMIT
#undef T
#undef TINT
#undef SUFFIX
#undef TO_REAL
#undef TO_MEMORY

/* The table of a dtype: bfloat16 is the one of two bytes that NumPy does not know as its half. */
static const span_table *spans_of(ptrdiff_t itemsize, int is_numpy_half) {
    switch (itemsize) {
    case 2: return is_numpy_half ? &spans_float16 : &spans_bfloat16;
    case 4: return &spans_float32;
    default: return &spans_float64;
    }
}

#endif
