//! The workspace's own binaries for the guest: found and built by the cargo that runs this.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// The package whose tests the lab runs.
const PACKAGE: &str = "kvtransfer";

/// What to build.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    /// The unit tests of kvtransfer's library.
    pub(crate) unit_tests: bool,
    /// Test targets of kvtransfer.
    pub(crate) test_targets: BTreeSet<String>,
    /// Binaries, as package and target.
    pub(crate) binaries: BTreeSet<(String, String)>,
    /// Binaries in the release profile.
    pub(crate) released: BTreeSet<(String, String)>,
    /// Take all of them from a build of the whole workspace's tests, which may be there already.
    pub(crate) as_tested: bool,
}

impl Wanted {
    fn has(&self, built: &Built, is_test: bool) -> bool {
        match built.kind.as_str() {
            "lib" => is_test && self.unit_tests && built.name == PACKAGE,
            "test" => self.test_targets.contains(&built.name),
            "bin" => {
                let mut named = self.binaries.iter().chain(&self.released);
                !is_test && named.any(|(_, name)| *name == built.name)
            }
            _ => false,
        }
    }
}

/// What was built.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Built {
    /// The target's name.
    pub(crate) name: String,
    /// The target's kind: `lib`, `test` or `bin`.
    pub(crate) kind: String,
    /// The program.
    pub(crate) path: PathBuf,
}

/// The workspace's folder.
pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    // `cargo run` describes the package that it runs. Build scripts that watch these would run again each time.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let describes = ["CARGO_PKG_", "CARGO_MANIFEST_", "OUT_DIR"];
        if describes.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
    command
        .current_dir(workspace())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    command
}

/// The names of kvtransfer's test targets that begin with `prefix`.
pub(crate) fn test_targets(prefix: &str) -> Result<Vec<String>> {
    let output = cargo()
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .context("starting cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", output.status);
    }
    let facts = serde_json::from_slice(&output.stdout).context("reading cargo metadata")?;
    Ok(targets_of(&facts, prefix))
}

fn targets_of(facts: &Value, prefix: &str) -> Vec<String> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let package = list(&facts["packages"])
        .into_iter()
        .find(|package| package["name"] == PACKAGE);
    let targets = package
        .map(|package| list(&package["targets"]))
        .unwrap_or_default();
    let named = targets
        .iter()
        .filter(|target| list(&target["kind"]).contains(&Value::from("test")))
        .filter_map(|target| target["name"].as_str())
        .filter(|name| name.starts_with(prefix));
    named.map(str::to_owned).collect()
}

/// Builds; what cargo says goes to the terminal.
pub(crate) fn build(wanted: &Wanted) -> Result<Vec<Built>> {
    if wanted.as_tested {
        let mut command = cargo();
        command.args([
            "test",
            "--quiet",
            "--no-run",
            "--message-format=json",
            "--workspace",
        ]);
        return programs(command, wanted);
    }
    let mut built = Vec::new();
    if wanted.unit_tests || !wanted.test_targets.is_empty() {
        let mut command = cargo();
        command.args([
            "test",
            "--quiet",
            "--no-run",
            "--message-format=json",
            "--package",
            PACKAGE,
        ]);
        command.args(["--features", "testing"]);
        if wanted.unit_tests {
            command.arg("--lib");
        }
        for target in &wanted.test_targets {
            command.args(["--test", target]);
        }
        built.extend(programs(command, wanted)?);
    }
    let binaries = wanted.binaries.iter().map(|binary| (binary, None));
    let released = wanted.released.iter();
    for ((package, binary), profile) in
        binaries.chain(released.map(|binary| (binary, Some("--release"))))
    {
        let mut command = cargo();
        command.args(["build", "--quiet", "--message-format=json"]);
        command.args(profile);
        command.args(["--package", package, "--bin", binary]);
        built.extend(programs(command, wanted)?);
    }
    Ok(built)
}

fn programs(mut command: Command, wanted: &Wanted) -> Result<Vec<Built>> {
    let output = command.output().context("starting cargo")?;
    if !output.status.success() {
        bail!("{command:?}: {}", output.status);
    }
    programs_of(&String::from_utf8_lossy(&output.stdout), wanted)
}

