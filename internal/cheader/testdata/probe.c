/* probe does with ingestd.h what lines on its standard input say, and answers each with one line: "ok ...", or "error <code>" and the fields of the error. */
static int stale_ms = 1000;
#define INGESTDI_STALE_MS stale_ms
#define INGESTD_IMPLEMENTATION
#include "ingestd.h"

#include <dirent.h>

#define ROOM (1 << 16)

static ingestd_trainer *trainer;
static ingestd_producer *producer;
static ingestd_slots slots;
static ingestd_batch batches[64];
static ingestd_batch stale;

/* The content of package proof: splitmix64 over stream, number and leaf. */
static uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static const uint64_t step = 0x9e3779b97f4a7c15u;

static void content(unsigned char *to, size_t n, ingestd_dtype dtype, uint64_t stream, uint64_t number, uint64_t leaf) {
    uint64_t z = mix(mix(mix(stream + step) + number + step) + leaf + step);
    while (n) {
        uint64_t word = mix(z += step) & (dtype == INGESTD_BOOL ? 0x0101010101010101u : ~(uint64_t)0);
        size_t k = n < 8 ? n : 8;
        memcpy(to, &word, k);
        to += k, n -= k;
    }
}

static int say_error(int code, const ingestd_error *e) {
    if (!e) return printf("error %s\ttext=\n", ingestd_code_name(code)); /* no handle, no text */
    if (e->code != code) return printf("broken: the call returned %s, its error says %s\n", ingestd_code_name(code), ingestd_code_name(e->code));
    return printf("error %s\tsystem=%d\tdaemon=%s\tlost=%llu+%llu\ttrainer=%llu\tbatch=%llu\tsince=%llu\tpid=%llu\tgroup=%s\tclient=%s\ttext=%s\n",
                  ingestd_code_name(code), e->system, e->daemon_code, (unsigned long long)e->lost_first, (unsigned long long)e->lost_count,
                  (unsigned long long)e->trainer, (unsigned long long)e->batch, (unsigned long long)e->since, (unsigned long long)e->pid, e->group, e->client,
                  e->text);
}

static int say(int code, const ingestd_error *e) { return code ? say_error(code, e) : printf("ok\n"); }

static int verify(const ingestd_batch *b) { /* every byte of the batch */
    const ingestd_table *t = ingestd_trainer_table(trainer);
    const uint64_t *streams = ingestd_streams(b), *numbers = ingestd_numbers(b);
    uint32_t leaf, row;
    for (leaf = 0; leaf < t->leaf_count; leaf++) {
        size_t bytes, n = (size_t)t->leaves[leaf].bytes;
        const unsigned char *column = (const unsigned char *)ingestd_column(b, (int)leaf, &bytes);
        unsigned char *want = (unsigned char *)malloc(n);
        int wrong = !column || !want || bytes != n * b->count || ingestd_column_named(b, t->leaves[leaf].name, NULL) != column || (uintptr_t)column % 64;
        for (row = 0; !wrong && row < b->count; row++) {
            content(want, n, t->leaves[leaf].dtype, streams[row], numbers[row], leaf);
            wrong = memcmp(want, column + row * n, n) != 0;
        }
        free(want);
        if (wrong) return 0;
    }
    return 1;
}

static int next(int deadline, int check) {
    size_t i;
    ingestd_batch b;
    int code = ingestd_next(trainer, deadline, &b);
    if (code) return b.trainer ? printf("broken: a batch with an error\n") : say_error(code, ingestd_trainer_error(trainer));
    if (check && !verify(&b)) return printf("broken: batch %llu is torn\n", (unsigned long long)b.number);
    for (i = 0; batches[i].trainer; i++) {
    }
    batches[i] = stale = b;
    return printf("ok %llu %lu %lu\n", (unsigned long long)b.number, (unsigned long)b.index, (unsigned long)b.count);
}

