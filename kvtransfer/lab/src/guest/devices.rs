//! The guest's network devices and the software RDMA devices on them.
//!
//! siw sits on two dummies: its connections are the kernel's TCP connections, which find their way between two local
//! addresses. rxe sits on the two ends of a veth pair: its packets leave through its own network device, so two
//! devices talk only if a wire joins them.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};

use super::{command, wait_until};

/// An MTU as eRDMA's guides set it; InfiniBand's MTU of 4096 fits.
const MTU: &str = "8500";
/// How long a device may take to report its port active.
const ACTIVE_LIMIT: Duration = Duration::from_secs(10);

/// A network device of the guest, and the RDMA device on it.
struct Device {
    rdma: &'static str,
    kind: &'static str,
    net: &'static str,
    address: &'static str,
}

const DEVICES: [Device; 4] = [
    Device {
        rdma: "siw0",
        kind: "siw",
        net: "dummy0",
        address: "10.77.0.1",
    },
    Device {
        rdma: "siw1",
        kind: "siw",
        net: "dummy1",
        address: "10.77.1.1",
    },
    Device {
        rdma: "rxe0",
        kind: "rxe",
        net: "wire0",
        address: "10.77.2.1",
    },
    Device {
        rdma: "rxe1",
        kind: "rxe",
        net: "wire1",
        address: "10.77.2.2",
    },
];

/// Makes all devices, and waits for their ports to be active.
pub(super) fn bring_up() -> Result<()> {
    ip("link set lo up")?;
    ip("link add dummy0 type dummy")?;
    ip("link add dummy1 type dummy")?;
    ip("link add wire0 type veth peer name wire1")?;
    for Device { net, address, .. } in &DEVICES {
        // Packets of one local address arrive from a wire at another one; by default the kernel takes that for forgery.
        for (switch, value) in [("accept_local", "1"), ("rp_filter", "0")] {
            let path = Path::new("/proc/sys/net/ipv4/conf").join(net).join(switch);
            fs::write(&path, value).with_context(|| format!("writing {}", path.display()))?;
        }
        ip(&format!("link set {net} mtu {MTU} up"))?;
        ip(&format!("address add {address}/24 dev {net}"))?;
    }
    fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "0").context("writing rp_filter")?;
    // Both ends know each other's address from the start: nobody answers ARP for an address that is local.
    neighbours("wire0", "wire1")?;
    neighbours("wire1", "wire0")?;
    for Device {
        rdma, kind, net, ..
    } in &DEVICES
    {
        command("rdma", &["link", "add", rdma, "type", kind, "netdev", net])?;
    }
    for Device { rdma, .. } in &DEVICES {
        let state = format!("/sys/class/infiniband/{rdma}/ports/1/state");
        let is_active = || fs::read_to_string(&state).is_ok_and(|text| text.contains("ACTIVE"));
        wait_until(&format!("{rdma} is not active"), ACTIVE_LIMIT, is_active)?;
    }
    Ok(())
}

/// Tells `from` the hardware address of the device at the other end of its wire.
fn neighbours(from: &str, to: &str) -> Result<()> {
    let path = format!("/sys/class/net/{to}/address");
    let hardware = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let hardware = hardware.trim();
    for Device { net, address, .. } in &DEVICES {
        if *net == to {
            ip(&format!(
                "neighbour replace {address} lladdr {hardware} dev {from} nud permanent"
            ))?;
        }
    }
    Ok(())
}

fn ip(line: &str) -> Result<()> {
    let words: Vec<&str> = line.split(' ').collect();
    command("ip", &words).map(drop)
}
