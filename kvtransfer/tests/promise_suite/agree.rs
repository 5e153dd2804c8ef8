//! Promises P7 and P9: layouts are agreed before bytes move, off means off, strangers are turned away in words.

use std::collections::HashSet;

use kvtransfer::{
    config::EngineConfig,
    engine::{ConnectError, Engine},
    layout::{Attention, Layout},
    wire::control::Control,
};

use super::{
    child::{Other, Path},
    raw::{Raw, hello, open_lane},
    rig::{self, PAGE, WATCHDOG},
};

/// Connects an engine with a changed layout; the sentence with which it is refused.
fn refusal(change: impl FnOnce(&mut Layout)) -> String {
    let engine = rig::start(rig::listening(EngineConfig::default()));
    let mut layout = rig::layout();
    change(&mut layout);
    let other = Engine::start(EngineConfig::default(), rig::memory(), layout);
    let other = other.expect("good in itself");
    let address = engine.local_addr().expect("it listens");
    let error = other.connect(address, WATCHDOG).expect_err("unlike");
    assert!(other.peers().is_empty() && engine.peers().is_empty());
    match error {
        ConnectError::Refused { reason, .. } => reason,
        error => panic!("{error}"),
    }
}

fn names_both(sentence: &str, ours: &str, theirs: &str) {
    assert!(
        sentence.contains(ours) && sentence.contains(theirs),
        "{sentence:?} should name {ours} and {theirs}"
    );
}

#[test]
fn another_page_size_is_refused_with_both_values() {
    let sentence = refusal(|layout| layout.page_size = 32);
    names_both(&sentence, "16", "32");
    assert!(sentence.contains("page size"), "{sentence}");
}

#[test]
fn another_item_length_is_refused_with_both_values() {
    let sentence = refusal(|layout| {
        for entry in &mut layout.components[0].entries {
            entry.item_len /= 2;
        }
    });
    names_both(&sentence, &PAGE.to_string(), &(PAGE / 2).to_string());
    let sentence = refusal(|layout| layout.components[1].entries[0].item_len = 32);
    names_both(&sentence, "64", "32");
    assert!(sentence.contains("aux"), "{sentence}");
}

#[test]
fn another_dtype_is_refused_with_both_values() {
    let sentence = refusal(|layout| layout.kv_dtype = "float8_e4m3fn".into());
    names_both(&sentence, "bfloat16", "float8_e4m3fn");
}

#[test]
fn another_head_count_is_refused_with_both_values() {
    let sentence = refusal(|layout| {
        layout.attention = Attention::Heads {
            total_kv_heads: 8,
            rank_kv_heads: 8,
        };
    });
    names_both(&sentence, "4 in total", "8");
}

#[test]
fn other_layer_ids_are_refused_with_the_layer() {
    let named = |layout: &mut Layout, id| {
        for entry in &mut layout.components[0].entries {
            entry.layer_id = Some(id);
        }
    };
    let sentence = refusal(|layout| named(layout, 0));
    names_both(&sentence, "layer ids at the", "none at the");
    // Both name their layers, but not the same ones.
    let start = |id| {
        let mut layout = rig::layout();
        layout.layers = 0..8;
        named(&mut layout, id);
        let config = rig::listening(EngineConfig::default());
        Engine::start(config, rig::memory(), layout).expect("good in itself")
    };
    let (three, five) = (start(3), start(5));
    let address = three.local_addr().expect("it listens");
    let error = five.connect(address, WATCHDOG).expect_err("unlike");
    let sentence = error.to_string();
    assert!(sentence.contains("layer 3") || sentence.contains("layer 5"));
    names_both(&sentence, "at the source", "at the target");
}

/// Inodes of a process's sockets that listen, TCP and Unix.
fn listeners(pid: u32) -> (usize, usize) {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("our own child");
    let own: HashSet<String> = fds
        .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
        .filter_map(|link| {
            let text = link.to_string_lossy().into_owned();
            Some(text.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    let count = |file: &str, state: usize, listens: &str, inode: usize| {
        let table = std::fs::read_to_string(format!("/proc/{pid}/net/{file}")).unwrap_or_default();
        let lines = table.lines().skip(1).map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.get(state) == Some(&listens)
                && words.get(inode).is_some_and(|inode| own.contains(*inode))
        });
        lines.filter(|is_ours| *is_ours).count()
    };
    let tcp = count("tcp", 3, "0A", 9) + count("tcp6", 3, "0A", 9);
    // Bit 16 of the flags is __SO_ACCEPTON (include/linux/net.h): the socket listens.
    (tcp, count("unix", 3, "00010000", 6))
}

#[test]
fn an_engine_listens_only_where_it_was_asked_to() {
    let mut silent = Other::start(Path::Pull, None);
    let engine = rig::start(rig::listening(Path::Pull.config()));
    // It works, so it has started whatever it starts.
    silent.connect(engine.local_addr().expect("it listens"));
    assert_eq!(listeners(silent.pid()), (0, 0), "off by default is off");
    let tcp_only = Other::start(Path::Tcp, Some(([127, 0, 0, 1], 0).into()));
    tcp_only.address();
    assert_eq!(listeners(tcp_only.pid()), (1, 0), "no same-host socket");
    let both = Other::start(Path::Pull, Some(([127, 0, 0, 1], 0).into()));
    both.address();
    assert_eq!(listeners(both.pid()), (1, 1), "tcp and same-host");
}

fn with_token(token: Option<&str>) -> EngineConfig {
    let mut config = EngineConfig::default();
    config.token = token.map(str::to_owned);
    config
}

#[test]
fn a_wrong_token_is_refused_in_words_on_every_stream() {
    let engine = rig::start(rig::listening(with_token(Some("open sesame"))));
    let address = engine.local_addr().expect("it listens");
    for wrong in [
        None,
        Some("open"),
        Some("open sesamE"),
        Some("open sesame "),
    ] {
        let other = rig::start(with_token(wrong));
        let error = other.connect(address, WATCHDOG).expect_err("wrong token");
        let sentence = error.to_string();
        assert!(sentence.contains("wrong or missing token"), "{sentence}");
        assert!(!sentence.contains("sesame"), "no token is told: {sentence}");
    }
    let mut raw = Raw::dial(address);
    let mut good = hello(1, 1);
    good.token = b"open sesame".to_vec();
    raw.say(&Control::Hello(Box::new(good)));
    assert!(matches!(raw.hear(), Some(Control::Welcome(_))));
    for wrong in [&b""[..], b"open sesamE"] {
        let (mut lane, answer) = open_lane(address, 1, 0, wrong);
        assert!(
            matches!(&answer, Control::Reject { reason } if reason.contains("wrong or missing token")),
            "{answer:?}"
        );
        assert!(lane.hear().is_none(), "the connection is closed");
    }
    let (_lane, answer) = open_lane(address, 1, 0, b"open sesame");
    assert!(matches!(answer, Control::LaneReady { .. }), "{answer:?}");
    let welcome = rig::start(with_token(Some("open sesame")));
    welcome.connect(address, WATCHDOG).expect("the right token");
}
