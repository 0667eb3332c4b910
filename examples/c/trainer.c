/*
 * A trainer in C: attaches to a table of the daemon on this machine, reads each batch where it lies, and says what it saw.
 *
 *     cc -std=c11 -O2 -I include -o trainer examples/c/trainer.c
 *     ./trainer /run/ingestd/ingestd.sock digits [group]
 */
#define INGESTD_IMPLEMENTATION
#include "ingestd.h"

/* mean is what this trainer "trains": the mean of the first F32 leaf, over the rows of a batch. */
static double mean(const ingestd_batch *batch, const ingestd_table *table) {
    uint32_t leaf;
    for (leaf = 0; leaf < table->leaf_count; leaf++) {
        size_t bytes, i;
        double sum = 0;
        const float *x; /* the array (count, *shape), in the daemon's own memory */
        if (table->leaves[leaf].dtype != INGESTD_F32) continue;
        x = (const float *)ingestd_column(batch, (int)leaf, &bytes);
        for (i = 0; i < bytes / sizeof *x; i++) sum += x[i];
        return sum / (double)(bytes / sizeof *x);
    }
    return 0;
}

int main(int argc, char **argv) {
    static ingestd_error err;
    ingestd_trainer_options options;
    ingestd_trainer *trainer;
    ingestd_batch batch;
    uint64_t batches = 0, samples = 0;
    double last = 0, now;
    int code;
    if (argc < 3) {
        fprintf(stderr, "usage: %s SOCKET TABLE [GROUP]\n", argv[0]);
        return 2;
    }
    memset(&options, 0, sizeof options);
    options.table = argv[2];
    options.group = argc > 3 ? argv[3] : NULL;
    options.client = "example trainer in C";
    if (!(trainer = ingestd_attach(argv[1], &options, 5000, &err))) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    for (;;) {
        code = ingestd_next(trainer, 1000, &batch);
        if (code == INGESTD_TIMEOUT) continue; /* nothing came in a second: a good moment to look at other things */
        if (code == INGESTD_LOST) {
            fprintf(stderr, "%s\n", ingestd_trainer_error(trainer)->text);
            continue;
        }
        if (code) break;
        now = mean(&batch, ingestd_trainer_table(trainer));
        if (ingestd_intact(&batch)) last = now, batches++, samples += batch.count; /* else it was taken back meanwhile, and is delivered again */
        if ((code = ingestd_release(&batch))) break; /* nothing of the batch may be read any more */
    }
    printf("%llu samples in %llu batches, the last with mean %g; %s\n", (unsigned long long)samples, (unsigned long long)batches, last,
           ingestd_trainer_error(trainer)->text);
    ingestd_detach(trainer);
    return code == INGESTD_END ? 0 : 1;
}
