//! The plain system calls that the references consist of.
#![expect(
    unsafe_code,
    reason = "the plain limits are raw vectored calls over scattered memory"
)]

use std::{io, os::fd::AsRawFd};

use kvtransfer::memory::Region;

/// Most ranges in one call (`UIO_MAXIOV`, uapi/linux/uio.h).
pub(crate) const IOV_MAX: usize = 1024;

/// Scattered ranges of this process's memory, or of another's.
pub(crate) struct Ranges(Vec<libc::iovec>);

impl Ranges {
    /// Ranges of `len` bytes at `offsets` of a region of this process.
    ///
    /// # Panics
    /// A range is not inside the region.
    pub(crate) fn of(region: &Region, offsets: impl Iterator<Item = u64>, len: usize) -> Self {
        let bound = region.len() as u64;
        let inside = offsets.inspect(|offset| {
            assert!(offset + len as u64 <= bound, "a block leaves its region");
        });
        Self::at(region.base_address(), inside, len)
    }

    /// Ranges of another process, whose region starts at `base`. Only the kernel follows them.
    pub(crate) fn at(base: u64, offsets: impl Iterator<Item = u64>, len: usize) -> Self {
        let range = |offset| {
            let address = usize::try_from(base + offset).expect("invariant: 64-bit addresses");
            libc::iovec {
                iov_base: std::ptr::without_provenance_mut(address),
                iov_len: len,
            }
        };
        Self(offsets.map(range).collect())
    }

    fn bytes(&self) -> usize {
        self.0.iter().map(|range| range.iov_len).sum()
    }

    /// Calls `call` with up to [`IOV_MAX`] ranges at a time until all are done. A range that a call leaves unfinished
    /// is shortened for the next one and restored afterwards.
    fn each(&mut self, mut call: impl FnMut(&[libc::iovec]) -> isize) -> io::Result<()> {
        let mut at = 0;
        let mut skip = 0;
        while at < self.0.len() {
            let whole = self.0[at];
            self.0[at] = libc::iovec {
                iov_base: whole.iov_base.wrapping_byte_add(skip),
                iov_len: whole.iov_len - skip,
            };
            let end = self.0.len().min(at + IOV_MAX);
            let done = call(&self.0[at..end]);
            self.0[at] = whole;
            let Ok(done) = usize::try_from(done) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            };
            if done == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            skip += done;
            while at < self.0.len() && skip >= self.0[at].iov_len {
                skip -= self.0[at].iov_len;
                at += 1;
            }
        }
        Ok(())
    }
}

/// Writes all ranges to a blocking socket.
///
/// `ranges` must lie in a region that lives (see [`Ranges::of`]): addresses are not checked again, and the kernel
/// answers for those that are not mapped (`EFAULT`).
pub(crate) fn write_all(socket: &impl AsRawFd, ranges: &mut Ranges) -> io::Result<()> {
    let fd = socket.as_raw_fd();
    ranges.each(|some| {
        let count = i32::try_from(some.len()).expect("invariant: at most IOV_MAX");
        // SAFETY: `some` is a live slice of iovecs; the kernel only reads the memory behind them and checks that it is
        // mapped.
        unsafe { libc::writev(fd, some.as_ptr(), count) }
    })
}

/// Fills all ranges of `region` from a blocking socket.
///
/// # Panics
/// The ranges are not inside `region`.
pub(crate) fn read_all(
    socket: &impl AsRawFd,
    region: &Region,
    ranges: &mut Ranges,
) -> io::Result<()> {
    check_inside(region, ranges);
    let fd = socket.as_raw_fd();
    ranges.each(|some| {
        let count = i32::try_from(some.len()).expect("invariant: at most IOV_MAX");
        // SAFETY: every range lies in `region`, checked above; the caller's borrow keeps it alive during the call, and
        // no reference to its bytes can exist (`Region` hands out none).
        unsafe { libc::readv(fd, some.as_ptr(), count) }
    })
}

