//! The IPv4 address of a network interface.
#![expect(unsafe_code, reason = "getifaddrs gives a linked list")]

use std::{ffi::CStr, mem, net::Ipv4Addr, ptr};

/// Most addresses of a host that are looked at.
const ADDRESSES_MAX: usize = 4096;

/// The first IPv4 address of an interface; `None` if it has none or is not there.
pub(super) fn ipv4_of(interface: &str) -> Option<Ipv4Addr> {
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
    use super::ipv4_of;
    use std::net::Ipv4Addr;

    #[test]
    fn the_loopback_interface_has_its_address() {
        assert_eq!(ipv4_of("lo"), Some(Ipv4Addr::LOCALHOST));
        assert_eq!(ipv4_of("nosuch0"), None);
    }
}
