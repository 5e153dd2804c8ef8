//! Frames of a data lane: batch headers, the mark after an inline payload, acknowledgements.
//!
//! ```text
//! sender   → receiver   BatchHeader (64 B) | source items (pull only) | payload (inline only) | Seal (8 B, inline only)
//! receiver → sender     Ack (32 B), one per batch, in the order of the batches on this lane
//! ```
//! A batch names bytes of the *logical stream* of (component, window of the granted items), never an address: the
//! receiver works out the places itself, from the layouts agreed in the hello and from its own grant.

use bytemuck::{Pod, Zeroable};

use super::WireError;
use crate::ids::Epoch;

/// First word of a batch header: "KVTB".
pub const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"KVTB");
/// First word of an acknowledgement: "KVTA".
pub const ACK_MAGIC: u32 = u32::from_le_bytes(*b"KVTA");
/// Most bytes of one batch: bounds how long a lane is busy with one room.
pub const BATCH_BYTES_MAX: u64 = 64 << 20;
/// The same of one that the receiver copies itself, which no connection carries: a device that copies 2 TB/s wants much at once.
pub const PULL_BATCH_BYTES_MAX: u64 = 256 << 20;
/// Most bytes of a batch that carries none: a whole window, so that a measurement sees the plan and not the headers.
pub const NULL_BATCH_BYTES_MAX: u64 = 1 << 50;
/// Most items (pages) in one window: bounds the item list that follows a pull header (16 KiB).
pub const WINDOW_ITEMS_MAX: u32 = 4096;
/// Most batches of one room and one peer: bounds the receiver's record of what it has seen (128 KiB of bits).
pub const BATCHES_MAX: u32 = 1 << 20;

/// The place of a ring or write batch whose room ended before all of it was copied or posted.
pub const VOID_PLACE: u64 = u64::MAX;

/// How the payload of a batch reaches the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PayloadMode {
    /// It follows the header on the lane, and a [`Seal`] follows it.
    Inline,
    /// The receiver reads it from the sender's memory (same host, `process_vm_readv`).
    Pull,
    /// It lies in the sender's shared ring at [`BatchHeader::place`].
    Ring,
    /// The sender's network card has written it to the target pages before the header (RDMA WRITE).
    Write,
    /// The sender's network card has written it, as it is in the stream, to the receiver's landing memory at
    /// [`BatchHeader::place`] before the header; the receiver moves it to its pages.
    Packed,
    /// It does not: measurements of everything else.
    Null,
}

/// Announces one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BatchHeader {
    magic: u32,
    version: u8,
    mode: u8,
    flags: u8,
    /// Index of the component in the agreed layouts.
    pub component: u8,
    /// The room.
    pub room: u64,
    epoch: u32,
    /// Number of the batch within (room, sender), from 0 without gaps.
    pub seq: u32,
    /// First item of the window, as an index into the granted items of the component.
    pub window_start: u32,
    /// Items in the window.
    pub window_len: u32,
    /// First byte of the window's logical stream that this batch carries.
    pub offset: u64,
    /// Bytes carried.
    pub len: u64,
    /// Pull: address of the sender's validity cell. Ring: offset of the payload in the ring. Write: [`VOID_PLACE`] if the
    /// room ended while the batch was being written. Packed: offset of the payload in the landing memory. Otherwise 0.
    pub place: u64,
    reserved: u32,
    check: u32,
}

/// The wire format is this exact layout; a change is a new protocol version.
const _: () =
    assert!(size_of::<BatchHeader>() == BatchHeader::LEN && align_of::<BatchHeader>() == 8);
const _: () = assert!(size_of::<Ack>() == Ack::LEN && size_of::<Seal>() == Seal::LEN);
const _: () = assert!(
    cfg!(target_endian = "little"),
    "lane frames are sent as they lie in memory"
);

const FLAG_LAST: u8 = 1;
/// The largest number of a payload mode.
const MODE_MAX: u8 = 5;

