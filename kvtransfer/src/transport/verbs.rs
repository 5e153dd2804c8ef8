//! RDMA verbs: eRDMA in both modes, RoCE, InfiniBand and iWARP, through whatever `libibverbs.so.1` the host has.
//!
//! `sys` declares what the libraries' headers declare, `library` opens them at run time, and the other modules own one
//! verbs object each. Nothing here is linked: the same binary starts on a host without RDMA and says what is missing.
#![expect(
    dead_code,
    reason = "registering GPU memory waits for the rails; some accessors are for tests only"
)]

pub(crate) mod chain;
pub(crate) mod cm;
pub(crate) mod context;
pub(crate) mod cq;
pub(crate) mod device;
pub(crate) mod error;
pub(crate) mod events;
pub(crate) mod library;
pub(crate) mod mr;
pub(crate) mod pd;
pub(crate) mod probe;
pub(crate) mod qp;
pub(crate) mod select;
pub(crate) mod slots;
pub(crate) mod sys;

#[cfg(test)]
mod tests;
