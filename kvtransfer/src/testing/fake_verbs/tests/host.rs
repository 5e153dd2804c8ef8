//! A user of the C table: opens a device, makes its objects, posts and polls by hand.
#![expect(unsafe_code, reason = "the tests call C functions")]

use std::{
    ffi::c_int,
    io, mem, ptr,
    sync::{Arc, atomic::Ordering},
};

use crate::{
    testing::fake_verbs::{FakeVerbs, QueuePairId, shared::FakeCompletions},
    transport::verbs::{library::Library, sys},
};

/// Rights of a target.
pub(super) const REMOTE: u32 = sys::IBV_ACCESS_LOCAL_WRITE | sys::IBV_ACCESS_REMOTE_WRITE;
/// Depth of the queues of these tests.
pub(super) const DEPTH: u32 = 64;

/// A program on one device. What it made is destroyed with it.
pub(super) struct Host {
    pub(super) library: Arc<Library>,
    pub(super) device: usize,
    pub(super) context: *mut sys::ibv_context,
    pub(super) pd: *mut sys::ibv_pd,
    pub(super) channel: *mut sys::ibv_comp_channel,
    pub(super) cq: *mut sys::ibv_cq,
    by_cm: bool,
    queues: Vec<*mut sys::ibv_qp>,
    regions: Vec<*mut sys::ibv_mr>,
    domains: Vec<*mut sys::ibv_pd>,
    memory: Vec<Box<[u8]>>,
}

/// Registered memory.
#[derive(Clone, Copy)]
pub(super) struct Memory {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) key: u32,
    pub(super) mr: *mut sys::ibv_mr,
}

impl Memory {
    pub(super) fn sge(&self, offset: u32, len: u32) -> sys::ibv_sge {
        sys::ibv_sge {
            addr: self.addr + u64::from(offset),
            length: len,
            lkey: self.key,
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let from = ptr::with_exposed_provenance::<u8>(usize::try_from(self.addr).unwrap());
        // SAFETY: the host that registered it owns the memory and is alive in every test that looks.
        unsafe { std::slice::from_raw_parts(from, self.len as usize) }.to_vec()
    }

    pub(super) fn fill(&self, byte: u8) {
        let to = ptr::with_exposed_provenance_mut::<u8>(usize::try_from(self.addr).unwrap());
        // SAFETY: as above; tests are single-threaded about it.
        unsafe { ptr::write_bytes(to, byte, self.len as usize) };
    }
}

pub(super) fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap()
}

pub(super) fn attributes(host: &Host) -> sys::ibv_qp_init_attr {
    sys::ibv_qp_init_attr {
        qp_context: ptr::null_mut(),
        send_cq: host.cq,
        recv_cq: host.cq,
        srq: ptr::null_mut(),
        cap: sys::ibv_qp_cap {
            max_send_wr: DEPTH,
            max_recv_wr: DEPTH,
            max_send_sge: 4,
            max_recv_sge: 1,
            max_inline_data: 32,
        },
        qp_type: sys::IBV_QPT_RC,
        sq_sig_all: 0,
    }
}

impl Host {
    /// Opens a device as `ibv_open_device` does.
    pub(super) fn new(fake: &FakeVerbs, device: usize) -> Self {
        Self::open(fake, device, false, 1024)
    }

