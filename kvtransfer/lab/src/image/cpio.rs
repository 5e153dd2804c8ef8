//! The archive format of an initramfs: cpio's "newc", of the kernel's `driver-api/early-userspace/buffer-format.rst`.

use std::io::Write;

use anyhow::{Context as _, Result};

/// File type bits of the mode, as `stat(2)` has them.
pub(super) const FILE: u32 = 0o100_000;
/// A folder.
pub(super) const FOLDER: u32 = 0o040_000;
/// A symbolic link; its data is the target.
pub(super) const LINK: u32 = 0o120_000;

/// An archive in the making.
#[derive(Debug)]
pub(super) struct Archive<W> {
    out: W,
    size: u64,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// Starts an archive.
    pub(super) fn new(out: W) -> Self {
        Self {
            out,
            size: 0,
            inode: 0,
        }
    }

    /// Adds a file, folder or link; folders must come before what they hold.
    pub(super) fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        // Inode numbers differ, since equal ones with several links would be hard links.
        self.inode += 1;
        let links = if mode & FOLDER == FOLDER { 2 } else { 1 };
        let length = |bytes: usize| u32::try_from(bytes).context("an archive's file of 4 GiB");
        let fields = [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            length(data.len())?,
            0,
            0,
            0,
            0,
            length(name.len() + 1)?,
            0,
        ];
        let mut header = b"070701".to_vec();
        for field in fields {
            write!(header, "{field:08X}")?;
        }
        header.extend_from_slice(name.as_bytes());
        header.push(0);
        self.padded(&header)?;
        self.padded(data)
    }

    /// Ends the archive; returns what it was written to, and its size.
    pub(super) fn finish(mut self) -> Result<(W, u64)> {
        self.entry("TRAILER!!!", 0, b"")?;
        Ok((self.out, self.size))
    }

    /// Header and data each end on a multiple of four.
    fn padded(&mut self, bytes: &[u8]) -> Result<()> {
        let padding = &[0; 3][..bytes.len().wrapping_neg() % 4];
        for part in [bytes, padding] {
            self.out.write_all(part).context("writing the image")?;
            self.size += part.len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn entries_are_laid_out_as_the_kernel_reads_them() {
        let mut archive = Archive::new(Vec::new());
        archive.entry("a", FILE | 0o644, b"hello").expect("small");
        let (bytes, size) = archive.finish().expect("small");
        assert_eq!(bytes.len() as u64, size);
        // 6 + 13 * 8 bytes of header, the name with its zero up to 112, the data up to 120.
        assert_eq!(&bytes[..22], b"07070100000001000081A4");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[110..120], b"a\0hello\0\0\0");
        assert_eq!(&bytes[120..126], b"070701");
        assert_eq!(size % 4, 0);
    }

    /// The real reader agrees, where it is installed.
    #[test]
    fn the_cpio_program_lists_the_archive() {
        let mut archive = Archive::new(Vec::new());
        archive.entry("etc", FOLDER | 0o755, b"").expect("small");
        archive
            .entry("etc/odd", FILE | 0o600, b"123")
            .expect("small");
        archive
            .entry("lib", LINK | 0o777, b"usr/lib")
            .expect("small");
        let (bytes, _) = archive.finish().expect("small");
        let child = Command::new("cpio")
            .args(["--list", "--verbose", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            eprintln!("not checked: this host has no cpio");
            return;
        };
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(&bytes).expect("it reads its input");
        drop(stdin);
        let output = child.wait_with_output().expect("it ends");
        let listing = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{listing}");
        for wanted in ["drwxr-xr-x", "-rw-------", "lib -> usr/lib"] {
            assert!(listing.contains(wanted), "{wanted} is not in\n{listing}");
        }
    }
}
