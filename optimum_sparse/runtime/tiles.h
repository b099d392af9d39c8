/* The products for one set of instructions and one type of values: included once for each, see kernels.c, with
 *
 *   NAME(function)      the function's name for this set and type
 *   TARGET              what lets the compiler use these instructions
 *   VALUE, INPUT        the types of a stored value, and of an input to multiply it with
 *   LANES               columns that are multiplied at once
 *   WEIGHTS, SUMS       vectors of LANES weights, and of the sums that they are added to
 *   QUANTIZED           defined if the values are codes
 *   EXPAND(mask, v, g)  LANES weights: those whose bit of *mask is set come from v in order, the others are zero; codes
 *                       are of the grid g
 *   POPCOUNT(mask)      how many bits are set in the LANES bits at mask
 *   WIDEN(w)            LANES weights from a dense row; without it there are no dense products
 *   LOAD, STORE         LANES inputs or expanded weights
 *   MADD(sums, w, x)    sums + w * x
 *   TOTAL(sums)         one number
 *   TOKENS              vectors that are multiplied at once: 4 * TOKENS sums must fit into the registers
 */

#ifdef QUANTIZED
#define WIDTH QUANTIZED_COLUMNS
#define GRID(tile, row) grids[(tile) * TILE_ROWS + (row)]
#else
#define WIDTH TILE_COLUMNS
#define GRID(tile, row) 0
#endif

TARGET static void NAME(matvec)(const uint8_t *masks, const uint32_t *grids, const VALUE *values, const INPUT *x,
                                int64_t num_tiles, float *out)
{
    SUMS sums[TILE_ROWS] = {0};
    (void)grids;
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        prefetch_tile(masks, TILE_ROWS * WIDTH / 8, values, TILE_ROWS * WIDTH / 2 * sizeof(VALUE));
        UNROLL for (int row = 0; row < TILE_ROWS; row++)
            UNROLL for (int j = 0; j < WIDTH; j += LANES) {
                const uint8_t *mask = masks + WIDTH / 8 * row + j / 8;
                sums[row] = MADD(sums[row], EXPAND(mask, values, GRID(tile, row)), LOAD(x + j));
                values += POPCOUNT(mask);
            }
        masks += WIDTH / 8 * TILE_ROWS;
        x += WIDTH;
    }
    UNROLL for (int row = 0; row < TILE_ROWS; row++) /* else the sums would be kept in memory */
        out[row] = TOTAL(sums[row]);
}

/* Write the weights of some tiles of a block to 8 rows that are CHUNK apart; returns the next value. */
TARGET static const VALUE *NAME(expand)(const uint8_t *masks, const uint32_t *grids, const VALUE *values, int64_t first,
                                        int64_t last, INPUT *out)
{
    (void)grids;
    masks += first * WIDTH / 8 * TILE_ROWS;
    for (int64_t tile = first; tile < last; tile++) {
        prefetch_tile(masks, TILE_ROWS * WIDTH / 8, values, TILE_ROWS * WIDTH / 2 * sizeof(VALUE));
        UNROLL for (int row = 0; row < TILE_ROWS; row++)
            UNROLL for (int j = 0; j < WIDTH; j += LANES) {
                const uint8_t *mask = masks + WIDTH / 8 * row + j / 8;
                STORE(out + row * CHUNK + (tile - first) * WIDTH + j, EXPAND(mask, values, GRID(tile, row)));
                values += POPCOUNT(mask);
            }
        masks += WIDTH / 8 * TILE_ROWS;
    }
    return values;
}

/* Several vectors: expand CHUNK columns into the first-level cache, and multiply them densely. */
TARGET static void NAME(matmat)(const uint8_t *masks, const uint32_t *grids, const VALUE *values, const INPUT *x,
                                int64_t stride, int64_t tokens, int64_t num_tiles, INPUT *expanded, float *partial,
                                float *out)
{
    const int64_t groups = (tokens + TOKENS - 1) / TOKENS;
    SUMS *sums = (SUMS *)partial;
    for (int64_t i = 0; i < groups * TOKENS * TILE_ROWS; i++)
        sums[i] = (SUMS){0};
    for (int64_t start = 0; start < num_tiles; start += CHUNK / WIDTH) {
        const int64_t stop = MIN(start + CHUNK / WIDTH, num_tiles), width = (stop - start) * WIDTH;
        values = NAME(expand)(masks, grids, values, start, stop, expanded);
        for (int64_t group = 0; group < groups; group++)
            for (int half = 0; half < TILE_ROWS; half += 4) {
                SUMS *place = sums + (group * TILE_ROWS + half) * TOKENS, local[4][TOKENS];
                const INPUT *inputs[TOKENS];
                UNROLL for (int t = 0; t < TOKENS; t++) /* a group that is not full repeats its last vector */
                    inputs[t] = x + MIN(group * TOKENS + t, tokens - 1) * stride + start * WIDTH;
                UNROLL for (int row = 0; row < 4; row++)
                    UNROLL for (int t = 0; t < TOKENS; t++)
                        local[row][t] = place[row * TOKENS + t];
                for (int64_t j = 0; j < width; j += LANES)
                    UNROLL for (int row = 0; row < 4; row++)
                        UNROLL for (int t = 0; t < TOKENS; t++)
                            local[row][t] = MADD(local[row][t], (WEIGHTS)LOAD(expanded + (half + row) * CHUNK + j),
                                                 LOAD(inputs[t] + j));
                UNROLL for (int row = 0; row < 4; row++)
                    UNROLL for (int t = 0; t < TOKENS; t++)
                        place[row * TOKENS + t] = local[row][t];
            }
    }
    for (int64_t token = 0; token < tokens; token++)
        for (int row = 0; row < TILE_ROWS; row++)
            out[token * TILE_ROWS + row] =
                TOTAL(sums[(token / TOKENS * TILE_ROWS + row) * TOKENS + token % TOKENS]);
}

#ifdef WIDEN
/* One row of a dense matrix; x is padded with zeros to a multiple of LANES. */
TARGET static float NAME(dot)(const VALUE *weight, const INPUT *x, int64_t columns)
{
    SUMS sums[8] = {0};
    int64_t j = 0;
    for (; j + 8 * LANES <= columns; j += 8 * LANES) {
        prefetch_row(weight + j, 8 * LANES * sizeof(VALUE));
        UNROLL for (int i = 0; i < 8; i++)
            sums[i] = MADD(sums[i], WIDEN(weight + j + i * LANES), LOAD(x + j + i * LANES));
    }
    for (; j + LANES <= columns; j += LANES)
        sums[0] = MADD(sums[0], WIDEN(weight + j), LOAD(x + j));
    if (j < columns) {
        VALUE rest[LANES] = {0};
        memcpy(rest, weight + j, (columns - j) * sizeof(VALUE));
        sums[1] = MADD(sums[1], WIDEN(rest), LOAD(x + j));
    }
    UNROLL for (int i = 4; i > 0; i /= 2)
        UNROLL for (int k = 0; k < i; k++)
            sums[k] = sums[k] + sums[k + i];
    return TOTAL(sums[0]);
}
#endif

#undef WIDTH
#undef GRID
