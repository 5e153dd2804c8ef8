//! What there is.

use std::path::Path;

use anyhow::Result;
use kvtransfer::gpu::{
    Context, Driver, Pinned, Priority, Stream, affinity,
    dmabuf::DmaBuf,
    ipc,
    memory::{DeviceBuffer, PoolBuffer, VirtualBuffer},
    pointer, verdict,
};

use crate::measure::Table;

const BYTES: usize = 8 << 20;

pub(crate) fn run(gpu: u32) -> Result<Table> {
    let mut table = Table::default();
    let driver = Driver::open()?;
    let (major, minor) = driver.version()?;
    table.fact("driver", format!("CUDA {major}.{minor}"));
    for device in driver.devices()? {
        table.fact(
            format!("GPU {}", device.ordinal),
            serde_json::to_string(&device)?,
        );
    }
    let context = Context::primary(gpu)?;
    let stream = Stream::new(&context, Priority::Low)?;
    let plain = DeviceBuffer::new(&context, BYTES)?;
    let expandable = VirtualBuffer::new(&context, 4, 1)?;
    let pinned = Pinned::allocate(&context, BYTES)?;
    let host = vec![0_u8; 4096];
    let host_address = host.as_ptr().expose_provenance() as u64;
    let mut kinds = vec![
        ("cudaMalloc", plain.address() + 4096 + 256, 1 << 20),
        (
            "virtual memory",
            expandable.address() + 512,
            expandable.len() as u64 - 512,
        ),
        ("pinned host", pinned.device_address(), 4096),
        ("ordinary host", host_address, 64),
    ];
    let pool = PoolBuffer::new(&stream, BYTES);
    match &pool {
        Ok(pool) => kinds.push(("cudaMallocAsync", pool.address(), 4096)),
        Err(error) => table.fact("cudaMallocAsync", error.to_string()),
    }
    for (name, address, len) in kinds {
        let facts = pointer::inspect(&context, address)?;
        table.fact(format!("pointer, {name}"), serde_json::to_string(&facts)?);
        exports(&mut table, &context, name, (address, len))?;
    }
    match verdict::probe(&context) {
        Ok(verdicts) => {
            for verdict in verdicts {
                let what = format!("GPU-Direct verdict, {}", verdict.device);
                table.fact(what, format!("{:?}: {}", verdict.path, verdict.reason));
            }
        }
        Err(reason) => table.fact("GPU-Direct verdict", reason),
    }
    for (device, distance) in affinity::nearest(Path::new("/"), &context.facts().pci_address) {
        table.fact(format!("distance to {device}"), distance.words());
    }
    let flush = context.flush_writes();
    let rule = format!("{:?}; a flush: {flush:?}", context.facts().visibility());
    table.fact("after a receive notice", rule);
    Ok(table)
}

/// Exports a range in both ways.
fn exports(
    table: &mut Table,
    context: &Context,
    name: &str,
    (address, len): (u64, u64),
) -> Result<()> {
    match DmaBuf::export(context, address, len) {
        Ok(buffer) => {
            let (asked, has) = (buffer.bytes(), buffer.kernel_bytes());
            let is_right = has.as_ref().is_ok_and(|has| *has >= asked);
            let note = format!(
                "{len} bytes asked for, offset {}, {asked} exported, kernel says {has:?}",
                buffer.offset()
            );
            table.check(format!("dma-buf, {name}"), is_right, note);
        }
        Err(error) => table.fact(format!("dma-buf, {name}"), error.to_string()),
    }
    match ipc::export(context, address, len) {
        Ok(exported) => {
            let bytes = exported.handle.encode();
            let is_right = ipc::Handle::decode(&bytes)? == exported.handle;
            let note = format!(
                "{} bytes, {} descriptors",
                bytes.len(),
                exported.descriptors.len()
            );
            table.check(format!("IPC handle, {name}"), is_right, note);
        }
        Err(error) => table.fact(format!("IPC handle, {name}"), error.to_string()),
    }
    Ok(())
}
