//! Whether the verbs libraries are there.
#![expect(unsafe_code, reason = "loads C libraries")]

use std::path::Path;

use super::SONAMES;
use crate::doctor::facts::Library;

/// Folders of libraries below a root that is not this process's own.
const FOLDERS: [&str; 7] = [
    "lib",
    "lib64",
    "usr/lib",
    "usr/lib64",
    "usr/local/lib",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
];

/// Asks the loader of this process, as the engine does.
pub(super) fn open() -> Vec<Library> {
    let ask = |soname: &str| {
        // SAFETY: the libraries' initialisers only set up their own data; the handle is kept for the life of the
        // process, so that nothing they registered is unmapped.
        let opened = unsafe { libloading::Library::new(soname) };
        Library {
            soname: soname.to_owned(),
            problem: match opened {
                Ok(library) => {
                    std::mem::forget(library);
                    None
                }
                Err(error) => Some(error.to_string()),
            },
        }
    };
    SONAMES.into_iter().map(ask).collect()
}

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
