//! The rules of the house that no lint checks: purity of the core, file sizes, names.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Modules that compute and never touch a socket, a thread or a clock.
const PURE: [&str; 9] = [
    "src/layout",
    "src/plan",
    "src/wire",
    "src/transfer",
    "src/bootstrap",
    "src/time",
    "src/ids",
    "src/error",
    "src/config",
];

/// What a pure module may not name, with what it should do instead.
const BANNED_IN_PURE: [(&str, &str); 8] = [
    ("tokio", "the edges own the runtime"),
    ("std::net::Tcp", "the edges own the sockets"),
    ("std::os::unix::net", "the edges own the sockets"),
    ("std::thread", "the shell owns the threads"),
    ("Instant::now", "time is passed in"),
    ("SystemTime", "time is passed in"),
    ("libc::", "system calls are the edges'"),
    ("rustix::", "system calls are the edges'"),
];

/// Name parts that say nothing.
const EMPTY_NAMES: [&str; 8] = [
    "util", "utils", "helper", "helpers", "manager", "common", "misc", "base",
];

/// Lines of a file before its tests.
const FILE_LINES_MAX: usize = 800;

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .expect("the crate lies in the workspace")
        .to_owned()
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && name != "target" && name != ".git" {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

/// The part of a source before its test module.
fn production(source: &str) -> &str {
    source
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(source)
}

fn files_below(folder: &str) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    rust_files(&root().join(folder), &mut files);
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a source file is readable");
        (path, text)
    };
    files.into_iter().map(read).collect()
}

#[test]
fn pure_modules_name_no_socket_thread_or_clock() {
    let mut checked = 0;
    for (path, text) in files_below("kvtransfer/src") {
        let name = path
            .strip_prefix(root().join("kvtransfer"))
            .expect("below the crate");
        let name = name.to_string_lossy().into_owned();
        let is_pure = PURE
            .iter()
            .any(|pure| name == format!("{pure}.rs") || name.starts_with(&format!("{pure}/")));
        if !is_pure || name.contains("tests") {
            continue;
        }
        checked += 1;
        for line in production(&text)
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
        {
            for (banned, why) in BANNED_IN_PURE {
                assert!(
                    !line.contains(banned),
                    "{name} names `{banned}`: {why}\n  {line}"
                );
            }
        }
    }
    assert!(
        checked > 20,
        "only {checked} pure files found: has the tree moved?"
    );
}

#[test]
fn pure_modules_forbid_unsafe_code() {
    for pure in PURE {
        let path = root().join("kvtransfer").join(format!("{pure}.rs"));
        let text = fs::read_to_string(&path).expect("every pure module has its file");
        assert!(
            text.contains("#![forbid(unsafe_code)]"),
            "{} must forbid unsafe",
            path.display()
        );
    }
}

#[test]
fn the_router_forbids_unsafe_code_and_links_no_device_library() {
    let source = fs::read_to_string(root().join("router/src/lib.rs")).expect("the router's root");
    assert!(source.contains("#![forbid(unsafe_code)]"));
    let manifest = fs::read_to_string(root().join("router/Cargo.toml")).expect("its manifest");
    for banned in ["cudarc", "libloading", "ibverbs"] {
        assert!(
            !manifest.contains(banned),
            "the router must not link {banned}"
        );
    }
}

#[test]
fn files_are_short_and_their_names_say_something() {
    let mut too_long = Vec::new();
    for folder in ["kvtransfer", "router", "ffi", "benches", "examples"] {
        for (path, text) in files_below(folder) {
            let name = path
                .file_stem()
                .expect("a file has a name")
                .to_string_lossy()
                .into_owned();
            assert_ne!(name, "mod", "{}: use foo.rs beside foo/", path.display());
            let says_nothing = name.split('_').find(|part| EMPTY_NAMES.contains(part));
            assert!(
                says_nothing.is_none(),
                "{}: `{says_nothing:?}` says nothing",
                path.display()
            );
            let lines = production(&text).lines().count();
            let is_test = path.components().any(|part| part.as_os_str() == "tests");
            if lines > FILE_LINES_MAX && !is_test {
                too_long.push(format!("{} has {lines}", path.display()));
            }
        }
    }
    assert!(
        too_long.is_empty(),
        "over {FILE_LINES_MAX} lines before tests: {too_long:?}"
    );
}
