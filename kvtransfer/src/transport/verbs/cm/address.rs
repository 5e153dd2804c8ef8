//! Socket addresses in the form that C calls take.
#![expect(unsafe_code, reason = "an address of C is read by its family")]

use std::{
    mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    ptr,
};

use libc::sockaddr_storage;

#[expect(clippy::cast_possible_truncation, reason = "families are small")]
const FAMILY_V4: libc::sa_family_t = libc::AF_INET as libc::sa_family_t;
#[expect(clippy::cast_possible_truncation, reason = "families are small")]
const FAMILY_V6: libc::sa_family_t = libc::AF_INET6 as libc::sa_family_t;

pub(super) fn to_raw(address: SocketAddr) -> sockaddr_storage {
    // SAFETY: the struct is integers; zero is valid for each.
    let mut raw: sockaddr_storage = unsafe { mem::zeroed() };
    match address {
        SocketAddr::V4(address) => {
            let to = (&raw mut raw).cast::<libc::sockaddr_in>();
            let value = libc::sockaddr_in {
                sin_family: FAMILY_V4,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from(*address.ip()).to_be(),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is large and aligned enough for every address.
            unsafe { to.write(value) };
        }
        SocketAddr::V6(address) => {
            let to = (&raw mut raw).cast::<libc::sockaddr_in6>();
            let value = libc::sockaddr_in6 {
                sin6_family: FAMILY_V6,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: address.ip().octets(),
                },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: the storage is large and aligned enough for every address.
            unsafe { to.write(value) };
        }
    }
    raw
}

pub(super) fn from_raw(raw: &sockaddr_storage) -> Option<SocketAddr> {
    match raw.ss_family {
        FAMILY_V4 => {
            // SAFETY: the family says so, and the storage is large and aligned enough.
            let from = unsafe { &*ptr::from_ref(raw).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(from.sin_addr.s_addr));
            Some(SocketAddr::from((ip, u16::from_be(from.sin_port))))
        }
        FAMILY_V6 => {
            // SAFETY: as above.
            let from = unsafe { &*ptr::from_ref(raw).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(from.sin6_addr.s6_addr);
            Some(SocketAddr::from((ip, u16::from_be(from.sin6_port))))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn addresses_survive_the_c_form(v4 in any::<u32>(), v6 in any::<u128>(), port in any::<u16>()) {
            let v4 = SocketAddr::from((Ipv4Addr::from(v4), port));
            let v6 = SocketAddr::from((Ipv6Addr::from(v6), port));
            prop_assert_eq!(from_raw(&to_raw(v4)), Some(v4));
            prop_assert_eq!(from_raw(&to_raw(v6)), Some(v6));
        }
    }

    #[test]
    fn other_families_are_no_address() {
        let mut raw = to_raw(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
        raw.ss_family = 1;
        assert_eq!(from_raw(&raw), None);
    }
}
