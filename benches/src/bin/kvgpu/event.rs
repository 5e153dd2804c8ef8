//! Rooms whose pages the device still writes when they are pushed: `push_after` with an event of a stream that is behind. The
//! control is the same push without the event, which must arrive wrong: otherwise the stream was not behind.
#![expect(unsafe_code, reason = "copies between buffers that outlive the stream")]

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use kvtransfer::{
    gpu::{self, Event, EventKind, Priority, Stream, memory::DeviceBuffer},
    ids::Room,
    transfer::{Chunk, SendRequest},
};

use crate::{
    data::{POISON, host_seconds},
    heads::Receivers,
    measure::Table,
    ranks::{PATIENCE, Path, Rank, SENDERS_SEED, Shape, items},
};

/// What keeps the stream busy: so many fills of so many bytes, some tenths of a second.
const FILLS: usize = 800;
const FILL_BYTES: usize = 1 << 30;

/// Options of `event`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The GPU that receives, if it is another one.
    #[arg(long)]
    peer_gpu: Option<u32>,
    /// Pages of 16 tokens; each has 1 MiB over all layers.
    #[arg(long, default_value_t = 64)]
    pages: usize,
}

/// A stream that is behind, and what it will write into the sender's pages.
struct Late {
    stream: Stream,
    busy: DeviceBuffer,
    image: DeviceBuffer,
    event: Event,
}

impl Late {
    fn new(gpu: u32, len: usize) -> Result<Self> {
        let context = gpu::Context::primary(gpu)?;
        Ok(Self {
            stream: Stream::new(&context, Priority::High)?,
            busy: DeviceBuffer::new(&context, FILL_BYTES)?,
            image: DeviceBuffer::new(&context, len)?,
            event: Event::new(&context, EventKind::Sleep)?,
        })
    }

    /// Enqueues the writing of `pages`, behind much else.
    fn start(&self, pages: u64) -> Result<()> {
        for _ in 0..FILLS {
            // SAFETY: the buffer outlives the stream's work: every round waits for the event.
            unsafe {
                self.stream
                    .fill(self.busy.address(), POISON, self.busy.len())
            }?;
        }
        // SAFETY: as above; the sender's region has the image's length.
        unsafe {
            self.stream
                .copy(pages, self.image.address(), self.image.len())
        }?;
        Ok(self.stream.record(&self.event)?)
    }
}

pub(crate) fn run(gpu: u32, options: &Options) -> Result<Table> {
    let mut table = Table::default();
    for path in [Path::Pull, Path::Tcp, Path::Ring] {
        one(gpu, options, path, &mut table).with_context(|| format!("{path:?}"))?;
    }
    Ok(table)
}

fn one(gpu: u32, options: &Options, path: Path, table: &mut Table) -> Result<()> {
    let pages = options.pages;
    let shape = Shape {
        rank: 0,
        ranks: 1,
        pages,
    };
    let ranks = [Rank::start(shape, Some(gpu), path, 2, true)?];
    let rank = &ranks[0];
    let peer_gpu = options.peer_gpu.unwrap_or(gpu);
    let mut receivers = Receivers::start(Some(peer_gpu), path, 1, &ranks)?;
    let sources = items(pages, SENDERS_SEED);
    let late = Late::new(gpu, shape.bytes())?;
    for (number, waits) in [(1, true), (2, false), (3, true)] {
        rank.region.write_at(0, &vec![POISON; shape.bytes()])?;
        let seed = 100 + number;
        late.image
            .write(&late.stream, &shape.image(&sources, seed))?;
        receivers.ask(&format!("grant {number}"))?;
        let sending = rank.engine.send(&SendRequest {
            room: Room::new(number).context("rooms count from 1")?,
            timeout: PATIENCE,
        })?;
        sending.wait_ready(PATIENCE)?;
        let chunk = Chunk {
            items: vec![Arc::clone(&sources)],
            last: true,
        };
        late.start(rank.region.base_address())?;
        let events = [late.event.raw_event().0];
        let (took, returned) = host_seconds(|| -> Result<f64> {
            let after: &[u64] = if waits { &events } else { &[] };
            let (returned, pushed) = host_seconds(|| sending.push_after(&chunk, after));
            pushed?;
            ensure!(
                !late.event.is_done()?,
                "the device was done before the push returned: nothing was proved"
            );
            let ended = sending.wait(PATIENCE);
            ended.context("the room did not end by its deadline")??;
            Ok(returned)
        });
        let returned = returned?;
        let happened = late.event.is_done()?;
        receivers.ask("wait")?;
        let wrong: u64 = receivers.ask(&format!("check {seed}"))?.parse()?;
        late.event.synchronize()?;
        let name = path.name();
        let (what, is_right) = if waits {
            let what = format!("room {number} after an event, {name}");
            (what, happened && wrong == 0)
        } else {
            (format!("without the event, {name}: control"), wrong > 0)
        };
        table.check(
            what,
            is_right,
            format!(
                "push returned after {:.0} us, the room ended after {:.0} ms, {wrong} wrong bytes",
                returned * 1e6,
                took * 1e3
            ),
        );
    }
    Ok(())
}
