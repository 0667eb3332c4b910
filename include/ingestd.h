/*
 * ingestd.h - trainers and producers of ingestd in C and C++, in shared memory.
 *
 * A trainer reads whole batches where they lie in the daemon's memory. A producer writes samples in the place where trainers
 * will read them. Neither copies. The daemon (`ingestd serve`) must run on the same machine and listen on a unix socket.
 *
 * HOW TO USE IT
 *
 * One file, C11 or C++17 (gcc or clang), 64-bit little-endian Linux, nothing but libc. Include it wherever it is needed, and in
 * exactly one file of the program write, before any other include,
 *
 *     #define INGESTD_IMPLEMENTATION
 *     #include "ingestd.h"
 *
 * That file holds the code, the others see declarations only. (Not "static inline": handles are opaque, system headers and the
 * feature macro they need under -std=c11 stay in that one file, and there is one copy of the code to step through.)
 *
 * examples/c/trainer.c and examples/c/producer.c are whole programs.
 *
 *     ingestd_trainer_options o = {0};             ingestd_producer_options o = {0};
 *     o.table = "digits";                          o.table = "digits";
 *     t = ingestd_attach(path, &o, 5000, &err);    p = ingestd_produce(path, &o, 5000, &err);
 *     while (!ingestd_next(t, 1000, &b)) {         while (!ingestd_reserve(p, 64, 1000, &s)) {
 *         x = ingestd_column(&b, 0, NULL);             x = ingestd_slot_column(&s, 0);
 *         ... b.count rows ...                         ... fill s.n rows ...
 *         ingestd_release(&b);                         ingestd_commit(&s, s.n);
 *     }                                            }
 *     ingestd_detach(t);                           ingestd_flush(p, 5000);  ingestd_close(p);
 *
 * RULES
 *
 * Results:   every call that can fail returns an ingestd_code; INGESTD_OK is 0. The text, which says what to do, and all details
 *            are in the ingestd_error of the handle (ingestd_trainer_error, ingestd_producer_error), or of the attaching call.
 *            A NULL handle, an empty batch or empty slots have none: the call just returns INGESTD_MISUSE.
 * Deadlines: every call that can wait takes deadline_ms: milliseconds from the call, on a clock that nobody sets. 0 looks once
 *            and does not wait. There is no "for ever": a negative one is INGESTD_MISUSE. INGESTD_TIMEOUT and INGESTD_FULL change
 *            nothing: call again. One thing takes longer, by a second at most: what was delivered and is not so in the segment is
 *            called damage only when the daemon has not turned out to be dead by then.
 * Threads:   a handle, its batches and its slots belong to one thread at a time. Different handles share nothing. No thread is
 *            started, no signal is used or blocked, nothing global is kept. After fork, only one of the processes may use a
 *            handle; the other must not even close it: attach in the child instead.
 * Memory:    a column or slot pointer is the ring's own memory, starts (at row 0) on a multiple of 64, and holds for a leaf the
 *            array (rows, *shape), row-major, little-endian. A trainer's is mapped read-only: writing to it is a SIGSEGV.
 *            It may be used until ingestd_release (ingestd_commit, ingestd_abandon), and not after ingestd_detach (ingestd_close).
 *            Memory is allocated when attaching and nowhere else.
 * Trust:     what the daemon can write is loaded once and checked before it is used; damage is INGESTD_BAD_REPLY or
 *            INGESTD_BAD_SEGMENT and never a crash. A producer maps the ring writable, so a bug in it can spoil samples of others:
 *            the daemon lends places only to users it was told to trust. Others push over the socket.
 *
 * The formats are in docs/wire-protocol.md ("Attach", "Fill") and docs/segment-format.md.
 */

#if defined(INGESTD_IMPLEMENTATION) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1 /* POSIX.1-2008 under -std=c11; what gcc and clang have without it */
#endif

#ifndef INGESTD_H
#define INGESTD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Limits of the formats. */
#define INGESTD_LEAVES_MAX 4096
#define INGESTD_DIMS_MAX 8
#define INGESTD_NAME_MAX 128  /* bytes of a table, session, group or client, and of a leaf's name */
#define INGESTD_TEXT_MAX 4096 /* bytes of an error's text with its final zero; longer ones are cut */

/* What a call returns. */
typedef enum ingestd_code {
    INGESTD_OK = 0,
    INGESTD_TIMEOUT = 1,       /* the deadline passed; call again */
    INGESTD_FULL = 2,          /* the deadline passed, and the daemon said why: the ring is full; the error names the trainer that holds it */
    INGESTD_LOST = 3,          /* ingestd_next only: the group was too slow and lost batches; call again for the next one */
    INGESTD_END = 4,           /* the stream has ended well: nothing will follow */
    INGESTD_PEER_CLOSED = 5,   /* the daemon went away without a word: attach again. For batches still held, see ingestd_intact */
    INGESTD_SHUTTING_DOWN = 6, /* the daemon is stopping: attach again later */
    INGESTD_CUT_OFF = 7,       /* the daemon ended this attachment: daemon_code and text say why */
    INGESTD_REFUSED = 8,       /* the daemon did not accept: daemon_code and text say why */
    INGESTD_BAD_REPLY = 9,     /* what answers is not a daemon of this protocol */
    INGESTD_BAD_SEGMENT = 10,  /* the memory shared by the daemon is not what it should be */
    INGESTD_SYSTEM = 11,       /* a system call failed: system is its errno */
    INGESTD_MISUSE = 12        /* the caller broke a rule of this file: the text says which */
} ingestd_code;

/* ingestd_code_name returns "ok", "timeout", "full", ... or "unknown". */
const char *ingestd_code_name(int code);

/* What went wrong, and what to do. Fields that do not apply are 0 or "". Texts are UTF-8 without control characters. */
typedef struct ingestd_error {
    int code;                               /* ingestd_code */
    int system;                             /* INGESTD_SYSTEM: errno */
    char daemon_code[32];                   /* REFUSED, CUT_OFF, SHUTTING_DOWN: a code of docs/wire-protocol.md, such as spec_mismatch; FULL: ring_full */
    char text[INGESTD_TEXT_MAX];            /* a sentence for a person */
    uint64_t lost_first, lost_count;        /* LOST: number of the first batch lost, and how many */
    uint64_t trainer;                       /* FULL: the trainer that has held a batch for longest; 0: none holds one */
    uint64_t batch;                         /*       number of that batch */
    uint64_t since;                         /*       since when, Unix time in nanoseconds */
    uint64_t pid;                           /*       its process, 0 if not known */
    char group[INGESTD_NAME_MAX + 1];       /*       its group, or the group for which nobody reads */
    char client[INGESTD_NAME_MAX + 1];      /*       what it calls itself */
} ingestd_error;

/* dtypes, named as in safetensors. */
typedef enum ingestd_dtype {
    INGESTD_BOOL = 1, INGESTD_U8, INGESTD_I8, INGESTD_F8_E4M3, INGESTD_F8_E5M2,
    INGESTD_I16, INGESTD_U16, INGESTD_F16, INGESTD_BF16,
    INGESTD_I32, INGESTD_U32, INGESTD_F32,
    INGESTD_I64, INGESTD_U64, INGESTD_F64
} ingestd_dtype;

/* ingestd_dtype_name returns "F32" and so on; NULL if there is no such dtype. */
const char *ingestd_dtype_name(ingestd_dtype dtype);

/* ingestd_dtype_bytes returns the bytes of one element; 0 if there is no such dtype. */
size_t ingestd_dtype_bytes(ingestd_dtype dtype);

/* One array of a sample. */
typedef struct ingestd_leaf {
    const char *name;                  /* a path such as obs/image */
    ingestd_dtype dtype;
    unsigned dims;                     /* 0: a scalar */
    uint64_t shape[INGESTD_DIMS_MAX];
    uint64_t bytes;                    /* of the leaf in one sample */
} ingestd_leaf;

/* What a handle is attached to. It belongs to the handle and lives as long. */
typedef struct ingestd_table {
    const char *name;
    uint32_t leaf_count;
    const ingestd_leaf *leaves;        /* in the order of the spec */
    uint64_t sample_bytes;             /* all leaves of one sample */
    uint32_t batch_size;               /* most rows of a batch */
    uint32_t batches;                  /* capacity */
    uint32_t prefetch;                 /* most batches (producer: places) held at once, as the daemon granted it */
    unsigned char fingerprint[32];     /* of the spec */
    const ingestd_leaf *const *by_name; /* the leaves in order of their names, for ingestd_find_leaf */
} ingestd_table;

/* ingestd_find_leaf returns the index of the leaf of that name, or -1. It is a binary search: look up once, not per row. */
int ingestd_find_leaf(const ingestd_table *table, const char *name);

/* ---- Trainer ---------------------------------------------------------------------------------------------------------------- */

typedef struct ingestd_trainer ingestd_trainer;

/* Zero all of it first: `ingestd_trainer_options o = {0}` in C, `o = {}` in C++. The texts are needed during the call only. */
typedef struct ingestd_trainer_options {
    const char *table;       /* required */
    const char *group;       /* the trainers of a group share its batches; NULL: "default" */
    uint32_t prefetch;       /* most batches held at once; 0: the daemon's default. The daemon may grant fewer */
    const char *client;      /* for the daemon's status and log; NULL: "ingestd-c" */
    const char *spec;        /* NULL, or the layout this program is made for, as JSON: {"leaves":[{"name":..,"dtype":..,"shape":[..]},..]} */
    const char *fingerprint; /* NULL, or the same as 64 hex digits: a table with another layout is refused with spec_mismatch */
} ingestd_trainer_options;

/*
 * ingestd_attach joins a table as a trainer. path is the daemon's socket; unix:// and shm:// before it are ignored. It returns
 * NULL on an error, which is then in *err (err may be NULL): TIMEOUT, PEER_CLOSED, SHUTTING_DOWN, REFUSED, BAD_REPLY, BAD_SEGMENT,
 * SYSTEM (ENOENT and ECONNREFUSED: no daemon there), MISUSE.
 */
ingestd_trainer *ingestd_attach(const char *path, const ingestd_trainer_options *options, int deadline_ms, ingestd_error *err);

/* ingestd_detach ends the attachment and frees the handle; NULL is allowed. What is held goes to another trainer, and all pointers into it are invalid. */
void ingestd_detach(ingestd_trainer *trainer);

const ingestd_table *ingestd_trainer_table(const ingestd_trainer *trainer);

/* ingestd_trainer_error returns what the last call on this handle, or on a batch of it, that did not return INGESTD_OK had to say. */
const ingestd_error *ingestd_trainer_error(const ingestd_trainer *trainer);

/* A batch. A small value: copies mean the same lease. */
typedef struct ingestd_batch {
    ingestd_trainer *trainer; /* NULL: no batch */
    uint64_t number;          /* counts up by one with each batch of the table; a second delivery has the same number */
    uint32_t index;           /* its place in the segment */
    uint32_t count;           /* rows that hold samples; below batch_size only where it was published early */
} ingestd_batch;

/*
 * ingestd_next waits for a batch, which may be read until ingestd_release. With `prefetch` batches held, the next one comes only
 * after a release.
 *
 * TIMEOUT; END: all was delivered; LOST: the group lost error.lost_count batches from error.lost_first on (each loss is told once,
 * then the stream goes on); PEER_CLOSED, SHUTTING_DOWN, CUT_OFF, BAD_SEGMENT and SYSTEM are final: detach. batch->trainer is NULL on
 * all of them.
 */
int ingestd_next(ingestd_trainer *trainer, int deadline_ms, ingestd_batch *batch);

/*
 * ingestd_column returns a leaf's column: the array (count, *shape). bytes, if not NULL, becomes its length, count times the leaf's
 * bytes. NULL if the batch is not held or there is no such leaf (INGESTD_MISUSE in the error).
 */
const void *ingestd_column(const ingestd_batch *batch, int leaf, size_t *bytes);

/* ingestd_column_named is ingestd_column by the leaf's name. */
const void *ingestd_column_named(const ingestd_batch *batch, const char *name, size_t *bytes);

/*
 * One value per row, as ingestd_column: the number of the stream that sent the sample; the sample's number in its stream, from 0;
 * when its last byte arrived, Unix time in nanoseconds.
 */
const uint64_t *ingestd_streams(const ingestd_batch *batch);
const uint64_t *ingestd_numbers(const ingestd_batch *batch);
const uint64_t *ingestd_arrivals(const ingestd_batch *batch);

/*
 * ingestd_intact returns 1 if the batch still lies in its place, leased: what was read or copied of it so far was whole. It returns 0 if the
 * batch was taken back: other samples may have been written over it, what was read may be torn, and the batch is delivered again. 0 with
 * MISUSE in the error: it is not held.
 *
 * A trainer that goes on reading a batch after PEER_CLOSED, SHUTTING_DOWN or CUT_OFF must ask, after reading and before it uses what it
 * read: a daemon that was started again on a segment that it keeps may give the place to others. Where daemons are restarted like that,
 * it must always ask, as the end of the daemon may not have been seen yet. It may be asked until ingestd_release or ingestd_detach.
 */
int ingestd_intact(const ingestd_batch *batch);

/*
 * ingestd_release gives a batch back and empties *batch. MISUSE: it is not held (released twice). SHUTTING_DOWN or CUT_OFF: the daemon had
 * taken it back before, so what was read of it may be torn: drop that. PEER_CLOSED: the daemon died; what was read is whole if
 * ingestd_intact said so, and the batch may be delivered once more when the daemon is back.
 */
int ingestd_release(ingestd_batch *batch);

/* ---- Producer --------------------------------------------------------------------------------------------------------------- */

typedef struct ingestd_producer ingestd_producer;

