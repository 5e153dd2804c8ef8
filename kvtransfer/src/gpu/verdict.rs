//! How an RDMA device reaches a range of GPU memory, decided by registering it: as a dma-buf, else by its address (peer
//! memory), else not at all, and then bytes are staged through pinned host memory.
#![expect(unsafe_code, reason = "registers memory that its owner vouches for")]

use std::{os::fd::AsFd as _, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    device::{DeviceFacts, WritesOrdering},
    dmabuf::DmaBuf,
    driver::{Context, cuda_optional},
    error::GpuError,
    memory::DeviceBuffer,
};
use crate::{
    doctor::gpus::GpuPath,
    memory::device::{Device, Exported},
    transport::verbs::{
        context, device as rdma_device,
        library::Library,
        mr::{Access, CHUNK_BYTES_MAX, RegisteredRegion},
        pd::Pd,
    },
};

pub use crate::memory::device::Visibility;

/// Bytes of the range that [`probe`] tries: one piece of virtual memory at the least granularity there is.
const PROBE_BYTES: usize = 2 << 20;

/// How one RDMA device reaches one GPU's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuDirect {
    /// The RDMA device.
    pub device: String,
    /// The GPU's PCI address.
    pub gpu: String,
    /// The path that worked.
    pub path: GpuPath,
    /// Why that one: what the better ones failed with.
    pub reason: String,
}

/// A range of GPU memory on its way to registrations: exported once, for every device.
pub(crate) struct GpuRange {
    address: u64,
    len: u64,
    gpu: String,
    exported: Result<Exported, String>,
    visibility: Visibility,
}

impl GpuRange {
    /// Exports a range if it can be. Drop it when the last device has registered it: the registrations stay.
    pub(crate) fn new(context: &Context, address: u64, len: u64) -> Self {
        Self {
            address,
            len,
            gpu: context.facts().pci_address.clone(),
            exported: DmaBuf::export(context, address, len)
                .map(Exported::from)
                .map_err(|error| error.to_string()),
            visibility: context.facts().visibility(),
        }
    }

    /// The same for an engine's device.
    pub(crate) fn of(device: &dyn Device, address: u64, len: u64) -> Self {
        let exported = device.export(address, len);
        Self {
            address,
            len,
            gpu: device.pci_address(),
            exported: exported.map_err(|error| error.to_string()),
            visibility: device.visibility(),
        }
    }

    /// Registers it with a device by the best path that works. Without a registration the range is staged.
    ///
    /// # Safety
    /// Until the result is dropped the GPU memory must stay allocated; with [`Access::WriteTarget`] a peer that knows the
    /// key writes it at any time.
    pub(crate) unsafe fn register(
        &self,
        pd: &Arc<Pd>,
        access: Access,
    ) -> (Option<RegisteredRegion>, GpuDirect) {
        let (address, len) = (self.address, self.len);
        if self.visibility == Visibility::Never {
            let reason = "the GPU orders no writes of RDMA devices, and they cannot be flushed";
            return (None, self.verdict(pd, GpuPath::Staged, reason.to_owned()));
        }
        let as_dmabuf = self.exported.as_ref().map_err(Clone::clone);
        let as_dmabuf = as_dmabuf.and_then(|exported| {
            let (fd, offset) = (exported.descriptor.as_fd(), exported.offset);
            // SAFETY: the caller vouches for the memory behind the buffer.
            let registered = unsafe {
                RegisteredRegion::register_dmabuf(
                    pd,
                    fd,
                    offset,
                    address,
                    len,
                    CHUNK_BYTES_MAX,
                    access,
                )
            };
            registered.map_err(|error| error.to_string())
        });
        let no_dmabuf = match as_dmabuf {
            Ok(region) => {
                let reason = format!("registered as a dma-buf of {} bytes", self.len);
                return (Some(region), self.verdict(pd, GpuPath::DmaBuf, reason));
            }
            Err(reason) => reason,
        };
        // SAFETY: the caller vouches for the memory; without a peer-memory module the kernel refuses the address.
        let by_address =
            unsafe { RegisteredRegion::register(pd, address, len, CHUNK_BYTES_MAX, access) };
        match by_address {
            Ok(region) => {
                let reason = format!("registered by its address; no dma-buf: {no_dmabuf}");
                (Some(region), self.verdict(pd, GpuPath::Peermem, reason))
            }
            Err(error) => {
                let reason = format!("no dma-buf: {no_dmabuf}; no peer memory: {error}");
                (None, self.verdict(pd, GpuPath::Staged, reason))
            }
        }
    }

