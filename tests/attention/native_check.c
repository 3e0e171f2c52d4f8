/* The kernel against its definition in double, with blocks of memory of just the right size: built
 * with sanitizers, and for machines that this one only emulates. Prints the number of cases. */
#include "pages.c"

#include <stdio.h>

static uint64_t state = 88172645463325252ull;

static uint64_t next_number(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static int64_t pick(int64_t from, int64_t to) { return from + next_number() % (to - from + 1); }

static double uniform(void) { return (double)(next_number() >> 11) / (1ull << 52) - 1; }

/* A random element and what it means. */
static double put(int dtype, char *to) {
    float x = (float)uniform();
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (dtype == FLOAT32) return memcpy(to, &x, 4), x;
    if (dtype == BFLOAT16) {
        uint16_t half = bits >> 16;
        bits &= 0xffff0000u;
        memcpy(&x, &bits, 4);
        return memcpy(to, &half, 2), x;
    }
    /* sign, exponent and mantissa at random, small enough to be summed */
    int width = dtype == FLOAT16 ? 10 : dtype == FLOAT8_E4M3 ? 3 : 2;
    int bias = dtype == FLOAT8_E4M3 ? 7 : 15;
    int sign = pick(0, 1), exponent = pick(0, bias), mantissa = pick(0, (1 << width) - 1);
    double value = exponent ? ldexp(1 + ldexp(mantissa, -width), exponent - bias)
                            : ldexp(mantissa, 1 - bias - width);
    int code = (sign << (dtype == FLOAT16 || dtype == FLOAT8_E5M2 ? width + 5 : 7)) |
               exponent << width | mantissa;
    if (dtype == FLOAT16) {
        uint16_t half = code;
        memcpy(to, &half, 2);
    } else {
        *to = (char)code;
    }
    return sign ? -value : value;
}

typedef struct {
    char *k, *v;
    double *k_values, *v_values; /* [tokens][kv_heads][dim] */
} page_t;

static int check(smg_workers *workers) {
    int64_t requests = pick(1, 3), kv_heads = pick(1, 4), group = pick(1, 6);
    int64_t dim = pick(1, 140), v_dim = pick(0, 1) ? dim : pick(1, 140);
    int dtype = pick(0, 4), size = size_of(dtype), bf16 = pick(0, 1);
    int64_t k_gap = pick(0, 1) * pick(1, 9), v_gap = pick(0, 1) * pick(1, 9);
    int64_t q_heads = kv_heads * group, pages_each = pick(0, 6), count = 0;
    page_t pages[64];
    int64_t bases[2] = {0, 0}, offsets[64], v_offsets[64], firsts[64], units[65], rows[4] = {0};
    int32_t tokens[64], memories[64], owners[64];
    int64_t bases_each[128];
    (void)bases, (void)v_offsets;
    for (int64_t r = 0; r < requests; r++) {
        rows[r + 1] = rows[r] + pick(1, 3);
        for (int64_t i = 0; i < pages_each; i++, count++) {
            tokens[count] = pick(1, 70), firsts[count] = pick(0, 3), memories[count] = count;
            offsets[count] = pick(0, 5) * size;
            int64_t last = firsts[count] + tokens[count] - 1;
            int64_t k_bytes = offsets[count] + last * (kv_heads * dim + k_gap) * size + kv_heads * dim * size;
            int64_t v_bytes = offsets[count] + last * (kv_heads * v_dim + v_gap) * size + kv_heads * v_dim * size;
            page_t *p = pages + count;
            p->k = malloc(k_bytes), p->v = malloc(v_bytes);
            p->k_values = malloc(tokens[count] * kv_heads * dim * 8);
            p->v_values = malloc(tokens[count] * kv_heads * v_dim * 8);
            memset(p->k, 0xff, k_bytes), memset(p->v, 0xff, v_bytes);
            for (int64_t t = 0; t < tokens[count]; t++) {
                char *k = p->k + offsets[count] + (firsts[count] + t) * (kv_heads * dim + k_gap) * size;
                char *v = p->v + offsets[count] + (firsts[count] + t) * (kv_heads * v_dim + v_gap) * size;
                for (int64_t e = 0; e < kv_heads * dim; e++)
                    p->k_values[t * kv_heads * dim + e] = put(dtype, k + e * size);
                for (int64_t e = 0; e < kv_heads * v_dim; e++)
                    p->v_values[t * kv_heads * v_dim + e] = put(dtype, v + e * size);
            }
            bases_each[2 * count] = (int64_t)p->k, bases_each[2 * count + 1] = (int64_t)p->v;
            units[count] = count, owners[count] = r;
        }
    }
    units[count] = count;
    float *q = malloc(rows[requests] * q_heads * dim * 4);
    float *out = malloc(rows[requests] * q_heads * v_dim * 4), *lse = malloc(rows[requests] * q_heads * 4);
    for (int64_t i = 0; i < rows[requests] * q_heads * dim; i++) {
        char two[4];
        q[i] = bf16 ? (float)put(BFLOAT16, two) : (float)uniform();
    }
    smg_job job = {q, out, lse, bases_each, offsets, firsts, tokens, memories, units, owners, rows,
                   requests, count, (kv_heads * dim + k_gap) * size, dim * size,
                   (kv_heads * v_dim + v_gap) * size, v_dim * size, q_heads, kv_heads, dim, v_dim,
                   dtype, bf16, 0.5f, pick(0, 2) ? 0 : 2.0f, 1.5f};
    if (smg_attend(workers, &job, pick(1, 3))) return puts("no memory"), 1;
    double worst = 0;
    for (int64_t r = 0; r < requests; r++)
        for (int64_t row = rows[r]; row < rows[r + 1]; row++)
            for (int64_t h = 0; h < q_heads; h++) {
                const float *query = q + (row * q_heads + h) * dim;
                double total = 0, *sums = calloc(v_dim, 8);
                for (int64_t p = r * pages_each; p < (r + 1) * pages_each; p++)
                    for (int64_t t = 0; t < tokens[p]; t++) {
                        int64_t at = t * kv_heads + h / group;
                        double score = 0;
                        for (int64_t d = 0; d < dim; d++)
                            score += query[d] * pages[p].k_values[at * dim + d];
                        score *= 0.5;
                        if (job.logit_cap > 0) score = tanh(score / job.logit_cap) * job.logit_cap;
                        total += exp(score);
                        for (int64_t d = 0; d < v_dim; d++)
                            sums[d] += exp(score) * pages[p].v_values[at * v_dim + d];
                    }
                int64_t mine = row * q_heads + h;
                if (pages_each) worst = fmax(worst, fabs(lse[mine] - log(total)));
                else if (lse[mine] != -INFINITY) worst = INFINITY;
                for (int64_t d = 0; d < v_dim; d++) {
                    double want = pages_each ? sums[d] / total * 1.5 : 0;
                    double gap = fabs(out[mine * v_dim + d] - want);
                    worst = gap <= worst ? worst : gap; /* also where it is no number */
                }
                free(sums);
            }
    for (int64_t p = 0; p < count; p++)
        free(pages[p].k), free(pages[p].v), free(pages[p].k_values), free(pages[p].v_values);
    free(q), free(out), free(lse);
    if (!(worst < 2e-5)) printf("off by %g: dtype %d, dims %d and %d\n", worst, dtype, (int)dim, (int)v_dim);
    return !(worst < 2e-5);
}

int main(int count, char **words) {
    int cases = count > 1 ? atoi(words[1]) : 200, wrong = 0;
    smg_workers *workers = smg_workers_new(NULL, 0);
    for (int i = 0; i < cases; i++) wrong += check(workers);
    smg_workers_close(workers);
    printf("%d cases, %d wrong\n", cases, wrong);
    return wrong > 0;
}
