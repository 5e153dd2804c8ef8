//! Compiles the protocols. No `protoc` is needed: the parser is a Rust crate.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    gossip()?;
    envoy()
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

/// Envoy's external processing, and gRPC's health checks.
fn envoy() -> Result<(), Box<dyn Error>> {
    let files = protox::compile(
        [
            "envoy/service/ext_proc/v3/external_processor.proto",
            "grpc/health/v1/health.proto",
        ],
        ["proto"],
    )?;
    // Both sides are generated: the router serves them, tests ask.
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        // Bodies are shared, not copied.
        .bytes(".")
        .include_file("envoy.rs")
        .compile_fds(files)?;
    Ok(())
}
