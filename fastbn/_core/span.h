/* Serial loops over spans of memory: no Python, no threads, no allocation.
 *
 * Included by spans.h once per dtype, with
 *   T        type in memory                        SUFFIX   ends every name
 *   R        type of the arithmetic                TO_REAL   vector of T -> vector of R, TO_MEMORY back
 *   RINT, RBITS  signed and unsigned integer of R's size, TINT  signed of T's
 *   REAL_MAX largest finite R                      SHIFT_LIMIT (see moments_ncs)
 *   WIDEN    vector of R -> vector of float64
 * Statistics and reductions are summed in float64, element-wise results are computed in R.
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
typedef RINT FN(vpartmask) __attribute__((vector_size(WIDE * sizeof(R))));
typedef RBITS FN(vbits) __attribute__((vector_size(VECTOR_BYTES)));
typedef RBITS FN(vpartbits) __attribute__((vector_size(WIDE * sizeof(R))));
typedef T FN(vmem) __attribute__((vector_size(VECTOR_BYTES / sizeof(R) * sizeof(T))));
typedef TINT FN(vmemint) __attribute__((vector_size(VECTOR_BYTES / sizeof(R) * sizeof(T))));
typedef T FN(vpartmem) __attribute__((vector_size(WIDE * sizeof(T))));
#define VREAL FN(vreal)
#define VPART FN(vpart)
#define W ((ptrdiff_t)(VECTOR_BYTES / sizeof(R)))

INLINE VREAL FN(load)(const T *p) {
    FN(vmem) v;
    memcpy(&v, p, sizeof v);
    return TO_REAL(v, VREAL, FN(vbits));
}
INLINE VPART FN(load_part)(const T *p) {
    FN(vpartmem) v;
    memcpy(&v, p, sizeof v);
    return TO_REAL(v, VPART, FN(vpartbits));
}
INLINE void FN(store)(T *p, VREAL v, const int stream) {
    const FN(vmem) m = TO_MEMORY(v, FN(vmem), VREAL, FN(vbits));
    if (stream) stream_bytes(p, &m, sizeof m);
    else memcpy(p, &m, sizeof m);
}
INLINE VPART FN(load_few)(const T *p, ptrdiff_t n) { /* n values, n <= WIDE, and zeros */
    T b[WIDE] = {0};
    memcpy(b, p, n * sizeof(T));
    return FN(load_part)(b);
}
INLINE double FN(first)(const T *p) { return WIDEN(FN(load_few)(p, 1))[0]; }
INLINE VREAL FN(parameter)(const R *p, ptrdiff_t i, const int varying) {
    VREAL v;
    if (!varying) return p[0] - (VREAL){0};
    memcpy(&v, p + i, sizeof v);
    return v;
}
INLINE VPART FN(parameter_part)(const R *p, ptrdiff_t i, const int varying) {
    VPART v;
    if (!varying) return p[0] - (VPART){0};
    memcpy(&v, p + i, sizeof v);
    return v;
}

/* The last r = len % LANES values of a row as LANES values ending with them (what comes before is masked away). */
INLINE const T *FN(tail)(const T *row, ptrdiff_t len, ptrdiff_t r, T *buffer) {
    if (len >= LANES) return row + len - LANES;
    memset(buffer, 0, (LANES - r) * sizeof(T));
    memcpy(buffer + LANES - r, row, r * sizeof(T));
    return buffer;
}

/* ---- parameters ------------------------------------------------------------------------------------------ */

/* A number that R cannot hold becomes the largest one: 0·∞ would make NaN of a constant channel without eps. */
INLINE R FN(finite)(double v) {
    return (R)(v > REAL_MAX && v <= DBL_MAX ? REAL_MAX : v < -REAL_MAX && v >= -DBL_MAX ? -REAL_MAX : v);
}

