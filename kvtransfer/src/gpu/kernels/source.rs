//! The kernels' source, its built forms, and where compiled ones are kept.
#![forbid(unsafe_code)]

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// CUDA C++.
pub(super) const SOURCE: &str = include_str!("copy.cu");

/// Built by `build.py` for every device since 2020 (compute capability 8.0).
pub(super) const PTX_80: &str = include_str!("copy.ptx80");

/// The same for 9.0 and later, which have the bulk kernels.
pub(super) const PTX_90: &str = include_str!("copy.ptx90");

/// Longest compiled form that is read back, in bytes; ours have some 100 KB.
const COMPILED_BYTES_MAX: u64 = 8 << 20;

/// FNV-1a, enough to tell sources apart (nobody gains by making two alike: who can write the cache can write anything).
pub(super) fn fingerprint(source: &[u8]) -> u64 {
    source.iter().fold(0xcbf2_9ce4_8422_2325, |value, byte| {
        (value ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The folder of compiled kernels: `$XDG_CACHE_HOME/kvtransfer` or `~/.cache/kvtransfer`. `None` where the process has neither.
pub(super) fn cache_folder() -> Option<PathBuf> {
    folder_of(
        env::var_os("XDG_CACHE_HOME").map(PathBuf::from),
        env::home_dir(),
    )
}

fn folder_of(xdg: Option<PathBuf>, home: Option<PathBuf>) -> Option<PathBuf> {
    // The XDG specification: a relative path is invalid and ignored.
    let xdg = xdg.filter(|path| path.is_absolute());
    let home = home.filter(|path| path.is_absolute());
    Some(
        xdg.or_else(|| Some(home?.join(".cache")))?
            .join("kvtransfer"),
    )
}

/// A compiled form's file name: it is only right for this source, architecture, driver and compiler.
pub(super) fn file_name(arch: (u32, u32), driver: (u32, u32), compiler: (u32, u32)) -> String {
    format!(
        "copy-{:016x}-sm{}{}-driver{}.{}-nvrtc{}.{}.cubin",
        fingerprint(SOURCE.as_bytes()),
        arch.0,
        arch.1,
        driver.0,
        driver.1,
        compiler.0,
        compiler.1,
    )
}

/// Reads a compiled form back.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    let len = fs::metadata(path).ok()?.len();
    if len == 0 || len > COMPILED_BYTES_MAX {
        return None;
    }
    fs::read(path).ok()
}

/// Keeps a compiled form for the next process. Whoever reads meanwhile sees the old file or the new one, never a part.
pub(super) fn keep(path: &Path, compiled: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(folder)?;
    let draft = path.with_extension(format!("{}", std::process::id()));
    fs::write(&draft, compiled)?;
    fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_forms_are_of_the_current_source() {
        let now = format!("// of copy.cu {:016x}", fingerprint(SOURCE.as_bytes()));
        for built in [PTX_80, PTX_90] {
            let made_of = built.lines().next().unwrap_or("");
            assert_eq!(made_of, now, "run kernels/build.py after changing copy.cu");
        }
        assert!(PTX_80.contains(".target sm_80") && PTX_90.contains(".target sm_90"));
        assert!(PTX_90.contains("cp.async.bulk") && !PTX_80.contains("cp.async.bulk"));
    }

    #[test]
    fn compiled_forms_are_kept_and_read_back() {
        let folder = env::temp_dir().join(format!("kvt-kernels-{}", std::process::id()));
        let path = folder
            .join("deep")
            .join(file_name((9, 0), (13, 0), (12, 8)));
        assert_eq!(read(&path), None);
        keep(&path, b"compiled").expect("a temporary folder is writable");
        keep(&path, b"again").expect("a temporary folder is writable");
        assert_eq!(read(&path).as_deref(), Some(b"again".as_slice()));
        assert_eq!(fs::read_dir(folder.join("deep")).expect("made").count(), 1);
        fs::remove_dir_all(folder).expect("made above");
    }

    #[test]
    fn the_cache_is_where_xdg_says() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(folder_of(path("/c"), path("/h")), path("/c/kvtransfer"));
        assert_eq!(
            folder_of(path("c"), path("/h")),
            path("/h/.cache/kvtransfer")
        );
        assert_eq!(folder_of(None, None), None);
    }
}
