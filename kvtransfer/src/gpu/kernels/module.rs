//! The kernels, loaded on a device: compiled there and then, read from the cache, or from the built-in PTX.
#![expect(unsafe_code, reason = "calls into libcuda")]

use std::{
    ffi::{CStr, c_void},
    path::PathBuf,
    ptr,
    sync::Arc,
};

use cudarc::driver::sys::CUfunction_attribute;

use super::{
    lists::{RING_BYTES, THIN_RING_BYTES},
    nvrtc::Nvrtc,
    source,
};
use crate::gpu::{
    GpuError,
    driver::{Context, cuda},
    stream::Stream,
    sys::Opaque,
};

/// Dynamic shared memory of the bulk kernels: `BULK_WARPS` rings of copy.cu.
pub(super) const BULK_SHARED_BYTES: u32 = 4 * RING_BYTES;

/// Threads of a bulk block: `BULK_WARPS` warps.
pub(super) const BULK_THREADS: u32 = 4 * 32;

/// Dynamic shared memory of a thin block: its one warp's ring.
pub(super) const THIN_SHARED_BYTES: u32 = THIN_RING_BYTES;

/// Threads of a thin block.
pub(super) const THIN_THREADS: u32 = 32;

/// How the kernels are had.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct KernelOptions {
    /// Where compiled kernels are kept. `None`: `$XDG_CACHE_HOME/kvtransfer`.
    pub cache_folder: Option<PathBuf>,
    /// The compiler. `None`: the one that the dynamic linker finds.
    pub nvrtc: Option<PathBuf>,
    /// Whether to use the built-in PTX at once.
    pub is_built_in_only: bool,
}

/// Where the loaded kernels came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// Compiled by NVRTC in this process.
    Compiled,
    /// Compiled by NVRTC in an earlier one.
    Cached,
    /// The built-in PTX, compiled by the driver.
    BuiltIn,
}

/// A kernel.
#[derive(Clone, Copy)]
pub(super) struct Function(Opaque);

/// Loaded kernels.
pub(super) struct Module {
    context: Arc<Context>,
    raw: Opaque,
    pub(super) origin: Origin,
    /// Units of 16, 8, 4 and 1 bytes.
    pub(super) pairs: [Function; 4],
    pub(super) window: [Function; 4],
    /// Pairs in units of 16 bytes, for blocks that have a multiprocessor to themselves.
    pub(super) deep: Function,
    pub(super) tiles: Function,
    pub(super) checked: Function,
    /// Bulk kernels, where the device has what they need.
    pub(super) bulk: Option<BulkFunctions>,
}

/// The bulk kernels for pairs and for windows.
#[derive(Clone, Copy)]
pub(super) struct BulkFunctions {
    /// For blocks that have a multiprocessor to themselves.
    pub(super) wide: (Function, Function),
    /// For blocks of one warp.
    pub(super) thin: (Function, Function),
}

