//! What devices say of themselves, and what they refuse to make.

use std::{ffi::CStr, fs, ptr};

use super::host::{Host, REMOTE, attributes};
use crate::{
    testing::fake_verbs::{Behaviour, DmaBuf, FakeVerbs, Violation, shared::free_slot},
    transport::verbs::{device, sys},
};

#[test]
fn erdma_refuses_what_its_driver_refuses() {
    type Spoil = fn(&mut sys::ibv_qp_init_attr);
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut host = Host::new(&fake, 0);
    let cases: [(i32, Spoil); 9] = [
        (libc::EINVAL, |attr| attr.cap.max_recv_wr = 0),
        (libc::EINVAL, |attr| attr.cap.max_send_wr = 0),
        (libc::EINVAL, |attr| attr.cap.max_inline_data = 97),
        (libc::EINVAL, |attr| attr.cap.max_recv_sge = 2),
        (libc::EINVAL, |attr| attr.cap.max_send_sge = 7),
        (libc::EINVAL, |attr| attr.cap.max_send_wr = 8193),
        (libc::EOPNOTSUPP, |attr| {
            attr.srq = ptr::without_provenance_mut(8)
        }),
        (libc::EOPNOTSUPP, |attr| attr.qp_type = 4),
        (libc::EINVAL, |attr| attr.send_cq = ptr::null_mut()),
    ];
    for (at, (errno, spoil)) in cases.into_iter().enumerate() {
        let mut attr = attributes(&host);
        spoil(&mut attr);
        assert_eq!(host.try_queue(attr), Err(errno), "case {at}");
    }
    let mut attr = attributes(&host);
    attr.cap.max_send_sge = 6;
    attr.cap.max_inline_data = 96;
    attr.cap.max_send_wr = 8192;
    assert!(
        host.try_queue(attr).is_ok(),
        "though the device reports one entry"
    );
    assert_eq!(host.limits().max_sge, 1);
}

#[test]
fn roce_reports_what_it_takes() {
    let fake = FakeVerbs::new(Behaviour::roce());
    let mut host = Host::new(&fake, 0);
    let mut attr = attributes(&host);
    attr.cap.max_send_sge = u32::try_from(host.limits().max_sge).expect("positive");
    attr.cap.max_recv_wr = 0;
    assert!(host.try_queue(attr).is_ok());
    assert_eq!(host.port().max_msg_sz, 8 << 20);
}

#[test]
fn regions_are_refused_by_size_by_memlock_and_by_rights() {
    let mut preset = Behaviour::erdma_compat();
    preset.locked_bytes_max = Some(10_000);
    preset.region_bytes_max = 8192;
    let fake = FakeVerbs::new(preset);
    let mut host = Host::new(&fake, 0);
    let pd = host.pd;
    assert_eq!(
        host.try_register(pd, 8193, 0, REMOTE).err(),
        Some(libc::EINVAL)
    );
    assert_eq!(
        host.try_register(pd, 0, 0, REMOTE).err(),
        Some(libc::EINVAL)
    );
    let remote_only = sys::IBV_ACCESS_REMOTE_WRITE;
    assert_eq!(
        host.try_register(pd, 8, 0, remote_only).err(),
        Some(libc::EINVAL)
    );
    let first = host.register(8192, 0, REMOTE);
    assert_eq!(
        host.try_register(pd, 8192, 0, REMOTE).err(),
        Some(libc::ENOMEM)
    );
    host.deregister(&first);
    host.register(8192, 0, REMOTE | sys::IBV_ACCESS_RELAXED_ORDERING);
}

#[test]
fn dmabuf_answers_as_a_probe_expects() {
    for (dmabuf, bad_fd, good_fd) in [
        (
            DmaBuf::NotSupported,
            Some(libc::EOPNOTSUPP),
            Some(libc::EOPNOTSUPP),
        ),
        (DmaBuf::Invalid, Some(libc::EINVAL), Some(libc::EINVAL)),
        (DmaBuf::Supported, Some(libc::EBADF), None),
    ] {
        let mut preset = Behaviour::erdma_compat();
        preset.dmabuf = dmabuf;
        let fake = FakeVerbs::new(preset);
        let mut host = Host::new(&fake, 0);
        assert_eq!(host.register_dmabuf(-1).err(), bad_fd, "{dmabuf:?}");
        let fd = host.async_fd();
        assert_eq!(host.register_dmabuf(fd).err(), good_fd, "{dmabuf:?}");
    }
}

#[test]
fn objects_in_use_stay() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut host = Host::new(&fake, 0);
    let qp = host.queue();
    assert_eq!(host.try_destroy_cq(), libc::EBUSY);
    assert_eq!(host.try_dealloc_pd(), libc::EBUSY);
    assert_eq!(host.try_destroy_channel(), libc::EBUSY);
    assert_eq!(host.destroy(qp), 0);
    let memory = host.register(8, 0, REMOTE);
    assert_eq!(host.try_dealloc_pd(), libc::EBUSY, "a region lives in it");
    host.deregister(&memory);
    fake.fabric().assert_clean();
}

