package devcert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"strings"
	"time"
)

// backdated is how far before now a certificate begins, for clocks that differ.
const backdated = time.Hour

// Pair is a certificate and its key.
type Pair struct {
	Certificate []byte // DER
	key         *ecdsa.PrivateKey
	parsed      *x509.Certificate
}

// Authority signs certificates.
type Authority struct{ Pair }

// NewAuthority makes an authority of its own, which may sign end certificates and nothing that signs in turn.
func NewAuthority(name string, valid time.Duration) (*Authority, error) {
	t, err := template(name, valid)
	if err != nil {
		return nil, err
	}
	t.IsCA, t.MaxPathLenZero = true, true
	t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	pair, err := sign(t, nil)
	if err != nil {
		return nil, err
	}
	return &Authority{*pair}, nil
}

// NewServer makes a certificate for a daemon that is reached under the hosts: names, which may begin with "*.", and addresses.
func (a *Authority) NewServer(hosts []string, valid time.Duration) (*Pair, error) {
	if len(hosts) == 0 {
		return nil, errors.New("devcert: a server's certificate needs the names or addresses under which it is reached")
	}
	t, err := template(hosts[0], valid)
	if err != nil {
		return nil, err
	}
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
			continue
		}
		if err := checkName(host); err != nil {
			return nil, err
		}
		t.DNSNames = append(t.DNSNames, host)
	}
	return sign(t, a)
}

// NewClient makes a certificate for a client of that name.
func (a *Authority) NewClient(name string, valid time.Duration) (*Pair, error) {
	t, err := template(name, valid)
	if err != nil {
		return nil, err
	}
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return sign(t, a)
}

// checkName refuses what no resolver would take.
func checkName(host string) error {
	rest := strings.TrimPrefix(host, "*.")
	legal := func(c rune) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_'
	}
	if rest == "" || len(host) > 253 || strings.ContainsFunc(rest, func(c rune) bool { return !legal(c) }) || strings.Contains(rest, "..") || strings.HasPrefix(rest, ".") {
		return fmt.Errorf("devcert: %q is neither a host's name nor an address; give it without port and scheme", host)
	}
	return nil
}

func template(name string, valid time.Duration) (*x509.Certificate, error) {
	if valid <= 0 {
		return nil, fmt.Errorf("devcert: a certificate that is valid for %v", valid)
	}
	if name == "" || len(name) > 253 {
		return nil, fmt.Errorf("devcert: the name has %d bytes, it may have 1 to 253", len(name))
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, err
	}
	if len(name) > 64 { // the most that a common name may have; the names that count are elsewhere
		name = name[:64]
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)), Subject: pkix.Name{CommonName: name, Organization: []string{"ingestd development"}},
		NotBefore: now.Add(-backdated), NotAfter: now.Add(valid), BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
	}, nil
}

// sign signs with the authority, or with the new key itself where by is nil. Nothing is valid for longer than its authority.
func sign(t *x509.Certificate, by *Authority) (*Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256(public)
	t.SubjectKeyId = id[:20]
	parent, signer := t, crypto.Signer(key)
	if by != nil {
		parent, signer = by.parsed, by.key
		if time.Now().After(parent.NotAfter) {
			return nil, fmt.Errorf("devcert: the authority was valid until %s; make a new one", parent.NotAfter.Format(time.DateOnly))
		}
		if t.NotAfter.After(parent.NotAfter) {
			t.NotAfter = parent.NotAfter
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("devcert: %w", err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &Pair{der, key, parsed}, nil
}

// Parsed returns the certificate.
func (p *Pair) Parsed() *x509.Certificate { return p.parsed }

// Pool returns a pool with this certificate alone.
func (p *Pair) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(p.parsed)
	return pool
}

// TLS returns the pair for a tls.Config.
func (p *Pair) TLS() tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{p.Certificate}, PrivateKey: p.key, Leaf: p.parsed}
}

// CertificatePEM returns the certificate for a file.
func (p *Pair) CertificatePEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.Certificate})
}

// KeyPEM returns the key for a file that nobody else may read.
func (p *Pair) KeyPEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// ParseAuthority reads what CertificatePEM and KeyPEM of an authority gave.
func ParseAuthority(certificate, key []byte) (*Authority, error) {
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("devcert: %w", err)
	}
	private, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("devcert: the key is not of ECDSA")
	}
	if !pair.Leaf.IsCA {
		return nil, errors.New("devcert: the certificate is not an authority's")
	}
	return &Authority{Pair{pair.Certificate[0], private, pair.Leaf}}, nil
}

func (p *Pair) String() string { return "certificate of " + p.parsed.Subject.CommonName }
