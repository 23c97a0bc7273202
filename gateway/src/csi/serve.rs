//! The driver's socket and its life.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context as _;
use quarry_csi_proto::v1::controller_server::ControllerServer;
use quarry_csi_proto::v1::identity_server::IdentityServer;
use quarry_csi_proto::v1::node_server::NodeServer;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;

use super::Topology;
use super::answer::Calls;
use super::controller::ControllerService;
use super::identity::IdentityService;
use super::node::NodeService;
use super::peers::Peers;
use crate::control::Client;

/// How long calls may go on after the driver was told to end: less than Kubernetes gives a pod.
const END_TIME_MAX: Duration = Duration::from_secs(25);

/// How long answers may then be on their way.
const ANSWER_TIME: Duration = Duration::from_millis(200);

/// Where the driver is called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint(PathBuf);

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_prefix("unix://").or(text.strip_prefix("unix:"));
        let path = Path::new(path.unwrap_or(text));
        match path.is_absolute() {
            true => Ok(Self(path.to_path_buf())),
            false => Err("write unix:// and a path, such as unix:///csi/csi.sock".to_owned()),
        }
    }
}

/// The services that a driver has, beside that of its identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Services {
    /// What makes, moves and deletes volumes: once for a cluster.
    Controller,
    /// What mounts them: on each node.
    Node,
    /// Both.
    All,
}

/// What a driver is started with.
pub struct Settings {
    /// Where it is called.
    pub endpoint: Endpoint,
    /// What it serves.
    pub services: Services,
    /// The daemon that it calls: of a node, the node's own.
    pub client: Client,
    /// How other hosts' daemons are reached, if they are.
    pub peers: Option<Peers>,
    /// Where this node is, and volumes that are made here can be used; empty: everywhere.
    pub topology: Topology,
}

/// Serves until it is told to end, and the calls under way are done.
///
/// # Errors
/// If the socket cannot be listened on.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let Settings {
        endpoint: Endpoint(path),
        services,
        client,
        peers,
        topology,
    } = settings;
    let listener = listen(&path).await?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let calls = Calls::new();
    let identity = IdentityService {
        client: client.clone(),
        has_topology: !topology.is_empty(),
    };
    let controller = (services != Services::Node).then(|| {
        ControllerServer::new(ControllerService {
            client: client.clone(),
            peers,
            topology: topology.clone(),
            calls: calls.clone(),
        })
    });
    let node = (services != Services::Controller).then(|| {
        NodeServer::new(NodeService {
            client,
            topology,
            // A volume may be published to a node and mounted on it by calls that are none of each other's.
            calls: calls.apart(),
        })
    });
    tracing::info!(socket = %path.display(), ?services, "serving CSI");
    let ended = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("ending when the calls under way are done");
        if tokio::time::timeout(END_TIME_MAX, calls.end())
            .await
            .is_err()
        {
            tracing::warn!("ended before the calls under way were done");
        }
        tokio::time::sleep(ANSWER_TIME).await;
    };
    let serving = Server::builder()
        .add_service(IdentityServer::new(identity))
        .add_optional_service(controller)
        .add_optional_service(node)
        .serve_with_incoming(connections(listener));
    // Connections are not waited for: their other ends keep them.
    tokio::select! {
        served = serving => served?,
        () = ended => {}
    }
    // Gone already if somebody cleaned up.
    let _ = std::fs::remove_file(&path);
    Ok(())
}

/// Listens at `path`, for its owner alone: who can call the driver has all volumes. What a driver that is dead left
/// there goes.
async fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let shown = path.display();
    if UnixStream::connect(path).await.is_ok() {
        anyhow::bail!("somebody serves at {shown} already");
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("{shown} cannot be removed"));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {shown}"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("{shown} cannot be kept from others"))?;
    Ok(listener)
}

fn connections(
    listener: UnixListener,
) -> impl futures::Stream<Item = io::Result<UnixStream>> + Send + 'static {
    futures::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await;
        Some((accepted.map(|(stream, _)| stream), listener))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_is_a_socket_with_a_whole_path() {
        let endpoint = Endpoint(PathBuf::from("/csi/csi.sock"));
        for text in [
            "unix:///csi/csi.sock",
            "unix:/csi/csi.sock",
            "/csi/csi.sock",
        ] {
            assert_eq!(text.parse(), Ok(endpoint.clone()), "{text}");
        }
        for text in ["", "csi.sock", "unix://csi.sock", "tcp://127.0.0.1:1"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn socket_of_a_dead_driver_is_taken_over_and_of_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        let live = listen(&path).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(listen(&path).await.is_err());
        drop(live);
        listen(&path).await.unwrap();
    }
}
