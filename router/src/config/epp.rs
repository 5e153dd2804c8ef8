//! The settings of the Envoy picker and their part of the command line.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{ConfigError, TlsFiles};

/// Default of [`EppConfig::port`], the one that the Gateway API's examples use.
pub const GRPC_PORT_DEFAULT: u16 = 9002;

/// Most endpoints named beside the chosen one.
pub const FALLBACKS_MAX: usize = 16;

/// How the picker is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GrpcTls {
    /// Plain HTTP/2.
    #[default]
    Off,
    /// A certificate made at the start, which nobody can check: what gateways expect that do not check either.
    SelfSigned,
    /// These files.
    Files(TlsFiles),
}

/// What the Envoy picker can be told.
#[derive(Clone, Debug)]
pub struct EppConfig {
    /// Address to listen on, default `0.0.0.0`.
    pub host: String,
    /// Port to listen on, default 9002; 0 picks a free one.
    pub port: u16,
    /// Default plain.
    pub tls: GrpcTls,
    /// Further decode workers named behind the chosen one, default 0. Only for gateways that take a list and try the next
    /// one when a connection fails; an `ORIGINAL_DST` cluster takes one endpoint alone.
    pub fallbacks: usize,
    /// Where requests go that one upstream request cannot serve: this router's own front, as Envoy reaches it. Default
    /// nowhere; they get 501.
    pub front_endpoint: Option<SocketAddr>,
    /// Obey `test-epp-endpoint-selection` and tell `x-conformance-test-served-endpoint`, for the conformance tests of the
    /// Gateway API. Default no: any client could choose its worker.
    pub conformance: bool,
}

impl Default for EppConfig {
    fn default() -> Self {
        Self {
            host: "0.0.0.0".to_owned(),
            port: GRPC_PORT_DEFAULT,
            tls: GrpcTls::Off,
            fallbacks: 0,
            front_endpoint: None,
            conformance: false,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum GrpcTlsKind {
    #[default]
    Off,
    SelfSigned,
}

/// Options of `kvrouter epp`.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Envoy external processing (kvrouter epp)")]
pub struct EppArguments {
    /// Address of the gRPC listener.
    #[arg(long, value_name = "HOST", default_value = "0.0.0.0")]
    grpc_host: String,
    /// Port of the gRPC listener; 0 picks a free one.
    #[arg(long, value_name = "PORT", default_value_t = GRPC_PORT_DEFAULT)]
    grpc_port: u16,
    /// Serve TLS with a certificate made at the start.
    #[arg(long, value_enum, default_value_t)]
    grpc_tls: GrpcTlsKind,
    /// Serve TLS with this certificate chain (PEM).
    #[arg(long, value_name = "FILE")]
    grpc_tls_certificate: Option<PathBuf>,
    /// The private key of the certificate (PEM).
    #[arg(long, value_name = "FILE")]
    grpc_tls_key: Option<PathBuf>,
    /// Name so many further decode workers, to be tried when a connection to the chosen one fails.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    fallback_endpoints: usize,
    /// Where Envoy reaches this router's own front, for requests that need more than one upstream request (n > 1).
    #[arg(long, value_name = "IP:PORT")]
    front_endpoint: Option<SocketAddr>,
    /// Behave as the Gateway API's conformance tests ask for: clients may choose their worker.
    #[arg(long)]
    conformance: bool,
}

impl EppArguments {
    /// The settings.
    ///
    /// # Errors
    /// [`ConfigError`] when they contradict each other.
    pub fn into_config(self) -> Result<EppConfig, ConfigError> {
        let files = match (self.grpc_tls_certificate, self.grpc_tls_key) {
            (Some(certificates), Some(key)) => Some(TlsFiles { certificates, key }),
            (None, None) => None,
            _ => return Err(ConfigError::HalfGrpcTls),
        };
        if self.fallback_endpoints > FALLBACKS_MAX {
            return Err(ConfigError::Fallbacks);
        }
        Ok(EppConfig {
            host: self.grpc_host,
            port: self.grpc_port,
            tls: match (files, self.grpc_tls) {
                (Some(files), _) => GrpcTls::Files(files),
                (None, GrpcTlsKind::SelfSigned) => GrpcTls::SelfSigned,
                (None, GrpcTlsKind::Off) => GrpcTls::Off,
            },
            fallbacks: self.fallback_endpoints,
            front_endpoint: self.front_endpoint,
            conformance: self.conformance,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{CommandLine, Config};

    use super::*;

    fn parse(options: &str) -> Result<Config, String> {
        let line = format!("kvrouter {options} --prefill http://a:1 8998 --decode http://b:2");
        CommandLine::from_args(line.split_whitespace())
            .map(|line| line.config)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn only_the_subcommand_serves_envoy() {
        assert!(parse("").unwrap().epp.is_none());
        assert!(parse("--grpc-port 1").unwrap().epp.is_none());
        let config = parse("epp").unwrap().epp.unwrap();
        assert_eq!((config.port, config.tls), (9002, GrpcTls::Off));
        let config = parse(
            "epp --grpc-tls self-signed --front-endpoint 10.0.0.9:8080 --fallback-endpoints 2",
        );
        let config = config.unwrap().epp.unwrap();
        assert_eq!((config.tls, config.fallbacks), (GrpcTls::SelfSigned, 2));
        assert_eq!(config.front_endpoint, Some(([10, 0, 0, 9], 8080).into()));
    }

    #[test]
    fn mistakes_are_explained() {
        for (options, part) in [
            ("epp --grpc-tls-key k.pem", "belong together"),
            ("epp --fallback-endpoints 17", "16 at most"),
            ("epp --front-endpoint name:1", "--front-endpoint"),
        ] {
            let error = parse(options).unwrap_err();
            assert!(error.contains(part), "{options}: {error}");
        }
    }
}
