//! The C ABI of kvtransfer: `libkvtransfer.so`, with `include/kvtransfer.h` as its documentation.
//!
//! Every exported function runs inside [`guard`], which turns NULL arguments, errors and panics into status codes.
//! Opaque handles ([`handle`]) each stand for one Rust value with one owner. Numbers from C stay integers until they are
//! checked; structs from C are copied before anything is done with them.
#![expect(
    non_camel_case_types,
    reason = "the types have their C names, from which the header is made"
)]

pub mod argument;
pub mod bootstrap;
pub mod doctor;
pub mod engine;
mod guard;
mod handle;
pub mod layout;
pub mod log;
pub mod memory;
pub mod peer;
mod picture;
mod records;
mod regions;
mod settings;
#[cfg(test)]
mod shape;
pub mod status;
pub mod transfer;
pub mod version;
