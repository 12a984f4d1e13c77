/* Serial loops over spans of memory: no Python, no threads, no allocation.
 *
 * Included by spans.h once per dtype, with
 *   T        type in memory                        SUFFIX   ends every name
 *   R        type of the arithmetic                TO_REAL   vector of T -> vector of R, TO_MEMORY back
 *   RINT, RBITS  signed and unsigned integer of R's size, TINT  signed of T's
 *   REAL_MAX largest finite R                      SUBTRACT  of vectors of R
 *   SHIFT_LIMIT, SMALLEST_VAR, RANGE (see block_moments and range)
 *   WIDEN    vector of R -> vector of float64      PRECISE(name)  the function for statistics in float64
 * and, where R serves statistics only, STATISTICS_ONLY.
 * Element-wise results are computed in R, sums in R for TREE values and in float64 from there on.
 * A span along one channel (layout ncs) has one set of parameters; a span across channels (layout rc) has one
 * per element: `varying` says which, and is a constant wherever it is used, as `relu`, `stream` … are.
 *
 * Parameters of a channel stand `pitch` elements apart (see enum parameter).
 */
#define JOIN_(name, suffix) name##_##suffix
#define JOIN(name, suffix) JOIN_(name, suffix)
#define FN(name) JOIN(name, SUFFIX)

typedef R FN(vreal) __attribute__((vector_size(VECTOR_BYTES)));
typedef RINT FN(vmask) __attribute__((vector_size(VECTOR_BYTES)));
typedef R FN(vpart) __attribute__((vector_size(WIDE * sizeof(R)))); /* as many values as a float64 register */
typedef RBITS FN(vbits) __attribute__((vector_size(VECTOR_BYTES)));
typedef T FN(vmem) __attribute__((vector_size(VECTOR_BYTES / sizeof(R) * sizeof(T))));
typedef TINT FN(vmemint) __attribute__((vector_size(VECTOR_BYTES / sizeof(R) * sizeof(T))));
#define VREAL FN(vreal)
#define VPART FN(vpart)
#define W ((ptrdiff_t)(VECTOR_BYTES / sizeof(R)))

INLINE VREAL FN(load)(const T *p) {
    FN(vmem) v;
    memcpy(&v, p, sizeof v);
    return TO_REAL(v, VREAL, FN(vbits));
}
INLINE VREAL FN(parameter)(const R *p, ptrdiff_t i, const int varying) {
    VREAL v;
    if (!varying) return p[0] - (VREAL){0};
    memcpy(&v, p + i, sizeof v);
    return v;
}
INLINE VREAL FN(load_few)(const T *p, ptrdiff_t n) { /* n values, fewer than W, and zeros */
    T b[VECTOR_BYTES / sizeof(R)] = {0};
    memcpy(b, p, n * sizeof(T));
    return FN(load)(b);
}
INLINE double FN(first)(const T *p) { return FN(load_few)(p, 1)[0]; }

/* KEEP + r keeps the last r of LANES values, KEEP + 2·LANES - r the first. */
static const RINT FN(KEEP)[3 * LANES] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                         -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
INLINE VREAL FN(keep)(VREAL v, const RINT *mask) {
    FN(vmask) m;
    memcpy(&m, mask, sizeof m);
    return (VREAL)((FN(vmask))v & m);
}

/* The last r = len % LANES values of a row as LANES values ending with them (what comes before is masked away). */
INLINE const T *FN(tail)(const T *row, ptrdiff_t len, ptrdiff_t r, T *buffer) {
    if (len >= LANES) return row + len - LANES;
    memset(buffer, 0, (LANES - r) * sizeof(T));
    memcpy(buffer + LANES - r, row, r * sizeof(T));
    return buffer;
}

#ifndef STATISTICS_ONLY
INLINE void FN(store)(T *p, VREAL v, const int stream) {
    const FN(vmem) m = TO_MEMORY(v, FN(vmem), VREAL, FN(vbits));
    if (stream) stream_bytes(p, &m, sizeof m);
    else memcpy(p, &m, sizeof m);
}

/* Elements of a row at y before the first cache line that begins in it, n at most */
INLINE ptrdiff_t FN(to_line)(const T *y, ptrdiff_t n) {
    const ptrdiff_t before = (ptrdiff_t)(-(uintptr_t)y % LINE / sizeof(T));
    return before < n ? before : n;
}

/* ---- parameters ------------------------------------------------------------------------------------------ */

/* What R leaves of a mean; nothing of an infinite one: no NaN for finite x */
INLINE double FN(rest)(double mean) {
    const R hi = (R)mean;
    return hi - hi == 0 ? mean - (double)hi : 0;
}

/* A number that R cannot hold becomes the largest one: 0·∞ would make NaN of a constant channel without eps. */
INLINE R FN(finite)(double v) {
    return (R)(v > REAL_MAX && v <= DBL_MAX ? REAL_MAX : v < -REAL_MAX && v >= -DBL_MAX ? -REAL_MAX : v);
}

/* y = (x - hi)·scale + shift, where hi is the mean in R, and what that leaves, lo, is part of the shift: x - hi is exact
 * near the mean, so |mean| ≫ std costs nothing; hi is the R closest to the mean, so no x is closer, and lo·rstd ≤ 1. */
static void FN(prepare)(ptrdiff_t c, const double *mean, const double *rstd, const double *gamma, const double *beta,
                        const double *dbeta_mean, const double *dgamma_mean, void *parameters, ptrdiff_t pitch) {
    R *p = (R *)parameters;
    for (ptrdiff_t i = 0; i < c; i++) p[HI * pitch + i] = (R)mean[i];
    for (ptrdiff_t i = 0; i < c; i++) p[RSTD * pitch + i] = FN(finite)(rstd[i]);
    for (ptrdiff_t i = 0; i < c; i++) p[SCALE * pitch + i] = FN(finite)(gamma ? gamma[i] * rstd[i] : rstd[i]);
    for (ptrdiff_t i = 0; i < c; i++) {
        const double lo = FN(rest)(mean[i]);
        p[SHIFT * pitch + i] = (R)((beta ? beta[i] : 0) - lo * p[SCALE * pitch + i]);
    }
    if (dbeta_mean)
        for (ptrdiff_t i = 0; i < c; i++) {
            const double lo = FN(rest)(mean[i]);
            p[DBETA_MEAN * pitch + i] = (R)(dbeta_mean[i] - lo * p[RSTD * pitch + i] * dgamma_mean[i]);
            p[DGAMMA_MEAN * pitch + i] = (R)dgamma_mean[i];
        }
}

