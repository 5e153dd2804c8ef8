//! Small files below a root, with bounds: sysfs of a broken driver must not fill the memory.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Most bytes read of one file: `/proc/net/tcp` of a host with 50,000 connections is the longest of interest.
pub(super) const FILE_BYTES_MAX: usize = 8 << 20;
/// Most entries read of one folder: a GID table has up to some hundred, a host up to some thousand interfaces.
pub(super) const ENTRIES_MAX: usize = 4096;

pub(super) struct Tree {
    root: PathBuf,
    cut: RefCell<Vec<String>>,
}

impl Tree {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            cut: RefCell::default(),
        }
    }

    pub(super) fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// The text of a file without the blanks around it; `None` if it cannot be read or is empty.
    pub(super) fn text(&self, relative: &str) -> Option<String> {
        let file = File::open(self.path(relative)).ok()?;
        let mut bytes = Vec::new();
        // One byte more than the bound tells a file of exactly that size from a longer one.
        file.take(FILE_BYTES_MAX as u64 + 1)
            .read_to_end(&mut bytes)
            .ok()?;
        if bytes.len() > FILE_BYTES_MAX {
            bytes.truncate(FILE_BYTES_MAX);
            self.note_cut(format!("{relative} is longer than {FILE_BYTES_MAX} bytes"));
        }
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// The number in a file, decimal or with `0x`.
    pub(super) fn number(&self, relative: &str) -> Option<u32> {
        let text = self.text(relative)?;
        match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        }
    }

    /// The word behind the number in a file like `4: ACTIVE`.
    pub(super) fn word(&self, relative: &str) -> Option<String> {
        let text = self.text(relative)?;
        let word = text.split_once(':').map_or(text.as_str(), |(_, word)| word);
        Some(word.trim().to_owned())
    }

    /// Names in a folder, `x2` before `x10`; empty if there is no such folder.
    pub(super) fn names(&self, relative: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(relative)) else {
            return Vec::new();
        };
        let mut entries = entries.flatten();
        let named = |entry: fs::DirEntry| entry.file_name().into_string().ok();
        let mut names: Vec<_> = entries
            .by_ref()
            .take(ENTRIES_MAX)
            .filter_map(named)
            .collect();
        if entries.next().is_some() {
            self.note_cut(format!("{relative} has more than {ENTRIES_MAX} entries"));
        }
        names.sort_by_cached_key(|name| (name.trim_end_matches(digit).to_owned(), order(name)));
        names
    }

    pub(super) fn has(&self, relative: &str) -> bool {
        self.path(relative).exists()
    }

    /// The last part of where a link leads.
    pub(super) fn link_name(&self, relative: &str) -> Option<String> {
        let target = fs::read_link(self.path(relative)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    /// The PCI addresses on the way to a folder of sysfs, root complex first.
    pub(super) fn pci_path(&self, relative: &str) -> Vec<String> {
        let Ok(path) = fs::canonicalize(self.path(relative)) else {
            return Vec::new();
        };
        let parts = path.iter().filter_map(|part| part.to_str());
        parts
            .filter(|part| is_pci(part))
            .map(str::to_owned)
            .collect()
    }

    fn note_cut(&self, what: String) {
        self.cut.borrow_mut().push(what);
    }

    pub(super) fn cut(self) -> Vec<String> {
        self.cut.into_inner()
    }
}

fn digit(symbol: char) -> bool {
    symbol.is_ascii_digit()
}

/// The number at the end of a name, as something to sort by.
fn order(name: &str) -> (usize, String) {
    let digits = &name[name.trim_end_matches(digit).len()..];
    (digits.len(), digits.to_owned())
}

/// Whether a folder's name is a root complex (`pci0000:00`) or a function (`0000:11:00.0`).
fn is_pci(name: &str) -> bool {
    let is_hex =
        |part: &str| !part.is_empty() && part.chars().all(|symbol| symbol.is_ascii_hexdigit());
    if let Some((domain, bus)) = name
        .strip_prefix("pci")
        .and_then(|name| name.split_once(':'))
    {
        return is_hex(domain) && is_hex(bus);
    }
    let parts: Vec<_> = name.split([':', '.']).collect();
    parts.len() == 4 && parts.into_iter().all(is_hex)
}