/// Copies ranges of process `pid` into ranges of `region`, pairwise equally long.
///
/// # Panics
/// The local ranges are not inside `region`, or the lists differ in number or bytes.
pub(crate) fn pull_all(
    pid: u32,
    region: &Region,
    local: &Ranges,
    remote: &Ranges,
) -> io::Result<()> {
    check_inside(region, local);
    assert_eq!(local.0.len(), remote.0.len(), "lists pair up");
    assert_eq!(local.bytes(), remote.bytes(), "lists pair up");
    let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    for (to, from) in local.0.chunks(IOV_MAX).zip(remote.0.chunks(IOV_MAX)) {
        // SAFETY: local ranges lie in `region`, checked above, which the caller's borrow keeps alive and to whose bytes
        // no reference can exist; remote ranges are the kernel's to check.
        let done = unsafe {
            libc::process_vm_readv(
                pid,
                to.as_ptr(),
                to.len() as _,
                from.as_ptr(),
                from.len() as _,
                0,
            )
        };
        let done = usize::try_from(done).map_err(|_| io::Error::last_os_error())?;
        let wanted: usize = to.iter().map(|range| range.iov_len).sum();
        if done != wanted {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
    }
    Ok(())
}

/// The ranges are plain numbers, so whoever writes through them looks again where they point.
fn check_inside(region: &Region, ranges: &Ranges) {
    let start = region.base_address();
    let end = start + region.len() as u64;
    for range in &ranges.0 {
        let from = range.iov_base.addr() as u64;
        let inside = from >= start && from + range.iov_len as u64 <= end;
        assert!(inside, "a range leaves its region");
    }
}

/// Seconds of processor time, user and system, that this process has used.
pub(crate) fn cpu_seconds() -> f64 {
    // SAFETY: an all-zero rusage is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a live rusage that the kernel fills.
    let done = unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    assert_eq!(done, 0, "getrusage of oneself cannot fail");
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Asks the kernel to kill this process when the thread that started it ends, however that ends.
pub(crate) fn die_with_parent() {
    // SAFETY: sets a flag of this process, touches no memory.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// What another process is told by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// Sleep until told to continue.
    Stop,
    Continue,
    /// End without a word.
    Kill,
}

/// Signals a process that the caller knows to live: its child, or its parent.
pub(crate) fn signal(process: u32, signal: Signal) -> io::Result<()> {
    let number = match signal {
        Signal::Stop => libc::SIGSTOP,
        Signal::Continue => libc::SIGCONT,
        Signal::Kill => libc::SIGKILL,
    };
    let process = i32::try_from(process).map_err(io::Error::other)?;
    // SAFETY: touches no memory.
    match unsafe { libc::kill(process, number) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, thread};

    use kvtransfer::memory::Region;

    use super::{IOV_MAX, Ranges, pull_all, read_all, write_all};

    const LEN: usize = 48;
    const COUNT: usize = 3 * IOV_MAX + 5;

    fn filled() -> (Region, Vec<u8>) {
        let region = Region::mmap(2 * LEN * COUNT).unwrap();
        let bytes: Vec<u8> = (0..region.len())
            .map(|at| (at * 31).to_le_bytes()[1])
            .collect();
        region.write_at(0, &bytes).unwrap();
        (region, bytes)
    }

    fn check(source: &[u8], target: &Region) {
        for at in 0..COUNT {
            let mut got = [0; LEN];
            target.read_at((at * LEN) as u64, &mut got).unwrap();
            assert_eq!(got, source[2 * at * LEN..][..LEN], "block {at}");
        }
    }

    #[test]
    fn scattered_ranges_arrive_in_order_through_a_small_socket() {
        let (source, bytes) = filled();
        let target = Region::mmap(LEN * COUNT).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let offsets = (0..COUNT).map(|at| (2 * at * LEN) as u64);
                write_all(&here, &mut Ranges::of(&source, offsets, LEN)).unwrap();
            });
            let offsets = (0..COUNT).map(|at| (at * LEN) as u64);
            let mut ranges = Ranges::of(&target, offsets, LEN);
            read_all(&there, &target, &mut ranges).unwrap();
            assert_eq!(ranges.bytes(), LEN * COUNT, "shortened ranges are restored");
        });
        check(&bytes, &target);
    }

    #[test]
    fn pulled_ranges_arrive() {
        let (source, bytes) = filled();
        let target = Region::mmap(LEN * COUNT).unwrap();
        let from = (0..COUNT).map(|at| (2 * at * LEN) as u64);
        let from = Ranges::at(source.base_address(), from, LEN);
        let to = Ranges::of(&target, (0..COUNT).map(|at| (at * LEN) as u64), LEN);
        pull_all(std::process::id(), &target, &to, &from).unwrap();
        check(&bytes, &target);
    }
}
