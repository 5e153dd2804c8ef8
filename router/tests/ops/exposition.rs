//! The rules of the Prometheus text format, and this project's own: every family has a help text and a unit.

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Last words of names that count things, and so need no unit.
const COUNTED: [&str; 22] = [
    "blocks",
    "requests",
    "rooms",
    "workers",
    "bookings",
    "failures",
    "successes",
    "streams",
    "disconnects",
    "dropped",
    "retries",
    "refused",
    "aborts",
    "unmerged",
    "exported",
    "predictions",
    "reloads",
    "state",
    "ready",
    "draining",
    "success",
    "info",
];

const UNITS: [&str; 4] = ["seconds", "bytes", "tokens", "bytes_per_second"];

#[derive(Debug, Default)]
pub struct Family {
    pub kind: String,
    pub help: String,
    /// Name, labels, value.
    pub samples: Vec<(String, BTreeMap<String, String>, f64)>,
}

/// Parses and checks a whole text.
pub fn parse(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    let mut seen = BTreeSet::new();
    assert!(text.ends_with('\n'), "the last line has no end");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help without a text");
            assert!(!families.contains_key(name), "{name} comes twice");
            current = name.to_owned();
            let family = families.entry(current.clone()).or_default();
            family.help = help.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, current, "a type apart from its help");
            let family = families.get_mut(name).unwrap();
            assert!(
                family.kind.is_empty() && family.samples.is_empty(),
                "{name}"
            );
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            family.kind = kind.to_owned();
        } else {
            assert!(!line.starts_with('#') && !line.is_empty(), "{line:?}");
            let (name, labels, value) = sample(line);
            let family = families
                .get_mut(&current)
                .expect("a sample without a family");
            let is_member = if family.kind == "histogram" {
                ["_bucket", "_sum", "_count"]
                    .iter()
                    .any(|part| name == format!("{current}{part}"))
            } else {
                name == current
            };
            assert!(is_member, "{name} stands among {current}");
            assert!(
                seen.insert((name.clone(), labels.clone())),
                "{line} comes twice"
            );
            family.samples.push((name, labels, value));
        }
    }
    for (name, family) in &families {
        check(name, family);
    }
    families
}

fn sample(line: &str) -> (String, BTreeMap<String, String>, f64) {
    let is_name = |text: &str| {
        let mut letters = text.chars();
        letters
            .next()
            .is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
            && letters.all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
    };
    let end = line.find(['{', ' ']).expect("a sample without a value");
    let name = &line[..end];
    assert!(is_name(name), "{line}");
    let mut labels = BTreeMap::new();
    let mut rest = &line[end..];
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, after) = rest.split_once("=\"").expect("a label without a value");
            assert!(is_name(label), "{line}");
            let mut value = String::new();
            let mut letters = after.char_indices();
            let close = loop {
                match letters.next().expect("a label without an end") {
                    (_, '\\') => match letters.next().unwrap().1 {
                        'n' => value.push('\n'),
                        letter @ ('\\' | '"') => value.push(letter),
                        other => panic!("\\{other} in {line}"),
                    },
                    (at, '"') => break at,
                    (_, letter) => value.push(letter),
                }
            };
            assert!(labels.insert(label.to_owned(), value).is_none(), "{line}");
            rest = &after[close + 1..];
            match rest.strip_prefix(',') {
                Some(more) => rest = more,
                None => break,
            }
        }
        rest = rest.strip_prefix('}').expect("labels without an end");
    }
    let value = rest.strip_prefix(' ').expect("a space before the value");
    let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
    (name.to_owned(), labels, value)
}

fn check(name: &str, family: &Family) {
    assert!(name.starts_with("kvrouter_"), "{name}");
    assert!(!family.help.is_empty() && !family.kind.is_empty(), "{name}");
    assert_eq!(name.ends_with("_total"), family.kind == "counter", "{name}");
    let stem = name.trim_end_matches("_total");
    let has_unit = UNITS.iter().any(|unit| stem.ends_with(unit));
    let counts = COUNTED
        .iter()
        .any(|word| stem.split('_').any(|part| part == *word));
    assert!(has_unit || counts, "{name} has no unit");
    match family.kind.as_str() {
        "counter" => assert!(
            family.samples.iter().all(|sample| sample.2 >= 0.0),
            "{name}"
        ),
        "histogram" => check_histogram(name, family),
        _ => {}
    }
}

/// Upper edges with what lies below them.
type Buckets = Vec<(f64, f64)>;

fn check_histogram(name: &str, family: &Family) {
    assert!(name.ends_with("_seconds"), "{name}");
    let mut sets: HashMap<Vec<(String, String)>, Buckets> = HashMap::new();
    let mut counts = HashMap::new();
    let mut sums = 0;
    for (part, labels, value) in &family.samples {
        let mut labels = labels.clone();
        let edge = labels.remove("le");
        let key: Vec<_> = labels.into_iter().collect();
        match part.strip_prefix(name).unwrap() {
            "_bucket" => {
                let edge = edge.unwrap().replace("+Inf", "inf").parse().unwrap();
                sets.entry(key).or_default().push((edge, *value));
            }
            "_count" => {
                counts.insert(key, *value);
            }
            _ => sums += 1,
        }
    }
    assert_eq!((sets.len(), sums), (counts.len(), counts.len()), "{name}");
    for (key, buckets) in sets {
        assert!(
            buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1),
            "{name}: {buckets:?}"
        );
        let (edge, total) = buckets.last().unwrap();
        assert!(edge.is_infinite() && *total == counts[&key], "{name}");
    }
}
