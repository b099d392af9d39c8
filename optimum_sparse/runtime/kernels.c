#include "kernels.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

/* Columns that `matmat` expands at once: 8 rows of them leave half of the first-level cache to the inputs. */
#define CHUNK 1024

INLINE float float_of(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* To the nearest, ties to even; NaN stays NaN. */
INLINE uint16_t bfloat16_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value != value ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE uint32_t load32(const uint8_t *mask)
{
    uint32_t bits;
    memcpy(&bits, mask, sizeof bits);
    return bits;
}

/* ------------------------------------------------------------------------------------------------- prefetch
 *
 * Masked loads do not train the prefetch of the processor. Intel's cores wait for fewer lines in their first-level cache
 * than it takes to keep the memory busy, but for more in their second. On AMD's, a line of the first level that was
 * fetched for one use (the last argument of 0) need not be written to the levels below when it leaves. The distances
 * are those with which a Xeon with AMX, and a Zen 5 for all other processors, read large matrices fastest.
 */

static int on_intel;

#if defined(__x86_64__)
__attribute__((constructor)) static void see_vendor(void)
{
    __builtin_cpu_init();
    on_intel = __builtin_cpu_is("intel");
}
#endif

/* For a tile that lies ahead; so many bytes of masks, and of values if half of the weights are stored. */
INLINE void prefetch_tile(const void *masks, size_t masks_size, const void *values, size_t values_size)
{
    const char *mask = masks, *value = values;
    if (on_intel) {
        for (size_t line = 0; line < masks_size; line += 64)
            __builtin_prefetch(mask + 1024 + line);
        for (size_t line = 0; line < values_size; line += 64) {
            __builtin_prefetch(value + 3072 + line, 0, 2);
            __builtin_prefetch(value + 512 + line);
        }
    } else {
        for (size_t line = 0; line < masks_size; line += 64)
            __builtin_prefetch(mask + 4096 + line, 0, 0);
        for (size_t line = 0; line < values_size; line += 64)
            __builtin_prefetch(value + 8192 + line, 0, 0);
    }
}

/* For so many bytes of a dense row. */
INLINE void prefetch_row(const void *weight, size_t size)
{
    const char *from = weight;
    if (on_intel)
        for (size_t line = 0; line < size; line += 64)
            __builtin_prefetch(from + 8192 + line, 0, 2);
    else
        for (size_t line = 0; line < size; line += 64)
            __builtin_prefetch(from + 6144 + line, 0, 0);
}

/* ------------------------------------------------------------------------------------------------- portable */

typedef float float8 __attribute__((vector_size(32)));

/* A weight of a quantised matrix: in float32, this product is exact. */
INLINE float scale_of(uint32_t grid) { return float_of(grid >> 16); }

INLINE int zero_of(uint32_t grid) { return grid & 0xff; }

INLINE float weight_of(uint8_t code, uint32_t grid) { return scale_of(grid) * (code - zero_of(grid)); }

#define FLOAT_OF(value, grid) float_of(value)
#define SAME(value, grid) (value)

#define DEFINE_PORTABLE_EXPAND(name, value, to_float)                                                                 \
    INLINE float8 name(const uint8_t *mask, const value *values, uint32_t grid)                                       \
    {                                                                                                                 \
        (void)grid;                                                                                                   \
        float8 weights;                                                                                               \
        for (int i = 0, k = 0; i < 8; k += *mask >> i & 1, i++)                                                       \
            weights[i] = *mask >> i & 1 ? to_float(values[k], grid) : 0;                                              \
        return weights;                                                                                               \
    }
DEFINE_PORTABLE_EXPAND(portable_expand_bfloat16, uint16_t, FLOAT_OF)
DEFINE_PORTABLE_EXPAND(portable_expand_float32, float, SAME)
DEFINE_PORTABLE_EXPAND(portable_expand_int8, uint8_t, weight_of)

INLINE float8 portable_load(const float *from)
{
    float8 x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void portable_store(float *to, float8 weights) { memcpy(to, &weights, sizeof weights); }

INLINE float8 portable_widen(const uint16_t *from)
{
    float8 weights;
    for (int i = 0; i < 8; i++)
        weights[i] = float_of(from[i]);
    return weights;
}

INLINE float portable_total(float8 s)
{
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

#define TARGET
#define INPUT float
#define LANES 8
#define WEIGHTS float8
#define SUMS float8
#define POPCOUNT(mask) __builtin_popcount(*(mask))
#define LOAD portable_load
#define STORE portable_store
#define MADD(sums, w, x) ((sums) + (w) * (x))
#define TOTAL portable_total
#define TOKENS 2

#define NAME(function) portable_bfloat16_##function
#define VALUE uint16_t
#define EXPAND portable_expand_bfloat16
#define WIDEN portable_widen
#include "tiles.h"
#undef NAME
#undef VALUE
#undef EXPAND
#undef WIDEN

#define NAME(function) portable_float32_##function
#define VALUE float
#define EXPAND portable_expand_float32
#define WIDEN portable_load
#include "tiles.h"
#undef NAME
#undef VALUE
#undef EXPAND
#undef WIDEN

#define NAME(function) portable_int8_##function
#define QUANTIZED
#define VALUE uint8_t
#define EXPAND portable_expand_int8
#include "tiles.h"
#undef NAME
#undef QUANTIZED
#undef VALUE
#undef EXPAND

#undef TARGET
#undef INPUT
#undef LANES
#undef WEIGHTS
#undef SUMS
#undef POPCOUNT
#undef LOAD
#undef STORE
#undef MADD
#undef TOTAL
#undef TOKENS

#if defined(__x86_64__)

/* The tiles of a full block, for `tiles_unpack`; returns the next value. `move` writes LANES values, or zeros. */
#define DEFINE_UNPACK(name, move, value)                                                                              \
    TARGET static const value *name(const uint8_t *masks, const value *values, int64_t num_tiles, value *out,         \
                                    int64_t columns)                                                                  \
    {                                                                                                                 \
        for (int64_t tile = 0; tile < num_tiles; tile++, masks += 4 * TILE_ROWS) {                                    \
            __builtin_prefetch(masks + 4096);                                                                         \
            for (size_t line = 0; line < TILE_ROWS * TILE_COLUMNS / 2 * sizeof(value); line += 64)                    \
                __builtin_prefetch((const char *)values + 8192 + line);                                               \
            UNROLL for (int row = 0; row < TILE_ROWS; row++)                                                          \
                UNROLL for (int j = 0; j < TILE_COLUMNS; j += LANES) {                                                \
                    const uint8_t *mask = masks + 4 * row + j / 8;                                                    \
                    move(mask, values, out + row * columns + tile * TILE_COLUMNS + j);                                \
                    values += POPCOUNT(mask);                                                                         \
                }                                                                                                     \
        }                                                                                                             \
        return values;                                                                                                \
    }

/* ----------------------------------------------------------------------------------------------------- AVX2 */

#define TARGET __attribute__((target("avx2,fma,popcnt")))

/* For each byte of a mask, where its 8 columns find their values: `ranks` counts values of 32 bits, `shuffles` bytes of
 * values of 16 bits. For columns that are not stored, the highest bit is set. `bytes_of_floats` counts in 8 codes, the
 * zero of their grid, which stands for those that are not stored, and 0x4b. */
static uint8_t ranks[256][8];
_Alignas(16) static uint8_t shuffles[256][16];
_Alignas(32) static uint8_t bytes_of_floats[256][8][4];

__attribute__((constructor)) static void fill_tables(void)
{
    for (int mask = 0; mask < 256; mask++)
        for (int i = 0, rank = 0; i < 8; rank += mask >> i & 1, i++) {
            const int absent = mask >> i & 1 ? 0 : 0x80;
            ranks[mask][i] = absent | rank;
            shuffles[mask][2 * i] = absent | 2 * rank;
            shuffles[mask][2 * i + 1] = absent | (2 * rank + 1);
            memcpy(bytes_of_floats[mask][i], (uint8_t[]){absent ? 8 : rank, 0x80, 0x80, 9}, 4);
        }
}

/* The values at their columns, and zeros at the others. */
TARGET INLINE __m256 avx2_spread(const uint8_t *mask, __m256 values)
{
    const __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)ranks[*mask]));
    const __m256 spread = _mm256_permutevar8x32_ps(values, place);
    return _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(place));
}

