//! The report: JSON for programs, a table and sentences for people.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::facts::{Facts, Probed};
use super::findings::{Finding, Level, PeerPath, Side, Wanted, compare, examine, worst};
use super::gpus::{Verdict, verdicts};
use super::rails::{Rail, rails};
use super::steps::{Done, Figure, Outcome};
use crate::transport::verbs::select::IbDevice;

/// Devices that SGLang's `ib_device` setting names: names with commas, or a JSON map from GPU to names (then those of
/// all GPUs). `None`: it names none, so that every usable device serves.
///
/// # Errors
/// Why the setting cannot be read.
pub fn devices_of(setting: &str) -> Result<Option<Vec<String>>, String> {
    match IbDevice::parse(setting).map_err(|error| error.to_string())? {
        IbDevice::Any => Ok(None),
        IbDevice::Same(names) => Ok(Some(names)),
        IbDevice::PerGpu(map) => {
            let names: BTreeSet<_> = map.into_values().flatten().collect();
            Ok(Some(names.into_iter().collect()))
        }
    }
}

/// Whether an `ib_device` setting is the path of a file that holds the map.
pub fn is_device_file(setting: &str) -> bool {
    IbDevice::is_file(setting)
}

/// Version of the report's JSON; raised when a field changes its meaning.
pub const FORMAT: u32 = 1;

/// What the doctor says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// What was seen.
    pub facts: Facts,
    /// What would be done with each device.
    pub rails: Vec<Rail>,
    /// What to expect of each (device, GPU) pair.
    pub gpus: Vec<Verdict>,
    /// What is right and wrong.
    pub findings: Vec<Finding>,
    /// The other host, if one was asked for.
    pub peer: Option<PeerReport>,
}

/// What was found out about a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Its address as it was given.
    pub address: String,
    /// What it saw on its host.
    pub facts: Facts,
    /// The path that would be used.
    pub path: PeerPath,
    /// Checks over that path.
    pub steps: Vec<Done>,
}

impl Report {
    /// Judges what was seen on this host.
    pub fn of(facts: Facts, wanted: Wanted<'_>) -> Self {
        let rails = rails(&facts);
        let gpus = verdicts(&facts);
        let findings = examine(&facts, &rails, &gpus, wanted);
        Self {
            format: FORMAT,
            facts,
            rails,
            gpus,
            findings,
            peer: None,
        }
    }

    /// Adds the peer: compares both hosts, then runs `steps` over the path that results.
    pub fn add_peer(
        &mut self,
        address: &str,
        facts: Facts,
        wanted: Wanted<'_>,
        steps: impl FnOnce(&PeerPath, &[Rail]) -> Vec<Done>,
    ) {
        let theirs = rails(&facts);
        let is_wanted = |rail: &&Rail| wanted.is_none_or(|wanted| wanted.contains(&rail.device));
        let ours: Vec<_> = self.rails.iter().filter(is_wanted).cloned().collect();
        let local = Side {
            facts: &self.facts,
            rails: &ours,
        };
        let remote = Side {
            facts: &facts,
            rails: &theirs,
        };
        let (path, found) = compare(local, remote);
        self.findings.extend(found);
        let steps = steps(&path, &ours);
        self.findings
            .extend(steps.iter().filter_map(Finding::of_step));
        self.peer = Some(PeerReport {
            address: address.to_owned(),
            facts,
            path,
            steps,
        });
    }

    /// Whether something does not work.
    pub fn has_failed(&self) -> bool {
        worst(&self.findings) == Level::Fail
    }

