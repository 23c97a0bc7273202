//! Publishing: the staged volume at a pod's path.

use std::path::Path;

use tonic::Status;

use super::mounts::{self, Mounts};
use super::{NodeService, device};
use crate::control::VolumeRef;
use crate::csi::answer::Answer;
use crate::csi::capability::{Access, Use};

impl NodeService {
    /// The mount appears whole, with `read_only` or without: *crash before: a folder or file without anything on
    /// it, which the same call takes; after: it is published.*
    pub(super) async fn publish(
        &self,
        volume: &VolumeRef,
        staged: &Path,
        target: &Path,
        wish: &Use,
        read_only: bool,
    ) -> Answer<()> {
        let Some((attached, device)) = device(&self.show(volume).await?) else {
            let message = format!("{volume} is not attached here: stage it first");
            return Err(Status::failed_precondition(message));
        };
        let is_block = wish.access == Access::Block;
        if is_block && read_only && !attached.read_only {
            let message = format!(
                "{volume} is attached for writing, and a device of it takes writes wherever it is: publish it for reading"
            );
            return Err(Status::failed_precondition(message));
        }
        let mounts = Mounts::read().await?;
        if !is_block && !mounts.at(staged).is_some_and(|m| m.is_of(&device)) {
            let message = format!("{volume} is not staged at {}", staged.display());
            return Err(Status::failed_precondition(message));
        }
        if let Some(there) = mounts.at(target) {
            let is_same = match is_block {
                true => there.is_node_of(&device),
                false => {
                    there.is_of(&device) && there.read_only == (read_only || attached.read_only)
                }
            };
            if is_same {
                return Ok(());
            }
            let message = format!("{} is something else already", target.display());
            return Err(Status::already_exists(message));
        }
        if !wish.many_places && mounts.is_elsewhere(&device, staged) {
            let message = format!("{volume} is published to another path, and may be to one only");
            return Err(Status::failed_precondition(message));
        }
        mounts::make(target, is_block).await?;
        match is_block {
            true => mounts::bind(device.node(), target, false).await,
            false => mounts::bind(staged, target, read_only).await,
        }
    }
}