/* Zero all of it first. The texts are needed during the call only. */
typedef struct ingestd_producer_options {
    const char *table;       /* required */
    const char *session;     /* identity that survives reconnects and restarts; NULL: none. See ingestd_held */
    uint32_t prefetch;       /* most places lent at once; 0: the daemon's default. The daemon may grant fewer */
    const char *client;      /* as for a trainer */
    const char *spec;        /* as for a trainer */
    const char *fingerprint; /* as for a trainer */
} ingestd_producer_options;

/*
 * ingestd_produce attaches a producer that fills places of the segment. Errors as ingestd_attach; REFUSED with not_permitted: the
 * daemon does not trust this user with its memory (push over the socket instead); with session: what another producer
 * of the session had taken is committed first, and that one is cut off with session_taken.
 */
ingestd_producer *ingestd_produce(const char *path, const ingestd_producer_options *options, int deadline_ms, ingestd_error *err);

/*
 * ingestd_close ends the attachment and frees the handle; NULL is allowed. It does not wait: the daemon takes what was committed, and
 * ingestd_flush before it makes that certain.
 */
void ingestd_close(ingestd_producer *producer);

const ingestd_table *ingestd_producer_table(const ingestd_producer *producer);
const ingestd_error *ingestd_producer_error(const ingestd_producer *producer);

/* ingestd_stream returns the number of the stream, as trainers see it beside each sample. All connections of a session have the same one. */
uint64_t ingestd_stream(const ingestd_producer *producer);

/*
 * ingestd_held returns how many samples of the session (without one: of this connection) the daemon is known to hold in the ring.
 * After attaching with a session, go on with sample number ingestd_held: all below it are in the ring and must not be sent again.
 * After an error, the samples from there on were not taken as far as this connection knows; attaching again tells for certain.
 */
uint64_t ingestd_held(ingestd_producer *producer);

/* Rows of one place, next to each other in every leaf's column. */
typedef struct ingestd_slots {
    ingestd_producer *producer; /* NULL: nothing reserved */
    uint64_t number;            /* number of the first row's sample in the session */
    uint32_t n;                 /* rows */
    uint32_t row;               /* first row in the place */
    uint32_t index;             /* the place */
} ingestd_slots;

/*
 * ingestd_reserve waits for a place and reserves rows of it: at least 1, at most n, and no more than are left in the place. One
 * reservation at a time: commit or abandon it first (else MISUSE, and *slots stays as it is). Rows hold old bytes: fill every leaf of each
 * row that is committed.
 *
 * FULL names who holds the ring; TIMEOUT where the daemon did not say (it does so after 50 ms). END: the table takes no more samples.
 * PEER_CLOSED, SHUTTING_DOWN, CUT_OFF, BAD_SEGMENT, SYSTEM are final: close, and attach again where that may help.
 */
int ingestd_reserve(ingestd_producer *producer, uint32_t n, int deadline_ms, ingestd_slots *slots);

/*
 * ingestd_slot_column returns where the reserved rows of a leaf lie: the array (n, *shape). NULL if the slots are not reserved or
 * there is no such leaf.
 */
void *ingestd_slot_column(const ingestd_slots *slots, int leaf);

/*
 * ingestd_commit hands the first n of the reserved rows over, from 1 to slots->n, and empties *slots; the rest are free to be reserved
 * again. It never waits. The samples are in the ring when ingestd_held counts them. A place is published when its last row is
 * committed; until then its samples wait for the rest, or for ingestd_settle, or until the daemon settles them by itself.
 */
int ingestd_commit(ingestd_slots *slots, uint32_t n);

/* ingestd_abandon drops a reservation: the rows will be reserved again. */
int ingestd_abandon(ingestd_slots *slots);

/*
 * ingestd_push copies one sample in: leaves[i] points at the bytes of leaf i. Errors as ingestd_reserve; on any of them nothing was
 * taken.
 */
int ingestd_push(ingestd_producer *producer, const void *const *leaves, int deadline_ms);

/*
 * ingestd_settle asks the daemon not to wait for the rest of the place that is being filled: what is committed is copied into the batch
 * that slow producers share. For producers that pause. It waits only while the queue to the daemon is full.
 */
int ingestd_settle(ingestd_producer *producer, int deadline_ms);

/* ingestd_flush waits until the daemon has taken all that was committed: then ingestd_held counts it. Errors as ingestd_reserve. */
int ingestd_flush(ingestd_producer *producer, int deadline_ms);

#ifdef __cplusplus
}
#endif

#endif /* INGESTD_H */

/* ============================================================================================================================ */

#if defined(INGESTD_IMPLEMENTATION) && !defined(INGESTD_IMPLEMENTED)
#define INGESTD_IMPLEMENTED

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#if !defined(__linux__)
#error "ingestd.h: descriptors, seals and eventfds as used here exist on Linux only"
#endif
#if !defined(CLOCK_MONOTONIC)
#error "ingestd.h: with -std=c11, put INGESTD_IMPLEMENTATION and this include before all other includes of the file, or define _DEFAULT_SOURCE there"
#endif
#if !defined(__GNUC__)
#error "ingestd.h: needs the atomic builtins of gcc or clang"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "ingestd.h: samples and segments are little-endian"
#endif
#if SIZE_MAX < UINT64_MAX || __GCC_ATOMIC_LLONG_LOCK_FREE != 2
#error "ingestd.h: needs a 64-bit machine whose 8-byte atomics have no lock"
#endif

#ifndef F_GET_SEALS /* hidden without _GNU_SOURCE */
#define F_GET_SEALS 1034
#define F_SEAL_SHRINK 0x0002
#define F_SEAL_GROW 0x0004
#endif

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Atomics. The builtins have the memory model of C11 and C++11, are the same in both languages, and work on mapped bytes without
 * a claim that these are _Atomic objects. All words that the other process reads or writes go through these macros:
 *
 *   segment, state of a place          edge(publish): acquire - rows and count of a batch that is told to us are complete.
 *                                      edge(lend): acquire - a place that is told to us is clean, and its stream is ours.
 *   deliver.produced                   edge(shared-produce): acquire - the descriptors below it are complete.
 *   deliver.consumed                   edge(shared-consume): release - the descriptors were copied out before.
 *   deliver.consumer_waiting           edge(shared-wait): release - a full fence: what was stored before 0 was read here is seen by our next look.
 *   deliver.closed                     edge(shared-close): acquire - after 1, produced has its last value.
 *   giveback.produced                  edge(shared-produce): release - the descriptors, and our reads of the batch or writes of the rows, come before.
 *   giveback.consumed                  edge(shared-consume): acquire - descriptors below it are ours to overwrite; a producer's are in the ring.
 *   giveback.consumer_waiting          edge(shared-wait): acquire - reading 0 means that the daemon will see what we stored before.
 *   giveback.closed                    edge(shared-close): release - produced has its last value before.
 */
#define ingestdi_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define ingestdi_load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define ingestdi_store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define ingestdi_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define ingestdi_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

enum {
    ingestdi_nothing = -1, /* internal: nothing at hand, wait */
    ingestdi_depth_max = 32,
    ingestdi_fds_max = 8,
    ingestdi_fds_want = 4
};

#define INGESTDI_BODY_MAX 2097152u
#define INGESTDI_NOTICE_MAX 65536u
#define INGESTDI_SEGMENT_MAX ((uint64_t)1 << 46)
#define INGESTDI_SAMPLE_MAX ((uint64_t)1 << 32)
#define INGESTDI_CHANNEL_MAX (64u + 2u * (256u + 16u * 65536u + 64u))
#ifndef INGESTDI_STALE_MS
#define INGESTDI_STALE_MS 1000 /* how long the end of a daemon's socket is waited for when what it delivered is not so in the segment */
#endif

/* ---- Errors ---- */

const char *ingestd_code_name(int code) {
    static const char *const names[] = {
        "ok", "timeout", "full", "lost", "end", "peer_closed", "shutting_down", "cut_off", "refused", "bad_reply", "bad_segment", "system", "misuse",
    };
    if (code < 0 || (size_t)code >= sizeof names / sizeof *names) return "unknown";
    return names[code];
}

static void ingestdi_clear(ingestd_error *e, int code) {
    e->code = code;
    e->system = 0;
    e->daemon_code[0] = e->text[0] = e->group[0] = e->client[0] = 0;
    e->lost_first = e->lost_count = e->trainer = e->batch = e->since = e->pid = 0;
}

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static int ingestdi_fail(ingestd_error *e, int code, const char *format, ...) {
    int saved = errno;
    va_list args;
    ingestdi_clear(e, code);
    if (code == INGESTD_SYSTEM) e->system = saved;
    va_start(args, format);
    vsnprintf(e->text, sizeof e->text, format, args);
    va_end(args);
    if (code == INGESTD_SYSTEM) {
        size_t n = strlen(e->text);
        snprintf(e->text + n, sizeof e->text - n, ": %s", strerror(saved));
    }
    return code;
}

/* ---- Time ---- */

