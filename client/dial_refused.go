package client

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/wire"
)

// TLSRefusedError says that the daemon ended the handshake of TLS, at a tls:// or quic:// address, because of what this client is or offers. It is final: the daemon would say it again, and
// ban the address of who asks again and again.
type TLSRefusedError struct {
	Alert tls.AlertError // what it said: RFC 8446, section 6.2
	err   error
}

func (e *TLSRefusedError) Error() string {
	return fmt.Sprintf("the daemon refused the TLS handshake (%v): %s", e.Alert, alertAdvice[e.Alert])
}

func (e *TLSRefusedError) Unwrap() error { return e.err }

// alertAdvice has the alerts that are a daemon's judgement of its client, and what to do. Others, as those of damaged records, may be over the next time.
var alertAdvice = map[tls.AlertError]string{
	40:  "it does not agree to any way to encrypt that this client offers",
	42:  "it does not take this client's certificate (TLS.Certificate): was it made for clients?",
	43:  "it does not take certificates of this kind (TLS.Certificate)",
	44:  "this client's certificate was revoked: get another (TLS.Certificate)",
	45:  "this client's certificate has expired, by the daemon's clock: get another (TLS.Certificate)",
	46:  "it does not take this client's certificate (TLS.Certificate)",
	48:  "this client's certificate comes from an authority that the daemon does not know (TLS.Certificate)",
	49:  "it does not let this client's certificate in (TLS.Certificate)",
	70:  "it does not speak TLS 1.3",
	71:  "it wants other ways to encrypt than this client offers",
	112: "it does not know the name that it was asked for (TLS.ServerName)",
	116: "it wants a certificate of its clients: name one (TLS.Certificate, TLS.Key)",
	120: "it does not speak " + wire.ALPN + " there; is this its address?",
}

// refusedTLS returns what the daemon said against this client in the handshake of TLS, nil where err is something else.
func refusedTLS(err error) *TLSRefusedError {
	if known := (*TLSRefusedError)(nil); errors.As(err, &known) {
		return known
	}
	alert, ok := remoteAlert(err)
	if _, final := alertAdvice[alert]; !ok || !final {
		return nil
	}
	return &TLSRefusedError{alert, err}
}

// remoteAlert returns the alert with which the other side ended TLS. Over TCP package tls gives it a type of its own, whose words are those of tls.AlertError.
func remoteAlert(err error) (tls.AlertError, bool) {
	if failed := (*quic.TransportError)(nil); errors.As(err, &failed) {
		return tls.AlertError(failed.ErrorCode & 0xff), failed.Remote && failed.ErrorCode.IsCryptoError()
	}
	op := (*net.OpError)(nil)
	if !errors.As(err, &op) || op.Op != "remote error" {
		return 0, false
	}
	for alert := range 256 {
		if a := tls.AlertError(alert); op.Err.Error() == a.Error() {
			return a, true
		}
	}
	return 0, false
}

// unbelieved says whether this client does not believe the daemon's certificate.
func unbelieved(err error) bool {
	var bad *tls.CertificateVerificationError
	return errors.As(err, &bad)
}

// dialAdvice says what to do about a dial that failed. A daemon that was reached and not believed is there.
func dialAdvice(err error) string {
	var expired x509.CertificateInvalidError
	switch {
	case refusedTLS(err) != nil:
		return "it is of no use to try again before that has changed"
	case errors.As(err, &expired) && expired.Reason == x509.Expired:
		return "the daemon needs another certificate, unless the clock of this machine is wrong"
	case unbelieved(err):
		return "say which authority signs the daemon's certificate (TLS.Authorities), or the name in it (TLS.ServerName)"
	}
	return "is the daemon running, and is this its address?"
}