/* The same with values of 16 bits, in one instruction. */
TARGET INLINE __m128i avx2_spread_16(const uint8_t *mask, __m128i values)
{
    return _mm_shuffle_epi8(values, _mm_load_si128((const __m128i *)shuffles[*mask]));
}

TARGET INLINE __m256 avx2_float_of(__m128i bfloat16)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloat16), 16));
}

TARGET INLINE __m256 avx2_widen(const uint16_t *from) { return avx2_float_of(_mm_loadu_si128((const __m128i *)from)); }

TARGET INLINE __m256 avx2_expand_bfloat16(const uint8_t *mask, const uint16_t *values)
{
    return avx2_float_of(avx2_spread_16(mask, _mm_loadu_si128((const __m128i *)values)));
}

/* One instruction brings codes to their columns and makes floats of them: a code is the last byte of 2^23 + code. */
TARGET INLINE __m256 avx2_expand_int8(const uint8_t *mask, const uint8_t *codes, uint32_t grid)
{
    const __m256i rest = _mm256_set1_epi64x(0x4b00 | zero_of(grid));
    const __m256i bytes = _mm256_blend_epi32(_mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)codes)), rest, 0xcc);
    const __m256i bits = _mm256_shuffle_epi8(bytes, _mm256_load_si256((const __m256i *)bytes_of_floats[*mask]));
    const __m256 whole = _mm256_sub_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p23f + zero_of(grid)));
    return _mm256_mul_ps(whole, _mm256_set1_ps(scale_of(grid)));
}