static int64_t ingestdi_now(void) { /* nanoseconds */
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t ingestdi_deadline(int ms) { return ingestdi_now() + (int64_t)ms * 1000000; }

static int ingestdi_left_ms(int64_t end) { /* rounded up, so that a poll does not return too early */
    int64_t left = end - ingestdi_now();
    if (left <= 0) return 0;
    left = (left + 999999) / 1000000;
    return left > INT_MAX ? INT_MAX : (int)left;
}

/* ---- UTF-8 and JSON ---- */

/* ingestdi_rune decodes one code point of n >= 1 bytes and returns its length, 0 where they are not UTF-8. */
static size_t ingestdi_rune(const unsigned char *s, size_t n, uint32_t *rune) {
    size_t length, i;
    uint32_t c = s[0], least;
    if (c < 0x80) {
        *rune = c;
        return 1;
    }
    if (c >= 0xC2 && c <= 0xDF) length = 2, c &= 0x1F, least = 0x80;
    else if (c >= 0xE0 && c <= 0xEF) length = 3, c &= 0x0F, least = 0x800;
    else if (c >= 0xF0 && c <= 0xF4) length = 4, c &= 0x07, least = 0x10000;
    else return 0;
    if (length > n) return 0;
    for (i = 1; i < length; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0;
        c = c << 6 | (s[i] & 0x3F);
    }
    if (c < least || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) return 0;
    *rune = c;
    return length;
}

static int ingestdi_control(uint32_t rune) { return rune < 0x20 || (rune >= 0x7F && rune < 0xA0); }

/* A reader of JSON text. Nothing is allocated; what is nested deeper than ingestdi_depth_max is refused. */
typedef struct ingestdi_json {
    const unsigned char *at, *end;
    const char *wrong; /* what was wrong first, or NULL */
} ingestdi_json;

static int ingestdi_wrong(ingestdi_json *j, const char *what) {
    if (!j->wrong) j->wrong = what;
    return -1;
}

static void ingestdi_blanks(ingestdi_json *j) {
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\t' || *j->at == '\n' || *j->at == '\r')) j->at++;
}

static int ingestdi_peek(ingestdi_json *j) { /* the next byte that is not blank, -1 at the end */
    ingestdi_blanks(j);
    return j->at < j->end ? *j->at : -1;
}

static int ingestdi_take(ingestdi_json *j, char c) {
    if (ingestdi_peek(j) != c) return 0;
    j->at++;
    return 1;
}

static int ingestdi_hex4(ingestdi_json *j, uint32_t *v) {
    int i;
    if (j->end - j->at < 4) return ingestdi_wrong(j, "a \\u escape is cut short");
    for (*v = 0, i = 0; i < 4; i++) {
        unsigned c = *j->at++;
        if (c >= '0' && c <= '9') c -= '0';
        else if (c >= 'a' && c <= 'f') c -= 'a' - 10;
        else if (c >= 'A' && c <= 'F') c -= 'A' - 10;
        else return ingestdi_wrong(j, "a \\u escape has a character that is no hex digit");
        *v = *v << 4 | c;
    }
    return 0;
}

static int ingestdi_escape(ingestdi_json *j, uint32_t *rune) {
    uint32_t low;
    if (j->at == j->end) return ingestdi_wrong(j, "a string does not end");
    switch (*j->at++) {
    case '"': *rune = '"'; return 0;
    case '\\': *rune = '\\'; return 0;
    case '/': *rune = '/'; return 0;
    case 'b': *rune = '\b'; return 0;
    case 'f': *rune = '\f'; return 0;
    case 'n': *rune = '\n'; return 0;
    case 'r': *rune = '\r'; return 0;
    case 't': *rune = '\t'; return 0;
    case 'u': break;
    default: return ingestdi_wrong(j, "a string has an escape that is none");
    }
    if (ingestdi_hex4(j, rune)) return -1;
    if (*rune >= 0xD800 && *rune <= 0xDBFF && j->end - j->at >= 6 && j->at[0] == '\\' && j->at[1] == 'u') {
        const unsigned char *before = j->at;
        j->at += 2;
        if (ingestdi_hex4(j, &low)) return -1;
        if (low >= 0xDC00 && low <= 0xDFFF) {
            *rune = 0x10000 + ((*rune - 0xD800) << 10) + (low - 0xDC00);
            return 0;
        }
        j->at = before;
    }
    if (*rune >= 0xD800 && *rune <= 0xDFFF) *rune = 0xFFFD; /* half a pair */
    return 0;
}

/* A text being collected: as much of it as fits, cut between code points and closed with a zero; full is what all of it has. */
typedef struct ingestdi_text {
    char *to;
    size_t cap, n, full;
    int controls; /* how many control characters were replaced with '?' */
} ingestdi_text;

static void ingestdi_text_open(ingestdi_text *t, char *to, size_t cap) {
    t->to = to;
    t->cap = cap;
    t->n = t->full = 0;
    t->controls = 0;
    if (cap) to[0] = 0;
}

static void ingestdi_text_add(ingestdi_text *t, uint32_t c) {
    char b[4];
    size_t n;
    if (ingestdi_control(c)) {
        t->controls++;
        c = '?';
    }
    if (c < 0x80) b[0] = (char)c, n = 1;
    else if (c < 0x800) b[0] = (char)(0xC0 | c >> 6), b[1] = (char)(0x80 | (c & 0x3F)), n = 2;
    else if (c < 0x10000) b[0] = (char)(0xE0 | c >> 12), b[1] = (char)(0x80 | (c >> 6 & 0x3F)), b[2] = (char)(0x80 | (c & 0x3F)), n = 3;
    else {
        b[0] = (char)(0xF0 | c >> 18), b[1] = (char)(0x80 | (c >> 12 & 0x3F));
        b[2] = (char)(0x80 | (c >> 6 & 0x3F)), b[3] = (char)(0x80 | (c & 0x3F)), n = 4;
    }
    if (t->full == t->n && t->n + n < t->cap) { /* once something did not fit, nothing after it is taken */
        memcpy(t->to + t->n, b, n);
        t->n += n;
        t->to[t->n] = 0;
    }
    t->full += n;
}

/* ingestdi_string reads a string into t, or only checks it where t is NULL. */
static int ingestdi_string(ingestdi_json *j, ingestdi_text *t) {
    if (!ingestdi_take(j, '"')) return ingestdi_wrong(j, "a string is missing");
    while (j->at < j->end) {
        uint32_t rune;
        size_t n;
        if (*j->at == '"') {
            j->at++;
            return 0;
        }
        if (*j->at == '\\') {
            j->at++;
            if (ingestdi_escape(j, &rune)) return -1;
        } else {
            if (*j->at < 0x20) return ingestdi_wrong(j, "a string has a control character in it");
            if (!(n = ingestdi_rune(j->at, (size_t)(j->end - j->at), &rune))) return ingestdi_wrong(j, "a string is not UTF-8");
            j->at += n;
        }
        if (t) ingestdi_text_add(t, rune);
    }
    return ingestdi_wrong(j, "a string does not end");
}

/* ingestdi_name reads a string that must fit into cap bytes whole and has no control characters. */
static int ingestdi_name(ingestdi_json *j, char *to, size_t cap) {
    ingestdi_text t;
    ingestdi_text_open(&t, to, cap);
    if (ingestdi_string(j, &t)) return -1;
    if (t.full != t.n) return ingestdi_wrong(j, "a name is too long");
    if (t.controls) return ingestdi_wrong(j, "a name has a control character in it");
    return 0;
}

static int ingestdi_line(ingestdi_json *j, char *to, size_t cap) { /* a text for a person, cut where it is too long */
    ingestdi_text t;
    ingestdi_text_open(&t, to, cap);
    return ingestdi_string(j, &t);
}

static int ingestdi_digits(ingestdi_json *j) {
    const unsigned char *from = j->at;
    while (j->at < j->end && *j->at >= '0' && *j->at <= '9') j->at++;
    return j->at == from ? ingestdi_wrong(j, "a number lacks digits") : 0;
}

static int ingestdi_number(ingestdi_json *j) { /* any JSON number, skipped */
    if (j->at < j->end && *j->at == '-') j->at++;
    if (j->at < j->end && *j->at == '0') j->at++;
    else if (ingestdi_digits(j)) return -1;
    if (j->at < j->end && *j->at == '.') {
        j->at++;
        if (ingestdi_digits(j)) return -1;
    }
    if (j->at < j->end && (*j->at == 'e' || *j->at == 'E')) {
        j->at++;
        if (j->at < j->end && (*j->at == '+' || *j->at == '-')) j->at++;
        return ingestdi_digits(j);
    }
    return 0;
}

/* ingestdi_whole reads a whole number from 0 to 2^64-1, written without fraction and exponent. */
static int ingestdi_whole(ingestdi_json *j, uint64_t *v) {
    const unsigned char *from;
    ingestdi_blanks(j);
    from = j->at;
    *v = 0;
    while (j->at < j->end && *j->at >= '0' && *j->at <= '9') {
        uint64_t digit = *j->at++ - (uint64_t)'0';
        if (*v > (UINT64_MAX - digit) / 10) return ingestdi_wrong(j, "a number is too large");
        *v = *v * 10 + digit;
    }
    if (j->at == from || (*from == '0' && j->at - from > 1) || (j->at < j->end && (*j->at == '.' || *j->at == 'e' || *j->at == 'E')))
        return ingestdi_wrong(j, "a number is not a whole one");
    return 0;
}

static int ingestdi_word(ingestdi_json *j, const char *word) {
    size_t n = strlen(word);
    if ((size_t)(j->end - j->at) < n || memcmp(j->at, word, n)) return ingestdi_wrong(j, "a value is none of JSON's");
    j->at += n;
    return 0;
}

/* ingestdi_key steps through an object whose '{' was taken: 1 with the next key in key (empty where it does not fit), 0 after the '}'. */
static int ingestdi_key(ingestdi_json *j, int first, char *key, size_t cap) {
    ingestdi_text t;
    if (ingestdi_peek(j) == '}' && first) {
        j->at++;
        return 0;
    }
    if (!first) {
        if (ingestdi_take(j, '}')) return 0;
        if (!ingestdi_take(j, ',')) return ingestdi_wrong(j, "an object lacks a comma or its end");
        ingestdi_blanks(j);
    }
    ingestdi_text_open(&t, key, cap);
    if (ingestdi_string(j, &t)) return -1;
    if (t.full != t.n) key[0] = 0;
    if (!ingestdi_take(j, ':')) return ingestdi_wrong(j, "an object lacks a colon");
    return 1;
}

/* ingestdi_item steps through an array whose '[' was taken: 1 before each value, 0 after the ']'. */
static int ingestdi_item(ingestdi_json *j, int first) {
    if (first && ingestdi_take(j, ']')) return 0;
    if (first) return 1;
    if (ingestdi_take(j, ']')) return 0;
    return ingestdi_take(j, ',') ? 1 : ingestdi_wrong(j, "an array lacks a comma or its end");
}

static int ingestdi_skip(ingestdi_json *j, int depth) { /* any value */
    char key[2];
    int more, first;
    if (depth > ingestdi_depth_max) return ingestdi_wrong(j, "it is nested too deep");
    switch (ingestdi_peek(j)) {
    case '"': return ingestdi_string(j, NULL);
    case 't': return ingestdi_word(j, "true");
    case 'f': return ingestdi_word(j, "false");
    case 'n': return ingestdi_word(j, "null");
    case '{':
        j->at++;
        for (first = 1; (more = ingestdi_key(j, first, key, sizeof key)) > 0; first = 0)
            if (ingestdi_skip(j, depth + 1)) return -1;
        return more;
    case '[':
        j->at++;
        for (first = 1; (more = ingestdi_item(j, first)) > 0; first = 0)
            if (ingestdi_skip(j, depth + 1)) return -1;
        return more;
    case -1: return ingestdi_wrong(j, "it is cut short");
    default: return ingestdi_number(j);
    }
}

static int ingestdi_done(ingestdi_json *j) { /* nothing may follow */
    return ingestdi_peek(j) < 0 ? 0 : ingestdi_wrong(j, "something follows its end");
}

/* ---- The hello ---- */

typedef struct ingestdi_buffer {
    char *to;
    size_t n, cap;
} ingestdi_buffer; /* made large enough before; what would not fit is left out, and n says so */

static void ingestdi_put(ingestdi_buffer *b, const void *from, size_t n) {
    if (b->n <= b->cap && n <= b->cap - b->n) memcpy(b->to + b->n, from, n);
    b->n += n;
}

static void ingestdi_put_text(ingestdi_buffer *b, const char *text) { ingestdi_put(b, text, strlen(text)); }

static void ingestdi_put_string(ingestdi_buffer *b, const char *text) { /* quoted and escaped */
    char escaped[8];
    ingestdi_put_text(b, "\"");
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') ingestdi_put_text(b, "\\");
        if ((unsigned char)*text < 0x20) {
            snprintf(escaped, sizeof escaped, "\\u%04x", (unsigned)(unsigned char)*text);
            ingestdi_put_text(b, escaped);
        } else ingestdi_put(b, text, 1);
    }
    ingestdi_put_text(b, "\"");
}

static void ingestdi_put_field(ingestdi_buffer *b, const char *name, const char *text) { /* after another field; none where text is NULL */
    if (!text) return;
    ingestdi_put_text(b, ",\"");
    ingestdi_put_text(b, name);
    ingestdi_put_text(b, "\":");
    ingestdi_put_string(b, text);
}

typedef struct ingestdi_hello {
    const char *role, *table, *group, *session, *client, *spec, *fingerprint;
    uint32_t prefetch;
    int notes;
} ingestdi_hello;

static int ingestdi_check_name(ingestd_error *e, const char *field, const char *text) {
    const unsigned char *s = (const unsigned char *)text;
    size_t n;
    if (!text) return 0;
    n = strlen(text);
    if (n == 0) return ingestdi_fail(e, INGESTD_MISUSE, "the option %s is empty: leave it NULL, or name one", field);
    if (n > INGESTD_NAME_MAX) return ingestdi_fail(e, INGESTD_MISUSE, "the option %s has %zu bytes: at most %d are allowed", field, n, INGESTD_NAME_MAX);
    while (n) {
        uint32_t rune;
        size_t k = ingestdi_rune(s, n, &rune);
        if (!k) return ingestdi_fail(e, INGESTD_MISUSE, "the option %s is not UTF-8", field);
        if (ingestdi_control(rune)) return ingestdi_fail(e, INGESTD_MISUSE, "the option %s has a control character in it: take it out", field);
        s += k, n -= k;
    }
    return 0;
}

static int ingestdi_check_hello(ingestd_error *e, const ingestdi_hello *h) {
    int code;
    if (!h->table) return ingestdi_fail(e, INGESTD_MISUSE, "the option table is NULL: name the table to attach to");
    if ((code = ingestdi_check_name(e, "table", h->table)) || (code = ingestdi_check_name(e, "group", h->group)) ||
        (code = ingestdi_check_name(e, "session", h->session)) || (code = ingestdi_check_name(e, "client", h->client)))
        return code;
    if (h->fingerprint && (strlen(h->fingerprint) != 64 || strspn(h->fingerprint, "0123456789abcdefABCDEF") != 64))
        return ingestdi_fail(e, INGESTD_MISUSE, "the option fingerprint must be 64 hex digits");
    if (h->spec) {
        size_t n = strlen(h->spec);
        ingestdi_json j;
        j.at = (const unsigned char *)h->spec;
        j.end = j.at + n;
        j.wrong = NULL;
        if (n > INGESTDI_BODY_MAX) return ingestdi_fail(e, INGESTD_MISUSE, "the option spec has %zu bytes: at most %u are allowed", n, INGESTDI_BODY_MAX);
        if (ingestdi_peek(&j) != '{' || ingestdi_skip(&j, 0) || ingestdi_done(&j))
            return ingestdi_fail(e, INGESTD_MISUSE, "the option spec must be one JSON object, {\"leaves\":[...]}: %s", j.wrong ? j.wrong : "it is none");
    }
    return 0;
}

/* ingestdi_say makes the hello, malloc'ed, of *length bytes; NULL with an error in *e. */
static char *ingestdi_say(ingestd_error *e, const ingestdi_hello *h, size_t *length) {
    static const char magic[] = "INGESTD\n\1\0\1\0"; /* versions 1 to 1; the length follows */
    char number[32];
    uint32_t body;
    ingestdi_buffer b;
    b.n = 0;
    b.cap = 4096 + 6 * 4 * INGESTD_NAME_MAX + (h->spec ? strlen(h->spec) : 0);
    if (!(b.to = (char *)malloc(b.cap))) {
        ingestdi_fail(e, INGESTD_SYSTEM, "no memory for a hello of %zu bytes", b.cap);
        return NULL;
    }
    ingestdi_put(&b, magic, 12);
    ingestdi_put(&b, "\0\0\0\0", 4);
    ingestdi_put_text(&b, "{\"role\":");
    ingestdi_put_string(&b, h->role);
    ingestdi_put_field(&b, "table", h->table);
    ingestdi_put_text(&b, ",\"byte_order\":\"little\"");
    if (h->spec) {
        ingestdi_put_text(&b, ",\"spec\":");
        ingestdi_put_text(&b, h->spec);
    }
    ingestdi_put_field(&b, "fingerprint", h->fingerprint);
    ingestdi_put_field(&b, "session", h->session);
    if (h->prefetch) {
        snprintf(number, sizeof number, ",\"prefetch\":%lu", (unsigned long)h->prefetch);
        ingestdi_put_text(&b, number);
    }
    ingestdi_put_field(&b, "group", h->group);
    if (h->notes) ingestdi_put_text(&b, ",\"notes\":true");
    ingestdi_put_field(&b, "client", h->client ? h->client : "ingestd-c");
    ingestdi_put_text(&b, "}");
    if (b.n > b.cap || b.n - 16 > INGESTDI_BODY_MAX) {
        ingestdi_fail(e, INGESTD_MISUSE, "the hello has %zu bytes: at most %u are allowed; shorten the spec", b.n, INGESTDI_BODY_MAX);
        free(b.to);
        return NULL;
    }
    body = (uint32_t)(b.n - 16);
    memcpy(b.to + 12, &body, 4);
    *length = b.n;
    return b.to;
}

/* ---- The link: what trainers and producers have in common ---- */

/* One queue of the channel, from our side: our own count is never read back. */
typedef struct ingestdi_queue {
    uint64_t *produced, *consumed;
    uint32_t *waiting, *closed;
    uint64_t *slots; /* two words each */
    uint64_t capacity, at, seen;
} ingestdi_queue;

typedef struct ingestdi_map {
    unsigned char *at;
    size_t whole; /* as mapped: whole pages */
} ingestdi_map;

