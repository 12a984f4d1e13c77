/* Optimizer updates over spans of contiguous memory: no Python, no threads, no allocation.
 *
 * The file includes itself once per arithmetic type, float and double, for the loops at its end; GCC vectorises them.
 * They add, multiply, divide and take roots element by element, so the bits are the same for every instruction set.
 * Half types have no loops of their own: a tile of gradients is widened to float32, the float32 loop updates the
 * float32 master, and the master is rounded into the parameter.
 */
#ifndef R

#ifndef FASTBN_OPTIM_SPAN_H
#define FASTBN_OPTIM_SPAN_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "half.h"
#include "vectors.h"

enum optim_dtype { OPTIM_FLOAT32, OPTIM_FLOAT64, OPTIM_FLOAT16, OPTIM_BFLOAT16, OPTIM_DTYPES };
enum optim_method { OPTIM_SGD, OPTIM_RMSPROP, OPTIM_ADAM, OPTIM_METHODS };
enum { OPTIM_SLOTS = 3 };

/* One parameter array. State and master are of the arithmetic type, the rest as in memory. */
typedef struct {
    void *p;                  /* INOUT */
    const void *g;            /* IN, NULL: skip this parameter */
    void *state[OPTIM_SLOTS]; /* INOUT, NULL where the method has fewer */
    float *master;            /* INOUT, half types only */
    double scale;             /* of the gradient: c/norm where it is clipped by its norm, else 1 */
    ptrdiff_t size;
    int dtype;
} optim_parameter;

/* The numbers of one step, prepared in float64; a span rounds them once to its arithmetic type.
 * What is switched off has the value that changes nothing: decay 0, low −inf, eps_inside 0, … */
typedef struct {
    double lr;                 /* learning rate, of Adam divided by 1−β₁ᵗ */
    double low, high;          /* clip by value */
    double decay;              /* λ: g ← g + λp */
    double shrink;             /* lr·λ of decoupled decay: p ← p − lr·λ·p */
    double momentum, fresh;    /* v ← momentum·v + fresh·g */
    double beta1, beta2;       /* weights of the old value in the averages of g and of g² (RMSprop's ρ is beta2) */
    double correction;         /* 1/(1−β₂ᵗ) */
    double eps_inside, eps_outside; /* of the root; one of them is 0 */
    int nesterov;
} optim_rule;

typedef void optim_loop(void *p, const void *g, void *const *state, ptrdiff_t start, ptrdiff_t n, double scale,
                        const optim_rule *rule);

#define JOIN_(name, suffix) name##_##suffix
#define JOIN(name, suffix) JOIN_(name, suffix)
#define FN(name) JOIN(name, SUFFIX)

#define R float
#define SUFFIX float32
#define SQRT sqrtf
#define WIDEN widen_float
#include "optim_span.h"
#undef R
#undef SUFFIX
#undef SQRT
#undef WIDEN

#define R double
#define SUFFIX float64
#define SQRT sqrt
#define WIDEN(v) (v)
#include "optim_span.h"
#undef R
#undef SUFFIX
#undef SQRT
#undef WIDEN
#undef FN
#undef JOIN
#undef JOIN_

/* Half types: 512 elements at a time, 2 KiB of float32 on the stack */
enum { TILE = 512, HALF_LANES = VECTOR_BYTES / 4 };
typedef float half_reals __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t half_bits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t half_memory __attribute__((vector_size(VECTOR_BYTES / 2)));

INLINE half_reals half_to_reals(half_memory v, const int bfloat16) {
    if (bfloat16) return BFLOAT16_TO_REAL(v, half_reals, half_bits);
    return FLOAT16_TO_REAL(v, half_reals, half_bits);
}
INLINE half_memory reals_to_half(half_reals v, const int bfloat16) {
    if (bfloat16) return REAL_TO_BFLOAT16(v, half_memory, half_reals, half_bits);
    return REAL_TO_FLOAT16(v, half_memory, half_reals, half_bits);
}

static ptrdiff_t at_most(ptrdiff_t n, ptrdiff_t limit) { return n < limit ? n : limit; }

/* real[i] = half[i] */
INLINE void widen_half(const uint16_t *half, float *real, ptrdiff_t n, const int bfloat16) {
    for (ptrdiff_t i = 0; i < n; i += HALF_LANES) {
        const ptrdiff_t lanes = at_most(n - i, HALF_LANES);
        half_memory h = {0};
        memcpy(&h, half + i, lanes * sizeof *half);
        const half_reals r = half_to_reals(h, bfloat16);
        memcpy(real + i, &r, lanes * sizeof *real);
    }
}

