//! What a GPU is and can do.
#![expect(unsafe_code, reason = "calls into libcuda")]

use std::{
    ffi::{CStr, c_char, c_int},
    fmt,
};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use serde::{Deserialize, Serialize};

use super::{
    driver::{Context, Driver, cuda},
    error::GpuError,
};

/// A GPU's identity, the same in every process that sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceUuid(pub [u8; 16]);

impl fmt::Display for DeviceUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for (place, byte) in self.0.iter().enumerate() {
            let dash = if matches!(place, 0 | 4 | 6 | 8 | 10) {
                "-"
            } else {
                ""
            };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for DeviceUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// When what an RDMA device wrote into a GPU's memory is visible to work started afterwards
/// (`CUGPUDirectRDMAWritesOrdering`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum WritesOrdering {
    /// Only after a flush.
    None,
    /// To the GPU itself, at once.
    Owner,
    /// To every GPU, at once.
    AllDevices,
}

impl WritesOrdering {
    fn from_attribute(value: i32) -> Self {
        match value {
            200.. => Self::AllDevices,
            100.. => Self::Owner,
            _ => Self::None,
        }
    }
}

/// What there is to know about a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFacts {
    /// Its number in this process.
    pub ordinal: u32,
    /// Its model.
    pub name: String,
    /// Its identity.
    pub uuid: DeviceUuid,
    /// Its PCI address as sysfs writes it, such as `0000:3b:00.0`.
    pub pci_address: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Most shared memory that a block may ask for, in bytes.
    pub shared_bytes_max: u32,
    /// Whether its memory can be exported as dma-bufs.
    pub exports_dmabuf: bool,
    /// Whether RDMA devices can reach its memory.
    pub is_gpu_direct: bool,
    /// Whether they can reach virtual-memory allocations (torch's expandable segments).
    pub is_gpu_direct_virtual: bool,
    /// Whether virtual-memory allocations can be shared by descriptor.
    pub shares_by_descriptor: bool,
    /// Whether a flush can be asked for from the host.
    pub flushes_from_host: bool,
    /// When writes of RDMA devices are visible.
    pub writes_ordering: WritesOrdering,
}

