//! The kernel that the guest boots, its modules in the order of loading, and siw, which has to be built for it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// What the guest loads; what these need comes before them. Nothing in the guest loads modules by itself.
const MODULES: [&str; 11] = [
    "dummy",
    "veth",
    // For `ss`, by which tests end connections of siw.
    "tcp_diag",
    "ib_uverbs",
    "rdma_ucm",
    // rxe asks the kernel's crypto for "crc32", and siw for "crc32c", each by name.
    "crc32_generic",
    "crc32-pclmul",
    "crc32c_generic",
    "crc32c-intel",
    "libcrc32c",
    "rdma_rxe",
];

/// Parameters of modules: without it, dummy makes a device of its own.
pub(crate) const PARAMETERS: [(&str, &str); 1] = [("dummy.ko", "numdummies=0")];

/// The folder of siw in the kernel's source.
const SIW_SOURCE: &str = "drivers/infiniband/sw/siw";

/// A kernel with its modules and headers.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// As `uname -r` says it, `6.1.0-56-amd64`.
    pub(crate) release: String,
}

impl Kernel {
    /// The newest kernel below `/boot` whose modules, headers and source are installed too.
    pub(crate) fn newest() -> Result<Self> {
        let mut found: Vec<String> = Vec::new();
        for entry in fs::read_dir("/boot").context("reading /boot")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let Some(release) = name.strip_prefix("vmlinuz-") else {
                continue;
            };
            let kernel = Self {
                release: release.to_owned(),
            };
            if kernel.is_complete() {
                found.push(release.to_owned());
            }
        }
        let release = found.into_iter().max_by_key(|release| numbers(release));
        let release = release.context(
            "no kernel in /boot has rdma_rxe, its headers and its source; \
             install linux-image-amd64, linux-headers-amd64 and linux-source-6.1 of the same version",
        )?;
        Ok(Self { release })
    }

    /// Whether it has rxe (cloud kernels do not), headers to build siw, and siw's source.
    fn is_complete(&self) -> bool {
        let listing = fs::read_to_string(self.folder().join("modules.dep")).unwrap_or_default();
        listing.contains("/rdma_rxe.ko")
            && self.folder().join("build").exists()
            && self.source().0.exists()
    }

    /// The archive of its source, and the folder in it.
    fn source(&self) -> (PathBuf, String) {
        let version: Vec<String> = numbers(&self.release)
            .iter()
            .take(2)
            .map(u64::to_string)
            .collect();
        let tree = format!("linux-source-{}", version.join("."));
        let archive = Path::new("/usr/src").join(format!("{tree}.tar.xz"));
        (archive, tree)
    }

    /// The file to boot.
    pub(crate) fn image(&self) -> PathBuf {
        Path::new("/boot").join(format!("vmlinuz-{}", self.release))
    }

    fn folder(&self) -> PathBuf {
        Path::new("/lib/modules").join(&self.release)
    }

    /// Debian's modules for the guest, in the order of loading.
    pub(crate) fn modules(&self) -> Result<Vec<PathBuf>> {
        let listing = self.folder().join("modules.dep");
        let listing = fs::read_to_string(&listing)
            .with_context(|| format!("reading {}", listing.display()))?;
        let order = loading_order(&listing, &MODULES)?;
        Ok(order.iter().map(|path| self.folder().join(path)).collect())
    }

    /// `siw.ko` for this kernel: built once, then taken from `cache`.
    pub(crate) fn siw(&self, cache: &Path) -> Result<PathBuf> {
        let built = cache.join(format!("siw-{}.ko", self.release));
        if built.exists() {
            return Ok(built);
        }
        let folder = cache.join(format!("siw-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let made = self.build_siw(&folder);
        if let Ok(module) = &made {
            // A rename shows other runs either the whole module or none.
            fs::rename(module, &built).with_context(|| format!("making {}", built.display()))?;
        }
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
        made.with_context(|| format!("building siw for {}", self.release))?;
        Ok(built)
    }

    fn build_siw(&self, folder: &Path) -> Result<PathBuf> {
        let (archive, tree) = self.source();
        crate::say(&format!(
            "building siw for {} (once, about 35 s)",
            self.release
        ));
        quiet(
            Command::new("tar")
                .args(["--extract", "--strip-components=5", "--file"])
                .arg(&archive)
                .arg("--directory")
                .arg(folder)
                .arg(format!("{tree}/{SIW_SOURCE}")),
        )?;
        let mut headers = std::ffi::OsString::from("M=");
        headers.push(folder);
        quiet(
            Command::new("make")
                .arg("-C")
                .arg(self.folder().join("build"))
                .arg(headers)
                .args(["-j2", "CONFIG_RDMA_SIW=m", "modules"])
                // The variables of the make or cargo around this run are not meant for the kernel's build.
                .env_remove("MAKEFLAGS")
                .env_remove("MFLAGS"),
        )?;
        let module = folder.join("siw.ko");
        quiet(Command::new("strip").arg("--strip-debug").arg(&module))?;
        Ok(module)
    }
}

/// Runs a tool; its output matters only if it fails.
fn quiet(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}\n{stderr}", output.status);
    }
    Ok(())
}

