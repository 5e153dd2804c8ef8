//! One schema in four places.

use std::path::PathBuf;

use crate::process::kvrouter;

const WORKERS: [&str; 5] = ["--prefill", "http://a:1", "8998", "--decode", "http://b:2"];

struct Checked {
    status: Option<i32>,
    text: String,
}

impl Checked {
    /// Value and origin of a setting.
    fn setting(&self, name: &str) -> (String, String) {
        let mut lines = self.text.lines();
        let line = lines.find(|line| line.split_whitespace().next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {}", self.text));
        let rest = line[name.len()..].trim();
        let (value, origin) = rest.split_once("  ").unwrap_or((rest, ""));
        (value.to_owned(), origin.trim().replace(", reloads", ""))
    }
}

async fn check(arguments: &[&str], variables: &[(&str, &str)]) -> Checked {
    let mut command = kvrouter();
    command.arg("check-config").args(arguments);
    command.envs(variables.iter().copied());
    let output = command.output().await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    Checked {
        status: output.status.code(),
        text: String::from_utf8(text).unwrap(),
    }
}

/// A file of this test's own.
fn file(name: &str, text: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("kvrouter-{}-{name}.toml", std::process::id()));
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test]
async fn flags_win_over_environment_over_file_over_defaults() {
    let path = file(
        "layers",
        "queue-size = 1\nqueue-timeout = '1s'\nmax-attempts = 4\nheader-overrides = true\n\
         [workers]\nprefill = ['http://p:1 8998', 'http://q:1']\ndecode = ['http://b:2', 'http://c:2']\n\
         worker = 'http://w:3'\n",
    );
    let config = path.to_str().unwrap();
    let environment = [
        ("KVROUTER_QUEUE_SIZE", "2"),
        ("KVROUTER_QUEUE_TIMEOUT", "2s"),
        ("KVROUTER_API_KEY", "secret"),
        ("KVROUTER_DECODE", "http://d:2 http://e:2"),
        // What Kubernetes sets in the namespace of a Service named kvrouter.
        ("KVROUTER_PORT", "tcp://10.0.0.1:8080"),
        ("KVROUTER_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("KVROUTER_SERVICE_HOST", "10.0.0.1"),
        ("KVROUTER_HOST", ""),
        ("KVROUTER_QUEUE_TIMEOUTS", "2s"),
    ];
    let flags = [
        "--config",
        config,
        "--queue-size",
        "3",
        "--header-overrides=false",
    ];
    let found = check(&flags, &environment).await;
    assert_eq!(found.status, Some(0), "{}", found.text);
    let at = |line: u32| format!("{config}:{line}");
    for (name, value, origin) in [
        ("queue-size", "3", "command line"),
        ("queue-timeout", "2s", "KVROUTER_QUEUE_TIMEOUT"),
        ("max-attempts", "4", &at(3)),
        ("header-overrides", "false", "command line"),
        ("prefill", "http://p:1 8998 http://q:1", &at(6)),
        ("decode", "http://d:2 http://e:2", "KVROUTER_DECODE"),
        ("worker", "http://w:3", &at(8)),
        ("port", "8080", "default"),
        ("host", "0.0.0.0", "default"),
        ("api-key", "(hidden)", "KVROUTER_API_KEY"),
        ("stall-timeout", "-", "not set"),
    ] {
        assert_eq!(
            found.setting(name),
            (value.into(), origin.into()),
            "{}",
            found.text
        );
    }
    assert!(!found.text.contains("secret"));
    let odd: Vec<_> = found
        .text
        .lines()
        .filter(|line| line.starts_with("warning: "))
        .collect();
    assert_eq!(
        odd,
        [
            "warning: KVROUTER_QUEUE_TIMEOUTS: no setting has this variable; did you mean `KVROUTER_QUEUE_TIMEOUT`?"
        ]
    );
}

#[tokio::test]
async fn mistakes_in_a_file_are_told_with_line_and_remedy() {
    let path = file(
        "mistakes",
        "pord = 80\n[limits]\nqueue-size = 'many'\npolicy = 'best'\nmax-attempts = [1, 2]\nconfig = 'x'\n",
    );
    let config = path.to_str().unwrap();
    let found = check(&["--config", config], &[]).await;
    assert_eq!(found.status, Some(2));
    for part in [
        format!("{config}:1: there is no setting `pord`; did you mean `port`?"),
        format!("{config}:3: invalid value 'many' for '--queue-size <COUNT>'"),
        format!("{config}:4: invalid value 'best' for '--policy <POLICY>' [possible values: "),
        format!("{config}:5: `max-attempts` takes one value, not a list"),
        format!("{config}:6: there is no setting `config`"),
    ] {
        assert!(found.text.contains(&part), "{part}\n{}", found.text);
    }
    let missing = check(&["--config", "/nowhere/x.toml"], &[]).await;
    assert_eq!(missing.status, Some(2));
    assert!(
        missing.text.contains("/nowhere/x.toml: cannot be read"),
        "{}",
        missing.text
    );
    // The router itself says the same and does not start.
    let output = kvrouter()
        .args(["--config", config])
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("did you mean `port`?")
    );
}

