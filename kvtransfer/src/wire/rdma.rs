//! What two engines tell each other about RDMA: the rails in the hello, the ends of a queue pair, and the small frames
//! that travel through it.
//!
//! ```text
//! control   Hello.rails                         every device with its address and the rkey of every chunk of every region
//! lane's own TCP connection (stays open beside the queue pair)
//!           opener → QpOpen   acceptor → QpReady   [standard: rdma_cm connects]   opener → QpUp   …   either → QpDown
//! queue pair
//!           opener → Hello   acceptor → Hello      the active side speaks first (iWARP)
//!           sender → WRITE … WRITE, Batch   receiver → Ack      either → Credit, Heartbeat
//! ```
//! A queue pair that failed is destroyed on both sides; each says so with `QpDown` on the connection beside it, *after* its
//! own end is gone, and with the last answers of that end. Only then may batches that were lost with it travel again: the
//! first copy of them can no longer land, and those that had arrived are known as such (promise P1).

mod offer;

use bytemuck::{Pod, Zeroable};

pub use offer::RailOffer;

use super::{
    WireError,
    codec::{Reader, Writer},
    hello::{LANES_MAX, TOKEN_BYTES_MAX},
    lane::{Ack, BatchHeader},
};
use crate::ids::InstanceId;

/// Most rails (RDMA devices) of one engine: the largest instances have 8 network cards.
pub const RAILS_MAX: usize = 8;
/// Most rkeys of one rail: a node's worth of memory in chunks of 2 GiB, or thousands of small buffers.
pub const RKEYS_MAX: usize = 1 << 16;
/// Most frames that one end of a queue pair can take without a pause: bounds the receive queue.
pub const RECEIVES_MAX: u16 = 1024;
/// Answers that the end of a queue pair takes along, at most: the largest window.
pub const ANSWERS_MAX: usize = 256;
/// Most bytes of the memory that one end of a queue pair offers for packed batches: what a sender must have beside it.
pub const LANDING_BYTES_MAX: u32 = 16 << 20;
/// Fewest: one for credits and heartbeats, one for an answer, and two batches.
pub const RECEIVES_MIN: u16 = 4;

/// How a queue pair is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Connector {
    /// Both ends call `ibv_modify_qp` with what they told each other out of band: RoCE, InfiniBand, eRDMA's compat mode.
    Compat,
    /// Through `rdma_cm`: iWARP, eRDMA's standard mode.
    Standard,
}

impl Connector {
    /// As in logs and `kvtransfer doctor`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compat => "compat",
            Self::Standard => "standard",
        }
    }

    pub(super) fn write(self, w: &mut Writer<'_>) {
        w.u8(match self {
            Self::Compat => 0,
            Self::Standard => 1,
        });
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        match r.u8()? {
            0 => Ok(Self::Compat),
            1 => Ok(Self::Standard),
            got => Err(WireError::Value {
                what: "connector",
                got: got.into(),
            }),
        }
    }
}

/// One end of a queue pair that both sides connect by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its number, 24 bits.
    pub qpn: u32,
    /// First packet sequence number it sends, 24 bits.
    pub psn: u32,
    /// Address of its port.
    pub gid: [u8; 16],
    /// Local identifier of its port (InfiniBand only).
    pub lid: u16,
    /// Path MTU as verbs number it (1 = 256 … 5 = 4096).
    pub mtu: u8,
}

impl Endpoint {
    fn write(&self, w: &mut Writer<'_>) {
        w.u32(self.qpn);
        w.u32(self.psn);
        w.raw(&self.gid);
        w.u16(self.lid);
        w.u8(self.mtu);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let number = |what, got: u32| {
            let is_small = got < 1 << 24;
            is_small.then_some(got).ok_or(WireError::Value {
                what,
                got: got.into(),
            })
        };
        let qpn = number("queue pair number", r.u32()?)?;
        let psn = number("packet sequence number", r.u32()?)?;
        let (gid, lid, mtu) = (r.id()?, r.u16()?, r.u8()?);
        if !(1..=5).contains(&mtu) {
            return Err(WireError::Value {
                what: "path MTU",
                got: mtu.into(),
            });
        }
        Ok(Self {
            qpn,
            psn,
            gid,
            lid,
            mtu,
        })
    }
}

/// How to reach one end of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QpEnd {
    /// See [`Connector::Compat`].
    Compat(Endpoint),
    /// See [`Connector::Standard`]. From the opener: where it will connect from, port 0; from the acceptor: where
    /// rdma_cm listens, and the number that the private data of the connection must hold.
    Standard {
        /// IPv4 address of the rail.
        address: [u8; 4],
        /// Port of the rdma_cm listener.
        port: u16,
        /// Proves that a connection to that port is the one that was announced here.
        token: u64,
    },
}

