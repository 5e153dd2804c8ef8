//! Addresses of the interfaces of this network namespace: the only thing here that no file says.
#![expect(unsafe_code, reason = "walks the list that getifaddrs returns")]

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Most addresses taken: a node with some hundred pods has about one per pod.
const ADDRESSES_MAX: usize = 16_384;

/// Addresses by interface; `None` if the system does not say.
pub(super) fn of_this_namespace() -> Option<Vec<(String, IpAddr)>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `list` is a valid place for the head; what it then points to is ours until freeifaddrs below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return None;
    }
    let mut found = Vec::new();
    let mut next = list;
    while found.len() < ADDRESSES_MAX {
        // SAFETY: `next` is null or an entry of the list, which lives until freeifaddrs below.
        let Some(entry) = (unsafe { next.as_ref() }) else {
            break;
        };
        next = entry.ifa_next;
        // SAFETY: `entry` belongs to the list that is still held.
        let Some(address) = (unsafe { address_of(entry) }) else {
            continue;
        };
        // SAFETY: every entry has a terminated name that lives as long as the list.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) };
        found.push((name.to_string_lossy().into_owned(), address));
    }
    // SAFETY: `list` came from getifaddrs, is freed once, and nothing of it is referenced any more.
    unsafe { libc::freeifaddrs(list) };
    Some(found)
}

/// # Safety
/// `entry` is of a list of getifaddrs that is not freed yet.
unsafe fn address_of(entry: &libc::ifaddrs) -> Option<IpAddr> {
    // SAFETY: the address is null or lives as long as the list, which the caller holds.
    let family = i32::from(unsafe { entry.ifa_addr.as_ref() }?.sa_family);
    match family {
        libc::AF_INET => {
            // SAFETY: of this family the address is a sockaddr_in.
            let address = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
            let bits = u32::from_be(address.sin_addr.s_addr);
            Some(IpAddr::V4(Ipv4Addr::from_bits(bits)))
        }
        libc::AF_INET6 => {
            // SAFETY: of this family the address is a sockaddr_in6.
            let address = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr)))
        }
        _ => None,
    }
}
