/* Threads that wait for work. One caller at a time; the caller works too, as number 0.
 *
 * Plain pthreads: OpenMP's runtime would be a second one beside the one torch brings. A thread is
 * started when it is needed first, and sleeps between calls. A process that was forked has none of
 * its parent's threads and starts its own.
 */
#ifndef SMG_WORKERS_H
#define SMG_WORKERS_H

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MOST_WORKERS 1024

typedef void (*smg_work)(void *argument, int worker);

typedef struct smg_workers {
    pthread_mutex_t mutex;
    pthread_cond_t begin, end;
    pthread_t threads[MOST_WORKERS];
    int started;     /* threads, besides callers */
    int wanted;      /* of them, for the present call */
    int busy;        /* of those, not done yet */
    int closing;
    uint64_t calls;
    smg_work work;
    void *argument;
    pid_t owner;
    int has_cores;
    cpu_set_t cores;
    void *scratch; /* of the caller, kept between calls */
    size_t scratch_bytes;
} smg_workers;

typedef struct {
    smg_workers *workers;
    int number;
    uint64_t seen; /* calls that are not for it: those before it was started */
} smg_worker;

static void *smg_worker_main(void *argument) {
    smg_worker me = *(smg_worker *)argument;
    free(argument);
    smg_workers *w = me.workers;
    if (w->has_cores) pthread_setaffinity_np(pthread_self(), sizeof w->cores, &w->cores);
    uint64_t seen = me.seen;
    pthread_mutex_lock(&w->mutex);
    for (;;) {
        while (!w->closing && (w->calls == seen || me.number > w->wanted)) {
            seen = w->calls;
            pthread_cond_wait(&w->begin, &w->mutex);
        }
        if (w->closing) break;
        seen = w->calls;
        smg_work work = w->work;
        void *task = w->argument;
        pthread_mutex_unlock(&w->mutex);
        work(task, me.number);
        pthread_mutex_lock(&w->mutex);
        if (--w->busy == 0) pthread_cond_signal(&w->end);
    }
    pthread_mutex_unlock(&w->mutex);
    return NULL;
}

/* As after smg_workers_new: no thread is there. */
static void smg_workers_reset(smg_workers *w) {
    pthread_mutex_init(&w->mutex, NULL);
    pthread_cond_init(&w->begin, NULL);
    pthread_cond_init(&w->end, NULL);
    w->started = w->wanted = w->busy = w->closing = 0;
    w->owner = getpid();
}

/* Start threads until there are `count`, or as many as the system gives. Mutex held. */
static void smg_workers_start(smg_workers *w, int count) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are Python's */
    while (w->started < count) {
        smg_worker *me = malloc(sizeof *me);
        if (!me) break;
        *me = (smg_worker){w, w->started + 1, w->calls};
        if (pthread_create(&w->threads[w->started], NULL, smg_worker_main, me)) {
            free(me);
            break;
        }
        w->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Run work(argument, i) in up to `threads` threads at once, the caller's among them. */
static void smg_workers_run(smg_workers *w, int threads, smg_work work, void *argument) {
    if (w->owner != getpid()) smg_workers_reset(w);
    int others = (threads > MOST_WORKERS ? MOST_WORKERS : threads) - 1;
    if (others > 0) {
        pthread_mutex_lock(&w->mutex);
        smg_workers_start(w, others);
        w->wanted = w->busy = others < w->started ? others : w->started;
        w->work = work;
        w->argument = argument;
        w->calls++;
        pthread_cond_broadcast(&w->begin);
        pthread_mutex_unlock(&w->mutex);
    }
    work(argument, 0);
    if (others > 0) {
        pthread_mutex_lock(&w->mutex);
        while (w->busy) pthread_cond_wait(&w->end, &w->mutex);
        pthread_mutex_unlock(&w->mutex);
    }
}

/* Memory of at least `bytes` that stays until the next call; NULL where there is none. */
static void *smg_workers_scratch(smg_workers *w, size_t bytes) {
    if (w->scratch_bytes < bytes) {
        free(w->scratch);
        w->scratch_bytes = 0;
        if (posix_memalign(&w->scratch, 64, bytes)) w->scratch = NULL;
        if (w->scratch) w->scratch_bytes = bytes;
    }
    return w->scratch;
}

#define EXPORT __attribute__((visibility("default")))

/* cores: those that the threads may run on, or none for the caller's. NULL without memory. */
EXPORT smg_workers *smg_workers_new(const int32_t *cores, int count) {
    smg_workers *w = calloc(1, sizeof *w);
    if (!w) return NULL;
    CPU_ZERO(&w->cores);
    for (int i = 0; i < count; i++)
        if (cores[i] >= 0 && cores[i] < CPU_SETSIZE) CPU_SET(cores[i], &w->cores);
    w->has_cores = count > 0;
    smg_workers_reset(w);
    return w;
}

EXPORT int smg_workers_started(const smg_workers *w) { return w->owner == getpid() ? w->started : 0; }

/* End the threads. No call may be running. */
EXPORT void smg_workers_close(smg_workers *w) {
    if (w->owner == getpid()) {
        pthread_mutex_lock(&w->mutex);
        w->closing = 1;
        pthread_cond_broadcast(&w->begin);
        pthread_mutex_unlock(&w->mutex);
        for (int i = 0; i < w->started; i++) pthread_join(w->threads[i], NULL);
    }
    free(w->scratch);
    free(w);
}

#endif