    pub(super) fn open(fake: &FakeVerbs, device: usize, by_cm: bool, entries: c_int) -> Self {
        let library = fake.library();
        let mut count = 0;
        let context = if by_cm {
            let cm = library.cm().expect("this device has a connection manager");
            // SAFETY: the count is ours.
            let list = unsafe { (cm.rdma_get_devices)(&raw mut count) };
            // SAFETY: the array has an entry per device.
            let place = unsafe { list.add(device) };
            // SAFETY: as above.
            let context = unsafe { *place };
            // SAFETY: the list is given back once.
            unsafe { (cm.rdma_free_devices)(list) };
            context
        } else {
            // SAFETY: the count is ours.
            let list = unsafe { (library.verbs.ibv_get_device_list)(&raw mut count) };
            assert!(usize::try_from(count).unwrap() > device);
            // SAFETY: the array has so many entries.
            let place = unsafe { list.add(device) };
            // SAFETY: as above.
            let found = unsafe { *place };
            // SAFETY: the device is one of the list.
            let context = unsafe { (library.verbs.ibv_open_device)(found) };
            // SAFETY: the list is freed once.
            unsafe { (library.verbs.ibv_free_device_list)(list) };
            context
        };
        assert!(!context.is_null());
        // SAFETY: the context is open.
        let pd = unsafe { (library.verbs.ibv_alloc_pd)(context) };
        // SAFETY: the context is open.
        let channel = unsafe { (library.verbs.ibv_create_comp_channel)(context) };
        let user = ptr::null_mut();
        // SAFETY: the context and the channel are alive.
        let cq = unsafe { (library.verbs.ibv_create_cq)(context, entries, user, channel, 0) };
        assert!(!pd.is_null() && !channel.is_null() && !cq.is_null());
        Self {
            library,
            device,
            context,
            pd,
            channel,
            cq,
            by_cm,
            queues: Vec::new(),
            regions: Vec::new(),
            domains: vec![pd],
            memory: Vec::new(),
        }
    }

    pub(super) fn id(&self, qp: *mut sys::ibv_qp) -> QueuePairId {
        // SAFETY: queue pairs' structures live as long as their fabric.
        let number = unsafe { (*qp).qp_num };
        QueuePairId {
            device: self.device,
            number,
        }
    }

    /// Creates a queue pair, or the errno why not.
    pub(super) fn try_queue(
        &mut self,
        mut attr: sys::ibv_qp_init_attr,
    ) -> Result<*mut sys::ibv_qp, i32> {
        // SAFETY: the domain and the queues in `attr` are alive.
        let qp = unsafe { (self.library.verbs.ibv_create_qp)(self.pd, &raw mut attr) };
        if qp.is_null() {
            return Err(last_errno());
        }
        self.queues.push(qp);
        Ok(qp)
    }

    pub(super) fn queue(&mut self) -> *mut sys::ibv_qp {
        let attr = attributes(self);
        self.try_queue(attr).expect("a plain queue pair")
    }

    pub(super) fn destroy(&mut self, qp: *mut sys::ibv_qp) -> c_int {
        self.queues.retain(|mine| *mine != qp);
        // SAFETY: the structure is alive even if the queue pair is not.
        unsafe { (self.library.verbs.ibv_destroy_qp)(qp) }
    }

    /// Registers new memory full of `byte` in this domain, or the errno why not.
    pub(super) fn try_register(
        &mut self,
        pd: *mut sys::ibv_pd,
        len: usize,
        byte: u8,
        access: u32,
    ) -> Result<Memory, i32> {
        let mut memory = vec![byte; len].into_boxed_slice();
        let addr = memory.as_mut_ptr();
        self.memory.push(memory);
        let access = access.cast_signed();
        // SAFETY: the memory is kept until the host is dropped, after the region is deregistered.
        let mr = unsafe { (self.library.verbs.ibv_reg_mr)(pd, addr.cast(), len, access) };
        if mr.is_null() {
            return Err(last_errno());
        }
        self.regions.push(mr);
        Ok(Memory {
            addr: addr.expose_provenance() as u64,
            len: u32::try_from(len).unwrap(),
            // SAFETY: the region is alive.
            key: unsafe { (*mr).rkey },
            mr,
        })
    }

    /// Another protection domain of the same context.
    pub(super) fn second_domain(&mut self) -> *mut sys::ibv_pd {
        // SAFETY: the context is open.
        let pd = unsafe { (self.library.verbs.ibv_alloc_pd)(self.context) };
        assert!(!pd.is_null());
        self.domains.push(pd);
        pd
    }

