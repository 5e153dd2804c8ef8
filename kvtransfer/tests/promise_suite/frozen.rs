//! Frozen and killed peers over tcp and the same-host paths.

use super::{
    child::Path,
    freeze::{frozen_receiver, frozen_sender, killed},
};

#[test]
fn nothing_lands_after_the_receiver_gave_up_over_tcp() {
    frozen_sender(Path::Tcp);
}

#[test]
fn nothing_lands_after_the_receiver_gave_up_over_pull() {
    frozen_sender(Path::Pull);
}

#[test]
fn nothing_lands_after_the_receiver_gave_up_over_ring() {
    frozen_sender(Path::Ring);
}

#[test]
fn no_success_with_recycled_pages_over_tcp() {
    frozen_receiver(Path::Tcp);
}

#[test]
fn no_success_with_recycled_pages_over_pull() {
    frozen_receiver(Path::Pull);
}

#[test]
fn no_success_with_recycled_pages_over_ring() {
    frozen_receiver(Path::Ring);
}

#[test]
fn a_killed_peer_is_noticed_at_once_over_tcp() {
    killed(Path::Tcp);
}

#[test]
fn a_killed_peer_is_noticed_at_once_over_pull() {
    killed(Path::Pull);
}

#[test]
fn a_killed_peer_is_noticed_at_once_over_ring() {
    killed(Path::Ring);
}
