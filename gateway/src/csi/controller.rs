//! The controller service: volumes and snapshots are made, listed, grown and deleted, and given to nodes and taken
//! from them.
//!
//! Owns: which daemon is asked. Any daemon changes what is attached nowhere; what is attached only the host that
//! has it. Does not own: when a node is lost, which Kubernetes says by ControllerUnpublishVolume ([`publish`]).

mod lists;
pub(super) mod publish;
mod snapshots;
mod volumes;

use quarry_csi_proto::v1::controller_server::Controller;
use quarry_csi_proto::v1::controller_service_capability::rpc::Type as Can;
use quarry_csi_proto::v1::controller_service_capability::{Rpc, Type};
use quarry_csi_proto::v1::*;
use tonic::{Request, Response, Status};

use super::Topology;
use super::answer::{Answer, Answered, Calls, given};
use super::peers::Peers;
use super::{capability, ids};
use crate::control::{Client, ImageRef, State, VolumeInfo, VolumeRef, if_found};

/// What it can do.
const CAN: [Can; 10] = [
    Can::CreateDeleteVolume,
    Can::PublishUnpublishVolume,
    Can::PublishReadonly,
    Can::ListVolumes,
    Can::GetCapacity,
    Can::CreateDeleteSnapshot,
    Can::ListSnapshots,
    Can::CloneVolume,
    Can::ExpandVolume,
    Can::SingleNodeMultiWriter,
];

/// The service.
#[derive(Clone)]
pub(super) struct ControllerService {
    pub client: Client,
    pub peers: Option<Peers>,
    pub topology: Topology,
    pub calls: Calls,
}

impl ControllerService {
    async fn show(&self, volume: &VolumeRef) -> Answer<VolumeInfo> {
        let image = ImageRef::from(volume.clone());
        Ok(self.client.show_volume(&image).await?)
    }

    /// The volume, if there is one.
    async fn there(&self, volume: &VolumeRef) -> Answer<Option<VolumeInfo>> {
        let image = ImageRef::from(volume.clone());
        Ok(if_found(self.client.show_volume(&image).await)?)
    }

    /// The daemon that may change this volume; none: it is on another host, whose daemon cannot be reached from here.
    fn at_owner(&self, info: &VolumeInfo) -> Answer<Option<Client>> {
        let Some(owner) = info.owner.as_ref().filter(|_| is_elsewhere(info)) else {
            return Ok(Some(self.client.clone()));
        };
        let peer = self.peers.as_ref().map(|peers| peers.client(&owner.host));
        Ok(peer.transpose()?)
    }

    /// The same, where it must be.
    fn must_at_owner(&self, volume: &VolumeRef, info: &VolumeInfo) -> Answer<Client> {
        self.at_owner(info)?.ok_or_else(|| {
            let host = info.owner.as_ref().map_or("another host", |o| &o.host);
            Status::failed_precondition(format!(
                "{volume} is attached by host {host}, which alone can do that: start the controller with --peers, or detach it"
            ))
        })
    }
}

