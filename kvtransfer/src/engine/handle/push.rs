//! Handing pages over.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::Transfer;
use crate::{
    engine::awaited, error::SubmitError, layout::Layout, plan::stream::check_items, transfer::Chunk,
};

impl Transfer {
    /// Queues items that need no check against the layout.
    pub(in crate::engine) fn push_unchecked(&self, chunk: &Chunk) -> Result<(), SubmitError> {
        let lane = self.hub.push(self.id, chunk)?;
        self.shared.lock().lane = lane;
        Ok(())
    }

    /// Queues pages to every receiver. Small chunks are written by the calling thread if the connection is free.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing is queued then.
    pub fn push(&self, chunk: &Chunk) -> Result<(), SubmitError> {
        if let Some(Err(error)) = &self.shared.lock().result {
            return Err(SubmitError::Ended(error.clone()));
        }
        check_lists(&self.hub.layout, &chunk.items)?;
        if self.hub.waiting.has(self.id) {
            return awaited::push_after(&self.hub, self.id, &self.shared, chunk, &[]);
        }
        let lane = self.hub.push(self.id, chunk)?;
        if lane.is_some() {
            self.shared.lock().lane = lane;
        }
        Ok(())
    }

    /// As [`push`](Self::push), for pages that the device still writes: not a byte of them is read before each of `events` has
    /// happened, which are events of the device's driver as integers (`torch.cuda.Event.cuda_event`), recorded before this
    /// call, and the caller's again when it returns. It does not wait. Chunks that are pushed later wait behind this one. What
    /// [`push`](Self::push) would refuse by then ends the transfer instead.
    ///
    /// # Errors
    /// See [`SubmitError`]: also events without a device, or more than
    /// [`EVENTS_MAX`](crate::engine::EVENTS_MAX) of them. Nothing is queued then.
    pub fn push_after(&self, chunk: &Chunk, events: &[u64]) -> Result<(), SubmitError> {
        if events.is_empty() {
            return self.push(chunk);
        }
        if let Some(Err(error)) = &self.shared.lock().result {
            return Err(SubmitError::Ended(error.clone()));
        }
        if self.ready().is_none() {
            return Err(SubmitError::NotReady);
        }
        check_lists(&self.hub.layout, &chunk.items)?;
        awaited::push_after(&self.hub, self.id, &self.shared, chunk, events)
    }
}

/// Checks item lists against the local layout: after this, plans made from them stay inside the regions.
pub(super) fn check_lists(layout: &Layout, lists: &[Arc<[i32]>]) -> Result<(), SubmitError> {
    if lists.len() > layout.components.len() {
        let (got, known) = (lists.len(), layout.components.len());
        return Err(SubmitError::Items(format!(
            "{got} item lists for {known} components"
        )));
    }
    for (component, list) in layout.components.iter().zip(lists) {
        check_items(list, component.item_count())
            .map_err(|error| SubmitError::Items(format!("{:?}: {error}", component.kind)))?;
    }
    Ok(())
}