    pub(super) fn register(&mut self, len: usize, byte: u8, access: u32) -> Memory {
        self.try_register(self.pd, len, byte, access)
            .expect("memory is registered")
    }

    pub(super) fn deregister(&mut self, memory: &Memory) {
        self.regions.retain(|mine| *mine != memory.mr);
        // SAFETY: the region was alive and is forgotten.
        let code = unsafe { (self.library.verbs.ibv_dereg_mr)(memory.mr) };
        assert_eq!(code, 0);
    }

    pub(super) fn modify(
        &self,
        qp: *mut sys::ibv_qp,
        attr: &mut sys::ibv_qp_attr,
        mask: c_int,
    ) -> c_int {
        // SAFETY: the queue pair's structure is alive, the attributes are ours.
        unsafe { (self.library.verbs.ibv_modify_qp)(qp, attr, mask) }
    }

    pub(super) fn to_state(&self, qp: *mut sys::ibv_qp, state: u32) -> c_int {
        let mut attr = blank();
        attr.qp_state = state;
        self.modify(qp, &mut attr, sys::IBV_QP_STATE)
    }

    pub(super) fn to_init(&self, qp: *mut sys::ibv_qp) -> c_int {
        let mut attr = blank();
        attr.qp_state = sys::IBV_QPS_INIT;
        attr.port_num = 1;
        let mask = sys::IBV_QP_STATE
            | sys::IBV_QP_PKEY_INDEX
            | sys::IBV_QP_PORT
            | sys::IBV_QP_ACCESS_FLAGS;
        self.modify(qp, &mut attr, mask)
    }

    /// The index and bytes of the GID that carries traffic.
    pub(super) fn gid(&self) -> (u8, sys::ibv_gid) {
        let mut gid = sys::ibv_gid { raw: [0; 16] };
        for index in 0..=255u8 {
            // SAFETY: the context is open, the place is ours.
            let code = unsafe {
                (self.library.verbs.ibv_query_gid)(
                    self.context,
                    1,
                    c_int::from(index),
                    &raw mut gid,
                )
            };
            assert_eq!(code, 0, "no mapped GID up to {index}");
            if gid.raw[10..12] == [0xff, 0xff] {
                return (index, gid);
            }
        }
        panic!("no GID");
    }

    pub(super) fn to_rtr(
        &self,
        qp: *mut sys::ibv_qp,
        peer: &Self,
        theirs: *mut sys::ibv_qp,
    ) -> c_int {
        let (_, dgid) = peer.gid();
        self.to_rtr_at(qp, dgid, self.gid().0, peer.id(theirs).number, 7)
    }

    pub(super) fn to_rtr_at(
        &self,
        qp: *mut sys::ibv_qp,
        dgid: sys::ibv_gid,
        sgid_index: u8,
        number: u32,
        min_rnr: u8,
    ) -> c_int {
        let mut attr = blank();
        attr.qp_state = sys::IBV_QPS_RTR;
        attr.dest_qp_num = number;
        attr.min_rnr_timer = min_rnr;
        attr.ah_attr.is_global = 1;
        attr.ah_attr.port_num = 1;
        attr.ah_attr.grh.dgid = dgid;
        attr.ah_attr.grh.sgid_index = sgid_index;
        let mask = sys::IBV_QP_STATE
            | sys::IBV_QP_AV
            | sys::IBV_QP_PATH_MTU
            | sys::IBV_QP_DEST_QPN
            | sys::IBV_QP_RQ_PSN
            | sys::IBV_QP_MAX_DEST_RD_ATOMIC
            | sys::IBV_QP_MIN_RNR_TIMER;
        self.modify(qp, &mut attr, mask)
    }

    pub(super) fn to_rts(&self, qp: *mut sys::ibv_qp, rnr_retry: u8) -> c_int {
        let mut attr = blank();
        attr.qp_state = sys::IBV_QPS_RTS;
        attr.rnr_retry = rnr_retry;
        let mask = sys::IBV_QP_STATE
            | sys::IBV_QP_TIMEOUT
            | sys::IBV_QP_RETRY_CNT
            | sys::IBV_QP_RNR_RETRY
            | sys::IBV_QP_SQ_PSN
            | sys::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(qp, &mut attr, mask)
    }

