//! What callers hand over in requests, as the engine takes it.
#![expect(unsafe_code, reason = "reads lists behind raw pointers")]

use std::sync::Arc;

use kvt::{ids::PeerId, layout::dsa_tail_slots, transfer::Source};

use super::{kvt_items_t, kvt_source_t, zero};
use crate::{
    argument::list,
    status::{Failure, KVT_BAD_ITEMS},
};

/// # Safety
/// `items` is NULL or points to `len` lists that are as long as they say and do not change during the call.
pub(super) unsafe fn item_lists(
    items: *const kvt_items_t,
    len: usize,
    tails: &[bool],
) -> Result<Vec<Arc<[i32]>>, Failure> {
    // SAFETY: the caller's contract is ours.
    let lists = unsafe { list(items, len, "items") }?;
    let mut copies = Vec::with_capacity(lists.len().min(kvt::layout::COMPONENTS_MAX));
    for (at, items) in lists.iter().enumerate() {
        // SAFETY: the caller's contract is ours.
        let items = unsafe { list(items.items, items.count, &format!("items[{at}].items")) }?;
        copies.push(if tails.get(at) == Some(&true) {
            let slots = dsa_tail_slots(items);
            slots
                .map_err(|error| Failure::new(KVT_BAD_ITEMS, error.to_string()))?
                .into()
        } else {
            items.into()
        });
    }
    Ok(copies)
}

pub(super) fn source(given: &kvt_source_t) -> Result<Source, Failure> {
    zero(given.reserved, "source.reserved")?;
    let dummy = match given.dummy {
        0 => false,
        1 => true,
        other => {
            return Err(Failure::argument(format!(
                "`source.dummy` is {other}, it must be 0 or 1"
            )));
        }
    };
    let peer = PeerId(given.peer);
    Ok(Source { peer, dummy })
}
