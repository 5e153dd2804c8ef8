//! What comes from C and goes there by pointer.
#![expect(
    unsafe_code,
    reason = "C passes texts, lists and results as raw pointers"
)]

use std::ffi::{CString, c_char};

use crate::status::Failure;

/// A list of the caller's. NULL stands for an empty one.
///
/// # Safety
/// `data` is NULL or the start of `len` values that do not change until `'a` ends.
pub(crate) unsafe fn list<'a, T>(
    data: *const T,
    len: usize,
    what: &str,
) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    if data.is_null() {
        return Err(Failure::null(what));
    }
    let bytes = len.checked_mul(size_of::<T>());
    if bytes.is_none_or(|bytes| bytes > isize::MAX.unsigned_abs()) {
        return Err(Failure::argument(format!(
            "`{what}` has an impossible length, {len}"
        )));
    }
    if !data.is_aligned() {
        return Err(Failure::argument(format!("`{what}` is misaligned")));
    }
    // SAFETY: not NULL, aligned and of a possible size, all checked above; the caller keeps the values alive and unchanged.
    Ok(unsafe { std::slice::from_raw_parts(data, len) })
}

/// A text of the caller's.
///
/// # Safety
/// As for [`list`].
pub(crate) unsafe fn text<'a>(
    data: *const c_char,
    len: usize,
    what: &str,
) -> Result<&'a str, Failure> {
    // SAFETY: the caller's contract is ours.
    let bytes = unsafe { list(data.cast::<u8>(), len, what) }?;
    str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        Failure::argument(format!("`{what}` is no UTF-8 text, from byte {at} on"))
    })
}

/// A struct of the caller's.
///
/// # Safety
/// `value` is NULL or points to a value that does not change until `'a` ends.
pub(crate) unsafe fn one<'a, T>(value: *const T, what: &str) -> Result<&'a T, Failure> {
    if value.is_null() {
        return Err(Failure::null(what));
    }
    if !value.is_aligned() {
        return Err(Failure::argument(format!("`{what}` is misaligned")));
    }
    // SAFETY: not NULL and aligned, checked above; the caller keeps the value alive and unchanged.
    Ok(unsafe { &*value })
}

/// Where a result goes. Made before anything is done, so that a missing place fails the call without effect.
#[derive(Debug)]
pub(crate) struct Place<T>(*mut T);

impl<T> Place<T> {
    /// A place that must be there.
    ///
    /// # Safety
    /// `place` is NULL or points to memory for one `T` that nobody else uses until the exported function returns.
    pub(crate) unsafe fn new(place: *mut T, what: &str) -> Result<Self, Failure> {
        if place.is_null() {
            return Err(Failure::null(what));
        }
        if !place.is_aligned() {
            return Err(Failure::argument(format!("`{what}` is misaligned")));
        }
        Ok(Self(place))
    }

    /// A place that may be NULL: the caller does not want to know.
    ///
    /// # Safety
    /// As for [`new`](Self::new).
    pub(crate) unsafe fn optional(place: *mut T, what: &str) -> Result<Option<Self>, Failure> {
        if place.is_null() {
            return Ok(None);
        }
        // SAFETY: the caller's contract is ours.
        unsafe { Self::new(place, what) }.map(Some)
    }

    /// Fills the place `at` values further on.
    ///
    /// # Safety
    /// The place is the first of more than `at`.
    pub(crate) unsafe fn put_at(&self, at: usize, value: T) {
        // SAFETY: the caller's contract is ours.
        let place = unsafe { self.0.add(at) };
        // SAFETY: as above, and whoever made the first place promised that it is writable.
        unsafe { place.write(value) };
    }

    /// Fills it.
    pub(crate) fn put(&self, value: T) {
        // SAFETY: whoever made the place promised that it is writable until the exported function returns.
        unsafe { self.0.write(value) };
    }
}

/// Where a text for the caller goes.
pub(crate) struct Texts {
    text: Place<*mut c_char>,
    len: Option<Place<usize>>,
}

impl Texts {
    /// # Safety
    /// As for [`Place::new`], for both.
    pub(crate) unsafe fn new(
        out_text: *mut *mut c_char,
        out_len: *mut usize,
    ) -> Result<Self, Failure> {
        // SAFETY: the caller's contract is ours.
        let text = unsafe { Place::new(out_text, "out_text") }?;
        // SAFETY: the caller's contract is ours.
        let len = unsafe { Place::optional(out_len, "out_len") }?;
        Ok(Self { text, len })
    }

