package daemon

import (
	"encoding/json"
	"net"
	"net/http"
	"time"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
)

// unauthorized is the same whatever it was.
const unauthorized = "this address asks for a token with the right admin: Authorization: Bearer NAME:SECRET (--token-file or INGESTD_TOKEN)"

// authorized asks for a token where other machines reach the endpoint and the daemon has tokens. Addresses that fail are slowed and banned as by listeners; who is banned hears what
// everybody hears who has no token.
func (a *admin) authorized(next http.Handler) http.Handler {
	tokens := a.daemon.access.gate.Tokens()
	if tokens == nil || a.daemon.plan.admin.loopback() {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		visit, turnedAway := a.daemon.access.door.Enter(peerOf(r))
		if turnedAway == "" && visit != nil && visit.Wait > 0 {
			over := time.NewTimer(visit.Wait)
			defer over.Stop()
			select {
			case <-over.C:
			case <-r.Context().Done():
				visit.Leave()
				return
			}
		}
		id, ok := tokens.Bearer(r.Header.Get("Authorization"))
		if turnedAway != "" || !ok || !id.May(auth.Admin, "") {
			visit.Failed()
			w.Header().Set("WWW-Authenticate", "Bearer")
			say(w, http.StatusUnauthorized, unauthorized)
			return
		}
		visit.Succeeded()
		next.ServeHTTP(w, r)
	})
}

func peerOf(r *http.Request) net.Addr {
	addr, err := net.ResolveTCPAddr("tcp", r.RemoteAddr) // an IP address and a port: nothing is resolved
	if err != nil {
		return nil
	}
	return addr
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
