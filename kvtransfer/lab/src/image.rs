//! The guest's file system: programs of this host with the libraries they need, packed as an initramfs.
//!
//! Nothing is compressed: the machine reads the archive from the host's page cache, and unpacking under emulation
//! would take longer than copying.

mod cpio;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufWriter, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// What one path of the image is.
#[derive(Debug)]
enum Entry {
    Folder,
    Copy { source: PathBuf, mode: u32 },
    Text { text: Vec<u8>, mode: u32 },
    Link(&'static str),
}

/// The file system in the making: absolute paths of the guest, folders before what they hold.
#[derive(Debug)]
pub(crate) struct Image {
    entries: BTreeMap<PathBuf, Entry>,
    programs: BTreeSet<PathBuf>,
}

impl Image {
    /// The folders that every program expects.
    pub(crate) fn new() -> Self {
        let mut image = Self {
            entries: BTreeMap::new(),
            programs: BTreeSet::new(),
        };
        for folder in [
            "/dev",
            "/etc",
            "/proc",
            "/root",
            "/run",
            "/sys",
            "/tmp",
            "/usr/bin",
            "/usr/lib",
            "/usr/lib64",
            "/usr/sbin",
            "/var",
        ] {
            image.folder(Path::new(folder));
        }
        // Debian's merged /usr, because libraries are found under both names.
        for (path, target) in [
            ("/bin", "usr/bin"),
            ("/sbin", "usr/sbin"),
            ("/lib", "usr/lib"),
            ("/lib64", "usr/lib64"),
        ] {
            image.entries.insert(path.into(), Entry::Link(target));
        }
        image
    }

    fn folder(&mut self, path: &Path) {
        for folder in path.ancestors().filter(|folder| folder.parent().is_some()) {
            self.entries
                .entry(folder.to_owned())
                .or_insert(Entry::Folder);
        }
    }

    fn insert(&mut self, path: &Path, entry: Entry) {
        if let Some(folder) = path.parent() {
            self.folder(folder);
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// A file with this text.
    pub(crate) fn text(&mut self, path: &str, text: &str, mode: u32) {
        let text = text.as_bytes().to_vec();
        self.insert(Path::new(path), Entry::Text { text, mode });
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &'static str) {
        self.insert(Path::new(path), Entry::Link(target));
    }

    /// A file of the host at the guest's `path`, with the libraries it needs if it is a program or a library.
    pub(crate) fn copy(&mut self, source: &Path, path: &Path) -> Result<()> {
        if is_elf(source)? {
            self.programs.insert(source.to_owned());
        }
        self.data(source, path)
    }

    /// A file of the host at the guest's `path`, whatever it is.
    pub(crate) fn data(&mut self, source: &Path, path: &Path) -> Result<()> {
        let facts =
            fs::metadata(source).with_context(|| format!("reading {}", source.display()))?;
        if !facts.is_file() {
            bail!("{} is not a file", source.display());
        }
        let mode = facts.permissions().mode() & 0o777;
        let source = source.to_owned();
        self.insert(path, Entry::Copy { source, mode });
        Ok(())
    }

    /// A program of the host, found on the usual paths, at `/usr/bin`.
    pub(crate) fn tool(&mut self, name: &str) -> Result<()> {
        let folders = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
        let source = folders
            .iter()
            .map(|folder| Path::new(folder).join(name))
            .find(|path| path.exists());
        let source = source.with_context(|| format!("{name} is not installed"))?;
        self.copy(&source, &Path::new("/usr/bin").join(name))
    }

    /// Adds the libraries of every program copied so far.
    pub(crate) fn libraries(&mut self) -> Result<()> {
        for library in needed_libraries(&self.programs)? {
            // The folder is resolved, since the guest's /lib is a link; the name is what the loader asks for.
            let (Some(folder), Some(name)) = (library.parent(), library.file_name()) else {
                continue;
            };
            let folder = fs::canonicalize(folder)
                .with_context(|| format!("finding {}", folder.display()))?;
            let mode = 0o755;
            let path = folder.join(name);
            self.insert(
                &path,
                Entry::Copy {
                    source: library,
                    mode,
                },
            );
        }
        Ok(())
    }

    /// Writes the archive; returns its size in bytes.
    pub(crate) fn write(&self, path: &Path) -> Result<u64> {
        let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
        let mut archive = cpio::Archive::new(BufWriter::new(file));
        for (path, entry) in &self.entries {
            let name = path.strip_prefix("/").unwrap_or(path).to_string_lossy();
            match entry {
                Entry::Folder => archive.entry(&name, cpio::FOLDER | 0o755, b"")?,
                Entry::Link(target) => {
                    archive.entry(&name, cpio::LINK | 0o777, target.as_bytes())?;
                }
                Entry::Text { text, mode } => archive.entry(&name, cpio::FILE | mode, text)?,
                Entry::Copy { source, mode } => {
                    let bytes = fs::read(source)
                        .with_context(|| format!("reading {}", source.display()))?;
                    archive.entry(&name, cpio::FILE | mode, &bytes)?;
                }
            }
        }
        let (mut file, size) = archive.finish()?;
        file.flush().context("writing the image")?;
        Ok(size)
    }
}

fn is_elf(path: &Path) -> Result<bool> {
    use std::io::Read as _;
    let mut magic = [0; 4];
    let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    Ok(file.read(&mut magic).is_ok_and(|read| read == 4) && magic == *b"\x7fELF")
}

/// Asks the loader which libraries the programs need, all at once.
fn needed_libraries(programs: &BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd")
        .args(programs)
        .output()
        .context("starting ldd")?;
    // Its exit code is 1 as soon as one of the programs is static, so only what it says counts.
    libraries_of(&String::from_utf8_lossy(&output.stdout))
}

fn libraries_of(listing: &str) -> Result<BTreeSet<PathBuf>> {
    let mut libraries = BTreeSet::new();
    for line in listing.lines() {
        // A line without a tab names the program.
        let Some(line) = line.strip_prefix('\t') else {
            continue;
        };
        if line.contains("=> not found") {
            bail!("a program for the guest lacks a library: {line}");
        }
        let place = line.split_once("=> ").map_or(line, |(_, place)| place);
        let path = place.split(" (0x").next().unwrap_or(place);
        if path.starts_with('/') {
            libraries.insert(PathBuf::from(path));
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_listing_is_understood() {
        let listing = "/usr/bin/rping:\n\tlinux-vdso.so.1 (0x00007ffc)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n/bin/busybox:\n\tnot a dynamic executable\n";
        let found: Vec<_> = libraries_of(listing)
            .expect("all found")
            .into_iter()
            .collect();
        let expected = [
            Path::new("/lib/x86_64-linux-gnu/libc.so.6"),
            Path::new("/lib64/ld-linux-x86-64.so.2"),
        ];
        assert_eq!(found, expected);
        let error = libraries_of("x:\n\tlibibverbs.so.1 => not found\n").expect_err("missing");
        assert!(error.to_string().contains("libibverbs.so.1"), "{error}");
    }

    #[test]
    fn folders_come_before_what_they_hold() {
        let mut image = Image::new();
        image.text("/etc/deep/er/file", "text", 0o644);
        let paths: Vec<_> = image.entries.keys().collect();
        for path in &paths {
            let folder = path.parent().expect("no entry is the root");
            let at = |wanted: &Path| paths.iter().position(|known| known.as_path() == wanted);
            let is_root = folder == Path::new("/");
            assert!(is_root || at(folder) < at(path), "{}", path.display());
            assert!(is_root || at(folder).is_some(), "{}", path.display());
        }
    }
}