/* master[i] = p[i] wherever p is not the rounded master: somebody else wrote there, and that value counts. */
INLINE void refresh_master(const uint16_t *p, float *master, ptrdiff_t n, const int bfloat16) {
    for (ptrdiff_t i = 0; i < n; i += HALF_LANES) {
        const ptrdiff_t lanes = at_most(n - i, HALF_LANES);
        half_memory h = {0};
        half_reals m = {0};
        memcpy(&h, p + i, lanes * sizeof *p);
        memcpy(&m, master + i, lanes * sizeof *master);
        const half_bits written = (half_bits)half_to_reals(h, bfloat16);
        const half_bits rounded = (half_bits)half_to_reals(reals_to_half(m, bfloat16), bfloat16);
        m = (half_reals)SELECT((half_bits)(written == rounded), (half_bits)m, written);
        memcpy(master + i, &m, lanes * sizeof *master);
    }
}

/* p[i] = master[i], rounded to nearest even */
INLINE void narrow_master(const float *master, uint16_t *p, ptrdiff_t n, const int bfloat16) {
    for (ptrdiff_t i = 0; i < n; i += HALF_LANES) {
        const ptrdiff_t lanes = at_most(n - i, HALF_LANES);
        half_reals m = {0};
        memcpy(&m, master + i, lanes * sizeof *master);
        const half_memory h = reals_to_half(m, bfloat16);
        memcpy(p + i, &h, lanes * sizeof *p);
    }
}

INLINE void update_half(const optim_parameter *a, ptrdiff_t start, ptrdiff_t n, optim_loop *loop,
                        const optim_rule *rule, const int bfloat16) {
    for (const ptrdiff_t end = start + n; start < end; start += TILE) {
        const ptrdiff_t m = at_most(end - start, TILE);
        float g[TILE];
        uint16_t *p = (uint16_t *)a->p + start;
        widen_half((const uint16_t *)a->g + start, g, m, bfloat16);
        refresh_master(p, a->master + start, m, bfloat16);
        loop(a->master + start, g, a->state, start, m, a->scale, rule);
        narrow_master(a->master + start, p, m, bfloat16);
    }
}

/* Update the elements start … start+n of one parameter. */
static void optim_update(const optim_parameter *a, ptrdiff_t start, ptrdiff_t n, int method, const optim_rule *rule) {
    static optim_loop *const loops[OPTIM_METHODS][2] = {
        {sgd_float32, sgd_float64}, {rmsprop_float32, rmsprop_float64}, {adam_float32, adam_float64}};
    if (!a->g) return;
    switch (a->dtype) {
    case OPTIM_FLOAT16: update_half(a, start, n, loops[method][0], rule, 0); break;
    case OPTIM_BFLOAT16: update_half(a, start, n, loops[method][0], rule, 1); break;
    case OPTIM_FLOAT32:
        loops[method][0]((float *)a->p + start, (const float *)a->g + start, a->state, start, n, a->scale, rule);
        break;
    default:
        loops[method][1]((double *)a->p + start, (const double *)a->g + start, a->state, start, n, a->scale, rule);
    }
}

/* Σ (unit·g)² over the elements start … start+n of one gradient, in float64; unit is a power of two. */
static double optim_squares(const optim_parameter *a, ptrdiff_t start, ptrdiff_t n, double unit) {
    double sum = 0;
    if (!a->g) return 0;
    if (a->dtype == OPTIM_FLOAT32) return squares_float32((const float *)a->g + start, n, unit);
    if (a->dtype == OPTIM_FLOAT64) return squares_float64((const double *)a->g + start, n, unit);
    for (const ptrdiff_t end = start + n; start < end; start += TILE) {
        const ptrdiff_t m = at_most(end - start, TILE);
        float g[TILE];
        widen_half((const uint16_t *)a->g + start, g, m, a->dtype == OPTIM_BFLOAT16);
        sum += squares_float32(g, m, unit);
    }
    return sum;
}

#endif

#else /* once per arithmetic type R, with SUFFIX (ends every name), SQRT, and WIDEN (vector of R -> of float64) */

