/* Reads pieces of files into memory, in parallel.
 *
 * The pieces make one stream of bytes, which is cut into tasks of equal length: a long piece is
 * read by several threads, short ones together by one, and neighbours in one call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>

#include "../native/pool.h"

struct piece {
    int64_t file, offset, length, at;
};

struct job {
    const struct piece *pieces;
    const uint64_t *starts; /* where each piece begins in the stream, and where the last one ends */
    size_t count;
    uint64_t task;
    char *to;
    atomic_int failed;
    int64_t piece, error; /* of the first to fail */
};

#include "mapping.h"

enum { END_OF_FILE = -1, PIECES_ON_STACK = 64 };

static int read_fully(int file, char *to, int64_t offset, int64_t length) {
    while (length) {
        const ssize_t done = pread(file, to, (size_t)length, offset);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return errno;
        if (!done) return END_OF_FILE;
        to += done, offset += done, length -= done;
    }
    return 0;
}

static int touch(const struct piece *left, const struct piece *right) {
    return left->file == right->file && left->offset + left->length == right->offset &&
           left->at + left->length == right->at;
}

/* The piece that byte `at` of the stream belongs to. */
static size_t piece_of(const struct job *job, uint64_t at) {
    size_t low = 0, high = job->count;
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if (job->starts[middle] <= at) low = middle;
        else high = middle;
    }
    return low;
}

static void read_task(void *context, size_t number, int thread) {
    (void)thread;
    struct job *job = context;
    const uint64_t *starts = job->starts, total = starts[job->count];
    uint64_t at = number * job->task;
    const uint64_t end = at + job->task < total ? at + job->task : total;
    for (size_t p = piece_of(job, at); at < end && !atomic_load(&job->failed); p++) {
        const struct piece *piece = &job->pieces[p];
        const size_t first = p;
        const uint64_t from = at, into = at - starts[p];
        while (starts[p + 1] < end && p + 1 < job->count &&
               touch(&job->pieces[p], &job->pieces[p + 1]))
            p++;
        at = starts[p + 1] < end ? starts[p + 1] : end;
        const int error = read_fully((int)piece->file, job->to + piece->at + into,
                                     piece->offset + (int64_t)into, (int64_t)(at - from));
        if (error && !atomic_exchange(&job->failed, 1)) {
            job->piece = (int64_t)first;
            job->error = error;
        }
    }
}

/* 0 when every piece i is at `to + pieces[i].at`; else errno, or -1 where a file ends early, and
 * in `failed` the piece. When this returns, no thread writes any more. */
int64_t flash_read(const struct piece *pieces, size_t count, char *to, uint64_t task, int threads,
                   int64_t *failed) {
    uint64_t few[PIECES_ON_STACK + 1];
    uint64_t *starts = few;
    if (count > PIECES_ON_STACK) starts = malloc((count + 1) * sizeof *starts);
    if (!starts) return ENOMEM;
    starts[0] = 0;
    for (size_t i = 0; i < count; i++) starts[i + 1] = starts[i] + (uint64_t)pieces[i].length;
    struct job job = {.pieces = pieces, .starts = starts, .count = count, .task = task, .to = to};
    if (flash_threads() != threads) flash_set_threads(threads);
    pool_enter();
    pool_run(read_task, &job, (starts[count] + task - 1) / task);
    pool_leave();
    if (starts != few) free(starts);
    *failed = job.piece;
    return job.error;
}
