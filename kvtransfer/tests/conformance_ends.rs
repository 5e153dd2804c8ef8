//! The ways in which an application of the real engine learns of an end: queue with descriptor, future, callback.
//! P2: each of them tells, on both sides, of success and of failure.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    task::{Context, Poll, Wake, Waker},
};

use kvtransfer::{
    engine::{CompletionQueue, Transfer},
    testing::{
        conformance::{Bench, Deal, EngineFabric, Fabric, SOON, TcpPath},
        model::Model,
    },
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

type Tcp = Bench<EngineFabric<TcpPath>>;

fn is_readable(queue: &CompletionQueue, wait: bool) -> bool {
    let fd = queue.fd().unwrap();
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: if wait { 10 } else { 0 },
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&timeout)).unwrap() == 1
}

/// Opens both sides of a room and pushes it whole.
fn whole_room(bench: &mut Tcp, number: u64) -> (Transfer, Transfer) {
    let deal = Deal::new(&Model::default(), number, &[4]);
    let receive = bench.receive(&deal);
    let send = bench.send(number);
    bench.fabric.wait_ready(&send).unwrap();
    bench.fabric.push(&send, &deal.pushes()[0]).unwrap();
    (send, receive)
}

#[test]
fn the_completion_queue_is_readable_while_it_holds_something() {
    let mut bench = Tcp::duo(&Model::default());
    let queue = bench.fabric.engine(1).completions();
    assert!(!is_readable(&queue, false));
    let (_send, receive) = whole_room(&mut bench, 1);
    assert!(is_readable(&queue, true));
    assert_eq!(queue.drain(), [receive.id()]);
    assert!(!is_readable(&queue, false));
    let cancelled = bench.receive(&Deal::new(&Model::default(), 2, &[4]));
    cancelled.cancel();
    assert!(
        is_readable(&queue, false),
        "cancel returns after the end is published"
    );
    assert_eq!(queue.drain(), [cancelled.id()]);
    assert_eq!(queue.lost(), 0);
}

struct Bell(SyncSender<()>);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        let _ = self.0.try_send(());
    }
}

fn bell() -> (Waker, Receiver<()>) {
    let (sender, rung) = sync_channel(16);
    (Waker::from(Arc::new(Bell(sender))), rung)
}

#[test]
fn the_future_wakes_its_task_once_it_is_over() {
    let mut bench = Tcp::duo(&Model::default());
    let deal = Deal::new(&Model::default(), 3, &[4]);
    let receive = bench.receive(&deal);
    let (waker, rung) = bell();
    let mut context = Context::from_waker(&waker);
    let mut ended = receive.ended();
    assert!(Pin::new(&mut ended).poll(&mut context).is_pending());
    let send = bench.send(3);
    bench.fabric.wait_ready(&send).unwrap();
    bench.fabric.push(&send, &deal.pushes()[0]).unwrap();
    rung.recv_timeout(SOON).unwrap();
    let Poll::Ready(result) = Pin::new(&mut ended).poll(&mut context) else {
        panic!("woken without cause");
    };
    assert_eq!(Some(result), receive.result());
    assert!(receive.result().unwrap().is_ok());
}

#[test]
fn the_callback_comes_once_with_the_result_and_may_use_the_engine() {
    let mut bench = Tcp::duo(&Model::default());
    let deal = Deal::new(&Model::default(), 4, &[4]);
    let receive = bench.receive(&deal);
    let (sender, told) = sync_channel(16);
    receive.on_end(move |result| sender.send(result.clone()).unwrap());
    let send = bench.send(4);
    let seen = Arc::new(Mutex::new(None));
    let note = Arc::clone(&seen);
    bench.fabric.cancel(&send);
    // The end has come: the callback runs at once.
    send.on_end(move |result| *note.lock().unwrap() = Some(result.clone()));
    assert_eq!(*seen.lock().unwrap(), send.result());
    let result = told.recv_timeout(SOON).unwrap();
    assert!(result.is_err(), "the sender gave up");
    assert!(told.try_recv().is_err(), "told twice");
}
