//! Protection domains: which queue pairs may use which regions.
//!
//! eRDMA in compat mode lets every peer of a domain write every region of it, and its keys can be guessed, so peers
//! that must not see each other's memory need domains of their own.
#![expect(unsafe_code, reason = "calls into libibverbs")]

use std::{ptr::NonNull, sync::Arc};

use super::{
    context::Context,
    error::{VerbsError, check, check_pointer},
    sys::ibv_pd,
};

/// A protection domain.
pub(crate) struct Pd {
    context: Arc<Context>,
    raw: NonNull<ibv_pd>,
}

// SAFETY: libibverbs allows the calls on a protection domain from any thread.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    /// Makes a domain on an opened device.
    pub(crate) fn create(context: &Arc<Context>) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: the context is open, and the Arc kept below keeps it so.
        let raw = unsafe { (context.library().verbs.ibv_alloc_pd)(context.raw()) };
        Ok(Arc::new(Self {
            context: Arc::clone(context),
            raw: check_pointer("ibv_alloc_pd", raw)?,
        }))
    }

    /// The device.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn raw(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: every region and queue pair of the domain holds an Arc of it, so none is left.
        let code = unsafe { (self.context.library().verbs.ibv_dealloc_pd)(self.raw()) };
        if let Err(error) = check("ibv_dealloc_pd", code) {
            tracing::warn!(%error, "a protection domain was not freed");
        }
    }
}
