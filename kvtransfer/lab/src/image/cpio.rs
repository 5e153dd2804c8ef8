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

    /// Reads an archive back by the format's description: name, mode and data of every entry.
    fn read_back(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        while !bytes.is_empty() {
            let field = |index: usize| {
                let digits = &bytes[6 + 8 * index..14 + 8 * index];
                let digits = std::str::from_utf8(digits).expect("hexadecimal");
                u32::from_str_radix(digits, 16).expect("hexadecimal") as usize
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = String::from_utf8_lossy(&bytes[110..110 + name_size - 1]).into_owned();
            let from = (110 + name_size).next_multiple_of(4);
            let mode = u32::try_from(mode).expect("eight digits");
            entries.push((name, mode, bytes[from..from + size].to_vec()));
            bytes = &bytes[(from + size).next_multiple_of(4)..];
        }
        entries
    }

    #[test]
    fn names_and_data_of_every_length_are_read_back() {
        let mut archive = Archive::new(Vec::new());
        let mut expected = Vec::new();
        for length in 0..9 {
            let (name, data) = ("n".repeat(length + 1), vec![7; length * 3]);
            archive.entry(&name, FILE | 0o600, &data).expect("small");
            expected.push((name, FILE | 0o600, data));
        }
        expected.push(("TRAILER!!!".to_owned(), 0, Vec::new()));
        let (bytes, _) = archive.finish().expect("small");
        assert_eq!(read_back(&bytes), expected);
    }
}