/* pull reads until the stream ends and counts the samples of each stream, which must come in order. */
static int pull(int deadline) {
    uint64_t due[64] = {0}, samples = 0;
    ingestd_batch b;
    int code;
    while (!(code = ingestd_next(trainer, deadline, &b))) {
        uint32_t row;
        if (!verify(&b)) return printf("broken: batch %llu is torn\n", (unsigned long long)b.number);
        for (row = 0; row < b.count; row++) {
            uint64_t stream = ingestd_streams(&b)[row] % 64;
            if (ingestd_numbers(&b)[row] != due[stream]++)
                return printf("broken: batch %llu, row %lu is out of order\n", (unsigned long long)b.number, (unsigned long)row);
            if (!ingestd_arrivals(&b)[row]) return printf("broken: a row without an arrival\n");
        }
        samples += b.count;
        if ((code = ingestd_release(&b))) break;
    }
    return code == INGESTD_END ? printf("ok %llu\n", (unsigned long long)samples) : say_error(code, ingestd_trainer_error(trainer));
}

static ingestd_batch *held(unsigned long long number) {
    size_t i;
    for (i = 0; i < sizeof batches / sizeof *batches; i++)
        if (batches[i].trainer && batches[i].number == number) return &batches[i];
    return NULL;
}

static void fill(void) { /* the reserved rows */
    const ingestd_table *t = ingestd_producer_table(producer);
    uint32_t leaf, row;
    for (leaf = 0; leaf < t->leaf_count; leaf++) {
        unsigned char *column = (unsigned char *)ingestd_slot_column(&slots, (int)leaf);
        for (row = 0; row < slots.n; row++)
            content(column + row * t->leaves[leaf].bytes, (size_t)t->leaves[leaf].bytes, t->leaves[leaf].dtype, ingestd_stream(producer),
                    slots.number + row, leaf);
    }
}

static int push(unsigned long long number, int deadline) { /* one sample of that number */
    const ingestd_table *t = ingestd_producer_table(producer);
    void *leaves[16];
    uint32_t i;
    int code;
    for (i = 0; i < t->leaf_count; i++) {
        leaves[i] = malloc((size_t)t->leaves[i].bytes);
        content((unsigned char *)leaves[i], (size_t)t->leaves[i].bytes, t->leaves[i].dtype, ingestd_stream(producer), number, i);
    }
    code = ingestd_push(producer, (const void *const *)leaves, deadline);
    for (i = 0; i < t->leaf_count; i++) free(leaves[i]);
    return say(code, ingestd_producer_error(producer));
}

/* produce fills and commits n samples, at most step_rows at a time, and waits until all are taken. */
static int produce(unsigned long long n, unsigned long step_rows, int deadline) {
    int code = 0;
    while (n && !code) {
        if ((code = ingestd_reserve(producer, n < step_rows ? (uint32_t)n : (uint32_t)step_rows, deadline, &slots))) break;
        fill();
        n -= slots.n;
        code = ingestd_commit(&slots, slots.n);
    }
    if (!code) code = ingestd_flush(producer, deadline);
    return say(code, ingestd_producer_error(producer));
}

static int say_table(const ingestd_table *t) {
    uint32_t i, d;
    printf("ok %s batch_size=%lu batches=%lu prefetch=%lu sample_bytes=%llu", t->name, (unsigned long)t->batch_size, (unsigned long)t->batches,
           (unsigned long)t->prefetch, (unsigned long long)t->sample_bytes);
    for (i = 0; i < t->leaf_count; i++) {
        const ingestd_leaf *l = &t->leaves[i];
        printf(" %s:%s[", l->name, ingestd_dtype_name(l->dtype));
        for (d = 0; d < l->dims; d++) printf(d ? ",%llu" : "%llu", (unsigned long long)l->shape[d]);
        printf("]=%llu@%d", (unsigned long long)l->bytes, ingestd_find_leaf(t, l->name));
    }
    return printf("\n");
}

static int count_fds(void) {
    DIR *d = opendir("/proc/self/fd");
    int n = 0;
    while (d && readdir(d)) n++;
    if (d) closedir(d);
    return n;
}

/* text returns a word of the line: NULL for "-", "" for "''", with %xx decoded. */
static const char *text(char *word) {
    char *to = word, *from = word;
    if (!word || !strcmp(word, "-")) return NULL;
    if (!strcmp(word, "''")) return "";
    while (*from) {
        if (*from == '%') {
            char two[3];
            two[0] = from[1], two[1] = from[2], two[2] = 0;
            *to++ = (char)strtoul(two, NULL, 16);
            from += 3;
        } else *to++ = *from++;
    }
    *to = 0;
    return word;
}

