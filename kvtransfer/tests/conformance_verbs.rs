//! The conformance suite over queue pairs of fake RDMA devices with the manners of eRDMA, in both modes, and of RoCE;
//! notices as SEND and as immediate data, pieces written to their pages and packed. The real ones are in `rdma_conformance.rs`.

use kvtransfer::{
    config::{RdmaConfig, SameHost},
    conformance_cases,
    testing::{
        conformance::{EngineFabric, FakeNetwork, PACKED_STAGING_BYTES, Path},
        fake_verbs::Behaviour,
    },
};

/// No case of the suite has more ranks.
const RANKS_MAX: usize = 3;

macro_rules! path {
    ($path:ident, $behaviour:ident, $immediate:expr) => {
        path!($path, $behaviour, $immediate, std::convert::identity);
    };
    ($path:ident, $behaviour:ident, $immediate:expr, $finish:expr) => {
        struct $path;

        impl Path for $path {
            const SAME_HOST: SameHost = SameHost::Off;
            const NAME: &'static str = "verbs";
            type Network = FakeNetwork;
            const STAGING_BYTES: u64 = PACKED_STAGING_BYTES;

            fn network() -> FakeNetwork {
                let mut network = FakeNetwork::new(&Behaviour::$behaviour(), RANKS_MAX, 1);
                network.config.immediate = $immediate;
                $finish(network)
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
path!(PackedCompat, erdma_compat, false, FakeNetwork::packed);
path!(
    PackedStandardImmediate,
    erdma_standard,
    true,
    FakeNetwork::packed
);
path!(SmallPacked, erdma_compat, false, |network: FakeNetwork| {
    let mut network = network.packed();
    network.config.pack_below = RdmaConfig::default().pack_below;
    network
});
path!(PackedRoce, roce, false, FakeNetwork::packed);

conformance_cases!(erdma_compat, super::EngineFabric<super::ErdmaCompat>);
conformance_cases!(
    erdma_compat_immediate,
    super::EngineFabric<super::ErdmaCompatImmediate>
);
conformance_cases!(erdma_standard, super::EngineFabric<super::ErdmaStandard>);
conformance_cases!(roce_immediate, super::EngineFabric<super::RoceImmediate>);
conformance_cases!(packed_compat, super::EngineFabric<super::PackedCompat>);
conformance_cases!(
    packed_standard_immediate,
    super::EngineFabric<super::PackedStandardImmediate>
);
conformance_cases!(small_packed, super::EngineFabric<super::SmallPacked>);
conformance_cases!(packed_roce, super::EngineFabric<super::PackedRoce>);