    /// Posts a chain; the return code and how many requests were taken.
    pub(super) fn post(&self, qp: *mut sys::ibv_qp, chain: &mut [Request]) -> (c_int, usize) {
        let mut raw: Vec<sys::ibv_send_wr> = chain.iter_mut().map(Request::raw).collect();
        for at in 1..raw.len() {
            let next = &raw mut raw[at];
            raw[at - 1].next = next;
        }
        let first = raw.as_mut_ptr();
        let mut bad = ptr::null_mut();
        // SAFETY: the chain and its lists live until the call returns; memory belongs to hosts that outlive the posts.
        let code = unsafe { sys::ibv_post_send(qp, first, &raw mut bad) };
        let taken = if code == 0 {
            raw.len()
        } else {
            (bad.addr() - first.addr()) / size_of::<sys::ibv_send_wr>()
        };
        (code, taken)
    }

    pub(super) fn post_ok(&self, qp: *mut sys::ibv_qp, chain: &mut [Request]) {
        let len = chain.len();
        assert_eq!(self.post(qp, chain), (0, len));
    }

    pub(super) fn receive(
        &self,
        qp: *mut sys::ibv_qp,
        wr_id: u64,
        mut list: Vec<sys::ibv_sge>,
    ) -> c_int {
        let mut request = sys::ibv_recv_wr {
            wr_id,
            next: ptr::null_mut(),
            sg_list: list.as_mut_ptr(),
            num_sge: c_int::try_from(list.len()).unwrap(),
        };
        let mut bad = ptr::null_mut();
        // SAFETY: the request lives until the call returns; its memory belongs to this host.
        unsafe { sys::ibv_post_recv(qp, &raw mut request, &raw mut bad) }
    }

    pub(super) fn poll(&self) -> Vec<sys::ibv_wc> {
        // SAFETY: the structure is integers, for which zero is a value.
        let mut room: [sys::ibv_wc; 64] = unsafe { mem::zeroed() };
        let mut all = Vec::new();
        loop {
            // SAFETY: the queue is alive and the array has 64 places.
            let count = unsafe { sys::ibv_poll_cq(self.cq, 64, room.as_mut_ptr()) };
            match usize::try_from(count) {
                Ok(0) => return all,
                Ok(count) => all.extend_from_slice(&room[..count]),
                Err(_) => panic!("poll_cq says {count}"),
            }
        }
    }

    /// Polls; (wr_id, status) of each completion.
    pub(super) fn outcomes(&self) -> Vec<(u64, u32)> {
        self.poll().iter().map(|wc| (wc.wr_id, wc.status)).collect()
    }

    pub(super) fn arm(&self, solicited_only: bool) {
        // SAFETY: the queue is alive.
        let code = unsafe { sys::ibv_req_notify_cq(self.cq, c_int::from(solicited_only)) };
        assert_eq!(code, 0);
    }

    pub(super) fn completion_fd(&self) -> c_int {
        // SAFETY: the channel is alive.
        unsafe { (*self.channel).fd }
    }

    /// Takes one completion event; `None` when there is none. Does not acknowledge it.
    pub(super) fn completion_event(&self) -> Option<*mut sys::ibv_cq> {
        nonblocking(self.completion_fd());
        let (mut cq, mut user) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is alive and the places are ours.
        let code = unsafe {
            (self.library.verbs.ibv_get_cq_event)(self.channel, &raw mut cq, &raw mut user)
        };
        (code == 0).then_some(cq)
    }

    pub(super) fn ack_completion_events(&self, count: u32) {
        // SAFETY: the queue is alive.
        unsafe { (self.library.verbs.ibv_ack_cq_events)(self.cq, count) };
    }

    pub(super) fn async_fd(&self) -> c_int {
        // SAFETY: the context is open.
        unsafe { (*self.context).async_fd }
    }

