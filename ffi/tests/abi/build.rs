//! Builds the shared object as a user would, and C programs against it.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// A language and its compiler.
#[derive(Clone, Copy)]
pub(crate) enum Language {
    C,
    Cpp,
}

/// The package's folder.
fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `libkvtransfer.so` of this profile. Cargo builds no cdylib for a test, so the test asks it to.
pub(crate) fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build.current_dir(package());
        // `cargo test` describes this package. Build scripts that watch these (ring's) would run again now and at the next
        // build outside of a test, and most of the workspace would be compiled anew both times.
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            let describes = ["CARGO_PKG_", "CARGO_MANIFEST_", "OUT_DIR"];
            if describes.iter().any(|prefix| text.starts_with(prefix)) {
                build.env_remove(&name);
            }
        }
        build.args(["build", "--lib", "--message-format=json-render-diagnostics"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        let built = build.output().expect("cargo runs");
        let said = String::from_utf8_lossy(&built.stderr);
        assert!(built.status.success(), "cargo build failed:\n{said}");
        let messages = String::from_utf8(built.stdout).expect("cargo speaks JSON");
        let mut files = messages.lines().filter_map(shared_object);
        files.next_back().expect("cargo built the cdylib")
    })
}

/// The shared object that a message of cargo's tells of.
fn shared_object(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let files = message.get("filenames")?.as_array()?;
    let mut files = files
        .iter()
        .filter_map(|file| file.as_str().map(PathBuf::from));
    files.find(|file| file.ends_with("libkvtransfer.so"))
}

/// Compiles a program with both sanitizers and links it with the library.
pub(crate) fn compile(source: &str, language: Language, name: &str) -> PathBuf {
    let library = library().parent().expect("it lies in a folder");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let (variable, usual, standard, kind) = match language {
        Language::C => ("CC", "gcc", "-std=c11", "c"),
        Language::Cpp => ("CXX", "g++", "-std=c++17", "c++"),
    };
    let compiler = env::var_os(variable).unwrap_or_else(|| usual.into());
    let mut command = Command::new(&compiler);
    command.args([
        standard,
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-g",
        "-O1",
        "-pthread",
    ]);
    command.args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
    command.arg("-I").arg(package().join("include"));
    command
        .args(["-x", kind])
        .arg(package().join(source))
        .args(["-x", "none"]);
    command
        .arg("-o")
        .arg(&program)
        .arg("-L")
        .arg(library)
        .arg("-lkvtransfer");
    command.arg(format!("-Wl,-rpath,{}", library.display()));
    let compiled = command.output().unwrap_or_else(|error| {
        panic!(
            "{compiler:?} cannot be started ({error}). The ABI's tests need a C and a C++ compiler with sanitizers: install \
             gcc and g++ (Debian: apt-get install gcc g++), or name others by CC and CXX"
        )
    });
    let said = String::from_utf8_lossy(&compiled.stderr);
    assert!(
        compiled.status.success(),
        "{source} does not compile:\n{said}"
    );
    program
}

/// A program with the sanitizers' settings. Leaks count as errors.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("ASAN_OPTIONS", "detect_leaks=1:abort_on_error=0");
    command.env("UBSAN_OPTIONS", "print_stacktrace=1");
    command
}

/// Runs a program to its good end; what it said.
pub(crate) fn run(program: &Path, arguments: &[&str]) -> String {
    let ran = command(program)
        .args(arguments)
        .output()
        .expect("it was just compiled");
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    let complained = String::from_utf8_lossy(&ran.stderr);
    assert!(
        ran.status.success(),
        "{}: {}\n{said}\n{complained}",
        program.display(),
        ran.status
    );
    said
}

/// What a tool of binutils says of a file.
pub(crate) fn tool(name: &str, arguments: &[&str], file: &Path) -> String {
    let ran = Command::new(name).args(arguments).arg(file).output();
    let ran =
        ran.unwrap_or_else(|error| panic!("{name} cannot be started ({error}): install binutils"));
    assert!(ran.status.success(), "{name}: {}", ran.status);
    String::from_utf8(ran.stdout).expect("it prints text")
}