#[test]
fn completion_queues_have_bounds() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let host = Host::new(&fake, 0);
    assert_eq!(host.try_create_cq(0, 0), Err(libc::EINVAL));
    assert_eq!(host.try_create_cq(1 << 30, 0), Err(libc::EINVAL));
    assert_eq!(
        host.try_create_cq(16, 99),
        Err(libc::EINVAL),
        "no such vector"
    );
    assert_eq!(
        host.try_create_cq(100, 0),
        Ok(128),
        "rounded up to a power of two"
    );
    assert_eq!(host.try_create_cq(1, 0), Ok(64), "and to 64");
}

#[test]
fn the_list_of_devices_and_sysfs_agree() {
    for (preset, mode) in [
        (Behaviour::erdma_compat(), Some(true)),
        (Behaviour::erdma_standard(), Some(false)),
        (Behaviour::siw(), None),
        (Behaviour::roce(), None),
    ] {
        let (driver, iwarp) = (preset.driver, preset.looks_iwarp);
        let fake = FakeVerbs::new(preset);
        let found = device::list(&fake.library()).expect("a list");
        assert_eq!(found.len(), 2);
        for (index, found) in found.iter().enumerate() {
            assert_eq!(found.name, fake.device_names()[index]);
            assert_eq!(found.driver.as_deref(), Some(driver));
            assert_eq!(found.compat_mode, mode);
            assert_eq!(found.transport == device::Transport::Iwarp, iwarp);
            assert_eq!(found.numa_node, None);
            assert!(found.pci_path.is_some());
            let gids = device::gids(fake.sysfs(), &found.name, 1);
            let host = Host::open(&fake, index, false, 64);
            for entry in &gids {
                assert_eq!(host.gid_at(entry.index), Some(entry.gid));
            }
            let gid_count = usize::try_from(host.port().gid_tbl_len).expect("positive");
            assert_eq!(gids.len(), gid_count);
            let usable: Vec<_> = gids
                .iter()
                .filter(|entry| entry.kind == "RoCE v2" && entry.ipv4().is_some())
                .collect();
            if iwarp {
                assert!(usable.is_empty());
                assert_eq!(gids.len(), 1);
            } else {
                assert_eq!(usable.len(), 1);
                assert_eq!(usable[0].ipv4(), Some(fake.address(index)));
            }
        }
    }
}

#[test]
fn the_index_of_the_gid_differs_between_devices() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let (a, b) = (Host::new(&fake, 0), Host::new(&fake, 1));
    assert_eq!(
        (a.gid().0, b.gid().0),
        (2, 1),
        "as on the machines of the runbooks"
    );
}

#[test]
fn a_fabric_lives_as_long_as_what_was_made_with_it() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let sysfs = fake.sysfs().to_owned();
    let mut host = Host::new(&fake, 0);
    drop(fake);
    let name = sysfs.join("class/infiniband/erdma_0/fw_ver");
    assert!(fs::exists(&name).expect("readable"));
    let memory = host.register(64, 3, REMOTE);
    assert_eq!(memory.bytes(), [3; 64]);
    drop(host);
    assert!(!fs::exists(&name).expect("readable"), "and no longer");
}

#[test]
fn fabrics_live_side_by_side_up_to_a_limit() {
    let mut fabrics: Vec<FakeVerbs> = (1..=4)
        .map(|devices| FakeVerbs::with_devices(Behaviour::roce(), devices).expect("made"))
        .collect();
    for (at, fake) in fabrics.iter().enumerate() {
        let found = device::list(&fake.library()).expect("a list");
        assert_eq!(found.len(), 1 + at, "each table knows its own fabric");
    }
    // Taking all slots of the process would starve tests that run beside this one, so the rule is asked directly.
    let taken: Vec<_> = fabrics.iter().map(FakeVerbs::slot_entry).collect();
    assert_eq!(free_slot(&taken), None);
    drop(fabrics.remove(2));
    assert_eq!(free_slot(&taken), Some(2));
    for devices in [0, 251] {
        assert!(FakeVerbs::with_devices(Behaviour::roce(), devices).is_err());
    }
}

#[test]
fn closing_a_device_with_objects_is_told() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut host = Host::new(&fake, 0);
    host.close_and_open();
    assert_eq!(
        fake.fabric().violations(),
        [Violation::ClosedWithObjects {
            device: 0,
            objects: 3
        }]
    );
}

#[test]
fn names_and_paths_are_c_texts() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let host = Host::new(&fake, 1);
    let path = host.device_path();
    let path = CStr::from_bytes_until_nul(&path)
        .expect("ends")
        .to_str()
        .expect("text");
    assert_eq!(
        path,
        fake.sysfs()
            .join("class/infiniband/erdma_1")
            .to_str()
            .expect("text")
    );
}
