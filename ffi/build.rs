//! Gives the shared object its name inside, so that programs find it again however it was linked.

#[expect(clippy::print_stdout, reason = "a build script speaks to cargo so")]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libkvtransfer.so");
}
