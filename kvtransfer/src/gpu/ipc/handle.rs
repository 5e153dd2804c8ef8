//! What one process tells another about its GPU memory. The other side trusts none of it.
#![forbid(unsafe_code)]

use crate::gpu::{GpuError, device::DeviceUuid};

/// Most physical pieces of one export: 20 GiB of torch's 20 MiB pieces, and so many descriptors.
pub const PIECES_MAX: usize = 1024;

/// Most bytes that one export may claim to cover: more than any GPU has.
const EXPORT_BYTES_MAX: u64 = 1 << 40;

/// Bytes of an encoded handle before what its kind adds.
const FIXED_BYTES: usize = 2 + 16 + 3 * 8;

/// Most bytes of an encoded handle.
pub const HANDLE_BYTES_MAX: usize = FIXED_BYTES + 2 + PIECES_MAX * 8;

const VERSION: u8 = 1;
const PLAIN: u8 = 1;
const VIRTUAL: u8 = 2;

/// A range of a process's GPU memory, for other processes of its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handle {
    /// The GPU it lies on.
    pub device: DeviceUuid,
    /// The allocation's generation in its process.
    pub allocation: u64,
    /// Where the range starts in the allocation, or in the first piece.
    pub offset: u64,
    /// Bytes of the range.
    pub len: u64,
    pub(super) memory: Memory,
}

/// How it is mapped.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Memory {
    /// An IPC handle of a whole allocation of `total` bytes.
    Plain {
        /// `CUipcMemHandle`.
        handle: [u8; 64],
        /// Bytes of the allocation.
        total: u64,
    },
    /// Physical pieces, one behind the other; a descriptor for each comes beside the handle.
    Virtual {
        /// Bytes of each.
        pieces: Vec<u64>,
    },
}

impl Memory {
    /// Bytes of all of it.
    fn total(&self) -> Option<u64> {
        match self {
            Self::Plain { total, .. } => Some(*total),
            Self::Virtual { pieces } => pieces
                .iter()
                .try_fold(0_u64, |sum, bytes| sum.checked_add(*bytes)),
        }
    }
}

impl Handle {
    /// How many descriptors belong to it.
    #[must_use]
    pub fn descriptor_count(&self) -> usize {
        match &self.memory {
            Memory::Plain { .. } => 0,
            Memory::Virtual { pieces } => pieces.len(),
        }
    }

    /// Its bytes, at most [`HANDLE_BYTES_MAX`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let kind = match self.memory {
            Memory::Plain { .. } => PLAIN,
            Memory::Virtual { .. } => VIRTUAL,
        };
        let mut bytes = vec![VERSION, kind];
        bytes.extend_from_slice(&self.device.0);
        for number in [self.allocation, self.offset, self.len] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        match &self.memory {
            Memory::Plain { handle, total } => {
                bytes.extend_from_slice(&total.to_le_bytes());
                bytes.extend_from_slice(handle);
            }
            Memory::Virtual { pieces } => {
                let count = u16::try_from(pieces.len()).expect("invariant: PIECES_MAX fits");
                bytes.extend_from_slice(&count.to_le_bytes());
                for piece in pieces {
                    bytes.extend_from_slice(&piece.to_le_bytes());
                }
            }
        }
        bytes
    }

    /// Reads a peer's bytes.
    ///
    /// # Errors
    /// [`GpuError::Peer`] for anything that no export makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, GpuError> {
        let mut rest = bytes;
        let [version, kind] = take(&mut rest)?;
        if version != VERSION {
            return Err(GpuError::Peer("its version is unknown"));
        }
        let device = DeviceUuid(take(&mut rest)?);
        let allocation = number(&mut rest)?;
        let offset = number(&mut rest)?;
        let len = number(&mut rest)?;
        let memory = match kind {
            PLAIN => {
                let total = number(&mut rest)?;
                let handle = take(&mut rest)?;
                Memory::Plain { handle, total }
            }
            VIRTUAL => {
                let count = usize::from(u16::from_le_bytes(take(&mut rest)?));
                if count == 0 || count > PIECES_MAX {
                    return Err(GpuError::Peer("it has no pieces, or too many"));
                }
                let pieces = (0..count)
                    .map(|_| number(&mut rest))
                    .collect::<Result<Vec<_>, _>>()?;
                if pieces.contains(&0) {
                    return Err(GpuError::Peer("a piece is empty"));
                }
                Memory::Virtual { pieces }
            }
            _ => return Err(GpuError::Peer("its kind is unknown")),
        };
        if !rest.is_empty() {
            return Err(GpuError::Peer("it goes on after its end"));
        }
        let total = memory.total().filter(|total| *total <= EXPORT_BYTES_MAX);
        let end = offset.checked_add(len);
        let fits = total.zip(end).is_some_and(|(total, end)| end <= total);
        if len == 0 || !fits {
            return Err(GpuError::Peer("its range is not within its memory"));
        }
        Ok(Self {
            device,
            allocation,
            offset,
            len,
            memory,
        })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], GpuError> {
    let (taken, left) = rest
        .split_first_chunk::<N>()
        .ok_or(GpuError::Peer("it ends too early"))?;
    *rest = left;
    Ok(*taken)
}