/* dγ from the reduction, whose x̂ has the mean in R */
static double FN(dgamma)(double sum, double product, double mean, double rstd) {
    return product - FN(rest)(mean) * FN(finite)(rstd) * sum;
}

/* Give each of the first `count` parameters to c channels' s columns each, and repeat the c·s columns up to `total`. */
static void FN(expand)(void *parameters, ptrdiff_t pitch, int count, ptrdiff_t c, ptrdiff_t s, ptrdiff_t total) {
    for (int which = 0; which < count; which++) {
        R *p = (R *)parameters + which * pitch;
        if (s > 1)
            for (ptrdiff_t ch = c - 1; ch >= 0; ch--) {
                const R value = p[ch];
                for (ptrdiff_t j = 0; j < s; j++) p[ch * s + j] = value;
            }
        for (ptrdiff_t i = c * s; i < total; i++) p[i] = p[i - c * s];
    }
}

#endif

/* ---- sums ------------------------------------------------------------------------------------------------
 *
 * TREE vectors of R are added as a tree, the result in float64, and every FLUSH of those to the sum of the block: the
 * error grows with the levels, not with the length. In float32 that leaves 3 roundings of a sum of 8 values.
 */

INLINE void FN(add_tree)(VREAL *v, const int count) { /* v[0] = the sum of `count` vectors, a power of two */
#pragma GCC unroll 4
    for (int width = count / 2; width > 0; width /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) v[i] += v[i + width];
}
INLINE vdouble FN(widen)(VREAL v, const int q) { /* the q-th float64 register of a vector */
    VPART part;
    memcpy(&part, (const char *)&v + q * sizeof part, sizeof part);
    return WIDEN(part);
}
INLINE void FN(accumulate)(vdouble *sums, VREAL v) {
#pragma GCC unroll 8
    for (int q = 0; q < W / WIDE; q++) sums[q] += FN(widen)(v, q);
}

INLINE void FN(add_to_columns)(double *sums, VREAL v) {
#pragma GCC unroll 8
    for (int q = 0; q < W / WIDE; q++) store_wide(sums + q * WIDE, load_wide(sums + q * WIDE) + FN(widen)(v, q));
}

/* ---- statistics ------------------------------------------------------------------------------------------ */

/* x - K, times a power of two where squares would leave R's range */
INLINE VREAL FN(deviation)(VREAL x, VREAL K, VREAL factor, const int scaled) {
    const VREAL d = SUBTRACT(x, K);
    return scaled ? d * factor : d;
}

/* Σ(x - K) and Σ(x - K)² over rows of one channel, LANES partial sums across the rows. `ahead`: bytes to what is wanted
 * next, fetched into L2 meanwhile; 0 for nothing. */
INLINE void FN(shifted_sums)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len, ptrdiff_t ahead, R K,
                             R factor, double *sums, const int scaled) {
    vdouble s1[PARTS] = {{0}}, s2[PARTS] = {{0}}, t1[PARTS] = {{0}}, t2[PARTS] = {{0}};
    const VREAL k = K - (VREAL){0}, f = factor - (VREAL){0};
    const ptrdiff_t r = len % LANES;
    T buffer[LANES];
    int added = 0;
    for (ptrdiff_t row = 0; row < rows; row++) {
        const T *p = (const T *)(x + row * stride);
        ptrdiff_t i = 0;
        for (; i + TREE * LANES <= len; i += TREE * LANES) {
            if (ahead)
                for (ptrdiff_t line = 0; line < TREE * LANES; line += LINE / (ptrdiff_t)sizeof(T))
                    __builtin_prefetch((const char *)(p + i + line) + ahead, 0, 2);
#pragma GCC unroll 8
            for (int v = 0; v < LANES / W; v++) {
                VREAL d[TREE], e[TREE];
#pragma GCC unroll 8
                for (int g = 0; g < TREE; g++) {
                    d[g] = FN(deviation)(FN(load)(p + i + g * LANES + v * W), k, f, scaled);
                    e[g] = d[g] * d[g];
                }
                FN(add_tree)(d, TREE);
                FN(add_tree)(e, TREE);
                FN(accumulate)(t1 + v * (W / WIDE), d[0]);
                FN(accumulate)(t2 + v * (W / WIDE), e[0]);
            }
            if (++added == FLUSH) added = flush_sums(s1, t1) + flush_sums(s2, t2);
        }
        for (; i < len; i += LANES) {
            const int whole = i + LANES <= len;
            const T *from = whole ? p + i : FN(tail)(p, len, r, buffer);
#pragma GCC unroll 8
            for (int v = 0; v < LANES / W; v++) {
                VREAL d = FN(deviation)(FN(load)(from + v * W), k, f, scaled);
                if (!whole) d = FN(keep)(d, FN(KEEP) + r + v * W);
                FN(accumulate)(t1 + v * (W / WIDE), d);
                FN(accumulate)(t2 + v * (W / WIDE), d * d);
            }
        }
        if ((added += TREE) >= FLUSH) added = flush_sums(s1, t1) + flush_sums(s2, t2); /* a row may end with TREE more */
    }
    flush_sums(s1, t1);
    flush_sums(s2, t2);
    sums[0] = sum_lanes(s1);
    sums[1] = sum_lanes(s2);
}

/* Where to shift to, from some values: 0 where the mean is small against the standard deviation, for then x - 0 is exact,
 * else the mean in R. Values are added as a tree and in float64, so the mean of equal ones is exact. */
INLINE R FN(shift)(double mean, double square_mean) {
    const int small = mean * mean <= SHIFT_LIMIT / (1 + SHIFT_LIMIT) * square_mean;
    return (R)((small & (square_mean > 0) & (square_mean <= DBL_MAX)) ? 0 : mean);
}

/* From up to LANES neighbours at TREE places all over the rows of a channel, at SAMPLE_TREES as many in a large block */
INLINE R FN(guess)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len) {
    const ptrdiff_t take = len >= 16 ? 16 : len >= 8 ? 8 : len >= 4 ? 4 : len >= 2 ? 2 : 1, chunks = len / take;
    const ptrdiff_t trees = rows * len >= LARGE_BLOCK ? SAMPLE_TREES : 1, places = trees * TREE;
    vdouble sum[PARTS] = {{0}}, squares[PARTS] = {{0}};
    for (ptrdiff_t t = 0; t < trees; t++)
#pragma GCC unroll 8
        for (int v = 0; v < LANES / W; v++) {
            VREAL d[TREE];
#pragma GCC unroll 8
            for (int g = 0; g < TREE; g++) {
                const ptrdiff_t k = t * TREE + g, row = k * rows / places, chunk = k * 5 % places * chunks / places;
                const T *p = (const T *)(x + row * stride) + chunk * take;
                const ptrdiff_t left = take - v * W;
                d[g] = (left >= W ? FN(load)(p + v * W) : left > 0 ? FN(load_few)(p + v * W, left) : (VREAL){0}) / (R)TREE;
            }
            FN(add_tree)(d, TREE);
            FN(accumulate)(sum + v * (W / WIDE), d[0]);
            for (int q = 0; q < W / WIDE; q++) {
                const vdouble wide = FN(widen)(d[0], q);
                squares[v * (W / WIDE) + q] += wide * wide;
            }
        }
    const double count = (double)(take * trees);
    for (int q = 0; q < PARTS; q++) sum[q] /= count; /* before they are added: a constant may be the largest number */
    return FN(shift)(sum_lanes(sum), sum_lanes(squares) / count);
}
/* The same for each column of an array, from rows all over it, or, where it is small and parts of it are in other cores'
 * caches, the first ones. work: 2·(c + LANES) */
