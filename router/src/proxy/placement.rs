//! The seam between the front and the scheduler.
//!
//! The front asks for a pair ([`place`], or [`wait`] if it may take its time), telling what it knows of the request, and gets a
//! [`Booking`] with it. It tells the booking what becomes of the request; nothing else of the front talks to the scheduler.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::Front;
use crate::pick::hold::Ask;
use crate::pool::Worker;
use crate::respond::RouteError;

pub use crate::pick::booking::Booking;
pub use crate::pick::prompt::Prompt;
pub use crate::pick::{NoPlace, Wish};

/// Where a request goes.
#[derive(Debug)]
pub struct Placement {
    /// Computes the prompt.
    pub prefill: Arc<Worker>,
    /// Generates.
    pub decode: Arc<Worker>,
    /// Data-parallel rank on the prefill worker.
    pub rank: u32,
    /// Data-parallel ranks the prefill worker has.
    pub dp_size: u32,
    /// Has to be told what becomes of the request.
    pub booking: Booking,
}

/// Chooses a pair.
///
/// # Errors
/// [`NoPlace`]
pub fn place(front: &Front, wish: &Wish<'_>) -> Result<Placement, NoPlace> {
    let picked = front.picker.pick(wish)?;
    let booking = Booking::new(&front.picker, &front.hold, &picked, wish.prompt_bytes);
    Ok(Placement {
        prefill: picked.prefill,
        decode: picked.decode,
        rank: picked.rank,
        dp_size: picked.dp_size,
        booking,
    })
}

/// Chooses a pair, waiting in the order of priority for one with room.
///
/// # Errors
/// [`RouteError`] when no worker is ready, or none has room in time, or too many wait for one.
pub async fn wait(front: &Front, wish: &Wish<'_>) -> Result<Placement, RouteError> {
    let ask = || match place(front, wish) {
        Ok(placement) => Ask::Answer(Ok(placement)),
        Err(NoPlace::NoWorker(role)) => Ask::Answer(Err(RouteError::NoWorker { role })),
        Err(NoPlace::Busy { retry_after }) => Ask::Later {
            retry_after,
            narrow: wish.is_narrow(),
        },
    };
    let waiting = front.hold.wait(wish.priority, ask);
    match tokio::time::timeout(front.config.queue_timeout, waiting).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_full)) => Err(RouteError::QueueFull),
        Err(_elapsed) => Err(RouteError::QueueTimeout),
    }
}
