# Each target brings what it needs (Debian, Ubuntu: .ci/packages); only Rust must be there already.
export LOCKSTEP_TEST_COUNTS
FUZZ_SECONDS ?= 30
# Arguments of `make demo`, for example: make demo DEMO_ARGS=--keep
DEMO_ARGS ?=
# Arguments of `make bench`, for example: make bench BENCH_ARGS="--check --json bench.json"
BENCH_ARGS ?=
VM_TESTS ?=

.PHONY: all build test demo lint fuzz vm-test bench plots
all: build

# The programs: target/release/lockstep, which is lockstepd, drbdadm, drbdsetup and drbdmeta by other names.
build:
	@.ci/install build! ublk
	@.ci/build

# Every test. One that cannot run here says "skipped: why".
test:
	@.ci/install build! ublk disk drbd nbd fio qemu net vm
	@.ci/test

# Two nodes on this machine: a disk mirrored, a node killed, the other taking over, the first coming back.
demo:
	@.ci/install build! ublk disk nbd fio qemu
	@.ci/build --example demo
	@"$${CARGO_TARGET_DIR:-target}/release/examples/demo" $(DEMO_ARGS)

# fmt, clippy, wasm32 build of the core, docs, licences.
lint:
	@.ci/install build! ublk
	@.ci/lint

# Every fuzz target for FUZZ_SECONDS.
fuzz:
	@.ci/install build!
	@.ci/fuzz $(FUZZ_SECONDS)

# The walk-through on a real ublk device, and the kernel's own DRBD on our disks, in a virtual machine. Some of them
# only: make vm-test VM_TESTS="kernel_attach walkthrough"
vm-test:
	@.ci/install build! ublk disk drbd vm vmtools
	@.ci/vm $(VM_TESTS)

# Throughput against QEMU's mirror, GlusterFS and an unreplicated file (bench/README.md).
bench:
	@.ci/install build! bench! gluster
	bench/native $(BENCH_ARGS)

# The pictures of a benchmark's figures: make plots BENCH_JSON=bench.json
plots: target/plot/bin/python
	target/plot/bin/python bench/plot $(BENCH_JSON) docs/bench

target/plot/bin/python:
	python3 -m venv target/plot
	target/plot/bin/pip install -q matplotlib==3.9.2