/// The fields of a header that its sender chooses.
#[derive(Clone, Copy, Debug)]
pub struct BatchFields {
    /// How the payload travels.
    pub mode: PayloadMode,
    /// Whether it is the room's last batch from this sender.
    pub last: bool,
    /// Index of the component.
    pub component: u8,
    /// The room's number.
    pub room: u64,
    /// The grant's epoch.
    pub epoch: Epoch,
    /// Number of the batch.
    pub seq: u32,
    /// First item of the window.
    pub window_start: u32,
    /// Items in the window.
    pub window_len: u32,
    /// First byte of the window's stream.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// See [`BatchHeader::place`].
    pub place: u64,
}

impl BatchHeader {
    /// Bytes on the wire.
    pub const LEN: usize = 64;

    /// Builds the header, checksum included.
    pub fn new(fields: BatchFields) -> Self {
        let mode = match fields.mode {
            PayloadMode::Inline => 0,
            PayloadMode::Pull => 1,
            PayloadMode::Ring => 2,
            PayloadMode::Write => 3,
            PayloadMode::Null => 4,
            PayloadMode::Packed => MODE_MAX,
        };
        let mut header = Self {
            magic: BATCH_MAGIC,
            version: super::control::VERSION,
            mode,
            flags: if fields.last { FLAG_LAST } else { 0 },
            component: fields.component,
            room: fields.room,
            epoch: fields.epoch.0,
            seq: fields.seq,
            window_start: fields.window_start,
            window_len: fields.window_len,
            offset: fields.offset,
            len: fields.len,
            place: fields.place,
            reserved: 0,
            check: 0,
        };
        header.check = header.checksum();
        header
    }

    /// The bytes to send.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        bytemuck::cast(self)
    }

    /// Reads and checks a header. Ranges against the grant are the receiver's business, not checked here.
    ///
    /// # Errors
    /// A bad magic number, version, checksum, mode, flag, or a length over its bound.
    pub fn parse(bytes: &[u8; Self::LEN]) -> Result<Self, WireError> {
        let header: Self = bytemuck::pod_read_unaligned(bytes);
        if header.magic != BATCH_MAGIC {
            return Err(WireError::Magic {
                expected: BATCH_MAGIC,
                got: header.magic,
            });
        }
        let version = super::control::VERSION;
        if header.version != version {
            return Err(WireError::Version {
                expected: version,
                got: header.version,
            });
        }
        let expected = header.checksum();
        if header.check != expected {
            return Err(WireError::Damaged {
                expected,
                got: header.check,
            });
        }
        if header.mode > MODE_MAX {
            return Err(WireError::Value {
                what: "payload mode",
                got: header.mode.into(),
            });
        }
        if header.flags > FLAG_LAST {
            return Err(WireError::Value {
                what: "batch flags",
                got: header.flags.into(),
            });
        }
        let most = match header.mode() {
            PayloadMode::Null => NULL_BATCH_BYTES_MAX,
            PayloadMode::Pull => PULL_BATCH_BYTES_MAX,
            _ => BATCH_BYTES_MAX,
        };
        let bounds = [
            ("batch", header.len, most),
            ("window", header.window_len.into(), WINDOW_ITEMS_MAX.into()),
            ("batch number", header.seq.into(), (BATCHES_MAX - 1).into()),
        ];
        for (what, got, limit) in bounds {
            if got > limit {
                return Err(WireError::TooLong { what, got, limit });
            }
        }
        Ok(header)
    }

    /// How the payload travels.
    pub fn mode(&self) -> PayloadMode {
        match self.mode {
            0 => PayloadMode::Inline,
            1 => PayloadMode::Pull,
            2 => PayloadMode::Ring,
            3 => PayloadMode::Write,
            4 => PayloadMode::Null,
            _ => PayloadMode::Packed,
        }
    }

    /// Whether it is the room's last batch from this sender.
    pub fn is_last(&self) -> bool {
        self.flags & FLAG_LAST != 0
    }

    /// The grant's epoch.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }

    /// Mixes every field but `check`. It catches lost framing, not malice.
    fn checksum(&self) -> u32 {
        let bytes: [u8; Self::LEN] = bytemuck::cast(*self);
        let mix = bytes[..Self::LEN - 4]
            .chunks_exact(4)
            .fold(0x9E37_79B9_u32, |acc, word| {
                let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                (acc.rotate_left(5) ^ word).wrapping_mul(0x85EB_CA6B)
            });
        mix ^ (mix >> 15)
    }
}

