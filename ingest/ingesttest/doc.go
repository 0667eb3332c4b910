// Package ingesttest is the suite that every transport must pass: samples of every shape arrive whole and in order, every ack is earned, every bad peer gets
// a reason and harms nobody, backpressure holds, and a shutdown keeps what was acked. A transport's test gives Run a function that starts it.
//
// Samples prove themselves: each byte follows from the client and the sample's number, which the first leaf carries.
package ingesttest
