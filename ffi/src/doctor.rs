//! The doctor's report.
#![expect(unsafe_code, reason = "exported functions take raw pointers")]

use std::{ffi::c_char, path::PathBuf};

use kvt::doctor::{
    collect::{Host, collect},
    exchange::Caller,
    report::{Report, devices_of, is_device_file},
    steps,
};
use serde::Deserialize;

use crate::{
    argument::{Texts, text},
    guard::enter,
    settings::parse,
    status::{Failure, KVT_BAD_CONFIG, KVT_UNREACHABLE, kvt_status_t},
};

/// Looks at this host for what RDMA needs and says what is wrong and how to put it right: the JSON that
/// `kvtransfer doctor --json` prints. `findings` has the sentences, each with its `level` and `fix`.
///
/// `options` is a JSON object, or empty: `devices` (devices that must be usable, as SGLang's
/// `--disaggregation-ib-device`), `peer` ("host:port" of a `kvtransfer doctor --serve` on another host: compares both
/// and measures the path), `root` (look at the host below this directory instead).
///
/// Ownership: `options` is read during the call only. `*out_text` is the caller's, to be given back with `kvt_text_free`.
/// `out_len` may be NULL. Threads: any; opens the host's RDMA devices with small queue pairs, which takes some 100 ms, and
/// seconds with a peer. Errors: `KVT_BAD_CONFIG`, `KVT_UNREACHABLE` (the peer), `KVT_BAD_ARGUMENT`. A host that lacks
/// something is no error of this call.
///
/// # Safety
/// Every pointer is NULL or valid for what it points to; lengths are right.
// SAFETY: `kvt_` is this library's own prefix, so the unmangled name meets no other symbol.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvt_doctor_json(
    options: *const c_char,
    options_len: usize,
    out_text: *mut *mut c_char,
    out_len: *mut usize,
) -> kvt_status_t {
    enter(|| {
        // SAFETY: this function's own contract.
        let place = unsafe { Texts::new(out_text, out_len) }?;
        // SAFETY: this function's own contract.
        let options = unsafe { text(options, options_len, "options") }?;
        place.put(parse::<Options>(options, "options")?.report()?.json());
        Ok(())
    })
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Options {
    devices: Option<String>,
    peer: Option<String>,
    root: Option<PathBuf>,
}

impl Options {
    fn report(self) -> Result<Report, Failure> {
        let wanted = self.devices.as_deref().map(names).transpose()?.flatten();
        let wanted = wanted.as_deref();
        let host = self.root.map_or_else(Host::this, |root| Host::below(&root));
        let mut report = Report::of(collect(&host), wanted);
        if let Some(peer) = &self.peer {
            let mut caller = Caller::connect(peer).map_err(|error| {
                let text = format!(
                    "{peer} cannot be asked: {error}. On that node: kvtransfer doctor --serve 0.0.0.0:PORT, with that TCP \
                     port open"
                );
                Failure::new(KVT_UNREACHABLE, text)
            })?;
            let facts = caller.facts().clone();
            report.add_peer(peer, facts, wanted, |path, rails| {
                caller.choose(path, rails);
                steps::run(&steps::steps(path), |step| caller.perform(step))
            });
        }
        Ok(report)
    }
}

fn names(filter: &str) -> Result<Option<Vec<String>>, Failure> {
    let bad = |why: String| Failure::new(KVT_BAD_CONFIG, format!("devices: {why}"));
    if !is_device_file(filter) {
        return devices_of(filter).map_err(bad);
    }
    let file = std::fs::read_to_string(filter);
    devices_of(&file.map_err(|error| bad(format!("cannot read {filter}: {error}")))?).map_err(bad)
}