    /// Takes and acknowledges one asynchronous event: its type and, for queue pairs, the number.
    pub(super) fn async_event(&self) -> Option<(u32, u32)> {
        let mut event = self.unacked_async_event()?;
        let is_queue = [sys::IBV_EVENT_QP_FATAL, sys::IBV_EVENT_QP_ACCESS_ERR];
        let number = if is_queue.contains(&event.event_type) {
            // SAFETY: the type says that it is a queue pair, alive until the event is acknowledged.
            let qp = unsafe { event.element.qp };
            self.id(qp).number
        } else {
            0
        };
        // SAFETY: the event was got and is acknowledged once.
        unsafe { (self.library.verbs.ibv_ack_async_event)(&raw mut event) };
        Some((event.event_type, number))
    }

    pub(super) fn unacked_async_event(&self) -> Option<sys::ibv_async_event> {
        nonblocking(self.async_fd());
        let mut event = sys::ibv_async_event {
            element: sys::ibv_async_event_element {
                other: ptr::null_mut(),
            },
            event_type: u32::MAX,
        };
        // SAFETY: the context is open and the place is ours.
        let code =
            unsafe { (self.library.verbs.ibv_get_async_event)(self.context, &raw mut event) };
        (code == 0).then_some(event)
    }

    pub(super) fn ack_async_event(&self, mut event: sys::ibv_async_event) {
        // SAFETY: the event was got and is acknowledged once.
        unsafe { (self.library.verbs.ibv_ack_async_event)(&raw mut event) };
    }

    /// What `poll_cq` returns when it fails.
    pub(super) fn poll_code(&self) -> c_int {
        // SAFETY: the structure is integers, for which zero is a value.
        let mut room: sys::ibv_wc = unsafe { mem::zeroed() };
        // SAFETY: the queue is alive and there is one place.
        unsafe { sys::ibv_poll_cq(self.cq, 1, &raw mut room) }
    }

    /// Counts as so many more threads inside `poll_cq`.
    pub(super) fn pretend_to_poll(&self, threads: i32) {
        // SAFETY: every completion queue of a fabric is one of these.
        let pollers = unsafe { &(*self.cq.cast::<FakeCompletions>()).pollers };
        pollers.fetch_add(threads.cast_unsigned(), Ordering::AcqRel);
    }

    pub(super) fn limits(&self) -> sys::ibv_device_attr {
        // SAFETY: the structure is integers, for which zero is a value.
        let mut attr = unsafe { mem::zeroed() };
        // SAFETY: the context is open.
        let code = unsafe { (self.library.verbs.ibv_query_device)(self.context, &raw mut attr) };
        assert_eq!(code, 0);
        attr
    }

    pub(super) fn port(&self) -> sys::ibv_port_attr {
        // SAFETY: the structure is integers, for which zero is a value.
        let mut attr = unsafe { mem::zeroed() };
        // SAFETY: the context is open.
        let code = unsafe { (self.library.verbs.ibv_query_port)(self.context, 1, &raw mut attr) };
        assert_eq!(code, 0);
        attr
    }

    pub(super) fn gid_at(&self, index: u8) -> Option<[u8; 16]> {
        let mut gid = sys::ibv_gid { raw: [0; 16] };
        let index = c_int::from(index);
        // SAFETY: the context is open, the place is ours.
        let code =
            unsafe { (self.library.verbs.ibv_query_gid)(self.context, 1, index, &raw mut gid) };
        (code == 0).then_some(gid.raw)
    }

    pub(super) fn register_dmabuf(&mut self, fd: c_int) -> Result<(), i32> {
        let call = self.library.verbs.ibv_reg_dmabuf_mr.expect("in the table");
        let access = sys::IBV_ACCESS_LOCAL_WRITE.cast_signed();
        // SAFETY: the domain is alive; nothing moves through this region.
        let mr = unsafe { call(self.pd, 0, 4096, 0x10000, fd, access) };
        if mr.is_null() {
            return Err(last_errno());
        }
        self.regions.push(mr);
        Ok(())
    }

