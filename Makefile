# Two commands do it all: `make mount` and `make test`. Each sets up what it needs first (scripts/setup.sh).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help

BIN := .venv/bin
STORE ?=
MOUNTPOINT ?=
ARGS ?=
# Test files at a time.
WORKERS ?= 2
export STORE MOUNTPOINT

.PHONY: help mount umount test test-all test-faults soak test-kernels lint bench bench-size bench-codec bench-read bench-virtual bench-list bench-write bench-merge bench-service deb try-deb man setup-example setup-test setup-bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

mount: ## mount STORE at MOUNTPOINT; without STORE, an example store of real models at ./models
	@if [ -z "$$STORE" ]; then
	  scripts/setup.sh example
	  exec $(BIN)/python -m scripts.example
	fi
	scripts/setup.sh mount
	at=$${MOUNTPOINT:-$$STORE}
	if mountpoint -q -- "$$at"; then
	  echo "already mounted at $$at; make umount MOUNTPOINT=$$at takes it down"
	else
	  mkdir -p -- "$$at" 2> /dev/null || true
	  $(BIN)/hydrafs mount "$$STORE" $${MOUNTPOINT:+"$$MOUNTPOINT"}
	  echo "mounted at $$at"
	fi
	ls -l -- "$$at"

umount: ## unmount MOUNTPOINT (default: STORE, else the example at ./models)
	@$(BIN)/hydrafs umount "$${MOUNTPOINT:-$${STORE:-models}}"

test: setup-test lint ## lint and all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --durations=20 $(ARGS)

test-all: setup-test lint ## lint and all tests, all faults, a soak, and what is not slow with each kernel forced
	$(BIN)/python -m pytest $(ARGS)
	$(MAKE) test-faults soak
	$(MAKE) test-kernels

test-faults: setup-test ## each error of each call of each change of a store, once; prints how many, and what was lost
	@PYTHONPATH=. $(BIN)/python tests/failing.py --jobs "$$(nproc)" $(ARGS)
	PYTHONPATH=. $(BIN)/python tests/tracing.py $${TRACED:+--sample "$$TRACED"}

soak: setup-test ## programs, kills and faults on a real mount for MINUTES (default 30); prints the seed, losses and hangs
	@PYTHONPATH=. $(BIN)/python tests/soak.py --minutes "$${MINUTES:-30}" $${SEED:+--seed "$$SEED"} $(ARGS)

test-kernels: setup-test ## all tests but the slow ones, once with each kernel of rans that this machine has
	@for level in avx512 avx2 portable; do
	  if $(BIN)/python -c "import sys; from hydrafs.codecs import rans; sys.exit('$$level' not in rans.levels())"; then
	    echo "test-kernels: $$level"
	    HYDRAFS_SIMD=$$level $(BIN)/python -m pytest -m "not slow" $(ARGS)
	  else
	    echo "test-kernels: no $$level here, left out"
	  fi
	done

lint: setup-test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: bench-size bench-codec bench-read bench-virtual bench-list bench-write bench-merge bench-service ## all tables of benchmarks/README.md

bench-size: setup-bench ## stored bytes and speed of each codec, against its peers
	$(BIN)/python -m benchmarks.size $(ARGS)

bench-codec: setup-bench ## decoding and encoding speed of rans, by each decoder
	$(BIN)/python -m benchmarks.codec $(ARGS)

bench-read: setup-bench ## reading through the mount, against the plain file
	$(BIN)/python -m benchmarks.read $(ARGS)

bench-virtual: setup-bench ## merges that are only recipes
	$(BIN)/python -m benchmarks.virtual $(ARGS)

bench-list: setup-bench ## mounting and listing 10,000 diffs
	$(BIN)/python -m benchmarks.listing $(ARGS)

bench-write: setup-bench ## writing into a mount, against the store's own filesystem
	$(BIN)/python -m benchmarks.write $(ARGS)

bench-merge: setup-bench ## what merged models cost whose parents are in the store
	$(BIN)/python -m benchmarks.merge $(ARGS)

bench-service: setup-bench ## starting with 1,000 diffs, and what an idle daemon costs
	$(BIN)/python -m benchmarks.service $(ARGS)

deb: ## a Debian package in build/, for this release's Python
	@scripts/setup.sh mount
	scripts/make_deb.sh

try-deb: deb ## install the package in an empty Debian, mount there, boot it (root; needs debootstrap, systemd-container)
	@scripts/try_deb.sh build/hydrafs_*.deb

man: ## the man pages, in build/man
	@scripts/setup.sh mount
	$(BIN)/python -m scripts.make_man build/man

setup-example setup-test setup-bench: setup-%:
	@scripts/setup.sh $*

clean: ## remove environments, caches, and the benchmarks' models; the example store stays
	@rm -rf .venv .venv-old .bench build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . \( -path ./models -o -path ./example-store -o -path ./.git \) -prune -o -name __pycache__ -prune -exec rm -rf {} +
