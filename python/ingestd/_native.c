/* Sums, copies and float32 accumulation for the Python package, called through ctypes (native.py), which releases the
 * interpreter's lock. No Python.h. Everything here has a counterpart in numpy that gives the same bits.
 *
 * Built with -O3 -ffp-contract=off: a product and a sum must round twice, as documented in docs/tensors.md. With
 * -fno-trapping-math, which changes no result, the compiler may compute both sides of a choice. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define HARDWARE_CRC 1
#define CRC_TARGET __attribute__((target("sse4.2")))
#define CRC8(crc, word) _mm_crc32_u64(crc, word)
#define CRC1(crc, byte) _mm_crc32_u8(crc, byte)
#define WIDE __attribute__((target("avx2")))
#if __GNUC__ >= 9 || __clang_major__ >= 8
#define FOLDING 1
#define FOLD_TARGET __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.2")))
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#define HARDWARE_CRC 1
#define CRC_TARGET __attribute__((target("+crc")))
#define CRC8(crc, word) __crc32cd((uint32_t)(crc), word)
#define CRC1(crc, byte) __crc32cb(crc, byte)
#define HWCAP_CRC32_BIT (1ul << 7)
#endif

#define INLINE static inline __attribute__((always_inline))
#define API __attribute__((visibility("default")))

/* What native.py must find, or it does without this library. */
API int ingestd_abi(void) { return 3; }

/* CRC-32C, reflected. Shifting a sum by n bytes of zeros is a product with x^(8n) modulo the polynomial. */

#define POLY 0x82F63B78u
#define LONG 8192 /* bytes of each of three lanes that are summed side by side */
#define SHORT 256

static uint32_t table[8][256];
static uint32_t powers[64]; /* x^(2^n) */
static uint32_t shift_long[4][256], shift_short[4][256];
static int hardware_crc, wide;
#ifdef FOLDING
static int folding;
static uint64_t fold_turn[2], fold_block[2], fold_lanes[8];
#endif
static float f8_values[2][256];

static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = b & 1 ? (b >> 1) ^ POLY : b >> 1;
    }
    return product;
}

/* x^(n * 2^k) */
static uint32_t power(uint64_t n, int k) {
    uint32_t p = 1u << 31;
    for (; n; n >>= 1, k++)
        if (n & 1) p = multiply(powers[k], p);
    return p;
}

/* x^(8n) */
static uint32_t power_of_bytes(uint64_t n) { return power(n, 3); }

static void make_shift(uint32_t into[4][256], uint64_t n) {
    uint32_t p = power_of_bytes(n);
    for (int k = 0; k < 4; k++)
        for (uint32_t b = 0; b < 256; b++) into[k][b] = multiply(p, b << (8 * k));
}

INLINE uint32_t shifted(const uint32_t by[4][256], uint32_t crc) {
    return by[0][crc & 255] ^ by[1][crc >> 8 & 255] ^ by[2][crc >> 16 & 255] ^ by[3][crc >> 24];
}

#ifdef FOLDING
/* What moves 128 bits by n bytes: for the first half, and for the second. The product of two reflected numbers of 64 bits
 * is one bit short of 128, which is a multiplication by x, so each factor has one power less. */
static void make_factor(uint64_t into[2], uint64_t n) {
    into[0] = (uint64_t)power(8 * n + 63, 0) << 32;
    into[1] = (uint64_t)power(8 * n - 1, 0) << 32;
}
#endif

/* The value of an 8-bit float. */
static float decode_f8(uint8_t b, int mantissa_bits, int bias, int has_infinity) {
    int exponent = (b & 127) >> mantissa_bits, mantissa = b & ((1 << mantissa_bits) - 1);
    int most = (127 >> mantissa_bits);
    uint32_t bits = (uint32_t)(b & 128) << 24;
    float f;
    if (has_infinity ? exponent == most : (b & 127) == 127) {
        bits |= 0x7F800000u | (has_infinity && mantissa == 0 ? 0 : 0x400000u);
        memcpy(&f, &bits, 4);
        return f;
    }
    float step = 1; /* 2^(1 - bias - mantissa_bits), the smallest subnormal */
    for (int i = 0; i < bias + mantissa_bits - 1; i++) step /= 2;
    f = (float)(exponent ? (1 << mantissa_bits) | mantissa : mantissa) * step;
    for (int i = 1; i < exponent; i++) f *= 2;
    return b & 128 ? -f : f;
}