    fn verdict(&self, pd: &Pd, path: GpuPath, reason: String) -> GpuDirect {
        let verdict = GpuDirect {
            device: pd.context().info().name.clone(),
            gpu: self.gpu.clone(),
            path,
            reason,
        };
        tracing::info!(
            device = verdict.device,
            gpu = verdict.gpu,
            path = ?verdict.path,
            reason = verdict.reason,
            "GPU-Direct verdict"
        );
        verdict
    }
}

/// Tries every RDMA device of this host with memory of this GPU, and leaves nothing behind.
///
/// # Errors
/// In words, why there is no verdict: no RDMA device, no library, no GPU memory to try with.
pub fn probe(gpu: &Arc<Context>) -> Result<Vec<GpuDirect>, String> {
    let library = Library::open().map_err(|error| error.to_string())?;
    let devices = rdma_device::list(&library).map_err(|error| error.to_string())?;
    if devices.is_empty() {
        return Err(
            "no RDMA device on this host: GPU memory travels through pinned host memory".to_owned(),
        );
    }
    let buffer = DeviceBuffer::new(gpu, PROBE_BYTES).map_err(|error| error.to_string())?;
    let range = GpuRange::new(gpu, buffer.address(), buffer.len() as u64);
    let judge = |device: &rdma_device::DeviceInfo| {
        let staged = |reason: String| GpuDirect {
            device: device.name.clone(),
            gpu: range.gpu.clone(),
            path: GpuPath::Staged,
            reason,
        };
        let opened = context::Context::open(&library, &device.name);
        let pd = opened.and_then(|context| Pd::create(&context));
        let pd = match pd {
            Ok(pd) => pd,
            Err(error) => return staged(error.to_string()),
        };
        // SAFETY: the buffer outlives the registration, which ends here; nobody is told its key.
        unsafe { range.register(&pd, Access::WriteTarget) }.1
    };
    Ok(devices.iter().map(judge).collect())
}

impl DeviceFacts {
    /// The rule of this GPU.
    #[must_use]
    pub fn visibility(&self) -> Visibility {
        if self.writes_ordering >= WritesOrdering::Owner {
            Visibility::AtOnce
        } else if self.flushes_from_host {
            Visibility::AfterFlush
        } else {
            Visibility::Never
        }
    }
}

