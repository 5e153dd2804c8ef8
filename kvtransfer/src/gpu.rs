//! GPU memory: devices, pointers of other owners, copies by lists, memory of other processes, pinned host memory, and
//! how bytes of a GPU reach an RDMA device.
//!
//! An edge module. libcuda is opened at run time (through cudarc's loader) and never linked: on a host without it every
//! entry point returns [`GpuError::NoDriver`] and nothing panics. No call here synchronises a device; a stream or an
//! event is waited for, never more.
//!
//! # What the engine uses
//! ```text
//! let context = Context::primary(0)?;                        // retained primary context, the one torch uses
//! let facts   = pointer::inspect(&context, pointer)?;        // kind of allocation, base, length, owner device
//! let kernels = Kernels::load(&context, &KernelOptions::default())?;   // NVRTC, its cache on disk, or built-in PTX
//! let stream  = Stream::new(&context, Priority::Low)?;
//!
//! // pages ↔ pages, pages ↔ contiguous (pack, unpack), head slices: one call, one launch, device or pinned addresses
//! unsafe { kernels.copy_pages(&stream, &[Pair { source, target }, …], Rows::page(16384), Blocks::default())? };
//! unsafe { kernels.copy_pages(&stream, &pairs, Rows { count: 64, bytes: 512, source_stride: 2048, target_stride: 512 }, …)? };
//! unsafe { kernels.copy_pieces(&stream, &[Piece { source, target, len }, …], …)? };           // any lengths
//! unsafe { kernels.copy_window(&stream, &Window { … }, …)? };// a byte range of the logical stream: buffers × items × rows
//!
//! // staging
//! let pool  = ChunkPool::new(&context, POOL_BYTES_DEFAULT, chunk_bytes)?;     // pinned, bounded, freed on drop
//! let chunk = pool.take(deadline)?;                          // back-pressure; goes back when dropped
//! unsafe { stream.copy(chunk.device_address(), source, len)? };   // either direction, cuMemcpyAsync
//! stream.record(&event)?;  event.is_done()?;  event.synchronize()?;
//! unsafe { stream.wait_foreign(RawEvent(torch_event))? };    // order after the caller's work
//! unsafe { event.record_on(RawStream(torch_stream))? };      // the same, when only a stream is known
//!
//! // same host, other process
//! let exported = ipc::export(&context, pointer, len)?;       // Handle (≤ 9 KiB encoded) and, for VMM, descriptors
//! let mapping  = imports.open(peer, &handle, descriptors)?;  // cached, reference counted; mapping.address()
//! ipc::send_descriptors(&unix_stream, &bytes, &fds)?;  ipc::receive_descriptors(&unix_stream, &mut bytes)?;
//!
//! // RDMA: `verdict::probe` for reports; a rail registers a range once exported with each of its devices
//! let range = GpuRange::new(&context, pointer, len);         // crate-internal: verdict.rs
//! let (registered, verdict) = unsafe { range.register(&pd, Access::WriteTarget) };
//! if context.facts().visibility() == Visibility::AfterFlush { context.flush_writes()?; }   // after a receive notice
//! ```
//!
//! # Threads
//! Every type but [`Current`] is `Send` and `Sync`. A call that needs its context makes it current on the calling
//! thread and puts the previous one back, so that it never disturbs an application's own use of CUDA.
//!
//! # Lifetimes
//! The safe types own what they hold. Addresses are plain `u64`s that belong to somebody else: whoever starts a copy
//! promises (`unsafe`) that both sides stay mapped until the stream has passed it.

pub mod affinity;
pub mod device;
pub mod dmabuf;
pub mod driver;
mod engine_memory;
mod error;
pub mod ipc;
pub mod kernels;
pub mod memory;
pub mod pinned;
pub mod pointer;
pub mod stream;
mod sys;
pub mod verdict;

pub use device::{DeviceFacts, DeviceUuid};
pub use driver::{Context, Current, Driver};
pub use engine_memory::{CudaDevice, PERCENT_DEFAULT};
pub use error::GpuError;
pub use kernels::{
    Blocks, KernelOptions, Kernels, Launch, Method, Pair, Piece, Rows, Side, Window,
};
pub use pinned::{Chunk, ChunkPool, POOL_BYTES_DEFAULT, Pinned};
pub use pointer::{MemoryKind, PointerFacts};
pub use stream::{Event, EventKind, Priority, RawEvent, RawStream, Stream};