/// Follows an inline payload: says whether the bytes before it are what the header promised.
///
/// A sender that failed a room while a batch of it was half written fills the rest with zeros and seals it void, so the
/// receiver can never take recycled pages for a finished room (promise P1 for the sender's side).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Seal {
    mark: u32,
    seq: u32,
}

impl Seal {
    /// Bytes on the wire.
    pub const LEN: usize = 8;
    const GOOD: u32 = u32::from_le_bytes(*b"GOOD");
    const VOID: u32 = u32::from_le_bytes(*b"VOID");

    /// Seals batch `seq`.
    pub fn new(seq: u32, good: bool) -> Self {
        Self {
            mark: if good { Self::GOOD } else { Self::VOID },
            seq,
        }
    }

    /// The bytes to send.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        bytemuck::cast(self)
    }

    /// Whether batch `seq` is good.
    ///
    /// # Errors
    /// Anything but a seal of that batch: the stream lost its framing.
    pub fn parse(bytes: &[u8; Self::LEN], seq: u32) -> Result<bool, WireError> {
        let seal: Self = bytemuck::pod_read_unaligned(bytes);
        if seal.seq != seq || (seal.mark != Self::GOOD && seal.mark != Self::VOID) {
            return Err(WireError::Magic {
                expected: Self::GOOD,
                got: seal.mark,
            });
        }
        Ok(seal.mark == Self::GOOD)
    }
}

/// What became of a batch at the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AckStatus {
    /// Every byte lies in the target pages.
    Placed,
    /// The bytes were thrown away: the room is unknown, over, or another epoch.
    Discarded,
}

/// Answers one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ack {
    magic: u32,
    status: u32,
    /// The room.
    pub room: u64,
    epoch: u32,
    /// Number of the batch.
    pub seq: u32,
    reserved: u64,
}

impl Ack {
    /// Bytes on the wire.
    pub const LEN: usize = 32;

    /// Answers the batch of that header.
    pub fn new(header: &BatchHeader, status: AckStatus) -> Self {
        Self {
            magic: ACK_MAGIC,
            status: u32::from(status == AckStatus::Discarded),
            room: header.room,
            epoch: header.epoch,
            seq: header.seq,
            reserved: 0,
        }
    }

    /// The bytes to send.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        bytemuck::cast(self)
    }

    /// Reads and checks an acknowledgement.
    ///
    /// # Errors
    /// A bad magic number or status.
    pub fn parse(bytes: &[u8; Self::LEN]) -> Result<Self, WireError> {
        let ack: Self = bytemuck::pod_read_unaligned(bytes);
        if ack.magic != ACK_MAGIC {
            return Err(WireError::Magic {
                expected: ACK_MAGIC,
                got: ack.magic,
            });
        }
        if ack.status > 1 {
            return Err(WireError::Value {
                what: "ack status",
                got: ack.status.into(),
            });
        }
        Ok(ack)
    }

    /// What became of the batch.
    pub fn status(&self) -> AckStatus {
        if self.status == 0 {
            AckStatus::Placed
        } else {
            AckStatus::Discarded
        }
    }

    /// The grant's epoch.
    pub fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }
}

/// The value of a sender's validity cell while (room, epoch) may be pulled; any other value means the pages are released.
pub fn pull_token(room: u64, epoch: Epoch) -> u64 {
    // Odd multiplier: a bijection, so two live rooms of one epoch never share a token; never zero, which means "free".
    (room ^ (u64::from(epoch.0) << 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
}