/* y = ((x - hi) - lo)·scale + shift. The mean in two floats: x - hi is exact near the mean, so |mean| ≫ std is free. */
static void FN(prepare)(ptrdiff_t c, const double *mean, const double *rstd, const double *gamma, const double *beta,
                        const double *dbeta_mean, const double *dgamma_mean, void *parameters, ptrdiff_t pitch) {
    R *p = (R *)parameters;
    for (ptrdiff_t i = 0; i < c; i++) {
        const R hi = (R)mean[i];
        p[HI * pitch + i] = hi;
        p[LO * pitch + i] = hi - hi == 0 ? (R)(mean[i] - (double)hi) : 0; /* infinite mean: no NaN for finite x */
        p[RSTD * pitch + i] = FN(finite)(rstd[i]);
    }
    for (ptrdiff_t i = 0; i < c; i++) p[SCALE * pitch + i] = FN(finite)(gamma ? gamma[i] * rstd[i] : rstd[i]);
    for (ptrdiff_t i = 0; i < c; i++) p[SHIFT * pitch + i] = beta ? (R)beta[i] : 0;
    for (ptrdiff_t i = 0; i < c; i++) p[DBETA_MEAN * pitch + i] = dbeta_mean ? (R)dbeta_mean[i] : 0;
    for (ptrdiff_t i = 0; i < c; i++) p[DGAMMA_MEAN * pitch + i] = dgamma_mean ? (R)dgamma_mean[i] : 0;
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

/* ---- statistics ------------------------------------------------------------------------------------------ */

/* Σ(x - K) and Σ(x - K)² over rows of one channel, LANES partial sums across the rows. Four vectors are added as a
 * tree, and every FLUSH sums are added to those of the block: the error grows with the levels, not with the length.
 * `ahead`: bytes to what is wanted next, fetched into L2 meanwhile; 0 for nothing. */
INLINE void FN(shifted_sums)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len, ptrdiff_t ahead, double K,
                             double *sums) {
    vdouble s1[PARTS] = {{0}}, s2[PARTS] = {{0}}, t1[PARTS] = {{0}}, t2[PARTS] = {{0}};
    const vdouble k = splat_wide(K);
    const ptrdiff_t r = len % LANES;
    T buffer[LANES];
    int added = 0;
    for (ptrdiff_t row = 0; row < rows; row++) {
        const T *p = (const T *)(x + row * stride);
        ptrdiff_t i = 0;
        for (; i + 4 * LANES <= len; i += 4 * LANES) {
            if (ahead)
                for (ptrdiff_t line = 0; line < 4 * LANES; line += LINE / (ptrdiff_t)sizeof(T))
                    __builtin_prefetch((const char *)(p + i + line) + ahead, 0, 2);
#pragma GCC unroll 8
            for (int q = 0; q < PARTS; q++) {
                vdouble d[4];
#pragma GCC unroll 4
                for (int g = 0; g < 4; g++) d[g] = subtract(WIDEN(FN(load_part)(p + i + g * LANES + q * WIDE)), k);
                t1[q] += (d[0] + d[1]) + (d[2] + d[3]);
                t2[q] += (d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3]);
            }
            if (++added == FLUSH) added = flush_sums(s1, t1) + flush_sums(s2, t2);
        }
        for (; i + LANES <= len; i += LANES) {
#pragma GCC unroll 8
            for (int q = 0; q < PARTS; q++) {
                const vdouble d = WIDEN(FN(load_part)(p + i + q * WIDE)) - k;
                t1[q] += d;
                t2[q] += d * d;
            }
        }
        if (r) {
            const T *t = FN(tail)(p, len, r, buffer);
#pragma GCC unroll 8
            for (int q = 0; q < PARTS; q++) {
                const vdouble d = keep_last(WIDEN(FN(load_part)(t + q * WIDE)) - k, KEEP + r + q * WIDE);
                t1[q] += d;
                t2[q] += d * d;
            }
        }
        if ((added += 4) >= FLUSH) added = flush_sums(s1, t1) + flush_sums(s2, t2); /* a row may end with four more */
    }
    flush_sums(s1, t1);
    flush_sums(s2, t2);
    sums[0] = sum_lanes(s1);
    sums[1] = sum_lanes(s2);
}