typedef struct ingestdi_link {
    ingestd_error error; /* of the last call that failed */
    ingestd_error why;   /* why the attachment has ended */
    int gone;            /* why.code, or 0 while it lives */
    ingestd_error note;  /* what the daemon said last of what a producer waits for */
    int noted;

    char path[128]; /* for messages */
    int sock;
    int fds[ingestdi_fds_max]; /* as received; -1 where taken. 2 wakes us, 3 wakes the daemon */
    int fd_count;
    ingestdi_map segment, channel;
    ingestdi_queue deliver, giveback;

    ingestd_table table;
    char table_name[INGESTD_NAME_MAX + 1];
    ingestd_leaf *leaves;
    const ingestd_leaf **by_name;
    char *names;              /* of the leaves */
    uint64_t *columns;        /* offsets of the leaves' columns from the start of a batch */
    uint64_t states, data, stride, stream_column, number_column, arrival_column;
    uint64_t *held;           /* per place: 1 + number of the batch (producer: the lease) that we were given there, or 0 */

    unsigned char *inbox;     /* what the socket said and is not whole yet */
    size_t inbox_n;
} ingestdi_link;

#define INGESTDI_INBOX (5u + INGESTDI_NOTICE_MAX)

static int ingestdi_misuse(ingestdi_link *l, const char *what) { return ingestdi_fail(&l->error, INGESTD_MISUSE, "%s", what); }

static int ingestdi_report(ingestdi_link *l) { /* the reason of the end, again */
    l->error = l->why;
    return l->gone;
}

/* ingestdi_spoil ends the attachment: the daemon broke the rules. */
static int ingestdi_spoil(ingestdi_link *l, const char *what, uint64_t a, uint64_t b) {
    if (!l->gone)
        l->gone = ingestdi_fail(&l->why, INGESTD_BAD_SEGMENT, "the daemon at %s broke its channel: %s (%#llx, %#llx); attach again, and see its log", l->path,
                                what, (unsigned long long)a, (unsigned long long)b);
    return ingestdi_report(l);
}

/* ingestdi_unmap, ingestdi_free_link: also for what is half made. */
static void ingestdi_unmap(ingestdi_map *m) {
    if (m->at) munmap(m->at, m->whole);
    m->at = NULL;
}

static void ingestdi_free_link(ingestdi_link *l) {
    int i;
    if (l->sock >= 0) close(l->sock);
    for (i = 0; i < l->fd_count; i++)
        if (l->fds[i] >= 0) close(l->fds[i]);
    ingestdi_unmap(&l->segment);
    ingestdi_unmap(&l->channel);
    free(l->leaves);
    free((void *)l->by_name);
    free(l->names);
    free(l->columns);
    free(l->held);
    free(l->inbox);
}

/* ingestdi_poll waits for one of two descriptors; 1, 0 at the deadline, or -1 with errno. */
static int ingestdi_poll(int fd, short events, int other, int64_t end) {
    for (;;) {
        struct pollfd p[2];
        int n, ms = ingestdi_left_ms(end);
        p[0].fd = fd, p[0].events = events, p[0].revents = 0;
        p[1].fd = other, p[1].events = POLLIN, p[1].revents = 0; /* a negative one is ignored */
        n = poll(p, 2, ms);
        if (n > 0) return 1;
        if (n < 0 && errno != EINTR) return -1;
        if (n == 0 && ingestdi_left_ms(end) == 0) return 0;
        if (n < 0 && ms == 0) return 0;
    }
}

static int ingestdi_connect(ingestdi_link *l, ingestd_error *e, const char *path, int64_t end) {
    struct sockaddr_un to;
    int flags;
    if (strncmp(path, "unix://", 7) == 0) path += 7;
    else if (strncmp(path, "shm://", 6) == 0) path += 6;
    snprintf(l->path, sizeof l->path, "%s", path);
    memset(&to, 0, sizeof to);
    to.sun_family = AF_UNIX;
    if (!*path || strlen(path) >= sizeof to.sun_path)
        return ingestdi_fail(e, INGESTD_MISUSE, "the path of the socket has %zu bytes: 1 to %zu are allowed", strlen(path), sizeof to.sun_path - 1);
    memcpy(to.sun_path, path, strlen(path));
    if ((l->sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) < 0) return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: socket", path);
    for (;;) {
        int64_t left = end - ingestdi_now();
        struct timeval t; /* where the daemon's queue of connections is full, the kernel waits no longer than this; 0 would be for ever */
        t.tv_sec = (time_t)(left > 0 ? left / 1000000000 : 0);
        t.tv_usec = (suseconds_t)(left > 0 ? left % 1000000000 / 1000 + 1 : 1);
        if (t.tv_usec >= 1000000) t.tv_usec = 999999;
        if (setsockopt(l->sock, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof t)) return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: setsockopt", path);
        if (connect(l->sock, (const struct sockaddr *)&to, sizeof to) == 0) break;
        if (errno == EINTR && left > 0) continue;
        if (errno == EAGAIN || errno == EINTR)
            return ingestdi_fail(e, INGESTD_TIMEOUT, "attach to %s: the daemon did not take the connection in time: is it stopped, or overloaded?", path);
        return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s (is the daemon running, and is this its socket?)", path);
    }
    if ((flags = fcntl(l->sock, F_GETFL)) < 0 || fcntl(l->sock, F_SETFL, flags | O_NONBLOCK) < 0)
        return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: fcntl", path);
    return 0;
}

static int ingestdi_send(ingestdi_link *l, ingestd_error *e, const char *from, size_t n, int64_t end) {
    while (n) {
        ssize_t k = send(l->sock, from, n, MSG_NOSIGNAL);
        if (k > 0) {
            from += k, n -= (size_t)k;
        } else if (k < 0 && errno == EINTR) {
            continue;
        } else if (k < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            int ready = ingestdi_poll(l->sock, POLLOUT, -1, end);
            if (ready < 0) return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: poll", l->path);
            if (ready == 0) return ingestdi_fail(e, INGESTD_TIMEOUT, "attach to %s: the daemon did not read the hello in time", l->path);
        } else {
            return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: send the hello", l->path);
        }
    }
    return 0;
}

/* ingestdi_keep takes the descriptors that came with a message over. */
static void ingestdi_keep(ingestdi_link *l, struct msghdr *m) {
    struct cmsghdr *c;
    for (c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        size_t i, n;
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS || c->cmsg_len < CMSG_LEN(0)) continue;
        n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (l->fd_count < ingestdi_fds_max) l->fds[l->fd_count++] = fd;
            else close(fd);
        }
    }
}

/* ingestdi_read reads exactly n bytes of the reply. */
static int ingestdi_read(ingestdi_link *l, ingestd_error *e, unsigned char *to, size_t n, int64_t end) {
    while (n) {
        union {
            struct cmsghdr align;
            char room[CMSG_SPACE(sizeof(int) * ingestdi_fds_max)];
        } control;
        struct iovec part;
        struct msghdr m;
        ssize_t k;
        part.iov_base = to, part.iov_len = n;
        memset(&m, 0, sizeof m);
        memset(&control, 0, sizeof control);
        m.msg_iov = &part, m.msg_iovlen = 1;
        m.msg_control = control.room, m.msg_controllen = sizeof control.room;
        k = recvmsg(l->sock, &m, MSG_CMSG_CLOEXEC);
        if (k >= 0) ingestdi_keep(l, &m);
        if (k >= 0 && m.msg_flags & MSG_CTRUNC) {
            errno = EMFILE;
            return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: more than %d descriptors came, or this process may open too few (ulimit -n)", l->path,
                                 (int)ingestdi_fds_max);
        }
        if (k > 0) {
            to += k, n -= (size_t)k;
        } else if (k == 0) {
            return ingestdi_fail(e, INGESTD_PEER_CLOSED, "attach to %s: the daemon closed the connection before its reply was complete: see its log", l->path);
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            int ready = ingestdi_poll(l->sock, POLLIN, -1, end);
            if (ready < 0) return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: poll", l->path);
            if (ready == 0) return ingestdi_fail(e, INGESTD_TIMEOUT, "attach to %s: no reply in time: is the daemon stopped, or overloaded?", l->path);
        } else if (errno == ECONNRESET || errno == EPIPE) {
            return ingestdi_fail(e, INGESTD_PEER_CLOSED, "attach to %s: the daemon went away before its reply was complete: see its log", l->path);
        } else if (errno != EINTR) {
            return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: receive the reply", l->path);
        }
    }
    return 0;
}

/* What an accepted reply says. */
typedef struct ingestdi_accepted {
    uint64_t batch_size, batches, segment_bytes, channel_bytes, prefetch, stream, held;
    unsigned char fingerprint[32];
} ingestdi_accepted;

static int ingestdi_bad_reply(ingestdi_link *l, ingestd_error *e, const char *what, const char *more) {
    return ingestdi_fail(e, INGESTD_BAD_REPLY, "the answer from %s is not one of an ingestd daemon of this protocol: %s%s", l->path, what, more ? more : "");
}

static int ingestdi_fingerprint(ingestdi_json *j, unsigned char to[32]) {
    char hex[65];
    int i;
    if (ingestdi_name(j, hex, sizeof hex)) return -1;
    if (strlen(hex) != 64 || strspn(hex, "0123456789abcdefABCDEF") != 64) return ingestdi_wrong(j, "the fingerprint is not 64 hex digits");
    for (i = 0; i < 32; i++) {
        char two[3];
        two[0] = hex[2 * i], two[1] = hex[2 * i + 1], two[2] = 0;
        to[i] = (unsigned char)strtoul(two, NULL, 16);
    }
    return 0;
}

static int ingestdi_read_accepted(ingestdi_link *l, ingestdi_json *j, ingestdi_accepted *a) {
    char key[32];
    int first, more;
    memset(a, 0, sizeof *a);
    if (!ingestdi_take(j, '{')) return ingestdi_wrong(j, "its body is no object");
    for (first = 1; (more = ingestdi_key(j, first, key, sizeof key)) > 0; first = 0) {
        int bad;
        if (!strcmp(key, "table")) bad = ingestdi_name(j, l->table_name, sizeof l->table_name);
        else if (!strcmp(key, "fingerprint")) bad = ingestdi_fingerprint(j, a->fingerprint);
        else if (!strcmp(key, "batch_size")) bad = ingestdi_whole(j, &a->batch_size);
        else if (!strcmp(key, "batches")) bad = ingestdi_whole(j, &a->batches);
        else if (!strcmp(key, "segment_bytes")) bad = ingestdi_whole(j, &a->segment_bytes);
        else if (!strcmp(key, "channel_bytes")) bad = ingestdi_whole(j, &a->channel_bytes);
        else if (!strcmp(key, "prefetch")) bad = ingestdi_whole(j, &a->prefetch);
        else if (!strcmp(key, "stream")) bad = ingestdi_whole(j, &a->stream);
        else if (!strcmp(key, "held")) bad = ingestdi_whole(j, &a->held);
        else bad = ingestdi_skip(j, 1);
        if (bad) return -1;
    }
    if (more || ingestdi_done(j)) return -1;
    if (!a->batch_size || !a->batches || !a->segment_bytes || !a->channel_bytes || !a->prefetch)
        return ingestdi_wrong(j, "it lacks batch_size, batches, segment_bytes, channel_bytes or prefetch");
    if (a->prefetch > 65536) return ingestdi_wrong(j, "its prefetch is more than there can be batches");
    return 0;
}

static void ingestdi_append(ingestd_error *e, const char *a, const char *b, const char *c, const char *d, const char *f) {
    size_t n = strlen(e->text);
    if (n < sizeof e->text - 1) snprintf(e->text + n, sizeof e->text - n, "%s%s%s%s%s", a, b, c, d, f);
}

/* ingestdi_read_diff adds a refusal's differences to its text. */
static int ingestdi_read_diff(ingestdi_json *j, ingestd_error *e) {
    int first, more, field, count;
    char key[16], leaf[INGESTD_NAME_MAX + 1], got[256], want[256];
    if (!ingestdi_take(j, '[')) return ingestdi_wrong(j, "its diff is no array");
    for (first = 1, count = 0; (more = ingestdi_item(j, first)) > 0; first = 0, count++) {
        leaf[0] = got[0] = want[0] = 0;
        if (!ingestdi_take(j, '{')) return ingestdi_wrong(j, "a difference is no object");
        for (field = 1; (more = ingestdi_key(j, field, key, sizeof key)) > 0; field = 0) {
            int bad;
            if (!strcmp(key, "leaf")) bad = ingestdi_line(j, leaf, sizeof leaf);
            else if (!strcmp(key, "got")) bad = ingestdi_line(j, got, sizeof got);
            else if (!strcmp(key, "want")) bad = ingestdi_line(j, want, sizeof want);
            else bad = ingestdi_skip(j, 3);
            if (bad) return -1;
        }
        if (more) return -1;
        if (count < 64) {
            ingestdi_append(e, count ? "; leaf " : ": leaf ", leaf, " is ", got[0] ? got : "missing", " here");
            ingestdi_append(e, " and ", want[0] ? want : "missing", " in the table", "", "");
        }
    }
    return more;
}

/*
 * ingestdi_read_reason reads {"code":..,"reason":..} and what else there may be: of a refusal, a notice or a note. lead goes before
 * the reason. fields of notes are taken from any of them.
 */