static void FN(guess_columns)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t c, double *restrict work,
                              void *shifts) {
    const ptrdiff_t most = SAMPLE_TREES == 1 ? 1 : 4 * SAMPLE_TREES, wanted = rows / (rows <= 8 * TREE ? TREE : 4 * TREE);
    const ptrdiff_t trees = wanted < 1 ? 1 : wanted < most ? wanted : most;
    const ptrdiff_t step = (rows * c > SPREAD_FROM || rows < TREE ? rows / (TREE * trees) : 1) * stride;
    const double share = 1 / (double)trees;
    double *restrict sums = work, *restrict squares = work + c + LANES;
    R *restrict K = (R *)shifts;
    memset(work, 0, 2 * (c + LANES) * sizeof(double));
    for (ptrdiff_t t = 0; t < trees; t++)
        for (ptrdiff_t j = 0; j < c; j += W) {
            VREAL d[TREE];
#pragma GCC unroll 8
            for (int g = 0; g < TREE; g++) {
                const T *p = (const T *)(x + (t * TREE + g) * step) + j;
                d[g] = (c - j < W ? FN(load_few)(p, c - j) : FN(load)(p)) / (R)TREE;
            }
            FN(add_tree)(d, TREE);
            FN(add_to_columns)(sums + j, d[0]);
            for (int q = 0; q < W / WIDE; q++) {
                const vdouble wide = FN(widen)(d[0], q);
                store_wide(squares + j + q * WIDE, load_wide(squares + j + q * WIDE) + wide * wide);
            }
        }
    for (ptrdiff_t i = 0; i < c; i++) K[i] = FN(shift)(sums[i] * share, squares[i] * share);
}

/* Shift to the mean where it turned out too far from the shift; returns whether it did anywhere. */
static int FN(improve_shifts)(ptrdiff_t c, const double *mean, const double *m2, double count, void *shifts) {
    R *K = (R *)shifts;
    int far = 0;
    for (ptrdiff_t i = 0; i < c; i++) {
        const double d = mean[i] - K[i];
        const R better = (R)mean[i];
        if (!(d * d > SHIFT_LIMIT * (m2[i] / count)) || better == K[i] || better - better != 0) continue;
        K[i] = better;
        far = 1;
    }
    return far;
}

/* A power of two that brings the largest of some bits of |x - K| near 1; 0 if there is no other value than K */
INLINE R FN(factor)(RBITS most) {
    R value;
    int exponent;
    memcpy(&value, &most, sizeof value);
    if (!(value > 0 && value <= REAL_MAX)) return value == 0 ? 0 : 1;
    frexp((double)value, &exponent);
    return (R)ldexp(1, -exponent > RANGE ? RANGE : -exponent < -RANGE ? -RANGE : -exponent);
}

/* The larger of two vectors of bits without their sign */
INLINE FN(vbits) FN(larger)(FN(vbits) top, VREAL d) {
    const FN(vbits) size = (FN(vbits))d << 1 >> 1, above = (FN(vbits))(size > top);
    return (size & above) | (top & ~above);
}

/* The factor of a channel, rows of len values */
static R FN(range)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len, R K) {
    const VREAL k = K - (VREAL){0};
    FN(vbits) top = {0};
    RBITS most = 0;
    for (ptrdiff_t row = 0; row < rows; row++)
        for (ptrdiff_t i = 0; i < len; i += W) {
            const T *p = (const T *)(x + row * stride) + i;
            const ptrdiff_t left = len - i;
            VREAL d = (left < W ? FN(load_few)(p, left) : FN(load)(p)) - k;
            if (left < W) d = FN(keep)(d, FN(KEEP) + 2 * LANES - left);
            top = FN(larger)(top, d);
        }
    for (int i = 0; i < W; i++) most = top[i] > most ? top[i] : most;
    return FN(factor)(most);
}

/* The factors of columns */
static void FN(range_columns)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t width, const R *K, R *factors) {
    for (ptrdiff_t j = 0; j < width; j += W) {
        const VREAL k = FN(parameter)(K, j, 1);
        FN(vbits) top = {0};
        for (ptrdiff_t row = 0; row < rows; row++) {
            const T *p = (const T *)(x + row * stride) + j;
            top = FN(larger)(top, (width - j < W ? FN(load_few)(p, width - j) : FN(load)(p)) - k);
        }
        for (ptrdiff_t i = 0; i < W && j + i < width; i++) factors[j + i] = FN(factor)(top[i]);
    }
}

/* Mean and M2 of c channels from the sums of their differences from K, of s columns each. The error grows with
 * (K - mean)²/var: where that is large M2 is FAR, unless all blocks share the K and improve_shifts judges it; where
 * squares may leave R's range M2 is OUT. Returns whether any is. */
INLINE int FN(block_moments)(ptrdiff_t c, const ptrdiff_t s, const int shared, double count, const R *restrict K,
                             const double *restrict s1, const double *restrict s2, double *restrict mean,
                             double *restrict m2) {
    const double least = SMALLEST_VAR > 0 ? SMALLEST_VAR * count : DBL_MIN;
    int again = 0;
    for (ptrdiff_t i = 0; i < c; i++) {
        const double shift = s1[i] / count, lost = s1[i] * shift, m = s2[i] < lost ? 0 : s2[i] - lost;
        const int out = (m < least) | (m > DBL_MAX), far = !shared && lost > SHIFT_LIMIT * m;
        mean[i] = K[i * s] + shift;
        m2[i] = out ? OUT : far ? FAR : m;
        again |= out | far;
    }
    return again;
}

/* The same from sums of scaled differences, which are good enough */
INLINE void FN(scaled_moments)(double count, R K, R factor, const double *sums1, const double *sums2, double *mean,
                               double *m2) {
    const double s1 = *sums1 / factor, shift = s1 / count, m = *sums2 - *sums1 * (*sums1 / count);
    *mean = factor == 0 ? K : K + shift;
    *m2 = factor == 0 || m < 0 ? 0 : m / factor / factor;
}

