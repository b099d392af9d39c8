/* Packs, checks, unpacks and multiplies random matrices with every level, in memory that ends where it must.
 *
 * For a sanitizer: every buffer is an allocation of its own with no byte to spare, and all content is compared with
 * plain loops in double. Prints the levels that it tried; its exit code is 1 if something is wrong.
 */
#include "kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state = 1;

static uint32_t random_bits(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33;
}

static int64_t below(int64_t n) { return random_bits() % n; }

static double uniform(void) { return random_bits() / 2147483648.0; }

static void *copy_of(const void *from, size_t size)
{
    void *copy = malloc(size);
    memcpy(copy, from, size);
    return copy;
}

static void put(void *to, int64_t i, enum type type, float value)
{
    if (type == FLOAT32)
        ((float *)to)[i] = value;
    else {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        ((uint16_t *)to)[i] = bits >> 16;
    }
}

static double get(const void *from, int64_t i, enum type type)
{
    if (type == FLOAT32)
        return ((const float *)from)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void *random_array(int64_t n, enum type type, double sparsity)
{
    void *array = malloc(n * (type == FLOAT32 ? 4 : 2));
    for (int64_t i = 0; i < n; i++)
        put(array, i, type, uniform() < sparsity ? 0 : uniform() * 2 - 1);
    return array;
}

static void fail(const char *what, enum level level, const tiles *matrix)
{
    printf("%s is wrong: %s, %lld x %lld, type %d%s\n", what, level_names[level], (long long)matrix->rows,
           (long long)matrix->columns, matrix->type, matrix->grids ? ", quantised" : "");
    exit(1);
}

static void compare(const char *what, enum level level, const tiles *matrix, const void *weight, enum type weights,
                    const void *x, int64_t tokens, const void *bias, const void *out)
{
    const enum type type = matrix->type;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t row = 0; row < matrix->rows; row++) {
            double sum = bias ? get(bias, row, type) : 0, magnitude = fabs(sum), total = 0;
            for (int64_t j = 0; j < matrix->columns; j++) {
                const double w = get(weight, row * matrix->columns + j, weights);
                const double term = w * get(x, t * matrix->columns + j, type);
                sum += term;
                magnitude += fabs(term);
                total += fabs(w);
            }
            const double error = fabs(get(out, t * matrix->rows + row, type) - sum);
            const double inputs = matrix->grids ? total / (1 << 22) : 0; /* all of which are at most 1 */
            const double weights_rounded = matrix->grids && type == BFLOAT16 ? magnitude / 250 : 0;
            if (!(error <= (type == FLOAT32 ? 0 : fabs(sum) / 250) + 2e-6 * magnitude + inputs + weights_rounded))
                fail(what, level, matrix);
        }
}

/* Parts that do not belong together are found before anything is read that is not there. */
static void try_wrong_parts(const tiles *matrix, int64_t mask_bytes)
{
    const int64_t blocks = (matrix->rows + 7) / 8;
    for (int i = 0; i < 4; i++) {
        tiles wrong = *matrix;
        int64_t claimed = matrix->offsets[blocks];
        wrong.masks = copy_of(matrix->masks, mask_bytes);
        wrong.offsets = copy_of(matrix->offsets, (blocks + 1) * 8);
        if (i == 0)
            wrong.masks[below(mask_bytes)] ^= 1 << below(8);
        else if (i == 1)
            wrong.offsets[below(blocks + 1)] ^= (uint64_t)1 << below(64);
        else if (i == 2)
            claimed += below(2) ? 1 : -1;
        else
            wrong.offsets[below(blocks + 1)] += INT64_MIN;
        if (tiles_check(&wrong, claimed, 1 + below(3)))
            fail("tiles_check of wrong parts", PORTABLE, matrix);
        free(wrong.masks), free(wrong.offsets);
    }
}

static void try_one(void)
{
    const enum type type = below(2);
    const int64_t size = type == FLOAT32 ? 4 : 2;
    const double sparsities[] = {0, 1, uniform(), uniform()};
    tiles matrix = {.rows = 1 + below(40), .columns = 1 + below(below(8) ? 100 : 2500), .type = type};
    const int64_t blocks = (matrix.rows + 7) / 8, num_tiles = (matrix.columns + 31) / 32;
    const int64_t tokens = 1 + below(below(2) ? 1 : 9), threads = 1 + below(3);
    void *weight = random_array(matrix.rows * matrix.columns, type, sparsities[below(4)]);
    void *x = random_array(tokens * matrix.columns, type, 0), *bias = below(2) ? random_array(matrix.rows, type, 0) : NULL;

    matrix.masks = malloc(blocks * num_tiles * 32);
    matrix.offsets = malloc((blocks + 1) * 8);
    tiles_mask(&matrix, weight, threads);
    const int64_t stored = matrix.offsets[blocks];
    matrix.values = malloc(stored * size + VALUE_PADDING);
    memset((char *)matrix.values + stored * size, 0xff, VALUE_PADDING); /* NaN: must not reach a sum */
    tiles_fill(&matrix, weight, threads);
    if (!tiles_check(&matrix, stored, threads))
        fail("tiles_check", PORTABLE, &matrix);

    for (enum level level = PORTABLE; level < NUM_LEVELS; level++) {
        if (!level_supported(level))
            continue;
        void *out = malloc(tokens * matrix.rows * size), *row = malloc(matrix.rows * size);
        if (tiles_linear(level, &matrix, x, tokens, bias, out, threads))
            fail("memory", level, &matrix);
        compare("tiles_linear", level, &matrix, weight, type, x, tokens, bias, out);
        if (dense_linear(level, type, weight, matrix.rows, matrix.columns, x, bias, row, threads))
            fail("memory", level, &matrix);
        compare("dense_linear", level, &matrix, weight, type, x, 1, bias, row);

        const int64_t first = below(blocks) * 8;
        const int64_t last = below(2) ? matrix.rows : first + 8 < matrix.rows ? first + 8 : matrix.rows;
        void *part = malloc((last - first) * matrix.columns * size);
        tiles_unpack(level, &matrix, first, last, part, threads);
        if (memcmp(part, (char *)weight + first * matrix.columns * size, (last - first) * matrix.columns * size))
            fail("tiles_unpack", level, &matrix);
        free(part), free(row), free(out);
    }

    try_wrong_parts(&matrix, blocks * num_tiles * 32);
    free(weight), free(x), free(bias), free(matrix.masks), free(matrix.offsets), free(matrix.values);
}