/// Reads the facts of the GPU `ordinal`.
pub(super) fn facts(driver: Driver, ordinal: u32) -> Result<DeviceFacts, GpuError> {
    let device = driver.handle(ordinal)?;
    let number = |which: Attribute| attribute(driver, device, which);
    let count = |which| Ok::<_, GpuError>(u32::try_from(number(which)?).unwrap_or(0));
    // Newer than some drivers: what cannot be asked is not there.
    let has = |which| number(which).is_ok_and(|value| value != 0);
    let flush_options = number(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS);
    let ordering = number(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING);
    Ok(DeviceFacts {
        ordinal,
        name: name(driver, device)?,
        uuid: uuid(driver, device)?,
        pci_address: pci_address(driver, device)?,
        capability: (
            count(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            count(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: count(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory_bytes: memory_bytes(driver, device)?,
        shared_bytes_max: count(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        exports_dmabuf: has(Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED),
        is_gpu_direct: has(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED),
        is_gpu_direct_virtual: has(
            Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
        ),
        shares_by_descriptor: has(
            Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        ),
        flushes_from_host: flush_options.is_ok_and(|options| options & 1 != 0),
        writes_ordering: WritesOrdering::from_attribute(ordering.unwrap_or(0)),
    })
}

fn attribute(driver: Driver, device: c_int, which: Attribute) -> Result<i32, GpuError> {
    let mut value = 0;
    // SAFETY: writes one number.
    unsafe {
        cuda!(
            driver.calls(),
            cuDeviceGetAttribute(&raw mut value, which as u32, device)
        )
    }?;
    Ok(value)
}

fn memory_bytes(driver: Driver, device: c_int) -> Result<u64, GpuError> {
    let mut bytes = 0;
    // SAFETY: writes one number.
    unsafe { cuda!(driver.calls(), cuDeviceTotalMem_v2(&raw mut bytes, device)) }?;
    Ok(bytes as u64)
}

fn uuid(driver: Driver, device: c_int) -> Result<DeviceUuid, GpuError> {
    let mut bytes = [0; 16];
    // SAFETY: writes sixteen bytes.
    unsafe { cuda!(driver.calls(), cuDeviceGetUuid_v2(&raw mut bytes, device)) }?;
    Ok(DeviceUuid(bytes))
}

fn name(driver: Driver, device: c_int) -> Result<String, GpuError> {
    let mut text: [c_char; 128] = [0; 128];
    // SAFETY: writes at most the given length, with a zero at the end.
    unsafe {
        cuda!(
            driver.calls(),
            cuDeviceGetName(text.as_mut_ptr(), 127, device)
        )
    }?;
    Ok(read(&text))
}

fn pci_address(driver: Driver, device: c_int) -> Result<String, GpuError> {
    let mut text: [c_char; 32] = [0; 32];
    // SAFETY: writes at most the given length, with a zero at the end.
    unsafe {
        cuda!(
            driver.calls(),
            cuDeviceGetPCIBusId(text.as_mut_ptr(), 31, device)
        )
    }?;
    Ok(sysfs_address(&read(&text)))
}

/// The driver writes capital letters, and on some systems a domain of eight digits; sysfs neither.
fn sysfs_address(driver_text: &str) -> String {
    let text = driver_text.to_ascii_lowercase();
    match text.split_once(':') {
        Some((domain, rest)) if domain.len() == 8 && domain.starts_with("0000") => {
            format!("{}:{rest}", &domain[4..])
        }
        _ => text,
    }
}

/// The text up to the first zero; the last byte was left zero by the caller.
fn read(text: &[c_char]) -> String {
    let bytes: Vec<u8> = text.iter().map(|symbol| symbol.cast_unsigned()).collect();
    let text = CStr::from_bytes_until_nul(&bytes).unwrap_or_default();
    text.to_string_lossy().into_owned()
}

impl Context {
    /// Bytes of the device that no process holds.
    ///
    /// # Errors
    /// The driver's.
    pub fn free_bytes(&self) -> Result<u64, GpuError> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        unsafe { cuda!(self.calls(), cuMemGetInfo_v2(&raw mut free, &raw mut total)) }?;
        Ok(free as u64)
    }

    /// Whether this GPU can map the memory of `other`: the same one, or over NVLink or PCIe.
    ///
    /// # Errors
    /// The driver's.
    pub fn reaches(&self, other: &Self) -> Result<bool, GpuError> {
        if self.device() == other.device() {
            return Ok(true);
        }
        let mut can = 0;
        // SAFETY: writes one number.
        unsafe {
            cuda!(
                self.calls(),
                cuDeviceCanAccessPeer(&raw mut can, self.device(), other.device())
            )
        }?;
        Ok(can != 0)
    }

    /// Lets this GPU's kernels and copies use the memory of `other`, which [`Self::reaches`] said it can.
    ///
    /// # Errors
    /// [`GpuError::Refused`] where the GPUs do not reach each other, and the driver's reasons.
    pub fn enable_peer(&self, other: &Self) -> Result<(), GpuError> {
        const ALREADY_ENABLED: u32 = 704;
        if self.device() == other.device() {
            return Ok(());
        }
        if !self.reaches(other)? {
            return Err(GpuError::Refused {
                what: "peer access",
                address: 0,
                reason: format!(
                    "GPU {} cannot map the memory of GPU {}: bytes go through pinned host memory",
                    self.ordinal(),
                    other.ordinal()
                ),
            });
        }
        let _current = self.enter()?;
        // SAFETY: both contexts are retained.
        match unsafe { cuda!(self.calls(), cuCtxEnablePeerAccess(other.raw(), 0)) } {
            Err(error) if error.code() == Some(ALREADY_ENABLED) => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_those_of_sysfs() {
        assert_eq!(sysfs_address("0000:3B:00.0"), "0000:3b:00.0");
        assert_eq!(sysfs_address("00000000:3B:00.0"), "0000:3b:00.0");
        assert_eq!(sysfs_address("00010000:3B:00.0"), "00010000:3b:00.0");
        assert_eq!(sysfs_address(""), "");
    }

    #[test]
    fn a_uuid_reads_as_nvidia_writes_it() {
        let uuid = DeviceUuid([
            0x5a, 0x1b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xa, 0xb, 0xc, 0xff,
        ]);
        assert_eq!(uuid.to_string(), "GPU-5a1b0001-0203-0405-0607-08090a0b0cff");
    }

    #[test]
    fn an_unknown_ordering_asks_for_a_flush() {
        assert_eq!(WritesOrdering::from_attribute(0), WritesOrdering::None);
        assert_eq!(WritesOrdering::from_attribute(-1), WritesOrdering::None);
        assert_eq!(WritesOrdering::from_attribute(100), WritesOrdering::Owner);
        assert_eq!(
            WritesOrdering::from_attribute(200),
            WritesOrdering::AllDevices
        );
        assert!(WritesOrdering::Owner > WritesOrdering::None);
    }
}