TARGET INLINE float avx2_total(__m256 sums)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#define INPUT float
#define LANES 8
#define WEIGHTS __m256
#define SUMS __m256
#define POPCOUNT(mask) __builtin_popcount(*(mask))
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define MADD(sums, w, x) _mm256_fmadd_ps(w, x, sums)
#define TOTAL avx2_total
#define TOKENS 2

#define NAME(function) avx2_bfloat16_##function
#define VALUE uint16_t
#define EXPAND(mask, v, grid) avx2_expand_bfloat16(mask, v)
#define WIDEN avx2_widen
#include "tiles.h"
#undef NAME
#undef VALUE
#undef EXPAND
#undef WIDEN

#define NAME(function) avx2_float32_##function
#define VALUE float
#define EXPAND(mask, v, grid) avx2_spread(mask, _mm256_loadu_ps(v))
#define WIDEN _mm256_loadu_ps
#include "tiles.h"
#undef NAME
#undef VALUE
#undef EXPAND
#undef WIDEN

#define NAME(function) avx2_int8_##function
#define QUANTIZED
#define VALUE uint8_t
#define EXPAND avx2_expand_int8
#include "tiles.h"
#undef NAME
#undef QUANTIZED
#undef VALUE
#undef EXPAND

TARGET INLINE void avx2_move_16(const uint8_t *mask, const uint16_t *values, uint16_t *out)
{
    const __m128i spread = avx2_spread_16(mask, _mm_loadu_si128((const __m128i *)values));
    _mm_storeu_si128((__m128i *)out, spread);
}
DEFINE_UNPACK(avx2_unpack_16, avx2_move_16, uint16_t)

TARGET INLINE void avx2_move_32(const uint8_t *mask, const float *values, float *out)
{
    _mm256_storeu_ps(out, avx2_spread(mask, _mm256_loadu_ps(values)));
}
DEFINE_UNPACK(avx2_unpack_32, avx2_move_32, float)

#undef TARGET
#undef INPUT
#undef LANES
#undef WEIGHTS
#undef SUMS
#undef POPCOUNT
#undef LOAD
#undef STORE
#undef MADD
#undef TOTAL
#undef TOKENS

/* -------------------------------------------------------------------------------------------------- AVX-512
 *
 * On Zen 5, vpexpand waits for the old content of its destination although it overwrites all of it. With the values
 * loaded into the destination first there is nothing to wait for. A compiler folds the load into the instruction,
 * which is three times slower; hence the assembly. Loading a mask from memory keeps the ports of the vectors free.
 */

#define TARGET __attribute__((target("avx512f,popcnt")))

TARGET INLINE __m512 avx512_spread(const uint8_t *mask, __m512 values)
{
    __mmask16 k;
    __asm__("kmovw %1, %0" : "=Yk"(k) : "m"(*(const uint16_t(*)[1])mask));
    __asm__("vexpandps %0, %0%{%1%}%{z%}" : "+v"(values) : "Yk"(k));
    return values;
}

TARGET INLINE __m512 avx512_widen(const uint16_t *from)
{
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

TARGET INLINE __m512 avx512_expand_int8(const uint8_t *mask, const uint8_t *codes, uint32_t grid)
{
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(zero_of(grid))));
    return avx512_spread(mask, _mm512_mul_ps(whole, _mm512_set1_ps(scale_of(grid))));
}

