/* Products of codes with a few vectors, in whole numbers: included by kernels.c, with TARGET for AVX-512 VBMI2 and VNNI.
 *
 * The inputs of a tile are rounded to multiples of a power of two, whole numbers below 2^23, so that the error is at most
 * 2^-22 of the largest of them (2^-23, unless that is close to a power of two); of bfloat16, only inputs smaller than
 * 2^-14 of it are rounded at all. Such a number is three digits to the base 256, from -128 to 127. vpdpbusd multiplies
 * codes with digits and adds them up four by four; nothing is rounded until the sums of a tile become float32.
 */
/* For more tokens it is faster to make bfloat16 weights of the codes. */
enum { NUM_DIGITS = 3, LARGEST_BIT = 22, DIGITS_TOKENS = 4 };

typedef struct {
    int8_t digits[NUM_DIGITS][QUANTIZED_COLUMNS]; /* the lowest first */
    int32_t sums[NUM_DIGITS][16]; /* of the digits in each lane, their sign changed; as 16 bits, with zeros above */
    float step, padding[15];
} digits;

enum { DIGITS_SIZE = sizeof(digits) / QUANTIZED_COLUMNS };
_Static_assert(sizeof(digits) == DIGITS_SIZE * QUANTIZED_COLUMNS, "the inputs of a tile have a whole size per column");

/* Returns 0 if there is infinity or NaN. */
TARGET static int tile_to_digits(const float *x, digits *out)
{
    __m512i most = _mm512_setzero_si512();
    for (int j = 0; j < QUANTIZED_COLUMNS; j += 16) {
        const __m512i bits = _mm512_loadu_si512(x + j);
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    const int largest = _mm512_reduce_max_epi32(most);
    if (largest >= 0x7f800000)
        return 0;
    /* As it is stored, 127 more than it is; one more close to the next power of two, for
     * which the highest digit has no place. */
    const int exponent = (largest + 0x20000) >> 23;
    /* 2^(LARGEST_BIT - exponent), and its inverse; neither may be subnormal. */
    const uint32_t bits = (uint32_t)(254 + LARGEST_BIT - MAX(exponent, LARGEST_BIT + 1)) << 23;
    const uint32_t inverse = (254u << 23) - bits;
    float factor;
    memcpy(&factor, &bits, sizeof factor);
    memcpy(&out->step, &inverse, sizeof out->step);
    for (int j = 0; j < QUANTIZED_COLUMNS; j += 16) {
        __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + j), _mm512_set1_ps(factor)));
        for (int d = 0; d < NUM_DIGITS; d++) {
            _mm_storeu_si128((__m128i *)(out->digits[d] + j), _mm512_cvtepi32_epi8(rest));
            rest = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(128)), 8);
        }
    }
    for (int d = 0; d < NUM_DIGITS; d++) {
        __m512i sum = _mm512_setzero_si512();
        for (int j = 0; j < QUANTIZED_COLUMNS; j += 64)
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(out->digits[d] + j));
        sum = _mm512_and_si512(_mm512_sub_epi32(_mm512_setzero_si512(), sum), _mm512_set1_epi32(0xffff));
        _mm512_storeu_si512(out->sums[d], sum);
    }
    return 1;
}

/* out[num_tiles, tokens] of vectors x[tokens, columns]; returns 0 if there is infinity or NaN. */
TARGET static int to_digits(const void *x, enum type type, int64_t tokens, int64_t columns, int64_t num_tiles, digits *out)
{
    for (int64_t tile = 0; tile < num_tiles; tile++)
        for (int64_t t = 0; t < tokens; t++, out++) {
            const int64_t start = t * columns + tile * QUANTIZED_COLUMNS;
            const int width = MIN(QUANTIZED_COLUMNS, columns - tile * QUANTIZED_COLUMNS);
            float inputs[QUANTIZED_COLUMNS] = {0};
            if (type == FLOAT32)
                memcpy(inputs, (const float *)x + start, width * sizeof(float));
            else
                for (int j = 0; j < width; j++)
                    inputs[j] = float_of(((const uint16_t *)x)[start + j]);
            if (!tile_to_digits(inputs, out))
                return 0;
        }
    return 1;
}

/* The codes at their columns, and zeros of the grid at the others: after the correction they count for nothing. */
TARGET INLINE __m512i expand_codes(const uint8_t *mask, const uint8_t *codes, __m512i zero)
{
    __mmask64 k;
    const __m512i values = _mm512_loadu_si512(codes);
    __asm__("kmovq %1, %0" : "=Yk"(k) : "m"(*(const uint64_t(*)[1])mask));
    __asm__("vpexpandb %1, %0%{%2%}" : "+v"(zero) : "v"(values), "Yk"(k));
    return zero;
}

