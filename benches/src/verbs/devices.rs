//! Which two devices are measured, and how they connect.
#![forbid(unsafe_code)]

use anyhow::{Context as _, bail, ensure};
use kvtransfer::doctor::{
    collect::{Host, collect},
    rails::{Rail, rails},
};

/// The device that sends, the one that receives, and how they connect.
#[derive(Clone, Debug)]
pub(crate) struct Ends {
    pub(crate) from: Rail,
    pub(crate) to: Rail,
    /// Through `rdma_cm`; else out of band.
    pub(crate) is_standard: bool,
}

impl Ends {
    /// `names` is empty, one device (which then talks to itself), or the sender's and the receiver's with a comma.
    pub(crate) fn find(names: &str, connector: Option<&str>) -> anyhow::Result<Self> {
        let known = rails(&collect(&Host::this()));
        let (from, to) = choose(&known, names)?;
        let is_standard = match connector {
            Some("standard") => true,
            Some(_) => false,
            None => from.mode.needs_cm(),
        };
        Ok(Self {
            from: from.clone(),
            to: to.clone(),
            is_standard,
        })
    }

    pub(crate) fn connector(&self) -> &'static str {
        if self.is_standard {
            "standard"
        } else {
            "compat"
        }
    }
}

fn choose<'a>(known: &'a [Rail], names: &str) -> anyhow::Result<(&'a Rail, &'a Rail)> {
    let named = |name: &str| {
        let found = known.iter().find(|rail| rail.device == name);
        let rail = found.with_context(|| format!("there is no RDMA device {name}"))?;
        let refused: Vec<&str> = rail.refused.iter().map(|r| r.what.as_str()).collect();
        ensure!(rail.is_usable(), "{name}: {}", refused.join("; "));
        Ok(rail)
    };
    let names: Vec<&str> = names.split(',').map(str::trim).collect();
    match names[..] {
        [""] => {
            let mut usable = known.iter().filter(|rail| rail.is_usable());
            let from = usable.next();
            let from = from.context("no RDMA device is usable; `kvtransfer doctor` says why")?;
            let to = usable.find(|rail| rail.mode.wire() == from.mode.wire());
            Ok((from, to.unwrap_or(from)))
        }
        [one] => Ok((named(one)?, named(one)?)),
        [from, to] => {
            let (from, to) = (named(from)?, named(to)?);
            ensure!(
                from.mode.wire() == to.mode.wire(),
                "{} and {} cannot talk to each other",
                from.device,
                to.device
            );
            Ok((from, to))
        }
        _ => bail!("one device or two, with a comma between them"),
    }
}
