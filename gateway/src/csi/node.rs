//! The node service: volumes are attached, formatted if they are blank, checked, mounted, and shown to pods.
//!
//! A staged volume is attached by the node's daemon, as a block device; one with a file system is mounted at its
//! staging path. A published one is that mount, or the device's node, bound to the target path. Both are read off
//! the daemon and the table of mounts at each call; nothing is noted anywhere.

mod disk;
mod mounts;
mod publish;
mod stage;

use std::path::{Path, PathBuf};

use quarry_csi_proto::v1::node_server::Node;
use quarry_csi_proto::v1::node_service_capability::rpc::Type as Can;
use quarry_csi_proto::v1::node_service_capability::{Rpc, Type};
use quarry_csi_proto::v1::volume_usage::Unit;
use quarry_csi_proto::v1::*;
use tonic::{Request, Response, Status};

use self::mounts::{Device, Mounts};
use super::Topology as Segments;
use super::answer::{Answer, Answered, Calls, given};
use super::capability::{Access, asked};
use super::class::{Wanted, bytes};
use super::ids::{self, NodeId};
use crate::control::{AttachedInfo, Client, ImageRef, State, VolumeInfo, VolumeRef};

/// What it can do.
const CAN: [Can; 5] = [
    Can::StageUnstageVolume,
    Can::GetVolumeStats,
    Can::VolumeCondition,
    Can::ExpandVolume,
    Can::SingleNodeMultiWriter,
];

/// The service.
#[derive(Clone)]
pub(super) struct NodeService {
    pub client: Client,
    pub topology: Segments,
    pub calls: Calls,
}

/// A path that the caller gives.
///
/// # Errors
/// If it is missing, or leads elsewhere from elsewhere.
fn path(text: &str, field: &str) -> Answer<PathBuf> {
    let path = Path::new(given(text, field)?);
    match path.is_absolute() {
        true => Ok(path.to_path_buf()),
        false => Err(Status::invalid_argument(format!("{field} is not absolute"))),
    }
}

/// How a volume is attached here, and its device, if it has one.
fn device(info: &VolumeInfo) -> Option<(AttachedInfo, Device)> {
    let attached = info.attached.clone()?;
    let device = Device::at(Path::new(attached.device.as_ref()?)).ok()?;
    Some((attached, device))
}

impl NodeService {
    async fn show(&self, volume: &VolumeRef) -> Answer<VolumeInfo> {
        let image = ImageRef::from(volume.clone());
        Ok(self.client.show_volume(&image).await?)
    }

    /// The volume, and its device here.
    ///
    /// # Errors
    /// `NOT_FOUND` if it is not there, or not attached here as a device.
    async fn attached(&self, volume: &VolumeRef) -> Answer<(VolumeInfo, AttachedInfo, Device)> {
        let info = self.show(volume).await?;
        match device(&info) {
            Some((attached, device)) => Ok((info, attached, device)),
            None => {
                let message = format!("{volume} is not attached here as a block device");
                Err(Status::not_found(message))
            }
        }
    }

    async fn stats(&self, volume: &VolumeRef, at: &Path) -> Answer<NodeGetVolumeStatsResponse> {
        let (info, attached, device) = self.attached(volume).await?;
        let usage = match mounts::shown(at, &device).await? {
            Some(Access::Block) => vec![VolumeUsage {
                total: bytes(attached.size_bytes),
                unit: Unit::Bytes.into(),
                ..VolumeUsage::default()
            }],
            Some(Access::Mount { .. }) => mounts::usage(at).await?.to_vec(),
            None => {
                let message = format!("{volume} is not at {}", at.display());
                return Err(Status::not_found(message));
            }
        };
        let problem = info.problem.clone();
        let abnormal = info.state != State::Attached || problem.is_some();
        Ok(NodeGetVolumeStatsResponse {
            usage,
            volume_condition: Some(VolumeCondition {
                abnormal,
                message: problem.unwrap_or_else(|| info.state.as_str().to_owned()),
            }),
        })
    }

