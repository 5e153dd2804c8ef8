//! Asks the devices themselves, through the libraries that the engine uses.
//!
//! Probing makes small queue pairs and destroys them; nothing of it outlasts the call.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::SONAMES;
use crate::doctor::facts::{Device, Library, Probed, Verbs};
use crate::doctor::findings::bytes;
use crate::transport::verbs::context::Context;
use crate::transport::verbs::error::VerbsError;
use crate::transport::verbs::library;
use crate::transport::verbs::probe::{Capabilities, Found, capabilities};

/// Opens the libraries, as the engine does.
pub(super) fn libraries() -> Vec<Library> {
    let opened = library::Library::open();
    let verbs = opened.as_ref().err().map(ToString::to_string);
    let cm = match &opened {
        Ok(library) => library.cm().err().map(|error| error.to_string()),
        Err(_) => Some("not looked for without libibverbs".to_owned()),
    };
    let named = |(soname, problem): (&str, Option<String>)| Library {
        soname: soname.to_owned(),
        problem,
    };
    SONAMES.into_iter().zip([verbs, cm]).map(named).collect()
}

/// Opens and probes every device. Without libibverbs there is nothing to open, which the libraries' finding says.
pub(super) fn look(devices: &mut [Device]) {
    let Ok(library) = library::Library::open() else {
        return;
    };
    for device in devices {
        let seen = probed(&library, device);
        device.verbs = Some(seen.unwrap_or_else(|error| Verbs {
            problem: Some(error.to_string()),
            ..Verbs::default()
        }));
    }
}

fn probed(library: &Arc<library::Library>, device: &Device) -> Result<Verbs, VerbsError> {
    let context = Context::open(library, &device.name)?;
    let active = device.ports.iter().find(|port| port.state == "ACTIVE");
    let number = active.map_or(1, |port| port.number);
    let port = context.port(number)?;
    let limits = context.limits()?;
    let can = capabilities(&context, number)?;
    let mut rows = lines(&can);
    let reported = [
        ("queue pairs", u64::from(limits.max_qp)),
        ("requests per queue pair", u64::from(limits.max_qp_wr)),
        ("registrations", u64::from(limits.max_mr)),
    ];
    let reported = reported.map(|(name, value)| (name, value.to_string()));
    let longest = ("longest registration", bytes(limits.max_mr_bytes));
    rows.extend(
        reported
            .into_iter()
            .chain([longest])
            .map(|(name, value)| Probed {
                name: name.to_owned(),
                value,
                reason: "the device reports it".to_owned(),
            }),
    );
    Ok(Verbs {
        problem: None,
        active_mtu: port.active_mtu_bytes(),
        dmabuf: Some(can.dmabuf.value),
        probed: rows,
    })
}

fn lines(can: &Capabilities) -> Vec<Probed> {
    fn line<T>(name: &str, found: &Found<T>, value: String) -> Probed {
        Probed {
            name: name.to_owned(),
            value,
            reason: found.reason.clone(),
        }
    }
    let yes = |value: bool| if value { "yes" } else { "no" }.to_owned();
    vec![
        line(
            "send elements",
            &can.send_sge,
            can.send_sge.value.to_string(),
        ),
        line(
            "inline bytes",
            &can.inline_bytes,
            can.inline_bytes.value.to_string(),
        ),
        line(
            "longest request",
            &can.wr_bytes_max,
            bytes(can.wr_bytes_max.value),
        ),
        line(
            "WRITE with immediate",
            &can.immediate,
            yes(can.immediate.value),
        ),
        line("dma-buf registration", &can.dmabuf, yes(can.dmabuf.value)),
    ]
}
