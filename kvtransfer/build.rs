//! Compiles the telemetry protocol. No `protoc` is needed: the parser is a Rust crate.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["kvtransfer/v1/telemetry.proto"], ["proto"])?;
    // Both sides are generated: an engine serves the stream, the router watches it.
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .compile_fds(files)?;
    Ok(())
}
