//! Engines: one per rank.
#![expect(unsafe_code, reason = "exported functions take raw pointers")]

use std::{
    collections::VecDeque,
    ffi::c_char,
    os::fd::AsRawFd as _,
    sync::{Arc, Mutex, PoisonError},
};

use kvt::{
    engine::{CompletionQueue, Engine},
    ids::TransferId,
    layout::{Component, ComponentKind},
};

use crate::{
    argument::{Place, Texts, text},
    guard::enter,
    handle::{Handle, Opaque, free, give, on},
    layout::{described, kvt_layout_t},
    picture,
    records::Records,
    settings::{EngineSettings, parse},
    status::{Failure, KVT_SYSTEM, kvt_status_t},
};

/// One rank's engine: its listener, its peers, its transfers. Made by `kvt_engine_new`, ended by `kvt_engine_free`. Any
/// thread may use it, several at a time.
pub struct kvt_engine_t(Handle<Opened>);

/// What the handle holds.
pub(crate) struct Opened {
    pub(crate) engine: Engine,
    pub(crate) records: Arc<Records>,
    /// Which components are DSA tails, whose lists come as SGLang's six numbers.
    pub(crate) tails: Arc<[bool]>,
    completions: Arc<CompletionQueue>,
    /// Ended transfers that the last drain had no room for.
    left: Mutex<VecDeque<TransferId>>,
}

impl Opaque for kvt_engine_t {
    type Value = Opened;
    const NAME: &'static str = "engine";

    fn handle(&self) -> &Handle<Opened> {
        &self.0
    }

    fn around(handle: Handle<Opened>) -> Self {
        Self(handle)
    }
}

/// One ended transfer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct kvt_completion_t {
    /// The `user_data` of its request.
    pub user_data: u64,
    /// Its room.
    pub room: u64,
    /// The engine's number for it, as in `kvt_outcome_t`.
    pub id: u64,
}

/// Starts an engine over the caller's memory and, where the configuration says so, its listeners.
///
/// `config` is a JSON object, or empty for the defaults: every field of the library's `EngineConfig` by its name, times
/// with their unit at the end. `{"listen": "0.0.0.0:0", "same_host": "auto"}` is a usual one; section "Configuration" of
/// ffi/README.md has them all. An unknown field is refused by name.
///
/// Ownership: `config` and `layout` are read during the call only. `*out_engine` is the caller's, to be given back with
/// `kvt_engine_free`. The buffers that the layout names stay the caller's; they must stay readable and writable, from any
/// thread, until `kvt_engine_free` has returned. Overlapping buffers are registered once.
/// Threads: any. Errors: `KVT_WRONG_ABI`, `KVT_BAD_CONFIG`, `KVT_BAD_LAYOUT`, `KVT_BAD_ARGUMENT`, `KVT_REGION` (memory that
/// cannot be used), `KVT_RDMA` (required, but not usable here), `KVT_LISTEN`, `KVT_BOOTSTRAP`, `KVT_TELEMETRY`,
/// `KVT_SYSTEM`. `*out_engine` is untouched then.
///
/// # Safety
/// Every pointer is NULL or valid for what it points to; lengths are right; the buffers live as said above.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_engine_new(
    config: *const c_char,
    config_len: usize,
    layout: *const kvt_layout_t,
    out_engine: *mut *mut kvt_engine_t,
) -> kvt_status_t {
    enter(|| {
        // SAFETY: this function's own contract.
        let place = unsafe { Place::new(out_engine, "out_engine") }?;
        // SAFETY: this function's own contract.
        let config = unsafe { text(config, config_len, "config") }?;
        let settings = parse::<EngineSettings>(config, "config")?;
        let percent = settings.gpu.percent()?;
        let config = settings.config()?;
        // SAFETY: this function's own contract.
        let (memory, layout) = unsafe { described(layout, percent) }?;
        let is_tail =
            |component: &Component| component.kind == ComponentKind::State("dsa_tail".to_owned());
        let tails = layout.components.iter().map(is_tail).collect();
        let engine = Engine::start(config, memory, layout)?;
        let completions = engine.completions();
        place.put(give(Opened {
            engine,
            records: Arc::default(),
            tails,
            completions,
            left: Mutex::default(),
        }));
        Ok(())
    })
}

