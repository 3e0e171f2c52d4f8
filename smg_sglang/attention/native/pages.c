#define _GNU_SOURCE
/* Decode attention over pages where they lie: the kernel behind pages.py, which checks its input.
 *
 * A unit of work is some pages of a request, over all its heads, so that whole pages are read in
 * the order of their bytes. A thread takes one unit after another and leaves its state (sums,
 * maximum and weights of each query row); the states of a request are then merged in their order,
 * so that the result does not depend on threads. Within a unit, blocks of BLOCK keys are attended
 * head by head (online softmax), while the next block is fetched from memory.
 */
#include "vectors.h"
#include "workers.h"

/* Keys a block, a multiple of WIDTH. More make fewer passes over the sums; K and V of two blocks have
 * to stay in the second-level cache. */
#ifndef BLOCK
#define BLOCK 32
#endif
/* Query rows that are multiplied with a key at once, and keys that are summed across at once. */
#define KEYS 4
#define LINE 64

/* And chunks of values that are summed at once: what the registers hold. */
#if WIDTH == 16 || defined(__aarch64__)
#define ROWS 4
#define SPANS 2
#else
#define ROWS 2
#define SPANS 1
#endif

/* The same in kernel.py, field by field. Strides are in bytes. */
typedef struct {
    const float *q;   /* [rows][q_heads][dim] */
    float *out;       /* [rows][q_heads][v_dim] */
    float *lse;       /* [rows][q_heads] */
    const int64_t *bases;         /* [memories][2]: where K and V begin in each memory */
    const int64_t *offsets;       /* [pages]: of a page from there, in bytes */
    const int64_t *first_rows;    /* [pages]: its first row, counted from the offset */
    const int32_t *tokens;        /* [pages] */
    const int32_t *memories;      /* [pages] */
    const int64_t *unit_pages;    /* [units + 1]: each unit's range of the pages */
    const int32_t *unit_requests; /* [units], in order */
    const int64_t *request_rows;  /* [requests + 1]: each request's range of the query rows */
    int64_t requests, units;
    int64_t k_row, k_head, v_row, v_head;
    int32_t q_heads, kv_heads, dim, v_dim;
    int32_t dtype;
    int32_t bfloat16_queries; /* whether q is exact in bfloat16 */
    float scale, logit_cap, v_scale;
} smg_job;

/* How the scratch of one thread, and the state of a unit, lie in memory. */
typedef struct {
    int64_t rows; /* query rows a KV head, of the request that has most */
    int64_t q_width, v_width; /* dim and v_dim in whole chunks */
    size_t q, acc, scores, top, total, bytes; /* of a thread: offsets */
    size_t state_floats; /* of a unit: out [rows][q_heads][v_dim], top and total [rows][q_heads] */
} smg_sizes;

static int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

static int64_t steps_of(int64_t n, int64_t of) { return n < of ? 1 : n / of; }

static smg_sizes sizes_of(const smg_job *job) {
    smg_sizes s = {0};
    int64_t group = job->q_heads / job->kv_heads, most = 0;
    for (int64_t r = 0; r < job->requests; r++) {
        int64_t mine = job->request_rows[r + 1] - job->request_rows[r];
        most = mine > most ? mine : most;
    }
    s.rows = most * group;
    s.q_width = whole(job->dim, CHUNK);
    s.v_width = whole(job->v_dim, SPANS * CHUNK);
    size_t all = (size_t)s.rows * job->kv_heads;
    s.q = 0;
    s.acc = s.q + whole(all * s.q_width * 4, LINE);
    s.scores = s.acc + whole(all * s.v_width * 4, LINE);
    s.top = s.scores + whole(s.rows * BLOCK * 4, LINE);
    s.total = s.top + whole(all * 4, LINE);
    s.bytes = s.total + whole(all * 4, LINE);
    s.state_floats = whole((size_t)most * job->q_heads * (job->v_dim + 2), LINE / 4);
    return s;
}

typedef struct {
    const smg_job *job;
    smg_sizes sizes;
    char *scratch; /* [threads][sizes.bytes] */
    float *states; /* [units][sizes.state_floats] */
    const int64_t *request_units; /* [requests + 1] */
    int64_t next_unit, next_row; /* taken with atomic additions */
} smg_call;

