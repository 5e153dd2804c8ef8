//! What happens to a transfer in the middle of which either side is frozen, is killed, or starts its engine again.
#![forbid(unsafe_code)]

use std::{sync::Arc, thread, time::Duration};

use anyhow::Context as _;
use kvtransfer::{
    clock,
    ids::{PeerId, Room},
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
};
use serde::Serialize;

use super::{Pair, Plan};
use crate::{
    case::{Case, CaseName},
    child::TargetProcess,
    data::{self, Random, Side},
    protocol::{Answer, Command, Path, Resources},
    raw::Signal,
    watch::{Blocks, Ended, Watch},
};

/// The deadline of a transfer.
const DEADLINE: Duration = Duration::from_millis(1000);
/// How long a side stays frozen: beyond the deadline, so that the other has been told and its pages are used anew.
const FROZEN: Duration = Duration::from_millis(1600);
/// How late after the deadline a side that runs may be told.
const SLACK_MILLIS: u64 = 300;
/// How long is looked for bytes that come late.
const LOOK: Duration = Duration::from_millis(150);

/// Transfers of the measurement of many at once.
const MANY: u64 = 16;
/// Repetitions of it, of which the median counts.
const REPEATS: usize = 5;

/// What was seen over one path.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Found {
    path: &'static str,
    case: Option<CaseName>,
    /// Typical milliseconds of an undisturbed transfer.
    typical_ms: f64,
    /// GB/s of [`MANY`] transfers that are all queued at once, one way.
    one_way_gb_per_s: f64,
    /// The same with as many the other way at once, both ways together.
    both_ways_gb_per_s: f64,
    /// How often each side was frozen and killed.
    frozen_receivers: usize,
    frozen_senders: usize,
    killed_receivers: usize,
    killed_senders: usize,
    /// Transfers that were disturbed in time, so that a side failed.
    failed: usize,
    /// Blocks that changed after their receiver was told of the end.
    late_blocks: usize,
    /// Blocks of successful transfers that were wrong.
    wrong_blocks: usize,
    /// Sides that ran and were not told by the deadline.
    told_late: usize,
    /// The longest that a running side had to wait for the end, in milliseconds.
    longest_ms: u64,
    restarts: usize,
    /// Milliseconds of a restart: a new engine, its connection and one transfer.
    restart_ms: f64,
    /// What either process holds before and after the restarts.
    before: Option<[Resources; 2]>,
    after: Option<[Resources; 2]>,
    /// What has grown by more than a little, in words.
    leaked: Vec<String>,
}

impl Found {
    /// Nothing was late, wrong or left behind.
    pub(crate) fn is_sound(&self) -> bool {
        let bad = self.late_blocks + self.wrong_blocks + self.told_late;
        bad == 0 && self.leaked.is_empty()
    }

    fn told(&mut self, millis: u64) {
        let deadline = u64::try_from(DEADLINE.as_millis()).unwrap_or(u64::MAX);
        self.told_late += usize::from(millis > deadline + SLACK_MILLIS);
        self.longest_ms = self.longest_ms.max(millis);
    }
}

/// Disturbs `faults` transfers and replaces the target's engine `restarts` times.
pub(crate) fn run(
    path: Path,
    name: CaseName,
    plan: &Plan,
    faults: usize,
    restarts: usize,
) -> anyhow::Result<Found> {
    let case = Case::new(name, plan.extent);
    let pair = Pair::start(case, path, plan.clone())?;
    let mut bench = Bench {
        found: Found {
            path: path.engine_name(plan.gpu.is_some()),
            case: Some(name),
            ..Found::default()
        },
        random: Random::new(plan.extent.seed),
        sums: Vec::new(),
        pair,
    };
    bench.fresh_source(1)?;
    for _ in 0..3 {
        bench.found.typical_ms = bench.undisturbed()?;
    }
    bench.found.one_way_gb_per_s = bench.many(false)?;
    bench.found.both_ways_gb_per_s = bench.many(true)?;
    for number in 0..faults {
        let (what, done) = match number % 4 {
            0 => ("freezing the receiver", bench.freeze_receiver()),
            1 => ("freezing the sender", bench.freeze_sender()),
            2 => ("killing the receiver", bench.kill_receiver()),
            _ => ("killing the sender", bench.kill_sender()),
        };
        done.with_context(|| format!("{what}, attempt {number}"))?;
        let after = bench.undisturbed();
        after.with_context(|| format!("the transfer after {what}, attempt {number}"))?;
    }
    bench.restarts(restarts)?;
    Ok(bench.found)
}