// SAFETY: modules and functions are handles that the driver's calls take on any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads the kernels.
    pub(super) fn load(context: &Arc<Context>, options: &KernelOptions) -> Result<Self, GpuError> {
        let compiled = if options.is_built_in_only {
            Err("asked for the built-in kernels".to_owned())
        } else {
            compiled(context, options)
        };
        match compiled.and_then(|(image, origin)| {
            Self::of(context, &image, origin).map_err(|error| error.to_string())
        }) {
            Ok(module) => Ok(module),
            Err(reason) => {
                tracing::debug!(reason, "the GPU kernels are the built-in ones");
                let ptx = built_in(context.facts().capability)?;
                let mut image = ptx.as_bytes().to_vec();
                image.push(0);
                Self::of(context, &image, Origin::BuiltIn)
            }
        }
    }

    fn of(context: &Arc<Context>, image: &[u8], origin: Origin) -> Result<Self, GpuError> {
        let _current = context.enter()?;
        let calls = context.calls();
        let mut raw = ptr::null_mut();
        let (image, none) = (image.as_ptr().cast::<c_void>(), ptr::null_mut());
        // SAFETY: a cubin, or PTX that ends with a zero; the driver copies it. Unloaded once, in `drop`.
        unsafe {
            cuda!(
                calls,
                cuModuleLoadDataEx(&raw mut raw, image, 0, none, none.cast())
            )
        }?;
        // From here on `drop` unloads the module if a function is missing.
        let nothing = Function(ptr::null_mut());
        let mut module = Self {
            context: Arc::clone(context),
            raw,
            origin,
            pairs: [nothing; 4],
            window: [nothing; 4],
            deep: nothing,
            tiles: nothing,
            checked: nothing,
            bulk: None,
        };
        let find = |name: &CStr| function(context, raw, name);
        module.pairs = [
            find(c"kvt_pairs_16")?,
            find(c"kvt_pairs_8")?,
            find(c"kvt_pairs_4")?,
            find(c"kvt_pairs_1")?,
        ];
        module.window = [
            find(c"kvt_window_16")?,
            find(c"kvt_window_8")?,
            find(c"kvt_window_4")?,
            find(c"kvt_window_1")?,
        ];
        module.deep = find(c"kvt_pairs_16_deep")?;
        module.tiles = find(c"kvt_tiles")?;
        module.checked = find(c"kvt_pairs_crc")?;
        let facts = context.facts();
        if facts.capability.0 >= 9 && facts.shared_bytes_max > BULK_SHARED_BYTES + 2048 {
            let wide = (find(c"kvt_bulk_pairs")?, find(c"kvt_bulk_window")?);
            allow_shared(context, wide.0)?;
            allow_shared(context, wide.1)?;
            let thin = (find(c"kvt_thin_pairs")?, find(c"kvt_thin_window")?);
            module.bulk = Some(BulkFunctions { wide, thin });
        }
        Ok(module)
    }

    /// Enqueues a kernel.
    ///
    /// # Safety
    /// `parameters` must point to values of the kernel's own types, and every address in them must stay mapped until the
    /// stream has passed the launch.
    pub(super) unsafe fn launch(
        &self,
        function: Function,
        stream: &Stream,
        (blocks, threads, shared_bytes): (u32, u32, u32),
        parameters: &mut [*mut c_void],
    ) -> Result<(), GpuError> {
        let _current = self.context.enter()?;
        let (values, extra) = (parameters.as_mut_ptr(), ptr::null_mut());
        // SAFETY: the caller vouches for the parameters; the driver copies them during the call.
        unsafe {
            cuda!(
                self.context.calls(),
                cuLaunchKernel(
                    function.0,
                    blocks,
                    1,
                    1,
                    threads,
                    1,
                    1,
                    shared_bytes,
                    stream.raw(),
                    values,
                    extra
                )
            )
        }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else {
            return;
        };
        // SAFETY: loaded in `of`, unloaded once; the driver waits for its kernels.
        let result = unsafe { cuda!(self.context.calls(), cuModuleUnload(self.raw)) };
        if let Err(error) = result {
            tracing::debug!(%error, "the kernels were not unloaded");
        }
    }
}

fn function(context: &Context, module: Opaque, name: &CStr) -> Result<Function, GpuError> {
    let mut raw = ptr::null_mut();
    // SAFETY: the module is loaded, the name ends with a zero.
    unsafe {
        cuda!(
            context.calls(),
            cuModuleGetFunction(&raw mut raw, module, name.as_ptr())
        )
    }?;
    Ok(Function(raw))
}

fn allow_shared(context: &Context, function: Function) -> Result<(), GpuError> {
    let which = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as u32;
    let bytes = BULK_SHARED_BYTES.cast_signed();
    // SAFETY: the function's module is loaded.
    unsafe {
        cuda!(
            context.calls(),
            cuFuncSetAttribute(function.0, which, bytes)
        )
    }
}

/// Compiled kernels for the device, from the cache or the compiler; the error says why there are none.
fn compiled(context: &Context, options: &KernelOptions) -> Result<(Vec<u8>, Origin), String> {
    let nvrtc = Nvrtc::open(options.nvrtc.as_deref())?;
    let arch = context.facts().capability;
    let driver = context
        .driver()
        .version()
        .map_err(|error| error.to_string())?;
    let folder = options.cache_folder.clone().or_else(source::cache_folder);
    let path = folder.map(|folder| folder.join(source::file_name(arch, driver, nvrtc.version())));
    if let Some(image) = path.as_deref().and_then(source::read) {
        return Ok((image, Origin::Cached));
    }
    let image = nvrtc.compile(source::SOURCE, arch)?;
    if let Some(path) = path
        && let Err(error) = source::keep(&path, &image)
    {
        tracing::debug!(%error, "compiled GPU kernels are not kept for the next process");
    }
    Ok((image, Origin::Compiled))
}

fn built_in(capability: (u32, u32)) -> Result<&'static str, GpuError> {
    match capability.0 {
        9.. => Ok(source::PTX_90),
        8 => Ok(source::PTX_80),
        _ => Err(GpuError::Kernels(format!(
            "compute capability {}.{} is older than 8.0, and NVRTC was not found to compile for it",
            capability.0, capability.1
        ))),
    }
}