__attribute__((constructor)) static void prepare(void) {
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t crc = n;
        for (int k = 0; k < 8; k++) crc = crc & 1 ? (crc >> 1) ^ POLY : crc >> 1;
        table[0][n] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int n = 0; n < 256; n++) table[k][n] = (table[k - 1][n] >> 8) ^ table[0][table[k - 1][n] & 255];
    powers[0] = 1u << 30;
    for (int n = 1; n < 64; n++) powers[n] = multiply(powers[n - 1], powers[n - 1]);
    make_shift(shift_long, LONG);
    make_shift(shift_short, SHORT);
    for (int b = 0; b < 256; b++) {
        f8_values[0][b] = decode_f8((uint8_t)b, 3, 7, 0);
        f8_values[1][b] = decode_f8((uint8_t)b, 2, 15, 1);
    }
#if defined(__x86_64__)
    __builtin_cpu_init();
    hardware_crc = __builtin_cpu_supports("sse4.2");
    wide = __builtin_cpu_supports("avx2");
#ifdef FOLDING
    make_factor(fold_turn, 256);
    make_factor(fold_block, 64);
    for (int i = 0; i < 3; i++) make_factor(fold_lanes + 2 * i, 48 - 16 * i);
    folding = hardware_crc && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
#endif
#elif defined(HARDWARE_CRC)
    hardware_crc = (getauxval(AT_HWCAP) & HWCAP_CRC32_BIT) != 0;
#endif
}

INLINE uint64_t load8(const uint8_t *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

static uint32_t crc_by_table(uint32_t crc, const uint8_t *p, size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t x = load8(p) ^ crc;
        crc = table[7][x & 255] ^ table[6][x >> 8 & 255] ^ table[5][x >> 16 & 255] ^ table[4][x >> 24 & 255] ^
              table[3][x >> 32 & 255] ^ table[2][x >> 40 & 255] ^ table[1][x >> 48 & 255] ^ table[0][x >> 56];
    }
    for (; n; n--) crc = (crc >> 8) ^ table[0][(crc ^ *p++) & 255];
    return crc;
}

#ifdef HARDWARE_CRC
/* The instruction takes three cycles and one can begin in each, so three lanes go side by side (Mark Adler's way). */
#define LANES(size, shift)                                                                    \
    for (; n >= 3 * (size); p += 3 * (size), n -= 3 * (size)) {                                   \
        uint64_t c1 = 0, c2 = 0;                                                              \
        for (size_t i = 0; i < (size); i += 8) {                                              \
            c0 = CRC8(c0, load8(p + i));                                                      \
            c1 = CRC8(c1, load8(p + i + (size)));                                             \
            c2 = CRC8(c2, load8(p + i + 2 * (size)));                                         \
        }                                                                                     \
        c0 = shifted(shift, (uint32_t)c0) ^ (uint32_t)c1;                                     \
        c0 = shifted(shift, (uint32_t)c0) ^ (uint32_t)c2;                                     \
    }

CRC_TARGET static uint32_t crc_by_hardware(uint32_t crc, const uint8_t *p, size_t n) {
    uint64_t c0 = crc;
    LANES(LONG, shift_long)
    LANES(SHORT, shift_short)
    for (; n >= 8; p += 8, n -= 8) c0 = CRC8(c0, load8(p));
    uint32_t c = (uint32_t)c0;
    for (; n; n--) c = CRC1(c, *p++);
    return c;
}
#endif

#ifdef FOLDING
/* The sum in 512 bits at a time, as internal/crc32c does it in Go: an accumulator times a power of x is added to what lies
 * further on. 16 bytes are left at the end. */
#define AHEAD 1024 /* asked for by copies past the caches; the others are the worse for it */
#define FOLD_LEAST 256