struct Bench {
    pair: Pair,
    found: Found,
    random: Random,
    /// Of the source's blocks.
    sums: Vec<u64>,
}

impl Bench {
    /// Other bytes in the source's pages, as when they are used for something else.
    fn fresh_source(&mut self, seed: u64) -> anyhow::Result<()> {
        let pair = &self.pair;
        data::fill(&pair.source, &pair.case, seed)?;
        self.sums = data::checksums(&pair.source, &pair.case, Side::Source)?;
        match &pair.gpu {
            Some(gpu) => gpu.load(),
            None => Ok(()),
        }
    }

    fn room(&mut self) -> u64 {
        self.pair.next_room += 1;
        self.pair.next_room
    }

    /// Somewhere in the middle of a transfer, and now and then before or behind it.
    fn somewhen(&mut self) -> u64 {
        let typical = Duration::from_secs_f64(self.found.typical_ms * 1.2e-3);
        let micros = usize::try_from(typical.as_micros()).unwrap_or(usize::MAX);
        self.random.below(micros.max(10)) as u64
    }

    /// Starts a transfer to the target.
    fn push(&mut self, room: u64) -> anyhow::Result<Watch> {
        let pair = &self.pair;
        let begun = clock::now();
        let sending = pair.engine.send(&SendRequest {
            room: Room::new(room).context("rooms count from 1")?,
            timeout: DEADLINE,
        })?;
        sending.wait_ready(DEADLINE)?;
        sending.push(&Chunk {
            items: vec![pair.case.source_items(0)],
            last: true,
        })?;
        Ok(Watch::start(sending, begun, None))
    }

    fn granted(&mut self) -> anyhow::Result<u64> {
        let room = self.room();
        self.pair.target.ask(&Command::Poison)?;
        let millis = u64::try_from(DEADLINE.as_millis())?;
        let grant = Command::GrantBriefly { room, millis };
        self.pair.target.ask(&grant)?;
        Ok(room)
    }

    /// One transfer in peace, its bytes checked; its milliseconds.
    fn undisturbed(&mut self) -> anyhow::Result<f64> {
        let room = self.granted()?;
        let begun = clock::now();
        let ended = self.push(room)?.end()?;
        let took = clock::now().since(begun).as_secs_f64() * 1e3;
        anyhow::ensure!(ended.error.is_none(), "it failed: {:?}", ended.error);
        let (error, _) = self.target_end()?;
        anyhow::ensure!(error.is_none(), "the receiver failed: {error:?}");
        self.check()?;
        Ok(took)
    }

    /// Many transfers at once, in GB/s.
    fn many(&mut self, both_ways: bool) -> anyhow::Result<f64> {
        let mut rates = Vec::new();
        for _ in 0..REPEATS {
            rates.push(self.many_once(both_ways)?);
        }
        rates.sort_by(f64::total_cmp);
        Ok(rates[REPEATS / 2])
    }