/* ---- the keys of a thread's units, a block at a time ---- */

typedef struct {
    const char *from;
    int64_t bytes;
} smg_range;

typedef struct {
    const char *k[BLOCK], *v[BLOCK];
    int count;
    int64_t unit;                /* that they are of, or no unit where there are none */
    smg_range ranges[2 * BLOCK]; /* the bytes they lie in, page by page */
    int range_count;
} smg_block;

#define NO_UNIT (-1)

/* The unit at hand, and its next key. The next unit is taken a block before it is needed, so that
 * its first block is fetched while the last one is attended. */
typedef struct {
    smg_call *call;
    int64_t unit, page, token;
} smg_stream;

static void take_unit(smg_stream *in) {
    int64_t unit = __atomic_fetch_add(&in->call->next_unit, 1, __ATOMIC_RELAXED);
    in->unit = unit < in->call->job->units ? unit : NO_UNIT;
    if (in->unit != NO_UNIT) in->page = in->call->job->unit_pages[unit];
    in->token = 0;
}

/* `rows` rows of all heads are one range where they are neighbours. Heads that are far apart are
 * left to the hardware. */
static void add_ranges(smg_block *block, const char *from, int64_t rows, int64_t row, int64_t head,
                       int64_t heads, int64_t bytes) {
    if (head < 0 || head > 2 * bytes) return;
    int64_t all = head * (heads - 1) + bytes;
    if (row == all) all *= rows, rows = 1;
    for (int64_t i = 0; i < rows; i++)
        block->ranges[block->range_count++] = (smg_range){from + i * row, all};
}

/* Up to `most` keys of the page at hand. */
static int add_keys(const smg_job *job, const smg_stream *in, smg_block *block, int64_t most) {
    int64_t left = job->tokens[in->page] - in->token, size = size_of(job->dtype);
    int take = (int)(left < most ? left : most);
    const int64_t *base = job->bases + 2 * job->memories[in->page];
    int64_t row = job->first_rows[in->page] + in->token;
    const char *k = (const char *)(base[0] + job->offsets[in->page] + row * job->k_row);
    const char *v = (const char *)(base[1] + job->offsets[in->page] + row * job->v_row);
    add_ranges(block, k, take, job->k_row, job->k_head, job->kv_heads, job->dim * size);
    add_ranges(block, v, take, job->v_row, job->v_head, job->kv_heads, job->v_dim * size);
    for (int i = block->count; i < block->count + take; i++) {
        block->k[i] = k, block->v[i] = v;
        k += job->k_row, v += job->v_row;
    }
    block->count += take;
    return take;
}

static void next_block(smg_stream *in, smg_block *block) {
    const smg_job *job = in->call->job;
    block->count = block->range_count = 0;
    block->unit = in->unit;
    if (in->unit == NO_UNIT) return;
    int64_t end = job->unit_pages[in->unit + 1];
    while (block->count < BLOCK && in->page < end) {
        in->token += add_keys(job, in, block, BLOCK - block->count);
        if (in->token < job->tokens[in->page]) break;
        in->page++;
        in->token = 0;
    }
    for (int i = block->count; i % KEYS; i++) /* read once more, not counted */
        block->k[i] = block->k[i - 1], block->v[i] = block->v[i - 1];
    if (in->page == end) take_unit(in);
}

/* ---- fetching the next block, a few lines with each step of this one ---- */

/* A core has few misses on their way at once: a burst of fetches would stop it. In the order of the
 * addresses, so that the hardware runs ahead of them. */
typedef struct {
    const smg_range *range, *end;
    int64_t byte;      /* the next line of the range */
    int64_t due, step; /* lines that are due, and more with each step of weight 1: 2**-16ths */
} smg_fetch;

/* How much is fetched with a step over keys and over values, which take about as long: early is
 * better (measured). */
#define KEY_STEP 2
#define VALUE_STEP 1

/* steps: the sum of their weights. */
static smg_fetch fetch_of(const smg_block *block, int64_t steps) {
    int64_t lines = 0;
    for (int i = 0; i < block->range_count; i++)
        lines += (block->ranges[i].bytes + LINE - 1) / LINE;
    return (smg_fetch){block->ranges, block->ranges + block->range_count, 0, 0,
                       (lines << 16) / steps + 1};
}