enum { SUM, COPY, STREAM };

FOLD_TARGET INLINE __m512i fold(__m512i a, __m512i by, __m512i next) {
    __m512i low = _mm512_clmulepi64_epi128(a, by, 0x00), high = _mm512_clmulepi64_epi128(a, by, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96);
}

FOLD_TARGET INLINE __m512i take(uint8_t *dst, const uint8_t *p, int what) {
    __m512i x = _mm512_loadu_si512(p);
    if (what == COPY) _mm512_storeu_si512(dst, x);
    if (what == STREAM) _mm512_stream_si512((void *)dst, x);
    return x;
}

FOLD_TARGET INLINE __m512i factor(const uint64_t f[2]) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)f));
}

/* n is a multiple of 64 and at least FOLD_LEAST; dst is on 64 bytes for STREAM. */
FOLD_TARGET INLINE uint32_t fold_all(uint32_t crc, uint8_t *dst, const uint8_t *p, size_t n, int what) {
    __m512i turn = factor(fold_turn), block = factor(fold_block);
    __m512i a = take(dst, p, what), b = take(dst + 64, p + 64, what);
    __m512i c = take(dst + 128, p + 128, what), d = take(dst + 192, p + 192, what);
    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    size_t i = 256;
    for (; i + 256 <= n; i += 256) {
        if (what == STREAM)
            for (int line = 0; line < 256; line += 64) _mm_prefetch((const char *)p + i + AHEAD + line, _MM_HINT_NTA);
        a = fold(a, turn, take(dst + i, p + i, what));
        b = fold(b, turn, take(dst + i + 64, p + i + 64, what));
        c = fold(c, turn, take(dst + i + 128, p + i + 128, what));
        d = fold(d, turn, take(dst + i + 192, p + i + 192, what));
    }
    a = fold(fold(fold(a, block, b), block, c), block, d);
    for (; i < n; i += 64) a = fold(a, block, take(dst + i, p + i, what));
    __m512i lanes = fold(a, _mm512_loadu_si512(fold_lanes), _mm512_setzero_si512());
    __m128i x = _mm_xor_si128(_mm512_extracti32x4_epi32(lanes, 0), _mm512_extracti32x4_epi32(lanes, 1));
    x = _mm_xor_si128(x, _mm_xor_si128(_mm512_extracti32x4_epi32(lanes, 2), _mm512_extracti32x4_epi32(a, 3)));
    return (uint32_t)CRC8(CRC8(0, (uint64_t)_mm_cvtsi128_si64(x)), (uint64_t)_mm_extract_epi64(x, 1));
}

FOLD_TARGET static uint32_t fold_sum(uint32_t crc, const uint8_t *p, size_t n) {
    return fold_all(crc, (uint8_t *)p, p, n, SUM); /* stores nothing */
}

FOLD_TARGET static uint32_t fold_copy(uint32_t crc, uint8_t *dst, const uint8_t *p, size_t n) {
    return fold_all(crc, dst, p, n, COPY);
}

FOLD_TARGET static uint32_t fold_stream(uint32_t crc, uint8_t *dst, const uint8_t *p, size_t n) {
    return fold_all(crc, dst, p, n, STREAM);
}
#endif

static uint32_t crc_of(uint32_t crc, const uint8_t *p, size_t n) {
#ifdef FOLDING
    if (folding && n >= FOLD_LEAST) {
        size_t whole = n & ~(size_t)63;
        crc = fold_sum(crc, p, whole);
        p += whole, n -= whole;
    }
#endif
#ifdef HARDWARE_CRC
    if (hardware_crc) return crc_by_hardware(crc, p, n);
#endif
    return crc_by_table(crc, p, n);
}

/* CRC-32C of n bytes, going on from crc. */
API uint32_t ingestd_crc32c(uint32_t crc, const uint8_t *p, size_t n) { return ~crc_of(~crc, p, n); }

/* The same without the instruction, for tests. */
API uint32_t ingestd_crc32c_table(uint32_t crc, const uint8_t *p, size_t n) { return ~crc_by_table(~crc, p, n); }

