// Package metrics turns the plain Stats structs of the other packages into Prometheus metrics, at scrape time and nowhere else: the paths of samples
// and batches know nothing of Prometheus. docs/operations.md lists every metric, and a test compares the list.
//
// Labels come from fixed sets: the tables of the configuration, the transports, wire's codes, the states of a batch. No peer can make a new time series.
//
// A Collector holds functions that return snapshots; it owns nothing and starts nothing. Collect may be called from any goroutine, as Prometheus does.
//
// Cost: per scrape a snapshot of everything; nothing in between. Proof: metrics_test.go.
package metrics
