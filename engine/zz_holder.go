package engine

import "time"

type Who struct {
	Trainer uint64
	Client  string
	PID     int
}

type Holder struct {
	Group string
	Who
	Batch uint64
	Since time.Time
	Idle  bool
}