fn is_elsewhere(info: &VolumeInfo) -> bool {
    info.state == State::AttachedElsewhere
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Answered<CreateVolumeResponse> {
        let plan = volumes::Plan::of(request.into_inner(), &self.topology)?;
        let (this, volume) = (self.clone(), plan.volume().to_string());
        self.calls
            .run(
                "CreateVolume",
                &volume,
                async move { this.create(plan).await },
            )
            .await
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Answered<DeleteVolumeResponse> {
        let DeleteVolumeRequest { volume_id, .. } = request.into_inner();
        given(&volume_id, "the volume's id")?;
        // What cannot be an id is none of a volume that is there.
        let Ok(volume) = ids::volume(&volume_id) else {
            return Ok(Response::new(DeleteVolumeResponse {}));
        };
        let this = self.clone();
        self.calls
            .run("DeleteVolume", &volume_id, async move {
                this.delete(&volume).await.map(|()| DeleteVolumeResponse {})
            })
            .await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<ControllerPublishVolumeRequest>,
    ) -> Answered<ControllerPublishVolumeResponse> {
        let request = request.into_inner();
        given(&request.volume_id, "the volume's id")?;
        given(&request.node_id, "the node's id")?;
        let volume = ids::volume(&request.volume_id)?;
        let asked = capability::Use::of(request.volume_capability.as_ref());
        let asked = asked.map_err(capability::Unfit::invalid)?;
        let read_only = request.readonly || asked.read_only;
        let (this, id, node) = (self.clone(), request.volume_id, request.node_id);
        self.calls
            .run("ControllerPublishVolume", &id, async move {
                this.publish(&volume, &node, &asked, read_only).await
            })
            .await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<ControllerUnpublishVolumeRequest>,
    ) -> Answered<ControllerUnpublishVolumeResponse> {
        let request = request.into_inner();
        given(&request.volume_id, "the volume's id")?;
        let Ok(volume) = ids::volume(&request.volume_id) else {
            return Ok(Response::new(ControllerUnpublishVolumeResponse {}));
        };
        let (this, id, node) = (self.clone(), request.volume_id, request.node_id);
        self.calls
            .run("ControllerUnpublishVolume", &id, async move {
                let done = this.unpublish(&volume, &node).await;
                done.map(|()| ControllerUnpublishVolumeResponse {})
            })
            .await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Answered<ValidateVolumeCapabilitiesResponse> {
        let answer = self.validate(request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Answered<ListVolumesResponse> {
        let answer = self.volumes_by_pages(request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Answered<GetCapacityResponse> {
        let answer = self.capacity(&request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Answered<ControllerGetCapabilitiesResponse> {
        let capability = |can: Can| ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: can.into() })),
        };
        Ok(Response::new(ControllerGetCapabilitiesResponse {
            capabilities: CAN.into_iter().map(capability).collect(),
        }))
    }

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Answered<CreateSnapshotResponse> {
        let request = request.into_inner();
        let volume = ids::volume(given(&request.source_volume_id, "the source's id")?)?;
        given(&request.name, "the snapshot's name")?;
        if let Some(name) = request
            .parameters
            .keys()
            .find(|n| !n.starts_with("csi.storage.k8s.io/"))
        {
            let message = format!("snapshots have no parameters, and one is {name:?}");
            return Err(Status::invalid_argument(message));
        }
        let names = ids::snapshot_names(&volume, &request.name)?;
        let unique = ids::is_unique(&request.name);
        let (this, subject) = (self.clone(), format!("{volume}@{}", names[0]));
        self.calls
            .run("CreateSnapshot", &subject, async move {
                let snapshot = this.snapshot(&volume, &names, unique).await?;
                let snapshot = Some(snapshot);
                Ok(CreateSnapshotResponse { snapshot })
            })
            .await
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Answered<DeleteSnapshotResponse> {
        let DeleteSnapshotRequest { snapshot_id, .. } = request.into_inner();
        given(&snapshot_id, "the snapshot's id")?;
        let Ok(snapshot) = ids::snapshot(&snapshot_id) else {
            return Ok(Response::new(DeleteSnapshotResponse {}));
        };
        let this = self.clone();
        self.calls
            .run("DeleteSnapshot", &snapshot_id, async move {
                let gone = this.delete_snapshot_of(&snapshot).await;
                gone.map(|()| DeleteSnapshotResponse {})
            })
            .await
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Answered<ListSnapshotsResponse> {
        let answer = self.snapshots_by_pages(request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    async fn get_snapshot(&self, _: Request<GetSnapshotRequest>) -> Answered<GetSnapshotResponse> {
        Err(Status::unimplemented("ListSnapshots tells of one snapshot"))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Answered<ControllerExpandVolumeResponse> {
        let request = request.into_inner();
        let volume = ids::volume(given(&request.volume_id, "the volume's id")?)?;
        let (this, id) = (self.clone(), request.volume_id.clone());
        self.calls
            .run("ControllerExpandVolume", &id, async move {
                this.expand(&volume, &request).await
            })
            .await
    }

    async fn controller_get_volume(
        &self,
        _: Request<ControllerGetVolumeRequest>,
    ) -> Answered<ControllerGetVolumeResponse> {
        Err(Status::unimplemented(
            "NodeGetVolumeStats tells a volume's condition",
        ))
    }

    async fn controller_modify_volume(
        &self,
        _: Request<ControllerModifyVolumeRequest>,
    ) -> Answered<ControllerModifyVolumeResponse> {
        Err(Status::unimplemented(
            "`quarry volume limit` and `retain` change a volume",
        ))
    }
}
