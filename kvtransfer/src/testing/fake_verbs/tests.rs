//! Every behaviour of the fabric, shown through the table of C calls as a user of the real libraries would see it.

mod connecting;
mod faults;
mod host;
mod limits;
mod safe_layer;
mod send_queue;
mod traffic;
