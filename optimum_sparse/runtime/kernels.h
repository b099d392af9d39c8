/* Products of a sparse matrix in tiles with a few vectors. Plain C, no Python: tests compile it alone.
 *
 * A matrix [rows, columns] is cut into tiles of 8 rows and 32 columns, the last of each padded with zeros. Three
 * streams hold it, tile after tile along each block of 8 rows, and row after row in a tile:
 *   masks    4 bytes for each row of a tile; bit j % 8 of byte j / 8 is set if column j is stored
 *   values   those stored, in order; VALUE_PADDING bytes after the last may be read
 *   offsets  for each block of 8 rows, and at the end, how many values stand before it
 * Nothing is read but the masks, the values and the vectors, all in order: memory is as fast as it gets that way.
 *
 * Of a quantised matrix, the values are codes of 8 bits, and a tile has 128 columns, which share a grid in each row:
 *   masks    16 bytes for each row of a tile
 *   grids    for each row of a tile the scale, a bfloat16 number, in the upper 16 bits, and the zero in the lowest 8;
 *            a weight is scale * (code - zero), rounded to the type when it is unpacked, exact when it is multiplied
 *
 * Callers check sizes and contents (`tiles_check`); the products do not.
 */
#ifndef OPTIMUM_SPARSE_KERNELS_H
#define OPTIMUM_SPARSE_KERNELS_H

#include <stdint.h>

enum { TILE_ROWS = 8, TILE_COLUMNS = 32, QUANTIZED_COLUMNS = 128, VALUE_PADDING = 64 };

/* Sets of instructions, from the one that every machine has to the fastest. */
enum level { PORTABLE, AVX2, AVX512, AVX512_BF16, NUM_LEVELS };

/* Types of weights. Products know the first two; the others are only moved. */
enum type { BFLOAT16, FLOAT32, FLOAT16 };

extern const char *const level_names[NUM_LEVELS];

/* Whether this processor has the instructions of a level, and this library was built with them. */
int level_supported(enum level level);

typedef struct {
    int64_t rows, columns;
    uint8_t *masks;
    void *values;
    int64_t *offsets;
    enum type type;
    const uint32_t *grids; /* NULL: not quantised */
} tiles;

/* out[tokens, rows] = x[tokens, columns] @ matrix.T + bias. All of the same type; bias may be NULL.
 * Returns 0, or -1 if there is no memory. */
int tiles_linear(enum level level, const tiles *matrix, const void *x, int64_t tokens, const void *bias, void *out,
                 int threads);

/* out[rows] = weight[rows, columns] @ x[columns] + bias, for a dense weight. Returns 0, or -1 if there is no memory. */
int dense_linear(enum level level, enum type type, const void *weight, int64_t rows, int64_t columns, const void *x,
                 const void *bias, void *out, int threads);

/* out[last - first, columns]: rows first to last of the matrix; both are multiples of TILE_ROWS, or last is all rows.
 * A quantised matrix is unpacked to the types that products know. */
void tiles_unpack(enum level level, const tiles *matrix, int64_t first, int64_t last, void *out, int threads);

/* Write the masks and offsets of a dense weight: a value is stored unless all of its bits are zero. Not quantised. */
void tiles_mask(const tiles *matrix, const void *weight, int threads);

/* Write the values of a dense weight whose masks and offsets are written. Not quantised. */
void tiles_fill(const tiles *matrix, const void *weight, int threads);

/* Whether masks and offsets belong together, no bit stands outside of the matrix, and num_values are stored. */
int tiles_check(const tiles *matrix, int64_t num_values, int threads);

#endif