/* json reads hex bytes, from memory that is exactly as long, and says what the reader makes of them. */
static int json(const char *how, const char *hex) {
    size_t i, n = strlen(hex) / 2;
    unsigned char *bytes = (unsigned char *)malloc(n ? n : 1);
    char *decoded = (char *)malloc(4 * n + 1);
    ingestdi_json j;
    ingestdi_text t;
    uint64_t v = 0;
    int bad;
    for (i = 0; i < n; i++) {
        char two[3];
        two[0] = hex[2 * i], two[1] = hex[2 * i + 1], two[2] = 0;
        bytes[i] = (unsigned char)strtoul(two, NULL, 16);
    }
    j.at = bytes, j.end = bytes + n, j.wrong = NULL;
    ingestdi_text_open(&t, decoded, 4 * n + 1);
    if (!strcmp(how, "string")) bad = ingestdi_string(&j, &t) || ingestdi_done(&j);
    else if (!strcmp(how, "whole")) bad = ingestdi_whole(&j, &v) || ingestdi_done(&j);
    else bad = ingestdi_skip(&j, 0) || ingestdi_done(&j);
    if (bad && !j.wrong) printf("broken: bad without a reason\n");
    else if (bad) printf("bad %s\n", j.wrong);
    else {
        printf("ok %llu ", (unsigned long long)v);
        for (i = 0; i < t.n; i++) printf("%02x", (unsigned)(unsigned char)decoded[i]);
        printf("\n");
    }
    free(bytes);
    free(decoded);
    return 0;
}

static int attach(char *const *w, int n) { /* path table group prefetch client spec fingerprint deadline */
    ingestd_trainer_options o;
    ingestd_error e;
    memset(&o, 0, sizeof o);
    memset(&e, 0xAA, sizeof e);
    if (n != 8) return printf("broken: attach takes 8 words, not %d\n", n);
    o.table = text(w[1]), o.group = text(w[2]), o.prefetch = (uint32_t)atol(w[3]), o.client = text(w[4]), o.spec = text(w[5]), o.fingerprint = text(w[6]);
    trainer = ingestd_attach(text(w[0]), &o, atoi(w[7]), &e);
    memset(batches, 0, sizeof batches);
    return trainer ? say_table(ingestd_trainer_table(trainer)) : say_error(e.code, &e);
}

static int open_producer(char *const *w, int n) { /* path table session prefetch client spec fingerprint deadline */
    ingestd_producer_options o;
    ingestd_error e;
    memset(&o, 0, sizeof o);
    memset(&e, 0xAA, sizeof e);
    if (n != 8) return printf("broken: open takes 8 words, not %d\n", n);
    o.table = text(w[1]), o.session = text(w[2]), o.prefetch = (uint32_t)atol(w[3]), o.client = text(w[4]), o.spec = text(w[5]), o.fingerprint = text(w[6]);
    producer = ingestd_produce(text(w[0]), &o, atoi(w[7]), &e);
    memset(&slots, 0, sizeof slots);
    return producer ? say_table(ingestd_producer_table(producer)) : say_error(e.code, &e);
}

static int reserve(uint32_t n, int deadline) {
    int code = ingestd_reserve(producer, n, deadline, &slots);
    if (code) return say_error(code, ingestd_producer_error(producer));
    return printf("ok %lu %llu %lu %lu\n", (unsigned long)slots.n, (unsigned long long)slots.number, (unsigned long)slots.row, (unsigned long)slots.index);
}

