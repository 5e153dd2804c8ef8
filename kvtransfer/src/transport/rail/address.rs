//! The IPv4 address of the network interface behind a device.
#![expect(unsafe_code, reason = "getifaddrs gives a linked list")]

use std::{ffi::CStr, fs, mem, net::Ipv4Addr, path::Path, ptr};

use crate::transport::verbs::library::Library;

/// Most addresses of a host that are looked at.
const ADDRESSES_MAX: usize = 4096;

/// The interface whose hardware address an iWARP GID holds: siw and eRDMA's standard mode put it into the first six bytes
/// and nothing into the others, and the kernel does not name the interface there (erdma.md §1.1).
pub(super) fn interface_of(sysfs: &Path, gid: [u8; 16]) -> Option<String> {
    let (address, rest) = gid.split_at(6);
    if rest.iter().any(|byte| *byte != 0) || address.iter().all(|byte| *byte == 0) {
        return None;
    }
    let bytes: Vec<String> = address.iter().map(|byte| format!("{byte:02x}")).collect();
    let wanted = bytes.join(":");
    let interfaces = fs::read_dir(sysfs.join("class/net")).ok()?;
    let mut names = interfaces
        .take(ADDRESSES_MAX)
        .flatten()
        .filter_map(|entry| {
            let text = fs::read_to_string(entry.path().join("address")).ok()?;
            let is_it = text.trim().eq_ignore_ascii_case(&wanted);
            is_it.then(|| entry.file_name().to_string_lossy().into_owned())
        });
    names.next()
}

/// The first IPv4 address of an interface, as the library's devices see it; `None` if it has none or is not there.
pub(super) fn ipv4_of(library: &Library, interface: &str) -> Option<Ipv4Addr> {
    match &library.interfaces {
        Some(known) => {
            let found = known.iter().find(|(name, _)| name == interface);
            found.map(|(_, address)| *address)
        }
        None => ipv4_of_host(interface),
    }
}

fn ipv4_of_host(interface: &str) -> Option<Ipv4Addr> {
    let mut list = ptr::null_mut();
    // SAFETY: the result is ours; the call has no other condition.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return None;
    }
    let mut entry = list;
    let mut found = None;
    for _ in 0..ADDRESSES_MAX {
        if entry.is_null() || found.is_some() {
            break;
        }
        // SAFETY: the entry is part of the list, which is freed below.
        let current: libc::ifaddrs = unsafe { *entry };
        // SAFETY: names in the list are C strings.
        let name = unsafe { CStr::from_ptr(current.ifa_name) };
        if name.to_bytes() == interface.as_bytes() {
            found = ipv4(current.ifa_addr);
        }
        entry = current.ifa_next;
    }
    // SAFETY: the list came from getifaddrs and nothing refers to it any more.
    unsafe { libc::freeifaddrs(list) };
    found
}

fn ipv4(address: *const libc::sockaddr) -> Option<Ipv4Addr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: every socket address starts with its family.
    let family = unsafe { (*address).sa_family };
    if i32::from(family) != libc::AF_INET {
        return None;
    }
    let mut inet = mem::MaybeUninit::<libc::sockaddr_in>::uninit();
    // SAFETY: an address of this family is a sockaddr_in, whatever its alignment.
    unsafe { ptr::copy_nonoverlapping(address.cast(), inet.as_mut_ptr(), 1) };
    // SAFETY: just copied, and any bits are valid.
    let inet = unsafe { inet.assume_init() };
    Some(Ipv4Addr::from(u32::from_be(inet.sin_addr.s_addr)))
}

#[cfg(test)]
mod tests {
    use super::ipv4_of_host;
    use std::net::Ipv4Addr;

    #[test]
    fn the_loopback_interface_has_its_address() {
        assert_eq!(ipv4_of_host("lo"), Some(Ipv4Addr::LOCALHOST));
        assert_eq!(ipv4_of_host("nosuch0"), None);
    }
}