impl QpEnd {
    fn write(&self, w: &mut Writer<'_>) {
        match self {
            Self::Compat(endpoint) => {
                Connector::Compat.write(w);
                endpoint.write(w);
            }
            Self::Standard {
                address,
                port,
                token,
            } => {
                Connector::Standard.write(w);
                w.raw(address);
                w.u16(*port);
                w.u64(*token);
            }
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(match Connector::read(r)? {
            Connector::Compat => Self::Compat(Endpoint::read(r)?),
            Connector::Standard => Self::Standard {
                address: r.u32()?.to_le_bytes(),
                port: r.u16()?,
                token: r.u64()?,
            },
        })
    }
}

/// What one end of a queue pair promises the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QpTerms {
    /// How to reach it.
    pub end: QpEnd,
    /// Frames it can take before it has returned credits.
    pub receives: u16,
    /// Where the other end writes batch headers when notices travel as immediate data: address and rkey of
    /// `receives` slots of 64 bytes. Zero when they travel as SEND.
    pub slots: (u64, u32),
    /// Where the other end writes packed batches.
    pub landing: Landing,
}

/// Memory that one end of a queue pair offers for batches that the other end packs. It is used as a ring: each batch lies behind
/// the one before it, or at the start where the rest is too short; its answer frees it. So the receiver knows every place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Landing {
    /// Its address as a WRITE names it.
    pub address: u64,
    /// The remote key that covers it.
    pub rkey: u32,
    /// Its bytes, at most [`LANDING_BYTES_MAX`]; a packed batch has at most half. Zero: nothing is offered.
    pub bytes: u32,
}

impl Landing {
    fn write(&self, w: &mut Writer<'_>) {
        w.u64(self.address);
        w.u32(self.rkey);
        w.u32(self.bytes);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let (address, rkey, bytes) = (r.u64()?, r.u32()?, r.u32()?);
        if bytes > LANDING_BYTES_MAX {
            return Err(WireError::TooLong {
                what: "landing memory",
                got: bytes.into(),
                limit: LANDING_BYTES_MAX.into(),
            });
        }
        if address.checked_add(bytes.into()).is_none() {
            return Err(WireError::Value {
                what: "landing address",
                got: address,
            });
        }
        Ok(Self {
            address,
            rkey,
            bytes,
        })
    }
}

impl QpTerms {
    fn write(&self, w: &mut Writer<'_>) {
        self.end.write(w);
        w.u16(self.receives);
        w.u64(self.slots.0);
        w.u32(self.slots.1);
        self.landing.write(w);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let end = QpEnd::read(r)?;
        let receives = r.u16()?;
        if !(RECEIVES_MIN..=RECEIVES_MAX).contains(&receives) {
            return Err(WireError::Value {
                what: "receive queue length",
                got: receives.into(),
            });
        }
        Ok(Self {
            end,
            receives,
            slots: (r.u64()?, r.u32()?),
            landing: Landing::read(r)?,
        })
    }
}

/// First message on the connection beside a queue pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QpOpen {
    /// Who opens it.
    pub instance: InstanceId,
    /// Joins it to a control stream.
    pub link: u64,
    /// Which lane.
    pub lane: u8,
    /// Bearer token, empty if none.
    pub token: Vec<u8>,
    /// The opener's rail, an index into its hello.
    pub rail: u8,
    /// The acceptor's rail.
    pub peer_rail: u8,
    /// The opener's end.
    pub terms: QpTerms,
}

impl QpOpen {
    pub(super) fn write(&self, w: &mut Writer<'_>) {
        w.raw(&self.instance.0);
        w.u64(self.link);
        w.u8(self.lane);
        w.count(self.token.len());
        w.raw(&self.token);
        w.u8(self.rail);
        w.u8(self.peer_rail);
        self.terms.write(w);
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let instance = InstanceId(r.id()?);
        let link = r.u64()?;
        let bounded = |what, got: u8, bound: usize| {
            let is_small = usize::from(got) < bound;
            is_small.then_some(got).ok_or(WireError::Value {
                what,
                got: got.into(),
            })
        };
        Ok(Self {
            instance,
            link,
            lane: bounded("lane number", r.u8()?, LANES_MAX.into())?,
            token: r.bytes("token", TOKEN_BYTES_MAX)?,
            rail: bounded("rail number", r.u8()?, RAILS_MAX)?,
            peer_rail: bounded("rail number", r.u8()?, RAILS_MAX)?,
            terms: QpTerms::read(r)?,
        })
    }
}

pub(super) fn write_terms(w: &mut Writer<'_>, terms: &QpTerms) {
    terms.write(w);
}

