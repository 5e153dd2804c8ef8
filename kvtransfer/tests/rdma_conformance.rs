//! The conformance suite over queue pairs of real kernel verbs: Soft-iWARP and Soft-RoCE, both connectors, notices as SEND and
//! as immediate data, pieces written to their pages and packed. It needs the devices of the RDMA lab: `cargo rdma-test`.

use kvtransfer::{
    config::{RdmaConfig, RdmaUse, SameHost},
    conformance_cases,
    testing::conformance::{EngineFabric, PACKED_STAGING_BYTES, Path},
    wire::rdma::Connector,
};

/// Ranks take the two devices of a kind in turn.
fn rdma(rank: usize, devices: [&str; 2], connector: Connector, immediate: bool) -> RdmaConfig {
    let mut config = RdmaConfig::default();
    config.usage = RdmaUse::Required;
    config.devices = devices[rank % 2].to_owned();
    config.connector = Some(connector);
    config.immediate = immediate;
    config.queue_pairs = 2;
    config.batch_bytes = 64 << 10;
    config.pack_below = 0;
    config
}

/// The same with every batch packed.
fn packed(mut config: RdmaConfig) -> RdmaConfig {
    config.pack_below = u64::MAX;
    config.landing_bytes = 128 << 10;
    config
}

macro_rules! path {
    ($path:ident, $devices:expr, $connector:ident, $immediate:expr) => {
        path!(
            $path,
            $devices,
            $connector,
            $immediate,
            std::convert::identity
        );
    };
    ($path:ident, $devices:expr, $connector:ident, $immediate:expr, $finish:expr) => {
        struct $path;

        impl Path for $path {
            const SAME_HOST: SameHost = SameHost::Off;
            const NAME: &'static str = "verbs";
            const STAGING_BYTES: u64 = PACKED_STAGING_BYTES;

            type Network = ();
            fn network() {}

            fn rdma((): &(), rank: usize) -> RdmaConfig {
                $finish(rdma(rank, $devices, Connector::$connector, $immediate))
            }
        }
    };
}

path!(SiwStandard, ["siw0", "siw1"], Standard, false);
path!(RxeCompat, ["rxe0", "rxe1"], Compat, false);
path!(RxeCompatImmediate, ["rxe0", "rxe1"], Compat, true);
path!(RxeStandard, ["rxe0", "rxe1"], Standard, false);
path!(RxeStandardImmediate, ["rxe0", "rxe1"], Standard, true);
path!(SiwPacked, ["siw0", "siw1"], Standard, false, packed);
path!(RxePacked, ["rxe0", "rxe1"], Compat, false, packed);

conformance_cases!(
    #[ignore = "needs the RDMA lab"]
    siw_standard,
    super::EngineFabric<super::SiwStandard>
);
conformance_cases!(
    #[ignore = "needs the RDMA lab"]
    rxe_compat,
    super::EngineFabric<super::RxeCompat>
);
conformance_cases!(
    #[ignore = "needs the RDMA lab"]
    rxe_compat_immediate,
    super::EngineFabric<super::RxeCompatImmediate>
);
conformance_cases!(
    #[ignore = "needs the RDMA lab"]
    rxe_standard,
    super::EngineFabric<super::RxeStandard>
);
conformance_cases!(
    #[ignore = "needs the RDMA lab"]
    rxe_standard_immediate,
    super::EngineFabric<super::RxeStandardImmediate>
);
conformance_cases!(
    #[ignore = "needs the RDMA lab"]
    siw_packed,
    super::EngineFabric<super::SiwPacked>
);
conformance_cases!(
    #[ignore = "needs the RDMA lab"]
    rxe_packed,
    super::EngineFabric<super::RxePacked>
);
