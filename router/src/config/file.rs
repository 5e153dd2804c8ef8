//! The configuration file: TOML whose keys are the long names of the options.
//!
//! Tables are sections for the reader's eye and mean nothing: `port = 8080` is the same inside and outside of one.
#![forbid(unsafe_code)]

use std::fmt;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Largest file: 4096 workers by name take a tenth of it.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Something wrong with a setting, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// A file with its line, or the name of an environment variable.
    pub place: String,
    /// What is wrong, and what to do about it.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// One setting of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The option's long name.
    pub key: String,
    /// Its values, as a command line would spell them.
    pub values: Vec<String>,
    /// It is a TOML array.
    pub is_list: bool,
    /// Where it stands: `PATH:LINE`.
    pub place: String,
}

/// What tells that a file is another one. A ConfigMap's file is a link whose target is exchanged: new inode, any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    modified: (i64, i64),
    bytes: u64,
    inode: u64,
}

impl Stamp {
    /// The file as it is now, if there is one.
    pub fn of(path: &Path) -> Option<Self> {
        let about = std::fs::metadata(path).ok()?;
        Some(Self {
            modified: (about.mtime(), about.mtime_nsec()),
            bytes: about.len(),
            inode: about.ino(),
        })
    }
}

/// Reads a file.
///
/// # Errors
/// All that is wrong with its form.
pub fn read(path: &Path) -> Result<Vec<Entry>, Vec<Problem>> {
    let problem = |text| {
        vec![Problem {
            place: path.display().to_string(),
            text,
        }]
    };
    let mut text = String::new();
    let file = std::fs::File::open(path);
    file.and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text))
        .map_err(|error| problem(format!("cannot be read: {error}")))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(problem(format!("is larger than {FILE_BYTES_MAX} bytes")));
    }
    parse(&path.display().to_string(), &text)
}

/// Understands the text of the file called `path`.
///
/// # Errors
/// All that is wrong with its form.
pub fn parse(path: &str, text: &str) -> Result<Vec<Entry>, Vec<Problem>> {
    let place = |at: usize| {
        let before = text.as_bytes().iter().take(at);
        let line = 1 + before.filter(|byte| **byte == b'\n').count();
        format!("{path}:{line}")
    };
    let table = DeTable::parse(text).map_err(|error| {
        vec![Problem {
            place: place(error.span().map_or(0, |span| span.start)),
            text: error.message().to_owned(),
        }]
    })?;
    let (mut entries, mut problems) = (Vec::new(), Vec::new());
    collect(table.get_ref(), true, &place, &mut entries, &mut problems);
    // Sections are read in the order of their names; people read lines.
    entries.sort_by_key(|(at, _)| *at);
    let mut entries: Vec<Entry> = entries.into_iter().map(|(_, entry)| entry).collect();
    let mut first: std::collections::HashMap<String, String> = std::collections::HashMap::new();
    entries.retain(|entry| match first.get(&entry.key) {
        None => {
            first.insert(entry.key.clone(), entry.place.clone());
            true
        }
        Some(before) => {
            let text = format!("`{}` is set at {before} already; keep one", entry.key);
            problems.push(Problem {
                place: entry.place.clone(),
                text,
            });
            false
        }
    });
    if problems.is_empty() {
        Ok(entries)
    } else {
        Err(problems)
    }
}

fn collect(
    table: &DeTable<'_>,
    is_top: bool,
    place: &dyn Fn(usize) -> String,
    entries: &mut Vec<(usize, Entry)>,
    problems: &mut Vec<Problem>,
) {
    for (key, value) in table {
        let at = key.span().start;
        let mut refuse = |text: String| {
            problems.push(Problem {
                place: place(at),
                text,
            });
        };
        let name = key.get_ref();
        let (values, is_list) = match value.get_ref() {
            DeValue::Table(section) if is_top => {
                collect(section, false, place, entries, problems);
                continue;
            }
            DeValue::Table(_) => {
                refuse(format!("`{name}`: sections hold no sections"));
                continue;
            }
            DeValue::Array(items) => (items.iter().map(scalar).collect::<Option<Vec<_>>>(), true),
            _ => (scalar(value).map(|text| vec![text]), false),
        };
        match values {
            Some(values) => entries.push((
                at,
                Entry {
                    key: name.to_string(),
                    values,
                    is_list,
                    place: place(at),
                },
            )),
            None => refuse(format!(
                "`{name}` must be a text, a number, true or false, or a list of these"
            )),
        }
    }
}

/// A value as a command line would spell it.
fn scalar(value: &Spanned<DeValue<'_>>) -> Option<String> {
    Some(match value.get_ref() {
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .ok()?
            .to_string(),
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_for_the_eye() {
        let text = "port = 0x1F90\n[workers]\ndecode = [\n  'http://a:1',\n  'http://b:1',\n]\n\
                    [limits]\nqueue-timeout = 1.5\nlog-plain = true\n";
        let found = parse("f.toml", text).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|entry| (entry.key.as_str(), entry.values.join(" "), &*entry.place))
            .collect();
        assert_eq!(
            found,
            [
                ("port", "8080".to_owned(), "f.toml:1"),
                ("decode", "http://a:1 http://b:1".to_owned(), "f.toml:3"),
                ("queue-timeout", "1.5".to_owned(), "f.toml:8"),
                ("log-plain", "true".to_owned(), "f.toml:9"),
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, wanted) in [
            ("port = \n", "f.toml:1"),
            ("a = 1\nb = 1979-05-27\n", "f.toml:2: `b` must be a text"),
            ("[a]\n[a.b]\nc = 1\n", "f.toml:2: `b`: sections hold no"),
            (
                "port = 1\n[x]\nport = 2\n",
                "f.toml:3: `port` is set at f.toml:1",
            ),
            ("a = [[1]]\n", "f.toml:1: `a` must be"),
            ("a = 1\na = 2\n", "f.toml:2"),
        ] {
            let problems = parse("f.toml", text).unwrap_err();
            assert!(
                problems[0].to_string().starts_with(wanted),
                "{text}: {}",
                problems[0]
            );
        }
    }

    #[test]
    fn a_file_without_end_is_not_read() {
        let problems = read(Path::new("/dev/zero")).unwrap_err();
        assert!(problems[0].text.contains("larger than"), "{}", problems[0]);
    }
}
