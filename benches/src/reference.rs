//! The plain limits, both halves: what the same bytes cost without an engine.
#![forbid(unsafe_code)]

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
};

use anyhow::Context as _;
use kvtransfer::memory::Region;

use crate::{
    case::{Block, Case},
    protocol::{READY, ReferenceAddress, ReferenceKind},
    raw::{self, Ranges},
};

/// Where the initiator waits for the target's connection.
pub(crate) enum Waiting {
    Tcp(TcpListener),
    Unix(UnixListener, String),
    /// A reference within one process.
    Nothing,
}

impl Waiting {
    pub(crate) fn new(kind: ReferenceKind) -> anyhow::Result<Self> {
        match kind {
            ReferenceKind::Tcp => Ok(Self::Tcp(TcpListener::bind("127.0.0.1:0")?)),
            ReferenceKind::Unix | ReferenceKind::Pull => {
                let name = format!("kvbench-{}", std::process::id());
                let address = SocketAddr::from_abstract_name(&name)?;
                Ok(Self::Unix(UnixListener::bind_addr(&address)?, name))
            }
            ReferenceKind::Memcpy | ReferenceKind::Perftest => Ok(Self::Nothing),
        }
    }

    pub(crate) fn address(&self) -> anyhow::Result<Option<ReferenceAddress>> {
        Ok(match self {
            Self::Tcp(listener) => Some(ReferenceAddress::Tcp(listener.local_addr()?)),
            Self::Unix(_, name) => Some(ReferenceAddress::Unix(name.clone())),
            Self::Nothing => None,
        })
    }

    /// Takes the connection that the target has made.
    pub(crate) fn accept(self) -> anyhow::Result<Option<File>> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Some(File::from(OwnedFd::from(stream)))
            }
            Self::Unix(listener, _) => Some(File::from(OwnedFd::from(listener.accept()?.0))),
            Self::Nothing => None,
        })
    }
}

/// The target's end of the connection.
pub(crate) fn connect(address: &ReferenceAddress) -> anyhow::Result<File> {
    let socket = match address {
        ReferenceAddress::Tcp(address) => {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            OwnedFd::from(stream)
        }
        ReferenceAddress::Unix(name) => {
            let address = SocketAddr::from_abstract_name(name)?;
            OwnedFd::from(UnixStream::connect_addr(&address)?)
        }
    };
    Ok(File::from(socket))
}

/// The initiator's half.
pub(crate) struct Sender {
    kind: ReferenceKind,
    socket: Option<File>,
    /// Source ranges per transfer, worked out beforehand: a limit does not plan.
    ranges: Vec<Ranges>,
}

impl Sender {
    pub(crate) fn new(
        kind: ReferenceKind,
        socket: Option<File>,
        case: &Case,
        source: &Region,
    ) -> Self {
        let sends_itself = matches!(kind, ReferenceKind::Tcp | ReferenceKind::Unix);
        let of = |transfer| {
            let offsets = case.blocks(transfer).map(|block| block.source);
            Ranges::of(source, offsets, case.block_bytes)
        };
        let transfers = if sends_itself { case.transfers() } else { 0 };
        Self {
            kind,
            socket,
            ranges: (0..transfers).map(of).collect(),
        }
    }

    /// Waits until the target is about to read.
    pub(crate) fn wait_ready(&mut self) -> anyhow::Result<()> {
        if let Some(socket) = &mut self.socket {
            let byte = read_byte(socket)?;
            anyhow::ensure!(
                byte == READY,
                "the target said {byte}, not that it is ready"
            );
        }
        Ok(())
    }

    /// One transfer, from the first byte to the acknowledgement.
    pub(crate) fn transfer(&mut self, number: usize) -> anyhow::Result<()> {
        let socket = self.socket.as_mut();
        let socket = socket.context("this reference has no socket")?;
        match self.kind {
            ReferenceKind::Tcp | ReferenceKind::Unix => {
                raw::write_all(socket, &mut self.ranges[number])?;
            }
            ReferenceKind::Pull => socket.write_all(&[1])?,
            ReferenceKind::Memcpy | ReferenceKind::Perftest => {
                anyhow::bail!("this reference has no target")
            }
        }
        read_byte(socket)?;
        Ok(())
    }
}

/// The target's half.
pub(crate) struct Receiver {
    kind: ReferenceKind,
    socket: Option<File>,
    local: Vec<Ranges>,
    remote: Vec<Ranges>,
    source_pid: u32,
}

impl Receiver {
    pub(crate) fn new(
        kind: ReferenceKind,
        socket: Option<File>,
        case: &Case,
        target: &Region,
        source: (u32, u64),
    ) -> Self {
        let (source_pid, source_base) = source;
        let transfers = 0..case.transfers();
        let local = |transfer| {
            let offsets = case.blocks(transfer).map(|block| block.target);
            Ranges::of(target, offsets, case.block_bytes)
        };
        let remote = |transfer| {
            let offsets = case.blocks(transfer).map(|block| block.source);
            Ranges::at(source_base, offsets, case.block_bytes)
        };
        Self {
            kind,
            socket,
            local: transfers.clone().map(local).collect(),
            remote: transfers.map(remote).collect(),
            source_pid,
        }
    }

    /// Serves one pass of all transfers.
    pub(crate) fn serve(&mut self, target: &Region) -> anyhow::Result<()> {
        let socket = self.socket.as_mut();
        let socket = socket.context("this reference has no socket")?;
        socket.write_all(&[READY])?;
        for (local, remote) in self.local.iter_mut().zip(&self.remote) {
            match self.kind {
                ReferenceKind::Tcp | ReferenceKind::Unix => raw::read_all(socket, target, local)?,
                ReferenceKind::Pull => {
                    read_byte(socket)?;
                    raw::pull_all(self.source_pid, target, local, remote)?;
                }
                ReferenceKind::Memcpy | ReferenceKind::Perftest => {
                    anyhow::bail!("this reference has no target")
                }
            }
            socket.write_all(&[1])?;
        }
        Ok(())
    }
}

/// Copies the blocks of one transfer within this process.
pub(crate) fn copy(source: &Region, target: &Region, blocks: &[Block], len: usize) {
    for block in blocks {
        target
            .copy_from(block.target, source, block.source, len)
            .expect("invariant: blocks lie within both regions");
    }
}

fn read_byte(socket: &mut File) -> anyhow::Result<u8> {
    let mut byte = [0];
    socket
        .read_exact(&mut byte)
        .context("the other process is gone")?;
    Ok(byte[0])
}
