/* Prints how fast so many threads together read memory, in GB/s: the best of a few passes over 256 MiB, about the size of
 * the weights that a decode step reads and far more than any cache holds. usage: bandwidth [threads] */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_THREADS = 256, PASSES = 8, LANES = 32 };
static const size_t NUM_BYTES = (size_t)256 << 20;

static uint64_t *memory;
static size_t words_per_thread;
static pthread_barrier_t together;
static double begun_s[PASSES][MAX_THREADS], ended_s[PASSES][MAX_THREADS];

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void *read_part(void *index) {
    const uint64_t *part = memory + (size_t)index * words_per_thread;
    volatile uint64_t kept;
    for (int pass = 0; pass < PASSES; pass++) {
        uint64_t sums[LANES] = {0}; /* independent, so that the compiler fills vector registers */
        pthread_barrier_wait(&together);
        begun_s[pass][(size_t)index] = now_s();
        for (size_t i = 0; i < words_per_thread; i += LANES)
            for (int lane = 0; lane < LANES; lane++) sums[lane] += part[i + lane];
        for (int lane = 0; lane < LANES; lane++) kept = sums[lane];
        ended_s[pass][(size_t)index] = now_s();
    }
    (void)kept;
    return NULL;
}

int main(int argc, char **argv) {
    size_t num_threads = argc > 1 ? (size_t)atoi(argv[1]) : 1;
    if (num_threads < 1 || num_threads > MAX_THREADS) return 2;
    words_per_thread = NUM_BYTES / sizeof(uint64_t) / num_threads / LANES * LANES;
    memory = aligned_alloc(2 << 20, NUM_BYTES);
    if (!memory) return 1;
    memset(memory, 1, NUM_BYTES);
    pthread_barrier_init(&together, NULL, num_threads);
    pthread_t threads[MAX_THREADS];
    for (size_t i = 0; i < num_threads; i++) pthread_create(&threads[i], NULL, read_part, (void *)i);
    for (size_t i = 0; i < num_threads; i++) pthread_join(threads[i], NULL);
    double best_s = 1e9;
    for (int pass = 0; pass < PASSES; pass++) {
        double first_s = begun_s[pass][0], last_s = ended_s[pass][0];
        for (size_t i = 1; i < num_threads; i++) {
            if (begun_s[pass][i] < first_s) first_s = begun_s[pass][i];
            if (ended_s[pass][i] > last_s) last_s = ended_s[pass][i];
        }
        if (last_s - first_s < best_s) best_s = last_s - first_s;
    }
    printf("%.1f\n", words_per_thread * num_threads * sizeof(uint64_t) / best_s / 1e9);
    return 0;
}
