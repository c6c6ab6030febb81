/* Attention of one new token a sequence over a paged KV cache. Compiled twice: ELEMENT is float or bfloat16.

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

/* q_nhd, out_nhd: [sequences, heads, head_dim]. keys, values: [blocks, block_size, kv_heads, head_dim].
   tables: [sequences, table_width] block numbers. lengths: [sequences] tokens to attend to, the new one among them.
   Returns 0, or 1 when there is no memory. */
int paged_attention(const element *q_nhd, const element *keys, const element *values, const int32_t *tables,
                    const int32_t *lengths, element *out_nhd, int sequences, int heads, int kv_heads, int head_dim,
                    int block_size, int table_width, float scale) {
    const int group = heads / kv_heads; /* query heads that share a key head */
    const long row = (long)kv_heads * head_dim;
    int longest = 0, failed = 0;
    for (int n = 0; n < sequences; n++)
        if (lengths[n] > longest) longest = lengths[n];

#pragma omp parallel reduction(| : failed)
    {
        float *scores = malloc(sizeof(float) * ((size_t)longest + 2 * (size_t)head_dim));
        float *query = scores ? scores + longest : NULL, *sum = scores ? query + head_dim : NULL;
        failed |= scores == NULL;
#pragma omp for schedule(dynamic) collapse(2)
        for (int n = 0; n < sequences; n++)
            for (int head = 0; head < heads; head++) {
                if (!scores) continue;
                const int length = lengths[n];
                const int32_t *table = tables + (long)n * table_width;
                const long at = ((long)n * heads + head) * head_dim, column = (long)(head / group) * head_dim;
                float highest = -INFINITY, total = 0;
                for (int d = 0; d < head_dim; d++) query[d] = load(q_nhd[at + d]) * scale, sum[d] = 0;
                for (int t = 0; t < length; t++) {
                    const element *key = keys + ((long)table[t / block_size] * block_size + t % block_size) * row + column;
                    float score = 0;
                    for (int d = 0; d < head_dim; d++) score += query[d] * load(key[d]);
                    scores[t] = score;
                    highest = score > highest ? score : highest;
                }
                for (int t = 0; t < length; t++) total += scores[t] = expf(scores[t] - highest);
                for (int t = 0; t < length; t++) {
                    const element *value = values + ((long)table[t / block_size] * block_size + t % block_size) * row + column;
                    for (int d = 0; d < head_dim; d++) sum[d] += scores[t] * load(value[d]);
                }
                for (int d = 0; d < head_dim; d++) out_nhd[at + d] = store(sum[d] / total);
            }
        free(scores);
    }
    return failed;
}
