/* float16 and bfloat16 in memory, float32 in arithmetic; rounded to nearest even, NaN stays a quiet NaN.
 *
 * Macros, since they serve two widths of vector: VEC of float32, BITS of uint32, MEM of uint16 with as many lanes.
 * Written in integers; float16 by the instructions of F16C where there are some, which give the same bits (to the
 * payload of a NaN).
 */
#ifndef FASTBN_HALF_H
#define FASTBN_HALF_H

#include "vectors.h"

#define SELECT(mask, a, b) (((mask) & (a)) | (~(mask) & (b)))

/* uint16 to uint32 and back, for which GCC 12's __builtin_convertvector takes shuffles; 2, 4, 8 or 16 lanes */
INLINE void widen_bits(const void *narrow, void *wide, const size_t lanes) {
#if defined(__AVX512F__)
    if (lanes == 16) {
        __m256i n;
        memcpy(&n, narrow, sizeof n);
        const __m512i w = _mm512_cvtepu16_epi32(n);
        memcpy(wide, &w, sizeof w);
        return;
    }
#endif
#if defined(__AVX2__)
    __m128i n = _mm_setzero_si128();
    memcpy(&n, narrow, lanes * sizeof(uint16_t));
    const __m256i w = _mm256_cvtepu16_epi32(n);
    memcpy(wide, &w, lanes * sizeof(uint32_t));
    return;
#elif defined(__SSE4_1__)
    if (lanes == 4) {
        const __m128i w = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)narrow));
        memcpy(wide, &w, sizeof w);
        return;
    }
#endif
    for (size_t i = 0; i < lanes; i++) ((uint32_t *)wide)[i] = ((const uint16_t *)narrow)[i];
}
INLINE void narrow_bits(const void *wide, void *narrow, const size_t lanes) {
#if defined(__AVX512F__)
    if (lanes == 16) {
        __m512i w;
        memcpy(&w, wide, sizeof w);
        const __m256i n = _mm512_cvtepi32_epi16(w);
        memcpy(narrow, &n, sizeof n);
        return;
    }
#endif
#if defined(__AVX2__)
    if (lanes == 8) {
        __m128i low, high;
        memcpy(&low, wide, sizeof low);
        memcpy(&high, (const char *)wide + sizeof low, sizeof high);
        const __m128i n = _mm_packus_epi32(low, high);
        memcpy(narrow, &n, sizeof n);
        return;
    }
#endif
#if defined(__SSE4_1__)
    if (lanes == 4) {
        __m128i w;
        memcpy(&w, wide, sizeof w);
        _mm_storel_epi64((__m128i *)narrow, _mm_packus_epi32(w, w));
        return;
    }
#endif
    for (size_t i = 0; i < lanes; i++) ((uint16_t *)narrow)[i] = (uint16_t)((const uint32_t *)wide)[i];
}
#define WIDEN_BITS(v, BITS) __extension__({ \
    const __typeof__(v) n_ = (v); \
    BITS w_; \
    widen_bits(&n_, &w_, sizeof w_ / sizeof(uint32_t)); \
    w_; })
#define NARROW_BITS(v, MEM) __extension__({ \
    const __typeof__(v) w_ = (v); \
    MEM n_; \
    narrow_bits(&w_, &n_, sizeof w_ / sizeof(uint32_t)); \
    n_; })

#define BFLOAT16_TO_REAL(v, VEC, BITS) ((VEC)(WIDEN_BITS(v, BITS) << 16))

#define REAL_TO_BFLOAT16(v, MEM, VEC, BITS) __extension__({ \
    const BITS b_ = (BITS)(v); \
    const BITS nan_ = (BITS)((v) != (v)); \
    NARROW_BITS(((b_ + ((0x7fff + ((b_ >> 16) & 1)) & ~nan_)) >> 16) | (nan_ & 0x40), MEM); })

#if defined(__F16C__)
#define FLOAT16_TO_REAL(v, VEC, BITS) __extension__({ \
    const __typeof__(v) h_ = (v); \
    VEC r_; \
    half_to_real(&h_, &r_, sizeof r_ / sizeof(float)); \
    r_; })
#define REAL_TO_FLOAT16(v, MEM, VEC, BITS) __extension__({ \
    const VEC r_ = (v); \
    MEM h_; \
    real_to_half(&r_, &h_, sizeof r_ / sizeof(float)); \
    h_; })

/* 4, 8 or 16 lanes */
INLINE void half_to_real(const void *half, void *real, const size_t lanes) {
#if defined(__AVX512F__)
    if (lanes == 16) {
        __m256i h;
        memcpy(&h, half, sizeof h);
        const __m512 r = _mm512_cvtph_ps(h);
        memcpy(real, &r, sizeof r);
        return;
    }
#endif
    __m128i h = _mm_setzero_si128();
    memcpy(&h, half, lanes * sizeof(uint16_t));
    const __m256 r = _mm256_cvtph_ps(h);
    memcpy(real, &r, lanes * sizeof(float));
}
INLINE void real_to_half(const void *real, void *half, const size_t lanes) {
#if defined(__AVX512F__)
    if (lanes == 16) {
        __m512 r;
        memcpy(&r, real, sizeof r);
        const __m256i h = _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT);
        memcpy(half, &h, sizeof h);
        return;
    }
#endif
    __m256 r = _mm256_setzero_ps();
    memcpy(&r, real, lanes * sizeof(float));
    const __m128i h = _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT);
    memcpy(half, &h, lanes * sizeof(uint16_t));
}
#else
/* Shift exponent and mantissa into place and rebias; a subnormal is normalised by an exact float32 subtraction. */
#define FLOAT16_TO_REAL(v, VEC, BITS) __extension__({ \
    const BITS h_ = WIDEN_BITS(v, BITS); \
    const BITS m_ = (h_ & 0x7fff) << 13, sign_ = (h_ & 0x8000) << 16, exponent_ = m_ & 0x0f800000; \
    const BITS special_ = (BITS)(exponent_ == 0x0f800000), tiny_ = (BITS)(exponent_ == 0); \
    const BITS quiet_ = (BITS)((h_ & 0x7fff) > 0x7c00) & 0x00400000; \
    const BITS normal_ = m_ + 0x38000000 + (special_ & 0x38000000); \
    const BITS magic_ = (BITS){0} + 0x38800000; /* 2^-14 */ \
    const BITS small_ = (BITS)((VEC)(m_ + magic_) - (VEC)magic_); \
    (VEC)(SELECT(tiny_, small_, normal_ | quiet_) | sign_); })

#define REAL_TO_FLOAT16(v, MEM, VEC, BITS) __extension__({ \
    const BITS b_ = (BITS)(v), u_ = b_ & 0x7fffffff, sign_ = (b_ >> 16) & 0x8000; \
    const BITS nan_ = (BITS)(u_ > 0x7f800000), inf_ = (BITS)(u_ >= 0x47800000), tiny_ = (BITS)(u_ < 0x38800000); \
    const BITS half_ = (BITS){0} + 0x3f000000; /* adding 0.5 rounds a subnormal at its last place */ \
    const BITS small_ = (BITS)((VEC)u_ + (VEC)half_) - half_; \
    const BITS normal_ = (u_ + 0xc8000fff + ((u_ >> 13) & 1)) >> 13; \
    const BITS finite_ = SELECT(tiny_, small_, normal_); \
    const BITS special_ = SELECT(nan_, ((u_ >> 13) & 0x3ff) | 0x7e00, (BITS){0} + 0x7c00); \
    NARROW_BITS(SELECT(inf_, special_, finite_) | sign_, MEM); })

#endif /* F16C */

#endif