/* optim_rule, rounded once */
typedef struct {
    R lr, scale, low, high, decay, shrink, momentum, fresh, beta1, weight1, beta2, weight2, correction, eps_inside,
        eps_outside;
} FN(scalars);

INLINE FN(scalars) FN(rounded)(const optim_rule *rule, double scale) {
    return (FN(scalars)){
        .lr = (R)rule->lr, .scale = (R)scale, .low = (R)rule->low, .high = (R)rule->high, .decay = (R)rule->decay,
        .shrink = (R)rule->shrink, .momentum = (R)rule->momentum, .fresh = (R)rule->fresh,
        .beta1 = (R)rule->beta1, .weight1 = (R)(1 - rule->beta1),
        .beta2 = (R)rule->beta2, .weight2 = (R)(1 - rule->beta2), .correction = (R)rule->correction,
        .eps_inside = (R)rule->eps_inside, .eps_outside = (R)rule->eps_outside};
}

/* Clip, then decay. NaN passes both comparisons. A parameter that is not finite stays out of g without decay. */
INLINE R FN(prepared)(R g, R p, const FN(scalars) k) {
    g *= k.scale;
    g = g < k.low ? k.low : g;
    g = g > k.high ? k.high : g;
    return k.decay != 0 ? g + k.decay * p : g;
}

/* β·old + (1−β)·fresh. Near 1, β and 1−β rounded to float32 no longer add up to 1 (0.999: off by 1.3e-5 of 1−β, and
 * so is the average), but old + (1−β)(fresh − old) needs only 1−β. For small β that would cancel, the plain form
 * does not. `near_one` promises β ≥ 0.5 at compile time: SSE takes twice as long to choose per element. */
INLINE R FN(average)(R old, R fresh, R beta, R weight, const int near_one) {
    return near_one || beta >= (R)0.5 ? old + weight * (fresh - old) : beta * old + weight * fresh;
}

/* v ← μv + (1−d)g;  p ← p − lr·(v, or g + μv for Nesterov, or g without momentum) */
INLINE void FN(sgd_body)(R *restrict p, const R *restrict g, R *restrict momentum_buffer, ptrdiff_t n,
                         const FN(scalars) k, const int momentum, const int nesterov) {
    for (ptrdiff_t i = 0; i < n; i++) {
        R step = FN(prepared)(g[i], p[i], k);
        if (momentum) {
            const R v = k.momentum * momentum_buffer[i] + k.fresh * step;
            momentum_buffer[i] = v;
            step = nesterov ? step + k.momentum * v : v;
        }
        p[i] -= k.lr * step;
    }
}

static void FN(sgd)(void *p, const void *g, void *const *state, ptrdiff_t start, ptrdiff_t n, double scale,
                    const optim_rule *rule) {
    const FN(scalars) k = FN(rounded)(rule, scale);
    R *const momentum_buffer = state[0];
    if (!momentum_buffer) FN(sgd_body)(p, g, NULL, n, k, 0, 0);
    else if (rule->nesterov) FN(sgd_body)(p, g, momentum_buffer + start, n, k, 1, 1);
    else FN(sgd_body)(p, g, momentum_buffer + start, n, k, 1, 0);
}

/* s ← ρs + (1−ρ)g²;  p ← p − lr·g/√s, centered: s − ḡ² for s, with momentum: v ← μv + g/√s, p ← p − lr·v */
INLINE void FN(rmsprop_body)(R *restrict p, const R *restrict g, R *restrict square_avg, R *restrict momentum_buffer,
                             R *restrict grad_avg, ptrdiff_t n, const FN(scalars) k, const int momentum,
                             const int centered) {
    for (ptrdiff_t i = 0; i < n; i++) {
        const R x = FN(prepared)(g[i], p[i], k);
        R s = FN(average)(square_avg[i], x * x, k.beta2, k.weight2, 0);
        square_avg[i] = s;
        if (centered) {
            const R mean = FN(average)(grad_avg[i], x, k.beta2, k.weight2, 0);
            grad_avg[i] = mean;
            s -= mean * mean;
            s = s < 0 ? 0 : s; /* a constant gradient: rounding can leave less than nothing. NaN stays. */
        }
        R step = x / (SQRT(s + k.eps_inside) + k.eps_outside);
        if (momentum) {
            step += k.momentum * momentum_buffer[i];
            momentum_buffer[i] = step;
        }
        p[i] -= k.lr * step;
    }
}