    /// A place for a text alone, which may be NULL: the caller does not want to know.
    ///
    /// # Safety
    /// As for [`Place::new`].
    pub(crate) unsafe fn optional(
        out_text: *mut *mut c_char,
        what: &str,
    ) -> Result<Option<Self>, Failure> {
        // SAFETY: the caller's contract is ours.
        let text = unsafe { Place::optional(out_text, what) }?;
        Ok(text.map(|text| Self { text, len: None }))
    }

    /// Gives the text away, or NULL.
    pub(crate) fn put_or_null(&self, text: Option<String>) {
        match text {
            Some(text) => self.put(text),
            None => self.text.put(std::ptr::null_mut()),
        }
    }

    /// Gives the text away.
    pub(crate) fn put(&self, text: String) {
        if let Some(len) = &self.len {
            len.put(text.len());
        }
        self.text.put(given(text));
    }
}

/// Gives a text to C, which gives it back with `kvt_text_free`. NULs inside become spaces.
fn given(text: String) -> *mut c_char {
    let text = CString::new(text).unwrap_or_else(|error| {
        let mut bytes = error.into_vec();
        bytes
            .iter_mut()
            .filter(|byte| **byte == 0)
            .for_each(|byte| *byte = b' ');
        CString::new(bytes).expect("invariant: every NUL was replaced")
    });
    text.into_raw()
}

/// Frees a text that this library gave through an `out_text` or `out_reason` argument. NULL is nothing to do.
///
/// Ownership: the text is gone. Threads: any. Errors: none.
///
/// # Safety
/// `text` is NULL or came from this library and was not freed before.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_text_free(text: *mut c_char) {
    if !text.is_null() {
        // SAFETY: not NULL means that it came from `given` and is given back once, by this function's own contract.
        drop(unsafe { CString::from_raw(text) });
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::null;

    use super::{Place, given, kvt_text_free, list, text};
    use crate::status::{KVT_BAD_ARGUMENT, KVT_NULL_ARGUMENT};

    #[test]
    fn lists_are_checked_before_they_are_read() {
        // SAFETY: NULL is allowed.
        let nothing = unsafe { list::<u64>(null(), 0, "x") };
        assert_eq!(nothing, Ok(&[][..]));
        // SAFETY: NULL is allowed.
        let missing = unsafe { list::<u64>(null(), 1, "x") }.expect_err("refused");
        assert_eq!(
            (missing.status, &*missing.text),
            (KVT_NULL_ARGUMENT, "`x` is NULL")
        );
        let values = [1_u64, 2];
        // SAFETY: the length is refused before anything is read.
        let absurd = unsafe { list(values.as_ptr(), usize::MAX, "x") }.expect_err("refused");
        assert_eq!(absurd.status, KVT_BAD_ARGUMENT);
        let odd = values.as_ptr().cast::<u8>().wrapping_add(1).cast::<u64>();
        // SAFETY: the alignment is refused before anything is read.
        let odd = unsafe { list(odd, 1, "x") }.expect_err("refused");
        assert_eq!(odd.text, "`x` is misaligned");
        // SAFETY: two values are there.
        assert_eq!(unsafe { list(values.as_ptr(), 2, "x") }, Ok(&values[..]));
    }

    #[test]
    fn texts_must_be_utf8() {
        let bytes = b"ab\xff";
        // SAFETY: three bytes are there.
        let bad = unsafe { text(bytes.as_ptr().cast(), 3, "name") }.expect_err("refused");
        assert_eq!(bad.text, "`name` is no UTF-8 text, from byte 2 on");
        // SAFETY: three bytes are there.
        assert_eq!(unsafe { text(bytes.as_ptr().cast(), 2, "name") }, Ok("ab"));
    }

    #[test]
    fn places_are_checked_and_texts_come_back() {
        // SAFETY: NULL is allowed.
        let missing = unsafe { Place::<u32>::new(std::ptr::null_mut(), "out") };
        assert_eq!(missing.expect_err("refused").status, KVT_NULL_ARGUMENT);
        // SAFETY: NULL is allowed.
        let unwanted = unsafe { Place::<u32>::optional(std::ptr::null_mut(), "out") };
        assert!(unwanted.expect("allowed").is_none());
        let given = given("a\0b".to_owned());
        // SAFETY: it is a C text of this library's.
        let read = unsafe { std::ffi::CStr::from_ptr(given) };
        assert_eq!(read.to_str(), Ok("a b"));
        // SAFETY: it came from `given` and is not used again.
        unsafe { kvt_text_free(given) };
        // SAFETY: NULL is allowed.
        unsafe { kvt_text_free(std::ptr::null_mut()) };
    }
}