/* Whether sums are folded; on and off, where the machine can, for tests. Not while another thread sums. */
API int ingestd_crc32c_folding(int on) {
#ifdef FOLDING
    static int can = -1;
    if (can < 0) can = folding;
    folding = can && on;
    return folding;
#else
    (void)on;
    return 0;
#endif
}

/* CRC-32C of a followed by b, where b has n bytes. */
API uint32_t ingestd_crc32c_combine(uint32_t a, uint32_t b, uint64_t n) { return multiply(power_of_bytes(n), a) ^ b; }

#ifdef FOLDING
static uint32_t copy_folding(uint8_t *dst, const uint8_t *src, size_t n, uint32_t crc, int past_caches) {
    size_t first = -(uintptr_t)dst & 63, whole; /* up to where stores can go past the caches */
    if (n >= FOLD_LEAST + 64) {
        memcpy(dst, src, first);
        crc = crc_of(crc, dst, first);
        dst += first, src += first, n -= first, whole = n & ~(size_t)63;
        crc = past_caches ? fold_stream(crc, dst, src, whole) : fold_copy(crc, dst, src, whole);
        dst += whole, src += whole, n -= whole;
    }
    memcpy(dst, src, n);
    return crc_of(crc, dst, n);
}
#endif

/* Copies n bytes and sums them, block by block, so that they come from memory once. With past_caches the copy does not
 * displace what is in the caches: for copies larger than these. */
API uint32_t ingestd_copy_crc(uint8_t *dst, const uint8_t *src, size_t n, uint32_t crc, int past_caches) {
    crc = ~crc;
#ifdef FOLDING
    if (folding) {
        crc = copy_folding(dst, src, n, crc, past_caches);
        n = 0;
    }
#endif
    while (n) {
        size_t block = n < 3 * LONG ? n : 3 * LONG;
        crc = crc_of(crc, src, block);
#if defined(__x86_64__)
        if (past_caches && ((uintptr_t)dst & 15) == 0) {
            size_t i = 0;
            for (; i + 64 <= block; i += 64) {
                __m128i a = _mm_loadu_si128((const __m128i *)(src + i)), b = _mm_loadu_si128((const __m128i *)(src + i + 16));
                __m128i c = _mm_loadu_si128((const __m128i *)(src + i + 32)), d = _mm_loadu_si128((const __m128i *)(src + i + 48));
                _mm_stream_si128((__m128i *)(dst + i), a);
                _mm_stream_si128((__m128i *)(dst + i + 16), b);
                _mm_stream_si128((__m128i *)(dst + i + 32), c);
                _mm_stream_si128((__m128i *)(dst + i + 48), d);
            }
            memcpy(dst + i, src + i, block - i);
        } else
#endif
            memcpy(dst, src, block);
        dst += block, src += block, n -= block;
    }
#if defined(__x86_64__)
    if (past_caches) _mm_sfence();
#else
    (void)past_caches;
#endif
    return ~crc;
}

/* Accumulation: dst[i] = x[i], or dst[i] += x[i], in float32. */

enum { F32, F16, BF16, F8_E4M3, F8_E5M2 };

INLINE float as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint32_t as_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

/* Without a branch, so that the loops below become vector instructions. */
INLINE uint32_t choose(int condition, uint32_t yes, uint32_t no) {
    uint32_t mask = -(uint32_t)(condition != 0);
    return (yes & mask) | (no & ~mask);
}

INLINE uint16_t load2(const uint8_t *p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}

INLINE float from_bf16(uint16_t x) { return as_float((uint32_t)x << 16); }

/* Without denormal operands, so that a process which flushes these to zero gets the same. */
INLINE float from_f16(uint16_t x) {
    uint32_t bits = (uint32_t)(x & 0x7FFF) << 13, exponent = bits & 0x0F800000u;
    uint32_t normal = bits + (112u << 23);
    uint32_t infinite = normal + (112u << 23);
    float subnormal = as_float(normal + (1u << 23)) - as_float(113u << 23);
    uint32_t found = choose(exponent == 0x0F800000u, infinite, choose(exponent == 0, as_bits(subnormal), normal));
    return as_float(found | (uint32_t)(x & 0x8000) << 16);
}

