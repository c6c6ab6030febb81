/* The loops of a layer beside its matrix products, each one pass over memory where torch's operators take several.
   Compiled for a type and a HEAD_DIM, which makes of the innermost loops a few vector instructions. Small steps stay on
   one thread: to wake another costs more. Roundings are where the models of transformers have them. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

enum { SMALL = 1 << 14 }; /* elements */

/* x += delta, unless delta is NULL; out = x / rms(x) * weight. x, delta, out: [rows, width]. */
void add_norm(element *x, const element *delta, const element *weight, element *out, int rows, int width, float eps) {
#pragma omp parallel for if ((long)rows * width > SMALL)
    for (int r = 0; r < rows; r++) {
        element *x_r = x + (long)r * width, *out_r = out + (long)r * width;
        float squares = 0;
        if (delta)
            for (int i = 0; i < width; i++) x_r[i] = store(load(x_r[i]) + load(delta[(long)r * width + i]));
        for (int i = 0; i < width; i++) squares += load(x_r[i]) * load(x_r[i]);
        const float scale = 1 / sqrtf(squares / width + eps);
        for (int i = 0; i < width; i++) out_r[i] = store(load(store(load(x_r[i]) * scale)) * load(weight[i]));
    }
}

/* silu(gate) * up. gate_up: [rows, 2 * width], out: [rows, width]. */
void gate(const element *gate_up, element *out, int rows, int width) {
#pragma omp parallel for if ((long)rows * width > SMALL)
    for (int r = 0; r < rows; r++) {
        const element *gate_r = gate_up + (long)r * 2 * width, *up_r = gate_r + width;
        for (int i = 0; i < width; i++) {
            const float x = load(gate_r[i]);
            out[(long)r * width + i] = store(load(store(x / (1 + expf(-x)))) * load(up_r[i]));
        }
    }
}

static void rotate(element *x, const element *cosine, const element *sine, int heads) {
    for (int head = 0; head < heads; head++, x += HEAD_DIM)
        for (int d = 0; d < HEAD_DIM / 2; d++) {
            const float first = load(x[d]), second = load(x[d + HEAD_DIM / 2]);
            x[d] = store(first * load(cosine[d]) - second * load(sine[d]));
            x[d + HEAD_DIM / 2] = store(second * load(cosine[d]) + first * load(sine[d]));
        }
}

/* Rotate queries and keys in place, and put keys and values into the cache. q, k, v: [tokens, heads, HEAD_DIM] with
   rows q_row, k_row, v_row elements apart. cosine, sine: [positions, HEAD_DIM]. keys, values: [slots, kv_heads,
   HEAD_DIM]. */
void rotate_and_store(element *q, element *k, const element *v, const element *cosine, const element *sine,
                      const int64_t *positions, const int64_t *slots, element *keys, element *values, int tokens,
                      int heads, int kv_heads, int q_row, int k_row, int v_row) {
    const int width = kv_heads * HEAD_DIM;
#pragma omp parallel for if ((long)tokens * q_row > SMALL)
    for (int t = 0; t < tokens; t++) {
        const element *cosine_t = cosine + positions[t] * HEAD_DIM, *sine_t = sine + positions[t] * HEAD_DIM;
        rotate(q + (long)t * q_row, cosine_t, sine_t, heads);
        rotate(k + (long)t * k_row, cosine_t, sine_t, kv_heads);
        memcpy(keys + slots[t] * width, k + (long)t * k_row, sizeof(element) * width);
        memcpy(values + slots[t] * width, v + (long)t * v_row, sizeof(element) * width);
    }
}

/* One query head over one sequence; a row of the cache is `row` elements. */
static void attend_one(const element *query, const element *keys, const element *values, const int32_t *table, int length,
                   int block_size, long row, float scale, float *scores, element *out) {
    float q[HEAD_DIM], sum[HEAD_DIM] = {0}, highest = -FLT_MAX, total = 0;
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

/* Attention of one new token a sequence over a paged cache: the blocks are read where they lie. To gather them into one
   padded tensor first costs several times the attention itself.
   q: [sequences, heads, HEAD_DIM] with rows q_row elements apart; out the same, contiguous.
   keys, values: [blocks, block_size, kv_heads, HEAD_DIM]. tables: [sequences, table_width] block numbers. lengths:
   [sequences] tokens to attend to, the new one among them.
   Returns 0, or 1 when there is no memory. */
int attend(const element *q, const element *keys, const element *values, const int32_t *tables, const int32_t *lengths,
           element *out, int sequences, int heads, int kv_heads, int block_size, int table_width, int q_row,
           float scale) {
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
                const long at = (long)head * HEAD_DIM, column = (long)(head / group) * HEAD_DIM;
                if (scores)
                    attend_one(q + (long)n * q_row + at, keys + column, values + column, tables + (long)n * table_width,
                               lengths[n], block_size, (long)kv_heads * HEAD_DIM, scale, scores,
                               out + (long)n * heads * HEAD_DIM + at);
            }
        free(scores);
    }
    return failed;
}
