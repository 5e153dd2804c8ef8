//! Messages of the control stream: a 12-byte head (magic, version, kind, length) and a body.

mod decoder;

pub use decoder::ControlDecoder;

use super::{
    WireError,
    blocks::{WriteOpen, read_blocks, write_blocks},
    codec::{Reader, Writer},
    hello::{COMPONENTS_MAX, Face, Hello, LANES_MAX, TOKEN_BYTES_MAX},
    lane::Ack,
    rdma::{ANSWERS_MAX, QpOpen, QpTerms, read_terms, write_terms},
};
use crate::ids::{Epoch, InstanceId};

/// Version of the whole protocol, spoken in every message head and batch header.
pub const VERSION: u8 = 3;
/// First word of every control message: "KVTC".
pub const CONTROL_MAGIC: u32 = u32::from_le_bytes(*b"KVTC");
/// Bytes of a message head.
pub const HEAD_LEN: usize = 12;
/// Most bytes of a message body: a grant of [`GRANT_ITEMS_MAX`] items and some lists.
pub const BODY_BYTES_MAX: usize = 8 << 20;
/// Most bytes of a body before the peer has introduced itself: bounds what a stranger can make us hold.
pub const STRANGER_BODY_BYTES_MAX: usize = 2 << 20;
/// Most items (pages) in one grant: 1 Mi pages of 16 tokens are a 16 M-token context.
pub const GRANT_ITEMS_MAX: usize = 1 << 20;
/// Most bytes of a failure text.
pub const REASON_BYTES_MAX: usize = 512;

/// Why a room failed, as told to the other side. Numbers are part of the wire format and never re-used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FailureCode {
    /// The application cancelled it.
    Cancelled,
    /// Its deadline passed.
    Timeout,
    /// The other side broke the protocol.
    Misbehaved,
    /// A room of that number is already live.
    DuplicateRoom,
    /// Nobody opened the sending side in time.
    NoSender,
    /// The page lists of the two sides do not fit together.
    ItemMismatch,
    /// Memory could not be read or written.
    Memory,
    /// The engine is shutting down.
    Shutdown,
    /// A queue or table of that side is full.
    Busy,
    /// Another peer of the same room failed, so the whole room did.
    OtherPeer,
}

impl FailureCode {
    const ALL: [(Self, u16, &'static str); 10] = [
        (Self::Cancelled, 1, "cancelled"),
        (Self::Timeout, 2, "timeout"),
        (Self::Misbehaved, 3, "misbehaved"),
        (Self::DuplicateRoom, 4, "duplicate_room"),
        (Self::NoSender, 5, "no_sender"),
        (Self::ItemMismatch, 6, "item_mismatch"),
        (Self::Memory, 7, "memory"),
        (Self::Shutdown, 8, "shutdown"),
        (Self::Busy, 9, "busy"),
        (Self::OtherPeer, 10, "other_peer"),
    ];

    /// A stable name for metrics and logs.
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|row| row.0 == self)
            .map_or("unknown", |row| row.2)
    }

    fn number(self) -> u16 {
        Self::ALL
            .iter()
            .find(|row| row.0 == self)
            .map_or(0, |row| row.1)
    }

    fn from_number(got: u16) -> Result<Self, WireError> {
        let row = Self::ALL.iter().find(|row| row.1 == got);
        row.map(|row| row.0).ok_or(WireError::Value {
            what: "failure code",
            got: got.into(),
        })
    }
}

/// What the receiving side is ready to take for one room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The room.
    pub room: u64,
    /// This use of the room.
    pub epoch: Epoch,
    /// How many receivers the sender must hear from before it starts (SGLang's `required_dst_info_num`).
    pub receivers_expected: u16,
    /// True where the receiver takes nothing from this sender but the sender must still conclude (SGLang's dummy ranks).
    pub dummy: bool,
    /// Tokens that the receiver already holds (SGLang's `decode_prefix_len`).
    pub prefix_tokens: u32,
    /// Target items per component of the receiver's layout.
    pub items: Vec<Vec<i32>>,
}