/* Where to shift to: the mean of the first few values, exactly the value of a constant channel */
INLINE double FN(guess)(const char *x, ptrdiff_t stride, ptrdiff_t n) {
    double sum = 0;
    const ptrdiff_t few = n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
    for (ptrdiff_t i = 0; i < few; i++) sum += FN(first)((const T *)(x + i * stride)) / (double)few;
    return sum;
}

/* Mean and M2 = Σ(x - mean)² of one block of one channel: one pass shifted by K, a mean of the block's first values.
 * The error grows with (K - mean)²/var; where that is large (an outlier in K), a second pass shifts by the mean. */
static void FN(moments_ncs)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len, ptrdiff_t ahead, double *mean,
                            double *m2) {
    const double count = (double)rows * (double)len;
    double K = FN(guess)(x, sizeof(T), len), sums[2];
    for (int pass = 0; pass < 2; pass++) {
        FN(shifted_sums)(x, rows, stride, len, ahead, K, sums);
        const double lost = sums[0] * (sums[0] / count);
        *mean = K + sums[0] / count;
        *m2 = sums[1] < lost ? 0 : sums[1] - lost;
        if (!(lost > SHIFT_LIMIT * *m2)) return;
        K = *mean;
    }
}

/* s1 += x - K, s2 += (x - K)² down a group of rows, added as a tree, for the columns from j on: a register of them, or
 * the `left` last ones. Fetches what is `group` rows further. */
INLINE void FN(add_columns)(const char *x, ptrdiff_t stride, ptrdiff_t j, ptrdiff_t left, const double *K, double *s1,
                            double *s2, const int group, const int whole) {
    const vdouble k = load_wide(K + j);
    vdouble d[ROW_GROUP], e[ROW_GROUP];
#pragma GCC unroll 8
    for (int g = 0; g < group; g++) {
        const T *p = (const T *)(x + g * stride) + j;
        if (group > 1) __builtin_prefetch((const char *)p + group * stride, 0, 2);
        d[g] = subtract(WIDEN(whole ? FN(load_part)(p) : FN(load_few)(p, left)), k);
        e[g] = d[g] * d[g];
    }
    add_tree(d, group);
    add_tree(e, group);
    store_columns(s1 + j, load_wide(s1 + j) + d[0], whole ? WIDE : left);
    store_columns(s2 + j, load_wide(s2 + j) + e[0], whole ? WIDE : left);
}

INLINE void FN(add_rows)(const char *x, ptrdiff_t stride, ptrdiff_t width, const double *K, double *s1, double *s2,
                         const int group) {
    ptrdiff_t j = 0;
    for (; j + WIDE <= width; j += WIDE) FN(add_columns)(x, stride, j, WIDE, K, s1, s2, group, 1);
    if (j < width) FN(add_columns)(x, stride, j, width - j, K, s1, s2, group, 0);
}

