/* Vectors of WIDTH floats, and what the kernel needs of them on each instruction set.
 *
 * GCC's and clang's vector extensions say most of it for all of them; intrinsics stand where they
 * cannot. WIDTH and the target come from the compiler's flags (build.py).
 *
 * A chunk is 2 * WIDTH neighbouring elements, read as two vectors. Of bfloat16 the first has the
 * even elements and the second the odd ones (one operation a vector instead of two): `place` says
 * where an element of a chunk is, and everything that meets such vectors is laid out by it.
 */
#ifndef SMG_VECTORS_H
#define SMG_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define CHUNK (2 * WIDTH)

typedef float vf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * WIDTH)));
typedef uint8_t vb __attribute__((vector_size(WIDTH)));

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E4M3, FLOAT8_E5M2 };

INLINE int size_of(int dtype) {
    return dtype == FLOAT32 ? 4 : dtype == BFLOAT16 || dtype == FLOAT16 ? 2 : 1;
}

/* Where element i of a row is once the row was read. */
INLINE int64_t place(int dtype, int64_t i) {
    if (dtype != BFLOAT16) return i;
    int64_t in = i % CHUNK;
    return i - in + in / 2 + in % 2 * WIDTH;
}

#define LOAD(type, from) ({ type x_; memcpy(&x_, (from), sizeof x_); x_; })
#define STORE(to, x) ({ __typeof__(x) x_ = (x); memcpy((to), &x_, sizeof x_); })

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }

/* ---- float16 ---- */

INLINE vf of_halves(vh x) {
#if defined(__AVX512F__) && WIDTH == 16
    return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__) && WIDTH == 8
    return (vf)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
    typedef __fp16 vhf __attribute__((vector_size(2 * WIDTH)));
    return __builtin_convertvector((vhf)x, vf);
#else
    vu bits = __builtin_convertvector(x, vu), body = bits & 0x7fff;
    /* The exponent is moved by a product, which also makes subnormals normal. */
    vf value = (vf)(body << 13) * splat(0x1p112f);
    vu special = (vu)(body >= 0x7c00) & 0x7f800000u;
    return (vf)((vu)value | special | (bits & 0x8000) << 16);
#endif
}

/* ---- float8: a float16 has the same exponents and more ---- */

INLINE vf of_e5m2(vb x) { return of_halves(__builtin_convertvector(x, vh) << 8); }

/* 2**-8 of the value: the float16 with its bits, so that subnormals need no care. */
INLINE vf of_e4m3(vb x) {
    vh bits = __builtin_convertvector(x, vh), body = bits & 0x7f;
    vh nan = (vh)(body == 0x7f) & 0x7e00;
    return of_halves(((bits & 0x80) << 8) | (body << 7) | nan);
}
#define E4M3_SCALE 256.0f

/* ---- chunks ---- */

INLINE void read_chunk(int dtype, const char *from, vf *a, vf *b) {
    if (dtype == FLOAT32) {
        *a = LOAD(vf, from);
        *b = LOAD(vf, from + 4 * WIDTH);
    } else if (dtype == BFLOAT16) {
        vu x = LOAD(vu, from);
        *a = (vf)(x << 16);
        *b = (vf)(x & 0xffff0000u);
    } else if (dtype == FLOAT16) {
        *a = of_halves(LOAD(vh, from));
        *b = of_halves(LOAD(vh, from + 2 * WIDTH));
    } else if (dtype == FLOAT8_E4M3) {
        *a = of_e4m3(LOAD(vb, from));
        *b = of_e4m3(LOAD(vb, from + WIDTH));
    } else {
        *a = of_e5m2(LOAD(vb, from));
        *b = of_e5m2(LOAD(vb, from + WIDTH));
    }
}

/* Copy `bytes` < CHUNK * 4 into a chunk of zeros: what follows a row may not be ours to read. */
INLINE void copy_tail(char *to, const char *from, int64_t bytes) {
#if defined(__AVX512BW__) && WIDTH == 16
    for (int part = 0; part < 2; part++, bytes -= 64) {
        uint64_t mask = bytes >= 64 ? ~0ull : bytes <= 0 ? 0 : (1ull << bytes) - 1;
        _mm512_storeu_si512(to + 64 * part, _mm512_maskz_loadu_epi8(mask, from + 64 * part));
    }
#else
    memset(to, 0, CHUNK * 4);
    memcpy(to, from, bytes);
#endif
}

