//! The few text rules of SGLang's Python that a byte-exact registry must share: `int()`, `json.dumps`, query strings.
//!
//! The registry's clients compare and parse what `aiohttp` and `json` would have produced, so those habits (", " and
//! ": " separators, ASCII-only escapes, first query value wins) are kept here, in one place, and nowhere else.

use std::fmt::Write as _;

/// What Python's `int(text)` returns for ASCII text, or `None` where it raises.
///
/// Surrounding white space, one sign and single underscores between digits are accepted. A number beyond `i128` is
/// clamped: it is still a number that no rank has. Non-ASCII digits, which Python accepts too, are refused.
#[must_use]
pub(super) fn python_int(text: &str) -> Option<i128> {
    let text = text.trim();
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let mut value: i128 = 0;
    let mut digit_before = false;
    for byte in digits.bytes() {
        match byte {
            b'0'..=b'9' => {
                value = value
                    .saturating_mul(10)
                    .saturating_add(i128::from(byte - b'0'));
                digit_before = true;
            }
            b'_' if digit_before => digit_before = false,
            _ => return None,
        }
    }
    digit_before.then_some(if negative { -value } else { value })
}

/// Appends `text` as `json.dumps` prints a string: quoted, with everything outside printable ASCII escaped.
pub(super) fn dump_string(out: &mut String, text: &str) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(character),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}")
                        .expect("invariant: writing to a String cannot fail");
                }
            }
        }
    }
    out.push('"');
}

/// Re-spaces one valid JSON value as `json.dumps` would, keeping the order of keys and the text of numbers.
///
/// `None` if a string in it cannot be decoded (a lone surrogate), which no `requests` client sends by accident.
#[must_use]
pub(super) fn dump_raw(raw: &str) -> Option<String> {
    let mut out = String::with_capacity(raw.len() + raw.len() / 8);
    let mut rest = raw;
    while let Some(character) = rest.chars().next() {
        let width = match character {
            '"' => {
                let width = string_width(rest)?;
                let text: String = serde_json::from_str(&rest[..width]).ok()?;
                dump_string(&mut out, &text);
                width
            }
            ',' => {
                out.push_str(", ");
                1
            }
            ':' => {
                out.push_str(": ");
                1
            }
            ' ' | '\n' | '\r' | '\t' => 1,
            other => {
                out.push(other);
                other.len_utf8()
            }
        };
        rest = &rest[width..];
    }
    Some(out)
}

/// Bytes of the JSON string that `text` starts with, both quotes included.
fn string_width(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// The first value of `name` in a query string, decoded; `None` if the name does not occur.
#[must_use]
pub(super) fn query_value(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(key, true) == name).then(|| decode(value, true))
    })
}

/// Decodes `%41` (and, in a query, `+`); what is no valid escape stays as it is, and bad UTF-8 becomes U+FFFD.
#[must_use]
pub(super) fn decode(text: &str, plus_is_space: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = bytes
            .get(at + 1..at + 3)
            .and_then(|pair| Some((hex(pair[0])?, hex(pair[1])?)));
        match (bytes[at], escape) {
            (b'%', Some((high, low))) => {
                out.push(high << 4 | low);
                at += 2;
            }
            (b'+', _) if plus_is_space => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn hex(byte: u8) -> Option<u8> {
    char::from(byte)
        .to_digit(16)
        .and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn int_accepts_what_python_accepts() {
        for (text, value) in [
            ("0", Some(0)),
            ("-1", Some(-1)),
            (" +7\n", Some(7)),
            ("007", Some(7)),
            ("1_000", Some(1000)),
            ("", None),
            ("  ", None),
            ("-", None),
            ("_1", None),
            ("1_", None),
            ("1__0", None),
            ("1.0", None),
            ("0x1", None),
            ("- 1", None),
        ] {
            assert_eq!(python_int(text), value, "{text:?}");
        }
        assert_eq!(python_int(&"9".repeat(4000)), Some(i128::MAX));
    }

    #[test]
    fn strings_are_escaped_to_ascii() {
        let mut out = String::new();
        dump_string(&mut out, "a\"\\\n\u{7f}é😀\u{1}");
        assert_eq!(out, "\"a\\\"\\\\\\n\\u007f\\u00e9\\ud83d\\ude00\\u0001\"");
    }

    #[test]
    fn raw_json_is_respaced_in_its_own_order() {
        let raw = "{\"b\":[1,2.50,{ }],\n\"a\" : \"x,:\\u00e9 \\\"\"}";
        assert_eq!(
            dump_raw(raw).as_deref(),
            Some("{\"b\": [1, 2.50, {}], \"a\": \"x,:\\u00e9 \\\"\"}")
        );
        assert_eq!(dump_raw("\"\\ud800\""), None);
    }

    #[test]
    fn first_query_value_wins_and_is_decoded() {
        let query = "a=1&b=%3Cb%3E+%41&a=2&c&%64=%zz";
        assert_eq!(query_value(query, "a").as_deref(), Some("1"));
        assert_eq!(query_value(query, "b").as_deref(), Some("<b> A"));
        assert_eq!(query_value(query, "c").as_deref(), Some(""));
        assert_eq!(query_value(query, "d").as_deref(), Some("%zz"));
        assert_eq!(query_value(query, "e"), None);
        assert_eq!(decode("%", false), "%");
        assert_eq!(decode("%4", false), "%4");
        assert_eq!(decode("a+b", false), "a+b");
    }
}
