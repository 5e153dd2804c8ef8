//! Settings that change while the router runs.

use std::path::PathBuf;

use crate::fakes::{FakeWorker, Running, soon, whole};
use crate::process::Process;

/// A request body of 60 bytes.
const BODY: &str = r#"{"text":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}"#;

async fn status(router: &Running) -> u16 {
    whole(router.post("/generate", BODY).await).await.0
}

async fn until_status(router: &Running, wanted: u16) {
    soon(async {
        while status(router).await != wanted {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Whether pairs are chosen so.
async fn decides_by(router: &Running, name: &str) -> bool {
    let (_, state) = router.read("/debug/state").await;
    state.contains(&format!("\"policy\":\"{name}\""))
}

fn path(name: &str) -> PathBuf {
    let name = format!("kvrouter-reload-{}-{name}", std::process::id());
    std::env::temp_dir().join(name)
}

#[tokio::test]
async fn a_changed_file_takes_effect_and_a_bad_one_does_not() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let file = path("file.toml");
    let first = "max-body-bytes = 20\nprobe-interval = 7\npolicy = 'random'\n";
    std::fs::write(&file, first).unwrap();
    let mut process = Process::start(&prefill, &decode, |command| {
        command.arg("--config").arg(&file);
    })
    .await;
    let router = Running::elsewhere(&process.router.url);
    assert_eq!(status(&router).await, 413);
    assert!(decides_by(&router, "random").await);

    std::fs::write(&file, "max-body-bytes = 200\nprobe-interval = 8\n").unwrap();
    let line = process.line("new settings are in effect").await;
    assert!(line.contains("max-body-bytes"), "{line}");
    let line = process.line("needs a restart").await;
    assert!(line.contains("probe-interval"), "{line}");
    assert_eq!(status(&router).await, 200);
    // Left out of the file, the policy is the default again.
    assert!(decides_by(&router, "fused").await);

    std::fs::write(&file, "max-body-bytes = 10\nmax-attempts = 99\n").unwrap();
    let line = process.line("the old ones stay").await;
    assert!(
        line.contains("--max-attempts must be from 1 to 16"),
        "{line}"
    );
    assert_eq!(status(&router).await, 200);
    let rejected = "kvrouter_config_reloads_total{result=\"rejected\"}";
    assert_eq!(router.metric(rejected).await, 1);
    assert_eq!(router.metric("kvrouter_config_reload_success").await, 0);

    // As Kubernetes exchanges the file of a ConfigMap: another one behind the same name.
    let other = path("other.toml");
    std::fs::write(&other, "max-body-bytes = 10\nprobe-interval = 7\n").unwrap();
    std::fs::rename(&other, &file).unwrap();
    process.line("new settings are in effect").await;
    assert_eq!(status(&router).await, 413);
    assert_eq!(router.metric("kvrouter_config_reload_success").await, 1);
    let applied = "kvrouter_config_reloads_total{result=\"applied\"}";
    assert_eq!(router.metric(applied).await, 2);

    // A file that is gone is a bad one too.
    std::fs::remove_file(&file).unwrap();
    process.line("cannot be read").await;
    assert_eq!(status(&router).await, 413);
}

#[tokio::test]
async fn sighup_reads_again_and_ends_nothing() {
    let (prefill, decode) = (FakeWorker::start().await, FakeWorker::start().await);
    let file = path("hangup.toml");
    std::fs::write(&file, "").unwrap();
    let mut process = Process::start(&prefill, &decode, |command| {
        command.arg("--config").arg(&file);
    })
    .await;
    process.signal("-HUP").await;
    process.line("nothing has changed").await;
    std::fs::write(
        &file,
        "log-level = 'kvrouter=debug'\nmax-body-bytes = 20\nno-ui = true\n",
    )
    .unwrap();
    process.signal("-HUP").await;
    let line = process.line("new settings are in effect").await;
    assert!(
        line.contains("max-body-bytes") && line.contains("log-level"),
        "{line}"
    );
    let router = Running::elsewhere(&process.router.url);
    until_status(&router, 413).await;
    assert_eq!(router.read("/ui").await.0, 501);
    assert_eq!(router.read("/debug/state").await.0, 501);
    std::fs::remove_file(&file).unwrap();
    // Without a client the router only debugs.
    drop(router);
    process.signal("-TERM").await;
    assert!(soon(process.child.wait()).await.unwrap().success());
}
