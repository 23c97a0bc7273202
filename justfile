# The commands of this repository; `.ci/run` calls the same ones.

# What there is
default:
    @just --list

# Format and lints, as a change must have them
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings

# Every test that needs nothing but this checkout and installed programs
test *arguments:
    bash tests/run --no-install --no-lint --no-vm --no-fuzz {{arguments}}

# Every test, after installing what they need and building the virtual machine's kernel
test-all *arguments:
    bash tests/run {{arguments}}

# The Debian package, in target/debian (needs `cargo install cargo-deb`); with `--version VERSION` for another one
deb *arguments:
    gateway/packaging/build-deb {{arguments}}

# The tests on a real ublk device, in the virtual machine
ublk:
    tests/vm/build-uml.sh
    bash tests/run --no-install --no-lint --no-fuzz -E 'binary_id(quarry-tests::vm)'

# Quarry beside its peers by NBD, the store and the disk, written to docs/BENCHMARKS.md (needs fio, qemu-utils, nbdkit)
bench *arguments:
    tests/bench/run {{arguments}}

# A volume by ublk beside rublk's loop target, in the virtual machine (needs `cargo install rublk`)
bench-ublk *arguments:
    cargo build --release
    tests/bench/ublk {{arguments}}

# Memory beside a volume of 1 TiB in scattered pieces, and the time to open after a crash with 10 GiB unsent (needs fio, 30 GB of disk)
bench-extremes *arguments:
    tests/bench/run --no-write extremes --write docs/BENCHMARKS.md {{arguments}}

# What a fleet of volumes costs, by a model: docs/COST.md.
bench-cost *arguments:
    cargo run --release --locked -p quarry-bench -- cost --write docs/COST.md {{arguments}}

# Instructions per operation of the hot paths, counted by callgrind (needs valgrind)
bench-instructions *arguments:
    tests/bench/instructions {{arguments}}

# An object store, a volume, a crash and a recovery, shown in a minute
demo *arguments:
    cargo run --release -- demo {{arguments}}

# The simulation: fixed seeds, fresh ones and broken invariants; or `--seed N`, `--hours H`, `--histories N`, `--record`, `--mutations`
sim *arguments:
    tests/sim {{arguments}}

# Longer than a change needs: many crashes, a minute's outage, more bit flips, more flushes of a disk, more states of the model of fencing
long:
    QUARRY_TEST_OPERATIONS=100000 QUARRY_TEST_CRASHES=40 QUARRY_TEST_OUTAGE_SECONDS=60 \
    QUARRY_TEST_FLIPS=200 QUARRY_TEST_COLD_MIB=1024 QUARRY_TEST_MODEL_LARGE=1 QUARRY_TEST_BOUNDARIES=150 bash tests/run --no-install --no-lint --no-fuzz

# What reads bytes of others under a fuzzer, each target for so long; what it finds is kept in the corpora
fuzz seconds="60" *targets:
    tests/fuzz/run --seconds {{seconds}} --keep {{targets}}

# The unit tests of what has unsafe code or reads bytes of others, under AddressSanitizer
sanitize *arguments:
    tests/sanitize/run {{arguments}}

# The book, in target/book (needs `cargo install mdbook`), without a warning
book:
    mdbook build docs
    cargo test -p quarry-tests --test book -- --ignored

# All that must hold before a change goes in
ci:
    ./.ci/run