/// All numbers of a release, so that 6.1.0-56 is newer than 6.1.0-9.
fn numbers(release: &str) -> Vec<u64> {
    release
        .split(|letter: char| !letter.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// The paths of `wanted` and of what they need, needed ones first; from the text of a `modules.dep`.
fn loading_order(listing: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let mut needs = BTreeMap::new();
    for line in listing.lines() {
        let (path, rest) = line.split_once(':').context("a line of modules.dep")?;
        let file = path.rsplit('/').next().unwrap_or(path);
        let name = file.split('.').next().unwrap_or(file).replace('-', "_");
        needs.insert(name, (path, rest));
    }
    let mut order: Vec<String> = Vec::new();
    for name in wanted {
        let Some((path, rest)) = needs.get(&name.replace('-', "_")) else {
            bail!("the kernel has no module {name}");
        };
        // The needed ones are listed with the deepest last.
        for path in rest.split_whitespace().rev().chain([*path]) {
            ensure!(
                path.ends_with(".ko"),
                "{path} is compressed, and the guest cannot load that"
            );
            if !order.iter().any(|known| known == path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needed_modules_come_first_and_once() {
        let listing = "k/ib_core.ko:\nk/ib_cm.ko: k/ib_core.ko\nk/fs/configfs.ko:\n\
            k/rdma_cm.ko: k/ib_cm.ko k/ib_core.ko k/fs/configfs.ko\nk/crc32-pclmul.ko:\n";
        let order = loading_order(listing, &["ib_cm", "crc32_pclmul", "rdma_cm"]).expect("known");
        let expected = [
            "k/ib_core.ko",
            "k/ib_cm.ko",
            "k/crc32-pclmul.ko",
            "k/fs/configfs.ko",
            "k/rdma_cm.ko",
        ];
        assert_eq!(order, expected);
    }

    #[test]
    fn unknown_and_compressed_modules_are_errors() {
        let error = loading_order("k/siw.ko.xz:\n", &["siw"]).expect_err("compressed");
        assert!(error.to_string().contains("compressed"), "{error}");
        let error = loading_order("k/siw.ko:\n", &["rxe"]).expect_err("unknown");
        assert!(error.to_string().contains("rxe"), "{error}");
    }

    #[test]
    fn the_newest_release_is_by_number() {
        let newest = ["6.1.0-9-amd64", "6.1.0-56-amd64", "5.10.0-99-amd64"]
            .into_iter()
            .max_by_key(|release| numbers(release));
        assert_eq!(newest, Some("6.1.0-56-amd64"));
    }
}