TARGET INLINE int avx512_popcount(const uint8_t *mask)
{
    uint16_t bits;
    memcpy(&bits, mask, sizeof bits);
    return __builtin_popcount(bits);
}

#define INPUT float
#define LANES 16
#define WEIGHTS __m512
#define SUMS __m512
#define POPCOUNT avx512_popcount
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define MADD(sums, w, x) _mm512_fmadd_ps(w, x, sums)
#define TOTAL _mm512_reduce_add_ps
#define TOKENS 4

#define NAME(function) avx512_bfloat16_##function
#define VALUE uint16_t
#define EXPAND(mask, v, grid) avx512_spread(mask, avx512_widen(v))
#define WIDEN avx512_widen
#include "tiles.h"
#undef NAME
#undef VALUE
#undef EXPAND
#undef WIDEN

#define NAME(function) avx512_float32_##function
#define VALUE float
#define EXPAND(mask, v, grid) avx512_spread(mask, _mm512_loadu_ps(v))
#define WIDEN _mm512_loadu_ps
#include "tiles.h"
#undef NAME
#undef VALUE
#undef EXPAND
#undef WIDEN

#define NAME(function) avx512_int8_##function
#define QUANTIZED
#define VALUE uint8_t
#define EXPAND avx512_expand_int8
#include "tiles.h"
#undef NAME
#undef QUANTIZED
#undef VALUE
#undef EXPAND

TARGET INLINE void avx512_move_32(const uint8_t *mask, const float *values, float *out)
{
    _mm512_storeu_ps(out, avx512_spread(mask, _mm512_loadu_ps(values)));
}
DEFINE_UNPACK(avx512_unpack_32, avx512_move_32, float)

#undef TARGET
#undef INPUT
#undef LANES
#undef WEIGHTS
#undef POPCOUNT
#undef LOAD
#undef STORE
#undef MADD

/* ------------------------------------------------------------------------------- AVX-512 VBMI2, VNNI and BF16 */

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,avx512bf16,popcnt")))

TARGET INLINE __m512i avx512_bf16_spread(const uint8_t *mask, const uint16_t *values)
{
    __mmask32 k;
    __m512i weights = _mm512_loadu_si512(values);
    __asm__("kmovd %1, %0" : "=Yk"(k) : "m"(*(const uint32_t(*)[1])mask));
    __asm__("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(weights) : "Yk"(k));
    return weights;
}

TARGET INLINE __m512i avx512_bf16_expand_int8(const uint8_t *mask, const uint8_t *codes, uint32_t grid)
{
    __mmask32 k;
    __m256i c = _mm256_loadu_si256((const __m256i *)codes), zeros = _mm256_set1_epi8(zero_of(grid));
    __asm__("kmovd %1, %0" : "=Yk"(k) : "m"(*(const uint32_t(*)[1])mask));
    __asm__("vpexpandb %1, %0%{%2%}" : "+v"(zeros) : "v"(c), "Yk"(k));
    const __m512i zero = _mm512_set1_epi32(zero_of(grid));
    const __m512i low = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(zeros)), zero);
    const __m512i high = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(zeros, 1)), zero);
    const __m512 scale = _mm512_set1_ps(scale_of(grid));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_cvtepi32_ps(high), scale),
                                        _mm512_mul_ps(_mm512_cvtepi32_ps(low), scale));
}

#define INPUT uint16_t
#define LANES 32
#define WEIGHTS __m512i
#define POPCOUNT(mask) __builtin_popcount(load32(mask))
#define LOAD _mm512_loadu_si512
#define STORE _mm512_storeu_si512
#define MADD(sums, w, x) _mm512_dpbf16_ps(sums, (__m512bh)(w), (__m512bh)(x))

#define NAME(function) avx512_bf16_##function
#define VALUE uint16_t
#define EXPAND(mask, v, grid) avx512_bf16_spread(mask, v)
#define WIDEN _mm512_loadu_si512
#include "tiles.h"

#undef NAME
#undef VALUE
#undef EXPAND
#undef WIDEN

#define NAME(function) avx512_bf16_int8_##function
#define QUANTIZED
#define VALUE uint8_t
#define EXPAND avx512_bf16_expand_int8
#include "tiles.h"

#include "digits.h"

