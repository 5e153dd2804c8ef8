//! How replicas find each other.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Args;
use kvtransfer::token::BearerToken;

use super::{ConfigError, TlsFiles};

/// What is told to other replicas, and where they are.
#[derive(Clone, Debug, Default)]
pub struct Gossip {
    /// The port on which other replicas are told of this one's bookings; 0 picks a free one. Default none: nobody is told.
    pub port: Option<u16>,
    /// Replicas that are followed, as `host:port`.
    pub peers: Vec<String>,
    /// A name and port whose addresses are replicas, this one among them perhaps: a headless Service.
    pub dns: Option<String>,
    /// Asked of followers and shown to those that are followed.
    pub token: Option<BearerToken>,
    /// How replicas know each other. Default none: they speak plain text.
    pub tls: Option<MutualTls>,
}

/// Certificates on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MutualTls {
    /// This side's certificate and key.
    pub files: TlsFiles,
    /// PEM file with the authorities that sign the other side's.
    pub authorities: PathBuf,
}

impl Gossip {
    /// Whether anybody is to be followed.
    pub fn follows(&self) -> bool {
        !self.peers.is_empty() || self.dns.is_some()
    }
}

/// The gossip options.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Several replicas")]
pub struct GossipArguments {
    /// Tell other replicas of this one's requests on this port [default: nobody is told].
    #[arg(long, value_name = "PORT")]
    gossip_port: Option<u16>,
    /// Another replica's gossip port; repeat for more.
    #[arg(long, value_name = "HOST:PORT")]
    gossip_peer: Vec<String>,
    /// A name that resolves to all replicas, such as a headless Service, and their gossip port.
    #[arg(long, value_name = "NAME:PORT")]
    gossip_dns: Option<String>,
    /// Bearer token that replicas show each other.
    #[arg(long, env = "KVROUTER_GOSSIP_TOKEN", hide_env_values = true)]
    gossip_token: Option<String>,
    /// Speak TLS among replicas, with this certificate chain (PEM) in both directions. It must carry the names by which the
    /// others are told of this one [default: plain text].
    #[arg(long, value_name = "FILE")]
    gossip_certificate: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE")]
    gossip_key: Option<PathBuf>,
    /// Who signs the certificates of replicas (PEM). Others are neither told nor followed.
    #[arg(long, value_name = "FILE")]
    gossip_authorities: Option<PathBuf>,
}

impl TryFrom<GossipArguments> for Gossip {
    type Error = ConfigError;

    fn try_from(arguments: GossipArguments) -> Result<Self, ConfigError> {
        let names = arguments.gossip_peer.iter().chain(&arguments.gossip_dns);
        for name in names {
            let port = name.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
            if !matches!(port, Some(Ok(1..))) {
                return Err(ConfigError::GossipPeer { text: name.clone() });
            }
        }
        let token = arguments.gossip_token.map(BearerToken::new).transpose();
        let files = (
            arguments.gossip_certificate,
            arguments.gossip_key,
            arguments.gossip_authorities,
        );
        let tls = match files {
            (Some(certificates), Some(key), Some(authorities)) => Some(MutualTls {
                files: TlsFiles { certificates, key },
                authorities,
            }),
            (None, None, None) => None,
            // One source of settings may have a part of them.
            _ => return Err(ConfigError::HalfGossipTls),
        };
        Ok(Self {
            tls,
            port: arguments.gossip_port,
            peers: arguments.gossip_peer,
            dns: arguments.gossip_dns,
            token: token.map_err(|_| ConfigError::GossipToken)?,
        })
    }
}
