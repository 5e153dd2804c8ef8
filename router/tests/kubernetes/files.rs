//! Workers described in files.

use std::path::PathBuf;
use std::time::Duration;

use kvrouter::discover::{file, fleet_file};
use tokio::task::JoinSet;

use crate::fakes::soon;

/// A file that is gone after the test.
struct TestFile(PathBuf);

impl TestFile {
    fn new(name: &str, text: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("kvrouter-test-{}-{name}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn write(&self, text: &str) {
        std::fs::write(&self.0, text).unwrap();
    }
}

impl Drop for TestFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn workers(names: &[&str]) -> String {
    let lines = names.iter().enumerate().map(|(at, name)| {
        format!("  - {{role: prefill, name: {name}, url: 'http://10.0.0.{at}:8000'}}\n")
    });
    format!("workers:\n{}", lines.collect::<String>())
}

fn follow(
    file: &TestFile,
    tasks: &mut JoinSet<()>,
) -> Result<kvrouter::discover::FleetWatch, file::FileError> {
    let reader = Box::new(|text: &str| fleet_file::read(text, false));
    file::start(file.0.clone(), Duration::from_millis(10), reader, tasks)
}

#[tokio::test]
async fn a_file_is_followed_and_mistakes_in_it_change_nothing() {
    let file = TestFile::new("follow.yaml", &workers(&["b", "a"]));
    let mut tasks = JoinSet::new();
    let mut fleet = follow(&file, &mut tasks).unwrap();
    let names = |fleet: &kvrouter::discover::Fleet| -> Vec<String> {
        fleet
            .members
            .iter()
            .map(|member| member.name.clone())
            .collect()
    };
    assert_eq!(names(&fleet.borrow_and_update()), ["a", "b"]);
    for broken in [
        "workers: [",
        "workers: [{role: boss, url: 'http://a:1'}]",
        &workers(&["a", "a"]),
    ] {
        file.write(broken);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!fleet.has_changed().unwrap(), "{broken}");
    }
    std::fs::remove_file(&file.0).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!fleet.has_changed().unwrap());
    file.write(&workers(&["c"]));
    soon(fleet.changed()).await.unwrap();
    assert_eq!(names(&fleet.borrow_and_update()), ["c"]);
}

#[tokio::test]
async fn a_start_with_a_bad_file_fails_and_says_where() {
    let file = TestFile::new(
        "start.yaml",
        "workers:\n  - role: prefill\n    uri: 'http://a:1'\n",
    );
    let error = follow(&file, &mut JoinSet::new()).unwrap_err().to_string();
    assert!(
        error.contains("start.yaml:3: ") && error.contains("uri"),
        "{error}"
    );
    let twice = TestFile::new(
        "twice.yaml",
        "workers: [{role: p, url: 'http://a:1', name: x}, {role: d, url: 'http://a:1', name: y}]",
    );
    let error = follow(&twice, &mut JoinSet::new()).unwrap_err().to_string();
    assert!(
        error.contains("two workers have the address a:1"),
        "{error}"
    );
}