/* Mean and M2 = Σ(x - mean)² of one block of one channel: one pass, or a second one shifted by the first one's mean */
static void FN(moments_ncs)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len, ptrdiff_t ahead, double *mean,
                            double *m2) {
    const double count = (double)rows * (double)len;
    R K = FN(guess)(x, rows, stride, len);
    double sums[2];
    FN(shifted_sums)(x, rows, stride, len, ahead, K, 1, sums, 0);
    if (!FN(block_moments)(1, 1, 0, count, &K, sums, sums + 1, mean, m2)) return;
    K = (R)*mean;
    const R factor = *m2 == FAR ? 1 : FN(range)(x, rows, stride, len, K);
    FN(shifted_sums)(x, rows, stride, len, 0, K, factor, sums, 1);
    FN(scaled_moments)(count, K, factor, sums, sums + 1, mean, m2);
}

/* s1 += x - K, s2 += (x - K)² down a group of rows for the columns from j on: a vector of them, or the `left` last ones,
 * which leave the sums after them as they are. Fetches the next group. */
INLINE void FN(add_columns)(const char *x, ptrdiff_t stride, ptrdiff_t j, ptrdiff_t left, const R *K, const R *factor,
                            double *s1, double *s2, const int group, const int whole, const int scaled) {
    const VREAL k = FN(parameter)(K, j, 1), f = FN(parameter)(factor, j, 1);
    VREAL d[TREE], e[TREE];
#pragma GCC unroll 8
    for (int g = 0; g < group; g++) {
        const T *p = (const T *)(x + g * stride) + j;
        if (group > 1) __builtin_prefetch((const char *)p + group * stride, 0, 2);
        d[g] = FN(deviation)(whole ? FN(load)(p) : FN(load_few)(p, left), k, f, scaled);
        if (!whole) d[g] = FN(keep)(d[g], FN(KEEP) + 2 * LANES - left);
        e[g] = d[g] * d[g];
    }
    FN(add_tree)(d, group);
    FN(add_tree)(e, group);
    FN(add_to_columns)(s1 + j, d[0]);
    FN(add_to_columns)(s2 + j, e[0]);
}

INLINE void FN(add_rows)(const char *x, ptrdiff_t stride, ptrdiff_t width, const R *K, const R *factor, double *s1,
                         double *s2, const int group, const int scaled) {
    ptrdiff_t j = 0;
    for (; j + W <= width; j += W) FN(add_columns)(x, stride, j, W, K, factor, s1, s2, group, 1, scaled);
    if (j < width) FN(add_columns)(x, stride, j, width - j, K, factor, s1, s2, group, 0, scaled);
}

static void FN(column_sums)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t width, const R *K,
                            const R *factor, double *s1, double *s2, int scaled) {
    ptrdiff_t i = 0;
#define ROWS(GROUP, SCALED) FN(add_rows)(x + i * stride, stride, width, K, factor, s1, s2, GROUP, SCALED)
    for (; i + TREE <= rows; i += TREE) { if (scaled) ROWS(TREE, 1); else ROWS(TREE, 0); }
    for (; i < rows; i++) { if (scaled) ROWS(1, 1); else ROWS(1, 0); }
#undef ROWS
}

/* columns[ch] = the sum of channel ch: first of the k rows that lie side by side, then of its s columns */
static void FN(sum_columns)(double *columns, ptrdiff_t c, ptrdiff_t s, ptrdiff_t k) {
    for (; k > 1; k -= k / 2) /* the last half onto the first */
        for (ptrdiff_t j = 0; j < k / 2 * c * s; j++) columns[j] += columns[(k - k / 2) * c * s + j];
    if (s == 1) return;
    for (ptrdiff_t ch = 0; ch < c; ch++) {
        const double *p = columns + ch * s;
        vdouble sums[PARTS] = {{0}};
        double rest = 0;
        ptrdiff_t j = 0;
        for (; j + LANES <= s; j += LANES)
#pragma GCC unroll 8
            for (int q = 0; q < PARTS; q++) sums[q] += load_wide(p + j + q * WIDE);
        for (; j < s; j++) rest += p[j];
        columns[ch] = sum_lanes(sums) + rest;
    }
}

/* Mean and M2 of c channels, of s adjacent columns each, over a block of rows; k rows side by side make one row of
 * k·c·s columns. Single columns come with their shifts. work: 4 arrays of
 * `wide` ≥ k·c·s + LANES. */
static void FN(moments_rc)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t c_stride, ptrdiff_t c, ptrdiff_t s,
                           ptrdiff_t k, const void *shifts, double *work, ptrdiff_t wide, double *mean, double *m2) {
    R *K = (R *)work, *factor = (R *)(work + wide);
    double *s1 = work + 2 * wide, *s2 = s1 + wide;
    const double count = (double)rows * (double)s;
    const ptrdiff_t w = c * s, run = s * (ptrdiff_t)sizeof(T), whole = rows / k, left = rows % k;
    const int dense = c_stride == run, together = dense && stride == w * (ptrdiff_t)sizeof(T);
    for (ptrdiff_t ch = 0; ch < c; ch++) {
        const R value = s == 1 ? ((const R *)shifts)[ch] : FN(guess)(x + ch * c_stride, rows, stride, s);
        for (ptrdiff_t j = 0; j < s; j++) K[ch * s + j] = value;
    }
    for (ptrdiff_t first = 0, end = c, scaled = 0; first < c; first = end) {
        if (scaled) { /* the next channels that were marked, single columns with the others of their vectors */
            while (first < c && !(m2[first] < 0)) first++;
            if (first == c) return;
            for (end = first + 1; end < c && m2[end] < 0;) end++;
            if (s == 1) {
                first -= first % LANES;
                end = end + LANES - 1 - (end + LANES - 1) % LANES < c ? end + LANES - 1 - (end + LANES - 1) % LANES : c;
            }
            int out = 0;
            for (ptrdiff_t ch = first; ch < end; ch++) {
                out |= m2[ch] == OUT;
                for (ptrdiff_t j = 0; j < s; j++) K[ch * s + j] = (R)mean[ch], factor[ch * s + j] = 1;
            }
            if (out && s == 1) FN(range_columns)(x + first * c_stride, rows, stride, end - first, K + first, factor + first);
            for (ptrdiff_t ch = first; out && s > 1 && ch < end; ch++) {
                const R f = FN(range)(x + ch * c_stride, rows, stride, s, K[ch * s]);
                for (ptrdiff_t j = 0; j < s; j++) factor[ch * s + j] = f;
            }
        }
        for (ptrdiff_t j = w; j < wide; j++) K[j] = K[j - w];
        for (ptrdiff_t j = w; scaled && j < wide; j++) factor[j] = factor[j - w];
        memset(s1, 0, 2 * wide * sizeof(double));
        const int all = together && end - first == c;
        for (ptrdiff_t q = 0; q < k; q++) /* rows q, q + k, … go to columns q·w … */
            for (ptrdiff_t ch = first; ch < end; ch = dense ? end : ch + 1) {
                const ptrdiff_t at = q * w + ch * s, width = dense ? (end - first) * s : s;
                const char *p = x + q * stride + ch * c_stride;
                if (!all || q == 0)
                    FN(column_sums)(p, whole, k * stride, all ? k * w : width, K + at, factor + at, s1 + at, s2 + at, scaled);
                if (q < left)
                    FN(column_sums)(p + whole * k * stride, 1, stride, width, K + at, factor + at, s1 + at, s2 + at, scaled);
            }
        FN(sum_columns)(s1, c, s, k);
        FN(sum_columns)(s2, c, s, k);
        if (scaled) {
            for (ptrdiff_t ch = first; ch < end; ch++)
                if (m2[ch] < 0) FN(scaled_moments)(count, K[ch * s], factor[ch * s], s1 + ch, s2 + ch, mean + ch, m2 + ch);
            continue;
        }
        if (!(s == 1 ? FN(block_moments)(c, 1, 1, count, K, s1, s2, mean, m2)
                     : FN(block_moments)(c, s, 0, count, K, s1, s2, mean, m2)))
            return;
        scaled = 1;
        end = 0;
    }
}

