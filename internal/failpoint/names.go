package failpoint

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Variable is the environment variable that arms a point.
const Variable = "INGESTD_FAILPOINT"

// Names are all points, by package, operation and place in it. Those of client are in the peer's process, all others in the daemon's.
var Names = []string{
	"client/filler/copying",
	"client/filler/filled",
	"client/filler/handed",
	"client/publisher/begun",
	"client/publisher/committed",
	"client/publisher/copied",
	"client/publisher/summed",
	"client/publisher/written",
	"drainer/settle/committed",
	"drainer/settle/copying",
	"drainer/visit/committed",
	"ring/advance/counted",
	"ring/announce/numbered",
	"ring/announce/published",
	"ring/closeup/arrived",
	"ring/closeup/copied",
	"ring/closeup/moved",
	"ring/closeup/noted",
	"ring/commit/begun",
	"ring/commit/held",
	"ring/commit/marked",
	"ring/entry/written",
	"ring/lease/taken",
	"ring/lend/lent",
	"ring/mark/row",
	"ring/open/stated",
	"ring/place/held",
	"ring/place/marked",
	"ring/place/publish",
	"ring/place/returned",
	"ring/publish/closed",
	"ring/publish/sealing",
	"ring/recover/announced",
	"ring/recover/begun",
	"ring/recover/closed",
	"ring/recover/collected",
	"ring/recover/counted",
	"ring/recover/dropped",
	"ring/recover/leased",
	"ring/recover/settled",
	"ring/release/freed",
	"ring/reserve/taken",
	"sampler/done/noted",
	"shm/filler/acked",
	"shm/filler/committed",
	"shm/filler/lent",
	"shm/trainer/giving",
	"shm/trainer/unlent",
	"tcpingest/ack/due",
	"tcpingest/ack/sent",
	"tcpingest/place/pushed",
	"tcpingest/receive/part",
	"tcpingest/receive/staged",
	"tcpingest/reserve/taken",
	"tcpingest/scatter/leaf",
	"weights/commit/shown",
	"weights/commit/stated",
	"weights/commit/written",
}

// point is what the variable says.
type point struct {
	name  string
	count uint64
	stop  bool
}

// parse reads NAME:COUNT or NAME:COUNT:stop.
func parse(text string) (point, error) {
	name, rest, _ := strings.Cut(text, ":")
	number, action, more := strings.Cut(rest, ":")
	count, err := strconv.ParseUint(number, 10, 64)
	switch {
	case !slices.Contains(Names, name):
		return point{}, fmt.Errorf("there is no failpoint %q; there are %s", name, strings.Join(Names, ", "))
	case err != nil || count == 0:
		return point{}, fmt.Errorf("%q: write NAME:COUNT or NAME:COUNT:stop, COUNT at least 1", text)
	case more && action != "stop":
		return point{}, fmt.Errorf("%q: the third part can only be stop", text)
	}
	return point{name, count, more}, nil
}
