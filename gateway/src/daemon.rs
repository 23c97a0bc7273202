//! `quarry serve`: from a configuration to a running daemon, and its orderly end.
//!
//! Start: the store, the cache device and what it kept, the reactors, then the control socket; then
//! what was attached before is attached again, one by one, and a volume that cannot be is told of
//! and left in the list. End: no more control calls, everything uploaded and folded into the map;
//! the volumes stay ours, and their ublk devices stay for the next daemon to take over.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::control::{self, AttachOptions, Engine, Listeners};
use crate::engine::Daemon;
use crate::nbd::{NbdServer, listen_unix};
use crate::store::{Lane, LaneSettings, StoreSettings, install_crypto, open_store};

/// Longest time that the end waits for uploads: what is left then stays in the cache.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(60);

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// If something that serving needs cannot be had; each names what and what to do.
pub async fn run(config: quarry_config::Config) -> anyhow::Result<()> {
    install_crypto();
    let settings = StoreSettings::from(&config.store);
    let store = open_store(&settings)?;
    let url = store.describe();
    let lane = Lane::new(store, &LaneSettings::default());
    let listeners = Listeners::bind(&config.daemon.socket, config.daemon.listen).await?;
    let (nbd_socket, nbd_listen) = (config.nbd_socket(), config.daemon.nbd_listen);
    let daemon = Daemon::start(config, lane.clone(), url)?;
    let nbd = NbdServer::new(daemon.exports());
    let unix = listen_unix(&nbd_socket)?;
    tokio::spawn({
        let nbd = nbd.clone();
        async move { nbd.serve_unix(unix).await }
    });
    if let Some(address) = nbd_listen {
        let tcp = tokio::net::TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen for NBD on {address}"))?;
        tokio::spawn(async move { nbd.serve_tcp(tcp).await });
    }

    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        }
    };
    let again = tokio::spawn(attach_again(Arc::clone(&daemon)));
    let engine: Arc<dyn Engine> = Arc::clone(&daemon) as _;
    control::serve(engine, listeners, shutdown).await?;
    again.abort();
    if tokio::time::timeout(DRAIN_TIME_MAX, daemon.drain_all())
        .await
        .is_err()
    {
        tracing::warn!("the store did not take everything in time; the rest stays in the cache");
    }
    daemon.stop().await;
    lane.stop();
    Ok(())
}

/// Attaches what was attached when the last daemon of this data folder ended.
async fn attach_again(daemon: Arc<Daemon>) {
    let list = match daemon.read_list() {
        Ok(list) => list,
        Err(error) => {
            tracing::error!(%error, "the list of attached volumes cannot be read; attach them by hand");
            Vec::new()
        }
    };
    for (volume, via) in list {
        let options = AttachOptions {
            via: Some(via),
            ..AttachOptions::default()
        };
        match daemon.attach(&volume, options).await {
            Ok(info) => {
                tracing::info!(%volume, device = ?info.device, uri = ?info.uri, "attached again")
            }
            Err(error) => tracing::error!(%volume, %error, "cannot be attached again"),
        }
    }
    daemon.set_ready();
}