fn number(rest: &mut &[u8]) -> Result<u64, GpuError> {
    Ok(u64::from_le_bytes(take(rest)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain() -> Handle {
        Handle {
            device: DeviceUuid([3; 16]),
            allocation: 77,
            offset: 512,
            len: 4096,
            memory: Memory::Plain {
                handle: [9; 64],
                total: 4608,
            },
        }
    }

    fn pieces(count: usize) -> Handle {
        Handle {
            memory: Memory::Virtual {
                pieces: vec![2 << 20; count],
            },
            ..plain()
        }
    }

    #[test]
    fn handles_survive_the_wire() {
        for handle in [plain(), pieces(1), pieces(PIECES_MAX)] {
            let bytes = handle.encode();
            assert!(bytes.len() <= HANDLE_BYTES_MAX);
            assert_eq!(Handle::decode(&bytes), Ok(handle));
        }
        assert_eq!(pieces(PIECES_MAX).encode().len(), HANDLE_BYTES_MAX);
    }

    #[test]
    fn claims_that_no_export_makes_are_refused() {
        let with = |change: fn(&mut Handle)| {
            let mut handle = plain();
            change(&mut handle);
            Handle::decode(&handle.encode())
        };
        assert!(with(|handle| handle.len = 4097).is_err());
        assert!(with(|handle| handle.len = 0).is_err());
        assert!(with(|handle| handle.offset = u64::MAX).is_err());
        let huge = |total| Handle {
            memory: Memory::Plain {
                handle: [0; 64],
                total,
            },
            ..plain()
        };
        assert!(Handle::decode(&huge(EXPORT_BYTES_MAX).encode()).is_ok());
        assert!(Handle::decode(&huge(EXPORT_BYTES_MAX + 1).encode()).is_err());
        assert!(Handle::decode(&pieces(PIECES_MAX + 1).encode()).is_err());
        assert!(Handle::decode(&pieces(0).encode()).is_err());
        let wrapping = Memory::Virtual {
            pieces: vec![u64::MAX, 4096],
        };
        let wrapping = Handle {
            memory: wrapping,
            ..plain()
        };
        assert!(Handle::decode(&wrapping.encode()).is_err());
        let mut long = plain().encode();
        long.push(0);
        assert!(Handle::decode(&long).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Handle::decode(&bytes);
            let mut near = pieces(4).encode();
            for (place, byte) in bytes.iter().enumerate().take(8) {
                let at = (place * 37 + usize::from(*byte)) % near.len();
                near[at] ^= byte;
            }
            if let Ok(handle) = Handle::decode(&near) {
                prop_assert_eq!(handle.encode(), near);
            }
        }

        #[test]
        fn no_truncation_is_taken(cut in 0..HANDLE_BYTES_MAX) {
            for whole in [plain().encode(), pieces(3).encode()] {
                if cut < whole.len() {
                    prop_assert!(Handle::decode(&whole[..cut]).is_err());
                }
            }
        }
    }
}
