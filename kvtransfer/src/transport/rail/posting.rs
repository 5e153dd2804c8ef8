//! What handing WRITEs to a device costs on our side: the parts of the sending half, without an engine around them.

use std::{num::NonZeroU64, sync::Arc};

use super::{
    Rail, Rails,
    prepare::Prepared,
    pump::{NO_SGE, gather},
    targets::Targets,
};
use crate::{
    config::{RdmaConfig, RdmaUse},
    memory::Region,
    plan::{
        descriptor::{Descriptor, Limits, PairCursor},
        pairing::Pairing,
        stream::Stream,
    },
    testing::fake_verbs::{Behaviour, FakeVerbs},
    transport::verbs::{
        chain::{CHAIN_SGES_MAX, CHAIN_WRS_MAX, Chain, Flags, Sge},
        cq::{Completion, POLL_MAX},
    },
    wire::hello::{Place, RegionAddress},
};

/// One queue pair on a device that does nothing, and pages to write.
///
/// It plans, gathers, builds and posts with the code that a rail uses. Its methods return work requests that were posted.
pub struct PostDriver {
    prepared: Prepared,
    rail: Arc<Rail>,
    rails: Rails,
    chain: Chain,
    targets: Targets,
    descriptors: Box<[Descriptor]>,
    limits: (u64, u64),
    sges: [Sge; CHAIN_SGES_MAX],
}

impl PostDriver {
    /// A queue pair whose source and target are one region of `bytes`.
    ///
    /// # Errors
    /// No memory, or the fake device refused, in words.
    pub fn new(bytes: usize) -> Result<Self, String> {
        let fake = FakeVerbs::with_devices(Behaviour::null(), 1).map_err(|e| e.to_string())?;
        let config = RdmaConfig {
            usage: RdmaUse::Required,
            ..RdmaConfig::default()
        };
        let library = fake.library();
        let region = Arc::new(Region::mmap(bytes).map_err(|error| error.to_string())?);
        let (base, len) = (region.base_address(), region.len() as u64);
        let rails = Rails::open(&config, &library, &[region])?;
        let rail = rails.get(0)?;
        let mut prepared = Prepared::compat(&rail)?;
        prepared.connect_to_itself()?;
        let offer = rail.offer();
        let regions: Arc<[RegionAddress]> = [RegionAddress {
            base,
            len,
            place: Place::Host,
        }]
        .into();
        Ok(Self {
            targets: Targets::new(&regions, &offer),
            limits: (offer.chunk_bytes, offer.message_bytes_max),
            chain: Chain::new(
                CHAIN_WRS_MAX,
                rail.capabilities.send_sge.value as usize,
                offer.message_bytes_max,
            ),
            descriptors: vec![Descriptor::EMPTY; CHAIN_WRS_MAX * 2].into(),
            sges: [NO_SGE; CHAIN_SGES_MAX],
            prepared,
            rail,
            rails,
        })
    }

    /// Plans the first component's pages, gathers them into chains of up to 64 WRITEs, posts each and takes its completion.
    ///
    /// # Errors
    /// Pages outside of the region, or the fake device refused, in words.
    pub fn write(
        &mut self,
        pairing: &Arc<Pairing>,
        from: &[i32],
        to: &[i32],
    ) -> Result<u64, String> {
        let stream = Stream::new(&pairing.components[0], from.len()).map_err(|e| e.to_string())?;
        let limits = Limits {
            len_max: NonZeroU64::new(self.limits.1),
            source_chunk: NonZeroU64::new(self.limits.0),
            target_chunk: NonZeroU64::new(self.limits.0),
        };
        let range = 0..stream.len_bytes();
        let mut cursor = PairCursor::new(Arc::clone(pairing), 0, from.len(), range, &limits)
            .map_err(|error| error.to_string())?;
        let mut posted = 0;
        self.chain.clear();
        while cursor.remaining() > 0 {
            let filled = cursor.fill(from, to, &mut self.descriptors);
            let mut at = 0;
            while at < filled {
                at += self.add(at, filled)?;
                if self.chain.room() == 0 {
                    posted += self.post()?;
                    self.chain.clear();
                }
            }
        }
        Ok(posted + self.post()?)
    }

    /// Adds one WRITE of what is planned. Returns how many descriptors it took.
    fn add(&mut self, at: usize, end: usize) -> Result<usize, String> {
        let left = &self.descriptors[at..end];
        let most = self.rail.capabilities.send_sge.value as usize;
        let count = gather(&self.rail, left, most, self.limits, &mut self.sges)?;
        let to = self.targets.place(left[0].target).ok_or("no such place")?;
        let added = self
            .chain
            .write(0, &self.sges[..count], to, Flags::default());
        added.map_err(|error| error.to_string()).map(|()| count)
    }

    /// Posts the chain that was built last, as it is, and takes its completion.
    ///
    /// # Errors
    /// The fake device refused, or completed something else, in words.
    pub fn post(&mut self) -> Result<u64, String> {
        if self.chain.is_empty() {
            return Ok(0);
        }
        self.chain.seal(1);
        let wires = self.prepared.wires_mut().ok_or("the queue pair is gone")?;
        wires
            .qp
            .post(&mut self.chain)
            .map_err(|error| error.to_string())?;
        let mut completions = [Completion::default(); POLL_MAX];
        let found = wires.cq.poll(&mut completions).map_err(|e| e.to_string())?;
        if found != 1 || !completions[0].status().is_success() {
            return Err(format!("{found} completions instead of one"));
        }
        Ok(self.chain.len() as u64)
    }
}

impl Drop for PostDriver {
    fn drop(&mut self) {
        self.rails.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::{Arc, PostDriver};
    use crate::{
        layout::{Attention, Component, ComponentKind, Entry, Layout, RegionId, Shard, StateShape},
        plan::pairing::pair,
    };

    fn one_buffer(item_len: u64, item_count: u64) -> Layout {
        Layout {
            page_size: 16,
            kv_dtype: "bfloat16".into(),
            kv_layout: "nhd".into(),
            attention: Attention::Latent,
            tp: Shard::ONE,
            pp: Shard::ONE,
            layers: 0..1,
            components: vec![Component {
                kind: ComponentKind::Kv,
                entries: vec![Entry {
                    region: RegionId(0),
                    offset: 0,
                    item_len,
                    item_count,
                    layer_id: None,
                }],
                draft_entries: 0,
                state: StateShape::default(),
            }],
        }
    }

    #[test]
    fn scattered_pages_are_one_write_each() {
        let layout = one_buffer(4096, 256);
        let pairing = Arc::new(pair(&layout, &layout).expect("equal layouts"));
        let mut driver = PostDriver::new(256 * 4096).expect("a driver");
        let from: Vec<i32> = (0..100).map(|page| 2 * page).collect();
        let to: Vec<i32> = (0..100).map(|page| 2 * page + 1).rev().collect();
        assert_eq!(driver.write(&pairing, &from, &to), Ok(100));
        // The rest of the second chain is posted once more.
        assert_eq!(driver.post(), Ok(36));
    }
}