    fn many_once(&mut self, both_ways: bool) -> anyhow::Result<f64> {
        let millis = 20_000;
        let timeout = Duration::from_millis(millis);
        let (there, back) = (self.pair.next_room + 1, self.pair.next_room + 1 + MANY);
        self.pair.next_room += 2 * MANY;
        self.pair.target.ask(&Command::Poison)?;
        self.pair.target.ask(&Command::GrantMany {
            room: there,
            count: MANY,
            millis,
        })?;
        let reversed = self.pair.case.reversed();
        let mut sending = Vec::new();
        for room in there..there + MANY {
            let room = Room::new(room).context("rooms count from 1")?;
            sending.push(self.pair.engine.send(&SendRequest { room, timeout })?);
        }
        for each in &sending {
            each.wait_ready(timeout)?;
        }
        let mut receiving = Vec::new();
        if both_ways {
            let peer = self.pair.target_peer()?;
            for room in back..back + MANY {
                receiving.push(self.pair.engine.receive(&ReceiveRequest {
                    room: Room::new(room).context("rooms count from 1")?,
                    sources: vec![Source { peer, dummy: false }],
                    receivers_expected: 1,
                    prefix_tokens: 0,
                    items: vec![reversed.target_items(0)],
                    timeout,
                })?);
            }
        }
        let begun = clock::now();
        if both_ways {
            self.pair.target.tell(&Command::SendMany {
                room: back,
                count: MANY,
                millis,
            })?;
        }
        let chunk = Chunk {
            items: vec![self.pair.case.source_items(0)],
            last: true,
        };
        for each in &sending {
            each.push(&chunk)?;
        }
        let mut bytes = 0;
        for each in sending.iter().chain(&receiving) {
            let ended = each.wait(timeout);
            bytes += ended.context("a room did not end by its deadline")??.bytes;
        }
        let took = clock::now().since(begun).as_secs_f64();
        if both_ways {
            self.pair.target.answer()?;
        }
        let watched = if both_ways { 2 * MANY } else { MANY };
        for _ in 0..watched {
            let (error, _) = self.target_end()?;
            anyhow::ensure!(error.is_none(), "one of many failed: {error:?}");
        }
        self.check()?;
        Ok(bytes as f64 / took / 1e9)
    }

    fn target_end(&mut self) -> anyhow::Result<(Option<String>, u64)> {
        match self.pair.target.ask(&Command::End)? {
            Answer::Ended { error, millis } => Ok((error, millis)),
            other => anyhow::bail!("an unexpected answer: {other:?}"),
        }
    }

    /// The blocks of a transfer that the receiver calls a success.
    fn check(&mut self) -> anyhow::Result<()> {
        let sums = self.sums.clone();
        self.found.wrong_blocks += self.counted(&Command::Check { sums })?;
        Ok(())
    }

    fn counted(&mut self, command: &Command) -> anyhow::Result<usize> {
        match self.pair.target.ask(command)? {
            Answer::Checked { wrong } => Ok(wrong),
            other => anyhow::bail!("an unexpected answer: {other:?}"),
        }
    }

    /// Behind a transfer to the target that was disturbed: its pages here are used anew, nothing may reach the target's.
    fn aftermath(&mut self, sent: &Ended, is_target_told: bool) -> anyhow::Result<()> {
        let (error, millis) = self.target_end()?;
        if is_target_told {
            self.found.told(millis);
        }
        if error.is_none() {
            self.check_against_first(sent)?;
        }
        self.found.failed += usize::from(error.is_some() || sent.error.is_some());
        thread::sleep(LOOK);
        self.found.late_blocks += self.counted(&Command::Late)?;
        Ok(())
    }

    /// A success is one of the bytes that the pages held before they were used anew.
    fn check_against_first(&mut self, sent: &Ended) -> anyhow::Result<()> {
        let sums = sent.sums.clone();
        self.found.wrong_blocks += self.counted(&Command::Check { sums })?;
        Ok(())
    }

