//! Gives the shared object its name inside, so that programs find it again however it was linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libkvtransfer.so");
}
