# ingestd: build, test, show. Needs Go, gcc (for the race detector) and Python 3.9 or newer; the rest is fetched. `make help` lists the targets.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-print-directory
.DEFAULT_GOAL := help

GO       ?= go
PYTHON   ?= python3
FUZZTIME ?= 10s
SOAK     ?= 30m
SEED     ?= 0
BENCH    ?=

# What the Python tests need beside the package and its optional parts, and what lint needs. The linters are pinned: a new version has new opinions, and those come as a change of this line.
PYTHON_TOOLS := numpy pytest ml_dtypes safetensors
LINT_TOOLS   := mypy==2.4.1 ruff==0.17.6

VERSION = $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS = -X main.stamp=$(VERSION)
VENV    := .venv
IN_VENV := $(CURDIR)/$(VENV)/bin
RUFF_RULES := --config $(CURDIR)/python/pyproject.toml

# What runs twice, and why. The race detector follows Go's heap. On mapped memory it misses real races and reports correct code, so the algorithms take
# plain bytes: `go test ./...` runs everything once without it, mappings and processes included, and then the packages below run
# again with it, on heap memory. A test in one of them that touches a mapping has `//go:build !race` in its file.
RACE_PACKAGES := ./spec ./wire ./auth ./bans/... ./tensor ./reduce ./internal/park ./spsc ./ring ./drainer ./sampler ./steps ./engine ./tcpingest ./quicingest ./internal/quicconn ./weights ./remote ./client ./fuzz

# What must build where the daemon does not run: producers.
PORTABLE_PACKAGES := ./spec ./wire ./tensor ./internal/crc32c ./reduce ./client
PORTABLE_SYSTEMS  := darwin windows

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

.PHONY: build
build: ## build bin/ingestd
	@mkdir -p bin
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ingestd ./cmd/ingestd

.PHONY: demo
demo: build $(VENV)/.ready ## train on digits that four processes stream in, then data-parallel, then move a checkpoint; under 2 minutes
	@$(IN_VENV)/python examples/digits/run.py --daemon bin/ingestd
	@$(IN_VENV)/python examples/dataparallel/run.py --daemon bin/ingestd

.PHONY: test
test: test-go test-race test-python ## run all tests

.PHONY: test-go
test-go: ## run the Go tests without the race detector
	$(GO) test -timeout 5m ./...

.PHONY: test-race
test-race: ## run the Go tests of the heap-only algorithms under the race detector
	CGO_ENABLED=1 $(GO) test -race -timeout 5m $(RACE_PACKAGES)

.PHONY: test-python
test-python: build $(VENV)/.ready ## run the Python tests
	cd python && INGESTD_BIN=$(CURDIR)/bin/ingestd $(IN_VENV)/python -m pytest -q
	$(IN_VENV)/python -m pytest -q examples/digits
	OPENBLAS_NUM_THREADS=1 $(IN_VENV)/python -m pytest -q examples/dataparallel

.PHONY: lint
lint: $(VENV)/.lint ## gofmt, go mod tidy, go vet, staticcheck, ruff, mypy
	@unformatted=$$(find . -name '*.go' -not -path './.*' -print0 | xargs -0 gofmt -l); \
	if [ -n "$$unformatted" ]; then echo "not formatted, run gofmt -w on:"; echo "$$unformatted"; exit 1; fi
	$(GO) mod tidy -diff
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	cd python && $(IN_VENV)/ruff check . && $(IN_VENV)/ruff format --check . && $(IN_VENV)/mypy
	cd examples/digits && $(IN_VENV)/ruff check $(RUFF_RULES) . && $(IN_VENV)/ruff format --check $(RUFF_RULES) . && \
		MYPYPATH=$(CURDIR)/python $(IN_VENV)/mypy --strict --explicit-package-bases .
	cd examples/dataparallel && $(IN_VENV)/ruff check $(RUFF_RULES) . && $(IN_VENV)/ruff format --check $(RUFF_RULES) . && \
		MYPYPATH=$(CURDIR)/python:$(CURDIR)/examples/digits $(IN_VENV)/mypy --strict --explicit-package-bases .

.PHONY: cross
cross: ## build what producers need for other systems
	@for system in $(PORTABLE_SYSTEMS); do \
		for arch in amd64 arm64; do \
			echo "GOOS=$$system GOARCH=$$arch $(GO) build $(PORTABLE_PACKAGES)"; \
			CGO_ENABLED=0 GOOS=$$system GOARCH=$$arch $(GO) build $(PORTABLE_PACKAGES); \
		done; \
	done

.PHONY: bench
bench: build ## measure the whole path beside its baselines (BENCH="--json out.json" adds flags), then the queue and the ring
	bin/ingestd bench tcp $(BENCH)
	$(GO) test -run '^$$' -bench . -benchmem ./spsc ./ring

.PHONY: bench-shm
bench-shm: build bench-shmipc ## measure shared memory beside its baselines (BENCH="--json out.json" adds flags)
	bin/ingestd bench shm --shmipc bin/shmipc-peer $(BENCH)

.PHONY: bench-tensors
bench-tensors: build $(VENV)/.ready ## measure gradients and weights beside their baselines (BENCH="--json out.json" adds flags)
	bin/ingestd bench tensors --python $(IN_VENV)/python $(BENCH)

.PHONY: bench-shmipc
bench-shmipc: ## build bin/shmipc-peer, the shmipc-go baseline of `ingestd bench shm`; its module is its own
	@mkdir -p bin
	cd bench/shmipc && GOWORK=off $(GO) test ./... && GOWORK=off $(GO) build -trimpath -o $(CURDIR)/bin/shmipc-peer .

.PHONY: fuzz
fuzz: ## run each fuzz target for FUZZTIME (10s)
	@packages=$$($(GO) list ./...); \
	for package in $$packages; do \
		listed=$$($(GO) test -list '^Fuzz' $$package); \
		for target in $$(sed -n '/^Fuzz/p' <<<"$$listed"); do \
			echo "$$package $$target $(FUZZTIME)"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1s $$package; \
		done; \
	done

.PHONY: soak
soak: ## kill, stop and damage everything for SOAK (30m); SEED=... makes the same choices again
	$(GO) test ./internal/killtest -count 1 -timeout 0 -parallel 8 -v -run '^TestSoak$$' -soak $(SOAK) -seed $(SEED)

.PHONY: clean
clean: ## remove what was built
	rm -rf bin build dist $(VENV) python/build python/ingestd/_native*.so python/*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The tools that Python needs, in a virtual environment of the repository's own.
$(VENV)/.ready: python/pyproject.toml python/setup.py python/ingestd/_native.c Makefile
	@echo "making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || { echo "$(PYTHON) is older than 3.9: give another one with PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { echo "cannot make a virtual environment: on Debian and Ubuntu install python3-venv"; exit 1; }
	@$(IN_VENV)/pip install --quiet --disable-pip-version-check $(PYTHON_TOOLS) -e 'python[quic,compression]'
	@touch $@

$(VENV)/.lint: $(VENV)/.ready
	@$(IN_VENV)/pip install --quiet --disable-pip-version-check $(LINT_TOOLS)
	@touch $@
