//! The peer's memory as its network card knows it: an address and a key for every byte that it granted.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::{
    layout::RegionId,
    plan::descriptor::Place,
    transport::verbs::chain::RemotePlace,
    wire::{hello::RegionAddress, rdma::RailOffer},
};

/// Addresses and keys of a peer's regions on one of its rails.
#[derive(Clone, Debug)]
pub(super) struct Targets {
    regions: Arc<[RegionAddress]>,
    /// For each region, where its keys start.
    starts: Vec<usize>,
    rkeys: Vec<u32>,
    chunk_shift: u32,
    /// Regions out of reach.
    staged: Vec<u32>,
}

impl Targets {
    /// The offer was checked against the regions in the hello ([`RailOffer::check`]).
    pub(super) fn new(regions: &Arc<[RegionAddress]>, offer: &RailOffer) -> Self {
        let mut next = 0;
        let starts = (0..).zip(regions.iter()).map(|(number, region)| {
            let start = next;
            let chunks = region.len.div_ceil(offer.chunk_bytes.max(1));
            let chunks = if offer.reaches(number) { chunks } else { 0 };
            next += usize::try_from(chunks).unwrap_or(0);
            start
        });
        Self {
            starts: starts.collect(),
            regions: Arc::clone(regions),
            rkeys: offer.rkeys.clone(),
            chunk_shift: offer.chunk_bytes.trailing_zeros(),
            staged: offer.staged.clone(),
        }
    }

    /// Whether WRITEs reach a region.
    pub(super) fn reaches(&self, region: RegionId) -> bool {
        self.staged.binary_search(&region.0).is_err()
    }

    /// The place as a WRITE names it; `None` for a region that the peer does not have, or its device does not reach.
    pub(super) fn place(&self, place: Place) -> Option<RemotePlace> {
        if !self.reaches(place.region) {
            return None;
        }
        let region = place.region.0 as usize;
        let start = self.starts.get(region)?;
        let chunk = usize::try_from(place.offset >> self.chunk_shift).ok()?;
        Some(RemotePlace {
            address: self.regions.get(region)?.base.checked_add(place.offset)?,
            rkey: *self.rkeys.get(start + chunk)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Targets;
    use crate::{
        layout::RegionId,
        plan::descriptor::Place,
        wire::{
            hello::RegionAddress,
            rdma::{Connector, RailOffer},
        },
    };

    #[test]
    fn every_offset_has_the_key_of_its_chunk() {
        let regions: [RegionAddress; 3] =
            [(0x1000, 4096), (0x9000, 10_000), (0x20_000, 4097)].map(|(base, len)| RegionAddress {
                base,
                len,
                place: crate::wire::hello::Place::Host,
            });
        let offer = RailOffer {
            name: "x".into(),
            connector: Connector::Compat,
            imm: false,
            message_bytes_max: 1 << 20,
            chunk_bytes: 4096,
            rkeys: vec![10, 20, 21, 22, 30, 31],
            staged: Vec::new(),
        };
        assert_eq!(offer.check(regions.iter().map(|r| r.len)), Ok(()));
        let targets = Targets::new(&regions.into(), &offer);
        let key = |region, offset| {
            let region = RegionId(region);
            targets.place(Place { region, offset }).map(|at| at.rkey)
        };
        assert_eq!([key(0, 0), key(0, 4095)], [Some(10); 2]);
        assert_eq!(
            [key(1, 0), key(1, 4096), key(1, 9999)],
            [20, 21, 22].map(Some)
        );
        assert_eq!([key(2, 4095), key(2, 4096)], [Some(30), Some(31)]);
        assert_eq!(key(3, 0), None);
        let at = targets.place(Place {
            region: RegionId(1),
            offset: 5,
        });
        assert_eq!(at.map(|at| at.address), Some(0x9005));
        let without = RailOffer {
            rkeys: vec![10, 30, 31],
            staged: vec![1],
            ..offer
        };
        assert_eq!(without.check([4096, 10_000, 4097].into_iter()), Ok(()));
        let targets = Targets::new(&regions.into(), &without);
        let key = |region, offset| {
            let region = RegionId(region);
            targets.place(Place { region, offset }).map(|at| at.rkey)
        };
        assert_eq!(
            [key(0, 0), key(1, 0), key(2, 4096)],
            [Some(10), None, Some(31)]
        );
    }
}