static void FN(column_sums)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t width, const double *K,
                            double *s1, double *s2) {
    ptrdiff_t i = 0;
    for (; i + ROW_GROUP <= rows; i += ROW_GROUP) FN(add_rows)(x + i * stride, stride, width, K, s1, s2, ROW_GROUP);
    for (; i < rows; i++) FN(add_rows)(x + i * stride, stride, width, K, s1, s2, 1);
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
 * k·c·s columns. work: 3 arrays of `wide` ≥ k·c·s + LANES. */
static void FN(moments_rc)(const char *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t c_stride, ptrdiff_t c, ptrdiff_t s,
                           ptrdiff_t k, double *work, ptrdiff_t wide, double *mean, double *m2) {
    double *K = work, *s1 = work + wide, *s2 = s1 + wide;
    const double count = (double)rows * (double)s;
    const ptrdiff_t w = c * s, run = s * (ptrdiff_t)sizeof(T), whole = rows / k, left = rows % k;
    const int dense = c_stride == run, together = dense && stride == w * (ptrdiff_t)sizeof(T);
    const ptrdiff_t width = together ? k * w : dense ? w : s;
    int again;
    ptrdiff_t begun = 0;
    if (s == 1 && dense && rows >= ROW_GROUP) /* as below, a register at a time */
        for (; begun + WIDE <= c; begun += WIDE) {
            vdouble sum = {0};
            for (int g = 0; g < ROW_GROUP; g++)
                sum += WIDEN(FN(load_part)((const T *)(x + g * stride) + begun)) / (double)ROW_GROUP;
            store_wide(K + begun, sum);
        }
    for (ptrdiff_t ch = begun; ch < c; ch++) {
        const char *p = x + ch * c_stride;
        const double value = s == 1 ? FN(guess)(p, stride, rows) : FN(guess)(p, sizeof(T), s);
        for (ptrdiff_t j = 0; j < s; j++) K[ch * s + j] = value;
    }
    for (int pass = 0; pass < 2; pass++) {
        for (ptrdiff_t j = w; j < wide; j++) K[j] = K[j - w];
        memset(s1, 0, 2 * wide * sizeof(double));
        for (ptrdiff_t q = 0; q < k; q++) { /* rows q, q + k, … go to columns q·w … */
            for (ptrdiff_t ch = 0; ch < (dense ? 1 : c); ch++) {
                const ptrdiff_t at = q * w + ch * s;
                const char *p = x + q * stride + ch * c_stride;
                if (!together || q == 0) FN(column_sums)(p, whole, k * stride, width, K + at, s1 + at, s2 + at);
                if (q < left)
                    FN(column_sums)(p + whole * k * stride, 1, stride, dense ? w : s, K + at, s1 + at, s2 + at);
            }
        }
        FN(sum_columns)(s1, c, s, k);
        FN(sum_columns)(s2, c, s, k);
        again = pass ? repeat_moments(c, s, count, K, s1, s2, mean, m2)
                     : s == 1 ? block_moments(c, 1, count, SHIFT_LIMIT, K, s1, s2, mean, m2)
                              : block_moments(c, s, count, SHIFT_LIMIT, K, s1, s2, mean, m2);
        if (!again) return;
        for (ptrdiff_t ch = 0; ch < c; ch++)
            for (ptrdiff_t j = 0; j < s; j++) K[ch * s + j] = mean[ch];
    }
}

/* ---- forward --------------------------------------------------------------------------------------------- */

/* What a vector of elements needs: of the one channel, or of the columns from i on */
typedef struct {
    VREAL hi, lo, scale, shift;
} FN(forward_parameters);

INLINE FN(forward_parameters) FN(load_forward)(const R *p, ptrdiff_t pitch, ptrdiff_t i, const int varying) {
    return (FN(forward_parameters)){
        FN(parameter)(p + HI * pitch, i, varying), FN(parameter)(p + LO * pitch, i, varying),
        FN(parameter)(p + SCALE * pitch, i, varying), FN(parameter)(p + SHIFT * pitch, i, varying)};
}

INLINE VREAL FN(rectify)(VREAL z) { return (VREAL)((FN(vmask))z & ~(z <= (VREAL){0})); } /* NaN stays NaN */

/* One vector of y = act(((x - hi) - lo)·scale + shift + residual) */
INLINE VREAL FN(output)(const T *x, const T *residual, FN(forward_parameters) p, const int add, const int relu) {
    VREAL z = ((FN(load)(x) - p.hi) - p.lo) * p.scale + p.shift;
    if (add) z += FN(load)(residual);
    return relu ? FN(rectify)(z) : z;
}

/* One row of the forward pass. The last vector overlaps the one before instead of a loop over single elements; it is
 * computed before anything is stored, so y may be x. */
INLINE void FN(normalize_row)(const T *x, const T *residual, T *y, ptrdiff_t n, const R *p, ptrdiff_t pitch,
                              ptrdiff_t ahead, const int varying, const int add, const int relu, const int stream) {
#define OUTPUT(I, P) FN(output)(x + (I), residual + (I), P, add, relu)
    const FN(forward_parameters) fixed = FN(load_forward)(p, pitch, 0, varying);
    ptrdiff_t i = 0;
    if (n < W) {
        T bx[VECTOR_BYTES] = {0}, br[VECTOR_BYTES] = {0};
        memcpy(bx, x, n * sizeof(T));
        if (add) memcpy(br, residual, n * sizeof(T));
        FN(store)(bx, FN(output)(bx, br, fixed, add, relu), 0);
        memcpy(y, bx, n * sizeof(T));
        return;
    }
    if (stream && (uintptr_t)y % LINE) {
        FN(store)(y, OUTPUT(0, fixed), 0);
        i = (ptrdiff_t)((LINE - (uintptr_t)y % LINE) / sizeof(T)) % W;
    }
    const ptrdiff_t tail = n - W, end = n - (n - i) % W;
    VREAL last = {0};
    if (end < n) last = OUTPUT(tail, varying ? FN(load_forward)(p, pitch, tail, varying) : fixed);
    for (; i < end; i += W) {
        __builtin_prefetch((const char *)(x + i) + ahead);
        if (add) __builtin_prefetch((const char *)(residual + i) + ahead);
        FN(store)(y + i, OUTPUT(i, varying ? FN(load_forward)(p, pitch, i, varying) : fixed), stream);
    }
    if (end < n) FN(store)(y + tail, last, 0);
#undef OUTPUT
}

/* Rows of n elements; strides in bytes. Fetches what is `ahead` bytes further. */
static void FN(normalize)(const char *x, ptrdiff_t x_stride, const char *residual, ptrdiff_t residual_stride, char *y,
                          ptrdiff_t y_stride, ptrdiff_t rows, ptrdiff_t n, const void *p, ptrdiff_t pitch,
                          ptrdiff_t ahead, int varying, int relu, int stream) {
    const int add = residual != NULL;
#define CASE(V, ADD, A, S) \
    if (varying == V && add == ADD && relu == A && stream == S) \
        for (ptrdiff_t i = 0; i < rows; i++) \
            FN(normalize_row)((const T *)(x + i * x_stride), (const T *)(residual + i * residual_stride), \
                              (T *)(y + i * y_stride), n, (const R *)p, pitch, ahead, V, ADD, A, S);
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
                     const void *p, ptrdiff_t pitch, ptrdiff_t ahead, int varying, int stream) {
    if (((uintptr_t)y | (uintptr_t)y_stride) % LINE) stream = 0;
#define CASE(V, S) \
    if (varying == V && stream == S) \
        for (ptrdiff_t i = 0; i < rows; i++) \
            FN(join_row)((const T *)(x + i * x_stride), (const T *)(residual + i * residual_stride), \
                         (T *)(y + i * y_stride), bits, bit + i * bit_stride, n, (const R *)p, pitch, ahead, V, S);
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

/* dy where the forward's y > 0: y is computed again, by the forward's own arithmetic and rounding */
INLINE VPART FN(masked_part)(VPART dy, VPART x, const R *p, ptrdiff_t pitch, ptrdiff_t i, const int varying) {
    const VPART d = (x - FN(parameter_part)(p + HI * pitch, i, varying)) -
                    FN(parameter_part)(p + LO * pitch, i, varying);
    const VPART z = d * FN(parameter_part)(p + SCALE * pitch, i, varying) +
                    FN(parameter_part)(p + SHIFT * pitch, i, varying);
    const VPART y = TO_REAL(TO_MEMORY(z, FN(vpartmem), VPART, FN(vpartbits)), VPART, FN(vpartbits));
    return (VPART)((FN(vpartmask))dy & ~(y <= (VPART){0}));
}

/* t1 += dy, t2 += dy·(x - mean) for LANES values; `mask` keeps the last of them */
INLINE void FN(reduce_lanes)(const T *dy, const T *x, vdouble mean, const R *p, vdouble *t1, vdouble *t2,
                             const int64_t *mask, const int relu) {
#pragma GCC unroll 8
    for (int q = 0; q < PARTS; q++) {
        const VPART xp = FN(load_part)(x + q * WIDE);
        VPART g = FN(load_part)(dy + q * WIDE);
        if (relu) g = FN(masked_part)(g, xp, p, 1, 0, 0);
        const vdouble d = WIDEN(g), e = d * subtract(WIDEN(xp), mean);
        t1[q] += mask ? keep_last(d, mask + q * WIDE) : d;
        t2[q] += mask ? keep_last(e, mask + q * WIDE) : e;
    }
}

/* Σdy and Σdy·(x - mean) over rows of one channel; `ahead` and the levels of the sums as in shifted_sums */
INLINE void FN(reduce_ncs_body)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t x_stride,
                                ptrdiff_t len, ptrdiff_t dy_ahead, ptrdiff_t x_ahead, double mean, const R *p,
                                double *sum, double *product, const int relu) {
    vdouble s1[PARTS] = {{0}}, s2[PARTS] = {{0}}, t1[PARTS] = {{0}}, t2[PARTS] = {{0}};
    const vdouble m = splat_wide(mean);
    const ptrdiff_t r = len % LANES;
    T buffer_x[LANES], buffer_dy[LANES];
    int added = 0;
    for (ptrdiff_t row = 0; row < rows; row++) {
        const T *px = (const T *)(x + row * x_stride), *pd = (const T *)(dy + row * dy_stride);
        for (ptrdiff_t i = 0; i + LANES <= len; i += LANES) {
            if (x_ahead) {
                __builtin_prefetch((const char *)(px + i) + x_ahead, 0, 2);
                __builtin_prefetch((const char *)(pd + i) + dy_ahead, 0, 2);
            }
            FN(reduce_lanes)(pd + i, px + i, m, p, t1, t2, NULL, relu);
            if (++added == FLUSH) added = flush_sums(s1, t1) + flush_sums(s2, t2);
        }
        if (r) {
            FN(reduce_lanes)(FN(tail)(pd, len, r, buffer_dy), FN(tail)(px, len, r, buffer_x), m, p, t1, t2, KEEP + r, relu);
            if (++added == FLUSH) added = flush_sums(s1, t1) + flush_sums(s2, t2);
        }
    }
    flush_sums(s1, t1);
    flush_sums(s2, t2);
    *sum = sum_lanes(s1);
    *product = sum_lanes(s2);
}

static void FN(reduce_ncs)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t x_stride,
                           ptrdiff_t len, ptrdiff_t dy_ahead, ptrdiff_t x_ahead, double mean, const void *p, double *sum,
                           double *product, int relu) {
#define BODY(RELU) \
    FN(reduce_ncs_body)(dy, x, rows, dy_stride, x_stride, len, dy_ahead, x_ahead, mean, (const R *)p, sum, \
                        product, RELU)
    if (relu) BODY(1);
    else BODY(0);
#undef BODY
}