TARGET INLINE void avx512_bf16_move_16(const uint8_t *mask, const uint16_t *values, uint16_t *out)
{
    _mm512_storeu_si512(out, avx512_bf16_spread(mask, values));
}
DEFINE_UNPACK(avx512_bf16_unpack_16, avx512_bf16_move_16, uint16_t)

#endif

/* ------------------------------------------------------------------------------------------------- dispatch */

const char *const level_names[NUM_LEVELS] = {"portable", "avx2", "avx512", "avx512_bf16"};

int level_supported(enum level level)
{
#if defined(__x86_64__)
    switch (level) {
    case AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case AVX512:
        return __builtin_cpu_supports("avx512f");
    case AVX512_BF16:
        return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("avx512bf16");
    default:
        break;
    }
#endif
    return level == PORTABLE;
}

typedef struct {
    void (*matvec)(const uint8_t *, const uint32_t *, const void *, const void *, int64_t, float *);
    void (*matmat)(const uint8_t *, const uint32_t *, const void *, const void *, int64_t, int64_t, int64_t, void *,
                   float *, float *);
    const void *(*expand)(const uint8_t *, const uint32_t *, const void *, int64_t, int64_t, void *);
    float (*dot)(const void *, const void *, int64_t);
    int input_size; /* bytes: 2 takes bfloat16 as it is, 4 needs float32, DIGITS_SIZE digits */
} functions;