INLINE void fetch_line(smg_fetch *f) {
    __builtin_prefetch(f->range->from + f->byte, 0, 3);
    f->byte += LINE;
    if (f->byte >= f->range->bytes) {
        f->byte = 0;
        f->range++;
    }
}

INLINE void fetch_more(smg_fetch *f, int weight) {
    f->due += weight * f->step;
    for (; f->due >= 1 << 16; f->due -= 1 << 16)
        if (f->range != f->end) fetch_line(f);
}

static void fetch_all(smg_fetch f) {
    while (f.range != f.end) fetch_line(&f);
}

/* ---- scores ---- */

/* Scores of KEYS keys and `rows` query rows: to scores + row * BLOCK. */
INLINE void score_keys(int dtype, int rows, const char *const *keys, int64_t offset, const float *q,
                       int64_t q_width, int64_t dim, float *scores, smg_fetch *fetch) {
    vf sums[ROWS * KEYS];
    for (int i = 0; i < ROWS * KEYS; i++) sums[i] = (vf){0};
    int64_t d = 0, size = size_of(dtype), tail = dim % CHUNK;
    for (; d + CHUNK <= dim; d += CHUNK) {
        fetch_more(fetch, KEY_STEP);
#pragma GCC unroll 4
        for (int t = 0; t < KEYS; t++) {
            vf a, b;
            read_chunk(dtype, keys[t] + offset + d * size, &a, &b);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                sums[r * KEYS + t] += a * LOAD(vf, q + r * q_width + d);
                sums[r * KEYS + t] += b * LOAD(vf, q + r * q_width + d + WIDTH);
            }
        }
    }
    if (tail) {
        char chunk[CHUNK * 4] __attribute__((aligned(64)));
#pragma GCC unroll 4
        for (int t = 0; t < KEYS; t++) {
            vf a, b;
            copy_tail(chunk, keys[t] + offset + d * size, tail * size);
            read_chunk(dtype, chunk, &a, &b);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                sums[r * KEYS + t] += a * LOAD(vf, q + r * q_width + d);
                sums[r * KEYS + t] += b * LOAD(vf, q + r * q_width + d + WIDTH);
            }
        }
    }
    store_sums(scores, BLOCK, sums, rows);
}

#if defined(__AVX512BF16__) && WIDTH == 16
/* The same with bfloat16 queries: products of pairs are exact, their sums float32. */
INLINE void score_keys_bf16(int rows, const char *const *keys, int64_t offset, const uint16_t *q,
                            int64_t q_width, int64_t dim, float *scores, smg_fetch *fetch) {
    vf sums[ROWS * KEYS];
    for (int i = 0; i < ROWS * KEYS; i++) sums[i] = (vf){0};
    for (int64_t d = 0; d < dim; d += CHUNK) {
        fetch_more(fetch, KEY_STEP);
        int64_t left = dim - d;
        __mmask32 mask = left >= CHUNK ? 0xffffffffu : (1u << left) - 1;
#pragma GCC unroll 4
        for (int t = 0; t < KEYS; t++) {
            __m512bh key = (__m512bh)_mm512_maskz_loadu_epi16(mask, keys[t] + offset + 2 * d);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sums[r * KEYS + t] = (vf)_mm512_dpbf16_ps(
                    (__m512)sums[r * KEYS + t], key,
                    (__m512bh)_mm512_loadu_si512(q + r * q_width + d));
        }
    }
    store_sums(scores, BLOCK, sums, rows);
}
#endif

/* ---- softmax ---- */

