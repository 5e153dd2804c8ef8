//! What the hello says of a rail.

use super::{Connector, RKEYS_MAX};
use crate::wire::{
    WireError,
    codec::{Reader, Writer},
    hello::{NAME_BYTES_MAX, REGIONS_MAX},
};

/// One RDMA device of an engine, as its peers must know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RailOffer {
    /// The device, for logs: `erdma_0`.
    pub name: String,
    /// How it connects.
    pub connector: Connector,
    /// Whether it can take WRITE_WITH_IMM and wants it.
    pub imm: bool,
    /// Most bytes of one message it can take.
    pub message_bytes_max: u64,
    /// Regions are registered in chunks of so many bytes, a power of two.
    pub chunk_bytes: u64,
    /// The rkey of each chunk of each region, regions in their order, less those in `staged`.
    pub rkeys: Vec<u32>,
    /// Regions that the device does not reach, ascending: their batches are packed.
    pub staged: Vec<u32>,
}

impl RailOffer {
    pub(in crate::wire) fn write(&self, w: &mut Writer<'_>) {
        w.text(&self.name);
        self.connector.write(w);
        w.u8(u8::from(self.imm));
        w.u64(self.message_bytes_max);
        w.u64(self.chunk_bytes);
        w.count(self.rkeys.len());
        for rkey in &self.rkeys {
            w.u32(*rkey);
        }
        w.count(self.staged.len());
        for region in &self.staged {
            w.u32(*region);
        }
    }

    pub(in crate::wire) fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            name: r.text("device name", NAME_BYTES_MAX)?,
            connector: Connector::read(r)?,
            imm: r.u8()? != 0,
            message_bytes_max: r.u64()?,
            chunk_bytes: r.u64()?,
            rkeys: (0..r.count("rkey count", RKEYS_MAX, 4)?)
                .map(|_| r.u32())
                .collect::<Result<_, _>>()?,
            staged: (0..r.count("region count", REGIONS_MAX, 4)?)
                .map(|_| r.u32())
                .collect::<Result<_, _>>()?,
        })
    }

    /// Whether the device reaches a region.
    pub fn reaches(&self, region: u32) -> bool {
        self.staged.binary_search(&region).is_err()
    }

    /// Checks that the offer describes regions of these lengths.
    ///
    /// # Errors
    /// A sentence with the numbers.
    pub fn check(&self, region_lengths: impl Iterator<Item = u64>) -> Result<(), String> {
        let (name, chunk) = (&self.name, self.chunk_bytes);
        if !chunk.is_power_of_two() || self.message_bytes_max == 0 {
            let most = self.message_bytes_max;
            return Err(format!(
                "device {name} offers chunks of {chunk} bytes and messages of {most}"
            ));
        }
        let mut count = 0;
        let mut wanted = 0;
        for (region, len) in (0..).zip(region_lengths) {
            count = region + 1;
            wanted += if self.reaches(region) {
                len.div_ceil(chunk)
            } else {
                0
            };
        }
        let is_ascending = self.staged.is_sorted_by(|a, b| a < b);
        if !is_ascending || self.staged.last().is_some_and(|last| *last >= count) {
            let staged = &self.staged;
            return Err(format!(
                "device {name} does not reach regions {staged:?}, which must be ascending numbers below {count}"
            ));
        }
        let got = self.rkeys.len() as u64;
        if wanted == got {
            Ok(())
        } else {
            Err(format!(
                "device {name} offers {got} rkeys for {wanted} chunks of memory"
            ))
        }
    }
}
