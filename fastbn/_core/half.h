/* float16 and bfloat16 in memory, float32 in arithmetic; rounded to nearest even, NaN stays a quiet NaN.
 *
 * Macros, since they serve two widths of vector: VEC of float32, BITS of uint32, MEM of uint16 with as many lanes.
 * Written in integers, so that every instruction set gives the same bits (to the payload of a NaN).
 */
#ifndef FASTBN_HALF_H
#define FASTBN_HALF_H

#define SELECT(mask, a, b) (((mask) & (a)) | (~(mask) & (b)))

#define BFLOAT16_TO_REAL(v, VEC, BITS) ((VEC)(__builtin_convertvector(v, BITS) << 16))

#define REAL_TO_BFLOAT16(v, MEM, VEC, BITS) __extension__({ \
    const BITS b_ = (BITS)(v); \
    const BITS nan_ = (BITS)((v) != (v)); \
    __builtin_convertvector(SELECT(nan_, (b_ >> 16) | 0x40, (b_ + 0x7fff + ((b_ >> 16) & 1)) >> 16), MEM); })

/* Shift exponent and mantissa into place and rebias; a subnormal is normalised by an exact float32 subtraction. */
#define FLOAT16_TO_REAL(v, VEC, BITS) __extension__({ \
    const BITS h_ = __builtin_convertvector(v, BITS); \
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
    __builtin_convertvector(SELECT(inf_, special_, finite_) | sign_, MEM); })

#endif