static int ingestdi_read_reason(ingestdi_json *j, ingestd_error *e, const char *lead) {
    char key[16];
    ingestdi_json diff;
    int first, more;
    diff.at = NULL;
    if (!ingestdi_take(j, '{')) return ingestdi_wrong(j, "its body is no object");
    for (first = 1; (more = ingestdi_key(j, first, key, sizeof key)) > 0; first = 0) {
        int bad;
        if (!strcmp(key, "code")) bad = ingestdi_line(j, e->daemon_code, sizeof e->daemon_code);
        else if (!strcmp(key, "reason")) {
            snprintf(e->text, sizeof e->text, "%s", lead);
            bad = ingestdi_line(j, e->text + strlen(e->text), sizeof e->text - strlen(e->text));
        } else if (!strcmp(key, "diff")) {
            diff.at = j->at, diff.end = j->end, diff.wrong = NULL;
            bad = ingestdi_skip(j, 1);
        } else if (!strcmp(key, "trainer")) bad = ingestdi_whole(j, &e->trainer);
        else if (!strcmp(key, "batch")) bad = ingestdi_whole(j, &e->batch);
        else if (!strcmp(key, "since")) bad = ingestdi_whole(j, &e->since);
        else if (!strcmp(key, "pid")) bad = ingestdi_whole(j, &e->pid);
        else if (!strcmp(key, "group")) bad = ingestdi_line(j, e->group, sizeof e->group);
        else if (!strcmp(key, "client")) bad = ingestdi_line(j, e->client, sizeof e->client);
        else bad = ingestdi_skip(j, 1);
        if (bad) return -1;
    }
    if (more || ingestdi_done(j)) return -1;
    if (!e->daemon_code[0]) return ingestdi_wrong(j, "it has no code");
    if (diff.at && ingestdi_read_diff(&diff, e)) return ingestdi_wrong(j, diff.wrong);
    return 0;
}