    async fn expand(
        &self,
        volume: &VolumeRef,
        at: &Path,
        wanted: Wanted,
    ) -> Answer<NodeExpandVolumeResponse> {
        let (info, attached, device) = self.attached(volume).await?;
        let Some(access) = mounts::shown(at, &device).await? else {
            let message = format!("{volume} is not at {}", at.display());
            return Err(Status::not_found(message));
        };
        let size = wanted.size(info.size_bytes)?;
        let mut shown = attached.size_bytes;
        if size > shown {
            let spec = crate::control::ResizeSpec {
                size_bytes: size,
                force: false,
            };
            let resized = self.client.resize(volume, spec).await;
            let note = resized.map_err(super::answer::quota)?.note;
            shown = self.attached(volume).await?.1.size_bytes;
            if shown < size {
                let why = note.unwrap_or_else(|| "its device does not show that".to_owned());
                let message = format!("{volume} has {size} bytes now, but {why}");
                return Err(Status::failed_precondition(message));
            }
        }
        if matches!(access, Access::Mount { .. })
            && let Some(mount) = Mounts::read().await?.of(&device)
            && !mount.read_only
        {
            disk::grow(&device, &mount).await?;
        }
        Ok(NodeExpandVolumeResponse {
            capacity_bytes: bytes(shown),
        })
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Answered<NodeStageVolumeResponse> {
        let request = request.into_inner();
        given(&request.volume_id, "the volume's id")?;
        let at = path(&request.staging_target_path, "the staging path")?;
        let wish = asked(request.volume_capability.as_ref())?;
        let volume = ids::volume(&request.volume_id)?;
        let plan = stage::Plan::of(at, wish, &request.publish_context, &request.volume_context)?;
        let this = self.clone();
        self.calls
            .run("NodeStageVolume", &request.volume_id, async move {
                let done = this.stage(&volume, plan).await;
                done.map(|()| NodeStageVolumeResponse {})
            })
            .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Answered<NodeUnstageVolumeResponse> {
        let request = request.into_inner();
        given(&request.volume_id, "the volume's id")?;
        let at = path(&request.staging_target_path, "the staging path")?;
        let volume = ids::volume(&request.volume_id).ok();
        let this = self.clone();
        self.calls
            .run("NodeUnstageVolume", &request.volume_id, async move {
                let done = this.unstage(volume.as_ref(), &at).await;
                done.map(|()| NodeUnstageVolumeResponse {})
            })
            .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Answered<NodePublishVolumeResponse> {
        let request = request.into_inner();
        given(&request.volume_id, "the volume's id")?;
        let target = path(&request.target_path, "the target path")?;
        let wish = asked(request.volume_capability.as_ref())?;
        if request.staging_target_path.is_empty() {
            let message = "the volume is to be staged first, and the staging path is missing";
            return Err(Status::failed_precondition(message));
        }
        let staged = path(&request.staging_target_path, "the staging path")?;
        let volume = ids::volume(&request.volume_id)?;
        let read_only = request.readonly || wish.read_only;
        let this = self.clone();
        self.calls
            .run("NodePublishVolume", &request.volume_id, async move {
                let done = this.publish(&volume, &staged, &target, &wish, read_only);
                done.await.map(|()| NodePublishVolumeResponse {})
            })
            .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Answered<NodeUnpublishVolumeResponse> {
        let request = request.into_inner();
        given(&request.volume_id, "the volume's id")?;
        let target = path(&request.target_path, "the target path")?;
        self.calls
            .run("NodeUnpublishVolume", &request.volume_id, async move {
                // Nothing that the daemon or the store knows is needed for that.
                mounts::unmount(&target).await?;
                mounts::remove(&target).await?;
                Ok(NodeUnpublishVolumeResponse {})
            })
            .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Answered<NodeGetVolumeStatsResponse> {
        let request = request.into_inner();
        let id = given(&request.volume_id, "the volume's id")?;
        let at = path(&request.volume_path, "the volume's path")?;
        let stats = self.stats(&ids::volume(id)?, &at).await?;
        Ok(Response::new(stats))
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Answered<NodeExpandVolumeResponse> {
        let request = request.into_inner();
        let volume = ids::volume(given(&request.volume_id, "the volume's id")?)?;
        let at = path(&request.volume_path, "the volume's path")?;
        let wanted = Wanted::of(request.capacity_range.as_ref())?;
        let this = self.clone();
        self.calls
            .run("NodeExpandVolume", &request.volume_id, async move {
                this.expand(&volume, &at, wanted).await
            })
            .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Answered<NodeGetCapabilitiesResponse> {
        let capability = |can: Can| NodeServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: can.into() })),
        };
        Ok(Response::new(NodeGetCapabilitiesResponse {
            capabilities: CAN.into_iter().map(capability).collect(),
        }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Answered<NodeGetInfoResponse> {
        let status = self.client.status().await?;
        let node = NodeId::of(&status)
            .ok_or_else(|| Status::internal("the daemon does not tell its cache's id"))?;
        let segments = self.topology.clone().into_iter().collect();
        Ok(Response::new(NodeGetInfoResponse {
            node_id: node.to_string(),
            max_volumes_per_node: 0,
            accessible_topology: (!self.topology.is_empty()).then_some(Topology { segments }),
        }))
    }
}
