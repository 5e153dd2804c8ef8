//! What a host offers for RDMA, what is wrong with it, and how to put it right.
//!
//! [`collect`] looks (files of sysfs and procfs, the libraries, the devices), [`rails`] and [`gpus`] judge single devices
//! and (device, GPU) pairs, [`findings`] turns all that was seen into sentences with a fix each, and [`report`] prints
//! them for people or as JSON. Everything but [`collect`] is a function of plain [`facts`], so that a report sent by an
//! operator can be judged again elsewhere.

pub mod collect;
pub mod engine;
pub mod exchange;
pub mod facts;
pub mod findings;
pub mod gpus;
pub mod rails;
pub mod report;
pub mod steps;
mod trial;
