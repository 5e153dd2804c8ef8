//! `kvrouter simulate`: replays a trace against a fleet that exists only as arithmetic, with the router's own policies.
//!
//! * [`scenario`]: the fleet, as a TOML file says.
//! * [`trace`]: arrivals, from a file of the Mooncake format or made up.
//! * [`world`]: the events: queues, wires, decodes, samples, replicas. The boards in it are the router's.
//! * [`outcome`]: what came out, as numbers; [`plot`]: as a picture.
//! * [`command`]: the command line; alone here it touches files and terminals.
pub mod command;
pub mod outcome;
pub mod plot;
pub mod scenario;
pub mod trace;
pub mod world;
