//! A CSI driver (`quarry csi`), called over its socket as Kubernetes calls it.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use quarry_csi_proto::v1::controller_client::ControllerClient;
use quarry_csi_proto::v1::identity_client::IdentityClient;
use quarry_csi_proto::v1::node_client::NodeClient;
use quarry_csi_proto::v1::volume_capability::access_mode::Mode;
use quarry_csi_proto::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use quarry_csi_proto::v1::volume_content_source::{SnapshotSource, Type as Source, VolumeSource};
use quarry_csi_proto::v1::*;
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

pub use quarry_csi_proto::v1;

use crate::Site;

/// How long a driver may take until it answers, and to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A caller of a driver.
pub struct Caller {
    runtime: Runtime,
    channel: Channel,
}

impl Caller {
    /// Of the driver at this socket.
    ///
    /// # Errors
    /// If nobody listens there.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        let channel = runtime.block_on(endpoint.connect())?;
        Ok(Self { runtime, channel })
    }

    /// The identity service.
    #[must_use]
    pub fn identity(&self) -> IdentityClient<Channel> {
        IdentityClient::new(self.channel.clone())
    }

    /// The controller service.
    #[must_use]
    pub fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    /// The node service.
    #[must_use]
    pub fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    /// Makes a call, and waits for its answer.
    ///
    /// # Errors
    /// The call's.
    pub fn call<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        self.runtime.block_on(call).map(Response::into_inner)
    }

    /// Makes calls at once, and waits for their answers.
    pub fn at_once<T>(
        &self,
        calls: Vec<impl Future<Output = Result<Response<T>, Status>> + Send + 'static>,
    ) -> Vec<Result<T, Status>>
    where
        T: Send + 'static,
    {
        self.runtime.block_on(async {
            let tasks: Vec<_> = calls.into_iter().map(tokio::spawn).collect();
            let mut answers = Vec::new();
            for task in tasks {
                let answer = task.await.expect("a call does not panic");
                answers.push(answer.map(Response::into_inner));
            }
            answers
        })
    }
}

impl Caller {
    /// Makes a volume.
    ///
    /// # Errors
    /// The call's.
    pub fn create(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let made = self.call(self.controller().create_volume(request))?;
        made.volume.ok_or_else(|| Status::internal("no volume"))
    }

    /// Deletes a volume.
    ///
    /// # Errors
    /// The call's.
    pub fn delete(&self, id: &str) -> Result<DeleteVolumeResponse, Status> {
        let request = DeleteVolumeRequest {
            volume_id: id.to_owned(),
            secrets: secrets(),
        };
        self.call(self.controller().delete_volume(request))
    }

    /// Makes a snapshot.
    ///
    /// # Errors
    /// The call's.
    pub fn snapshot(&self, of: &str, name: &str) -> Result<Snapshot, Status> {
        let request = CreateSnapshotRequest {
            source_volume_id: of.to_owned(),
            name: name.to_owned(),
            secrets: secrets(),
            parameters: HashMap::new(),
        };
        let made = self.call(self.controller().create_snapshot(request))?;
        made.snapshot.ok_or_else(|| Status::internal("no snapshot"))
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// The call's.
    pub fn delete_snapshot(&self, id: &str) -> Result<DeleteSnapshotResponse, Status> {
        let request = DeleteSnapshotRequest {
            snapshot_id: id.to_owned(),
            secrets: secrets(),
        };
        self.call(self.controller().delete_snapshot(request))
    }

    /// Lists snapshots.
    ///
    /// # Errors
    /// The call's.
    pub fn snapshots(
        &self,
        request: ListSnapshotsRequest,
    ) -> Result<ListSnapshotsResponse, Status> {
        self.call(self.controller().list_snapshots(request))
    }

    /// Grows a volume.
    ///
    /// # Errors
    /// The call's.
    pub fn expand(&self, id: &str, size: i64) -> Result<ControllerExpandVolumeResponse, Status> {
        let request = ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: Some(CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            secrets: secrets(),
            volume_capability: Some(writer()),
        };
        self.call(self.controller().controller_expand_volume(request))
    }

    /// Publishes a volume to a node; answers the context that the node is to get.
    ///
    /// # Errors
    /// The call's.
    pub fn publish(
        &self,
        id: &str,
        node: &str,
        use_as: VolumeCapability,
    ) -> Result<HashMap<String, String>, Status> {
        let request = ControllerPublishVolumeRequest {
            volume_id: id.to_owned(),
            node_id: node.to_owned(),
            volume_capability: Some(use_as),
            secrets: secrets(),
            ..ControllerPublishVolumeRequest::default()
        };
        let answer = self.call(self.controller().controller_publish_volume(request));
        answer.map(|answer| answer.publish_context)
    }

    /// Takes a volume from a node.
    ///
    /// # Errors
    /// The call's.
    pub fn unpublish(&self, id: &str, node: &str) -> Result<(), Status> {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            node_id: node.to_owned(),
            secrets: secrets(),
        };
        let answer = self.call(self.controller().controller_unpublish_volume(request));
        answer.map(drop)
    }

