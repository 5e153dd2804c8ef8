//! `include/kvtransfer.h` is what cbindgen makes of the sources, and says what every caller must know.

use std::{fs, path::Path};

/// In the order in which a reader meets them in the header.
const SOURCES: [&str; 11] = [
    "version",
    "status",
    "argument",
    "log",
    "layout",
    "engine",
    "memory",
    "peer",
    "transfer",
    "bootstrap",
    "doctor",
];
const WRITE: &str = "KVT_WRITE_HEADER";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn generated() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml"))
        .expect("cbindgen.toml is well-formed");
    let mut builder = cbindgen::Builder::new().with_config(config);
    for source in SOURCES {
        builder = builder.with_src(root().join(format!("src/{source}.rs")));
    }
    let bindings = builder.generate().expect("cbindgen reads the sources");
    let mut text = Vec::new();
    bindings.write(&mut text);
    String::from_utf8(text).expect("a header is text")
}

#[test]
fn the_committed_header_is_what_the_sources_make() {
    let path = root().join("include/kvtransfer.h");
    let generated = generated();
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &generated).expect("the header can be written");
    }
    let committed = fs::read_to_string(&path).expect("the header is committed");
    let differs = committed
        .lines()
        .zip(generated.lines())
        .position(|(old, new)| old != new);
    assert!(
        committed == generated,
        "include/kvtransfer.h is not what src/*.rs makes, first in line {:?}: run \
         `{WRITE}=1 cargo test -p kvtransfer-ffi --test header` and commit it",
        differs.map(|at| at + 1)
    );
}

/// The functions of the header, each with its comment.
fn functions(header: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut comment = String::new();
    let mut is_comment = false;
    for line in header.lines() {
        if line.starts_with("/*") {
            comment.clear();
            is_comment = true;
        }
        if is_comment {
            comment.push_str(line);
            is_comment = !line.contains("*/");
        } else if let Some((before, _)) = line.split_once('(')
            && !before.starts_with("typedef")
            && let Some(at) = before.find("kvt_")
        {
            found.push((before[at..].to_owned(), comment.clone()));
        }
    }
    found
}

#[test]
fn every_function_says_threads_errors_and_ownership() {
    let functions = functions(&generated());
    assert!(
        (20..=30).contains(&functions.len()),
        "{} functions",
        functions.len()
    );
    for (name, comment) in &functions {
        for word in ["Threads: ", "Errors: "] {
            assert!(comment.contains(word), "{name} does not say \"{word}\"");
        }
        let takes_nothing = name == "kvt_abi_version";
        assert!(
            takes_nothing || comment.contains("Ownership: "),
            "{name} does not say who owns what"
        );
    }
}

#[test]
fn every_exported_function_is_in_the_header() {
    let header = generated();
    let mut exported = 0;
    for source in fs::read_dir(root().join("src")).expect("there are sources") {
        let path = source.expect("a readable folder").path();
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        for line in text
            .lines()
            .filter(|line| line.starts_with("pub") && line.contains("extern \"C\" fn kvt_"))
        {
            let name = line
                .split("fn ")
                .nth(1)
                .and_then(|rest| rest.split('(').next())
                .expect("a name");
            assert!(
                header.contains(&format!("{name}(")),
                "{name} of {} is not in the header",
                path.display()
            );
            exported += 1;
        }
    }
    assert_eq!(exported, functions(&header).len());
}
