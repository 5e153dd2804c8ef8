# The tasks of this workspace; `just check` is what CI runs.

check: fmt clippy test doc deny

fmt:
    cargo fmt --all --check

clippy:
    cargo clippy --workspace --all-targets -- -D warnings

test:
    cargo test --workspace

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

deny:
    cargo deny --all-features check bans licenses sources

demo:
    cargo demo

bench:
    cargo run --release -p kvtransfer-benches --bin kvbench -- --json
    cargo bench -p kvtransfer-benches --bench plan
