use super::super::delta::tests::pictures;
use super::super::snapshot::RoomStat;
use super::*;
use proptest::prelude::*;

/// One line of a page that is not a comment.
struct Sample {
    metric: String,
    labels: Vec<(String, String)>,
    value: f64,
}

/// Reads one sample line as a scraper does: `name{label="value",…} number`. `None`: it does not parse.
fn parse(line: &str) -> Option<Sample> {
    let name_end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))?;
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = Vec::new();
    if let Some(block) = rest.strip_prefix('{') {
        let mut block = block;
        loop {
            let (label, after) = block.split_once("=\"")?;
            if label.is_empty() || !label.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
                return None;
            }
            let mut value = String::new();
            let mut chars = after.chars();
            loop {
                match chars.next()? {
                    '"' => break,
                    '\n' => return None,
                    '\\' => match chars.next()? {
                        '\\' => value.push('\\'),
                        '"' => value.push('"'),
                        'n' => value.push('\n'),
                        _ => return None,
                    },
                    other => value.push(other),
                }
            }
            labels.push((label.to_owned(), value));
            block = chars.as_str();
            match block.split_at_checked(1)? {
                (",", more) => block = more,
                ("}", more) => {
                    rest = more;
                    break;
                }
                _ => return None,
            }
        }
    }
    let value = rest.strip_prefix(' ')?.parse().ok()?;
    (!name.is_empty()).then(|| Sample {
        metric: name.to_owned(),
        labels,
        value,
    })
}

/// Checks a whole page: heads come once and before their samples, and no series comes twice.
fn check(page: &str) -> Vec<Sample> {
    assert!(page.ends_with('\n'));
    let (mut current, mut heads, mut samples) = (String::new(), Vec::new(), Vec::new());
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').expect("help has a text");
            assert!(!text.is_empty() && !heads.contains(&name), "{line}");
            heads.push(name);
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("type has a kind");
            assert_eq!(heads.last(), Some(&name));
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            current = name.to_owned();
        } else {
            let sample = parse(line).unwrap_or_else(|| panic!("does not parse: {line:?}"));
            assert_eq!(sample.metric, current);
            samples.push(sample);
        }
    }
    let mut series: Vec<_> = samples
        .iter()
        .map(|sample| (&sample.metric, &sample.labels))
        .collect();
    let count = series.len();
    series.sort();
    series.dedup();
    assert_eq!(series.len(), count, "a series comes twice");
    samples
}

#[test]
fn the_page_of_a_small_engine() {
    let mut picture = Snapshot {
        instance: "engine \"a\"\\\n".into(),
        engines: Vec::new(),
        epoch: 3,
        monotonic_ns: 5_000_000_000,
        wall_ns: 1_700_000_000_500_000_000,
        rails: vec![RailStat {
            peer: "p1".into(),
            peer_addr: "10.0.0.1:7".into(),
            rail: "tcp/0".into(),
            path: "tcp".into(),
            path_reason: "no verbs device".into(),
            bytes_queued: 4096,
            bytes_in_flight: 1024,
            transfers_queued: 2,
            oldest_enqueued_ns: 4_750_000_000,
            rate_bytes_per_s: 2.5e9,
            p50_ns: 1_500_000,
            p99_ns: 20_000_000,
            bytes_total: 1 << 40,
            batches_total: 7,
            wire_operations_total: 70,
            packed_batches_total: 5,
            failures: vec![("timeout".into(), 1)],
        }],
        rooms: (0..3)
            .map(|room| RoomStat {
                room,
                state: "sending".into(),
                ..RoomStat::default()
            })
            .collect(),
        failures: vec![("timeout".into(), 2)],
    };
    picture.normalise();
    let page = render(&picture);
    assert_eq!(page, include_str!("golden.txt"));
    check(&page);
}

#[test]
fn series_are_bounded_and_sums_are_kept() {
    let mut picture = Snapshot {
        rails: (0..RAIL_SERIES_MAX as u64 + 50)
            .map(|n| RailStat {
                peer: format!("p{n:04}"),
                bytes_queued: 10,
                ..RailStat::default()
            })
            .collect(),
        rooms: (0..500)
            .map(|room| RoomStat {
                room,
                state: format!("s{room}"),
                ..RoomStat::default()
            })
            .collect(),
        ..Snapshot::default()
    };
    picture.normalise();
    let samples = check(&render(&picture));
    let of = |metric: &str| {
        let metric = format!("kvtransfer_{metric}");
        samples
            .iter()
            .filter(|s| s.metric == metric)
            .map(|s| s.value)
            .collect::<Vec<_>>()
    };
    let queued = of("rail_queued_bytes");
    assert_eq!(queued.len(), RAIL_SERIES_MAX + 1);
    assert!((queued.iter().sum::<f64>() - 3_060.0).abs() < 0.5);
    assert_eq!(of("rails_folded"), [50.0]);
    assert!(of("rooms").len() <= 2 * ROOM_STATES_MAX);
    assert!((of("rooms").iter().sum::<f64>() - 500.0).abs() < 0.5);
}

proptest! {
    #[test]
    fn every_line_parses(
        mut picture in pictures(),
        text in "\\PC{0,8}[\\\\\"\n{},= é]{0,6}",
        number: u64,
        rate: f64,
    ) {
        picture.instance.clone_from(&text);
        picture.monotonic_ns = number;
        for rail in &mut picture.rails {
            rail.path.clone_from(&text);
            rail.path_reason.clone_from(&text);
            rail.rate_bytes_per_s = rate;
            rail.bytes_total = number;
            rail.failures = vec![(text.clone(), number)];
        }
        for room in &mut picture.rooms {
            room.state.clone_from(&text);
        }
        picture.normalise();
        let samples = check(&render(&picture));
        // What went in comes out: the first sample carries the instance.
        prop_assert_eq!(&samples[0].labels[0].1, &text);
    }
}