/* The same for a quantised matrix, which is packed here one code after the other. */
static void try_quantized(void)
{
    const enum type type = below(2);
    const int64_t size = type == FLOAT32 ? 4 : 2;
    const double sparsities[] = {0, 1, uniform(), uniform()}, sparsity = sparsities[below(4)];
    tiles matrix = {.rows = 1 + below(40), .columns = 1 + below(below(8) ? 300 : 2500), .type = type};
    const int64_t blocks = (matrix.rows + 7) / 8, num_tiles = (matrix.columns + 127) / 128;
    const int64_t tokens = 1 + below(below(2) ? 1 : 9), threads = 1 + below(3);
    const int64_t mask_bytes = blocks * num_tiles * 128;
    void *x = random_array(tokens * matrix.columns, type, 0), *bias = below(2) ? random_array(matrix.rows, type, 0) : NULL;
    if (below(4) == 0)
        memset((char *)x + below(tokens * matrix.columns) * size, 0, size);

    uint32_t *grids = malloc(blocks * num_tiles * 8 * sizeof *grids);
    uint8_t *codes = malloc(matrix.rows * matrix.columns);
    float *weight = calloc(matrix.rows * matrix.columns, sizeof *weight);
    int64_t stored = 0;
    matrix.grids = grids;
    matrix.masks = calloc(mask_bytes, 1);
    matrix.offsets = calloc(blocks + 1, 8);
    for (int64_t block = 0; block < blocks; block++) {
        for (int64_t i = block * num_tiles * 8; i < (block + 1) * num_tiles * 8; i++) {
            const int64_t row = block * 8 + i % 8, tile = i / 8 % num_tiles;
            const float scale = 1e-3 + uniform();
            memcpy(&grids[i], &scale, 4);
            grids[i] = (grids[i] & 0xffff0000) | below(256);
            for (int64_t j = tile * 128; row < matrix.rows && j < matrix.columns && j < tile * 128 + 128; j++) {
                const int code = below(256), zero = grids[i] & 0xff;
                if (uniform() < sparsity)
                    continue;
                matrix.masks[i * 16 + j % 128 / 8] |= 1 << j % 8;
                codes[stored++] = code;
                const uint32_t bits = grids[i] & 0xffff0000;
                float rounded;
                memcpy(&rounded, &bits, 4);
                weight[row * matrix.columns + j] = rounded * (code - zero);
            }
        }
        matrix.offsets[block + 1] = stored;
    }
    matrix.values = malloc(stored + VALUE_PADDING);
    memcpy(matrix.values, codes, stored);
    memset((char *)matrix.values + stored, 0xff, VALUE_PADDING);
    if (!tiles_check(&matrix, stored, threads))
        fail("tiles_check", PORTABLE, &matrix);

    for (enum level level = PORTABLE; level < NUM_LEVELS; level++) {
        if (!level_supported(level))
            continue;
        void *out = malloc(tokens * matrix.rows * size);
        if (tiles_linear(level, &matrix, x, tokens, bias, out, threads))
            fail("memory", level, &matrix);
        compare("tiles_linear", level, &matrix, weight, FLOAT32, x, tokens, bias, out);

        const int64_t first = below(blocks) * 8;
        const int64_t last = below(2) ? matrix.rows : first + 8 < matrix.rows ? first + 8 : matrix.rows;
        void *part = malloc((last - first) * matrix.columns * size);
        tiles_unpack(level, &matrix, first, last, part, threads);
        for (int64_t i = 0; i < (last - first) * matrix.columns; i++) {
            const double expected = weight[first * matrix.columns + i];
            if (!(fabs(get(part, i, type) - expected) <= (type == FLOAT32 ? 0 : fabs(expected) / 256)))
                fail("tiles_unpack", level, &matrix);
        }
        free(part), free(out);
    }
    try_wrong_parts(&matrix, mask_bytes);
    free(x), free(bias), free(grids), free(codes), free(weight), free(matrix.masks), free(matrix.offsets), free(matrix.values);
}

int main(int argc, char **argv)
{
    const int tries = argc > 1 ? atoi(argv[1]) : 100;
    for (int i = 0; i < tries; i++)
        try_one(), try_quantized();
    for (enum level level = PORTABLE; level < NUM_LEVELS; level++)
        if (level_supported(level))
            printf("%s ", level_names[level]);
    printf("\n");
    return 0;
}