/// One message of the control stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Dialling side's introduction.
    Hello(Box<Hello>),
    /// Accepting side's introduction.
    Welcome(Box<Hello>),
    /// The accepting side will not talk; the stream ends.
    Reject {
        /// A sentence for the peer's log.
        reason: String,
    },
    /// First message on a lane's own connection.
    LaneOpen {
        /// Who opens it.
        instance: InstanceId,
        /// Joins it to a control stream.
        link: u64,
        /// Which lane.
        lane: u8,
        /// Bearer token, empty if none.
        token: Vec<u8>,
        /// Whether the opener can read the accepting process's memory.
        can_pull: bool,
    },
    /// Answers [`Control::LaneOpen`]; lane frames follow.
    LaneReady {
        /// Whether the accepting side can read the opener's memory.
        can_pull: bool,
    },
    /// The receiver grants a room.
    Grant(Grant),
    /// One side ends a room.
    RoomFailed {
        /// The room.
        room: u64,
        /// Which use of it.
        epoch: Epoch,
        /// Why.
        code: FailureCode,
        /// The same in words.
        reason: String,
    },
    /// A sender has ended a room, or was told that it ended: how many batches it ever handed to its data connections.
    /// When the receiver has seen them all, no write of the room is on its way any more.
    RoomStopped {
        /// The room.
        room: u64,
        /// Which use of it.
        epoch: Epoch,
        /// Batches 0 to this number, exclusive.
        batches: u32,
    },
    /// First message on the connection beside a queue pair.
    QpOpen(Box<QpOpen>),
    /// Answers [`Control::QpOpen`].
    QpReady(QpTerms),
    /// The opener's end of the queue pair is connected.
    QpUp,
    /// This end of the queue pair is destroyed: nothing can land through it any more. The connection ends.
    QpDown {
        /// Why, in words.
        reason: String,
        /// Batches that this end has answered, whether or not the answer got through.
        answered: u64,
        /// The last of these answers, oldest first.
        answers: Vec<Ack>,
    },
    /// Asks for a room of explicit blocks. The answer is a [`Grant`] of item 0, or [`Control::RoomFailed`] of epoch 0.
    WriteOpen(Box<WriteOpen>),
    /// The sender of such a room has given it up.
    WriteClose {
        /// Its number.
        room: u64,
    },
    /// Answers [`Control::WriteClose`]: nothing of the room can be written any more.
    WriteClosed {
        /// Its number.
        room: u64,
    },
    /// Are you there?
    Ping {
        /// Returned in the pong.
        nonce: u64,
    },
    /// Yes.
    Pong {
        /// From the ping.
        nonce: u64,
    },
    /// First and last message of somebody who only looks (the doctor), with the engine's token.
    Look(Vec<u8>),
    /// Answers [`Control::Look`]; the stream ends.
    Seen(Box<Face>),
}