#[tokio::test]
async fn what_contradicts_itself_is_shown_and_refused() {
    let none = check(&[], &[]).await;
    assert_eq!(none.status, Some(2), "{}", none.text);
    assert!(
        none.text.contains("error: at least one --prefill"),
        "{}",
        none.text
    );
    let half = [&WORKERS[..], &["--tls-key", "k.pem"]].concat();
    let half = check(&half, &[]).await;
    assert_eq!(half.status, Some(2));
    assert!(half.text.contains("belong together"), "{}", half.text);
    let files = [
        "--tls-key",
        "/nowhere/k.pem",
        "--tls-certificate",
        "/nowhere/c.pem",
    ];
    let unread = check(&[&WORKERS[..], &files].concat(), &[]).await;
    assert_eq!(unread.status, Some(2));
    assert!(
        unread.text.contains("error: ") && unread.text.contains("/nowhere/c.pem"),
        "{}",
        unread.text
    );
    let wrong = check(&WORKERS, &[("KVROUTER_QUEUE_SIZE", "many")]).await;
    assert_eq!(wrong.status, Some(2));
    let part = "KVROUTER_QUEUE_SIZE: invalid value 'many' for '--queue-size <COUNT>'";
    assert!(wrong.text.contains(part), "{}", wrong.text);
    for (option, value, part) in [
        ("--otlp-sample-ratio", "1.5", "from 0 to 1"),
        ("--otlp-endpoint", "http://c:4317", "4318"),
        ("--otlp-endpoint", "c:4318", "http://"),
        ("--log-level", "kvrouter=loud", "log-level"),
    ] {
        let found = check(&[&WORKERS[..], &[option, value]].concat(), &[]).await;
        assert_eq!(found.status, Some(2), "{option} {value}");
        assert!(found.text.contains(part), "{}", found.text);
    }
    let good = check(&WORKERS, &[]).await;
    assert_eq!(good.status, Some(0), "{}", good.text);
}

#[tokio::test]
async fn help_teaches_every_setting_once() {
    let output = kvrouter().arg("--help").output().await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "--prefill http://10.0.0.1:30000 8998",
        "Workers:",
        "Load limits:",
        "[env: KVROUTER_QUEUE_SIZE]",
        "[env: KVROUTER_DECODE, with spaces between]",
        "check-config",
        "--config <PATH>",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let settings = check(&WORKERS, &[]).await.text;
    let names = settings.lines().skip(1).filter(|line| line.contains("  "));
    for name in names.filter_map(|line| line.split_whitespace().next()) {
        let option = format!("--{name}");
        let told = text.lines().filter(|line| {
            let mut words = line
                .trim_start()
                .trim_start_matches("-h, ")
                .split([' ', '[']);
            words.next() == Some(&option)
        });
        // The first command line shows --prefill and --decode once more.
        assert!(told.count() >= 1, "{option}\n{text}");
    }
}
