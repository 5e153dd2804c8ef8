//! The generated messages of Envoy's external processing and of gRPC's health checks (see `router/proto`).
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::cast_possible_truncation,
    clippy::too_many_lines,
    clippy::use_self,
    dead_code,
    elided_lifetimes_in_paths,
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code follows its generator's style; the protocol files document what is used"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/envoy.rs"));
}

pub use generated::envoy::config::core::v3 as core;
pub use generated::envoy::extensions::filters::http::ext_proc::v3::processing_mode::BodySendMode;
pub use generated::envoy::service::ext_proc::v3 as ext_proc;
pub use generated::envoy::r#type::v3::HttpStatus;
pub use generated::grpc::health::v1 as health;