/* ---- sums across ---- */

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

#if WIDTH == 16
INLINE vf fold_halves(vf a, vf b) {
    return SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
INLINE vf fold_pairs(vf a, vf b) {
    return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
INLINE vf fold_lanes(vf a, vf b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#elif WIDTH == 8
INLINE vf fold_halves(vf a, vf b) {
    return SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
}
INLINE vf fold_pairs(vf a, vf b) {
    return SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
INLINE vf fold_lanes(vf a, vf b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
#else
INLINE vf fold_halves(vf a, vf b) { return SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7); }
INLINE vf fold_pairs(vf a, vf b) { return SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7); }
#endif

/* Element i of each lane of four: a part of the sum of x[i]. */
INLINE vf fold_four(const vf *x) {
    return fold_pairs(fold_halves(x[0], x[1]), fold_halves(x[2], x[3]));
}

/* Store the sums of four vectors a row, of `rows` <= ROWS rows, at to + row * stride. */
INLINE void store_sums(float *to, int64_t stride, const vf *x, int rows) {
#if WIDTH == 16
    vf sums = fold_lanes(fold_lanes(fold_four(x), fold_four(x + 4)),
                         fold_lanes(fold_four(x + 8), fold_four(x + 12)));
#elif WIDTH == 8
    vf sums = fold_lanes(fold_four(x), fold_four(x + 4));
#endif
    for (int r = 0; r < rows; r++) {
#if WIDTH == 4
        vf sums = fold_four(x + 4 * r);
        memcpy(to + r * stride, &sums, 16);
#else
        memcpy(to + r * stride, (const char *)&sums + 16 * r, 16);
#endif
    }
}

/* Neighbouring elements, pairs, and so on change places: what is reduced over them is everywhere. */
#if WIDTH == 16
#define REDUCE(x, with)                                                                    \
    do {                                                                                   \
        x = with(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));  \
        x = with(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));  \
        x = with(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));  \
        x = with(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));  \
    } while (0)
#elif WIDTH == 8
#define REDUCE(x, with)                                    \
    do {                                                   \
        x = with(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3)); \
        x = with(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5)); \
        x = with(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6)); \
    } while (0)
#else
#define REDUCE(x, with)                        \
    do {                                       \
        x = with(x, SHUFFLE(x, x, 2, 3, 0, 1)); \
        x = with(x, SHUFFLE(x, x, 1, 0, 3, 2)); \
    } while (0)
#endif

INLINE vf plus(vf a, vf b) { return a + b; }

INLINE float sum_of(vf x) {
    REDUCE(x, plus);
    return x[0];
}

INLINE float largest_of(vf x) {
    REDUCE(x, larger);
    return x[0];
}

/* ---- functions ---- */

/* exp(x) for x <= 0 within 2e-7 relative; 0 below -87, and nan where x is nan. Minimax
 * coefficients of 2**f on [-0.5, 0.5]. */
INLINE vf exp_of(vf x) {
    const vf magic = splat(0x1.8p23f);
    vi tiny = x < splat(-87.0f);
    vf y = choose(tiny, splat(-87.0f), x) * splat(1.4426950408889634f);
    vf shifted = y + magic;
    vf f = y - (shifted - magic);
    vf p = splat(1.5403530393381608e-4f);
    p = p * f + splat(1.3333558146428443e-3f);
    p = p * f + splat(9.618129107628477e-3f);
    p = p * f + splat(5.550410866482158e-2f);
    p = p * f + splat(2.402265069591007e-1f);
    p = p * f + splat(6.931471805599453e-1f);
    p = p * f + splat(1.0f);
    vf power = (vf)(((vi)shifted - (vi)magic + 127) << 23);
    return (vf)((vi)(p * power) & ~tiny);
}

INLINE vf tanh_of(vf x) {
    vi sign = (vi)x & (int32_t)0x80000000;
    vf t = exp_of(splat(-2.0f) * (vf)((vi)x & 0x7fffffff));
    return (vf)((vi)((splat(1.0f) - t) / (splat(1.0f) + t)) | sign);
}

#endif
