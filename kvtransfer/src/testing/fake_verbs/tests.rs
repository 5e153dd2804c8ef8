//! Every behaviour of the fabric, shown through the table of C calls as a user of the real libraries would see it.

mod host;

mod traffic;
