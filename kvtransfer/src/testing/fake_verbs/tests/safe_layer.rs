//! The crate's own verbs layer on fake devices: it finds what they can do, connects them, and survives their manners.
#![expect(unsafe_code, reason = "the tests lend memory to an adapter")]

use std::sync::Arc;

use crate::{
    testing::fake_verbs::{Behaviour, DmaBuf, FakeVerbs},
    transport::verbs::{
        chain::{Chain, Flags, RemotePlace, Sge},
        context::Context,
        cq::{Completion, Cq, POLL_MAX},
        mr::{Access, RegisteredRegion},
        pd::Pd,
        probe,
        qp::{LocalPath, Qp, QpAddress, QpCaps},
        select,
    },
};

const CAPS: QpCaps = QpCaps {
    max_send_wr: 32,
    max_recv_wr: 16,
    max_send_sge: 6,
    max_inline_bytes: 32,
    wr_bytes_max: 1 << 20,
};
const BYTES: usize = 8192;

/// One end. The queue pair goes first, the memory last.
struct End {
    qp: Qp,
    cq: Arc<Cq>,
    context: Arc<Context>,
    region: RegisteredRegion,
    memory: Box<[u8]>,
}

impl End {
    fn new(fake: &FakeVerbs, device: usize, byte: u8) -> Self {
        let name = &fake.device_names()[device];
        let context = Context::open(&fake.library(), name).expect("opened");
        let pd = Pd::create(&context).expect("a domain");
        let cq = Cq::create(&context, CAPS.completions(), true, 0).expect("a queue");
        let qp = Qp::create(&pd, &cq, &cq, CAPS).expect("a queue pair");
        let mut memory = vec![byte; BYTES].into_boxed_slice();
        let base = memory.as_mut_ptr().expose_provenance() as u64;
        let len = BYTES as u64;
        // SAFETY: the memory is freed after the region, which is declared before it.
        let region =
            unsafe { RegisteredRegion::register(&pd, base, len, 4096, Access::WriteTarget) };
        Self {
            qp,
            cq,
            context,
            region: region.expect("registered"),
            memory,
        }
    }

    fn address(&self) -> (QpAddress, LocalPath) {
        let gids = self.context.gids(1);
        let gid = select::choose_gid(&gids, None).expect("a GID");
        let psn = self.qp.qp_num();
        let address = QpAddress {
            gid: gid.gid,
            lid: 0,
            qp_num: self.qp.qp_num(),
            psn,
        };
        let path = LocalPath {
            port: 1,
            gid_index: gid.index,
            mtu: self.context.port(1).expect("a port").active_mtu,
            psn,
        };
        (address, path)
    }

    fn completions(&self) -> Vec<Completion> {
        let mut found = [Completion::default(); POLL_MAX];
        let count = self.cq.poll(&mut found).expect("polled");
        found[..count].to_vec()
    }
}

#[test]
fn probing_finds_what_the_devices_do_not_say() {
    for (preset, sges, inline, dmabuf) in [
        (Behaviour::erdma_compat(), 6, 96, false),
        (Behaviour::roce(), 16, 96, true),
    ] {
        assert_eq!(preset.dmabuf == DmaBuf::Supported, dmabuf);
        let fake = FakeVerbs::new(preset);
        let context = Context::open(&fake.library(), &fake.device_names()[0]).expect("opened");
        let found = probe::capabilities(&context, 1).expect("probed");
        assert_eq!(found.send_sge.value, sges, "{}", found.send_sge.reason);
        assert_eq!(found.inline_bytes.value, inline);
        assert_eq!(found.dmabuf.value, dmabuf, "{}", found.dmabuf.reason);
        assert!(found.immediate.value, "{}", found.immediate.reason);
        drop(context);
        fake.fabric().assert_clean();
    }
}

#[test]
fn a_chain_crosses_between_two_devices() {
    for preset in [Behaviour::erdma_compat(), Behaviour::roce()] {
        let fake = FakeVerbs::new(preset);
        let mut from = End::new(&fake, 0, 0x5a);
        let mut to = End::new(&fake, 1, 0);
        let ((here, here_path), (there, there_path)) = (from.address(), to.address());
        for (end, path, peer) in [(&mut from, here_path, there), (&mut to, there_path, here)] {
            end.qp.enter_init(1).expect("INIT");
            end.qp.enter_rtr(&path, &peer).expect("RTR");
            end.qp.enter_rts(&path).expect("RTS");
        }
        let inbox = to.region.piece(4096).expect("inside");
        to.qp
            .post_recv(9, inbox.address, 64, inbox.lkey)
            .expect("a receive");
        to.cq.arm(false).expect("armed");
        let source = from.region.piece(0).expect("inside");
        let target = to.region.piece(0).expect("inside");
        let sges: Vec<Sge> = (0..6)
            .map(|part| Sge {
                address: source.address + part * 64,
                bytes: 32,
                lkey: source.lkey,
            })
            .collect();
        let place = RemotePlace {
            address: target.address + 100,
            rkey: target.rkey,
        };
        let mut chain = Chain::new(4, 6, CAPS.wr_bytes_max);
        chain
            .write(1, &sges, place, Flags::default())
            .expect("room");
        let last = Flags {
            signalled: true,
            solicited: true,
        };
        chain
            .send_inline(2, b"sixteen-byte-msg", last)
            .expect("room");
        from.qp.post(&mut chain).expect("posted");
        assert_eq!(from.completions().len(), 1);
        assert_eq!(to.cq.drain_events().expect("drained"), 1);
        let got = to.completions();
        assert_eq!((got.len(), got[0].wr_id, got[0].byte_len), (1, 9, 16));
        assert_eq!(to.memory[100..292], [0x5a; 192]);
        assert_eq!(to.memory[4096..4112], *b"sixteen-byte-msg");
        fake.fabric().assert_clean();
    }
}

#[test]
fn a_refused_request_of_a_chain_is_told_by_how_many_were_taken() {
    let fake = FakeVerbs::new(Behaviour::erdma_compat());
    let mut end = End::new(&fake, 0, 1);
    let queue = fake.fabric().queues(0)[0];
    fake.fabric().fail_post(queue, 1, libc::EIO);
    let mut chain = Chain::new(4, 6, CAPS.wr_bytes_max);
    for id in 0..3 {
        chain.send_inline(id, b"x", Flags::default()).expect("room");
    }
    let error = end.qp.post(&mut chain).expect_err("injected");
    assert_eq!(error.accepted, 1);
    assert_eq!(error.source.errno(), Some(libc::EIO), "whatever its sign");
}
