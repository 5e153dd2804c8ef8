//! A relay that copies bytes between the client and one worker and looks at none: what a router on this machine cannot be
//! cheaper than, and a router of pairs has a second worker to talk to.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

/// Listens on `port` and passes every connection on to `worker`, for ever.
pub(crate) fn run(port: u16, worker: SocketAddr) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
        loop {
            let (client, _) = listener.accept().await?;
            tokio::spawn(async move {
                // A connection that cannot be passed on is closed, which its client sees.
                let _ = join(client, worker).await;
            });
        }
    })
}

async fn join(client: TcpStream, worker: SocketAddr) -> std::io::Result<()> {
    let worker = TcpStream::connect(worker).await?;
    client.set_nodelay(true)?;
    worker.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_worker, to_worker) = worker.into_split();
    tokio::spawn(copy(from_client, to_worker));
    tokio::spawn(copy(from_worker, to_client));
    Ok(())
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer).await? {
            0 => return to.shutdown().await,
            read => to.write_all(&buffer[..read]).await?,
        }
    }
}