#ifndef STATISTICS_ONLY
/* ---- forward --------------------------------------------------------------------------------------------- */

/* What a vector of elements needs: of the one channel, or of the columns from i on */
typedef struct {
    VREAL hi, scale, shift;
} FN(forward_parameters);

INLINE FN(forward_parameters) FN(load_forward)(const R *p, ptrdiff_t pitch, ptrdiff_t i, const int varying) {
    return (FN(forward_parameters)){
        FN(parameter)(p + HI * pitch, i, varying), FN(parameter)(p + SCALE * pitch, i, varying),
        FN(parameter)(p + SHIFT * pitch, i, varying)};
}

INLINE VREAL FN(rectify)(VREAL z) { return (VREAL)((FN(vmask))z & ~(z <= (VREAL){0})); } /* NaN stays NaN */

/* dy where y, rounded as the forward pass stored it, is above 0 or NaN */
INLINE VREAL FN(pass)(VREAL dy, VREAL y) {
    const VREAL rounded = TO_REAL(TO_MEMORY(y, FN(vmem), VREAL, FN(vbits)), VREAL, FN(vbits));
    return (VREAL)((FN(vmask))dy & ~(rounded <= (VREAL){0}));
}

/* One vector of y = act((x - hi)·scale + shift + residual) */
INLINE VREAL FN(output)(const T *x, const T *residual, FN(forward_parameters) p, const int add, const int relu) {
    VREAL z = (FN(load)(x) - p.hi) * p.scale + p.shift;
    if (add) z += FN(load)(residual);
    return relu ? FN(rectify)(z) : z;
}

/* Elements from `i` to `end` of a row, a few at a time through copies: short rows, and the ends of streamed ones. */
INLINE void FN(normalize_few)(const T *x, const T *residual, T *y, ptrdiff_t i, ptrdiff_t end, const R *p, ptrdiff_t pitch,
                              const int varying, const int add, const int relu) {
    for (; i < end; i += W) {
        const ptrdiff_t count = end - i < W ? end - i : W;
        T bx[VECTOR_BYTES] = {0}, br[VECTOR_BYTES] = {0};
        memcpy(bx, x + i, count * sizeof(T));
        if (add) memcpy(br, residual + i, count * sizeof(T));
        FN(store)(bx, FN(output)(bx, br, FN(load_forward)(p, pitch, i, varying), add, relu), 0);
        memcpy(y + i, bx, count * sizeof(T));
    }
}

/* One row of the forward pass. The last vector overlaps the one before instead of a loop over single elements; it is
 * computed before anything is stored, so y may be x. A streamed row streams whole cache lines only: one that is written
 * both ways travels to memory and back in between (up to 13 times slower). */
INLINE void FN(normalize_row)(const T *x, const T *residual, T *y, ptrdiff_t n, const R *p, ptrdiff_t pitch,
                              ptrdiff_t ahead, const int varying, const int add, const int relu, const int stream) {
#define OUTPUT(I, P) FN(output)(x + (I), residual + (I), P, add, relu)
    const FN(forward_parameters) fixed = FN(load_forward)(p, pitch, 0, varying);
    const ptrdiff_t start = stream ? FN(to_line)(y, n) : 0;
    const ptrdiff_t tail = n - W, end = stream ? n - (n - start) % (LINE / (ptrdiff_t)sizeof(T)) : n - n % W;
    if (stream) FN(normalize_few)(x, residual, y, 0, start, p, pitch, varying, add, relu);
    if (stream || n < W) FN(normalize_few)(x, residual, y, n < W ? start : end, n, p, pitch, varying, add, relu);
    if (n < W) return;
    VREAL last = {0};
    if (!stream && end < n) last = OUTPUT(tail, varying ? FN(load_forward)(p, pitch, tail, varying) : fixed);
    for (ptrdiff_t i = start; i < end; i += W) {
        __builtin_prefetch((const char *)(x + i) + ahead);
        if (add) __builtin_prefetch((const char *)(residual + i) + ahead);
        if (!stream) __builtin_prefetch((char *)(y + i) + ahead, 1);
        FN(store)(y + i, OUTPUT(i, varying ? FN(load_forward)(p, pitch, i, varying) : fixed), stream);
    }
    if (!stream && end < n) FN(store)(y + tail, last, 0);
#undef OUTPUT
}

/* Rows of n elements; strides in bytes, `step` that of the parameters in elements. Fetches what is `ahead` bytes
 * further. */
static void FN(normalize)(const char *x, ptrdiff_t x_stride, const char *residual, ptrdiff_t residual_stride, char *y,
                          ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n, const void *p, ptrdiff_t pitch, ptrdiff_t step,
                          ptrdiff_t ahead, int varying, int relu, int stream) {
    const int add = residual != NULL;
#define CASE(V, ADD, A, S) \
    if (varying == V && add == ADD && relu == A && stream == S) \
        for (ptrdiff_t i = 0; i < rows; i++) \
            FN(normalize_row)((const T *)(x + i * x_stride), (const T *)(residual + i * residual_stride), \
                              (T *)(y + i * y_stride), n, (const R *)p + i * step, pitch, ahead, V, ADD, A, S);
#define CASES(V, ADD) CASE(V, ADD, 0, 0) CASE(V, ADD, 0, 1) CASE(V, ADD, 1, 0) CASE(V, ADD, 1, 1)
    CASES(0, 0) CASES(0, 1) CASES(1, 0) CASES(1, 1)
#undef CASES
#undef CASE
}

