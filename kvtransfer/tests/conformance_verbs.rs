//! The conformance suite over queue pairs of fake RDMA devices with the manners of eRDMA, in both modes, and of RoCE;
//! notices as SEND and as immediate data. The real ones are in `rdma_conformance.rs`.

use kvtransfer::{
    config::{RdmaConfig, SameHost},
    conformance_cases,
    testing::{
        conformance::{EngineFabric, FakeNetwork, Path},
        fake_verbs::Behaviour,
    },
};

/// No case of the suite has more ranks.
const RANKS_MAX: usize = 3;

macro_rules! path {
    ($path:ident, $behaviour:ident, $immediate:expr) => {
        struct $path;

        impl Path for $path {
            const SAME_HOST: SameHost = SameHost::Off;
            const NAME: &'static str = "verbs";
            type Network = FakeNetwork;

            fn network() -> FakeNetwork {
                let mut network = FakeNetwork::new(&Behaviour::$behaviour(), RANKS_MAX, 1);
                network.config.immediate = $immediate;
                network
            }

            fn rdma(network: &FakeNetwork, rank: usize) -> RdmaConfig {
                network.rdma(rank)
            }
        }
    };
}

path!(ErdmaCompat, erdma_compat, false);
path!(ErdmaCompatImmediate, erdma_compat, true);
path!(ErdmaStandard, erdma_standard, false);
path!(RoceImmediate, roce, true);

conformance_cases!(erdma_compat, super::EngineFabric<super::ErdmaCompat>);
conformance_cases!(
    erdma_compat_immediate,
    super::EngineFabric<super::ErdmaCompatImmediate>
);
conformance_cases!(erdma_standard, super::EngineFabric<super::ErdmaStandard>);
conformance_cases!(roce_immediate, super::EngineFabric<super::RoceImmediate>);
