use super::PairEndpoint::{Chat, Completions, Generate, Responses};
use super::*;

/// A client that may choose its ids and nothing else.
fn read(endpoint: PairEndpoint, body: &[u8]) -> Result<Shape, ShapeError> {
    let trust = Trust {
        rank: false,
        rid: true,
    };
    super::read(endpoint, body, trust)
}

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
fn bounds_of_the_answer_are_read() {
    for (endpoint, body, most) in [
        (Generate, r#"{"text":"a"}"#, Some(128)),
        (
            Generate,
            r#"{"sampling_params":{"n":1,"max_new_tokens":7}}"#,
            Some(7),
        ),
        (
            Generate,
            r#"{"sampling_params":[{"max_new_tokens":7},{"max_new_tokens":900},{}]}"#,
            Some(900),
        ),
        (
            Generate,
            r#"{"sampling_params":[{"max_new_tokens":7},{}]}"#,
            Some(128),
        ),
        (Generate, r#"{"max_tokens":7}"#, Some(128)),
        (Completions, r#"{"prompt":"a"}"#, Some(16)),
        (Completions, r#"{"prompt":"a","max_tokens":300}"#, Some(300)),
        (
            Completions,
            r#"{"prompt":"a","max_tokens":"many"}"#,
            Some(16),
        ),
        (Chat, r#"{"max_tokens":30}"#, Some(30)),
        (Chat, r#"{"max_completion_tokens":31}"#, Some(31)),
        (
            Chat,
            r#"{"max_completion_tokens":31,"max_tokens":null}"#,
            Some(31),
        ),
        (Chat, r#"{"max_tokens":-1}"#, None),
        (Chat, "{}", None),
        (Responses, r#"{"max_output_tokens":32}"#, Some(32)),
    ] {
        let shape = read(endpoint, body.as_bytes()).unwrap();
        assert_eq!(shape.output_tokens, most, "{body}");
    }
}

#[test]
fn choices_are_counted_and_taken_out() {
    for (endpoint, body, choices, single) in [
        (Chat, r#"{"n":2}"#, 2, r#"{"n":1}"#),
        (Chat, r#"{"n":2.0}"#, 2, r#"{"n":1}"#),
        (Chat, r#"{"n" : "3"}"#, 3, r#"{"n" : 1}"#),
        (Chat, r#"{"n":1,"n":2}"#, 2, r#"{"n":1,"n":1}"#),
        (
            Completions,
            r#"{"prompt":"a","n":4, "zzz":1e400}"#,
            4,
            r#"{"prompt":"a","n":1, "zzz":1e400}"#,
        ),
        (
            Generate,
            r#"{"text":"a","sampling_params":{"a":0.10,"n":2}}"#,
            2,
            r#"{"text":"a","sampling_params":{"a":0.10,"n":1}}"#,
        ),
        (
            Generate,
            r#"{"text":["a","b"],"sampling_params":[{"n":2},{"\u006e":2}]}"#,
            2,
            r#"{"text":["a","b"],"sampling_params":[{"n":1},{"\u006e":1}]}"#,
        ),
    ] {
        let shape = read(endpoint, body.as_bytes()).unwrap();
        assert_eq!(shape.choices, choices, "{body}");
        let edited = single_choice(body.as_bytes(), &shape);
        assert_eq!(String::from_utf8(edited).unwrap(), single);
    }
    let uneven = r#"{"text":["a","b"],"sampling_params":[{"n":2},{}]}"#;
    assert_eq!(
        read(Generate, uneven.as_bytes()).unwrap_err(),
        ShapeError::UnevenChoices
    );
    for body in [r#"{"n":129}"#, r#"{"n":1e300}"#] {
        let error = read(Chat, body.as_bytes()).unwrap_err();
        assert!(
            matches!(error, ShapeError::TooManyChoices { .. }),
            "{error}"
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
        assert_eq!(
            read(endpoint, body.as_bytes()).unwrap().choices,
            1,
            "{body}"
        );
    }
}

#[test]
fn what_the_schedule_wants_to_know_is_found() {
    let body = r#"{"model":"m\u00e9","priority":-3,"stream":true,"routing_key":"k","routed_dp_rank":2,"rid":"r",
        "return_logprob":true}"#;
    let shape = read(Generate, body.as_bytes()).unwrap();
    assert_eq!(
        (shape.model.as_deref(), shape.priority),
        (Some("m\u{e9}"), -3)
    );
    assert_eq!(shape.sticky.as_deref(), Some("k"));
    assert!(shape.streams && shape.wants_logprobs && shape.rank.is_none());
    let trusting = Trust {
        rank: true,
        rid: false,
    };
    let shape = super::read(Generate, body.as_bytes(), trusting).unwrap();
    assert_eq!(shape.rank, Some(2));
    assert!(shape.client_rids.is_empty());
    let sent = shape.scan.unwrap().inject(body.as_bytes(), b"");
    let sent = String::from_utf8(sent).unwrap();
    assert!(
        sent.contains("routed_dp_rank") && !sent.contains("rid"),
        "{sent}"
    );
}

#[test]
fn only_what_is_surely_plain_travels_untouched() {
    for (endpoint, body) in [
        (
            Chat,
            r#" {"messages":[{"role":"user","content":"n is a letter"}],"stream":true}"#,
        ),
        (
            Generate,
            r#"{"text":"say \"text\": [1]","sampling_params":{}}"#,
        ),
    ] {
        assert!(is_plain(endpoint, body.as_bytes()), "{body}");
    }
    for (endpoint, body) in [
        (Chat, r#"{"n":1}"#),
        (Chat, r#"{"\u006e":2}"#),
        (Chat, r#"{"routed_dp_rank":1}"#),
        (Chat, r#"{"rid":"x"}"#),
        (Chat, "[]"),
        (Completions, r#"{"prompt":"a"}"#),
        (Generate, r#"{"text" : ["a"]}"#),
        (Generate, r#"{"input_ids":[[1],[2]]}"#),
        (Generate, r#"{"text":"a","return_logprob":true}"#),
        (Generate, r#"{"text":"a","bootstrap_room":1}"#),
    ] {
        assert!(!is_plain(endpoint, body.as_bytes()), "{body}");
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
    let edited = shape
        .scan
        .as_ref()
        .unwrap()
        .inject(body.as_bytes(), b"\"rid\":\"r\"");
    let edited = String::from_utf8(edited).unwrap();
    assert_eq!(edited, r#"{"rid":"r","text":"a","zzz":{"kv":1}}"#);
}

const SAMPLES: [&str; 7] = [
    r#"{"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"stream":true,"zzz":1.0}"#,
    r#"{"text":"a","sampling_params":{"max_new_tokens":4,"n":3},"stream":false}"#,
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
                let edited = shape.scan.as_ref().unwrap().inject(&body, b"\"bootstrap_room\":1");
                // What is sent on is an object again, and none of ours is left but the one put in.
                let again = read(endpoint, &edited).unwrap();
                proptest::prop_assert_eq!(again.batch, shape.batch);
                proptest::prop_assert_eq!(&again.client_rids, &shape.client_rids);
                let single = single_choice(&body, &shape);
                proptest::prop_assert_eq!(read(endpoint, &single).unwrap().choices, 1);
                // What travels untouched is what an edit would have left untouched.
                if is_plain(endpoint, &body) {
                    proptest::prop_assert_eq!(again.batch, None);
                    proptest::prop_assert_eq!(shape.choices, 1);
                    proptest::prop_assert!(shape.client_rids.is_empty() && !shape.wants_logprobs);
                    let json: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
                    for key in json.as_object().into_iter().flat_map(|members| members.keys()) {
                        let is_ours = key.starts_with("bootstrap_") || key.contains("dp_rank") || key == "rid";
                        proptest::prop_assert!(!is_ours, "{}", key);
                    }
                }
            }
        }
    }
}