/* Scores of one row to weights; returns what the sums so far are to be multiplied with. */
INLINE float weigh(float *scores, int count, float scale, float cap, float *top, float *total) {
    float before = *top;
    vf highest = splat(-INFINITY), sum = (vf){0};
    for (int i = count; i < whole(count, WIDTH); i++) scores[i] = -INFINITY;
    for (int i = 0; i < count; i += WIDTH) {
        vf x = LOAD(vf, scores + i) * splat(scale);
        if (cap > 0) {
            vf bent = tanh_of(x / splat(cap)) * splat(cap);
            x = bent;
            for (int j = 0; j < WIDTH; j++)
                if (i + j >= count) x[j] = -INFINITY;
        }
        STORE(scores + i, x);
        highest = larger(x, highest);
    }
    float now = largest_of(highest);
    now = now > before ? now : before;
    for (int i = 0; i < count; i += WIDTH) {
        vf weight = exp_of(LOAD(vf, scores + i) - splat(now));
        STORE(scores + i, weight);
        sum += weight;
    }
    float shrink = before == now ? 1 : expf(before - now);
    *top = now;
    *total = *total * shrink + sum_of(sum);
    return shrink;
}

/* ---- values ---- */

/* acc[row] = acc[row] * shrink[row] + the weighed values of `count` keys, `spans` chunks wide. */
INLINE void add_values(int dtype, int rows, int spans, const char *const *values, int64_t offset,
                       int count, int64_t tail, const float *weights, const float *shrink,
                       float *acc, int64_t v_width, smg_fetch *fetch) {
    vf sums[ROWS][2 * SPANS];
    char chunk[CHUNK * 4] __attribute__((aligned(64)));
    int64_t bytes = CHUNK * size_of(dtype);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * spans; i++)
            sums[r][i] = LOAD(vf, acc + r * v_width + i * WIDTH) * splat(shrink[r]);
    for (int t = 0; t < count; t++) {
        fetch_more(fetch, VALUE_STEP);
#pragma GCC unroll 2
        for (int s = 0; s < spans; s++) {
            vf a, b;
            const char *from = values[t] + offset + s * bytes;
            if (tail) {
                copy_tail(chunk, from, tail * size_of(dtype));
                from = chunk;
            }
            read_chunk(dtype, from, &a, &b);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                vf weight = splat(weights[r * BLOCK + t]);
                sums[r][2 * s] += a * weight;
                sums[r][2 * s + 1] += b * weight;
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * spans; i++) STORE(acc + r * v_width + i * WIDTH, sums[r][i]);
}

INLINE void add_all_values(int dtype, int rows, const smg_block *block, int64_t offset, int64_t dim,
                           const float *weights, const float *shrink, float *acc, int64_t v_width,
                           smg_fetch *fetch) {
    int64_t d = 0, size = size_of(dtype);
    for (; d + SPANS * CHUNK <= dim; d += SPANS * CHUNK) {
        add_values(dtype, rows, SPANS, block->v, offset + d * size, block->count, 0, weights,
                   shrink, acc + d, v_width, fetch);
    }
    for (; d + CHUNK <= dim; d += CHUNK)
        add_values(dtype, rows, 1, block->v, offset + d * size, block->count, 0, weights, shrink,
                   acc + d, v_width, fetch);
    if (d < dim)
        add_values(dtype, rows, 1, block->v, offset + d * size, block->count, dim - d, weights,
                   shrink, acc + d, v_width, fetch);
}

/* ---- a unit ---- */

/* What a thread works with: for the request at hand, its rows of a KV head are its query rows, and
 * in each the heads that share the KV head. */
typedef struct {
    float *q;           /* [kv_heads][rows][q_width], or as many bfloat16 in half of it */
    float *acc;         /* [kv_heads][rows][v_width] */
    float *scores;      /* [rows][BLOCK] */
    float *top, *total; /* [kv_heads][rows] */
    int64_t first, queries, rows;
} smg_thread;

static smg_thread thread_of(const smg_call *call, int worker) {
    const smg_sizes *s = &call->sizes;
    char *memory = call->scratch + worker * s->bytes;
    return (smg_thread){(float *)(memory + s->q), (float *)(memory + s->acc),
                        (float *)(memory + s->scores), (float *)(memory + s->top),
                        (float *)(memory + s->total), 0, 0, 0};
}

static int64_t query_of(const smg_job *job, int64_t head, int64_t row) {
    int64_t group = job->q_heads / job->kv_heads;
    return row / group * job->q_heads + head * group + row % group;
}

INLINE void to_places(int dtype, float *to, const float *from, int64_t dim) {
    int64_t d = 0;
    if (dtype == BFLOAT16)
        for (; d + CHUNK <= dim; d += CHUNK)
            for (int i = 0; i < WIDTH; i++) {
                to[d + i] = from[d + 2 * i];
                to[d + WIDTH + i] = from[d + 2 * i + 1];
            }
    for (; d < dim; d++) to[place(dtype, d)] = from[d];
}

