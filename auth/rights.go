package auth

import (
	"fmt"
	"strings"

	"github.com/ingestd/ingestd/wire"
)

// Rights are what a token may do.
type Rights uint8

// The rights.
const (
	Push    Rights = 1 << iota // roles push and fill
	Read                       // roles train, observe, subscribe and manifest
	Publish                    // role publish
	Admin                      // the admin endpoint
)

// All are all of them.
const All = Push | Read | Publish | Admin

var rightNames = []struct {
	right Rights
	name  string
}{{Push, "push"}, {Read, "read"}, {Publish, "publish"}, {Admin, "admin"}}

// ParseRight reads the name of one right. Its error does not show what it was given, which may be a secret in the wrong place.
func ParseRight(name string) (Rights, error) {
	for _, r := range rightNames {
		if r.name == name {
			return r.right, nil
		}
	}
	return 0, fmt.Errorf("a right is one of push, read, publish, admin")
}

// Names lists the names of the rights.
func (r Rights) Names() []string {
	var names []string
	for _, n := range rightNames {
		if r&n.right != 0 {
			names = append(names, n.name)
		}
	}
	return names
}

func (r Rights) String() string {
	if r == 0 {
		return "no right"
	}
	return strings.Join(r.Names(), ", ")
}

// RightFor returns the right that a role needs; 0 for a role that nobody has.
func RightFor(role wire.Role) Rights {
	switch role {
	case wire.RolePush, wire.RoleFill:
		return Push
	case wire.RoleTrain, wire.RoleObserve, wire.RoleSubscribe, wire.RoleManifest:
		return Read
	case wire.RolePublish:
		return Publish
	}
	return 0
}

// Identity is who a peer has shown to be.
type Identity struct {
	Token  string   // its name; empty: no token was asked for, see Gate
	Rights Rights   //
	Tables []string // patterns of the tables for which it has them; Admin is for none
}

// Everybody is the identity of peers who need no token: it may do everything.
func Everybody() *Identity { return &Identity{Rights: All, Tables: []string{"*"}} }

// May says whether the identity has a right for a table. The table does not count for Admin.
func (id *Identity) May(right Rights, table string) bool {
	if right == 0 || id.Rights&right != right {
		return false
	}
	if right == Admin {
		return true
	}
	for _, pattern := range id.Tables {
		if matches(pattern, table) {
			return true
		}
	}
	return false
}

// Check returns the refusal for a peer whose identity does not let it have a hello's role for its table, or nil.
func (id *Identity) Check(hello *wire.Hello) *wire.Refusal {
	right := RightFor(hello.Role)
	if id.May(right, hello.Table) {
		return nil
	}
	return wire.Refuse(wire.CodeNotPermitted, "token %q may not %s table %q: it has %s for the tables %q; whoever keeps the daemon's tokens can change that",
		id.Token, right, hello.Table, id.Rights, id.Tables)
}

// matches says whether a name fits a pattern, in which * stands for any characters and ? for any one.
func matches(pattern, name string) bool {
	p, n := []rune(pattern), []rune(name)
	star, from := -1, 0
	i, j := 0, 0
	for j < len(n) {
		switch {
		case i < len(p) && p[i] == '*':
			star, from = i, j
			i++
		case i < len(p) && (p[i] == '?' || p[i] == n[j]):
			i++
			j++
		case star >= 0: // let the last star take one more
			from++
			i, j = star+1, from
		default:
			return false
		}
	}
	for i < len(p) && p[i] == '*' {
		i++
	}
	return i == len(p)
}