#define FUNCTIONS(name, dot, size)                                                                                    \
    {(void *)name##_matvec, (void *)name##_matmat, (void *)name##_expand, (void *)dot, size}
#define LEVEL_FUNCTIONS(level)                                                                                        \
    FUNCTIONS(level##_bfloat16, level##_bfloat16_dot, 4), FUNCTIONS(level##_float32, level##_float32_dot, 4),         \
        FUNCTIONS(level##_int8, NULL, 4)

/* For weights of bfloat16 and float32, and for codes. */
enum { CODES = 2 };
static const functions table[NUM_LEVELS][3] = {
    {LEVEL_FUNCTIONS(portable)},
#if defined(__x86_64__)
    {LEVEL_FUNCTIONS(avx2)},
    {LEVEL_FUNCTIONS(avx512)},
    {FUNCTIONS(avx512_bf16, avx512_bf16_dot, 2), FUNCTIONS(avx512_float32, avx512_float32_dot, 4),
     FUNCTIONS(avx512_bf16_int8, NULL, 2)},
#endif
};

/* For values of 16 and of 32 bits. */
typedef const void *(*unpack_block)(const uint8_t *, const void *, int64_t, void *, int64_t);
static const unpack_block unpacks[NUM_LEVELS][2] = {
    {NULL, NULL},
#if defined(__x86_64__)
    {(void *)avx2_unpack_16, (void *)avx2_unpack_32},
    {(void *)avx2_unpack_16, (void *)avx512_unpack_32},
    {(void *)avx512_bf16_unpack_16, (void *)avx512_unpack_32},
#endif
};

static functions functions_for(enum level level, const tiles *matrix)
{
    if (!matrix->grids)
        return table[level][matrix->type];
    return table[level == AVX512_BF16 && matrix->type == FLOAT32 ? AVX512 : level][CODES];
}

INLINE int64_t up_to_multiple(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

INLINE int value_size(enum type type) { return type == FLOAT32 ? 4 : 2; }

INLINE int stored_size(const tiles *matrix) { return matrix->grids ? 1 : value_size(matrix->type); }

INLINE int tile_columns(const tiles *matrix) { return matrix->grids ? QUANTIZED_COLUMNS : TILE_COLUMNS; }

/* Vectors x[tokens, columns], padded with zeros to `stride`, as the functions take them. */
static void prepare(const void *x, enum type type, int64_t tokens, int64_t columns, int64_t stride, int input_size,
                    char *out)
{
    for (int64_t t = 0; t < tokens; t++, out += stride * input_size) {
        const int64_t start = t * columns;
        if (input_size == value_size(type))
            memcpy(out, (const char *)x + start * input_size, columns * input_size);
        else
            for (int64_t j = 0; j < columns; j++)
                ((float *)out)[j] = float_of(((const uint16_t *)x)[start + j]);
        memset(out + columns * input_size, 0, (stride - columns) * input_size);
    }
}

INLINE void write_output(float value, const void *bias, int64_t row, enum type type, void *out, int64_t place)
{
    if (type == FLOAT32)
        ((float *)out)[place] = value + (bias ? ((const float *)bias)[row] : 0);
    else
        ((uint16_t *)out)[place] = bfloat16_of(value + (bias ? float_of(((const uint16_t *)bias)[row]) : 0));
}

int tiles_linear(enum level level, const tiles *matrix, const void *x, int64_t tokens, const void *bias, void *out,
                 int threads)
{
    functions f = functions_for(level, matrix);
#if defined(__x86_64__)
    if (level == AVX512_BF16 && matrix->grids && tokens <= DIGITS_TOKENS)
        f = (functions){(void *)digits_matvec, (void *)digits_matmat, NULL, NULL, DIGITS_SIZE};
#endif
    const int size = stored_size(matrix), width = tile_columns(matrix);
    const int64_t num_tiles = (matrix->columns + width - 1) / width, stride = num_tiles * width;
    const int64_t blocks = (matrix->rows + TILE_ROWS - 1) / TILE_ROWS;
    const int direct = f.input_size == value_size(matrix->type) && stride == matrix->columns;

    /* One allocation: the vectors, and for each thread its results, sums and expanded columns. */
    const int64_t inputs = direct ? 0 : up_to_multiple(tokens * stride * f.input_size, 64);
    const int64_t results = up_to_multiple(tokens * TILE_ROWS * sizeof(float), 64);
    const int64_t sums = tokens == 1 ? 0 : up_to_multiple(tokens, 4) * TILE_ROWS * 64;
    const int64_t expanded = tokens == 1 ? 0 : TILE_ROWS * CHUNK * f.input_size;
    const int64_t scratch = results + sums + expanded;
    char *memory = aligned_alloc(64, inputs + threads * scratch);
    if (memory == NULL)
        return -1;
#if defined(__x86_64__)
    if (f.input_size == DIGITS_SIZE) {
        if (!to_digits(x, matrix->type, tokens, matrix->columns, num_tiles, (digits *)memory)) {
            free(memory); /* infinity and NaN have no digits */
            return tiles_linear(AVX512, matrix, x, tokens, bias, out, threads);
        }
        x = memory;
    } else
#endif
    if (!direct) {
        prepare(x, matrix->type, tokens, matrix->columns, stride, f.input_size, memory);
        x = memory;
    }

#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        char *own = memory + inputs + thread * scratch;
        float *result = (float *)own;
        for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++) {
            const uint8_t *masks = matrix->masks + block * num_tiles * width / 8 * TILE_ROWS;
            const uint32_t *grids = matrix->grids ? matrix->grids + block * num_tiles * TILE_ROWS : NULL;
            const char *values = (const char *)matrix->values + matrix->offsets[block] * size;
            const int64_t first = block * TILE_ROWS, rows = MIN(TILE_ROWS, matrix->rows - first);
            if (tokens == 1)
                f.matvec(masks, grids, values, x, num_tiles, result);
            else
                f.matmat(masks, grids, values, x, stride, tokens, num_tiles, own + results + sums, (float *)(own + results),
                         result);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t row = 0; row < rows; row++)
                    write_output(result[t * TILE_ROWS + row], bias, first + row, matrix->type, out,
                                 t * matrix->rows + first + row);
        }
    }
    free(memory);
    return 0;
}

int dense_linear(enum level level, enum type type, const void *weight, int64_t rows, int64_t columns, const void *x,
                 const void *bias, void *out, int threads)
{
    const functions f = table[level][type];
    const int64_t stride = up_to_multiple(columns, TILE_COLUMNS);
    char *memory = NULL;
    if (f.input_size != value_size(type) || stride != columns) {
        memory = aligned_alloc(64, up_to_multiple(stride * f.input_size, 64));
        if (memory == NULL)
            return -1;
        prepare(x, type, 1, columns, stride, f.input_size, memory);
        x = memory;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        write_output(f.dot((const char *)weight + row * columns * value_size(type), x, columns), bias, row, type, out,
                     row);
    free(memory);
    return 0;
}

/* ----------------------------------------------------------------------------------------- packing, unpacking */

/* The same for values of 16 and of 32 bits, which are only moved. */
#define DEFINE_MOVES(bits, value)                                                                                     \
    /* Tiles from `first_tile` on, of the first `rows` rows of a block. */                                            \
    static void unpack_rest_##bits(const uint8_t *masks, const value *values, int64_t first_tile, int64_t num_tiles,  \
                                   int rows, value *out, int64_t columns)                                             \
    {                                                                                                                 \
        for (int64_t tile = first_tile; tile < num_tiles; tile++)                                                     \
            for (int row = 0; row < rows; row++) {                                                                    \
                const uint32_t mask = bits_of(masks + (tile * TILE_ROWS + row) * 4);                                  \
                value *place = out + row * columns + tile * TILE_COLUMNS;                                             \
                const int width = MIN(TILE_COLUMNS, columns - tile * TILE_COLUMNS);                                   \
                for (int j = 0; j < width; j++) {                                                                     \
                    place[j] = mask >> j & 1 ? *values : 0;                                                           \
                    values += mask >> j & 1;                                                                          \
                }                                                                                                     \
            }                                                                                                         \
    }                                                                                                                 \
    /* Masks of a block; returns how many values are stored. */                                                       \
    static int64_t mask_##bits(const value *weight, int64_t columns, int64_t num_tiles, int rows, uint8_t *masks)     \
    {                                                                                                                 \
        int64_t count = 0;                                                                                            \
        for (int64_t tile = 0; tile < num_tiles; tile++)                                                              \
            for (int row = 0; row < TILE_ROWS; row++, masks += 4) {                                                   \
                const value *from = weight + row * columns + tile * TILE_COLUMNS;                                     \
                const int width = row < rows ? MIN(TILE_COLUMNS, columns - tile * TILE_COLUMNS) : 0;                  \
                uint32_t mask = 0;                                                                                    \
                for (int j = 0; j < width; j++)                                                                       \
                    mask |= (uint32_t)(from[j] != 0) << j;                                                            \
                for (int i = 0; i < 4; i++)                                                                           \
                    masks[i] = mask >> 8 * i;                                                                         \
                count += __builtin_popcount(mask);                                                                    \
            }                                                                                                         \
        return count;                                                                                                 \
    }                                                                                                                 \
    static void fill_##bits(const value *weight, int64_t columns, const uint8_t *masks, int64_t num_tiles,            \
                            value *values)                                                                            \
    {                                                                                                                 \
        for (int64_t tile = 0; tile < num_tiles; tile++)                                                              \
            for (int row = 0; row < TILE_ROWS; row++, masks += 4)                                                     \
                for (uint32_t mask = bits_of(masks); mask; mask &= mask - 1)                                          \
                    *values++ = weight[row * columns + tile * TILE_COLUMNS + __builtin_ctz(mask)];                    \
    }