/// Ends every live transfer with `KVT_SHUTDOWN`, closes every connection, joins the engine's threads (3 s at most) and
/// frees the engine. When this returns nothing of the engine touches the buffers any more. NULL is nothing to do.
///
/// Ownership: the engine is gone. Handles of its transfers stay valid and must still be freed; they say `KVT_SHUTDOWN`.
/// Threads: any, but no other call with this engine may be running or follow. Errors: none.
///
/// # Safety
/// `engine` is NULL or came from `kvt_engine_new` and was not freed before.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_engine_free(engine: *mut kvt_engine_t) {
    // SAFETY: this function's own contract.
    unsafe { free(engine) };
}

/// What the engine is and does at this moment, as a JSON object: `version`, `instance`, the addresses `listen`,
/// `bootstrap`, `telemetry` and `metrics` (null where there is none), `layout`, `regions`, `rdma` (what each device was
/// asked to do), `peers` with the `path` to each and why better ones were refused (`path_reason`), `counters`, and the live
/// picture: `rails`, `rooms`, `failures`.
///
/// Ownership: `*out_text` is the caller's, to be given back with `kvt_text_free`. `out_len` may be NULL.
/// Threads: any. Errors: `KVT_NULL_ARGUMENT`.
///
/// # Safety
/// `engine` is NULL or alive; the places are NULL or writable.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_engine_info_json(
    engine: *const kvt_engine_t,
    out_text: *mut *mut c_char,
    out_len: *mut usize,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let place = unsafe { Texts::new(out_text, out_len) }?;
        place.put(picture::of(&opened.engine).to_string());
        Ok(())
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

/// A descriptor (an eventfd) that is readable while ended transfers wait for `kvt_completions_drain`. For `poll`,
/// `epoll` or an event loop; do not read or close it.
///
/// Ownership: the descriptor is the engine's and is closed by `kvt_engine_free`.
/// Threads: any. Errors: `KVT_NULL_ARGUMENT`, `KVT_SYSTEM` (the process had no descriptor left when the engine started).
///
/// # Safety
/// `engine` is NULL or alive; `out_fd` is NULL or writable.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_completions_fd(
    engine: *const kvt_engine_t,
    out_fd: *mut i32,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let place = unsafe { Place::new(out_fd, "out_fd") }?;
        let fd = opened.completions.fd().ok_or_else(|| {
            let text =
                "the process had no descriptor left when the engine started: raise `ulimit -n`";
            Failure::new(KVT_SYSTEM, text)
        })?;
        place.put(fd.as_raw_fd());
        Ok(())
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

/// Takes transfers that ended, oldest first, at most `capacity` of them; `*out_count` says how many. While more are left
/// the descriptor stays readable. A transfer that was freed is not reported. Never waits.
///
/// Ownership: `out_completions` is the caller's, for `capacity` values. Threads: any; each completion goes to one caller.
/// Errors: `KVT_NULL_ARGUMENT`, `KVT_BAD_ARGUMENT`.
///
/// # Safety
/// `engine` is NULL or alive; `out_completions` is NULL or writable for `capacity` values, `out_count` NULL or writable.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_completions_drain(
    engine: *const kvt_engine_t,
    out_completions: *mut kvt_completion_t,
    capacity: usize,
    out_count: *mut usize,
) -> kvt_status_t {
    let body = |opened: &Opened| {
        // SAFETY: this function's own contract.
        let count = unsafe { Place::new(out_count, "out_count") }?;
        let mut written = 0;
        if capacity > 0 {
            // SAFETY: this function's own contract.
            let places = unsafe { Place::new(out_completions, "out_completions") }?;
            written = opened.drain(capacity, |at, completion| {
                // SAFETY: `at` is below `capacity`, for which the caller has room.
                unsafe { places.put_at(at, completion) };
            });
        }
        count.put(written);
        Ok(())
    };
    // SAFETY: this function's own contract.
    unsafe { on(engine, body) }
}

impl Opened {
    /// Reports at most `capacity` ended transfers and says how many it reported.
    fn drain(&self, capacity: usize, mut report: impl FnMut(usize, kvt_completion_t)) -> usize {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.extend(self.completions.drain());
        let mut written = 0;
        while written < capacity
            && let Some(id) = left.pop_front()
        {
            if let Some(record) = self.records.take(id) {
                let completion = kvt_completion_t {
                    user_data: record.user_data,
                    room: record.room.number(),
                    id: id.0,
                };
                report(written, completion);
                written += 1;
            }
        }
        if !left.is_empty()
            && let Some(event) = self.completions.fd()
        {
            // Draining cleared the descriptor. It is full, and so readable, if this cannot be written.
            let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
        }
        written
    }
}