    fn freeze_receiver(&mut self) -> anyhow::Result<()> {
        self.found.frozen_receivers += 1;
        let room = self.granted()?;
        let first = self.sums.clone();
        let watch = self.push(room)?;
        thread::sleep(Duration::from_micros(self.somewhen()));
        self.pair.target.signal(Signal::Stop)?;
        let mut ended = watch.end()?;
        self.found.told(ended.millis);
        ended.sums = first;
        // Told, so the pages are ours again, while the receiver still sleeps.
        let seed = room;
        self.fresh_source(seed)?;
        thread::sleep(FROZEN - DEADLINE);
        self.pair.target.signal(Signal::Continue)?;
        self.aftermath(&ended, false)?;
        self.restart()
    }

    fn freeze_sender(&mut self) -> anyhow::Result<()> {
        self.found.frozen_senders += 1;
        let room = self.granted()?;
        let after_micros = self.somewhen();
        let millis = u64::try_from(FROZEN.as_millis())?;
        let first = self.sums.clone();
        let freeze = Command::Freeze {
            after_micros,
            millis,
        };
        self.pair.target.ask(&freeze)?;
        // It may sleep as soon as here: then it has nothing to send when it wakes up.
        let mut ended = match self.push(room) {
            Ok(watch) => watch.end()?,
            Err(error) => Ended {
                error: Some(format!("{error:#}")),
                millis: 0,
                sums: Vec::new(),
            },
        };
        ended.sums = first;
        self.aftermath(&ended, true)?;
        self.restart()
    }

    fn kill_receiver(&mut self) -> anyhow::Result<()> {
        self.found.killed_receivers += 1;
        let room = self.granted()?;
        let watch = self.push(room)?;
        thread::sleep(Duration::from_micros(self.somewhen()));
        self.pair.target.signal(Signal::Kill)?;
        let ended = watch.end()?;
        self.found.told(ended.millis);
        self.found.failed += usize::from(ended.error.is_some());
        self.replace_target()
    }

    fn kill_sender(&mut self) -> anyhow::Result<()> {
        self.found.killed_senders += 1;
        let room = self.room();
        let pair = &mut self.pair;
        let blocks = Blocks {
            case: pair.case.reversed(),
            region: Arc::clone(&pair.source),
            gpu: pair.gpu.clone(),
        };
        let peer = pair.target_peer()?;
        let begun = clock::now();
        let receiving = pair.engine.receive(&ReceiveRequest {
            room: Room::new(room).context("rooms count from 1")?,
            sources: vec![Source { peer, dummy: false }],
            receivers_expected: 1,
            prefix_tokens: 0,
            items: vec![blocks.case.target_items(0)],
            timeout: DEADLINE,
        })?;
        let watch = Watch::start(receiving, begun, Some(blocks.clone()));
        let millis = u64::try_from(DEADLINE.as_millis())?;
        let sending = Command::SendBack { room, millis };
        pair.target.ask(&sending)?;
        let micros = self.somewhen();
        thread::sleep(Duration::from_micros(micros));
        self.pair.target.signal(Signal::Kill)?;
        let ended = watch.end()?;
        self.found.failed += usize::from(ended.error.is_some());
        self.found.told(ended.millis);
        thread::sleep(LOOK);
        let now = blocks.sums()?;
        let late = now.iter().zip(&ended.sums).filter(|(a, b)| a != b).count();
        self.found.late_blocks += late;
        self.replace_target()
    }

    /// Another process in the place of one that was killed.
    fn replace_target(&mut self) -> anyhow::Result<()> {
        self.pair.target = TargetProcess::start()?;
        self.pair.connect_target(None)?;
        Ok(())
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        self.pair.target.ask(&Command::Restart)?;
        Ok(())
    }