static uint16_t ingestdi_u16(const unsigned char *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint32_t ingestdi_u32(const unsigned char *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint64_t ingestdi_u64(const unsigned char *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static int ingestdi_read_body(ingestdi_link *l, ingestd_error *e, int refused, const unsigned char *body, size_t n, ingestdi_accepted *a) {
    ingestdi_json j;
    j.at = body, j.end = body + n, j.wrong = NULL;
    if (refused) {
        ingestdi_clear(e, INGESTD_REFUSED);
        if (ingestdi_read_reason(&j, e, "the daemon refused: ")) return ingestdi_bad_reply(l, e, "its refusal: ", j.wrong);
        return e->code = strcmp(e->daemon_code, "shutting_down") ? INGESTD_REFUSED : INGESTD_SHUTTING_DOWN;
    }
    if (ingestdi_read_accepted(l, &j, a)) return ingestdi_bad_reply(l, e, "its reply: ", j.wrong);
    return 0;
}

static int ingestdi_read_reply(ingestdi_link *l, ingestd_error *e, ingestdi_accepted *a, int64_t end) {
    unsigned char header[16], *body;
    unsigned version, status;
    uint32_t length;
    int code;
    if ((code = ingestdi_read(l, e, header, 8, end))) return code;
    if (memcmp(header, "INGESTD\n", 8)) {
        if (!memcmp(header, "ECHO", 4)) return ingestdi_bad_reply(l, e, "it is an echo:// address; use the daemon's unix:// address", NULL);
        return ingestdi_bad_reply(l, e, "it starts with other bytes", NULL);
    }
    if ((code = ingestdi_read(l, e, header + 8, 8, end))) return code;
    version = ingestdi_u16(header + 8), status = ingestdi_u16(header + 10), length = ingestdi_u32(header + 12);
    if (status > 1) return ingestdi_bad_reply(l, e, "it neither accepts nor refuses", NULL);
    if (status == 0 && version != 1) return ingestdi_bad_reply(l, e, "it chose a protocol version that was not offered", NULL);
    if (length < 2 || length > INGESTDI_BODY_MAX) return ingestdi_bad_reply(l, e, "its body is too long or too short", NULL);
    if (!(body = (unsigned char *)malloc(length))) return ingestdi_fail(e, INGESTD_SYSTEM, "no memory for a reply of %lu bytes", (unsigned long)length);
    code = ingestdi_read(l, e, body, length, end);
    if (!code) code = ingestdi_read_body(l, e, status == 1, body, length, a);
    free(body);
    return code;
}

/* ---- Segment and channel ---- */

static int ingestdi_bad_segment(ingestdi_link *l, ingestd_error *e, const char *what, uint64_t value) {
    return ingestdi_fail(e, INGESTD_BAD_SEGMENT, "what the daemon at %s shared is not a segment and channel that this program can use: %s (%llu)",
                         l->path, what, (unsigned long long)value);
}

/*
 * ingestdi_map_peer maps memory of the daemon, after seeing that it has that size and cannot be shrunk under us, which would be a SIGBUS
 * at the next touch: a memfd carries the seals; of a named file its owner means to keep it.
 */
static int ingestdi_map_peer(ingestdi_link *l, ingestd_error *e, int fd, uint64_t size, int writable, ingestdi_map *m) {
    struct stat st;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    int seals, flags;
    void *at;
    if (fstat(fd, &st)) return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: look at the memory received", l->path);
    if (st.st_blksize > 0 && (uint64_t)st.st_blksize > page && (uint64_t)st.st_blksize <= (1u << 30)) page = (uint64_t)st.st_blksize; /* huge pages */
    if (!S_ISREG(st.st_mode)) return ingestdi_bad_segment(l, e, "a descriptor received is no memory", (uint64_t)st.st_mode);
    if (size < 64 || size > INGESTDI_SEGMENT_MAX) return ingestdi_bad_segment(l, e, "its size cannot be", size);
    if (st.st_size < 0 || (uint64_t)st.st_size < size) return ingestdi_bad_segment(l, e, "the memory received is smaller than announced", (uint64_t)st.st_size);
    seals = fcntl(fd, F_GET_SEALS);
    flags = fcntl(fd, F_GETFL);
    if (seals < 0 || (seals & (F_SEAL_SHRINK | F_SEAL_GROW)) != (F_SEAL_SHRINK | F_SEAL_GROW)) {
        if (st.st_nlink == 0 || flags < 0 || (!writable && (flags & O_ACCMODE) != O_RDONLY))
            return ingestdi_bad_segment(l, e, "the memory received is not sealed against shrinking", seals < 0 ? 0 : (uint64_t)seals);
    }
    m->whole = (size_t)((size + page - 1) / page * page);
    at = mmap(NULL, m->whole, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: map %llu bytes", l->path, (unsigned long long)size);
    m->at = (unsigned char *)at;
    return 0;
}

static uint32_t ingestdi_crc32c(uint32_t crc, const unsigned char *p, size_t n) { /* Castagnoli; crc goes on from an earlier part, 0 at first */
    uint32_t table[256], i;
    for (i = 0; i < 256; i++) {
        uint32_t v = i;
        int k;
        for (k = 0; k < 8; k++) v = v >> 1 ^ (v & 1 ? 0x82F63B78u : 0);
        table[i] = v;
    }
    for (crc = ~crc; n; n--) crc = crc >> 8 ^ table[(crc ^ *p++) & 0xFF];
    return ~crc;
}

static const struct {
    const char *name;
    size_t bytes;
} ingestdi_dtypes[] = {
    {NULL, 0}, {"BOOL", 1}, {"U8", 1}, {"I8", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2}, {"BF16", 2},
    {"I32", 4}, {"U32", 4}, {"F32", 4}, {"I64", 8}, {"U64", 8}, {"F64", 8},
};

const char *ingestd_dtype_name(ingestd_dtype dtype) {
    return (int)dtype < INGESTD_BOOL || (int)dtype > INGESTD_F64 ? NULL : ingestdi_dtypes[dtype].name;
}

size_t ingestd_dtype_bytes(ingestd_dtype dtype) { return (int)dtype < INGESTD_BOOL || (int)dtype > INGESTD_F64 ? 0 : ingestdi_dtypes[dtype].bytes; }

static int ingestdi_leaf_shape(ingestdi_json *j, ingestd_leaf *leaf) {
    int first, more;
    leaf->dims = 0;
    if (!ingestdi_take(j, '[')) return ingestdi_wrong(j, "a shape is no array");
    for (first = 1; (more = ingestdi_item(j, first)) > 0; first = 0) {
        if (leaf->dims == INGESTD_DIMS_MAX) return ingestdi_wrong(j, "a shape has too many dimensions");
        if (ingestdi_whole(j, &leaf->shape[leaf->dims])) return -1;
        if (!leaf->shape[leaf->dims++]) return ingestdi_wrong(j, "a dimension is 0");
    }
    return more;
}

static int ingestdi_leaf_dtype(ingestdi_json *j, ingestd_leaf *leaf) {
    char name[16];
    int i;
    if (ingestdi_name(j, name, sizeof name)) return -1;
    for (i = INGESTD_BOOL; i <= INGESTD_F64; i++) {
        if (!strcmp(name, ingestdi_dtypes[i].name)) {
            leaf->dtype = (ingestd_dtype)i;
            return 0;
        }
    }
    return ingestdi_wrong(j, "a dtype is not known");
}

/* ingestdi_read_leaf reads one leaf. Its name goes to *names, which steps on. */
static int ingestdi_read_leaf(ingestdi_json *j, ingestd_leaf *leaf, char **names) {
    char key[16];
    int first, more;
    unsigned d;
    leaf->dims = INGESTD_DIMS_MAX + 1;
    if (!ingestdi_take(j, '{')) return ingestdi_wrong(j, "a leaf is no object");
    for (first = 1; (more = ingestdi_key(j, first, key, sizeof key)) > 0; first = 0) {
        int bad;
        if (!strcmp(key, "name") && !leaf->name) {
            leaf->name = *names;
            bad = ingestdi_name(j, *names, INGESTD_NAME_MAX + 1);
            *names += strlen(*names) + 1;
        } else if (!strcmp(key, "dtype") && !leaf->dtype) bad = ingestdi_leaf_dtype(j, leaf);
        else if (!strcmp(key, "shape") && leaf->dims > INGESTD_DIMS_MAX) bad = ingestdi_leaf_shape(j, leaf);
        else bad = ingestdi_wrong(j, "a leaf has a field that is unknown or there twice");
        if (bad) return -1;
    }
    if (more) return -1;
    if (!leaf->name || !leaf->name[0] || !leaf->dtype || leaf->dims > INGESTD_DIMS_MAX) return ingestdi_wrong(j, "a leaf lacks name, dtype or shape");
    leaf->bytes = ingestdi_dtypes[leaf->dtype].bytes;
    for (d = 0; d < leaf->dims; d++) {
        if (leaf->shape[d] > INGESTDI_SAMPLE_MAX / leaf->bytes) return ingestdi_wrong(j, "a leaf is larger than a sample may be");
        leaf->bytes *= leaf->shape[d];
    }
    return 0;
}

static int ingestdi_compare_names(const void *a, const void *b) {
    return strcmp((*(const ingestd_leaf *const *)a)->name, (*(const ingestd_leaf *const *)b)->name);
}

/* ingestdi_read_spec reads {"leaves":[...]}, which must have exactly the leaves there is room for. */
static int ingestdi_read_spec(ingestdi_link *l, ingestdi_json *j) {
    char key[16], *names = l->names;
    uint32_t i;
    int first, more;
    if (!ingestdi_take(j, '{') || ingestdi_key(j, 1, key, sizeof key) != 1 || strcmp(key, "leaves") || !ingestdi_take(j, '['))
        return ingestdi_wrong(j, "the spec does not start with {\"leaves\":[");
    for (first = 1, i = 0; (more = ingestdi_item(j, first)) > 0; first = 0, i++) {
        if (i == l->table.leaf_count) return ingestdi_wrong(j, "the spec has more leaves than the segment has columns");
        if (ingestdi_read_leaf(j, &l->leaves[i], &names)) return -1;
        l->by_name[i] = &l->leaves[i];
    }
    if (more) return -1;
    if (i != l->table.leaf_count) return ingestdi_wrong(j, "the spec has fewer leaves than the segment has columns");
    if (!ingestdi_take(j, '}') || ingestdi_done(j)) return ingestdi_wrong(j, "the spec does not end with ]}");
    qsort((void *)l->by_name, i, sizeof *l->by_name, ingestdi_compare_names);
    while (i-- > 1)
        if (!strcmp(l->by_name[i]->name, l->by_name[i - 1]->name)) return ingestdi_wrong(j, "two leaves have the same name");
    return 0;
}

int ingestd_find_leaf(const ingestd_table *table, const char *name) {
    ingestd_leaf wanted;
    const ingestd_leaf *key = &wanted;
    const ingestd_leaf *const *found;
    if (!table || !name) return -1;
    wanted.name = name;
    found = (const ingestd_leaf *const *)bsearch(&key, table->by_name, table->leaf_count, sizeof *table->by_name, ingestdi_compare_names);
    return found ? (int)(*found - table->leaves) : -1;
}

/* ingestdi_check_geometry checks where things lie. All values are copies. c is the column table. */
static const char *ingestdi_check_geometry(ingestdi_link *l, const unsigned char *h, const unsigned char *c, uint64_t spec_end, uint64_t *bad) {
    uint64_t size = ingestdi_u64(h + 16), batch_size = ingestdi_u64(h + 24), batches = ingestdi_u64(h + 32), sample = ingestdi_u64(h + 48);
    uint64_t sessions = ingestdi_u64(h + 200), sessions_at = ingestdi_u64(h + 208), groups_at = ingestdi_u64(h + 216);
    uint64_t end = 0, sum = 0, i;
    l->states = ingestdi_u64(h + 80), l->data = ingestdi_u64(h + 88), l->stride = ingestdi_u64(h + 96);
    l->stream_column = ingestdi_u64(h + 104), l->number_column = ingestdi_u64(h + 112), l->arrival_column = ingestdi_u64(h + 120);
    *bad = l->states;
    if (l->states % 64 || l->states < spec_end || l->states > size) return "its states_offset is wrong";
    *bad = sessions;
    if (sessions < 1 || sessions > 65536) return "its number of sessions is out of range";
    *bad = sessions_at; /* no sum overflows: each part is at most 2^46 */
    if (sessions_at % 64 || sessions_at > size || sessions_at < l->states + 64 * batches) return "its sessions_offset is wrong";
    *bad = groups_at;
    if (groups_at % 64 || groups_at > size || groups_at < sessions_at + 256 * sessions) return "its groups_offset is wrong";
    *bad = l->data;
    if (l->data % 4096 || l->data > size || l->data < groups_at + 256 * 64) return "its data_offset is wrong";
    *bad = l->stride;
    if (l->stride % 4096 || !l->stride || l->stride > (size - l->data) / batches) return "its batch_stride is wrong";
    for (i = 0; i < l->table.leaf_count + 3u; i++) {
        uint64_t at, bytes = 8;
        if (i < 3) at = ingestdi_u64(h + 104 + 8 * i);
        else at = ingestdi_u64(c + 16 * (i - 3)), bytes = ingestdi_u64(c + 16 * (i - 3) + 8);
        *bad = at;
        if (at != (end + 63) / 64 * 64 || at > l->stride) return "the offset of a column is wrong";
        *bad = bytes;
        if (bytes < 1 || bytes > INGESTDI_SAMPLE_MAX || bytes > (l->stride - at) / batch_size) return "a column does not fit into a batch";
        end = at + bytes * batch_size;
        if (i >= 3) l->columns[i - 3] = at, sum += bytes;
    }
    *bad = sum;
    return sum == sample ? NULL : "its columns do not add up to its sample_bytes";
}

/* ingestdi_check_header checks the fixed fields and says how long column table and spec are together. */
static const char *ingestdi_check_header(const unsigned char *h, const ingestdi_accepted *a, uint64_t *fixed, uint64_t *bad) {
    uint64_t columns = ingestdi_u64(h + 40), spec = ingestdi_u64(h + 72);
    *bad = ingestdi_u32(h + 8);
    if (memcmp(h, "INGDSEG1", 8)) return "it does not start with the magic";
    if (*bad != 2) return "it has another version than 2";
    if ((*bad = ingestdi_u64(h + 16)) != a->segment_bytes) return "its length is not the one announced";
    if ((*bad = ingestdi_u64(h + 24)) != a->batch_size || *bad > 1u << 30) return "its batch_size is not the one announced, or too large";
    if ((*bad = ingestdi_u64(h + 32)) != a->batches || *bad < 2 || *bad > 65536) return "its number of batches is not the one announced, or out of range";
    if ((*bad = columns) < 1 || columns > INGESTD_LEAVES_MAX) return "its number of columns is out of range";
    if ((*bad = ingestdi_u64(h + 56)) != 512) return "its columns_offset is not 512";
    if ((*bad = ingestdi_u64(h + 64)) != 512 + 16 * columns) return "its spec_offset is wrong";
    if ((*bad = spec) < 2 || spec > INGESTDI_BODY_MAX) return "its spec_bytes is out of range";
    *fixed = 16 * columns + spec;
    *bad = *fixed;
    return *fixed > a->segment_bytes - 512 ? "its spec does not fit" : NULL;
}

static int ingestdi_no_memory(ingestdi_link *l, ingestd_error *e) { return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: memory", l->path); }

/* ingestdi_read_segment checks copies of the header h and of what follows it. */
static int ingestdi_read_segment(ingestdi_link *l, ingestd_error *e, const ingestdi_accepted *a, const unsigned char *h, const unsigned char *fixed,
                                 uint64_t n) {
    uint32_t i, count = (uint32_t)ingestdi_u64(h + 40);
    const char *what;
    uint64_t bad;
    ingestdi_json j;
    if (ingestdi_crc32c(ingestdi_crc32c(0, h + 16, 240), fixed, n) != ingestdi_u32(h + 12))
        return ingestdi_bad_segment(l, e, "its header is damaged: the CRC-32C differs", ingestdi_u32(h + 12));
    if (memcmp(h + 128, a->fingerprint, 32)) return ingestdi_bad_segment(l, e, "its fingerprint is not the one announced", 0);
    l->table.leaf_count = count;
    l->leaves = (ingestd_leaf *)calloc(count, sizeof *l->leaves);
    l->by_name = (const ingestd_leaf **)calloc(count, sizeof *l->by_name);
    l->columns = (uint64_t *)calloc(count, sizeof *l->columns);
    l->names = (char *)malloc(n);
    l->held = (uint64_t *)calloc(a->batches, sizeof *l->held);
    if (!l->leaves || !l->by_name || !l->columns || !l->names || !l->held) return ingestdi_no_memory(l, e);
    if ((what = ingestdi_check_geometry(l, h, fixed, 512 + n, &bad))) return ingestdi_bad_segment(l, e, what, bad);
    j.at = fixed + 16 * (size_t)count, j.end = fixed + n, j.wrong = NULL;
    if (ingestdi_read_spec(l, &j)) return ingestdi_bad_segment(l, e, j.wrong, (uint64_t)(j.at - fixed));
    for (i = 0; i < count; i++)
        if (l->leaves[i].bytes != ingestdi_u64(fixed + 16 * (size_t)i + 8)) return ingestdi_bad_segment(l, e, "a column has not the size of its leaf", i);
    l->table.name = l->table_name;
    l->table.leaves = l->leaves;
    l->table.by_name = l->by_name;
    l->table.sample_bytes = ingestdi_u64(h + 48);
    l->table.batch_size = (uint32_t)a->batch_size;
    l->table.batches = (uint32_t)a->batches;
    l->table.prefetch = (uint32_t)a->prefetch;
    memcpy(l->table.fingerprint, h + 128, 32);
    return 0;
}

static int ingestdi_open_segment(ingestdi_link *l, ingestd_error *e, const ingestdi_accepted *a) {
    unsigned char h[256], *fixed;
    const char *what;
    uint64_t n, bad;
    int code;
    if (a->segment_bytes < 512) return ingestdi_bad_segment(l, e, "it is shorter than its header", a->segment_bytes);
    memcpy(h, l->segment.at, sizeof h);
    if ((what = ingestdi_check_header(h, a, &n, &bad))) return ingestdi_bad_segment(l, e, what, bad);
    if (!(fixed = (unsigned char *)malloc(n))) return ingestdi_no_memory(l, e);
    memcpy(fixed, l->segment.at + 512, n); /* what is checked is what is used */
    code = ingestdi_read_segment(l, e, a, h, fixed, n);
    free(fixed);
    return code;
}

static void ingestdi_open_queue(ingestdi_queue *q, unsigned char *at, uint64_t capacity) {
    q->produced = (uint64_t *)(void *)at;
    q->consumed = (uint64_t *)(void *)(at + 64);
    q->waiting = (uint32_t *)(void *)(at + 128);
    q->closed = (uint32_t *)(void *)(at + 192);
    q->slots = (uint64_t *)(void *)(at + 256);
    q->capacity = capacity;
    q->at = q->seen = 0;
}

static int ingestdi_open_channel(ingestdi_link *l, ingestd_error *e, const ingestdi_accepted *a) {
    unsigned char h[64];
    uint64_t capacity, need, deliver, giveback, apart;
    memcpy(h, l->channel.at, sizeof h);
    if (memcmp(h, "INGDCHN1", 8)) return ingestdi_bad_segment(l, e, "the channel does not start with the magic", 0);
    if (ingestdi_u32(h + 8) != 1) return ingestdi_bad_segment(l, e, "the channel has another version than 1", ingestdi_u32(h + 8));
    capacity = ingestdi_u32(h + 12), deliver = ingestdi_u64(h + 16), giveback = ingestdi_u64(h + 24);
    if (ingestdi_u64(h + 32) != a->channel_bytes) return ingestdi_bad_segment(l, e, "the channel's length is not the one announced", ingestdi_u64(h + 32));
    if (capacity < 2 || capacity > 65536 || (capacity & (capacity - 1)))
        return ingestdi_bad_segment(l, e, "the channel's capacity is no power of two from 2 to 65536", capacity);
    need = 256 + 16 * capacity;
    if (deliver % 64 || deliver < 64 || deliver > a->channel_bytes || a->channel_bytes - deliver < need)
        return ingestdi_bad_segment(l, e, "the channel's deliver queue lies outside it", deliver);
    if (giveback % 64 || giveback < 64 || giveback > a->channel_bytes || a->channel_bytes - giveback < need)
        return ingestdi_bad_segment(l, e, "the channel's giveback queue lies outside it", giveback);
    apart = deliver > giveback ? deliver - giveback : giveback - deliver;
    if (apart < need) return ingestdi_bad_segment(l, e, "the channel's queues overlap", apart);
    ingestdi_open_queue(&l->deliver, l->channel.at + deliver, capacity);
    ingestdi_open_queue(&l->giveback, l->channel.at + giveback, capacity);
    return 0;
}

static int ingestdi_open_bell(ingestdi_link *l, ingestd_error *e, int fd) {
    struct stat st;
    int flags;
    if (fstat(fd, &st)) return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: look at an eventfd", l->path);
    if (st.st_mode & S_IFMT) return ingestdi_bad_segment(l, e, "a descriptor received is no eventfd", (uint64_t)st.st_mode);
    if ((flags = fcntl(fd, F_GETFL)) < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return ingestdi_fail(e, INGESTD_SYSTEM, "attach to %s: fcntl of an eventfd", l->path);
    return 0;
}

static int ingestdi_handshake(ingestdi_link *l, ingestd_error *e, const ingestdi_hello *hello, ingestdi_accepted *a, int64_t end) {
    size_t n = 0;
    int code;
    ingestd_error *failed;
    char *said = ingestdi_say(e, hello, &n);
    if (!said) return e->code;
    if (!(failed = (ingestd_error *)malloc(sizeof *failed))) {
        free(said);
        return ingestdi_no_memory(l, e);
    }
    code = ingestdi_send(l, e, said, n, end);
    free(said);
    *failed = *e;
    if (code == INGESTD_OK) code = ingestdi_read_reply(l, e, a, end);
    else if (code == INGESTD_SYSTEM && ingestdi_read_reply(l, e, a, end) != INGESTD_REFUSED && e->code != INGESTD_SHUTTING_DOWN) *e = *failed;
    else code = e->code; /* a refusal is why the hello could not be sent */
    free(failed);
    return code;
}

/* ingestdi_open attaches. What it made before an error is freed with the link. */
static int ingestdi_open(ingestdi_link *l, ingestd_error *e, const char *path, const ingestdi_hello *hello, int writable, int deadline_ms,
                         ingestdi_accepted *a) {
    int64_t end = ingestdi_deadline(deadline_ms);
    int code;
    l->sock = -1;
    if (!path) return ingestdi_fail(e, INGESTD_MISUSE, "path is NULL: name the daemon's unix socket");
    if (deadline_ms < 0) return ingestdi_fail(e, INGESTD_MISUSE, "deadline_ms is negative: there is no waiting for ever; give milliseconds from now");
    if ((code = ingestdi_check_hello(e, hello)) || (code = ingestdi_connect(l, e, path, end)) || (code = ingestdi_handshake(l, e, hello, a, end))) return code;
    if (l->fd_count != ingestdi_fds_want)
        return ingestdi_bad_segment(l, e, "4 descriptors must come with the reply, and there are others", (uint64_t)l->fd_count);
    if (a->channel_bytes > INGESTDI_CHANNEL_MAX) return ingestdi_bad_segment(l, e, "its channel is too long", a->channel_bytes);
    if ((code = ingestdi_map_peer(l, e, l->fds[0], a->segment_bytes, writable, &l->segment)) || (code = ingestdi_open_segment(l, e, a)) ||
        (code = ingestdi_map_peer(l, e, l->fds[1], a->channel_bytes, 1, &l->channel)) || (code = ingestdi_open_channel(l, e, a)) ||
        (code = ingestdi_open_bell(l, e, l->fds[2])) || (code = ingestdi_open_bell(l, e, l->fds[3])))
        return code;
    close(l->fds[0]), close(l->fds[1]);
    l->fds[0] = l->fds[1] = -1;
    if (!(l->inbox = (unsigned char *)malloc(INGESTDI_INBOX))) return ingestdi_no_memory(l, e);
    return 0;
}

/* ---- Queues and waiting ---- */

static int ingestdi_pop(ingestdi_link *l, uint64_t d[2]) { /* of the deliver queue: 1, 0 where there is none, -1 where it is spoiled */
    ingestdi_queue *q = &l->deliver;
    uint64_t *slot;
    if (q->at == q->seen) {
        uint64_t produced = ingestdi_load_acquire(q->produced); /* edge(shared-produce): acquire - the descriptors below it are complete. */
        if (produced < q->seen || produced > q->at + q->capacity) {
            ingestdi_spoil(l, "deliver: a count of descriptors that cannot be", produced, q->at);
            return -1;
        }
        q->seen = produced;
        if (q->at == produced) return 0;
    }
    slot = q->slots + 2 * (q->at & (q->capacity - 1));
    d[0] = ingestdi_load_relaxed(slot); /* once: the other side may write it meanwhile */
    d[1] = ingestdi_load_relaxed(slot + 1);
    q->at++;
    ingestdi_store_release(q->consumed, q->at); /* edge(shared-consume): release - the descriptor was copied out before this store is seen. */
    return 1;
}

static int ingestdi_room(ingestdi_link *l, uint64_t want) { /* in the giveback queue: 1, 0, -1 where it is spoiled */
    ingestdi_queue *q = &l->giveback;
    if (q->capacity - (q->at - q->seen) < want) {
        uint64_t consumed = ingestdi_load_acquire(q->consumed); /* edge(shared-consume): acquire - slots below it are ours to overwrite. */
        if (consumed < q->seen || consumed > q->at) {
            ingestdi_spoil(l, "giveback: a count of descriptors taken that cannot be", consumed, q->at);
            return -1;
        }
        q->seen = consumed;
    }
    return q->capacity - (q->at - q->seen) >= want;
}

/* ingestdi_push pushes to the giveback queue, in which there is room, and wakes the daemon if it sleeps. */
static void ingestdi_push(ingestdi_link *l, uint64_t a, uint64_t b) {
    static const uint64_t one = 1;
    ingestdi_queue *q = &l->giveback;
    uint64_t *slot = q->slots + 2 * (q->at & (q->capacity - 1));
    ingestdi_store_relaxed(slot, a);
    ingestdi_store_relaxed(slot + 1, b);
    q->at++;
    /* edge(shared-produce): release - the descriptor and all we did before are complete before this store is seen. */
    ingestdi_store_release(q->produced, q->at);
    ingestdi_fence();
    if (ingestdi_load_acquire(q->waiting)) { /* edge(shared-wait): acquire - reading 0 here means that the daemon will see what we stored before. */
        if (write(l->fds[3], &one, sizeof one) < 0) { /* full: it is rung already */
        }
    }
}

static int ingestdi_closed(ingestdi_link *l) {
    return ingestdi_load_acquire(l->deliver.closed) != 0; /* edge(shared-close): acquire - after it, produced has its last value. */
}

/*
 * ingestdi_sleep waits until the daemon may have done something, at most to the deadline. closed is what the caller saw: a close that is
 * known wakes nobody. acks: what the daemon takes from the giveback queue counts too.
 */
static int ingestdi_sleep(ingestdi_link *l, int closed, int acks, int64_t end) {
    uint64_t count;
    int n = 1, failed = 0;
    ingestdi_store_relaxed(l->deliver.waiting, 1u);
    ingestdi_fence(); /* edge(shared-wait): release - what the daemon stored before reading 0 there is seen by this look. */
    if (ingestdi_load_acquire(l->deliver.produced) == l->deliver.seen && (closed || !ingestdi_closed(l)) &&
        (!acks || ingestdi_load_acquire(l->giveback.consumed) == l->giveback.seen)) {
        n = ingestdi_poll(l->fds[2], POLLIN, l->sock, end);
        failed = errno;
        if (n > 0 && read(l->fds[2], &count, sizeof count) < 0) { /* it was the socket that woke us */
        }
    }
    ingestdi_store_relaxed(l->deliver.waiting, 0u);
    errno = failed;
    return n < 0 ? ingestdi_fail(&l->error, INGESTD_SYSTEM, "wait for the daemon: poll") : 0;
}

/* ingestdi_heard takes whole messages out of the inbox. */
static void ingestdi_heard(ingestdi_link *l, int notes) {
    while (l->inbox_n && !l->gone) {
        unsigned mark = l->inbox[0];
        uint32_t length = l->inbox_n >= 5 ? ingestdi_u32(l->inbox + 1) : 2;
        ingestd_error *e = mark ? &l->note : &l->why;
        ingestdi_json j;
        if (mark != 0 && !(mark == 2 && notes)) {
            l->gone = ingestdi_bad_reply(l, &l->why, "it says something where only a notice may come", NULL);
            return;
        }
        if (length < 2 || length > INGESTDI_NOTICE_MAX) {
            l->gone = ingestdi_bad_reply(l, &l->why, "its notice is too long or too short", NULL);
            return;
        }
        if (l->inbox_n < 5 || l->inbox_n < 5 + (size_t)length) return;
        j.at = l->inbox + 5, j.end = j.at + length, j.wrong = NULL;
        ingestdi_clear(e, mark ? INGESTD_FULL : INGESTD_CUT_OFF);
        if (ingestdi_read_reason(&j, e, mark ? "the deadline passed while the ring is full: " : "the daemon ended this attachment: ")) {
            l->gone = ingestdi_bad_reply(l, &l->why, "its notice: ", j.wrong);
        } else if (mark) {
            l->noted = 1;
        } else {
            l->gone = strcmp(e->daemon_code, "shutting_down") ? INGESTD_CUT_OFF : INGESTD_SHUTTING_DOWN;
            e->code = l->gone;
        }
        l->inbox_n -= 5 + (size_t)length;
        memmove(l->inbox, l->inbox + 5 + length, l->inbox_n);
    }
}

/* ingestdi_listen reads what the socket has: notes, a notice, the daemon's end. It never waits. */
static void ingestdi_listen(ingestdi_link *l, int notes) {
    int rounds; /* so that a daemon that talks without end cannot keep us */
    for (rounds = 0; rounds < 64 && !l->gone; rounds++) {
        ssize_t n = recv(l->sock, l->inbox + l->inbox_n, INGESTDI_INBOX - l->inbox_n, MSG_DONTWAIT);
        if (n > 0) {
            l->inbox_n += (size_t)n;
            ingestdi_heard(l, notes);
        } else if (n < 0 && errno == EINTR) {
            continue;
        } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            return;
        } else {
            l->gone = ingestdi_fail(&l->why, INGESTD_PEER_CLOSED,
                                    "the daemon at %s is gone without having ended the stream%s: start it again and attach anew; its log may say why", l->path,
                                    l->inbox_n ? " (its notice was cut short)" : "");
        }
    }
}

/*
 * ingestdi_stale ends the attachment where the segment does not agree with a descriptor. The daemon that pushed it may be dead, and its successor
 * have given the place to others: its socket tells that in a moment.
 */
static int ingestdi_stale(ingestdi_link *l, int notes, const char *what, uint64_t a, uint64_t b) {
    int64_t end = ingestdi_deadline(INGESTDI_STALE_MS);
    do ingestdi_listen(l, notes);
    while (!l->gone && ingestdi_left_ms(end) > 0 && ingestdi_poll(l->sock, POLLIN, -1, end) > 0);
    return l->gone ? ingestdi_report(l) : ingestdi_spoil(l, what, a, b);
}

/* ---- Trainer ---- */

struct ingestd_trainer {
    ingestdi_link link;
    uint32_t holding;
};

ingestd_trainer *ingestd_attach(const char *path, const ingestd_trainer_options *options, int deadline_ms, ingestd_error *err) {
    ingestdi_hello hello;
    ingestdi_accepted accepted;
    ingestd_trainer *t = (ingestd_trainer *)calloc(1, sizeof *t);
    ingestd_error *e = t ? &t->link.error : err;
    int code;
    if (!t) {
        if (err) ingestdi_fail(err, INGESTD_SYSTEM, "no memory for a trainer");
        return NULL;
    }
    memset(&hello, 0, sizeof hello);
    hello.role = "train";
    if (options) {
        hello.table = options->table, hello.group = options->group, hello.prefetch = options->prefetch, hello.client = options->client;
        hello.spec = options->spec, hello.fingerprint = options->fingerprint;
    }
    code = ingestdi_open(&t->link, e, path, &hello, 0, deadline_ms, &accepted);
    if (err) {
        if (code) *err = *e;
        else ingestdi_clear(err, INGESTD_OK);
    }
    if (code) {
        ingestdi_free_link(&t->link);
        free(t);
        return NULL;
    }
    return t;
}

void ingestd_detach(ingestd_trainer *t) {
    if (!t) return;
    ingestdi_store_release(t->link.giveback.closed, 1u); /* edge(shared-close): release - produced has its last value before this store is seen. */
    ingestdi_free_link(&t->link);
    free(t);
}

const ingestd_table *ingestd_trainer_table(const ingestd_trainer *t) { return t ? &t->link.table : NULL; }
const ingestd_error *ingestd_trainer_error(const ingestd_trainer *t) { return t ? &t->link.error : NULL; }

static uint64_t *ingestdi_line_of(ingestdi_link *l, uint32_t index) { return (uint64_t *)(void *)(l->segment.at + l->states + 64 * (uint64_t)index); }

/* ingestdi_delivered checks one descriptor of the deliver queue against the segment. */
static int ingestdi_delivered(ingestd_trainer *t, const uint64_t d[2], ingestd_batch *batch) {
    ingestdi_link *l = &t->link;
    uint32_t index = (uint32_t)d[1], count = (uint32_t)(d[1] >> 32);
    uint64_t *line, state;
    if (!count) {
        if (!index) return ingestdi_spoil(l, "deliver: a descriptor of no batch", d[0], d[1]);
        ingestdi_fail(&l->error, INGESTD_LOST,
                      "the group was too slow and lost %lu batches, from number %llu on: read faster, or let the group hold producers back",
                      (unsigned long)index, (unsigned long long)d[0]);
        l->error.lost_first = d[0], l->error.lost_count = index;
        return INGESTD_LOST;
    }
    if (index >= l->table.batches || count > l->table.batch_size) return ingestdi_spoil(l, "deliver: a batch that cannot be", d[0], d[1]);
    line = ingestdi_line_of(l, index);
    state = ingestdi_load_acquire(line); /* edge(publish): acquire - after this load, the batch's rows and count are ours to read. */
    if ((state & 7) != 4 || state >> 3 != d[0]) return ingestdi_stale(l, 0, "deliver: a batch that is not leased in its place", d[0], state);
    if (ingestdi_load_relaxed(line + 2) != count)
        return ingestdi_stale(l, 0, "deliver: a batch of another number of rows than the segment says", d[0], d[1]);
    if (l->held[index]) return ingestdi_spoil(l, "deliver: a batch in a place where one is held", d[0], d[1]);
    l->held[index] = d[0] + 1;
    t->holding++;
    batch->trainer = t, batch->number = d[0], batch->index = index, batch->count = count;
    return 0;
}

static int ingestdi_try_next(ingestd_trainer *t, ingestd_batch *batch) {
    ingestdi_link *l = &t->link;
    uint64_t d[2];
    int n, closed;
    ingestdi_listen(l, 0); /* first: what lies in the queue when the daemon has given us up is no longer ours */
    closed = ingestdi_closed(l);
    if (l->gone && !closed) return ingestdi_report(l);
    n = ingestdi_pop(l, d);
    if (n < 0) return l->gone;
    if (n == 0 && closed) return ingestdi_fail(&l->error, INGESTD_END, "the stream has ended: all batches were delivered");
    if (l->gone) return ingestdi_report(l);
    return n ? ingestdi_delivered(t, d, batch) : (int)ingestdi_nothing;
}

int ingestd_next(ingestd_trainer *t, int deadline_ms, ingestd_batch *batch) {
    int64_t end;
    int code;
    if (batch) memset(batch, 0, sizeof *batch);
    if (!t) return INGESTD_MISUSE;
    if (!batch) return ingestdi_misuse(&t->link, "ingestd_next: batch is NULL");
    if (deadline_ms < 0) return ingestdi_misuse(&t->link, "ingestd_next: deadline_ms is negative: there is no waiting for ever; give milliseconds from now");
    end = ingestdi_deadline(deadline_ms);
    while ((code = ingestdi_try_next(t, batch)) == ingestdi_nothing) {
        if (ingestdi_left_ms(end) == 0) {
            if (t->holding >= t->link.table.prefetch)
                return ingestdi_fail(&t->link.error, INGESTD_TIMEOUT, "no batch in %d ms: all %lu that this trainer may hold are held; release one",
                                     deadline_ms, (unsigned long)t->holding);
            return ingestdi_fail(&t->link.error, INGESTD_TIMEOUT, "no batch in %d ms: none was published for this group; call again", deadline_ms);
        }
        if ((code = ingestdi_sleep(&t->link, 0, 0, end))) return code;
    }
    return code;
}

/* ingestdi_held_batch returns the link of a batch that is held, or NULL with MISUSE. */
static ingestdi_link *ingestdi_held_batch(const ingestd_batch *b) {
    ingestdi_link *l;
    if (!b || !b->trainer) return NULL;
    l = &b->trainer->link;
    if (b->index >= l->table.batches || l->held[b->index] != b->number + 1) {
        ingestdi_misuse(l, "a batch is used that is not held: it was released before");
        return NULL;
    }
    return l;
}

static const unsigned char *ingestdi_place(const ingestdi_link *l, uint32_t index) { return l->segment.at + l->data + l->stride * index; }

const void *ingestd_column(const ingestd_batch *b, int leaf, size_t *bytes) {
    ingestdi_link *l = ingestdi_held_batch(b);
    if (bytes) *bytes = 0;
    if (!l) return NULL;
    if (leaf < 0 || (uint32_t)leaf >= l->table.leaf_count) {
        ingestdi_misuse(l, "ingestd_column: there is no such leaf");
        return NULL;
    }
    if (bytes) *bytes = (size_t)(b->count * l->leaves[leaf].bytes);
    return ingestdi_place(l, b->index) + l->columns[leaf];
}

const void *ingestd_column_named(const ingestd_batch *b, const char *name, size_t *bytes) {
    ingestdi_link *l = ingestdi_held_batch(b);
    return ingestd_column(b, l ? ingestd_find_leaf(&l->table, name) : -1, bytes);
}

const uint64_t *ingestd_streams(const ingestd_batch *b) {
    ingestdi_link *l = ingestdi_held_batch(b);
    return l ? (const uint64_t *)(const void *)(ingestdi_place(l, b->index) + l->stream_column) : NULL;
}

const uint64_t *ingestd_numbers(const ingestd_batch *b) {
    ingestdi_link *l = ingestdi_held_batch(b);
    return l ? (const uint64_t *)(const void *)(ingestdi_place(l, b->index) + l->number_column) : NULL;
}

const uint64_t *ingestd_arrivals(const ingestd_batch *b) {
    ingestdi_link *l = ingestdi_held_batch(b);
    return l ? (const uint64_t *)(const void *)(ingestdi_place(l, b->index) + l->arrival_column) : NULL;
}

int ingestd_intact(const ingestd_batch *b) {
    ingestdi_link *l = ingestdi_held_batch(b);
    if (!l) return 0;
    ingestdi_fence(); /* the reads before do not slip behind the load */
    return ingestdi_load_relaxed(ingestdi_line_of(l, b->index)) == (b->number << 3 | 4);
}

int ingestd_release(ingestd_batch *b) {
    ingestdi_link *l = ingestdi_held_batch(b);
    ingestd_batch was;
    int room;
    if (!l) return INGESTD_MISUSE;
    was = *b;
    memset(b, 0, sizeof *b);
    ingestdi_listen(l, 0);
    l->held[was.index] = 0;
    was.trainer->holding--;
    if (l->gone) return ingestdi_report(l);
    if ((room = ingestdi_room(l, 1)) < 0) return l->gone;
    if (!room) return ingestdi_spoil(l, "giveback: full, though it has a place for every batch that can be held", l->giveback.at, l->giveback.seen);
    ingestdi_push(l, was.number, was.index);
    return 0;
}

/* ---- Producer ---- */

typedef struct ingestdi_lent {
    uint64_t lease;
    uint32_t index;
} ingestdi_lent;

struct ingestd_producer {
    ingestdi_link link;
    uint64_t stream;
    uint64_t held;      /* samples in the ring, as far as is known */
    uint64_t committed; /* samples handed over; held <= committed */
    uint64_t acked;     /* descriptors of the giveback queue that are counted in held */
    uint32_t *rows;     /* per descriptor of the giveback queue, the rows that it stands for */

    ingestdi_lent *lent; /* places we have, a ring of table.prefetch; the one at first is being filled */
    uint32_t first, places;
    uint64_t lease;      /* of the last place that was lent */
    uint32_t row;        /* rows committed in the place being filled */
    uint32_t settled;    /* rows of it that the daemon was asked to settle */
    uint32_t reserved;   /* rows of the reservation that is open, 0: none is */
};

static int ingestdi_open_producer(ingestd_producer *p, ingestd_error *e, const ingestdi_accepted *a, int session) {
    ingestdi_link *l = &p->link;
    p->stream = a->stream, p->held = p->committed = a->held;
    p->rows = (uint32_t *)calloc(l->giveback.capacity, sizeof *p->rows);
    p->lent = (ingestdi_lent *)calloc(a->prefetch, sizeof *p->lent);
    if (!p->rows || !p->lent) return ingestdi_no_memory(l, e);
    if (session) ingestdi_push(l, 0, (uint64_t)3 << 32); /* we start at held and read nothing of an earlier connection's places */
    return 0;
}

static void ingestdi_free_producer(ingestd_producer *p) {
    ingestdi_free_link(&p->link);
    free(p->rows);
    free(p->lent);
    free(p);
}

ingestd_producer *ingestd_produce(const char *path, const ingestd_producer_options *options, int deadline_ms, ingestd_error *err) {
    ingestdi_hello hello;
    ingestdi_accepted accepted;
    ingestd_producer *p = (ingestd_producer *)calloc(1, sizeof *p);
    ingestd_error *e = p ? &p->link.error : err;
    int code;
    if (!p) {
        if (err) ingestdi_fail(err, INGESTD_SYSTEM, "no memory for a producer");
        return NULL;
    }
    memset(&hello, 0, sizeof hello);
    hello.role = "fill";
    hello.notes = 1;
    if (options) {
        hello.table = options->table, hello.session = options->session, hello.prefetch = options->prefetch, hello.client = options->client;
        hello.spec = options->spec, hello.fingerprint = options->fingerprint;
    }
    code = ingestdi_open(&p->link, e, path, &hello, 1, deadline_ms, &accepted);
    if (!code) code = ingestdi_open_producer(p, e, &accepted, hello.session != NULL);
    if (err) {
        if (code) *err = *e;
        else ingestdi_clear(err, INGESTD_OK);
    }
    if (code) {
        ingestdi_free_producer(p);
        return NULL;
    }
    return p;
}

void ingestd_close(ingestd_producer *p) {
    if (!p) return;
    ingestdi_store_release(p->link.giveback.closed, 1u); /* edge(shared-close): release - produced has its last value before this store is seen. */
    ingestdi_free_producer(p);
}

const ingestd_table *ingestd_producer_table(const ingestd_producer *p) { return p ? &p->link.table : NULL; }
const ingestd_error *ingestd_producer_error(const ingestd_producer *p) { return p ? &p->link.error : NULL; }
uint64_t ingestd_stream(const ingestd_producer *p) { return p ? p->stream : 0; }

/* ingestdi_count_acks counts what the daemon has taken; -1 where the queue is spoiled. */
static int ingestdi_count_acks(ingestd_producer *p) {
    ingestdi_queue *q = &p->link.giveback;
    uint64_t before = p->acked;
    if (ingestdi_room(&p->link, q->capacity + 1) < 0) return -1; /* more than there can be: it looks */
    for (; p->acked < q->seen; p->acked++) p->held += p->rows[p->acked & (q->capacity - 1)];
    if (p->acked != before) p->link.noted = 0; /* an ack ends a note */
    return 0;
}

uint64_t ingestd_held(ingestd_producer *p) {
    if (!p) return 0;
    if (!p->link.gone || p->link.gone != INGESTD_BAD_SEGMENT) ingestdi_count_acks(p);
    return p->held;
}

/* ingestdi_lend takes over a place that the deliver queue names, after checking it against the segment. */
static int ingestdi_lend(ingestd_producer *p, const uint64_t d[2]) {
    ingestdi_link *l = &p->link;
    ingestdi_lent *place;
    uint64_t *line;
    if (d[0] != p->lease + 1) return ingestdi_spoil(l, "deliver: a lease out of turn", d[0], p->lease);
    if (d[1] >= l->table.batches || l->held[d[1]]) return ingestdi_spoil(l, "deliver: a place that cannot be, or is lent already", d[0], d[1]);
    if (p->places == l->table.prefetch) return ingestdi_spoil(l, "deliver: more places than were granted", d[0], d[1]);
    line = ingestdi_line_of(l, (uint32_t)d[1]);
    /* edge(lend): acquire - after this load, the place is clean and its rows are ours to write. */
    if (ingestdi_load_acquire(line) != 5 || ingestdi_load_relaxed(line + 5) != p->stream)
        return ingestdi_stale(l, 1, "deliver: a place that is not lent to this stream", d[0], d[1]);
    p->lease = d[0];
    l->held[d[1]] = d[0];
    place = &p->lent[(p->first + p->places++) % l->table.prefetch];
    place->lease = d[0], place->index = (uint32_t)d[1];
    l->noted = 0;
    return 0;
}

/* ingestdi_look takes in all that the daemon has said and done. */
static int ingestdi_look(ingestd_producer *p, int *closed) {
    ingestdi_link *l = &p->link;
    uint64_t d[2];
    int n;
    ingestdi_listen(l, 1); /* before the queues: a note that an ack or a place has ended was said before them */
    *closed = ingestdi_closed(l);
    if (l->gone == INGESTD_BAD_SEGMENT || ingestdi_count_acks(p) < 0) return ingestdi_report(l);
    while (!l->gone && (n = ingestdi_pop(l, d)) != 0)
        if (n < 0 || ingestdi_lend(p, d)) return ingestdi_report(l);
    return 0;
}

static int ingestdi_late(ingestd_producer *p, const char *call, int deadline_ms) {
    ingestdi_link *l = &p->link;
    if (l->noted) {
        l->error = l->note;
        return INGESTD_FULL;
    }
    return ingestdi_fail(&l->error, INGESTD_TIMEOUT,
                         "%s: nothing from the daemon in %d ms: call again; if it stays so, `ingestd status` says what it waits for", call, deadline_ms);
}

/* ingestdi_await waits until ready says so. It looks at least once. alive: what is waited for needs a daemon that goes on. */
static int ingestdi_await(ingestd_producer *p, int (*ready)(ingestd_producer *), int alive, const char *call, int deadline_ms) {
    ingestdi_link *l = &p->link;
    int64_t end;
    int code, closed;
    if (deadline_ms < 0)
        return ingestdi_fail(&l->error, INGESTD_MISUSE, "%s: deadline_ms is negative: there is no waiting for ever; give milliseconds from now", call);
    for (end = ingestdi_deadline(deadline_ms);;) {
        if ((code = ingestdi_look(p, &closed))) return code;
        if ((!l->gone || !alive) && ready(p)) return 0;
        if (l->gone) return ingestdi_report(l);
        if (closed && alive && !p->places) return ingestdi_fail(&l->error, INGESTD_END, "%s: the table takes no more samples", call);
        if (ingestdi_left_ms(end) == 0) return ingestdi_late(p, call, deadline_ms);
        if ((code = ingestdi_sleep(l, closed, 1, end))) return code;
    }
}

/* Room is what was counted, not what the daemon has taken since: rows[] of a descriptor must be counted before it is used again. */
static uint64_t ingestdi_counted_room(const ingestd_producer *p) { return p->link.giveback.capacity - (p->link.giveback.at - p->acked); }

static int ingestdi_can_fill(ingestd_producer *p) { return p->places && ingestdi_counted_room(p) >= 1; }
static int ingestdi_can_settle(ingestd_producer *p) { return ingestdi_counted_room(p) >= (p->reserved ? 2u : 1u); }
static int ingestdi_all_taken(ingestd_producer *p) { return p->acked == p->link.giveback.at; }

int ingestd_reserve(ingestd_producer *p, uint32_t n, int deadline_ms, ingestd_slots *slots) {
    uint32_t left;
    int code;
    if (p && p->reserved) return ingestdi_misuse(&p->link, "ingestd_reserve: a reservation is open: commit or abandon it first");
    if (slots) memset(slots, 0, sizeof *slots);
    if (!p) return INGESTD_MISUSE;
    if (!slots || !n) return ingestdi_misuse(&p->link, "ingestd_reserve: slots is NULL, or n is 0");
    if ((code = ingestdi_await(p, ingestdi_can_fill, 1, "ingestd_reserve", deadline_ms))) return code;
    left = p->link.table.batch_size - p->row;
    p->reserved = n < left ? n : left;
    slots->producer = p, slots->number = p->committed, slots->n = p->reserved, slots->row = p->row, slots->index = p->lent[p->first].index;
    return 0;
}

/* ingestdi_open_slots returns the producer of slots that are reserved, or NULL with MISUSE. */
static ingestd_producer *ingestdi_open_slots(const ingestd_slots *s) {
    ingestd_producer *p = s ? s->producer : NULL;
    if (!p) return NULL;
    if (!p->reserved || s->number != p->committed || s->row != p->row || s->n != p->reserved || s->index != p->lent[p->first].index) {
        ingestdi_misuse(&p->link, "slots are used that are not reserved: they were committed or abandoned before, or changed");
        return NULL;
    }
    return p;
}

void *ingestd_slot_column(const ingestd_slots *s, int leaf) {
    ingestd_producer *p = ingestdi_open_slots(s);
    if (!p) return NULL;
    if (leaf < 0 || (uint32_t)leaf >= p->link.table.leaf_count) {
        ingestdi_misuse(&p->link, "ingestd_slot_column: there is no such leaf");
        return NULL;
    }
    return p->link.segment.at + p->link.data + p->link.stride * s->index + p->link.columns[leaf] + s->row * p->link.leaves[leaf].bytes;
}

static void ingestdi_say_rows(ingestd_producer *p, uint64_t what, uint32_t rows) { /* about the place being filled */
    ingestdi_queue *q = &p->link.giveback;
    p->rows[q->at & (q->capacity - 1)] = rows;
    ingestdi_push(&p->link, p->lent[p->first].lease, what << 32 | rows);
}

int ingestd_commit(ingestd_slots *s, uint32_t n) {
    ingestd_producer *p = ingestdi_open_slots(s);
    if (!p) return INGESTD_MISUSE;
    if (n < 1 || n > s->n) return ingestdi_misuse(&p->link, "ingestd_commit: n must be from 1 to slots->n; to drop the reservation, abandon it");
    ingestdi_say_rows(p, 1, n); /* reserve has seen to room */
    memset(s, 0, sizeof *s);
    p->reserved = 0;
    p->committed += n;
    p->row += n;
    if (p->row == p->link.table.batch_size) { /* published as it is: no longer ours */
        p->link.held[p->lent[p->first].index] = 0;
        p->first = (p->first + 1) % p->link.table.prefetch;
        p->places--;
        p->row = p->settled = 0;
    }
    return 0;
}

int ingestd_abandon(ingestd_slots *s) {
    ingestd_producer *p = ingestdi_open_slots(s);
    if (!p) return INGESTD_MISUSE;
    memset(s, 0, sizeof *s);
    p->reserved = 0;
    return 0;
}

int ingestd_push(ingestd_producer *p, const void *const *leaves, int deadline_ms) {
    ingestd_slots s;
    uint32_t i;
    int code;
    if (!p) return INGESTD_MISUSE;
    if (!leaves) return ingestdi_misuse(&p->link, "ingestd_push: leaves is NULL");
    for (i = 0; i < p->link.table.leaf_count; i++)
        if (!leaves[i]) return ingestdi_misuse(&p->link, "ingestd_push: a leaf is NULL: give the bytes of every leaf");
    if ((code = ingestd_reserve(p, 1, deadline_ms, &s))) return code;
    for (i = 0; i < p->link.table.leaf_count; i++) memcpy(ingestd_slot_column(&s, (int)i), leaves[i], (size_t)p->link.leaves[i].bytes);
    return ingestd_commit(&s, 1);
}

int ingestd_settle(ingestd_producer *p, int deadline_ms) {
    int code;
    if (!p) return INGESTD_MISUSE;
    if ((code = ingestdi_await(p, ingestdi_can_settle, 1, "ingestd_settle", deadline_ms))) return code;
    if (!p->row || p->settled == p->row) return 0; /* nothing waits */
    ingestdi_say_rows(p, 2, 0);
    p->settled = p->row;
    return 0;
}

int ingestd_flush(ingestd_producer *p, int deadline_ms) {
    if (!p) return INGESTD_MISUSE;
    return ingestdi_await(p, ingestdi_all_taken, 0, "ingestd_flush", deadline_ms);
}

#ifdef __cplusplus
}
#endif

#endif /* INGESTD_IMPLEMENTATION */