INLINE uint32_t bits_of(const uint8_t *mask)
{
    return mask[0] | (uint32_t)mask[1] << 8 | (uint32_t)mask[2] << 16 | (uint32_t)mask[3] << 24;
}

DEFINE_MOVES(16, uint16_t)
DEFINE_MOVES(32, uint32_t)

static void unpack_quantized(enum level level, const tiles *matrix, int64_t first, int64_t last, void *out, int threads)
{
    const functions f = functions_for(level, matrix);
    const int64_t columns = matrix->columns, num_tiles = (columns + QUANTIZED_COLUMNS - 1) / QUANTIZED_COLUMNS;
    const int size = value_size(matrix->type);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = first / TILE_ROWS; block < (last + TILE_ROWS - 1) / TILE_ROWS; block++) {
        const uint8_t *masks = matrix->masks + block * num_tiles * QUANTIZED_COLUMNS / 8 * TILE_ROWS;
        const uint32_t *grids = matrix->grids + block * num_tiles * TILE_ROWS;
        const void *codes = (const uint8_t *)matrix->values + matrix->offsets[block];
        char *to = (char *)out + (block * TILE_ROWS - first) * columns * size;
        const int rows = MIN(TILE_ROWS, last - block * TILE_ROWS);
        _Alignas(64) char weights[TILE_ROWS * CHUNK * sizeof(float)];
        for (int64_t start = 0; start < columns; start += CHUNK) {
            const int64_t width = MIN(CHUNK, columns - start), tile = start / QUANTIZED_COLUMNS;
            codes = f.expand(masks, grids, codes, tile, MIN(tile + CHUNK / QUANTIZED_COLUMNS, num_tiles), weights);
            for (int row = 0; row < rows; row++) {
                const char *from = weights + row * CHUNK * f.input_size;
                char *place = to + (row * columns + start) * size;
                if (f.input_size == size)
                    memcpy(place, from, width * size);
                else
                    for (int64_t j = 0; j < width; j++)
                        ((uint16_t *)place)[j] = bfloat16_of(((const float *)from)[j]);
            }
        }
    }
}