#define LOOP(value)                                             \
    do {                                                        \
        if (add)                                                \
            for (size_t i = 0; i < n; i++) dst[i] += (value);   \
        else                                                    \
            for (size_t i = 0; i < n; i++) dst[i] = (value);    \
    } while (0)

INLINE float load4(const uint8_t *p) {
    float f;
    memcpy(&f, p, 4);
    return f;
}

INLINE void accumulate(float *restrict dst, const uint8_t *restrict src, size_t n, int kind, float scale, int add) {
    switch (kind) {
    case F32:
        if (add)
            for (size_t i = 0; i < n; i++) dst[i] += load4(src + 4 * i);
        else
            memcpy(dst, src, 4 * n);
        break;
    case F16: LOOP(from_f16(load2(src + 2 * i))); break;
    case BF16: LOOP(from_bf16(load2(src + 2 * i))); break;
    default: {
        float value[256];
        for (int b = 0; b < 256; b++) value[b] = f8_values[kind == F8_E5M2][b] * scale;
        LOOP(value[src[i]]);
    }
    }
}

#ifdef WIDE
WIDE static void accumulate_wide(float *dst, const uint8_t *src, size_t n, int kind, float scale, int add) {
    accumulate(dst, src, n, kind, scale, add);
}
#endif

API void ingestd_accumulate(float *dst, const uint8_t *src, size_t n, int kind, float scale, int add) {
#ifdef WIDE
    if (wide) {
        accumulate_wide(dst, src, n, kind, scale, add);
        return;
    }
#endif
    accumulate(dst, src, n, kind, scale, add);
}

#define SUM_BLOCK 4096 /* elements of the sum that stay in the first cache */

/* dst = x0, then += x1, and so on, in order: each source is read once, the sum is written once. */
API void ingestd_sum(float *dst, const uint8_t *const *sources, const float *scales, size_t count, size_t n, int kind) {
    size_t item = kind == F32 ? 4 : kind == F16 || kind == BF16 ? 2 : 1;
    for (size_t at = 0; at < n; at += SUM_BLOCK) {
        size_t block = n - at < SUM_BLOCK ? n - at : SUM_BLOCK;
        for (size_t k = 0; k < count; k++)
            ingestd_accumulate(dst + at, sources[k] + at * item, block, kind, scales[k], k > 0);
    }
}

/* Entries of u32 index and float32 value, ascending, unused ones (index FFFFFFFF) at the end. The number of the first
 * entry that breaks this, or lies beyond the elements; -1 where all are sound. *last is the index before the first
 * entry, -1 for none, and becomes that of the last one. */
API int64_t ingestd_check_pairs(const uint8_t *pairs, uint64_t k, uint64_t elements, int64_t *last) {
    int64_t before = *last;
    for (uint64_t i = 0; i < k; i++) {
        uint32_t index;
        memcpy(&index, pairs + 8 * i, 4);
        if (index == 0xFFFFFFFFu) {
            before = 0xFFFFFFFFll;
            continue;
        }
        if ((int64_t)index <= before || index >= elements) return (int64_t)i;
        before = index;
    }
    *last = before;
    return -1;
}

/* dst[index] += value for each entry; those beyond the elements are passed over. */
API void ingestd_scatter_add(float *dst, uint64_t elements, const uint8_t *pairs, uint64_t k) {
    for (uint64_t i = 0; i < k; i++) {
        uint32_t index;
        memcpy(&index, pairs + 8 * i, 4);
        if (index < elements) dst[index] += load4(pairs + 8 * i + 4);
    }
}

/* Encoding: to nearest, ties to even. */

INLINE uint16_t to_bf16(float f) {
    uint32_t bits = as_bits(f);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)choose((bits & 0x7FFFFFFFu) > 0x7F800000u, (bits >> 16) | 0x40, rounded);
}