/* s1 += dy, s2 += dy·(x - mean) down a group of rows, as in add_columns */
INLINE void FN(reduce_few)(const char *dy, const char *x, ptrdiff_t dy_stride, ptrdiff_t x_stride, ptrdiff_t j,
                           ptrdiff_t left, const double *mean, const R *p, ptrdiff_t pitch, double *s1, double *s2,
                           const int group, const int relu, const int whole) {
    const vdouble m = load_wide(mean + j);
    vdouble d[ROW_GROUP], e[ROW_GROUP];
#pragma GCC unroll 8
    for (int g = 0; g < group; g++) {
        const T *px = (const T *)(x + g * x_stride) + j, *pd = (const T *)(dy + g * dy_stride) + j;
        if (group > 1) {
            __builtin_prefetch((const char *)px + group * x_stride, 0, 2);
            __builtin_prefetch((const char *)pd + group * dy_stride, 0, 2);
        }
        const VPART xp = whole ? FN(load_part)(px) : FN(load_few)(px, left);
        VPART gradient = whole ? FN(load_part)(pd) : FN(load_few)(pd, left);
        if (relu) gradient = FN(masked_part)(gradient, xp, p, pitch, j, 1);
        d[g] = WIDEN(gradient);
        e[g] = d[g] * subtract(WIDEN(xp), m);
    }
    add_tree(d, group);
    add_tree(e, group);
    store_columns(s1 + j, load_wide(s1 + j) + d[0], whole ? WIDE : left);
    store_columns(s2 + j, load_wide(s2 + j) + e[0], whole ? WIDE : left);
}