INLINE void from_places(int dtype, float *to, const float *from, int64_t dim) {
    int64_t d = 0;
    if (dtype == BFLOAT16)
        for (; d + CHUNK <= dim; d += CHUNK)
            for (int i = 0; i < WIDTH; i++) {
                to[d + 2 * i] = from[d + i];
                to[d + 2 * i + 1] = from[d + WIDTH + i];
            }
    for (; d < dim; d++) to[d] = from[place(dtype, d)];
}

static void to_bfloat16(uint16_t *to, const float *from, int64_t dim) {
    const uint32_t *bits = (const uint32_t *)from;
    for (int64_t d = 0; d < dim; d++) to[d] = bits[d] >> 16;
}

INLINE void begin_unit(const smg_call *call, smg_thread *me, int64_t unit, int dtype, int pairs) {
    const smg_job *job = call->job;
    const smg_sizes *s = &call->sizes;
    const int64_t *range = job->request_rows + job->unit_requests[unit];
    me->first = range[0];
    me->queries = range[1] - range[0];
    me->rows = me->queries * (job->q_heads / job->kv_heads);
    int64_t all = job->kv_heads * me->rows;
    memset(me->q, 0, all * s->q_width * 4);
    memset(me->acc, 0, all * s->v_width * 4);
    for (int64_t i = 0; i < all; i++) {
        const float *q = job->q + (me->first * job->q_heads +
                                   query_of(job, i / me->rows, i % me->rows)) * job->dim;
        float *to = me->q + i * s->q_width;
        if (pairs) to_bfloat16((uint16_t *)to, q, job->dim);
        else to_places(dtype, to, q, job->dim);
        me->top[i] = -INFINITY;
        me->total[i] = 0;
    }
}

INLINE void end_unit(const smg_call *call, const smg_thread *me, int64_t unit, int dtype) {
    const smg_job *job = call->job;
    float *out = call->states + unit * call->sizes.state_floats;
    float *tops = out + me->queries * job->q_heads * job->v_dim;
    float *totals = tops + me->queries * job->q_heads;
    for (int64_t i = 0; i < job->kv_heads * me->rows; i++) {
        int64_t query = query_of(job, i / me->rows, i % me->rows);
        from_places(dtype, out + query * job->v_dim, me->acc + i * call->sizes.v_width, job->v_dim);
        tops[query] = me->top[i];
        totals[query] = me->total[i];
    }
}

/* Scores of a block for `count` rows of a head, from row `r` on. */
INLINE void score_block(const smg_call *call, const smg_thread *me, const smg_block *block,
                        int64_t head, int64_t r, int count, smg_fetch *fetch, int dtype, int pairs) {
    const smg_job *job = call->job;
    int64_t width = call->sizes.q_width, offset = head * job->k_head;
    const float *q = me->q + (head * me->rows + r) * width;
    for (int t = 0; t < block->count; t += KEYS) {
        float *to = me->scores + r * BLOCK + t;
#if defined(__AVX512BF16__) && WIDTH == 16
        if (pairs) {
            score_keys_bf16(count, block->k + t, offset, (const uint16_t *)q, 2 * width, job->dim, to,
                            fetch);
            continue;
        }
#endif
        (void)pairs;
        score_keys(dtype, count, block->k + t, offset, q, width, job->dim, to, fetch);
    }
}

INLINE void add_block(const smg_call *call, const smg_thread *me, const smg_block *block,
                      int64_t head, int64_t r, int count, smg_fetch *fetch, int dtype) {
    const smg_job *job = call->job;
    int64_t row = head * me->rows + r;
    float *weights = me->scores + r * BLOCK, shrink[ROWS];
    float scale = job->scale * (dtype == FLOAT8_E4M3 ? E4M3_SCALE : 1);
    for (int i = 0; i < count; i++)
        shrink[i] = weigh(weights + i * BLOCK, block->count, scale, job->logit_cap,
                          me->top + row + i, me->total + row + i);
    add_all_values(dtype, count, block, head * job->v_head, job->v_dim, weights, shrink,
                   me->acc + row * call->sizes.v_width, call->sizes.v_width, fetch);
}

