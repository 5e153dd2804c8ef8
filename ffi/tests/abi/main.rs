//! C and C++ programs against `libkvtransfer.so`, under the address and undefined-behaviour sanitizers.

mod build;
mod frozen;
mod pair;

use build::{Language, compile, library, run};

#[test]
fn structs_are_as_c_and_cpp_see_them() {
    run(&compile("tests/c/layout.c", Language::C, "layout-c"), &[]);
    run(
        &compile("tests/c/layout.c", Language::Cpp, "layout-cpp"),
        &[],
    );
}

#[test]
fn every_error_path_says_what_is_wrong() {
    let said = run(&compile("tests/c/errors.c", Language::C, "errors"), &[]);
    assert_eq!(said, "every error path: ok\n");
}

#[test]
fn a_cpp_client_moves_pages_and_hears_of_everything() {
    let said = run(&compile("tests/c/client.cpp", Language::Cpp, "client"), &[]);
    assert_eq!(said, "C++ client: ok\n");
}

#[test]
fn the_library_exports_its_own_names_only_and_needs_no_device_library() {
    let library = library();
    let names = build::tool("nm", &["-D", "--defined-only", "--format=posix"], library);
    let names: Vec<_> = names
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert!(
        names.iter().all(|name| name.starts_with("kvt_")),
        "{names:?}"
    );
    let dynamic = build::tool("readelf", &["-d"], library);
    assert!(dynamic.contains("soname: [libkvtransfer.so]"), "{dynamic}");
    let needed: Vec<_> = dynamic
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .collect();
    for forbidden in ["ibverbs", "rdmacm", "cuda", "ssl", "stdc++"] {
        assert!(
            !needed.iter().any(|line| line.contains(forbidden)),
            "{needed:?}"
        );
    }
}
