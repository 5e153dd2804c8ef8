//! Envoy's external processing: an endpoint picker for pairs.
//!
//! Envoy carries the client's request to the decode worker and its answer back; the picker puts the bootstrap fields into
//! the body, names the decode worker, sends prefill's request itself and cancels it when Envoy ends the stream or decode
//! refuses. What the workers see is what the router's own front would send: the same code chooses, edits and watches.
//!
//! * `protocol`, `message`: Envoy's messages, and what they say.
//! * `exchange`: one request as a state machine, without sockets.
//! * `decide`: where a request goes, and as what; `choice`: which workers may serve it.
//! * `session`: one stream: the state machine, the decision and the prefill leg together.
//! * `serve`, `health`: the gRPC server.
//! * `counters`: what operators see.
pub mod choice;
pub mod counters;
pub mod decide;
pub mod exchange;
pub mod health;
pub mod message;
pub mod protocol;
pub mod serve;
pub mod session;
