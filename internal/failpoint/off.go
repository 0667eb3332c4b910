//go:build !failpoints || !linux

package failpoint

// Armed is the name that INGESTD_FAILPOINT gave: here always empty.
func Armed() string { return "" }

// Hit does nothing in this build.
func Hit(string) {}