INLINE void FN(reduce_rows)(const char *dy, const char *x, ptrdiff_t dy_stride, ptrdiff_t x_stride, ptrdiff_t width,
                            const double *mean, const R *p, ptrdiff_t pitch, double *s1, double *s2, const int group,
                            const int relu) {
    ptrdiff_t j = 0;
#define COLUMNS_FROM(J, LEFT, WHOLE) \
    FN(reduce_few)(dy, x, dy_stride, x_stride, J, LEFT, mean, p, pitch, s1, s2, group, relu, WHOLE)
    for (; j + WIDE <= width; j += WIDE) COLUMNS_FROM(j, WIDE, 1);
    if (j < width) COLUMNS_FROM(j, width - j, 0);
#undef COLUMNS_FROM
}

static void FN(reduce_columns)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t x_stride,
                               ptrdiff_t width, const double *mean, const R *p, ptrdiff_t pitch, double *s1,
                               double *s2, int relu) {
    ptrdiff_t i = 0;
#define ROWS(GROUP, RELU) FN(reduce_rows)(dy + i * dy_stride, x + i * x_stride, dy_stride, x_stride, width, mean, p, \
                                          pitch, s1, s2, GROUP, RELU)
    for (; i + ROW_GROUP <= rows; i += ROW_GROUP) { if (relu) ROWS(ROW_GROUP, 1); else ROWS(ROW_GROUP, 0); }
    for (; i < rows; i++) { if (relu) ROWS(1, 1); else ROWS(1, 0); }
