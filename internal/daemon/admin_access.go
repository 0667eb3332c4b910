package daemon

import (
	"encoding/json"
	"net/http"
	"os"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/wire"
)

// unauthorized is the same whatever it was.
const unauthorized = "this address asks for a token with the right admin: Authorization: Bearer NAME:SECRET (--token-file)"

// authorized lets requests in: on loopback all; on a unix socket those of the daemon's user and of root; elsewhere, and from other users, those with a token that has the
// right, if the daemon has tokens. Addresses that fail are slowed and banned as by the other listeners.
func (a *admin) authorized(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := r.Context().Value(adminConnKey{}).(*adminConn)
		if !c.wait(r.Context()) {
			return
		}
		proved, code := a.judge(c, r)
		if code != "" {
			c.fail(code)
			w.Header().Set("WWW-Authenticate", "Bearer")
			w.Header().Set("Connection", "close")
			say(w, http.StatusUnauthorized, unauthorized)
			return
		}
		c.letIn(proved)
		next.ServeHTTP(w, r)
	})
}

// judge says why a request is not let in, and if it is, whether that is by a token.
func (a *admin) judge(c *adminConn, r *http.Request) (proved bool, code wire.Code) {
	tokens, at := a.daemon.access.tokens, a.daemon.plan.admin
	if at.scheme == "unix" {
		if user := c.user(); user >= 0 && (user == 0 || user == os.Geteuid()) {
			return false, ""
		}
	} else if tokens == nil || at.loopback() {
		return false, ""
	}
	if tokens == nil {
		return false, wire.CodeNotAuthenticated
	}
	id, ok := tokens.Bearer(r.Header.Get("Authorization"))
	switch {
	case !ok:
		return false, wire.CodeNotAuthenticated
	case !id.May(auth.Admin, ""):
		return false, wire.CodeNotPermitted
	}
	return true, ""
}

// BanList is the answer to GET /bans.
type BanList struct {
	Enabled bool         `json:"enabled"`
	Bans    []bans.Entry `json:"bans"`
}

// BansCleared is the answer to DELETE /bans.
type BansCleared struct {
	Cleared int `json:"cleared"`
}

func (a *admin) bans(w http.ResponseWriter, _ *http.Request) {
	list := BanList{Bans: []bans.Entry{}}
	if table := a.daemon.access.door.Table; table != nil {
		list = BanList{true, table.Ls()}
	}
	answer(w, list)
}

// clearBans forgets one address or all. No web page of another site can make a browser ask so: it would have to ask first whether it may.
func (a *admin) clearBans(w http.ResponseWriter, r *http.Request) {
	address, all := r.URL.Query().Get("address"), r.URL.Query().Get("all")
	if (address == "") == (all == "") || all != "" && all != "true" {
		say(w, http.StatusBadRequest, "say which: /bans?address=ADDRESS, or /bans?all=true")
		return
	}
	var cleared BansCleared
	if table := a.daemon.access.door.Table; table != nil && all != "" {
		cleared.Cleared = table.ClearAll()
	} else if table != nil {
		was, err := table.Clear(address)
		if err != nil {
			say(w, http.StatusBadRequest, err.Error())
			return
		}
		if was {
			cleared.Cleared = 1
		}
	}
	a.log.Info("bans cleared", "peer", r.RemoteAddr, "address", address, "addresses", cleared.Cleared)
	answer(w, cleared)
}

// answer writes JSON.
func answer(w http.ResponseWriter, v any) {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		say(w, http.StatusInternalServerError, err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(text, '\n'))
}
