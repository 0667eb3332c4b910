// Package failpoint names the places in the code at which the kill tests end or stop a process.
//
// Without the build tag `failpoints`, Hit is an empty function that the compiler inlines to nothing: TestNothingIsLeft proves it on the machine code of
// the real binary. With the tag (Linux), the environment variable INGESTD_FAILPOINT="NAME:COUNT" makes the process send itself SIGKILL at the COUNT-th hit
// of NAME, counted from 1; "NAME:COUNT:stop" sends SIGSTOP instead. Either takes effect before the instruction after Hit. A value that is not of this form, or
// a name that is not in Names, ends the process with code 2 before main.
//
// Names is the whole list; TestNamesAndSites compares it with the calls in the source, both ways. It owns no memory and starts no goroutine; Hit may be called
// from anywhere, with locks held. Cost with the tag: a comparison of strings per hit, and one atomic add per hit of the armed name.
package failpoint