static int act(const char *verb, char *const *w, int n) {
    unsigned long long a = n > 0 ? strtoull(w[0], NULL, 10) : 0;
    int b = n > 1 ? atoi(w[1]) : 0;
    const ingestd_producer *whose = slots.producer; /* empty slots have no handle that could say what was wrong */
    if (!strcmp(verb, "attach")) return attach(w, n);
    if (!strcmp(verb, "next")) return next((int)strtol(w[0], NULL, 10), 1);
    if (!strcmp(verb, "next-any")) return next((int)strtol(w[0], NULL, 10), 0);
    if (!strcmp(verb, "next-nowhere")) return say(ingestd_next(trainer, 0, NULL), ingestd_trainer_error(trainer));
    if (!strcmp(verb, "pull")) return pull((int)a);
    if (!strcmp(verb, "release")) return held(a) ? say(ingestd_release(held(a)), ingestd_trainer_error(trainer)) : printf("broken: not held\n");
    if (!strcmp(verb, "intact")) return held(a) ? printf("ok %d\n", ingestd_intact(held(a))) : printf("broken: not held\n");
    if (!strcmp(verb, "intact-stale")) return ingestd_intact(&stale) ? printf("ok\n") : say_error(INGESTD_MISUSE, ingestd_trainer_error(trainer));
    if (!strcmp(verb, "stale-ms")) return stale_ms = (int)a, printf("ok\n");
    if (!strcmp(verb, "release-stale")) return say(ingestd_release(&stale), ingestd_trainer_error(trainer));
    if (!strcmp(verb, "column-stale")) return ingestd_column(&stale, 0, NULL) ? printf("ok\n") : say_error(INGESTD_MISUSE, ingestd_trainer_error(trainer));
    if (!strcmp(verb, "column")) return ingestd_column(&stale, atoi(w[0]), NULL) ? printf("ok\n") : say_error(INGESTD_MISUSE, ingestd_trainer_error(trainer));
    if (!strcmp(verb, "column-named"))
        return ingestd_column_named(&stale, w[0], NULL) ? printf("ok\n") : say_error(INGESTD_MISUSE, ingestd_trainer_error(trainer));
    if (!strcmp(verb, "write")) { /* which the kernel must not allow */
        *(volatile unsigned char *)(uintptr_t)ingestd_column(&stale, 0, NULL) = 1;
        return printf("broken: written\n");
    }
    if (!strcmp(verb, "detach")) {
        ingestd_detach(trainer);
        trainer = NULL;
        return printf("ok\n");
    }
    if (!strcmp(verb, "open")) return open_producer(w, n);
    if (!strcmp(verb, "stream")) return printf("ok %llu\n", (unsigned long long)ingestd_stream(producer));
    if (!strcmp(verb, "held")) return printf("ok %llu\n", (unsigned long long)ingestd_held(producer));
    if (!strcmp(verb, "reserve")) return reserve((uint32_t)a, b);
    if (!strcmp(verb, "fill")) return fill(), printf("ok\n");
    if (!strcmp(verb, "commit")) return say(ingestd_commit(&slots, (uint32_t)a), ingestd_producer_error(whose));
    if (!strcmp(verb, "abandon")) return say(ingestd_abandon(&slots), ingestd_producer_error(whose));
    if (!strcmp(verb, "slot")) return ingestd_slot_column(&slots, atoi(w[0])) ? printf("ok\n") : say_error(INGESTD_MISUSE, ingestd_producer_error(producer));
    if (!strcmp(verb, "push")) return push(a, b);
    if (!strcmp(verb, "push-nothing")) {
        const void *none[16] = {NULL};
        return say(ingestd_push(producer, none, 0), ingestd_producer_error(producer));
    }
    if (!strcmp(verb, "settle")) return say(ingestd_settle(producer, atoi(w[0])), ingestd_producer_error(producer));
    if (!strcmp(verb, "flush")) return say(ingestd_flush(producer, atoi(w[0])), ingestd_producer_error(producer));
    if (!strcmp(verb, "produce")) return produce(a, (unsigned long)b, atoi(w[2]));
    if (!strcmp(verb, "close")) {
        ingestd_close(producer);
        producer = NULL;
        return printf("ok\n");
    }
    if (!strcmp(verb, "json")) return json(w[0], n > 1 ? w[1] : "");
    if (!strcmp(verb, "fds")) return printf("ok %d\n", count_fds());
    if (!strcmp(verb, "nobody")) { /* every function takes a handle that is not there */
        ingestd_detach(NULL);
        ingestd_close(NULL);
        return printf("ok %d %d %d %d %d %d %d %d\n", ingestd_intact(NULL), ingestd_next(NULL, 0, NULL), ingestd_release(NULL),
                      ingestd_reserve(NULL, 1, 0, NULL), ingestd_commit(NULL, 1), ingestd_push(NULL, NULL, 0), ingestd_settle(NULL, 0), ingestd_flush(NULL, 0));
    }
    return printf("broken: no verb %s\n", verb);
}

int main(void) {
    char *line = (char *)malloc(ROOM), *words[16];
    while (fgets(line, ROOM, stdin)) {
        int n = 0;
        char *word, *rest = line;
        while ((word = strtok_r(rest, " \n", &rest)) && n < 16) words[n++] = word;
        if (n) act(words[0], words + 1, n - 1);
        fflush(stdout);
    }
    free(line);
    return 0;
}
