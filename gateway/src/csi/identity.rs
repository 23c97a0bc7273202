//! The identity service: what the driver is and can do, and whether it can now.

use quarry_csi_proto::v1::identity_server::Identity;
use quarry_csi_proto::v1::plugin_capability::{
    Service, Type, VolumeExpansion, service, volume_expansion,
};
use quarry_csi_proto::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, PluginCapability, ProbeRequest, ProbeResponse,
};
use tonic::{Request, Response};

use super::DRIVER;
use super::answer::Answered;
use crate::control::{Client, Kind};

/// The service.
pub(super) struct IdentityService {
    pub client: Client,
    /// Whether volumes and nodes have places.
    pub has_topology: bool,
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Answered<GetPluginInfoResponse> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..GetPluginInfoResponse::default()
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Answered<GetPluginCapabilitiesResponse> {
        let service = |r#type: service::Type| {
            Type::Service(Service {
                r#type: r#type.into(),
            })
        };
        let online = VolumeExpansion {
            r#type: volume_expansion::Type::Online.into(),
        };
        let mut types = vec![
            service(service::Type::ControllerService),
            Type::VolumeExpansion(online),
        ];
        if self.has_topology {
            types.push(service(service::Type::VolumeAccessibilityConstraints));
        }
        let capability = |r#type| PluginCapability {
            r#type: Some(r#type),
        };
        Ok(Response::new(GetPluginCapabilitiesResponse {
            capabilities: types.into_iter().map(capability).collect(),
        }))
    }

    /// A daemon that is not there is no reason to start the plugin anew, which is what the liveness probe does with one
    /// that says it is not ready: a formatting that waits for that daemon would be cut off. Calls say what is wrong.
    async fn probe(&self, _: Request<ProbeRequest>) -> Answered<ProbeResponse> {
        match self.client.reach().await {
            Err(error) if error.kind != Kind::Unavailable => {
                Err(tonic::Status::failed_precondition(error.to_string()))
            }
            _ => Ok(Response::new(ProbeResponse { ready: Some(true) })),
        }
    }
}