impl Context {
    /// Makes everything that RDMA devices wrote into this GPU's memory before the call visible to work started after it. Blocks for
    /// some microseconds; not needed where [`DeviceFacts::visibility`] says so.
    ///
    /// # Errors
    /// A driver or GPU that cannot, or the driver's reasons.
    pub fn flush_writes(&self) -> Result<(), GpuError> {
        const CURRENT_CONTEXT: u32 = 0;
        const TO_OWNER: u32 = 100;
        let _current = self.enter()?;
        // SAFETY: no memory is named.
        unsafe {
            cuda_optional!(
                self.calls(),
                cuFlushGPUDirectRDMAWrites(CURRENT_CONTEXT, TO_OWNER)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fake_verbs::{Behaviour, DmaBuf as Answer, FakeVerbs};

    const BYTES: usize = 8192;

    /// Host memory in the place of a GPU's: the fake devices move bytes by plain addresses.
    struct Owner {
        memory: Box<[u8]>,
    }

    impl Owner {
        fn new() -> Self {
            Self {
                memory: vec![7; BYTES].into_boxed_slice(),
            }
        }

        fn range(&mut self, exported: bool) -> GpuRange {
            let address = self.memory.as_mut_ptr().expose_provenance() as u64;
            GpuRange {
                address,
                len: BYTES as u64,
                gpu: "0000:3b:00.0".to_owned(),
                exported: if exported {
                    Ok(DmaBuf::of_memfd(address, BYTES as u64).into())
                } else {
                    Err("the GPU's driver exports none".to_owned())
                },
                visibility: Visibility::AtOnce,
            }
        }
    }

    fn judge(behaviour: Behaviour, exported: bool) -> (bool, GpuDirect) {
        let fake = FakeVerbs::new(behaviour);
        let name = &fake.device_names()[0];
        let context = context::Context::open(&fake.library(), name).expect("opened");
        let pd = Pd::create(&context).expect("a domain");
        let mut owner = Owner::new();
        let range = owner.range(exported);
        // SAFETY: the memory outlives the registration.
        let (region, verdict) = unsafe { range.register(&pd, Access::WriteTarget) };
        if let Some(region) = &region {
            assert_eq!((region.base(), region.len()), (range.address, range.len));
        }
        (region.is_some(), verdict)
    }

    fn with(dmabuf: Answer, locked_bytes_max: Option<u64>) -> Behaviour {
        let mut behaviour = Behaviour::erdma_compat();
        behaviour.dmabuf = dmabuf;
        behaviour.locked_bytes_max = locked_bytes_max;
        behaviour
    }

    #[test]
    fn a_device_that_takes_dmabufs_gets_one() {
        let (has_region, verdict) = judge(with(Answer::Supported, None), true);
        assert!(has_region);
        assert_eq!(verdict.path, GpuPath::DmaBuf);
        assert_eq!(verdict.gpu, "0000:3b:00.0");
        assert!(verdict.reason.contains("8192 bytes"), "{}", verdict.reason);
    }

    #[test]
    fn peer_memory_comes_second_and_the_reason_is_kept() {
        for (answer, exported, why) in [
            (Answer::NotSupported, true, "ibv_reg_dmabuf_mr"),
            (Answer::Invalid, true, "ibv_reg_dmabuf_mr"),
            (Answer::Supported, false, "the GPU's driver exports none"),
        ] {
            let (has_region, verdict) = judge(with(answer, None), exported);
            assert!(has_region);
            assert_eq!(verdict.path, GpuPath::Peermem, "{answer:?}");
            assert!(verdict.reason.contains(why), "{}", verdict.reason);
        }
    }

    #[test]
    fn staging_comes_last_and_names_both_refusals() {
        let (has_region, verdict) = judge(with(Answer::Invalid, Some(0)), true);
        assert!(!has_region);
        assert_eq!(verdict.path, GpuPath::Staged);
        assert!(
            verdict.reason.contains("no dma-buf: ibv_reg_dmabuf_mr"),
            "{}",
            verdict.reason
        );
        assert!(
            verdict.reason.contains("no peer memory: ibv_reg_mr"),
            "{}",
            verdict.reason
        );
    }

    #[test]
    fn memory_whose_writes_nobody_would_see_is_not_registered() {
        let fake = FakeVerbs::new(with(Answer::Supported, None));
        let opened = context::Context::open(&fake.library(), &fake.device_names()[0]);
        let pd = Pd::create(&opened.expect("opened")).expect("a domain");
        let mut owner = Owner::new();
        let mut range = owner.range(true);
        range.visibility = Visibility::Never;
        // SAFETY: the memory outlives the registration, of which there is none.
        let (region, verdict) = unsafe { range.register(&pd, Access::WriteTarget) };
        assert!(region.is_none() && verdict.path == GpuPath::Staged);
        assert!(verdict.reason.contains("flushed"), "{}", verdict.reason);
    }

    #[test]
    fn the_flush_rule_follows_from_what_the_gpu_orders() {
        let facts = |writes_ordering, flushes_from_host| DeviceFacts {
            ordinal: 0,
            name: String::new(),
            uuid: super::super::DeviceUuid([0; 16]),
            pci_address: String::new(),
            capability: (9, 0),
            multiprocessors: 132,
            memory_bytes: 0,
            shared_bytes_max: 0,
            exports_dmabuf: true,
            is_gpu_direct: true,
            is_gpu_direct_virtual: true,
            shares_by_descriptor: true,
            flushes_from_host,
            writes_ordering,
        };
        for flushes in [false, true] {
            assert_eq!(
                facts(WritesOrdering::Owner, flushes).visibility(),
                Visibility::AtOnce
            );
            assert_eq!(
                facts(WritesOrdering::AllDevices, flushes).visibility(),
                Visibility::AtOnce
            );
        }
        assert_eq!(
            facts(WritesOrdering::None, true).visibility(),
            Visibility::AfterFlush
        );
        assert_eq!(
            facts(WritesOrdering::None, false).visibility(),
            Visibility::Never
        );
    }
}