#undef ROWS
}

/* Σdy and Σdy·(x - mean) of c channels over a block of rows; the columns as in moments_rc. */
static void FN(reduce_rc)(const char *dy, const char *x, ptrdiff_t rows, ptrdiff_t dy_stride, ptrdiff_t dy_c_stride,
                          ptrdiff_t x_stride, ptrdiff_t x_c_stride, ptrdiff_t c, ptrdiff_t s, ptrdiff_t k,
                          const double *mean, const void *parameters, ptrdiff_t pitch, double *work, ptrdiff_t wide,
                          double *sum, double *product, int relu) {
    double *m = work, *s1 = work + wide, *s2 = s1 + wide;
    const R *p = (const R *)parameters;
    const ptrdiff_t w = c * s, run = s * (ptrdiff_t)sizeof(T), row = w * (ptrdiff_t)sizeof(T);
    const ptrdiff_t whole = rows / k, left = rows % k;
    const int dense = x_c_stride == run && dy_c_stride == run;
    const int together = dense && x_stride == row && dy_stride == row;
    const ptrdiff_t width = together ? k * w : dense ? w : s;
    for (ptrdiff_t ch = 0; ch < c; ch++)
        for (ptrdiff_t j = 0; j < s; j++) m[ch * s + j] = mean[ch];
    for (ptrdiff_t j = w; j < wide; j++) m[j] = m[j - w];
    memset(s1, 0, 2 * wide * sizeof(double));
    for (ptrdiff_t q = 0; q < k; q++) {
        for (ptrdiff_t ch = 0; ch < (dense ? 1 : c); ch++) {
            const ptrdiff_t at = q * w + ch * s, end = whole * k;
            const char *pd = dy + q * dy_stride + ch * dy_c_stride, *px = x + q * x_stride + ch * x_c_stride;
            if (!together || q == 0)
                FN(reduce_columns)(pd, px, whole, k * dy_stride, k * x_stride, width, m + at, p + ch * s, pitch, s1 + at,
                                   s2 + at, relu);
            if (q < left)
                FN(reduce_columns)(pd + end * dy_stride, px + end * x_stride, 1, dy_stride, x_stride, dense ? w : s,
                                   m + at, p + ch * s, pitch, s1 + at, s2 + at, relu);
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
    if (relu || !frozen) d = (FN(load)(x) - f.hi) - f.lo;
    if (relu) {
        const VREAL z = d * f.scale + f.shift;
        const VREAL y = TO_REAL(TO_MEMORY(z, FN(vmem), VREAL, FN(vbits)), VREAL, FN(vbits));
        g = (VREAL)((FN(vmask))g & ~(y <= (VREAL){0}));
    }
    if (frozen) return f.scale * g;
    return f.scale * ((g - p.dbeta_mean) - d * p.rstd * p.dgamma_mean);
}

/* One row of dx; the last vector overlaps as in normalize_row, so dx may be dy. */
INLINE void FN(backward_row)(const T *dy, const T *x, T *dx, ptrdiff_t n, const R *p, ptrdiff_t pitch, ptrdiff_t ahead,
                             const int varying, const int relu, const int frozen, const int stream) {
#define GRADIENT(I, P) FN(input_gradient)(dy + (I), x + (I), P, relu, frozen)
    const FN(backward_parameters) fixed = FN(load_backward)(p, pitch, 0, varying);
    ptrdiff_t i = 0;
    if (n < W) {
        T bx[VECTOR_BYTES] = {0}, bd[VECTOR_BYTES] = {0};
        memcpy(bx, x, n * sizeof(T));
        memcpy(bd, dy, n * sizeof(T));
        FN(store)(bd, FN(input_gradient)(bd, bx, fixed, relu, frozen), 0);
        memcpy(dx, bd, n * sizeof(T));
        return;
    }
    if (stream && (uintptr_t)dx % LINE) {
        FN(store)(dx, GRADIENT(0, fixed), 0);
        i = (ptrdiff_t)((LINE - (uintptr_t)dx % LINE) / sizeof(T)) % W;
    }
    const ptrdiff_t tail = n - W, end = n - (n - i) % W;
    VREAL last = {0};
    if (end < n) last = GRADIENT(tail, varying ? FN(load_backward)(p, pitch, tail, varying) : fixed);
    for (; i < end; i += W) {
        __builtin_prefetch((const char *)(dy + i) + ahead);
        if (relu || !frozen) __builtin_prefetch((const char *)(x + i) + ahead);
        FN(store)(dx + i, GRADIENT(i, varying ? FN(load_backward)(p, pitch, i, varying) : fixed), stream);
    }
    if (end < n) FN(store)(dx + tail, last, 0);
#undef GRADIENT
}

/* Rows of n elements; strides in bytes. Fetches what is `ahead` bytes further. */
static void FN(backward)(const char *dy, ptrdiff_t dy_stride, const char *x, ptrdiff_t x_stride, char *dx,
                         ptrdiff_t dx_stride, ptrdiff_t rows, ptrdiff_t n, const void *p, ptrdiff_t pitch,
                         ptrdiff_t ahead, int varying, int relu, int frozen, int stream) {
#define CASE(V, A, F, S) \
    if (varying == V && relu == A && frozen == F && stream == S) \
        for (ptrdiff_t i = 0; i < rows; i++) \
            FN(backward_row)((const T *)(dy + i * dy_stride), (const T *)(x + i * x_stride), (T *)(dx + i * dx_stride), \
                             n, (const R *)p, pitch, ahead, V, A, F, S);
#define CASES(V, A) CASE(V, A, 0, 0) CASE(V, A, 0, 1) CASE(V, A, 1, 0) CASE(V, A, 1, 1)
    CASES(0, 0) CASES(0, 1) CASES(1, 0) CASES(1, 1)
#undef CASES
#undef CASE
}

static const span_table FN(spans) = {
    sizeof(T), sizeof(R), FN(prepare), FN(expand), FN(moments_ncs), FN(moments_rc), FN(normalize), FN(reduce_ncs),
    FN(reduce_rc), FN(backward), FN(join), FN(mask),
};

#undef JOIN_
#undef JOIN
#undef FN
#undef VREAL
#undef VPART
#undef W
