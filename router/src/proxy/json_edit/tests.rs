use proptest::prelude::*;
use serde_json::{Map, Value as Json};

use super::cursor::plain_prefix;
use super::*;

fn keep_all(_: &[u8], _: &Value) -> Disposition {
    Disposition::Keep
}

fn drop_ours(key: &[u8], _: &Value) -> Disposition {
    if key.starts_with(b"bootstrap_") {
        Disposition::Drop
    } else {
        Disposition::Keep
    }
}

fn edit(body: &str) -> String {
    let scan = scan(body.as_bytes(), drop_ours).unwrap();
    String::from_utf8(scan.inject(body.as_bytes(), br#""bootstrap_room":1"#)).unwrap()
}

#[test]
fn unknown_bytes_survive() {
    for (body, edited) in [
        ("{}", r#"{"bootstrap_room":1}"#),
        (" { } ", r#" {"bootstrap_room":1} "#),
        (
            "{\"a\" : 1e400 ,\n \"b\":12345678901234567890123 }",
            "{\"bootstrap_room\":1,\"a\" : 1e400 ,\n \"b\":12345678901234567890123}",
        ),
        (r#"{"bootstrap_room":7}"#, r#"{"bootstrap_room":1}"#),
        (
            r#"{"bootstrap_room":7,"a":1,"bootstrap_\u0072oom":8,"b":2,"bootstrap_room":[9]}"#,
            r#"{"bootstrap_room":1,"a":1,"b":2}"#,
        ),
        (
            r#"{"a":{"bootstrap_room":5},"\u0062ootstrap_host":{"x":[1,"}"]},"b":"\\\"{"}"#,
            r#"{"bootstrap_room":1,"a":{"bootstrap_room":5},"b":"\\\"{"}"#,
        ),
        (
            r#"{"日本":"語\ud83d\ude00\ud800","a":-0.5E-7}"#,
            r#"{"bootstrap_room":1,"日本":"語\ud83d\ude00\ud800","a":-0.5E-7}"#,
        ),
    ] {
        assert_eq!(edit(body), edited);
    }
}

#[test]
fn malformed_bodies_are_refused() {
    use JsonError::{NotAnObject, Truncated, Unexpected};
    let unexpected = |at, found| Unexpected { at, found };
    for (body, error) in [
        ("", NotAnObject),
        ("[]", NotAnObject),
        ("1", NotAnObject),
        ("\u{feff}{}", NotAnObject),
        ("{", Truncated { at: 1 }),
        (r#"{"a"#, Truncated { at: 3 }),
        (r#"{"a":"#, Truncated { at: 5 }),
        (r#"{"a":1"#, Truncated { at: 6 }),
        (r#"{"a":[1,{"b":"#, Truncated { at: 13 }),
        (r#"{"a":1}x"#, unexpected(7, b'x')),
        (r#"{"a":1,}"#, unexpected(7, b'}')),
        (r#"{a:1}"#, unexpected(1, b'a')),
        (r#"{"a" 1}"#, unexpected(5, b'1')),
        (r#"{"a":[1,]}"#, unexpected(8, b']')),
        (r#"{"a":[1}}"#, unexpected(7, b'}')),
        (r#"{"a":{"b":1]}"#, unexpected(11, b']')),
        (r#"{"a":01}"#, unexpected(6, b'1')),
        (r#"{"a":1.}"#, unexpected(7, b'}')),
        (r#"{"a":-}"#, unexpected(6, b'}')),
        (r#"{"a":+1}"#, unexpected(5, b'+')),
        (r#"{"a":1e}"#, unexpected(7, b'}')),
        (r#"{"a":tru}"#, unexpected(8, b'}')),
        (r#"{"a":NaN}"#, unexpected(5, b'N')),
        (r#"{"a":"\x"}"#, unexpected(7, b'x')),
        (r#"{"a":"\u12g4"}"#, unexpected(10, b'g')),
        ("{\"a\":\"\n\"}", unexpected(6, b'\n')),
        ("{\"a\":\"0123456789\u{1}\"}", unexpected(16, 1)),
    ] {
        assert_eq!(
            scan(body.as_bytes(), keep_all).unwrap_err(),
            error,
            "{body}"
        );
    }
    assert_eq!(
        scan(b"{\"a\":\"\xff\"}", keep_all).unwrap_err(),
        JsonError::NotUtf8 { at: 6 }
    );
}

#[test]
fn nesting_is_bounded() {
    let nested = |levels: usize| format!("{{\"a\":{}{}}}", "[".repeat(levels), "]".repeat(levels));
    // The object itself is the first level.
    assert!(scan(nested(DEPTH_MAX - 1).as_bytes(), keep_all).is_ok());
    let error = scan(nested(DEPTH_MAX).as_bytes(), keep_all).unwrap_err();
    assert_eq!(
        error,
        JsonError::TooDeep {
            at: 5 + DEPTH_MAX - 1
        }
    );
    let mixed = "{\"a\":[".repeat(1_000_000);
    assert!(matches!(
        scan(mixed.as_bytes(), keep_all),
        Err(JsonError::TooDeep { .. })
    ));
}

#[test]
fn dropped_members_are_bounded() {
    let body = |count| format!("{{{}}}", vec!["\"bootstrap_x\":1"; count].join(","));
    assert!(scan(body(DROPPED_MAX).as_bytes(), drop_ours).is_ok());
    let error = scan(body(DROPPED_MAX + 1).as_bytes(), drop_ours).unwrap_err();
    assert_eq!(error, JsonError::TooManyDropped);
}

#[test]
fn values_are_described() {
    let note = |_: &[u8], _: &Value| Disposition::Note(0);
    for (body, kind, items, first, first_inner) in [
        (r#"{"a":[1,2,3]}"#, Kind::Array, 3, Some(Kind::Number), None),
        (r#"{"a":[]}"#, Kind::Array, 0, None, None),
        (
            r#"{"a":[[1,2],[3],[]]}"#,
            Kind::Array,
            3,
            Some(Kind::Array),
            Some(Kind::Number),
        ),
        (
            r#"{"a":[[[0.5]],[[1]]]}"#,
            Kind::Array,
            2,
            Some(Kind::Array),
            Some(Kind::Array),
        ),
        (r#"{"a":[[],[1]]}"#, Kind::Array, 2, Some(Kind::Array), None),
        (
            r#"{"a":["x",[1]]}"#,
            Kind::Array,
            2,
            Some(Kind::String),
            None,
        ),
        (r#"{"a":{"b":[1,2]}}"#, Kind::Object, 0, None, None),
        (r#"{"a":1,"a":"last"}"#, Kind::String, 0, None, None),
    ] {
        let scan = scan(body.as_bytes(), note).unwrap();
        let value = scan.noted(0).unwrap();
        assert_eq!(
            (value.kind, value.items, value.first, value.first_inner),
            (kind, items, first, first_inner),
            "{body}"
        );
    }
    assert!(
        scan(br#"{"a":1,"a":null}"#, note)
            .unwrap()
            .noted(0)
            .is_none()
    );
}

#[test]
fn elements_are_found() {
    let array = br#" [1] "#;
    assert!(elements(array, 9).is_err());
    let array = br#"["a",[1,2] , {"b":3}]"#;
    let found: Vec<_> = elements(array, 9)
        .unwrap()
        .into_iter()
        .map(|range| &array[range])
        .collect();
    assert_eq!(found, [&b"\"a\""[..], b"[1,2]", b"{\"b\":3}"]);
    assert_eq!(elements(array, 2).unwrap().len(), 2);
    assert!(elements(b"[ ]", 2).unwrap().is_empty());
}

#[test]
fn eight_byte_steps_equal_single_steps() {
    let slow = |bytes: &[u8]| {
        bytes
            .iter()
            .take_while(|byte| !matches!(byte, b'"' | b'\\' | 0..0x20))
            .count()
    };
    for special in 0..=255u8 {
        for at in 0..24 {
            for filler in [b' ', b'!', b'#', b'[', b']', 0x7f, 0x80, 0xff] {
                let mut bytes = [filler; 24];
                bytes[at] = special;
                assert_eq!(
                    plain_prefix(&bytes),
                    slow(&bytes),
                    "{special} at {at} among {filler}"
                );
            }
        }
    }
}

/// Keys that often are ours, in plain or escaped letters.
fn key() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("bootstrap_room".to_owned()),
        Just("bootstrap_host".to_owned()),
        "[a-z]{0,4}",
        any::<String>(),
    ]
}

fn json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        any::<String>().prop_map(Json::from),
    ];
    leaf.prop_recursive(5, 60, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Json::from),
            prop::collection::vec((key(), inner), 0..6)
                .prop_map(|members| Json::Object(members.into_iter().collect())),
        ]
    })
}

/// Writes one member, each letter of the key as an escape if asked.
fn write_member((key, value, escape): &(String, Json, bool), space: &str) -> String {
    let key = if *escape {
        key.encode_utf16()
            .map(|unit| format!("\\u{unit:04x}"))
            .collect()
    } else {
        let quoted = Json::from(key.as_str()).to_string();
        quoted[1..quoted.len() - 1].to_owned()
    };
    format!("\"{key}\"{space}:{space}{value}")
}

/// Writes members with odd spacing; duplicates stay duplicates.
fn write(members: &[(String, Json, bool)], space: &str) -> String {
    let parts: Vec<String> = members
        .iter()
        .map(|member| format!("{space}{}{space}", write_member(member, space)))
        .collect();
    format!("{space}{{{}{space}}}{space}", parts.join(","))
}

proptest! {
    #[test]
    fn an_edit_equals_parsing_and_replacing(
        members in prop::collection::vec((key(), json(), any::<bool>()), 0..12),
        space in "[ \t\r\n]{0,2}",
    ) {
        let body = write(&members, &space);
        let mut expected: Map<String, Json> = serde_json::from_str(&body).unwrap();
        expected.retain(|key, _| !key.starts_with("bootstrap_"));
        expected.insert("bootstrap_room".to_owned(), Json::from(1));
        let edited = edit(&body);
        let found: Map<String, Json> = serde_json::from_str(&edited).unwrap();
        prop_assert_eq!(&found, &expected);
        // The foreign members are there byte for byte, with their own spacing, in their own order.
        let mut rest = edited.as_str();
        for member in members.iter().filter(|member| !member.0.starts_with("bootstrap_")) {
            let member = write_member(member, &space);
            let at = rest.find(&member);
            prop_assert!(at.is_some(), "{} lacks {}", edited, member);
            rest = &rest[at.unwrap() + member.len()..];
        }
    }

    #[test]
    fn verdicts_agree_with_serde(
        members in prop::collection::vec((key(), json(), any::<bool>()), 0..6),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 0..4),
    ) {
        let mut body = write(&members, " ").into_bytes();
        for (index, byte, action) in changes {
            let at = index.index(body.len());
            match action {
                0 => body[at] = byte,
                1 => body.insert(at, b"{}[]\",:\\0e-"[usize::from(byte) % 11]),
                _ => drop(body.remove(at)),
            }
        }
        let ours = scan(&body, drop_ours);
        let object = body.trim_ascii_start().first() == Some(&b'{');
        let theirs = object
            && std::str::from_utf8(&body).is_ok()
            && serde_json::from_slice::<serde::de::IgnoredAny>(&body).is_ok();
        prop_assert_eq!(ours.is_ok(), theirs, "{:?} {}", ours, String::from_utf8_lossy(&body));
        if let Ok(scan) = ours {
            let edited = scan.inject(&body, b"\"bootstrap_room\":1");
            prop_assert!(serde_json::from_slice::<serde::de::IgnoredAny>(&edited).is_ok());
        }
    }

    #[test]
    fn a_splice_changes_its_ranges_and_nothing_else(
        text in "[a-z]{0,40}",
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        new in prop::collection::vec("[A-Z]{0,3}", 3),
    ) {
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        cuts.sort_unstable();
        let ranges: Vec<_> = cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
        let mut expected = text.clone();
        for (range, new) in ranges.iter().zip(&new).rev() {
            expected.replace_range(range.clone(), new);
        }
        let edits = ranges.iter().cloned().zip(new.iter().map(|new| new.as_bytes().into()));
        prop_assert_eq!(splice(text.as_bytes(), edits.collect()), expected.into_bytes());
    }

    #[test]
    fn random_bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = scan(&body, drop_ours);
        let _ = elements(&body, 10);
    }
}
