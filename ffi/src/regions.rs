//! Which stretches of memory a layout's buffers lie in. Buffers that overlap share a region, so that nothing is registered
//! twice; buffers that only touch do not, since they may be mappings of different kinds.
#![forbid(unsafe_code)]

use crate::status::{Failure, KVT_BAD_LAYOUT};

/// A stretch of memory, `start..end`, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stretch {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// The CUDA device whose memory it is; `None` for memory of the host.
    pub(crate) gpu: Option<u32>,
}

impl Stretch {
    /// The stretch of `len` bytes at `address`; `what` says whose, for the message.
    pub(crate) fn new(
        address: u64,
        len: u64,
        gpu: Option<u32>,
        what: &str,
    ) -> Result<Self, Failure> {
        if address == 0 {
            return Err(Failure::null(what));
        }
        let end = address.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or_else(|| {
            let text = format!("{what}: {len} bytes at {address:#x} are no stretch of memory");
            Failure::new(KVT_BAD_LAYOUT, text)
        })?;
        Ok(Self {
            start: address,
            end,
            gpu,
        })
    }
}

/// Disjoint stretches in the order of their addresses.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Regions(Vec<Stretch>);

impl Regions {
    /// Joins what overlaps.
    ///
    /// # Errors
    /// Two that overlap are said to be memory of different devices.
    pub(crate) fn covering(mut stretches: Vec<Stretch>) -> Result<Self, Failure> {
        stretches.sort_unstable();
        let mut joined: Vec<Stretch> = Vec::new();
        for stretch in stretches {
            match joined.last_mut() {
                Some(last) if stretch.start < last.end => {
                    if last.gpu != stretch.gpu {
                        let (start, end) = (stretch.start, last.end.min(stretch.end));
                        let text = format!(
                            "{start:#x}..{end:#x} is described twice, as memory of different devices"
                        );
                        return Err(Failure::new(KVT_BAD_LAYOUT, text));
                    }
                    last.end = last.end.max(stretch.end);
                }
                _ => joined.push(stretch),
            }
        }
        Ok(Self(joined))
    }

    /// The stretches.
    pub(crate) fn all(&self) -> &[Stretch] {
        &self.0
    }

    /// The stretch that holds an address, by its place in [`all`](Self::all), and the address's offset in it.
    pub(crate) fn find(&self, address: u64) -> Option<(usize, u64)> {
        let after = self.0.partition_point(|stretch| stretch.start <= address);
        let at = after.checked_sub(1)?;
        let stretch = self.0[at];
        (address < stretch.end).then(|| (at, address - stretch.start))
    }
}

#[cfg(test)]
mod tests {
    use super::{Regions, Stretch};

    fn stretch(start: u64, end: u64) -> Stretch {
        Stretch {
            start,
            end,
            gpu: None,
        }
    }

    #[test]
    fn overlaps_are_joined_and_neighbours_are_not() {
        let given = [(50, 60), (10, 20), (20, 30), (10, 20), (55, 70), (12, 14)];
        let given = given.map(|(start, end)| stretch(start, end)).to_vec();
        let regions = Regions::covering(given).expect("all in host memory");
        let expected = [stretch(10, 20), stretch(20, 30), stretch(50, 70)];
        assert_eq!(regions.all(), expected);
        assert_eq!(regions.find(9), None);
        assert_eq!(regions.find(10), Some((0, 0)));
        assert_eq!(regions.find(19), Some((0, 9)));
        assert_eq!(regions.find(20), Some((1, 0)));
        assert_eq!(regions.find(30), None);
        assert_eq!(regions.find(69), Some((2, 19)));
        assert_eq!(regions.find(70), None);
        assert_eq!(Regions::default().find(1), None);
    }

    #[test]
    fn one_address_is_on_one_device() {
        let on = |gpu, start, end| Stretch { start, end, gpu };
        let apart = vec![on(None, 8, 16), on(Some(0), 16, 32), on(Some(0), 24, 40)];
        let regions = Regions::covering(apart).expect("they only touch");
        assert_eq!(regions.all(), [on(None, 8, 16), on(Some(0), 16, 40)]);
        let overlapping = vec![on(None, 8, 17), on(Some(0), 16, 32)];
        assert!(Regions::covering(overlapping).is_err());
    }

    #[test]
    fn impossible_stretches_are_refused() {
        assert_eq!(Stretch::new(8, 4, None, "x"), Ok(stretch(8, 12)));
        assert!(Stretch::new(0, 4, None, "x").is_err());
        assert!(Stretch::new(8, 0, None, "x").is_err());
        assert!(Stretch::new(u64::MAX, 2, None, "x").is_err());
    }
}