INLINE void attend_rows(const smg_call *call, const smg_thread *me, const smg_block *block,
                        int64_t head, int64_t r, int count, smg_fetch *fetch, int dtype,
                        int pairs) {
    score_block(call, me, block, head, r, count, fetch, dtype, pairs);
    add_block(call, me, block, head, r, count, fetch, dtype);
}

INLINE void attend_block(const smg_call *call, const smg_thread *me, const smg_block *block,
                         const smg_block *ahead, int dtype, int pairs) {
    const smg_job *job = call->job;
    int64_t tiles = job->kv_heads * steps_of(me->rows + ROWS - 1, ROWS);
    int64_t key_steps = steps_of(block->count + KEYS - 1, KEYS) * steps_of(job->dim, CHUNK);
    int64_t value_steps = block->count * steps_of(job->v_dim, SPANS * CHUNK);
    smg_fetch fetch = fetch_of(ahead,
                               tiles * (KEY_STEP * key_steps + VALUE_STEP * value_steps));
    for (int64_t head = 0; head < job->kv_heads; head++) {
        int64_t r = 0;
        for (; r + ROWS <= me->rows; r += ROWS)
            attend_rows(call, me, block, head, r, ROWS, &fetch, dtype, pairs);
#if ROWS == 4
        if (me->rows - r == 3) attend_rows(call, me, block, head, r, 3, &fetch, dtype, pairs);
        if (me->rows - r == 2) attend_rows(call, me, block, head, r, 2, &fetch, dtype, pairs);
#endif
        if (me->rows - r == 1) attend_rows(call, me, block, head, r, 1, &fetch, dtype, pairs);
    }
}

/* A thread's part of a call. */
INLINE void attend_units(smg_call *call, int worker, int dtype, int pairs) {
    smg_thread me = thread_of(call, worker);
    smg_block blocks[2], *block = blocks, *ahead = blocks + 1;
    smg_stream in = {call, NO_UNIT, 0, 0};
    int64_t begun = NO_UNIT;
    take_unit(&in);
    next_block(&in, block);
    fetch_all(fetch_of(block, 1));
    while (block->unit != NO_UNIT) {
        next_block(&in, ahead);
        if (block->unit != begun) begin_unit(call, &me, begun = block->unit, dtype, pairs);
        attend_block(call, &me, block, ahead, dtype, pairs);
        if (ahead->unit != begun) end_unit(call, &me, begun, dtype);
        smg_block *done = block;
        block = ahead, ahead = done;
    }
}

#define ATTEND(name, dtype, pairs)                                               \
    static void name(void *call, int worker) { attend_units(call, worker, dtype, pairs); }
ATTEND(attend_float32, FLOAT32, 0)
ATTEND(attend_bfloat16, BFLOAT16, 0)
ATTEND(attend_float16, FLOAT16, 0)
ATTEND(attend_e4m3, FLOAT8_E4M3, 0)
ATTEND(attend_e5m2, FLOAT8_E5M2, 0)
#if defined(__AVX512BF16__) && WIDTH == 16
ATTEND(attend_pairs, BFLOAT16, 1)
#endif

static smg_work attention_of(const smg_job *job) {
    static const smg_work each[] = {attend_float32, attend_bfloat16, attend_float16, attend_e4m3,
                                    attend_e5m2};
#if defined(__AVX512BF16__) && WIDTH == 16
    if (job->dtype == BFLOAT16 && job->bfloat16_queries) return attend_pairs;
#endif
    return each[job->dtype];
}

/* ---- merging the states of a request ---- */

