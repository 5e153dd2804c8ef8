//! The C ABI of kvtransfer.
//!
//! For now it holds the one function that every later binding calls first: the version of the ABI, which a caller
//! compares with the version of the header it was compiled against before it calls anything else.
#![expect(
    unsafe_code,
    reason = "exporting a symbol under its C name needs an unsafe attribute"
)]

/// Version of the C ABI: changes whenever a signature, a layout or a meaning does.
use kvt as _;
pub const ABI_VERSION: u32 = 0;

/// The ABI version of the loaded library. Callable from any thread; cannot fail.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub extern "C" fn kvt_abi_version() -> u32 {
    ABI_VERSION
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_library_says_its_version() {
        assert_eq!(super::kvt_abi_version(), super::ABI_VERSION);
    }
}