TARGET INLINE int popcount_64(const uint8_t *mask)
{
    uint64_t bits;
    memcpy(&bits, mask, sizeof bits);
    return __builtin_popcountll(bits);
}

/* One row of a tile, of 128 codes, with one vector: sum of (code - zero) * x / step. */
TARGET INLINE __m512 digits_madd(const __m512i *codes, __m512i zero, const digits *x)
{
    __m512i sums[NUM_DIGITS];
    UNROLL for (int d = 0; d < NUM_DIGITS; d++) {
        sums[d] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), zero, _mm512_loadu_si512(x->sums[d]));
        sums[d] = _mm512_dpbusd_epi32(sums[d], codes[0], _mm512_loadu_si512(x->digits[d]));
        sums[d] = _mm512_dpbusd_epi32(sums[d], codes[1], _mm512_loadu_si512(x->digits[d] + 64));
    }
    const __m512i low = _mm512_add_epi32(sums[0], _mm512_slli_epi32(sums[1], 8));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[2]), _mm512_set1_ps(65536), _mm512_cvtepi32_ps(low));
}

/* sums[tokens, 8] += a block times vectors. */
TARGET INLINE void digits_block(const uint8_t *masks, const uint32_t *grids, const uint8_t *codes, const digits *x,
                                int64_t tokens, int64_t num_tiles, __m512 *sums)
{
    for (int64_t tile = 0; tile < num_tiles; tile++, x += tokens, grids += TILE_ROWS) {
        prefetch_tile(masks, TILE_ROWS * QUANTIZED_COLUMNS / 8, codes, TILE_ROWS * QUANTIZED_COLUMNS / 2);
        const __m256i grid = _mm256_loadu_si256((const __m256i *)grids);
        const __m256i zero = _mm256_and_si256(grid, _mm256_set1_epi32(0xff));
        uint32_t zeros[TILE_ROWS], zero_bytes[TILE_ROWS];
        float scales[TILE_ROWS];
        _mm256_storeu_si256((__m256i *)zeros, zero);
        _mm256_storeu_si256((__m256i *)zero_bytes, _mm256_mullo_epi32(zero, _mm256_set1_epi32(0x01010101)));
        __m256 scale = _mm256_castsi256_ps(_mm256_and_si256(grid, _mm256_set1_epi32(0xffff0000)));
        if (tokens == 1)
            scale = _mm256_mul_ps(scale, _mm256_set1_ps(x->step));
        _mm256_storeu_ps(scales, scale);
        /* Each is to be loaded into all lanes from memory, which takes no port of the vectors. */
        __asm__("" : "+m"(zeros), "+m"(zero_bytes), "+m"(scales));
        UNROLL for (int row = 0; row < TILE_ROWS; row++) {
            __m512i row_codes[2];
            UNROLL for (int half = 0; half < 2; half++, masks += 8) {
                row_codes[half] = expand_codes(masks, codes, _mm512_set1_epi32(zero_bytes[row]));
                codes += popcount_64(masks);
            }
            for (int64_t t = 0; t < tokens; t++) {
                const __m512 sum = digits_madd(row_codes, _mm512_set1_epi32(zeros[row]), x + t);
                __m512 factor = _mm512_set1_ps(scales[row]);
                if (tokens > 1)
                    factor = _mm512_mul_ps(factor, _mm512_set1_ps(x[t].step));
                sums[t * TILE_ROWS + row] = _mm512_fmadd_ps(sum, factor, sums[t * TILE_ROWS + row]);
            }
        }
    }
}

TARGET static void digits_matvec(const uint8_t *masks, const uint32_t *grids, const uint8_t *codes, const digits *x,
                                 int64_t num_tiles, float *out)
{
    __m512 sums[TILE_ROWS] = {0};
    digits_block(masks, grids, codes, x, 1, num_tiles, sums);
    UNROLL for (int row = 0; row < TILE_ROWS; row++)
        out[row] = _mm512_reduce_add_ps(sums[row]);
}

TARGET static void digits_matmat(const uint8_t *masks, const uint32_t *grids, const uint8_t *codes, const digits *x,
                                 int64_t stride, int64_t tokens, int64_t num_tiles, void *expanded, float *partial,
                                 float *out)
{
    __m512 *sums = (__m512 *)partial;
    (void)stride, (void)expanded;
    memset(sums, 0, tokens * TILE_ROWS * sizeof *sums);
    digits_block(masks, grids, codes, x, tokens, num_tiles, sums);
    for (int64_t i = 0; i < tokens * TILE_ROWS; i++)
        out[i] = _mm512_reduce_add_ps(sums[i]);
}