/* A float of 1 sign bit and fewer mantissa bits. magic is 2^(its smallest subnormal's exponent + 23). */
INLINE uint32_t narrowed(uint32_t magnitude, int drop, uint32_t bias_bits, uint32_t least_normal, float magic) {
    uint32_t normal = ((magnitude + ((1u << (drop - 1)) - 1) + (magnitude >> drop & 1)) >> drop) - bias_bits;
    uint32_t subnormal = as_bits(as_float(magnitude) + magic) - as_bits(magic);
    return choose(magnitude < least_normal, subnormal, normal);
}

INLINE uint16_t to_f16(float f) {
    uint32_t bits = as_bits(f), magnitude = bits & 0x7FFFFFFFu;
    uint32_t finite = narrowed(magnitude, 13, 112u << 10, 113u << 23, 0.5f);
    finite = choose(magnitude >= 0x47800000u, 0x7C00, finite); /* 65,536; below, rounding up gives infinity by itself */
    uint32_t found = choose(magnitude > 0x7F800000u, 0x7E00 | (magnitude >> 13 & 0x3FF), finite);
    return (uint16_t)(found | (bits >> 16 & 0x8000));
}

INLINE uint8_t to_e4m3(float f) {
    uint32_t bits = as_bits(f), magnitude = bits & 0x7FFFFFFFu;
    uint32_t clamped = choose(magnitude > 0x43E00000u, 0x43E00000u, magnitude); /* 448 */
    uint32_t found = narrowed(clamped, 20, 120u << 3, 121u << 23, 16384.0f);
    found = choose(magnitude >= 0x7F800000u, 0x7F, found);
    return (uint8_t)(found | (bits >> 24 & 0x80));
}

INLINE uint8_t to_e5m2(float f) {
    uint32_t bits = as_bits(f), magnitude = bits & 0x7FFFFFFFu;
    uint32_t clamped = choose(magnitude > 0x47600000u, 0x47600000u, magnitude); /* 57,344 */
    uint32_t found = narrowed(clamped, 21, 112u << 2, 113u << 23, 128.0f);
    found = choose(magnitude == 0x7F800000u, 0x7C, choose(magnitude > 0x7F800000u, 0x7E, found));
    return (uint8_t)(found | (bits >> 24 & 0x80));
}

INLINE void encode(uint8_t *restrict dst, const float *restrict src, size_t n, int kind, float scale) {
    uint16_t x;
    switch (kind) {
    case F16:
        for (size_t i = 0; i < n; i++) x = to_f16(src[i]), memcpy(dst + 2 * i, &x, 2);
        break;
    case BF16:
        for (size_t i = 0; i < n; i++) x = to_bf16(src[i]), memcpy(dst + 2 * i, &x, 2);
        break;
    case F8_E4M3:
        for (size_t i = 0; i < n; i++) dst[i] = to_e4m3(src[i] / scale);
        break;
    default:
        for (size_t i = 0; i < n; i++) dst[i] = to_e5m2(src[i] / scale);
    }
}

INLINE float largest_finite(const float *src, size_t n) {
    uint32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t magnitude = as_bits(src[i]) & 0x7FFFFFFFu;
        magnitude = choose(magnitude >= 0x7F800000u, 0, magnitude);
        most = magnitude > most ? magnitude : most;
    }
    return as_float(most);
}

#ifdef WIDE
WIDE static void encode_wide(uint8_t *dst, const float *src, size_t n, int kind, float scale) {
    encode(dst, src, n, kind, scale);
}

WIDE static float largest_finite_wide(const float *src, size_t n) { return largest_finite(src, n); }
#endif

API void ingestd_encode(uint8_t *dst, const float *src, size_t n, int kind, float scale) {
#ifdef WIDE
    if (wide) {
        encode_wide(dst, src, n, kind, scale);
        return;
    }
#endif
    encode(dst, src, n, kind, scale);
}

/* The largest magnitude that is finite, 0 where there is none. */
API float ingestd_largest_finite(const float *src, size_t n) {
#ifdef WIDE
    if (wide) return largest_finite_wide(src, n);
#endif
    return largest_finite(src, n);
}
