//! Why something on a GPU did not work, in CUDA's words and with what to do about it.
#![forbid(unsafe_code)]

use thiserror::Error;

/// What the driver and this module refuse.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GpuError {
    /// There is no CUDA driver on this host.
    #[error(
        "no GPU: libcuda.so.1 not found (install the NVIDIA driver, or start the container with its libraries)"
    )]
    NoDriver,
    /// The driver is older than what this module needs.
    #[error("libcuda has no {symbol}: install a newer NVIDIA driver")]
    MissingSymbol {
        /// The call.
        symbol: &'static str,
    },
    /// A call of the driver failed.
    #[error("{op} failed: {name} ({code}): {text}{}", fix(*code))]
    Cuda {
        /// The call.
        op: &'static str,
        /// `CUresult`.
        code: u32,
        /// Its name, such as `CUDA_ERROR_INVALID_VALUE`.
        name: String,
        /// The driver's own sentence about it.
        text: String,
    },
    /// The request makes no sense; the caller's mistake.
    #[error("{0}")]
    Misuse(&'static str),
    /// A bound of this module.
    #[error("{asked} {what} are over the limit of {limit}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// What was asked for.
        asked: u64,
        /// The bound.
        limit: u64,
    },
    /// This memory cannot be used in that way.
    #[error("{what} at {address:#x}: {reason}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// Which memory.
        address: u64,
        /// Why not, and what can be done.
        reason: String,
    },
    /// The kernels could not be built for this device.
    #[error("the copy kernels do not run on this GPU: {0}")]
    Kernels(String),
    /// The operating system refused.
    #[error("{what} failed: {reason}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The system's answer.
        reason: String,
    },
    /// Nothing became free in time.
    #[error("no pinned chunk became free within {0:?}: the wire or the peer takes none")]
    Exhausted(std::time::Duration),
    /// What a peer sent is not a handle.
    #[error("a peer's GPU memory handle is not valid: {0}")]
    Peer(&'static str),
}

impl GpuError {
    /// Whether the context is lost, so that nothing in this process can use the GPU any more.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        // Launch failures and memory faults stick to the context (cuda.h: "the context cannot be used").
        const STICKY: [u32; 10] = [700, 702, 709, 710, 714, 715, 716, 717, 718, 719];
        matches!(self, Self::Cuda { code, .. } if STICKY.contains(code))
    }

    /// A system call's refusal.
    pub(crate) fn system(what: &'static str, error: impl Into<std::io::Error>) -> Self {
        let reason = error.into().to_string();
        Self::System { what, reason }
    }

    /// CUDA's code, where there is one.
    #[must_use]
    pub fn code(&self) -> Option<u32> {
        match self {
            Self::Cuda { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// What a user can do about a code; empty where nothing general can be said.
fn fix(code: u32) -> &'static str {
    match code {
        2 => " (free GPU memory, or give the KV cache less of it)",
        3 => " (the process was forked after CUDA started: start workers by spawn)",
        46 => " (another process holds the GPU exclusively: nvidia-smi -c 0)",
        100 => " (no GPU is visible: CUDA_VISIBLE_DEVICES, or the container's device request)",
        101 => " (no such GPU: check gpu_id against CUDA_VISIBLE_DEVICES)",
        201 | 709 => " (the CUDA context is gone: its owner destroyed it or reset the device)",
        205 => " (the processes see different GPUs, or the driver forbids sharing between them)",
        217 => " (the GPUs cannot reach each other's memory: staging is used instead)",
        304 => " (the system refused: descriptors, locked memory or shared memory ran out)",
        700 | 716..=719 => {
            " (a kernel read or wrote outside its memory: the process must be restarted)"
        }
        712 | 713 => " (this host memory is registered twice, or was never registered)",
        801 => " (this driver or GPU cannot do it)",
        802 | 803 => {
            " (the driver and its libraries do not match: restart the container or the host)"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(code: u32) -> GpuError {
        GpuError::Cuda {
            op: "cuMemAlloc",
            code,
            name: "CUDA_ERROR_OUT_OF_MEMORY".to_owned(),
            text: "out of memory".to_owned(),
        }
    }

    #[test]
    fn an_error_names_the_call_the_code_and_the_fix() {
        assert_eq!(
            failed(2).to_string(),
            "cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory \
             (free GPU memory, or give the KV cache less of it)"
        );
        assert!(!failed(2).is_fatal());
        assert!(failed(700).is_fatal());
        assert!(failed(719).is_fatal());
        assert_eq!(failed(2).code(), Some(2));
        assert_eq!(GpuError::NoDriver.code(), None);
    }
}