/* ---- ReLU after a residual: one bit per element, whether its gradient passes (y > 0, or NaN) ------------- */

/* One row of y = max(0, affine(x) + residual) and its bits, from `bit` on. LANES elements at a time, in order. */
INLINE void FN(join_row)(const T *x, const T *residual, T *y, uint8_t *bits, ptrdiff_t bit, ptrdiff_t n, const R *p,
                         ptrdiff_t pitch, ptrdiff_t ahead, const int varying, const int stream) {
    const FN(forward_parameters) fixed = FN(load_forward)(p, pitch, 0, varying);
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        const ptrdiff_t count = n - i < LANES ? n - i : LANES;
        T bx[LANES] = {0}, br[LANES] = {0};
        if (count < LANES) {
            memcpy(bx, x + i, count * sizeof(T));
            memcpy(br, residual + i, count * sizeof(T));
        }
        const T *px = count < LANES ? bx : x + i, *pr = count < LANES ? br : residual + i;
        unsigned word = 0;
        __builtin_prefetch((const char *)px + ahead);
        __builtin_prefetch((const char *)pr + ahead);
#pragma GCC unroll 8
        for (int q = 0; q < LANES / W; q++) {
            const VREAL z = FN(output)(px + q * W, pr + q * W,
                                       varying ? FN(load_forward)(p, pitch, i + q * W, varying) : fixed, 1, 1);
            const VREAL rounded = TO_REAL(TO_MEMORY(z, FN(vmem), VREAL, FN(vbits)), VREAL, FN(vbits));
            const FN(vmask) passes = ~(rounded <= (VREAL){0});
            word |= bits_of(&passes, sizeof(R)) << q * W;
            if (count == LANES) FN(store)(y + i + q * W, z, stream);
            else FN(store)(bx + q * W, z, 0);
        }
        if (count < LANES) memcpy(y + i, bx, count * sizeof(T));
        set_bits(bits, bit + i, word, count);
    }
}

/* Rows of n elements; strides in bytes, of the bits in bits. Streams only rows that begin a cache line. */
static void FN(join)(const char *x, ptrdiff_t x_stride, const char *residual, ptrdiff_t residual_stride, char *y,
                     ptrdiff_t y_stride, uint8_t *bits, ptrdiff_t bit, ptrdiff_t bit_stride, ptrdiff_t rows, ptrdiff_t n,
                     const void *p, ptrdiff_t pitch, ptrdiff_t step, ptrdiff_t ahead, int varying, int stream) {
    if (((uintptr_t)y | (uintptr_t)y_stride) % LINE) stream = 0;
#define CASE(V, S) \
    if (varying == V && stream == S) \
        for (ptrdiff_t i = 0; i < rows; i++) \
            FN(join_row)((const T *)(x + i * x_stride), (const T *)(residual + i * residual_stride), \
                         (T *)(y + i * y_stride), bits, bit + i * bit_stride, n, (const R *)p + i * step, pitch, ahead, V, S);
    CASE(0, 0) CASE(0, 1) CASE(1, 0) CASE(1, 1)
#undef CASE
}

/* Rows of dy where the bits are set, zeros elsewhere; out may be dy. */
static void FN(mask)(const char *dy, ptrdiff_t dy_stride, const uint8_t *bits, ptrdiff_t bit, ptrdiff_t bit_stride,
                     char *out, ptrdiff_t out_stride, ptrdiff_t rows, ptrdiff_t n, ptrdiff_t ahead) {
    static const TINT LANE[LANES] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, (TINT)32768};
    for (ptrdiff_t row = 0; row < rows; row++)
        for (ptrdiff_t i = 0; i < n; i += LANES) {
            const T *source = (const T *)(dy + row * dy_stride) + i;
            T *target = (T *)(out + row * out_stride) + i;
            const ptrdiff_t count = n - i < LANES ? n - i : LANES;
            const unsigned word = get_bits(bits, bit + row * bit_stride + i, count);
            if (count < LANES) {
                for (ptrdiff_t j = 0; j < count; j++) target[j] = word >> j & 1 ? source[j] : 0;
                continue;
            }
            __builtin_prefetch((const char *)source + ahead);
#pragma GCC unroll 8
            for (int q = 0; q < LANES / W; q++) {
                FN(vmemint) v, lane;
                memcpy(&v, source + q * W, sizeof v);
                memcpy(&lane, LANE + q * W, sizeof lane);
                v &= (((TINT)word - (FN(vmemint)){0}) & lane) != 0;
                memcpy(target + q * W, &v, sizeof v);
            }
        }
}

/* ---- backward -------------------------------------------------------------------------------------------- */

/* One vector of dy, 0 where the forward's y was not above 0 (computed again by the same arithmetic and rounding), and of
 * dy·x̂, x̂ = (x - hi)·rstd */
INLINE void FN(products)(VREAL dy, VREAL x, FN(forward_parameters) p, VREAL rstd, const int relu, VREAL *d, VREAL *e) {
    const VREAL centred = SUBTRACT(x, p.hi);
    *d = relu ? FN(pass)(dy, centred * p.scale + p.shift) : dy;
    *e = *d * (centred * rstd);
}