    /// What the node is.
    ///
    /// # Errors
    /// The call's.
    pub fn node_info(&self) -> Result<NodeGetInfoResponse> {
        let info = self.call(self.node().node_get_info(NodeGetInfoRequest {}));
        done("NodeGetInfo", info)
    }
}

/// A driver that runs.
pub struct Driver {
    child: Child,
    caller: Caller,
    log: PathBuf,
}

impl std::ops::Deref for Driver {
    type Target = Caller;

    fn deref(&self) -> &Caller {
        &self.caller
    }
}

impl Driver {
    /// Starts one beside the daemon of `site`, with these arguments more.
    ///
    /// # Errors
    /// With what it said, if it does not come up.
    pub fn start(site: &Site, arguments: &[&str]) -> Result<Self> {
        let (socket, log) = (site.root().join("csi.sock"), site.root().join("csi.log"));
        let endpoint = format!("unix://{}", socket.display());
        let file = OpenOptions::new().create(true).append(true).open(&log)?;
        let mut child = site
            .command(&["csi", "--endpoint", &endpoint])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()?;
        let begun = Instant::now();
        loop {
            if let Ok(caller) = Caller::connect(&socket) {
                return Ok(Self { child, caller, log });
            }
            if let Some(status) = child.try_wait()? {
                bail!("quarry csi ended at once ({status}): {}", said(&log));
            }
            ensure!(begun.elapsed() < PATIENCE, "no driver: {}", said(&log));
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it printed.
    #[must_use]
    pub fn log(&self) -> String {
        said(&self.log)
    }

    /// Asks it to end, and waits.
    ///
    /// # Errors
    /// If it ended badly.
    pub fn stop(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "ended with {status}: {}", self.log());
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("quarry csi did not end in {PATIENCE:?}")
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("-- the driver\n{}", self.log());
        }
        // It may have ended already, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn said(log: &Path) -> String {
    fs::read_to_string(log).unwrap_or_default()
}

/// What no log may have.
pub const SECRET: &str = "s3cr3t-of-a-call";

/// What a caller may not see again anywhere.
#[must_use]
pub fn secrets() -> HashMap<String, String> {
    [("token".to_owned(), SECRET.to_owned())].into()
}

fn of(source: Source) -> Option<VolumeContentSource> {
    let r#type = Some(source);
    Some(VolumeContentSource { r#type })
}

/// A snapshot, as what a volume is made of.
#[must_use]
pub fn of_snapshot(id: &str) -> Option<VolumeContentSource> {
    let snapshot_id = id.to_owned();
    of(Source::Snapshot(SnapshotSource { snapshot_id }))
}

/// A volume, as what another is made of.
#[must_use]
pub fn of_volume(id: &str) -> Option<VolumeContentSource> {
    let volume_id = id.to_owned();
    of(Source::Volume(VolumeSource { volume_id }))
}

/// What most pods want: a file system, on one node.
#[must_use]
pub fn writer() -> VolumeCapability {
    capability(Mode::SingleNodeWriter, Some("ext4"))
}

/// A use of a volume, as a file system if one is named (`""`: any), or else as a block device.
#[must_use]
pub fn capability(mode: Mode, fs: Option<&str>) -> VolumeCapability {
    let mount = |fs: &str| MountVolume {
        fs_type: fs.to_owned(),
        ..MountVolume::default()
    };
    let block = AccessType::Block(BlockVolume {});
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(fs.map_or(block, |fs| AccessType::Mount(mount(fs)))),
    }
}

/// A request for a volume of `tenant`, `size` bytes at least.
#[must_use]
pub fn volume(tenant: &str, name: &str, size: i64) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(CapacityRange {
            required_bytes: size,
            limit_bytes: 0,
        }),
        volume_capabilities: vec![capability(Mode::SingleNodeWriter, Some("ext4"))],
        parameters: [("tenant".to_owned(), tenant.to_owned())].into(),
        ..CreateVolumeRequest::default()
    }
}

/// Fails unless a call was refused with this code, and words.
///
/// # Errors
/// If it was not.
pub fn refused<T>(what: &str, answer: Result<T, Status>, code: Code) -> Result<String> {
    match answer {
        Ok(_) => bail!("{what}: not refused"),
        Err(status) => {
            ensure!(status.code() == code, "{what}: {status}");
            ensure!(!status.message().is_empty(), "{what}: without a word");
            ensure!(status.details().is_empty(), "{what}: with details");
            Ok(status.message().to_owned())
        }
    }
}

/// What a call answered.
///
/// # Errors
/// With its own, if it failed.
pub fn done<T>(what: &str, answer: Result<T, Status>) -> Result<T> {
    answer.with_context(|| what.to_owned())
}
