//! Whether the verbs libraries are there, on a host that is only looked at.
#![forbid(unsafe_code)]

use std::path::Path;

use super::SONAMES;
use crate::doctor::facts::Library;

/// Folders of libraries.
const FOLDERS: [&str; 7] = [
    "lib",
    "lib64",
    "usr/lib",
    "usr/lib64",
    "usr/local/lib",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
];

/// Looks for the files below a root.
pub(super) fn find(root: &Path) -> Vec<Library> {
    let look = |soname: &str| {
        let exists = FOLDERS
            .iter()
            .any(|folder| root.join(folder).join(soname).exists());
        Library {
            soname: soname.to_owned(),
            problem: (!exists).then(|| format!("not in {}", FOLDERS.join(", "))),
        }
    };
    SONAMES.into_iter().map(look).collect()
}