/* Σdy and Σdy·x̂ over rows of one channel; `ahead` as in shifted_sums */
INLINE void FN(reduce_ncs_body)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t x_stride,
                                ptrdiff_t len, ptrdiff_t dy_ahead, ptrdiff_t x_ahead, const R *p, double *sum,
                                double *product, const int relu) {
    vdouble s1[PARTS] = {{0}}, s2[PARTS] = {{0}}, t1[PARTS] = {{0}}, t2[PARTS] = {{0}};
    const FN(forward_parameters) f = FN(load_forward)(p, 1, 0, 0);
    const VREAL rstd = p[RSTD] - (VREAL){0};
    const ptrdiff_t r = len % LANES;
    T buffer_x[LANES], buffer_dy[LANES];
    int added = 0;
    for (ptrdiff_t row = 0; row < rows; row++) {
        const T *px = (const T *)(x + row * x_stride), *pd = (const T *)(dy + row * dy_stride);
        ptrdiff_t i = 0;
        for (; i + TREE * LANES <= len; i += TREE * LANES) {
            if (x_ahead)
                for (ptrdiff_t line = 0; line < TREE * LANES; line += LINE / (ptrdiff_t)sizeof(T)) {
                    __builtin_prefetch((const char *)(px + i + line) + x_ahead, 0, 2);
                    __builtin_prefetch((const char *)(pd + i + line) + dy_ahead, 0, 2);
                }
#pragma GCC unroll 8
            for (int v = 0; v < LANES / W; v++) {
                VREAL d[TREE], e[TREE];
#pragma GCC unroll 8
                for (int g = 0; g < TREE; g++)
                    FN(products)(FN(load)(pd + i + g * LANES + v * W), FN(load)(px + i + g * LANES + v * W), f, rstd,
                                 relu, d + g, e + g);
                FN(add_tree)(d, TREE);
                FN(add_tree)(e, TREE);
                FN(accumulate)(t1 + v * (W / WIDE), d[0]);
                FN(accumulate)(t2 + v * (W / WIDE), e[0]);
            }
            if (++added == FLUSH) added = flush_sums(s1, t1) + flush_sums(s2, t2);
        }
        for (; i < len; i += LANES) {
            const int whole = i + LANES <= len;
            const T *from_x = whole ? px + i : FN(tail)(px, len, r, buffer_x);
            const T *from_dy = whole ? pd + i : FN(tail)(pd, len, r, buffer_dy);
#pragma GCC unroll 8
            for (int v = 0; v < LANES / W; v++) {
                VREAL d, e;
                FN(products)(FN(load)(from_dy + v * W), FN(load)(from_x + v * W), f, rstd, relu, &d, &e);
                FN(accumulate)(t1 + v * (W / WIDE), whole ? d : FN(keep)(d, FN(KEEP) + r + v * W));
                FN(accumulate)(t2 + v * (W / WIDE), whole ? e : FN(keep)(e, FN(KEEP) + r + v * W));
            }
        }
        if ((added += TREE) >= FLUSH) added = flush_sums(s1, t1) + flush_sums(s2, t2);
    }
    flush_sums(s1, t1);
    flush_sums(s2, t2);
    *sum = sum_lanes(s1);
    *product = sum_lanes(s2);
}

static void FN(reduce_ncs)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t x_stride,
                           ptrdiff_t len, ptrdiff_t dy_ahead, ptrdiff_t x_ahead, const void *p, double *sum,
                           double *product, int relu) {
#define BODY(RELU) \
    FN(reduce_ncs_body)(dy, x, rows, dy_stride, x_stride, len, dy_ahead, x_ahead, (const R *)p, sum, product, RELU)
    if (relu) BODY(1);
    else BODY(0);
#undef BODY
}

/* s1 += dy, s2 += dy·x̂ down a group of rows, as in add_columns */
INLINE void FN(reduce_few)(const char *dy, const char *x, ptrdiff_t dy_stride, ptrdiff_t x_stride, ptrdiff_t j,
                           ptrdiff_t left, const R *p, ptrdiff_t pitch, double *s1, double *s2, const int group,
                           const int relu, const int whole) {
    const FN(forward_parameters) f = FN(load_forward)(p, pitch, j, 1);
    const VREAL rstd = FN(parameter)(p + RSTD * pitch, j, 1);
    VREAL d[TREE], e[TREE];
#pragma GCC unroll 8
    for (int g = 0; g < group; g++) {
        const T *px = (const T *)(x + g * x_stride) + j, *pd = (const T *)(dy + g * dy_stride) + j;
        if (group > 1) {
            __builtin_prefetch((const char *)px + group * x_stride, 0, 2);
            __builtin_prefetch((const char *)pd + group * dy_stride, 0, 2);
        }
        FN(products)(whole ? FN(load)(pd) : FN(load_few)(pd, left), whole ? FN(load)(px) : FN(load_few)(px, left), f,
                     rstd, relu, d + g, e + g);
        if (!whole) {
            d[g] = FN(keep)(d[g], FN(KEEP) + 2 * LANES - left);
            e[g] = FN(keep)(e[g], FN(KEEP) + 2 * LANES - left);
        }
    }
    FN(add_tree)(d, group);
    FN(add_tree)(e, group);
    FN(add_to_columns)(s1 + j, d[0]);
    FN(add_to_columns)(s2 + j, e[0]);
}

INLINE void FN(reduce_rows)(const char *dy, const char *x, ptrdiff_t dy_stride, ptrdiff_t x_stride, ptrdiff_t width,
                            const R *p, ptrdiff_t pitch, double *s1, double *s2, const int group, const int relu) {
    ptrdiff_t j = 0;
#define COLUMNS_FROM(J, LEFT, WHOLE) \
    FN(reduce_few)(dy, x, dy_stride, x_stride, J, LEFT, p, pitch, s1, s2, group, relu, WHOLE)
    for (; j + W <= width; j += W) COLUMNS_FROM(j, W, 1);
    if (j < width) COLUMNS_FROM(j, width - j, 0);
#undef COLUMNS_FROM
}

static void FN(reduce_columns)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t x_stride,
                               ptrdiff_t width, const R *p, ptrdiff_t pitch, double *s1, double *s2, int relu) {
    ptrdiff_t i = 0;
#define ROWS(GROUP, RELU) FN(reduce_rows)(dy + i * dy_stride, x + i * x_stride, dy_stride, x_stride, width, p, pitch, \
                                          s1, s2, GROUP, RELU)
    for (; i + TREE <= rows; i += TREE) { if (relu) ROWS(TREE, 1); else ROWS(TREE, 0); }
    for (; i < rows; i++) { if (relu) ROWS(1, 1); else ROWS(1, 0); }
#undef ROWS
}

