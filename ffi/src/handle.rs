//! Opaque handles: one Rust value, one owner, and a mark that a panic leaves on it.
#![expect(unsafe_code, reason = "C holds handles as raw pointers")]

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{
    guard::{caught, enter},
    status::{Failure, KVT_PANIC, kvt_status_t},
};

/// What an opaque C type holds.
pub(crate) struct Handle<T> {
    value: T,
    /// A call on it panicked, so nobody knows what state the value is in.
    is_poisoned: AtomicBool,
}

impl<T> Handle<T> {
    pub(crate) fn new(value: T) -> Self {
        let is_poisoned = AtomicBool::new(false);
        Self { value, is_poisoned }
    }

    /// Runs a body on the value; a panic poisons the handle.
    pub(crate) fn with<R>(
        &self,
        body: impl FnOnce(&T) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        if self.is_poisoned.load(Ordering::Acquire) {
            let text = "an earlier call on this handle panicked; it can only be freed";
            return Err(Failure::new(KVT_PANIC, text));
        }
        caught(|| body(&self.value)).unwrap_or_else(|panic| {
            self.is_poisoned.store(true, Ordering::Release);
            Err(panic)
        })
    }
}

/// A C type that stands for a handle.
pub(crate) trait Opaque: Sized {
    /// What it holds.
    type Value;
    /// How messages call it.
    const NAME: &'static str;

    /// The handle inside.
    fn handle(&self) -> &Handle<Self::Value>;

    /// A new one around a value.
    fn around(handle: Handle<Self::Value>) -> Self;
}

/// The handle behind a pointer from C.
///
/// # Safety
/// `pointer` is NULL or came from [`give`] and is not freed before `'a` ends.
pub(crate) unsafe fn borrow<'a, T: Opaque + 'a>(
    pointer: *const T,
) -> Result<&'a Handle<T::Value>, Failure> {
    // SAFETY: not NULL means alive and ours, by this function's own contract; handles are only ever shared.
    let opaque = unsafe { pointer.as_ref() };
    opaque.map(T::handle).ok_or_else(|| Failure::null(T::NAME))
}

/// A whole exported function whose subject is a handle.
///
/// # Safety
/// As for [`borrow`], until this returns.
pub(crate) unsafe fn on<T: Opaque>(
    pointer: *const T,
    body: impl FnOnce(&T::Value) -> Result<(), Failure>,
) -> kvt_status_t {
    enter(|| {
        // SAFETY: the caller's contract is ours.
        let handle = unsafe { borrow(pointer) }?;
        handle.with(body)
    })
}

/// Hands a value to C as a new handle, which [`free`] takes back.
pub(crate) fn give<T: Opaque>(value: T::Value) -> *mut T {
    Box::into_raw(Box::new(T::around(Handle::new(value))))
}

/// Takes a handle back and drops its value, poisoned or not. NULL is nothing to do.
///
/// # Safety
/// `pointer` is NULL or came from [`give`]; nobody uses it any more.
pub(crate) unsafe fn free<T: Opaque>(pointer: *mut T) {
    if pointer.is_null() {
        return;
    }
    enter(|| {
        // SAFETY: not NULL means that it came from `give` and is given back once, by this function's own contract.
        drop(unsafe { Box::from_raw(pointer) });
        Ok(())
    });
}

#[cfg(test)]
mod tests {
    use super::{Handle, Opaque, free, give, on};
    use crate::status::{KVT_NULL_ARGUMENT, KVT_OK, KVT_PANIC};

    struct Opened(Handle<u32>);

    impl Opaque for Opened {
        type Value = u32;
        const NAME: &'static str = "opened";

        fn handle(&self) -> &Handle<u32> {
            &self.0
        }

        fn around(handle: Handle<u32>) -> Self {
            Self(handle)
        }
    }

    #[test]
    fn a_panic_poisons_the_handle_and_free_still_takes_it() {
        let opened = give::<Opened>(7);
        let read = |expected: u32| {
            // SAFETY: it is freed at the end of this test.
            unsafe {
                on(opened, |value| {
                    assert_eq!(*value, expected, "as given");
                    Ok(())
                })
            }
        };
        assert_eq!(read(7), KVT_OK);
        assert_eq!(read(8), KVT_PANIC);
        assert_eq!(read(7), KVT_PANIC, "it is poisoned");
        // SAFETY: it came from `give` and is not used again.
        unsafe { free(opened) };
    }

    #[test]
    fn null_is_a_status_and_nothing_to_free() {
        // SAFETY: NULL is allowed.
        let status = unsafe { on(std::ptr::null::<Opened>(), |_| Ok(())) };
        assert_eq!(status, KVT_NULL_ARGUMENT);
        // SAFETY: NULL is allowed.
        unsafe { free(std::ptr::null_mut::<Opened>()) };
    }
}
