//! What version is loaded.
#![expect(
    unsafe_code,
    reason = "exporting a symbol under its C name needs an unsafe attribute"
)]

use std::ffi::{CStr, c_char};

/// Version of this header. It changes whenever a signature, a layout or a meaning does. Compare it with
/// `kvt_abi_version()` before anything else, and put it into `kvt_layout_t.abi_version`.
pub const KVT_ABI_VERSION: u32 = 1;

const PACKAGE: &CStr =
    match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("a version holds no NUL"),
    };

/// The ABI version of the loaded library: `KVT_ABI_VERSION` of the header it was built with.
///
/// Threads: any, at any time. Errors: none.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub extern "C" fn kvt_abi_version() -> u32 {
    KVT_ABI_VERSION
}

/// The version of the loaded library, such as "0.1.0".
///
/// Ownership: the text is the library's and lives as long as it is loaded. Threads: any, at any time. Errors: none.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub extern "C" fn kvt_version() -> *const c_char {
    PACKAGE.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::{KVT_ABI_VERSION, PACKAGE, kvt_abi_version};

    #[test]
    fn the_library_says_its_versions() {
        assert_eq!(kvt_abi_version(), KVT_ABI_VERSION);
        assert_eq!(PACKAGE.to_str(), Ok(env!("CARGO_PKG_VERSION")));
    }
}