/* Σdy and Σdy·x̂ of c channels over a block of rows; the columns as in moments_rc, work: 2 arrays of `wide`. */
static void FN(reduce_rc)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t dy_c_stride,
                          ptrdiff_t x_stride, ptrdiff_t x_c_stride, ptrdiff_t c, ptrdiff_t s, ptrdiff_t k,
                          const void *parameters, ptrdiff_t pitch, double *work, ptrdiff_t wide, double *sum,
                          double *product, int relu) {
    double *s1 = work, *s2 = work + wide;
    const R *p = (const R *)parameters;
    const ptrdiff_t w = c * s, run = s * (ptrdiff_t)sizeof(T), row = w * (ptrdiff_t)sizeof(T);
    const ptrdiff_t whole = rows / k, left = rows % k;
    const int dense = x_c_stride == run && dy_c_stride == run;
    const int together = dense && x_stride == row && dy_stride == row;
    const ptrdiff_t width = together ? k * w : dense ? w : s;
    memset(s1, 0, 2 * wide * sizeof(double));
    for (ptrdiff_t q = 0; q < k; q++) {
        for (ptrdiff_t ch = 0; ch < (dense ? 1 : c); ch++) {
            const ptrdiff_t at = q * w + ch * s, end = whole * k;
            const char *pd = dy + q * dy_stride + ch * dy_c_stride, *px = x + q * x_stride + ch * x_c_stride;
            if (!together || q == 0)
                FN(reduce_columns)(pd, px, whole, k * dy_stride, k * x_stride, width, p + ch * s, pitch, s1 + at, s2 + at,
                                   relu);
            if (q < left)
                FN(reduce_columns)(pd + end * dy_stride, px + end * x_stride, 1, dy_stride, x_stride, dense ? w : s,
                                   p + ch * s, pitch, s1 + at, s2 + at, relu);
        }
    }
    FN(sum_columns)(s1, c, s, k);
    FN(sum_columns)(s2, c, s, k);
    memcpy(sum, s1, c * sizeof(double));
    memcpy(product, s2, c * sizeof(double));
}

/* What a vector of dx needs, besides what the forward pass did */
typedef struct {
    FN(forward_parameters) forward;
    VREAL rstd, dbeta_mean, dgamma_mean;
} FN(backward_parameters);

INLINE FN(backward_parameters) FN(load_backward)(const R *p, ptrdiff_t pitch, ptrdiff_t i, const int varying) {
    return (FN(backward_parameters)){
        FN(load_forward)(p, pitch, i, varying), FN(parameter)(p + RSTD * pitch, i, varying),
        FN(parameter)(p + DBETA_MEAN * pitch, i, varying), FN(parameter)(p + DGAMMA_MEAN * pitch, i, varying)};
}

/* One vector of dx = scale·((dy - mean dy) - x̂·mean(dy·x̂)); frozen statistics: dx = scale·dy */
INLINE VREAL FN(input_gradient)(const T *dy, const T *x, FN(backward_parameters) p, const int relu, const int frozen) {
    const FN(forward_parameters) f = p.forward;
    VREAL g = FN(load)(dy), d = {0};
    if (relu || !frozen) d = FN(load)(x) - f.hi;
    if (relu) g = FN(pass)(g, d * f.scale + f.shift);
    if (frozen) return f.scale * g;
    return f.scale * ((g - p.dbeta_mean) - d * p.rstd * p.dgamma_mean);
}

/* As normalize_few. */
INLINE void FN(backward_few)(const T *dy, const T *x, T *dx, ptrdiff_t i, ptrdiff_t end, const R *p, ptrdiff_t pitch,
                             const int varying, const int relu, const int frozen) {
    for (; i < end; i += W) {
        const ptrdiff_t count = end - i < W ? end - i : W;
        T bx[VECTOR_BYTES] = {0}, bd[VECTOR_BYTES] = {0};
        memcpy(bx, x + i, count * sizeof(T));
        memcpy(bd, dy + i, count * sizeof(T));
        FN(store)(bd, FN(input_gradient)(bd, bx, FN(load_backward)(p, pitch, i, varying), relu, frozen), 0);
        memcpy(dx + i, bd, count * sizeof(T));
    }
}

/* One row of dx, as normalize_row; dx may be dy. */
INLINE void FN(backward_row)(const T *dy, const T *x, T *dx, ptrdiff_t n, const R *p, ptrdiff_t pitch, ptrdiff_t ahead,
                             const int varying, const int relu, const int frozen, const int stream) {
#define GRADIENT(I, P) FN(input_gradient)(dy + (I), x + (I), P, relu, frozen)
    const FN(backward_parameters) fixed = FN(load_backward)(p, pitch, 0, varying);
    const ptrdiff_t start = stream ? FN(to_line)(dx, n) : 0;
    const ptrdiff_t tail = n - W, end = stream ? n - (n - start) % (LINE / (ptrdiff_t)sizeof(T)) : n - n % W;
    if (stream) FN(backward_few)(dy, x, dx, 0, start, p, pitch, varying, relu, frozen);
    if (stream || n < W) FN(backward_few)(dy, x, dx, n < W ? start : end, n, p, pitch, varying, relu, frozen);
    if (n < W) return;
    VREAL last = {0};
    if (!stream && end < n) last = GRADIENT(tail, varying ? FN(load_backward)(p, pitch, tail, varying) : fixed);
    for (ptrdiff_t i = start; i < end; i += W) {
        __builtin_prefetch((const char *)(dy + i) + ahead);
        if (relu || !frozen) __builtin_prefetch((const char *)(x + i) + ahead);
        if (!stream) __builtin_prefetch((char *)(dx + i) + ahead, 1);
        FN(store)(dx + i, GRADIENT(i, varying ? FN(load_backward)(p, pitch, i, varying) : fixed), stream);
    }
    if (!stream && end < n) FN(store)(dx + tail, last, 0);
#undef GRADIENT
}

/* Rows of n elements; strides in bytes. Fetches what is `ahead` bytes further. */
static void FN(backward)(const char *dy, ptrdiff_t dy_stride, const char *x, ptrdiff_t x_stride, char *dx,
                         ptrdiff_t dx_stride, ptrdiff_t rows, ptrdiff_t n, const void *p, ptrdiff_t pitch, ptrdiff_t step,
                         ptrdiff_t ahead, int varying, int relu, int frozen, int stream) {
#define CASE(V, A, F, S) \
    if (varying == V && relu == A && frozen == F && stream == S) \
        for (ptrdiff_t i = 0; i < rows; i++) \
            FN(backward_row)((const T *)(dy + i * dy_stride), (const T *)(x + i * x_stride), (T *)(dx + i * dx_stride), \
                             n, (const R *)p + i * step, pitch, ahead, V, A, F, S);
#define CASES(V, A) CASE(V, A, 0, 0) CASE(V, A, 0, 1) CASE(V, A, 1, 0) CASE(V, A, 1, 1)
    CASES(0, 0) CASES(0, 1) CASES(1, 0) CASES(1, 1)
#undef CASES
#undef CASE
}

static const span_table FN(spans) = {
    sizeof(T), sizeof(R), FN(prepare), FN(expand), FN(guess_columns), FN(improve_shifts), FN(moments_ncs), FN(moments_rc), PRECISE(guess_columns),
    PRECISE(improve_shifts), PRECISE(moments_ncs), PRECISE(moments_rc), FN(normalize), FN(reduce_ncs),
    FN(reduce_rc), FN(dgamma), FN(backward), FN(join), FN(mask),
};
#endif

#undef JOIN_
#undef JOIN
#undef FN
#undef VREAL
#undef VPART
#undef W
