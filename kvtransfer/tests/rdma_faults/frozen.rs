//! Frozen and killed peers: a network card goes on without its process, so the queue pairs must be fenced (P1, P2).

use super::{
    child::Path,
    freeze::{frozen_receiver, frozen_sender, killed},
};

#[test]
#[ignore = "needs the RDMA lab"]
fn nothing_lands_after_the_receiver_gave_up_over_siw() {
    frozen_sender(Path::Siw);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn nothing_lands_after_the_receiver_gave_up_over_rxe_compat() {
    frozen_sender(Path::RxeCompat);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn nothing_lands_after_the_receiver_gave_up_over_rxe_standard() {
    frozen_sender(Path::RxeStandard);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn no_success_with_recycled_pages_over_siw() {
    frozen_receiver(Path::Siw);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn no_success_with_recycled_pages_over_rxe_compat() {
    frozen_receiver(Path::RxeCompat);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn no_success_with_recycled_pages_over_rxe_standard() {
    frozen_receiver(Path::RxeStandard);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn a_killed_peer_is_noticed_at_once_over_siw() {
    killed(Path::Siw);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn a_killed_peer_is_noticed_at_once_over_rxe_compat() {
    killed(Path::RxeCompat);
}

#[test]
#[ignore = "needs the RDMA lab"]
fn a_killed_peer_is_noticed_at_once_over_rxe_standard() {
    killed(Path::RxeStandard);
}
