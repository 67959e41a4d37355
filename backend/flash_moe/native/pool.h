/* Threads that outlive a call. One call at a time has them: a second one waits for its turn.
 *
 * A worker that wakes late finds the work closed and sleeps on; the caller waits only for those
 * that took part. After a fork the child has no workers and starts its own on first use.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

typedef void (*piece_fn)(void *context, size_t piece, int thread);

enum { MOST_THREADS = 256, SPIN_NS = 20000 };

static struct {
    pthread_mutex_t turn; /* held by the call that has the pool */
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t wake, idle;
    pthread_t workers[MOST_THREADS];
    int threads, running, open, quit;
    atomic_int joined;
    atomic_uint generation;
    piece_fn run;
    void *context;
    size_t count;
    atomic_size_t next;
    void *scratch;
    size_t scratch_size;
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER, .idle = PTHREAD_COND_INITIALIZER};

static int default_threads(void) {
#ifdef __APPLE__
    int cores = 0; /* the efficiency cores would hold up the others */
    size_t size = sizeof cores;
    if (!sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, NULL, 0) && cores > 0)
        return cores < MOST_THREADS ? cores : MOST_THREADS;
#endif
#ifdef __linux__
    cpu_set_t allowed;
    if (!sched_getaffinity(0, sizeof allowed, &allowed) && CPU_COUNT(&allowed) > 0)
        return CPU_COUNT(&allowed) < MOST_THREADS ? CPU_COUNT(&allowed) : MOST_THREADS;
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : online < MOST_THREADS ? (int)online : MOST_THREADS;
}

static int pool_threads(void) {
    if (!pool.threads) pool.threads = default_threads();
    return pool.threads;
}

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_pieces(int thread) {
    size_t i;
    while ((i = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < pool.count)
        pool.run(pool.context, i, thread);
}

static void *worker(void *argument) {
    const int thread = (int)(intptr_t)argument;
    unsigned seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        if (pool.open && pool.generation != seen) {
            seen = pool.generation;
            pool.joined++;
            pthread_mutex_unlock(&pool.lock);
            take_pieces(thread);
            pthread_mutex_lock(&pool.lock);
            if (--pool.joined == 0) pthread_cond_signal(&pool.idle);
            /* The next phase of a layer is often some microseconds off: look before sleeping. */
            const unsigned generation = pool.generation;
            if (generation == seen && !pool.quit) {
                pthread_mutex_unlock(&pool.lock);
                const long long until = now_ns() + SPIN_NS;
                while (pool.generation == seen && now_ns() < until)
                    for (int i = 0; i < 16; i++) relax();
                pthread_mutex_lock(&pool.lock);
            }
            continue;
        }
        if (pool.quit) break;
        pthread_cond_wait(&pool.wake, &pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

static void after_fork(void) {
    /* Whoever held these in the parent does not exist here. */
    pool.turn = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    pool.idle = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    pool.running = pool.open = pool.quit = 0;
    pool.joined = 0;
}

__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, after_fork);
}

static void pool_start(void) {
    sigset_t all, before; /* signals are for the program's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pool.quit = 0;
    while (pool.running < pool_threads() - 1) {
        void *thread = (void *)(intptr_t)(pool.running + 1);
        if (pthread_create(&pool.workers[pool.running], NULL, worker, thread)) break;
        pool.running++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void pool_enter(void) { pthread_mutex_lock(&pool.turn); }
static void pool_leave(void) { pthread_mutex_unlock(&pool.turn); }

/* run(context, 0 .. count - 1, thread), each once, on all threads; only within enter and leave. */
static void pool_run(piece_fn run, void *context, size_t count) {
    if (pool_threads() == 1 || count < 2) {
        for (size_t i = 0; i < count; i++) run(context, i, 0);
        return;
    }
    if (pool.running < pool_threads() - 1) pool_start();
    pthread_mutex_lock(&pool.lock);
    pool.run = run;
    pool.context = context;
    pool.count = count;
    atomic_store(&pool.next, 0);
    pool.open = 1;
    pool.generation++;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_pieces(0);
    pthread_mutex_lock(&pool.lock);
    pool.open = 0;
    if (pool.joined) {
        pthread_mutex_unlock(&pool.lock);
        const long long until = now_ns() + SPIN_NS;
        while (pool.joined && now_ns() < until) relax();
        pthread_mutex_lock(&pool.lock);
        while (pool.joined) pthread_cond_wait(&pool.idle, &pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
}

/* Memory on a border of 64 until the next call of this; only within enter and leave. */
static __attribute__((unused)) void *pool_scratch(size_t size) {
    size = (size + 63) / 64 * 64;
    if (size > pool.scratch_size) {
        void *old = pool.scratch;
        pool.scratch_size = 0; /* in this order, for a fork may come between */
        pool.scratch = NULL;
        free(old);
        pool.scratch = aligned_alloc(64, size);
        pool.scratch_size = pool.scratch ? size : 0;
    }
    return pool.scratch;
}

int flash_threads(void) {
    pool_enter();
    const int threads = pool_threads();
    pool_leave();
    return threads;
}

void flash_set_threads(int threads) {
    pool_enter();
    pthread_mutex_lock(&pool.lock);
    pool.quit = 1;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    for (int i = 0; i < pool.running; i++) pthread_join(pool.workers[i], NULL);
    pool.running = 0;
    pool.threads = threads < MOST_THREADS ? threads : MOST_THREADS;
    pool_leave();
}
