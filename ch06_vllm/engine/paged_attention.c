/* Attention of one new token a sequence over a paged KV cache. Compiled for a type and a HEAD_DIM.

   A block of the cache is [block_size, kv_heads, head_dim]; a sequence's keys lie in the blocks that its table names.
   Without this loop the blocks would first be gathered into one padded tensor: at 32 sequences of 500 tokens that copy
   costs several times the attention itself. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef BFLOAT16
typedef uint16_t element; /* the upper half of a float */
static inline float load(element x) {
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}
static inline element store(float x) { /* round to nearest even, as torch does */
    union { float value; uint32_t bits; } u = {x};
    return (element)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
}
#else
typedef float element;
static inline float load(element x) { return x; }
static inline element store(float x) { return x; }
#endif

/* One query head over one sequence. HEAD_DIM is known when this is compiled, so that the loops over it become a few
   vector instructions and `sum` stays in registers. Rows of the cache are `row` elements apart. */
static void attend(const element *query, const element *keys, const element *values, const int32_t *table, int length,
                   int block_size, long row, float scale, float *scores, element *out) {
    float q[HEAD_DIM], sum[HEAD_DIM] = {0}, highest = -INFINITY, total = 0;
    for (int d = 0; d < HEAD_DIM; d++) q[d] = load(query[d]) * scale;
    for (int first = 0; first < length; first += block_size) {
        const int end = first + block_size < length ? first + block_size : length;
        const element *key = keys + (long)table[first / block_size] * block_size * row;
        for (int t = first; t < end; t++, key += row) {
            float score = 0;
            for (int d = 0; d < HEAD_DIM; d++) score += q[d] * load(key[d]);
            scores[t] = score;
        }
    }
    for (int t = 0; t < length; t++) highest = scores[t] > highest ? scores[t] : highest;
    for (int t = 0; t < length; t++) total += scores[t] = expf(scores[t] - highest);
    for (int first = 0; first < length; first += block_size) {
        const int end = first + block_size < length ? first + block_size : length;
        const element *value = values + (long)table[first / block_size] * block_size * row;
        for (int t = first; t < end; t++, value += row)
            for (int d = 0; d < HEAD_DIM; d++) sum[d] += scores[t] * load(value[d]);
    }
    for (int d = 0; d < HEAD_DIM; d++) out[d] = store(sum[d] / total);
}

/* q_nhd, out_nhd: [sequences, heads, HEAD_DIM]. keys, values: [blocks, block_size, kv_heads, HEAD_DIM].
   tables: [sequences, table_width] block numbers. lengths: [sequences] tokens to attend to, the new one among them.
   Returns 0, or 1 when there is no memory. */
int paged_attention(const element *q_nhd, const element *keys, const element *values, const int32_t *tables,
                    const int32_t *lengths, element *out_nhd, int sequences, int heads, int kv_heads, int block_size,
                    int table_width, float scale) {
    const int group = heads / kv_heads; /* query heads that share a key head */
    int longest = 0, failed = 0;
    for (int n = 0; n < sequences; n++) longest = lengths[n] > longest ? lengths[n] : longest;

#pragma omp parallel reduction(| : failed)
    {
        float *scores = malloc(sizeof(float) * longest);
        failed = scores == NULL;
#pragma omp for schedule(dynamic) collapse(2)
        for (int n = 0; n < sequences; n++)
            for (int head = 0; head < heads; head++) {
                const long at = ((long)n * heads + head) * HEAD_DIM, column = (long)(head / group) * HEAD_DIM;
                if (scores)
                    attend(q_nhd + at, keys + column, values + column, tables + (long)n * table_width, lengths[n],
                           block_size, (long)kv_heads * HEAD_DIM, scale, scores, out_nhd + at);
            }
        free(scores);
    }
    return failed;
}
