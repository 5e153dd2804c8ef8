use super::PairEndpoint::{Chat, Completions, Generate};
use super::*;

#[test]
fn batches_are_told_from_single_prompts() {
    for (endpoint, body, batch) in [
        (Generate, r#"{"text":"a"}"#, None),
        (Generate, r#"{"text":["a","b"]}"#, Some(2)),
        (Generate, r#"{"text":["a"]}"#, Some(1)),
        (Generate, r#"{"input_ids":[1,2,3]}"#, None),
        (Generate, r#"{"input_ids":[[1,2],[3],[]]}"#, Some(3)),
        (Generate, r#"{"text":null,"input_ids":[[1],[2]]}"#, Some(2)),
        (Generate, r#"{"input_embeds":[[0.1,0.2],[0.3,0.4]]}"#, None),
        (
            Generate,
            r#"{"input_embeds":[[[0.1],[0.2]],[[0.3]]]}"#,
            Some(2),
        ),
        (Generate, r#"{"text":"a","text":["b","c"]}"#, Some(2)),
        (Completions, r#"{"prompt":"a"}"#, None),
        (Completions, r#"{"prompt":["a","b"]}"#, Some(2)),
        (Completions, r#"{"prompt":[1,2,3]}"#, None),
        (Completions, r#"{"prompt":[[1],[2]]}"#, Some(2)),
        (
            Chat,
            r#"{"messages":[{"a":1},{"b":2}],"prompt":["x"]}"#,
            None,
        ),
        (Chat, "{}", None),
    ] {
        assert_eq!(
            read(endpoint, body.as_bytes()).unwrap().batch,
            batch,
            "{body}"
        );
    }
}

#[test]
fn several_choices_are_refused() {
    for (endpoint, body) in [
        (Chat, r#"{"n":2}"#),
        (Chat, r#"{"n":2.0}"#),
        (Chat, r#"{"n":"3"}"#),
        (Chat, r#"{"n":1,"n":2}"#),
        (Completions, r#"{"prompt":"a","n":4}"#),
        (Generate, r#"{"text":"a","sampling_params":{"n":2}}"#),
        (
            Generate,
            r#"{"text":["a","b"],"sampling_params":[{"n":1},{"\u006e":2}]}"#,
        ),
    ] {
        assert_eq!(
            read(endpoint, body.as_bytes()).unwrap_err(),
            ShapeError::SeveralChoices,
            "{body}"
        );
    }
    for (endpoint, body) in [
        (Chat, r#"{"n":1}"#),
        (Chat, r#"{"n":null}"#),
        (Chat, r#"{"n":true}"#),
        // Not where this endpoint keeps it; the engine ignores it.
        (Generate, r#"{"text":"a","n":2}"#),
        (
            Generate,
            r#"{"text":"a","sampling_params":{"n":1,"x":{"n":5}}}"#,
        ),
        (Generate, r#"{"text":"a","sampling_params":null}"#),
    ] {
        assert!(read(endpoint, body.as_bytes()).is_ok(), "{body}");
    }
}

#[test]
fn ids_are_those_the_workers_will_know() {
    for (body, rids) in [
        (r#"{"text":"a"}"#, &[][..]),
        (r#"{"text":"a","rid":null}"#, &[]),
        (r#"{"text":"a","rid":"x\"y"}"#, &[r#""x\"y""#]),
        (r#"{"text":["a","b"],"rid":"x"}"#, &[r#""x_0""#, r#""x_1""#]),
        (
            r#"{"text":["a","b"],"rid":["x","y"]}"#,
            &[r#""x""#, r#""y""#],
        ),
    ] {
        assert_eq!(
            read(Generate, body.as_bytes()).unwrap().client_rids,
            rids,
            "{body}"
        );
    }
}

#[test]
fn ids_are_bounded() {
    // Two of the bytes are the quotes.
    let body = |bytes: usize| format!("{{\"text\":\"a\",\"rid\":\"{}\"}}", "x".repeat(bytes - 2));
    assert!(read(Generate, body(RID_BYTES_MAX).as_bytes()).is_ok());
    let error = read(Generate, body(RID_BYTES_MAX + 1).as_bytes()).unwrap_err();
    assert_eq!(error, ShapeError::RidTooLong);
}

#[test]
fn batches_are_bounded() {
    let body = |items| format!("{{\"text\":[{}]}}", vec!["\"\""; items].join(","));
    assert_eq!(
        read(Generate, body(BATCH_MAX).as_bytes()).unwrap().batch,
        Some(BATCH_MAX)
    );
    let error = read(Generate, body(BATCH_MAX + 1).as_bytes()).unwrap_err();
    assert_eq!(
        error,
        ShapeError::BatchTooLarge {
            items: BATCH_MAX + 1
        }
    );
    assert_eq!(
        read(Generate, body(0).as_bytes()).unwrap_err(),
        ShapeError::EmptyBatch
    );
}

#[test]
fn what_only_the_router_may_set_is_dropped() {
    let body = r#"{"routed_dp_rank":3,"text":"a","bootstrap_pair_key":1,"data_parallel_rank":2,"rid":null,
        "disagg_prefill_dp_rank":1,"zzz":{"kv":1}}"#;
    let shape = read(Generate, body.as_bytes()).unwrap();
    let edited = shape.scan.inject(body.as_bytes(), b"\"rid\":\"r\"");
    let edited = String::from_utf8(edited).unwrap();
    assert_eq!(edited, r#"{"rid":"r","text":"a","zzz":{"kv":1}}"#);
}

const SAMPLES: [&str; 5] = [
    r#"{"text":["a","b"],"sampling_params":[{"n":1},{"max_new_tokens":4}],"rid":["x","y"],"stream":true}"#,
    r#"{"input_ids":[[1,2],[3]],"bootstrap_room":[1,2],"bootstrap_host":"h","rid":"x","zzz":1e400}"#,
    r#"{"model":"m","messages":[{"role":"user","content":"h\u00e9\ud83d\ude00"}],"n":1,"max_tokens":50}"#,
    r#"{"prompt":[1,2,3],"bootstrap_\u0072oom":12345678901234567890123,"temperature":-0.5e-3}"#,
    r#"{"input_embeds":[[[0.5],[1]]],"rid":null,"routed_dp_rank":0}"#,
];

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(10_000))]
    #[test]
    fn mutated_bodies_never_panic(
        sample in 0..SAMPLES.len(),
        cut in proptest::option::of(proptest::prelude::any::<proptest::sample::Index>()),
        changes in proptest::collection::vec(
            (proptest::prelude::any::<proptest::sample::Index>(), 0..3u8, proptest::prelude::any::<u8>()), 0..6),
    ) {
        let mut body = SAMPLES[sample].as_bytes().to_vec();
        if let Some(cut) = cut {
            body.truncate(cut.index(body.len()).max(1));
        }
        for (index, action, byte) in changes {
            let at = index.index(body.len());
            let syntax = b"{}[]\",:\\01e-"[usize::from(byte) % 12];
            match action {
                0 => body[at] = byte,
                1 => body.insert(at, syntax),
                _ => body[at] = syntax,
            }
        }
        for endpoint in [Generate, Chat, Completions] {
            if let Ok(shape) = read(endpoint, &body) {
                let edited = shape.scan.inject(&body, b"\"bootstrap_room\":1");
                // What is sent on is an object again, and none of ours is left but the one put in.
                let again = read(endpoint, &edited).unwrap();
                proptest::prop_assert_eq!(again.batch, shape.batch);
                proptest::prop_assert_eq!(again.client_rids, shape.client_rids);
            }
        }
    }
}
