//! Compiles the protocols. No `protoc` is needed: the parser is a Rust crate.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    gossip()
}

/// What replicas tell each other.
fn gossip() -> Result<(), Box<dyn Error>> {
    let files = protox::compile(["kvrouter/v1/gossip.proto"], ["proto"])?;
    // Both sides are generated: replicas serve and follow.
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .compile_fds(files)?;
    Ok(())
}