impl Control {
    /// Appends the whole message, head included.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; HEAD_LEN]);
        self.write_body(&mut Writer(out));
        let len = out.len() - start - HEAD_LEN;
        let len = u32::try_from(len).expect("invariant: local messages are bounded below 2^32");
        let head = &mut out[start..start + HEAD_LEN];
        head[..4].copy_from_slice(&CONTROL_MAGIC.to_le_bytes());
        head[4] = VERSION;
        head[5] = self.kind();
        head[8..].copy_from_slice(&len.to_le_bytes());
    }

    /// Numbers are part of the wire format and never re-used.
    fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => 1,
            Self::Welcome(_) => 2,
            Self::Reject { .. } => 3,
            Self::LaneOpen { .. } => 4,
            Self::LaneReady { .. } => 5,
            Self::Grant(_) => 6,
            Self::RoomFailed { .. } => 7,
            Self::Ping { .. } => 8,
            Self::Pong { .. } => 9,
            Self::RoomStopped { .. } => 10,
            Self::QpOpen(_) => 11,
            Self::QpReady(_) => 12,
            Self::QpUp => 13,
            Self::QpDown { .. } => 14,
            Self::Look(_) => 15,
            Self::Seen(_) => 16,
            Self::WriteOpen(_) => 17,
            Self::WriteClose { .. } => 18,
            Self::WriteClosed { .. } => 19,
        }
    }

    fn write_body(&self, w: &mut Writer<'_>) {
        match self {
            Self::Hello(hello) | Self::Welcome(hello) => hello.write(w),
            Self::Reject { reason } => w.text(bounded(reason)),
            Self::LaneOpen {
                instance,
                link,
                lane,
                token,
                can_pull,
            } => {
                w.raw(&instance.0);
                w.u64(*link);
                w.u8(*lane);
                w.count(token.len());
                w.raw(token);
                w.u8(u8::from(*can_pull));
            }
            Self::LaneReady { can_pull } => w.u8(u8::from(*can_pull)),
            Self::Grant(grant) => write_grant(w, grant),
            Self::RoomFailed {
                room,
                epoch,
                code,
                reason,
            } => {
                w.u64(*room);
                w.u32(epoch.0);
                w.u16(code.number());
                w.text(bounded(reason));
            }
            Self::RoomStopped {
                room,
                epoch,
                batches,
            } => {
                w.u64(*room);
                w.u32(epoch.0);
                w.u32(*batches);
            }
            Self::QpOpen(open) => open.write(w),
            Self::QpReady(terms) => write_terms(w, terms),
            Self::QpUp => {}
            Self::QpDown {
                reason,
                answered,
                answers,
            } => {
                w.text(bounded(reason));
                w.u64(*answered);
                w.count(answers.len());
                for answer in answers {
                    w.raw(&answer.to_bytes());
                }
            }
            Self::WriteOpen(open) => write_blocks(w, open),
            Self::WriteClose { room } | Self::WriteClosed { room } => w.u64(*room),
            Self::Ping { nonce } | Self::Pong { nonce } => w.u64(*nonce),
            Self::Look(token) => {
                w.count(token.len());
                w.raw(token);
            }
            Self::Seen(face) => face.write(w),
        }
    }

    fn decode(kind: u8, body: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(body, "control message");
        let message = match kind {
            1 => Self::Hello(Box::new(Hello::read(&mut r)?)),
            2 => Self::Welcome(Box::new(Hello::read(&mut r)?)),
            3 => Self::Reject {
                reason: r.text("reason", REASON_BYTES_MAX)?,
            },
            4 => Self::LaneOpen {
                instance: InstanceId(r.id()?),
                link: r.u64()?,
                lane: read_lane(&mut r)?,
                token: r.bytes("token", TOKEN_BYTES_MAX)?,
                can_pull: r.u8()? != 0,
            },
            5 => Self::LaneReady {
                can_pull: r.u8()? != 0,
            },
            6 => Self::Grant(read_grant(&mut r)?),
            7 => Self::RoomFailed {
                room: r.u64()?,
                epoch: Epoch(r.u32()?),
                code: FailureCode::from_number(r.u16()?)?,
                reason: r.text("reason", REASON_BYTES_MAX)?,
            },
            8 => Self::Ping { nonce: r.u64()? },
            9 => Self::Pong { nonce: r.u64()? },
            10 => Self::RoomStopped {
                room: r.u64()?,
                epoch: Epoch(r.u32()?),
                batches: r.u32()?,
            },
            11 => Self::QpOpen(Box::new(QpOpen::read(&mut r)?)),
            12 => Self::QpReady(read_terms(&mut r)?),
            13 => Self::QpUp,
            14 => read_down(&mut r)?,
            15 => Self::Look(r.bytes("token", TOKEN_BYTES_MAX)?),
            16 => Self::Seen(Box::new(Face::read(&mut r)?)),
            17 => Self::WriteOpen(Box::new(read_blocks(&mut r)?)),
            18 => Self::WriteClose { room: r.u64()? },
            19 => Self::WriteClosed { room: r.u64()? },
            got => {
                return Err(WireError::Value {
                    what: "message kind",
                    got: got.into(),
                });
            }
        };
        r.finish()?;
        Ok(message)
    }
}

/// Cuts a local text at the wire's bound, at a character boundary.
fn bounded(text: &str) -> &str {
    let mut end = text.len().min(REASON_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn read_lane(r: &mut Reader<'_>) -> Result<u8, WireError> {
    let lane = r.u8()?;
    if lane < LANES_MAX {
        Ok(lane)
    } else {
        Err(WireError::Value {
            what: "lane number",
            got: lane.into(),
        })
    }
}

fn read_down(r: &mut Reader<'_>) -> Result<Control, WireError> {
    let reason = r.text("reason", REASON_BYTES_MAX)?;
    let answered = r.u64()?;
    let answers = (0..r.count("answer count", ANSWERS_MAX, Ack::LEN)?)
        .map(|_| Ack::parse(&r.array()?))
        .collect::<Result<_, WireError>>()?;
    Ok(Control::QpDown {
        reason,
        answered,
        answers,
    })
}

fn write_grant(w: &mut Writer<'_>, grant: &Grant) {
    w.u64(grant.room);
    w.u32(grant.epoch.0);
    w.u16(grant.receivers_expected);
    w.u8(u8::from(grant.dummy));
    w.u32(grant.prefix_tokens);
    w.count(grant.items.len());
    for items in &grant.items {
        w.items(items);
    }
}

fn read_grant(r: &mut Reader<'_>) -> Result<Grant, WireError> {
    let room = r.u64()?;
    let epoch = Epoch(r.u32()?);
    let receivers_expected = r.u16()?;
    let dummy = r.u8()? != 0;
    let prefix_tokens = r.u32()?;
    let mut left = GRANT_ITEMS_MAX;
    let items = (0..r.count("component count", COMPONENTS_MAX, 4)?)
        .map(|_| {
            let items = r.items("granted items", left)?;
            left -= items.len();
            Ok(items)
        })
        .collect::<Result<_, WireError>>()?;
    Ok(Grant {
        room,
        epoch,
        receivers_expected,
        dummy,
        prefix_tokens,
        items,
    })
}
