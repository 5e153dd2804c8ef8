//! Memory that peers may read or write while this process runs.
//!
//! A [`Region`] is raw memory on purpose: a NIC, a peer process or the kernel may change it at any time, so no `&[u8]`
//! is ever formed over it; bytes go in and out by copy. A region may also be a device's memory ([`device`]), which only
//! its device copies. [`Gate`] is the promise that "ended" means "stopped": whoever
//! moves bytes of a transfer holds its gate open while doing so, and the end of a transfer closes it first.

pub mod device;
mod gate;
mod region;

pub use gate::{Gate, Pass};
pub use region::{Region, RegionError};
