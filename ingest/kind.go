package ingest

import (
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// Kind is what a table holds, and so which roles it has.
type Kind string

// The kinds of tables.
const (
	KindSamples Kind = "samples" // samples of one spec
	KindTensors Kind = "tensors" // chunks of named tensors: gradients
	KindWeights Kind = "weights" // whole generations of named tensors
)

// kindsOf says which kinds of tables have a role.
var kindsOf = map[wire.Role][]Kind{
	wire.RolePush: {KindSamples, KindTensors}, wire.RoleFill: {KindSamples, KindTensors}, wire.RoleTrain: {KindSamples, KindTensors},
	wire.RoleObserve: {KindSamples, KindTensors}, wire.RoleManifest: {KindTensors}, wire.RolePublish: {KindWeights}, wire.RoleSubscribe: {KindWeights},
}

// CheckKind compares a hello with the kind of its table: nil, or the refusal to send. An unknown table is refused.
func CheckKind(tables Tables, h *wire.Hello) *wire.Refusal {
	kind, producer := tables.Kind(h.Table), h.Role == wire.RolePush || h.Role == wire.RoleFill
	switch {
	case kind == "":
		return unknownTable(tables, h)
	case !slices.Contains(kindsOf[h.Role], kind):
		return wire.Refuse(wire.CodeWrongKind, "table %q is of kind %s, which does not have the role %q; %s", h.Table, kind, h.Role,
			advice(tables, kindsOf[h.Role]...))
	case producer && kind == KindTensors:
		return checkTensors(h)
	case producer && h.Manifest != nil:
		return wire.Refuse(wire.CodeWrongKind, "table %q is of kind %s, which takes no manifest; to send tensors, %s", h.Table, kind, advice(tables, KindTensors))
	}
	return nil
}

// checkTensors says what a producer of tensors left out.
func checkTensors(h *wire.Hello) *wire.Refusal {
	switch {
	case h.Manifest == nil:
		return wire.Refuse(wire.CodeBadHandshake,
			"table %q is of kind tensors: a producer says in the field \"manifest\" which tensors it sends; samples go to a table of kind samples", h.Table)
	case h.Session == "":
		return wire.Refuse(wire.CodeBadHandshake,
			"table %q is of kind tensors: a producer says in the field \"session\" who it is, since readers know it by that name", h.Table)
	}
	return nil
}

// advice names the tables of some kinds.
func advice(tables Tables, kinds ...Kind) string {
	var names []string
	for _, name := range tables.Names() {
		if slices.Contains(kinds, tables.Kind(name)) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return fmt.Sprintf("configure a table of kind %s, of which there is none here", kinds[0])
	}
	sort.Strings(names)
	return fmt.Sprintf("use one of kind %s: %s", kinds[0], strings.Join(names, ", "))
}

func unknownTable(tables Tables, h *wire.Hello) *wire.Refusal {
	names := tables.Names()
	sort.Strings(names)
	return wire.Refuse(wire.CodeUnknownTable, "there is no table %q; the tables here are: %s", h.Table, strings.Join(names, ", "))
}

// ReadManifest returns the manifest of a hello, nil where it has none, or what to refuse with.
func ReadManifest(h *wire.Hello) (*tensor.Manifest, *wire.Refusal) {
	if h.Manifest == nil {
		return nil, nil
	}
	m, err := tensor.ParseManifest(h.Manifest)
	if err != nil {
		return nil, wire.Refuse(wire.CodeBadOption, "the field \"manifest\": %v", err)
	}
	return m, nil
}

// Manifest answers the role manifest.
func Manifest(tables Tables, h *wire.Hello) (*wire.AcceptedManifest, *wire.Refusal) {
	if r := CheckKind(tables, h); r != nil {
		return nil, r
	}
	t, ok := tables.Lookup(h.Table)
	if !ok {
		return nil, unknownTable(tables, h)
	}
	if h.SessionOf != 0 {
		name, ok := t.Steps().Session(uint64(h.SessionOf))
		if !ok {
			return nil, wire.Refuse(wire.CodeUnknownSession, "no session of table %q has stream %d: it was forgotten, since others came; read chunks that are newer", h.Table, h.SessionOf)
		}
		return &wire.AcceptedManifest{Table: h.Table, Session: name}, nil
	}
	id, err := strconv.ParseUint(h.ManifestID, 16, 64)
	if err != nil { // package wire has looked
		return nil, wire.Refuse(wire.CodeBadOption, "the field \"manifest_id\": %v", err)
	}
	text, ok := t.Steps().Manifest(id)
	if !ok {
		return nil, wire.Refuse(wire.CodeUnknownManifest,
			"no manifest %s is known of table %q: its producers have gone, and others came since; read chunks that are newer",
			h.ManifestID, h.Table)
	}
	return &wire.AcceptedManifest{Table: h.Table, Manifest: text}, nil
}
