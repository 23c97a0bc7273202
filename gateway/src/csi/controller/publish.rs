//! Which node has a volume.
//!
//! The head of a volume names its owner, the host that may write to it: that is who has it published. A node takes
//! it when it stages it, and gives it back when it unstages it, everything sent. Kubernetes publishes a volume of
//! one writer to another node only after it has unpublished it from the one before: after that node has unstaged
//! it, or when it gives the node up (`out-of-service`, or no answer for its time). In that case the head still
//! names the node here, and the volume is taken from it: first in peace, if its daemon can be asked and nobody has
//! the device open; or else what it has acknowledged so far is sent, if that can be, and the volume's epoch is
//! raised. The next node that attaches it ends the log there: from then on the store takes no write from the node
//! before, whatever it still runs, and that node's writes fail.
//!
//! *Crash between these: what is detached is detached, and a raised epoch is one PUT; the call is made again.*

use std::collections::HashMap;
use std::time::Duration;

use quarry_csi_proto::v1::ControllerPublishVolumeResponse;
use tonic::Status;

use super::ControllerService;
use crate::control::{Client, ImageRef, ReleaseSpec, VolumeRef, if_found};
use crate::csi::answer::Answer;
use crate::csi::capability::Use;
use crate::csi::ids::NodeId;

/// How long a node that is given up may take to give its volume back, and then to send what it has.
const PEACE_TIME_MAX: Duration = Duration::from_secs(15);

/// Names in the context that a node gets.
pub(in crate::csi) const NODE: &str = "node";
pub(in crate::csi) const READ_ONLY: &str = "readOnly";

impl ControllerService {
    pub(super) async fn publish(
        &self,
        volume: &VolumeRef,
        node: &str,
        asked: &Use,
        read_only: bool,
    ) -> Answer<ControllerPublishVolumeResponse> {
        let info = self.show(volume).await?;
        let id = NodeId::parse(node)?;
        let owner = info.owner.as_ref().and_then(NodeId::owner);
        match owner {
            Some(owner) if owner.cache == id.cache && read_only => {
                let message = format!("{volume} is published to {owner} for writing");
                return Err(Status::already_exists(message));
            }
            Some(owner) if owner.cache != id.cache && !asked.many_nodes => {
                let message = format!(
                    "{volume} is published to {owner}; if that host is lost and Kubernetes does not know that it had the volume: \
                     quarry volume release {volume} --from {}",
                    owner.cache
                );
                return Err(Status::failed_precondition(message));
            }
            _ => {}
        }
        let mut publish_context = HashMap::from([(NODE.to_owned(), id.to_string())]);
        if read_only {
            publish_context.insert(READ_ONLY.to_owned(), true.to_string());
        }
        Ok(ControllerPublishVolumeResponse { publish_context })
    }

    /// `node` may be empty, which means whichever has it.
    pub(super) async fn unpublish(&self, volume: &VolumeRef, node: &str) -> Answer<()> {
        let Some(info) = self.there(volume).await? else {
            return Ok(());
        };
        let owner = info.owner.as_ref().and_then(NodeId::owner);
        let named = match node {
            "" => owner.clone(),
            // An id that cannot be one is no node that has it.
            node => NodeId::parse(node).ok(),
        };
        let Some(node) = named else {
            return Ok(());
        };
        // As far as this daemon knows, which may have had the volume itself and not know yet that another has it.
        if owner.is_some_and(|owner| owner.cache == node.cache) {
            tracing::warn!(%volume, %node, "the node did not give the volume back: it is taken from it");
            if let Some(daemon) = self.at_owner(&info)? {
                in_peace(&daemon, volume).await;
            }
        }
        // Whatever came of that: who detaches need not have reached the store, which alone knows whose it is.
        let spec = ReleaseSpec { from: node.cache };
        if_found(self.client.release(volume, spec).await)?;
        Ok(())
    }
}

/// Has the daemon give the volume back; or, where somebody uses it, send what was written.
async fn in_peace(daemon: &Client, volume: &VolumeRef) {
    let image = ImageRef::from(volume.clone());
    match tokio::time::timeout(PEACE_TIME_MAX, daemon.detach(&image)).await {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => tracing::warn!(%volume, %error, "it is not given back"),
        Err(_) => {
            tracing::warn!(%volume, "it is not given back in time");
            return;
        }
    }
    match tokio::time::timeout(PEACE_TIME_MAX, daemon.sync(volume)).await {
        Ok(Ok(())) => tracing::info!(%volume, "what was written to it so far is in the store"),
        Ok(Err(error)) => tracing::warn!(%volume, %error, "what was not sent yet is lost to it"),
        Err(_) => tracing::warn!(%volume, "what is not sent by now is lost to it"),
    }
}
