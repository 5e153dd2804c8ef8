//! The devices and GIDs that kvtransfer lists, against those of the `ibverbs` crate. Means something only where there
//! are devices: on a host with RDMA, or in the lab's virtual machine.

use std::{collections::BTreeSet, sync::Arc};

use crate::verbs::{context::Context, device, library::Library};

/// (device, index, GID)
type Gids = BTreeSet<(String, u32, [u8; 16])>;

#[test]
#[ignore = "needs RDMA"]
fn devices_and_gids_are_those_that_ibverbs_lists() {
    let library = Library::open().expect("this host has rdma-core");
    let ours = device::list(&library).expect("a list");
    let theirs = ibverbs::devices().expect("a list");
    assert!(!ours.is_empty(), "this host has no device");
    let mut names = BTreeSet::new();
    let mut our_gids = Gids::new();
    let mut their_gids = Gids::new();
    for rival in theirs.iter() {
        let name = rival
            .name()
            .expect("a name")
            .to_str()
            .expect("ASCII")
            .to_owned();
        let opened = rival.open().expect("opened");
        for entry in opened.gid_table() {
            let mut gid = [0; 16];
            gid[..8].copy_from_slice(&entry.gid.subnet_prefix().to_be_bytes());
            gid[8..].copy_from_slice(&entry.gid.interface_id().to_be_bytes());
            their_gids.insert((name.clone(), entry.gid_index, gid));
        }
        names.insert(name);
    }
    for device in &ours {
        assert!(names.remove(&device.name), "ibverbs lacks {}", device.name);
        let context: Arc<Context> = Context::open(&library, &device.name).expect("opened");
        for entry in context.gids(1) {
            our_gids.insert((device.name.clone(), entry.index.into(), entry.gid));
        }
    }
    assert!(names.is_empty(), "we lack {names:?}");
    assert!(!our_gids.is_empty());
    assert_eq!(our_gids, their_gids);
}
