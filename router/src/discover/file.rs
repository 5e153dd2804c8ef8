//! A file that describes workers, looked at again and again. A file that cannot be used changes nothing.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{Fleet, FleetWatch, MEMBERS_MAX};

/// How often a file is read. It is compared as a whole: files that Kubernetes mounts change behind symbolic links, and
/// times of change are coarser than editors are fast.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// Largest file that is read: [`MEMBERS_MAX`] workers at a kilobyte each.
pub const FILE_BYTES_MAX: u64 = 4 << 20;

/// What is wrong with a file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Line, from 1, if it is known.
    pub line: Option<u64>,
    /// What is wrong, and what would be right.
    pub what: String,
}

impl Mistake {
    /// A mistake somewhere.
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            line: None,
            what: what.into(),
        }
    }
}

/// Why a file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct FileError {
    /// Which file.
    pub path: PathBuf,
    /// What is wrong.
    pub mistake: Mistake,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = &self.mistake.what;
        match self.mistake.line {
            Some(line) => write!(f, "{}:{line}: {what}", self.path.display()),
            None => write!(f, "{}: {what}", self.path.display()),
        }
    }
}

/// Turns the text of a file into a fleet.
pub type Reader = Box<dyn Fn(&str) -> Result<Fleet, Mistake> + Send + Sync>;

/// Publishes what `path` holds, now and whenever it changes, until `tasks` are dropped.
///
/// # Errors
/// [`FileError`] when the file cannot be used now. Later the last good fleet stays, and the log tells why.
pub fn start(
    path: PathBuf,
    interval: Duration,
    reader: Reader,
    tasks: &mut JoinSet<()>,
) -> Result<FleetWatch, FileError> {
    let failed = |mistake| FileError {
        path: path.clone(),
        mistake,
    };
    let mut seen = read(&path).map_err(failed)?;
    let fleet = understood(&seen, &reader).map_err(failed)?;
    let (publish, fleets) = watch::channel(Arc::new(fleet));
    tasks.spawn(async move {
        let mut complaint = None;
        loop {
            tokio::time::sleep(interval).await;
            let here = path.clone();
            let Ok(text) = tokio::task::spawn_blocking(move || read(&here)).await else {
                return;
            };
            let fleet = match text {
                Ok(text) if text == seen && complaint.is_none() => continue,
                Ok(text) => {
                    seen = text;
                    understood(&seen, &reader)
                }
                Err(mistake) => Err(mistake),
            };
            match fleet {
                Ok(fleet) => {
                    complaint = None;
                    let fleet = Arc::new(fleet);
                    if **publish.borrow() != *fleet {
                        let (path, members) = (path.display(), fleet.members.len());
                        tracing::info!(%path, members, "the file's fleet changed");
                        publish.send_replace(fleet);
                    }
                }
                Err(mistake) => {
                    let path = path.clone();
                    let error = FileError { path, mistake };
                    if complaint.as_ref() != Some(&error) {
                        tracing::error!("{error}; the last good fleet stays");
                        complaint = Some(error);
                    }
                }
            }
        }
    });
    Ok(fleets)
}

fn read(path: &Path) -> Result<String, Mistake> {
    use std::io::Read as _;
    let failed = |error: std::io::Error| Mistake::new(format!("it cannot be read: {error}"));
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
    if read.map_err(failed)? as u64 > FILE_BYTES_MAX {
        return Err(Mistake::new(format!(
            "it is larger than {FILE_BYTES_MAX} bytes"
        )));
    }
    Ok(text)
}

fn understood(text: &str, reader: &Reader) -> Result<Fleet, Mistake> {
    let mut fleet = reader(text)?;
    if fleet.members.len() > MEMBERS_MAX {
        return Err(Mistake::new(format!("more than {MEMBERS_MAX} workers")));
    }
    let members = &mut fleet.members;
    members.sort_by(|a, b| a.name.cmp(&b.name));
    let twice =
        |what: &str, name: &str| Err(Mistake::new(format!("two {what} are named `{name}`")));
    if let Some(pair) = members.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return twice("workers", &pair[0].name);
    }
    let mut addresses: Vec<&str> = members
        .iter()
        .map(|member| member.url.authority().as_str())
        .collect();
    addresses.sort_unstable();
    if let Some(pair) = addresses.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Mistake::new(format!(
            "two workers have the address {}",
            pair[0]
        )));
    }
    fleet.models.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = fleet
        .models
        .windows(2)
        .find(|pair| pair[0].name == pair[1].name)
    {
        return twice("models", &pair[0].name);
    }
    fleet.objectives.sort_by(|a, b| a.name.cmp(&b.name));
    let mut objectives = fleet.objectives.windows(2);
    if let Some(pair) = objectives.find(|pair| pair[0].name == pair[1].name) {
        return twice("objectives", &pair[0].name);
    }
    Ok(fleet)
}

/// Reads YAML (and JSON, which is YAML too).
///
/// # Errors
/// [`Mistake`] with the line.
pub fn from_yaml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, Mistake> {
    serde_saphyr::from_str(text).map_err(|error| Mistake {
        line: error.location().map(|location| location.line()),
        what: first_line(&error.without_snippet().to_string()),
    })
}

/// Reads TOML.
///
/// # Errors
/// [`Mistake`] with the line.
pub fn from_toml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, Mistake> {
    toml::from_str(text).map_err(|error| Mistake {
        line: error.span().map(|span| {
            let before = text.as_bytes().get(..span.start).unwrap_or_default();
            1 + memchr::memchr_iter(b'\n', before).count() as u64
        }),
        what: error.message().to_owned(),
    })
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
