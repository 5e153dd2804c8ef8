//! NVIDIA's run-time compiler, if the host has one.
//!
//! Opened by us and not through cudarc, whose bindings for CUDA 12 never look for the library of CUDA 13. Where torch is
//! loaded, its own copy is found by its soname.
#![expect(unsafe_code, reason = "symbols are looked up by name and given a type")]

use std::{
    ffi::{CString, c_char, c_int, c_void},
    mem::ManuallyDrop,
    path::{Path, PathBuf},
    ptr,
};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// Names of the library, newest first.
const NAMES: [&str; 4] = [
    "libnvrtc.so.13",
    "libnvrtc.so.12",
    "libnvrtc.so.11.2",
    "libnvrtc.so",
];

/// Longest log and output that are taken, in bytes.
const OUTPUT_BYTES_MAX: usize = 8 << 20;

type Program = *mut c_void;
type SizeOf = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Fetch = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The compiler.
pub(super) struct Nvrtc {
    version: (u32, u32),
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log: (SizeOf, Fetch),
    cubin: (SizeOf, Fetch),
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
}

impl Nvrtc {
    /// Opens it; `given` is tried first. The error says what was tried.
    pub(super) fn open(given: Option<&Path>) -> Result<Self, String> {
        let names = NAMES.iter().map(PathBuf::from);
        let mut last = String::new();
        for name in given.map(Path::to_owned).into_iter().chain(names) {
            // SAFETY: the compiler's constructors may run on any thread.
            match unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_LOCAL) } {
                // Never closed: the calls below must stay valid.
                Ok(library) => return Self::load(&ManuallyDrop::new(library)),
                Err(error) => last = error.to_string(),
            }
        }
        Err(format!("NVRTC not found ({last})"))
    }

    fn load(library: &Library) -> Result<Self, String> {
        // SAFETY: nvrtc.h declares the symbol with the type of the binding or field.
        let version = unsafe { symbol(library, "nvrtcVersion\0") }?;
        let mut loaded = Self {
            version: (0, 0),
            // SAFETY: as above.
            create: unsafe { symbol(library, "nvrtcCreateProgram\0") }?,
            // SAFETY: as above.
            compile: unsafe { symbol(library, "nvrtcCompileProgram\0") }?,
            log: (
                // SAFETY: as above.
                unsafe { symbol(library, "nvrtcGetProgramLogSize\0") }?,
                // SAFETY: as above.
                unsafe { symbol(library, "nvrtcGetProgramLog\0") }?,
            ),
            cubin: (
                // SAFETY: as above.
                unsafe { symbol(library, "nvrtcGetCUBINSize\0") }?,
                // SAFETY: as above.
                unsafe { symbol(library, "nvrtcGetCUBIN\0") }?,
            ),
            // SAFETY: as above.
            destroy: unsafe { symbol(library, "nvrtcDestroyProgram\0") }?,
        };
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = version;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two numbers.
        let code = unsafe { version(&raw mut major, &raw mut minor) };
        if code != 0 {
            return Err(format!("nvrtcVersion failed ({code})"));
        }
        loaded.version = (major.unsigned_abs(), minor.unsigned_abs());
        Ok(loaded)
    }

    /// Its release.
    pub(super) fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Compiles a source for a device. The error is the compiler's log.
    pub(super) fn compile(&self, source: &str, arch: (u32, u32)) -> Result<Vec<u8>, String> {
        let source = CString::new(source).map_err(|_| "the source has a zero byte".to_owned())?;
        let mut program = ptr::null_mut();
        let (none, name) = (ptr::null(), c"copy.cu".as_ptr());
        // SAFETY: the strings end with zeroes; the program is destroyed below.
        let code = unsafe { (self.create)(&raw mut program, source.as_ptr(), name, 0, none, none) };
        if code != 0 {
            return Err(format!("nvrtcCreateProgram failed ({code})"));
        }
        let arch = format!("--gpu-architecture=sm_{}{}", arch.0, arch.1);
        let options = [
            CString::new(arch).unwrap_or_default(),
            c"--std=c++17".to_owned(),
        ];
        let pointers = options.each_ref().map(|option| option.as_ptr());
        // SAFETY: two options that end with zeroes.
        let code = unsafe { (self.compile)(program, 2, pointers.as_ptr()) };
        let outcome = if code == 0 {
            self.output(program, self.cubin)
        } else {
            let log = self.output(program, self.log).unwrap_or_default();
            let text = String::from_utf8_lossy(&log)
                .trim_end_matches('\0')
                .to_owned();
            Err(format!("NVRTC refused the kernels ({code}): {text}"))
        };
        // SAFETY: created above, destroyed once.
        unsafe { (self.destroy)(&raw mut program) };
        outcome
    }

    #[expect(
        clippy::unused_self,
        reason = "the calls are those of an opened library"
    )]
    fn output(
        &self,
        program: Program,
        (size_of, fetch): (SizeOf, Fetch),
    ) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: writes one number.
        let code = unsafe { size_of(program, &raw mut len) };
        if code != 0 || len > OUTPUT_BYTES_MAX {
            return Err(format!(
                "NVRTC's output is not to be had ({code}, {len} bytes)"
            ));
        }
        let mut bytes = vec![0_u8; len];
        // SAFETY: writes as many bytes as it said.
        let code = unsafe { fetch(program, bytes.as_mut_ptr().cast()) };
        if code != 0 {
            return Err(format!("NVRTC's output is not to be had ({code})"));
        }
        Ok(bytes)
    }
}

/// Looks a symbol up and gives it the type `T`.
///
/// # Safety
/// `T` must be the function-pointer type that `nvrtc.h` declares for `name`, which ends with a zero byte.
unsafe fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T, String> {
    // SAFETY: the caller vouches for the type.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    let missing = |_| format!("NVRTC has no {}", name.trim_end_matches('\0'));
    found.map(|symbol| *symbol).map_err(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_no_compiler_is_refused_by_symbol() {
        let wrong = Nvrtc::open(Some(Path::new("libc.so.6")));
        assert_eq!(wrong.err().as_deref(), Some("NVRTC has no nvrtcVersion"));
    }
}
