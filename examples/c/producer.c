/*
 * A producer in C: writes samples in the place where trainers will read them, and waits until the daemon holds them all. With a session, a
 * second run goes on where the first one ended, whatever ended it.
 *
 *     cc -std=c11 -O2 -I include -o producer examples/c/producer.c
 *     ./producer /run/ingestd/ingestd.sock digits 10000 [session]
 */
#define INGESTD_IMPLEMENTATION
#include "ingestd.h"

/* make writes sample number `number`: here every byte of it is the number's lowest. A real producer renders, simulates or decodes into place. */
static void make(const ingestd_slots *slots, const ingestd_table *table, uint32_t row, uint64_t number) {
    uint32_t leaf;
    for (leaf = 0; leaf < table->leaf_count; leaf++) {
        size_t bytes = (size_t)table->leaves[leaf].bytes;
        unsigned char *column = (unsigned char *)ingestd_slot_column(slots, (int)leaf); /* the array (slots->n, *shape) */
        memset(column + row * bytes, table->leaves[leaf].dtype == INGESTD_BOOL ? (int)(number & 1) : (int)(number & 255), bytes);
    }
}

int main(int argc, char **argv) {
    static ingestd_error err;
    ingestd_producer_options options;
    ingestd_producer *producer;
    ingestd_slots slots;
    uint64_t number, total;
    uint32_t row;
    int code = 0, waits = 0;
    if (argc < 4) {
        fprintf(stderr, "usage: %s SOCKET TABLE SAMPLES [SESSION]\n", argv[0]);
        return 2;
    }
    memset(&options, 0, sizeof options);
    options.table = argv[2];
    options.session = argc > 4 ? argv[4] : NULL;
    options.client = "example producer in C";
    total = strtoull(argv[3], NULL, 10);
    if (!(producer = ingestd_produce(argv[1], &options, 5000, &err))) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    for (number = ingestd_held(producer); number < total;) { /* what the daemon holds of the session is not sent again */
        uint64_t left = total - number;
        code = ingestd_reserve(producer, left < 64 ? (uint32_t)left : 64, 1000, &slots);
        if ((code == INGESTD_FULL || code == INGESTD_TIMEOUT) && waits++ < 60) {
            fprintf(stderr, "waiting: %s\n", ingestd_producer_error(producer)->text); /* a full ring: it names the trainer that holds it */
            continue;
        }
        if (code) break;
        for (row = 0; row < slots.n; row++) make(&slots, ingestd_producer_table(producer), row, number + row);
        number += slots.n;
        waits = 0;
        if ((code = ingestd_commit(&slots, slots.n))) break;
    }
    if (!code) code = ingestd_settle(producer, 5000); /* the last place is not full: do not let its samples wait */
    if (!code) code = ingestd_flush(producer, 5000);
    if (code) fprintf(stderr, "%s\n", ingestd_producer_error(producer)->text);
    printf("the daemon holds %llu samples of stream %llu\n", (unsigned long long)ingestd_held(producer), (unsigned long long)ingestd_stream(producer));
    ingestd_close(producer);
    return code ? 1 : 0;
}