/// The wanted executables among cargo's messages.
fn programs_of(messages: &str, wanted: &Wanted) -> Result<Vec<Built>> {
    let mut built = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("reading cargo's messages")?;
        let target = &message["target"];
        let fields = (
            message["executable"].as_str(),
            target["name"].as_str(),
            target["kind"][0].as_str(),
        );
        if let (Some(path), Some(name), Some(kind)) = fields {
            let program = Built {
                name: name.to_owned(),
                kind: kind.to_owned(),
                path: path.into(),
            };
            let is_test = message["profile"]["test"] == true;
            if wanted.has(&program, is_test) && !built.contains(&program) {
                built.push(program);
            }
        }
    }
    Ok(built)
}

/// How many tests of a built test program a filter leaves; all of them, ignored or not, unless `ignored_only`.
pub(crate) fn tests_in(program: &Path, filter: Option<&str>, ignored_only: bool) -> Result<usize> {
    let which = if ignored_only {
        "--ignored"
    } else {
        "--include-ignored"
    };
    let output = Command::new(program)
        .args(filter)
        .args([which, "--list", "--format=terse"])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    if !output.status.success() {
        bail!("{} --list: {}", program.display(), output.status);
    }
    let listing = String::from_utf8_lossy(&output.stdout);
    Ok(listing
        .lines()
        .filter(|line| line.ends_with(": test"))
        .count())
}

/// Copies a program without what only a debugger reads; backtraces keep their names.
pub(crate) fn stripped(program: &Path, folder: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program without a name")?;
    let target = folder.join(name);
    let ended = Command::new("strip")
        .args(["--strip-debug", "-o"])
        .arg(&target)
        .arg(program)
        .status()
        .context("starting strip")?;
    if !ended.success() {
        bail!("strip {}: {ended}", program.display());
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executables_are_found_among_cargos_messages() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"serde"},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"rdma_x"},"profile":{"test":true},"executable":"/t/rdma \"x\""}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"other"},"profile":{"test":true},"executable":"/t/other"}
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"demo"},"profile":{"test":true},"executable":"/t/demo-tests"}
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"demo"},"profile":{"test":false},"executable":"/t/demo"}
{"reason":"build-finished","success":true}"#;
        let wanted = Wanted {
            test_targets: BTreeSet::from(["rdma_x".to_owned()]),
            binaries: BTreeSet::from([("examples".to_owned(), "demo".to_owned())]),
            ..Wanted::default()
        };
        let program = |kind: &str, name: &str, path: &str| Built {
            name: name.to_owned(),
            kind: kind.to_owned(),
            path: path.into(),
        };
        let expected = [
            program("test", "rdma_x", "/t/rdma \"x\""),
            program("bin", "demo", "/t/demo"),
        ];
        assert_eq!(programs_of(messages, &wanted).expect("valid"), expected);
    }

    #[test]
    fn only_our_packages_tests_with_the_prefix_count() {
        let facts = serde_json::json!({"packages": [
            {"name": "kvrouter", "targets": [{"kind": ["test"], "name": "rdma_other"}]},
            {"name": "kvtransfer", "targets": [
                {"kind": ["lib"], "name": "rdma_lib"},
                {"kind": ["test"], "name": "rdma_one"},
                {"kind": ["test"], "name": "tidy"},
            ]},
        ]});
        assert_eq!(targets_of(&facts, "rdma_"), ["rdma_one"]);
        assert!(targets_of(&serde_json::json!({}), "rdma_").is_empty());
    }

    #[test]
    fn this_programs_own_tests_can_be_counted() {
        let this = std::env::current_exe().expect("a test program");
        assert!(tests_in(&this, None, false).expect("it lists") > 10);
        assert_eq!(
            tests_in(&this, Some("no::such::test"), false).expect("it lists"),
            0
        );
        assert_eq!(tests_in(&this, None, true).expect("it lists"), 0);
    }
}
