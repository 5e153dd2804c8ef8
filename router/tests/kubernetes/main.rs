//! A cluster that exists only as a scripted API server, the real client in front of it, and the files in `deploy/`.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test binary"
)]

mod api;
#[allow(
    dead_code,
    reason = "written for the front's tests, which use all of it"
)]
#[path = "../front/fakes.rs"]
mod fakes;

mod cluster;
mod deploy;
mod documents;
mod files;
mod schema;
mod seed;
mod status;
