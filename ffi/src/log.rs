//! The library's log, handed to one function of the caller's.
#![expect(
    unsafe_code,
    reason = "the caller's function is called through a raw pointer"
)]

use std::{
    cell::Cell,
    ffi::{c_char, c_void},
    fmt::{Debug, Write as _},
    sync::{
        Once, PoisonError, RwLock,
        atomic::{AtomicI32, Ordering},
    },
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
};

use crate::{
    guard::enter,
    status::{Failure, KVT_SYSTEM, kvt_status_t},
};

/// `kvt_log`: something failed that needs attention.
pub const KVT_LOG_ERROR: i32 = 1;
/// `kvt_log`: something is wrong, and the library goes on.
pub const KVT_LOG_WARN: i32 = 2;
/// `kvt_log`: what is worth a line in production.
pub const KVT_LOG_INFO: i32 = 3;
/// `kvt_log`: for looking into a problem.
pub const KVT_LOG_DEBUG: i32 = 4;
/// `kvt_log`: everything.
pub const KVT_LOG_TRACE: i32 = 5;

/// Takes one line of the library's log: a `KVT_LOG_` level, the part of the library that speaks, the message, and what
/// was given to `kvt_log`. Both texts are UTF-8 without NUL at the end, good during the call only.
///
/// It is called on whatever thread has something to say, several at a time, and must not block. Lines that the library
/// would write while the function runs on the same thread are dropped.
pub type kvt_log_fn = Option<
    unsafe extern "C" fn(
        level: i32,
        target: *const c_char,
        target_len: usize,
        message: *const c_char,
        message_len: usize,
        user_data: *mut c_void,
    ),
>;

/// Hands lines up to `level` (a `KVT_LOG_` number) to `sink` from now on, instead of to an earlier one. NULL ends it.
/// Without a sink nothing is formatted. The log is the process's, not an engine's.
///
/// When this returns no thread is in the earlier sink any more, so its `user_data` may be freed.
///
/// Ownership: `user_data` is the caller's and must live until another call replaces the sink. Threads: any, but not from
/// within a sink. Errors: `KVT_BAD_ARGUMENT` (level, or called within a sink), `KVT_SYSTEM` (the process has another
/// subscriber for this library's log).
///
/// # Safety
/// `sink` may be called from any thread with `user_data` until it is replaced.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_log(
    level: i32,
    sink: kvt_log_fn,
    user_data: *mut c_void,
) -> kvt_status_t {
    enter(|| {
        if IN_SINK.get() {
            return Err(Failure::argument(
                "kvt_log was called from within a log sink",
            ));
        }
        if !(KVT_LOG_ERROR..=KVT_LOG_TRACE).contains(&level) {
            return Err(Failure::argument(format!(
                "`level` is {level}, no KVT_LOG_ number"
            )));
        }
        let sink = sink.map(|call| Sink { call, user_data });
        let level = if sink.is_some() { level } else { 0 };
        install()?;
        // Waits for whoever is in the earlier sink.
        *SINK.write().unwrap_or_else(PoisonError::into_inner) = sink;
        LEVEL.store(level, Ordering::Release);
        tracing::callsite::rebuild_interest_cache();
        Ok(())
    })
}

type Call = unsafe extern "C" fn(i32, *const c_char, usize, *const c_char, usize, *mut c_void);

#[derive(Clone, Copy)]
struct Sink {
    call: Call,
    user_data: *mut c_void,
}

// SAFETY: `kvt_log`'s caller promised that the function may be called from any thread with that pointer.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

static SINK: RwLock<Option<Sink>> = RwLock::new(None);
/// The level of `SINK`, 0 without one.
static LEVEL: AtomicI32 = AtomicI32::new(0);

thread_local! {
    /// This thread is in the caller's function.
    static IN_SINK: Cell<bool> = const { Cell::new(false) };
}

/// Makes this the process's subscriber, once.
fn install() -> Result<(), Failure> {
    static ONCE: Once = Once::new();
    static FAILED: AtomicI32 = AtomicI32::new(0);
    ONCE.call_once(|| {
        if tracing::subscriber::set_global_default(Lines).is_err() {
            FAILED.store(1, Ordering::Relaxed);
        }
    });
    if FAILED.load(Ordering::Relaxed) == 0 {
        return Ok(());
    }
    let text = "the process has another subscriber for this library's log";
    Err(Failure::new(KVT_SYSTEM, text))
}

/// Turns events into lines. Spans are not followed: the library has none that matter to a reader of lines.
struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && number(*metadata.level()) <= LEVEL.load(Ordering::Acquire)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match LEVEL.load(Ordering::Acquire) {
            KVT_LOG_ERROR => LevelFilter::ERROR,
            KVT_LOG_WARN => LevelFilter::WARN,
            KVT_LOG_INFO => LevelFilter::INFO,
            KVT_LOG_DEBUG => LevelFilter::DEBUG,
            KVT_LOG_TRACE => LevelFilter::TRACE,
            _ => LevelFilter::OFF,
        })
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        if IN_SINK.replace(true) {
            return;
        }
        let mut line = Line::default();
        event.record(&mut line);
        let (target, message) = (event.metadata().target(), line.text());
        let level = number(*event.metadata().level());
        let sink = SINK.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(Sink { call, user_data }) = *sink {
            // SAFETY: `kvt_log`'s caller promised that it may be called so until it is replaced, which waits for the lock
            // held here. The texts outlive the call.
            unsafe {
                call(
                    level,
                    target.as_ptr().cast(),
                    target.len(),
                    message.as_ptr().cast(),
                    message.len(),
                    user_data,
                );
            }
        }
        drop(sink);
        IN_SINK.set(false);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

fn number(level: Level) -> i32 {
    match level {
        Level::ERROR => KVT_LOG_ERROR,
        Level::WARN => KVT_LOG_WARN,
        Level::INFO => KVT_LOG_INFO,
        Level::DEBUG => KVT_LOG_DEBUG,
        Level::TRACE => KVT_LOG_TRACE,
    }
}

/// `message field=value field=value`.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn text(mut self) -> String {
        self.message.push_str(&self.fields);
        self.message
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a text cannot fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}