pub(super) fn read_terms(r: &mut Reader<'_>) -> Result<QpTerms, WireError> {
    QpTerms::read(r)
}

/// What a frame of a queue pair says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// First frame each way: the path works.
    Hello {
        /// `RoomFailed` messages that the speaker has put on the control stream so far. The other end hands no batch to
        /// the new queue pair before it has heard as many: a room that ended with the old one must not go on over it.
        failures_told: u64,
    },
    /// The WRITEs before it on this queue pair carried this batch.
    Batch(BatchHeader),
    /// Answers a batch.
    Ack(Ack),
    /// Only returns credits.
    Credit,
    /// The queue pair still works; sent when it is idle, because a dead peer is otherwise invisible to some transports.
    Heartbeat,
}

/// First eight bytes of every frame.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Prefix {
    kind: u8,
    reserved: u8,
    credits: u16,
    mark: u32,
}

impl Frame {
    /// Most bytes of a frame: fits the inline space of every known device (96 bytes on eRDMA, 80 on siw).
    pub const LEN_MAX: usize = size_of::<Prefix>() + BatchHeader::LEN;
    const MARK: u32 = u32::from_le_bytes(*b"KVTF");

    /// Whether it asks for the peer's attention (a solicited event) even if nobody there waits for anything: an answer does not.
    pub fn is_marked(&self) -> bool {
        !matches!(self, Self::Ack(_))
    }

    /// Writes the frame to `out` and says how long it is. `credits`: receives posted again since the last frame.
    pub fn encode(&self, credits: u16, out: &mut [u8; Self::LEN_MAX]) -> usize {
        let prefix = |kind| Prefix {
            kind,
            reserved: 0,
            credits,
            mark: Self::MARK,
        };
        let mut end = size_of::<Prefix>();
        let kind = match self {
            Self::Hello { failures_told } => {
                out[end..end + 8].copy_from_slice(&failures_told.to_le_bytes());
                end += 8;
                1
            }
            Self::Batch(header) => {
                out[end..end + BatchHeader::LEN].copy_from_slice(&header.to_bytes());
                end += BatchHeader::LEN;
                2
            }
            Self::Ack(ack) => {
                out[end..end + Ack::LEN].copy_from_slice(&ack.to_bytes());
                end += Ack::LEN;
                3
            }
            Self::Credit => 4,
            Self::Heartbeat => 5,
        };
        out[..size_of::<Prefix>()].copy_from_slice(bytemuck::bytes_of(&prefix(kind)));
        end
    }

    /// Reads a frame and the credits it returns.
    ///
    /// # Errors
    /// Anything but a whole frame of a known kind; the queue pair cannot be trusted any more.
    pub fn parse(bytes: &[u8]) -> Result<(Self, u16), WireError> {
        let length = WireError::Length {
            what: "queue pair frame",
        };
        let (prefix, body) = bytes
            .split_at_checked(size_of::<Prefix>())
            .ok_or_else(|| length.clone())?;
        let prefix: Prefix = bytemuck::pod_read_unaligned(prefix);
        if prefix.mark != Self::MARK {
            return Err(WireError::Magic {
                expected: Self::MARK,
                got: prefix.mark,
            });
        }
        let frame = match prefix.kind {
            4 | 5 if !body.is_empty() => return Err(length),
            1 => Self::Hello {
                failures_told: u64::from_le_bytes(body.try_into().map_err(|_| length)?),
            },
            2 => Self::Batch(BatchHeader::parse(body.try_into().map_err(|_| length)?)?),
            3 => Self::Ack(Ack::parse(body.try_into().map_err(|_| length)?)?),
            4 => Self::Credit,
            5 => Self::Heartbeat,
            got => {
                return Err(WireError::Value {
                    what: "frame kind",
                    got: got.into(),
                });
            }
        };
        Ok((frame, prefix.credits))
    }
}

/// Immediate data of a notice: the slot that holds the batch header, and returned credits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Immediate {
    /// Index of the slot.
    pub slot: u16,
    /// See [`Frame::encode`].
    pub credits: u16,
}

impl Immediate {
    /// The 32 bits.
    pub fn to_bits(self) -> u32 {
        u32::from(self.credits) << 16 | u32::from(self.slot)
    }

    /// From the 32 bits.
    pub fn from_bits(bits: u32) -> Self {
        let [a, b, c, d] = bits.to_le_bytes();
        Self {
            slot: u16::from_le_bytes([a, b]),
            credits: u16::from_le_bytes([c, d]),
        }
    }
}

const _: () = assert!(Frame::LEN_MAX == 72 && size_of::<Prefix>() == 8);