    pub(super) fn try_destroy_cq(&self) -> c_int {
        // SAFETY: the queue is in use, so this is refused.
        unsafe { (self.library.verbs.ibv_destroy_cq)(self.cq) }
    }

    pub(super) fn try_dealloc_pd(&self) -> c_int {
        // SAFETY: the domain is in use, so this is refused.
        unsafe { (self.library.verbs.ibv_dealloc_pd)(self.pd) }
    }

    pub(super) fn try_destroy_channel(&self) -> c_int {
        // SAFETY: the channel is in use, so this is refused.
        unsafe { (self.library.verbs.ibv_destroy_comp_channel)(self.channel) }
    }

    /// The size of a new completion queue, which is destroyed again, or the errno why there is none.
    pub(super) fn try_create_cq(&self, entries: c_int, vector: c_int) -> Result<c_int, i32> {
        let calls = &self.library.verbs;
        let (user, channel) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the context is open.
        let cq = unsafe { (calls.ibv_create_cq)(self.context, entries, user, channel, vector) };
        if cq.is_null() {
            return Err(last_errno());
        }
        // SAFETY: it has just been made.
        let size = unsafe { (*cq).cqe };
        // SAFETY: nothing uses it.
        let code = unsafe { (calls.ibv_destroy_cq)(cq) };
        assert_eq!(code, 0);
        Ok(size)
    }

    /// Closes the device under its objects, and opens it again so that the drop closes something.
    pub(super) fn close_and_open(&mut self) {
        // SAFETY: the device is one of an open context.
        let device = unsafe { (*self.context).device };
        // SAFETY: the context was opened once.
        let code = unsafe { (self.library.verbs.ibv_close_device)(self.context) };
        assert_eq!(code, 0);
        // SAFETY: the fabric is alive, so the device is.
        self.context = unsafe { (self.library.verbs.ibv_open_device)(device) };
        assert!(!self.context.is_null());
    }

    pub(super) fn device_path(&self) -> Vec<u8> {
        // SAFETY: the context is open.
        let device = unsafe { (*self.context).device };
        // SAFETY: an open context's device is alive.
        let path = unsafe { (*device).ibdev_path };
        path.iter().map(|&byte| byte.cast_unsigned()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for qp in self.queues.drain(..) {
            // SAFETY: the structure is alive; what is destroyed already says so.
            unsafe { (self.library.verbs.ibv_destroy_qp)(qp) };
        }
        for mr in self.regions.drain(..) {
            // SAFETY: as above.
            unsafe { (self.library.verbs.ibv_dereg_mr)(mr) };
        }
        // SAFETY: nothing uses the queue any more.
        unsafe { (self.library.verbs.ibv_destroy_cq)(self.cq) };
        // SAFETY: nothing uses the channel any more.
        unsafe { (self.library.verbs.ibv_destroy_comp_channel)(self.channel) };
        for pd in self.domains.drain(..) {
            // SAFETY: nothing uses the domain any more.
            unsafe { (self.library.verbs.ibv_dealloc_pd)(pd) };
        }
        if !self.by_cm {
            // SAFETY: the context was opened once and is closed once.
            unsafe { (self.library.verbs.ibv_close_device)(self.context) };
        }
    }
}

pub(super) fn blank() -> sys::ibv_qp_attr {
    // SAFETY: the structure is integers, for which zero is a value.
    unsafe { mem::zeroed() }
}

pub(super) fn nonblocking(fd: c_int) {
    // SAFETY: the descriptor is open as long as the host that asks.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let flags = rustix::fs::fcntl_getfl(fd).unwrap();
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
}

/// Whether `poll(2)` finds a descriptor readable now.
pub(super) fn is_readable(fd: c_int) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    // SAFETY: the descriptor is open as long as the host that asks.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
}

