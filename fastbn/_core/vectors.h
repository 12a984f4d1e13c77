/* Vectors as wide as the instruction set: the one place that knows registers.
 *
 * Everything here is written with GCC's vector extensions, so one source serves every instruction set; only the
 * streaming store and a conversion need intrinsics. Results never depend on the width: sums keep LANES partial sums, whatever the
 * number of registers they take (one AVX-512, two AVX2, four SSE or NEON registers of float32).
 */
#ifndef FASTBN_VECTORS_H
#define FASTBN_VECTORS_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

enum {
    LANES = 16,                     /* partial sums of a reduction along a contiguous span */
    WIDE = VECTOR_BYTES / 8,        /* float64 values in a register */
    PARTS = LANES / WIDE,           /* float64 registers that hold LANES values */
    FLUSH = 16,                     /* additions to a partial sum before it is added to the sum of the block */
    LINE = 64                       /* bytes of a cache line */
};

typedef double vdouble __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t vint64 __attribute__((vector_size(VECTOR_BYTES)));

#define INLINE static inline __attribute__((always_inline))

/* float32 to float64. Intrinsics where GCC 12's __builtin_convertvector takes two conversions and a shuffle. */
typedef float vnarrow __attribute__((vector_size(WIDE * sizeof(float))));
typedef uint32_t vnarrow_bits __attribute__((vector_size(WIDE * sizeof(float))));
INLINE vdouble widen_float(vnarrow v) {
#if defined(__AVX512F__)
    return (vdouble)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX__)
    return (vdouble)_mm256_cvtps_pd((__m128)v);
#else
    return __builtin_convertvector(v, vdouble);
#endif
}

INLINE vdouble load_wide(const double *p) { vdouble v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_wide(double *p, vdouble v) { memcpy(p, &v, sizeof v); }

/* a - b. A fused a·1 - b rounds once too, to the same bits, but runs on the multipliers where they are not the adders. */
typedef float vfloat __attribute__((vector_size(VECTOR_BYTES)));
INLINE vfloat subtract_float(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    __m512 one = _mm512_set1_ps(1);
    __asm__("" : "+v"(one)); /* or the compiler would see through it */
    return (vfloat)_mm512_fmsub_ps((__m512)a, one, (__m512)b);
#elif defined(__FMA__)
    __m256 one = _mm256_set1_ps(1);
    __asm__("" : "+x"(one));
    return (vfloat)_mm256_fmsub_ps((__m256)a, one, (__m256)b);
#else
    return a - b;
#endif
}
INLINE vdouble subtract_double(vdouble a, vdouble b) { return a - b; }

/* Sum of LANES values as a fixed tree: the same order on every instruction set. */
INLINE double sum_lanes(const vdouble *parts) {
    double lane[LANES];
    memcpy(lane, parts, sizeof lane);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

/* sums += part, part = 0; returns 0, the number of values now in part */
INLINE int flush_sums(vdouble *sums, vdouble *part) {
#pragma GCC unroll 8
    for (int q = 0; q < PARTS; q++) {
        sums[q] += part[q];
        part[q] = (vdouble){0};
    }
    return 0;
}

/* One bit per lane of a comparison's result, whose lanes are `size` bytes of ones or zeros */
INLINE unsigned bits_of(const void *mask, const int size) {
#if defined(__AVX512DQ__)
    __m512i m;
    memcpy(&m, mask, sizeof m);
    return size == 4 ? _mm512_movepi32_mask(m) : _mm512_movepi64_mask(m);
#elif defined(__AVX__)
    __m256i m;
    memcpy(&m, mask, sizeof m);
    return size == 4 ? _mm256_movemask_ps((__m256)m) : _mm256_movemask_pd((__m256d)m);
#elif defined(__SSE2__)
    __m128i m;
    memcpy(&m, mask, sizeof m);
    return size == 4 ? _mm_movemask_ps((__m128)m) : _mm_movemask_pd((__m128d)m);
#else
    unsigned bits = 0;
    for (int i = 0; i < VECTOR_BYTES / size; i++) bits |= (unsigned)(((const uint8_t *)mask)[i * size] & 1) << i;
    return bits;
#endif
}

/* Write or read `count` bits, at most LANES, from bit `at` on: at once where they are LANES and begin a byte */
INLINE void set_bits(uint8_t *bits, ptrdiff_t at, unsigned word, ptrdiff_t count) {
    if (at % 8 == 0 && count == LANES) {
        bits[at / 8] = (uint8_t)word;
        bits[at / 8 + 1] = (uint8_t)(word >> 8);
        return;
    }
    for (ptrdiff_t i = 0; i < count; i++) {
        uint8_t *byte = bits + (at + i) / 8;
        const int place = (int)((at + i) % 8);
        *byte = (uint8_t)((*byte & ~(1u << place)) | ((word >> i & 1) << place));
    }
}

INLINE unsigned get_bits(const uint8_t *bits, ptrdiff_t at, ptrdiff_t count) {
    unsigned word = 0;
    if (at % 8 == 0 && count == LANES) return bits[at / 8] | (unsigned)bits[at / 8 + 1] << 8;
    for (ptrdiff_t i = 0; i < count; i++) word |= (unsigned)(bits[(at + i) / 8] >> (at + i) % 8 & 1) << i;
    return word;
}

/* Store past the cache; p is aligned to `bytes`, the size of the vector. */
INLINE void stream_bytes(void *p, const void *v, size_t bytes) {
#if !defined(__SANITIZE_ADDRESS__) /* GCC's sees plain stores alone */
#if defined(__AVX512F__)
    if (bytes == 64) { __m512i t; memcpy(&t, v, 64); _mm512_stream_si512((__m512i *)p, t); return; }
#endif
#if defined(__AVX__)
    if (bytes == 32) { __m256i t; memcpy(&t, v, 32); _mm256_stream_si256((__m256i *)p, t); return; }
#endif
#if defined(__x86_64__)
    if (bytes == 16) { __m128i t; memcpy(&t, v, 16); _mm_stream_si128((__m128i *)p, t); return; }
    if (bytes == 8) { long long t; memcpy(&t, v, 8); _mm_stream_si64((long long *)p, t); return; }
#endif
#endif
    memcpy(p, v, bytes);
}

static void copy_span(const char *source, char *target, ptrdiff_t size, int stream) {
    ptrdiff_t i = 0;
    if (stream && (uintptr_t)target % LINE == 0)
        for (; i + VECTOR_BYTES <= size; i += VECTOR_BYTES) stream_bytes(target + i, source + i, VECTOR_BYTES);
    memcpy(target + i, source + i, size - i);
}

/* Built with FASTBN_BOUNDSCHECK=1: whether what a kernel hands to a span lies within its array */
#ifndef FASTBN_CHECKED
#define FASTBN_CHECKED 0
#endif
static void expect(int within, const char *what) {
    if (within) return;
    fprintf(stderr, "fastbn: out of bounds: %s\n", what);
    abort();
}

static double seconds_now(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* A flag between threads: whatever else they see, they see it sooner or later. */
INLINE int flag(const int *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
INLINE void set_flag(int *p) { __atomic_store_n(p, 1, __ATOMIC_RELAXED); }

/* Make streamed stores visible to the other threads. */
INLINE void stream_fence(void) {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

#endif