    fn restarts(&mut self, count: usize) -> anyhow::Result<()> {
        if count == 0 {
            return Ok(());
        }
        // The first ones make what is kept: threads' stacks, pools, streams.
        for _ in 0..5 {
            self.restart()?;
            self.undisturbed()?;
        }
        let before = self.resources()?;
        let begun = clock::now();
        for number in 0..count {
            self.restart()
                .and_then(|()| self.brief())
                .with_context(|| format!("restart {number}"))?;
        }
        let took = clock::now().since(begun).as_secs_f64() * 1e3;
        self.undisturbed()?;
        let after = self.resources()?;
        self.found.restarts = count;
        self.found.restart_ms = took / count as f64;
        for (who, (before, after)) in ["initiator", "target"]
            .iter()
            .zip(before.iter().zip(&after))
        {
            let leaks = leaks(before, after);
            let leaks = leaks.into_iter().map(|leak| format!("{who}: {leak}"));
            self.found.leaked.extend(leaks);
        }
        (self.found.before, self.found.after) = (Some(before), Some(after));
        Ok(())
    }

    /// One transfer whose bytes nobody looks at.
    fn brief(&mut self) -> anyhow::Result<()> {
        let room = self.room();
        let millis = u64::try_from(DEADLINE.as_millis())?;
        let count = 1;
        let grant = Command::GrantMany {
            room,
            count,
            millis,
        };
        self.pair.target.ask(&grant)?;
        let ended = self.push(room)?.end()?;
        anyhow::ensure!(ended.error.is_none(), "it failed: {:?}", ended.error);
        Ok(())
    }

    fn resources(&mut self) -> anyhow::Result<[Resources; 2]> {
        let there = match self.pair.target.ask(&Command::Resources)? {
            Answer::Resources(resources) => resources,
            other => anyhow::bail!("an unexpected answer: {other:?}"),
        };
        Ok([Resources::here(self.pair.gpu.as_deref())?, there])
    }
}

impl Pair {
    /// This engine's number for the target's.
    fn target_peer(&self) -> anyhow::Result<PeerId> {
        // Killed ones are gone by the time the next has connected, or are older.
        let peers = self.engine.peers();
        let newest = peers
            .iter()
            .filter(|peer| peer.path != "none")
            .max_by_key(|peer| peer.peer);
        Ok(newest.context("no peer")?.peer)
    }
}

/// Descriptors that may come and go with threads and logs.
const DESCRIPTORS_MORE: usize = 8;
/// Mappings that the allocator may add.
const MAPPINGS_MORE: usize = 200;
/// KiB of staging chunks that a last transfer may have pinned more than the first: one chunk for each lane.
const PINNED_KIB_MORE: u64 = 64 << 10;
/// MiB that a driver may keep.
const GPU_MIB_MORE: u64 = 64;

/// What has grown by more than a little.
fn leaks(before: &Resources, after: &Resources) -> Vec<String> {
    let mut leaks = Vec::new();
    if after.descriptors > before.descriptors + DESCRIPTORS_MORE {
        leaks.push(format!(
            "descriptors {} → {}",
            before.descriptors, after.descriptors
        ));
    }
    if after.mappings > before.mappings + MAPPINGS_MORE {
        leaks.push(format!("mappings {} → {}", before.mappings, after.mappings));
    }
    if after.pinned_kib > before.pinned_kib + PINNED_KIB_MORE {
        leaks.push(format!(
            "pinned KiB {} → {}",
            before.pinned_kib, after.pinned_kib
        ));
    }
    if let (Some(first), Some(last)) = (before.gpu_free_mib, after.gpu_free_mib)
        && last + GPU_MIB_MORE < first
    {
        leaks.push(format!("free MiB of the GPU {first} → {last}"));
    }
    leaks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_grows_with_every_restart_is_a_leak() {
        let before = Resources {
            descriptors: 40,
            mappings: 300,
            pinned_kib: 1000,
            gpu_free_mib: Some(100_000),
        };
        assert_eq!(leaks(&before, &before), Vec::<String>::new());
        let after = Resources {
            descriptors: 1040,
            mappings: 1300,
            pinned_kib: 1000 + (1000 << 12),
            gpu_free_mib: Some(90_000),
        };
        assert_eq!(leaks(&before, &after).len(), 4);
    }
}
