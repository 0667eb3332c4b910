// Package auth decides who may do what: the daemon's tokens, what each may, and the daemon's side of the exchange that proves them (docs/wire-protocol.md,
// "Authentication").
//
// The messages, the arithmetic and the client's side are in wire; who failed too often is in bans; sockets, deadlines and counting connections are left to the
// transports. A transport calls Gate.Admit once per connection, between reading the hello and looking at what it asks for.
//
// Ownership: an Identity does not change and may be kept. Nothing that Admit is given is kept.
//
// Goroutines: all may be called from any. Tokens.Run is the one loop, and looks at the file once a second. A file that changes concerns handshakes from then on; who
// was let in stays in.
//
// Secrets: nothing here prints one, in errors neither; what is wrong with a file of tokens is said with line numbers and names of tokens. Proofs are compared in constant time,
// and a name that is not known costs the same work, and gives the same bytes, as one that is: its secrets are decoys that nobody has.
//
// Errors: Load returns *PermissionError and *FormatError; Admit the *wire.Refusal to send. Nothing panics on input.
//
// Cost: per handshake one SHA-256 over the hello, one HMAC over the name and four over 40 bytes (BenchmarkAdmit), and one round trip.
//
// Proof: attack_test.go (replay, reflection, stripped token, changed options, each bit of a proof, other tables and rights, floods), tokens_test.go (both sides of every limit of
// the file, rotation, changes under way, nothing that prints shows a secret), gate_test.go, and fuzz/authentication_test.go.
package auth
