/* The level of x86-64 that this CPU and its operating system run. Built with baseline flags. */
#ifndef FASTBN_CPU_H
#define FASTBN_CPU_H

#if defined(__x86_64__)
#include <cpuid.h>

static unsigned long long fastbn_xcr0(void) {
    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return ((unsigned long long)hi << 32) | lo;
}

/* Level of the x86-64 psABI (1 to 4): every feature that -march=x86-64-vN implies, and registers the OS saves. */
static int fastbn_x86_level(void) {
    unsigned a, b, c, d, ext_c, b7;
    const unsigned v2 = bit_SSE3 | bit_SSSE3 | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT | bit_CMPXCHG16B;
    const unsigned v3 = bit_AVX | bit_F16C | bit_FMA | bit_MOVBE | bit_OSXSAVE;
    const unsigned v3_leaf7 = bit_AVX2 | bit_BMI | bit_BMI2;
    const unsigned v4_leaf7 = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
    if (!__get_cpuid(0x80000001u, &a, &b, &ext_c, &d)) return 1;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 1;
    if ((c & v2) != v2 || !(ext_c & bit_LAHF_LM)) return 1;
    if ((c & v3) != v3 || !(ext_c & bit_ABM)) return 2;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c, &d) || (b7 & v3_leaf7) != v3_leaf7) return 2;
    const unsigned long long state = fastbn_xcr0();
    if ((state & 0x06) != 0x06) return 2; /* SSE and AVX registers saved by the OS */
    if ((b7 & v4_leaf7) != v4_leaf7 || (state & 0xe6) != 0xe6) return 3;
    return 4;
}
#else
static int fastbn_x86_level(void) { return 0; }
#endif

#endif