/// A send work request before it has a C structure.
pub(super) struct Request {
    wr_id: u64,
    opcode: u32,
    flags: u32,
    imm: u32,
    remote: (u64, u32),
    list: Vec<sys::ibv_sge>,
}

impl Request {
    fn new(wr_id: u64, opcode: u32, list: Vec<sys::ibv_sge>, remote: (u64, u32)) -> Self {
        Self {
            wr_id,
            opcode,
            flags: 0,
            imm: 0,
            remote,
            list,
        }
    }

    pub(super) fn write(wr_id: u64, list: Vec<sys::ibv_sge>, addr: u64, key: u32) -> Self {
        Self::new(wr_id, sys::IBV_WR_RDMA_WRITE, list, (addr, key))
    }

    pub(super) fn send(wr_id: u64, list: Vec<sys::ibv_sge>) -> Self {
        Self::new(wr_id, sys::IBV_WR_SEND, list, (0, 0))
    }

    pub(super) fn read(wr_id: u64, list: Vec<sys::ibv_sge>, addr: u64, key: u32) -> Self {
        Self::new(wr_id, sys::IBV_WR_RDMA_READ, list, (addr, key))
    }

    pub(super) fn write_imm(
        wr_id: u64,
        list: Vec<sys::ibv_sge>,
        (addr, key): (u64, u32),
        imm: u32,
    ) -> Self {
        let opcode = sys::IBV_WR_RDMA_WRITE_WITH_IMM;
        let mut request = Self::new(wr_id, opcode, list, (addr, key));
        request.imm = imm;
        request
    }

    pub(super) fn signalled(mut self) -> Self {
        self.flags |= sys::IBV_SEND_SIGNALED;
        self
    }

    pub(super) fn inline(mut self) -> Self {
        self.flags |= sys::IBV_SEND_INLINE;
        self
    }

    pub(super) fn solicited(mut self) -> Self {
        self.flags |= sys::IBV_SEND_SOLICITED;
        self
    }

    fn raw(&mut self) -> sys::ibv_send_wr {
        // SAFETY: the structure is integers and pointers, for which zero is a value.
        let mut raw: sys::ibv_send_wr = unsafe { mem::zeroed() };
        raw.wr_id = self.wr_id;
        raw.sg_list = if self.list.is_empty() {
            ptr::null_mut()
        } else {
            self.list.as_mut_ptr()
        };
        raw.num_sge = c_int::try_from(self.list.len()).unwrap();
        raw.opcode = self.opcode;
        raw.send_flags = self.flags;
        raw.imm_data = self.imm;
        raw.wr = sys::ibv_send_wr_target {
            rdma: sys::ibv_send_wr_rdma {
                remote_addr: self.remote.0,
                rkey: self.remote.1,
            },
        };
        raw
    }
}

/// Two hosts with a connected queue pair each.
pub(super) struct Pair {
    pub(super) a: Host,
    pub(super) b: Host,
    pub(super) qa: *mut sys::ibv_qp,
    pub(super) qb: *mut sys::ibv_qp,
}

impl Pair {
    /// Connects device 0 and device 1 out of band.
    pub(super) fn new(fake: &FakeVerbs) -> Self {
        Self::with_entries(fake, 1024)
    }

    pub(super) fn with_entries(fake: &FakeVerbs, entries: c_int) -> Self {
        let mut a = Host::open(fake, 0, false, entries);
        let mut b = Host::open(fake, 1, false, entries);
        let (qa, qb) = (a.queue(), b.queue());
        Self::join(&a, qa, &b, qb);
        Self { a, b, qa, qb }
    }

    pub(super) fn join(a: &Host, qa: *mut sys::ibv_qp, b: &Host, qb: *mut sys::ibv_qp) {
        assert_eq!((a.to_init(qa), b.to_init(qb)), (0, 0));
        assert_eq!((a.to_rtr(qa, b, qb), b.to_rtr(qb, a, qa)), (0, 0));
        assert_eq!((a.to_rts(qa, 7), b.to_rts(qb, 7)), (0, 0));
    }
}
