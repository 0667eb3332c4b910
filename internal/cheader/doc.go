// Package cheader proves include/ingestd.h, the header for C and C++. It is tests only; nobody imports it.
//
// testdata/probe.c is a program over the header that does what the lines on its standard input say. It is compiled as C11 and as C++17, with every warning an
// error and, where the compiler has them, with the address and undefined-behaviour sanitizers; each test runs with both programs. A probe that is still alive
// at the end of a test must end with 0, so that what the sanitizers find, leaks included, fails the test.
//
//	build_test.go      what compiles, and how; the examples
//	probe_test.go      the program, its lines and its end
//	daemon_test.go     trainers against a daemon in this process, over samples that prove themselves; refusals; misuse
//	producer_test.go   a producer against a table whose places a small fake daemon lends
//	fake_test.go       a fake daemon, honest until told otherwise
//	endings_test.go    notices, deaths, deadlines, lost batches
//	damage_test.go     replies, segments, channels, descriptors: each byte and each field wrong
//	json_test.go       the header's JSON reader beside encoding/json
//
// Without a C compiler the tests are skipped and say so.
package cheader