void tiles_unpack(enum level level, const tiles *matrix, int64_t first, int64_t last, void *out, int threads)
{
    if (matrix->grids) {
        unpack_quantized(level, matrix, first, last, out, threads);
        return;
    }
    const int64_t columns = matrix->columns, num_tiles = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int size = value_size(matrix->type);
    const unpack_block unpack = unpacks[level][size == 4];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = first / TILE_ROWS; block < (last + TILE_ROWS - 1) / TILE_ROWS; block++) {
        const uint8_t *masks = matrix->masks + block * num_tiles * 4 * TILE_ROWS;
        const char *values = (const char *)matrix->values + matrix->offsets[block] * size;
        char *to = (char *)out + (block * TILE_ROWS - first) * columns * size;
        const int rows = MIN(TILE_ROWS, last - block * TILE_ROWS);
        int64_t done = 0;
        if (rows == TILE_ROWS && unpack) {
            done = columns / TILE_COLUMNS;
            values = unpack(masks, values, done, to, columns);
        }
        if (size == 2)
            unpack_rest_16(masks, (const void *)values, done, num_tiles, rows, (void *)to, columns);
        else
            unpack_rest_32(masks, (const void *)values, done, num_tiles, rows, (void *)to, columns);
    }
}

void tiles_mask(const tiles *matrix, const void *weight, int threads)
{
    const int64_t columns = matrix->columns, num_tiles = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int64_t blocks = (matrix->rows + TILE_ROWS - 1) / TILE_ROWS;
    const int size = value_size(matrix->type);
    int64_t *counts = matrix->offsets + 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const char *from = (const char *)weight + block * TILE_ROWS * columns * size;
        uint8_t *masks = matrix->masks + block * num_tiles * 4 * TILE_ROWS;
        const int rows = MIN(TILE_ROWS, matrix->rows - block * TILE_ROWS);
        counts[block] = size == 2 ? mask_16((const void *)from, columns, num_tiles, rows, masks)
                                  : mask_32((const void *)from, columns, num_tiles, rows, masks);
    }
    matrix->offsets[0] = 0;
    for (int64_t block = 0; block < blocks; block++)
        matrix->offsets[block + 1] += matrix->offsets[block];
}

void tiles_fill(const tiles *matrix, const void *weight, int threads)
{
    const int64_t columns = matrix->columns, num_tiles = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int size = value_size(matrix->type);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (matrix->rows + TILE_ROWS - 1) / TILE_ROWS; block++) {
        const char *from = (const char *)weight + block * TILE_ROWS * columns * size;
        const uint8_t *masks = matrix->masks + block * num_tiles * 4 * TILE_ROWS;
        char *values = (char *)matrix->values + matrix->offsets[block] * size;
        if (size == 2)
            fill_16((const void *)from, columns, masks, num_tiles, (void *)values);
        else
            fill_32((const void *)from, columns, masks, num_tiles, (void *)values);
    }
}

int tiles_check(const tiles *matrix, int64_t num_values, int threads)
{
    const int words = tile_columns(matrix) / 32;
    const int64_t columns = matrix->columns, num_tiles = (columns + 32 * words - 1) / (32 * words);
    const int64_t blocks = (matrix->rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t wrong = matrix->offsets[0] != 0 || matrix->offsets[blocks] != num_values;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : wrong)
    for (int64_t block = 0; block < blocks; block++) {
        const uint8_t *masks = matrix->masks + block * num_tiles * 4 * words * TILE_ROWS;
        uint64_t count = 0;
        for (int64_t tile = 0; tile < num_tiles; tile++)
            for (int word = 0; word < TILE_ROWS * words; word++, masks += 4) {
                const int64_t first = 32 * (tile * words + word % words);
                const int64_t width = block * TILE_ROWS + word / words < matrix->rows ? columns - first : 0;
                const uint32_t mask = bits_of(masks);
                count += __builtin_popcount(mask);
                wrong += width < 32 && mask >> MAX(width, 0) != 0;
            }
        /* Unsigned: the difference of hostile offsets may not fit. */
        wrong += (uint64_t)matrix->offsets[block + 1] - (uint64_t)matrix->offsets[block] != count;
    }
    return !wrong;
}