static void FN(rmsprop)(void *p, const void *g, void *const *state, ptrdiff_t start, ptrdiff_t n, double scale,
                        const optim_rule *rule) {
    const FN(scalars) k = FN(rounded)(rule, scale);
    R *const square_avg = (R *)state[0] + start, *const momentum_buffer = state[1], *const grad_avg = state[2];
    if (momentum_buffer && grad_avg)
        FN(rmsprop_body)(p, g, square_avg, momentum_buffer + start, grad_avg + start, n, k, 1, 1);
    else if (momentum_buffer) FN(rmsprop_body)(p, g, square_avg, momentum_buffer + start, NULL, n, k, 1, 0);
    else if (grad_avg) FN(rmsprop_body)(p, g, square_avg, NULL, grad_avg + start, n, k, 0, 1);
    else FN(rmsprop_body)(p, g, square_avg, NULL, NULL, n, k, 0, 0);
}

/* v ← β₁v + (1−β₁)g;  s ← β₂s + (1−β₂)g²;  p ← p − lr·v̂/√ŝ, AMSGrad: the largest s so far in place of s.
 * Decoupled decay is subtracted in the same rounding: p·(1 − lr·λ) would round 1 − lr·λ, by 3e-8 of some 1e-5. */
INLINE void FN(adam_body)(R *restrict p, const R *restrict g, R *restrict exp_avg, R *restrict exp_avg_sq,
                          R *restrict max_exp_avg_sq, ptrdiff_t n, const FN(scalars) k, const int amsgrad,
                          const int near_one) {
    for (ptrdiff_t i = 0; i < n; i++) {
        const R x = FN(prepared)(g[i], p[i], k);
        const R v = FN(average)(exp_avg[i], x, k.beta1, k.weight1, near_one);
        R s = FN(average)(exp_avg_sq[i], x * x, k.beta2, k.weight2, near_one);
        exp_avg[i] = v;
        exp_avg_sq[i] = s;
        if (amsgrad) {
            s = max_exp_avg_sq[i] > s ? max_exp_avg_sq[i] : s;
            max_exp_avg_sq[i] = s;
        }
        const R step = k.lr * v / (SQRT(s * k.correction + k.eps_inside) + k.eps_outside);
        p[i] -= k.shrink != 0 ? step + k.shrink * p[i] : step;
    }
}

static void FN(adam)(void *p, const void *g, void *const *state, ptrdiff_t start, ptrdiff_t n, double scale,
                     const optim_rule *rule) {
    const FN(scalars) k = FN(rounded)(rule, scale);
    R *const exp_avg = (R *)state[0] + start, *const exp_avg_sq = (R *)state[1] + start;
    if (k.beta1 < (R)0.5 || k.beta2 < (R)0.5) {
        if (state[2]) FN(adam_body)(p, g, exp_avg, exp_avg_sq, (R *)state[2] + start, n, k, 1, 0);
        else FN(adam_body)(p, g, exp_avg, exp_avg_sq, NULL, n, k, 0, 0);
    } else if (state[2]) FN(adam_body)(p, g, exp_avg, exp_avg_sq, (R *)state[2] + start, n, k, 1, 1);
    else FN(adam_body)(p, g, exp_avg, exp_avg_sq, NULL, n, k, 0, 1);
}

/* Σ (unit·g)²: LANES partial sums, added up as a fixed tree. The square of a float32 is exact in float64. */
INLINE double FN(squares_body)(const R *g, ptrdiff_t n, double unit, const int scaled) {
    typedef R part __attribute__((vector_size(WIDE * sizeof(R))));
    vdouble sums[PARTS] = {{0}};
    R tail[LANES] = {0};
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        const R *block = g + i;
        if (n - i < LANES) block = memcpy(tail, block, (n - i) * sizeof(R));
        for (int j = 0; j < PARTS; j++) {
            part v;
            memcpy(&v, block + j * WIDE, sizeof v);
            vdouble x = WIDEN(v);
            if (scaled) x *= unit;
            sums[j] += x * x;
        }
    }
    return sum_lanes(sums);
}

static double FN(squares)(const R *g, ptrdiff_t n, double unit) {
    return unit == 1 ? FN(squares_body)(g, n, unit, 0) : FN(squares_body)(g, n, unit, 1);
}

#endif