static void merge_row(const smg_call *call, int64_t request, int64_t row, int64_t head) {
    const smg_job *job = call->job;
    int64_t first = job->request_rows[request], queries = job->request_rows[request + 1] - first;
    int64_t begin = call->request_units[request], end = call->request_units[request + 1];
    int64_t query = (row - first) * job->q_heads + head, dim = job->v_dim;
    int64_t tops = queries * job->q_heads * dim, totals = tops + queries * job->q_heads;
    float *out = job->out + (row * job->q_heads + head) * dim;
    float top = -INFINITY, total = 0;
    for (int64_t u = begin; u < end; u++) {
        float mine = call->states[u * call->sizes.state_floats + tops + query];
        top = mine > top ? mine : top;
    }
    memset(out, 0, dim * 4);
    for (int64_t u = begin; u < end; u++) {
        const float *state = call->states + u * call->sizes.state_floats;
        float weight = expf(state[tops + query] - top);
        total += weight * state[totals + query];
        const float *from = state + query * dim;
        for (int64_t d = 0; d < dim; d++) out[d] += weight * from[d];
    }
    float scale = (job->dtype == FLOAT8_E4M3 ? E4M3_SCALE : 1) * job->v_scale / total;
    if (begin < end)
        for (int64_t d = 0; d < dim; d++) out[d] *= scale;
    job->lse[row * job->q_heads + head] = begin < end ? top + logf(total) : -INFINITY;
}

static void merge_rows(void *argument, int worker) {
    (void)worker;
    smg_call *call = argument;
    const smg_job *job = call->job;
    int64_t rows = job->request_rows[job->requests], row, request = 0;
    while ((row = __atomic_fetch_add(&call->next_row, 1, __ATOMIC_RELAXED)) < rows * job->q_heads) {
        int64_t query = row / job->q_heads;
        while (job->request_rows[request + 1] <= query) request++;
        merge_row(call, request, query, row % job->q_heads);
    }
}

/* States of so many bytes are merged in more than one thread. */
#define MERGE_BYTES (1 << 20)

/* Fill job's out and lse with up to `threads` threads. 0, or 1 where there was no memory. */
EXPORT int smg_attend(smg_workers *workers, const smg_job *job, int threads) {
    smg_call call = {job, sizes_of(job), NULL, NULL, NULL, 0, 0};
    int count = threads < job->units ? threads : (int)job->units;
    count = count < 1 ? 1 : count > MOST_WORKERS ? MOST_WORKERS : count;
    size_t states = job->units * call.sizes.state_floats * 4;
    size_t index = whole((job->requests + 1) * sizeof(int64_t), LINE);
    char *memory = smg_workers_scratch(workers, count * call.sizes.bytes + states + index);
    if (!memory) return 1;
    int64_t *request_units = (int64_t *)(memory + count * call.sizes.bytes + states);
    for (int64_t r = 0, u = 0; r <= job->requests; r++) {
        while (u < job->units && job->unit_requests[u] < r) u++;
        request_units[r] = u;
    }
    call.scratch = memory;
    call.states = (float *)(memory + count * call.sizes.bytes);
    call.request_units = request_units;
    smg_workers_run(workers, count, attention_of(job), &call);
    smg_workers_run(workers, states < MERGE_BYTES ? 1 : count, merge_rows, &call);
    return 0;
}

/* ---- a plain read, to compare with ---- */

typedef struct {
    const char *from;
    const int64_t *offsets;
    int64_t count, bytes, next;
    uint64_t sum;
} smg_reading;

static void read_parts(void *argument, int worker) {
    (void)worker;
    smg_reading *reading = argument;
    int64_t part;
    vu sums[4] = {{0}};
    while ((part = __atomic_fetch_add(&reading->next, 1, __ATOMIC_RELAXED)) < reading->count) {
        const char *from = reading->from + reading->offsets[part];
        for (int64_t at = 0; at + 16 * WIDTH <= reading->bytes; at += 16 * WIDTH)
            for (int i = 0; i < 4; i++) sums[i] += LOAD(vu, from + at + 4 * WIDTH * i);
    }
    uint64_t sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += sums[0][i] + sums[1][i] + sums[2][i] + sums[3][i];
    __atomic_fetch_add(&reading->sum, sum, __ATOMIC_RELAXED);
}

/* Read `count` parts of `bytes` each, at offsets from an address; the sum keeps the compiler from
 * leaving it out. */
EXPORT uint64_t smg_read(smg_workers *workers, const void *from, const int64_t *offsets,
                         int64_t count, int64_t bytes, int threads) {
    smg_reading reading = {from, offsets, count, bytes, 0, 0};
    smg_workers_run(workers, threads, read_parts, &reading);
    return reading.sum;
}
