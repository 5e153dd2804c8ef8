//! The boundary that no panic crosses: unwinding into C would be undefined behaviour.
#![forbid(unsafe_code)]

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

use crate::status::{Failure, KVT_OK, KVT_PANIC, kvt_status_t};

/// Runs the body of an exported function and turns what comes of it into a status.
pub(crate) fn enter(body: impl FnOnce() -> Result<(), Failure>) -> kvt_status_t {
    match caught(body).and_then(|result| result) {
        Ok(()) => KVT_OK,
        // Even keeping the text is guarded: it allocates.
        Err(failure) => caught(|| failure.record()).unwrap_or(KVT_PANIC),
    }
}

/// Runs something that may panic.
pub(crate) fn caught<T>(body: impl FnOnce() -> T) -> Result<T, Failure> {
    // What a panic leaves half done is behind a poisoned handle, or not shared at all.
    catch_unwind(AssertUnwindSafe(body)).map_err(|payload| {
        let words = words(payload.as_ref());
        // A payload may panic when it is dropped, and is of no use any more.
        std::mem::forget(payload);
        Failure::new(KVT_PANIC, format!("the library panicked: {words}"))
    })
}

fn words(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "it did not say why".to_owned())
}

#[cfg(test)]
mod tests {
    use super::{caught, enter};
    use crate::status::{Failure, KVT_BAD_ITEMS, KVT_OK, KVT_PANIC, last_words};

    #[test]
    fn panics_become_a_status_with_their_words() {
        assert_eq!(enter(|| panic!("at page {}", 7)), KVT_PANIC);
        assert_eq!(last_words(), "the library panicked: at page 7");
        assert_eq!(enter(|| panic!("plain")), KVT_PANIC);
        assert_eq!(last_words(), "the library panicked: plain");
        assert_eq!(enter(|| std::panic::panic_any(3_u8)), KVT_PANIC);
        assert_eq!(last_words(), "the library panicked: it did not say why");
    }

    #[test]
    fn a_payload_that_panics_when_dropped_stays_inside() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("dropped");
            }
        }
        assert!(caught(|| std::panic::panic_any(Bomb)).is_err());
    }

    #[test]
    fn the_last_failure_is_the_threads_own_and_outlives_successes() {
        let fail = |text: &str| enter(|| Err(Failure::new(KVT_BAD_ITEMS, text)));
        assert_eq!(fail("first\0with a hole"), KVT_BAD_ITEMS);
        assert_eq!(enter(|| Ok(())), KVT_OK);
        assert_eq!(last_words(), "first with a hole");
        let theirs = std::thread::spawn(last_words).join();
        assert_eq!(theirs.expect("no panic"), "", "another thread has none");
        assert_eq!(fail("second"), KVT_BAD_ITEMS);
        assert_eq!(last_words(), "second");
    }
}