    /// The report as JSON, indented.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self)
            .expect("invariant: a report is plain data with text keys")
    }

    /// The report for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        self.head(&mut out);
        self.rail_table(&mut out);
        self.limit_table(&mut out);
        self.gpu_table(&mut out);
        self.peer_table(&mut out);
        self.sentences(&mut out);
        self.verdict(&mut out);
        out
    }

    fn head(&self, out: &mut String) {
        let facts = &self.facts;
        let place = match (&facts.container.hint, facts.container.kubernetes) {
            (_, true) => ", in a Kubernetes pod",
            (Some(_), false) => ", in a container",
            (None, false) => "",
        };
        line(
            out,
            &format!(
                "kvtransfer {} on {}, kernel {}{place}",
                or_dash(&facts.program),
                or_dash(&facts.hostname),
                or_dash(&facts.kernel)
            ),
        );
    }

    fn rail_table(&self, out: &mut String) {
        if self.rails.is_empty() {
            return;
        }
        let head = [
            "DEVICE", "MODE", "PORT", "NETDEV", "MTU", "GID", "DRIVER", "FIRMWARE", "NUMA", "PCI",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for (device, rail) in self.facts.devices.iter().zip(&self.rails) {
            let state = device
                .ports
                .iter()
                .find(|port| port.number == rail.port)
                .map_or("-", |port| port.state.as_str());
            let gid = rail.gid.as_ref().map_or("-".to_owned(), |gid| {
                let address = gid
                    .ipv4()
                    .map_or(gid.gid.to_string(), |own| own.to_string());
                format!("[{}] {address}", gid.index)
            });
            let driver = match &device.driver_version {
                Some(version) => format!("{} {version}", device.driver),
                None => or_dash(&device.driver).to_owned(),
            };
            rows.push(vec![
                device.name.clone(),
                rail.mode.words().to_owned(),
                format!("{} {state}", rail.port),
                rail.netdev.clone().unwrap_or("-".to_owned()),
                rail.netdev_mtu
                    .map_or("-".to_owned(), |mtu| mtu.to_string()),
                gid,
                driver,
                or_dash(&device.firmware).to_owned(),
                device.numa.map_or("-".to_owned(), |node| node.to_string()),
                device.pci_path.last().cloned().unwrap_or("-".to_owned()),
            ]);
        }
        line(out, "");
        table(out, &rows);
    }

    /// Devices of one kind have the same rows, so equal ones are written once.
    fn limit_table(&self, out: &mut String) {
        let mut groups: Vec<(String, &[Probed])> = Vec::new();
        for device in &self.facts.devices {
            let probed = device.verbs.as_ref().map_or(&[][..], |verbs| &verbs.probed);
            match groups.iter_mut().find(|(_, known)| *known == probed) {
                Some((names, _)) => *names = format!("{names}, {}", device.name),
                None => groups.push((device.name.clone(), probed)),
            }
        }
        for (names, probed) in groups.iter().filter(|(_, probed)| !probed.is_empty()) {
            let head = [names.as_str(), "VALUE", "HOW"];
            let mut rows = vec![head.map(str::to_owned).to_vec()];
            let row =
                |line: &Probed| vec![line.name.clone(), line.value.clone(), line.reason.clone()];
            rows.extend(probed.iter().map(row));
            line(out, "");
            table(out, &rows);
        }
    }

    fn gpu_table(&self, out: &mut String) {
        if self.gpus.is_empty() {
            return;
        }
        let head = ["GPU", "MODEL", "DEVICE", "PATH", "TRIED", "DISTANCE"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for verdict in &self.gpus {
            let gpu = self
                .facts
                .gpus
                .iter()
                .find(|gpu| gpu.address() == verdict.gpu);
            rows.push(vec![
                verdict.gpu.clone(),
                gpu.and_then(|gpu| gpu.model.clone())
                    .unwrap_or("-".to_owned()),
                verdict.device.clone(),
                verdict.path.words().to_owned(),
                if verdict.is_proven { "yes" } else { "no" }.to_owned(),
                verdict.distance.words().to_owned(),
            ]);
        }
        line(out, "");
        table(out, &rows);
    }

    fn peer_table(&self, out: &mut String) {
        let Some(peer) = &self.peer else { return };
        line(out, "");
        let name = or_dash(&peer.facts.hostname);
        line(
            out,
            &format!("peer {} ({name}): path {}", peer.address, peer.path.path),
        );
        let list = |figures: &[Figure]| {
            let words = figures
                .iter()
                .map(|figure| format!("{} {:.1} {}", figure.name, figure.value, figure.unit));
            words.collect::<Vec<_>>().join(", ")
        };
        let row = |done: &Done| {
            let outcome = match &done.outcome {
                Outcome::Passed(figures) => list(figures),
                Outcome::Seen { what, figures } if figures.is_empty() => what.clone(),
                Outcome::Seen { what, figures } => format!("{what}; {}", list(figures)),
                Outcome::Failed { why, .. } => format!("FAILED: {why}"),
                Outcome::NotRun { why } => format!("not run: {why}"),
            };
            vec![done.step.words(), outcome]
        };
        let rows: Vec<_> = peer.steps.iter().map(row).collect();
        table(out, &rows);
    }

    fn sentences(&self, out: &mut String) {
        line(out, "");
        let mut sorted: Vec<_> = self.findings.iter().collect();
        sorted.sort_by_key(|finding| std::cmp::Reverse(finding.level));
        for finding in sorted {
            let word = finding.level.word();
            line(
                out,
                &format!("{word:<4}  {}: {}", finding.subject, finding.what),
            );
            if !finding.why.is_empty() {
                line(out, &format!("      why: {}", finding.why));
            }
            if let Some(fix) = &finding.fix {
                line(out, &format!("      fix: {fix}"));
            }
        }
    }

    fn verdict(&self, out: &mut String) {
        let usable: Vec<_> = self
            .rails
            .iter()
            .filter(|rail| rail.is_usable())
            .map(|rail| rail.device.as_str())
            .collect();
        let count = |level| {
            self.findings
                .iter()
                .filter(|finding| finding.level == level)
                .count()
        };
        line(out, "");
        line(
            out,
            &format!(
                "{} of {} RDMA device(s) usable{}{}; {} failure(s), {} warning(s)",
                usable.len(),
                self.rails.len(),
                if usable.is_empty() { "" } else { ": " },
                usable.join(", "),
                count(Level::Fail),
                count(Level::Warn)
            ),
        );
    }
}

impl Finding {
    /// A failed step is a finding of its own.
    fn of_step(done: &Done) -> Option<Self> {
        let Outcome::Failed { why, fix } = &done.outcome else {
            return None;
        };
        Some(Self {
            level: Level::Fail,
            subject: "peer".to_owned(),
            what: format!("{} failed", done.step.words()),
            why: why.clone(),
            fix: Some(fix.clone()),
        })
    }
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "{}", printable(text)).expect("invariant: writing to a String does not fail");
}

/// Text of files and peers without what a terminal would take as a command.
fn printable(text: &str) -> String {
    let safe = |symbol: char| if symbol.is_control() { '?' } else { symbol };
    text.chars().map(safe).collect()
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

/// Columns as wide as their widest cell, two blanks between them.
fn table(out: &mut String, rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    for row in rows {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        line(out, text.trim_end());
    }
}
