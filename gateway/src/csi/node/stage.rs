//! Staging: attached, and mounted where a pod is to see a file system.
//!
//! The order: attach; format, if the volume is blank; check; mount; grow the file system to the volume. *Crash in
//! between: the same call goes on, for each step looks whether it is done; but a volume whose formatting was broken
//! off has data and no file system, and is not formatted again: delete it.* What fails is attached no longer if
//! this call attached it, for nobody may ask for its unstaging.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use quarry_objfmt::CacheId;
use tonic::Status;

use super::mounts::{Device, Mounts};
use super::{NodeService, disk, mounts};
use crate::control::{
    AttachOptions, AttachedInfo, ImageRef, Kind, SnapRef, State, Via, VolumeInfo, VolumeRef,
    if_found,
};
use crate::csi::answer::Answer;
use crate::csi::capability::{Access, Fs, Use};
use crate::csi::class::{keeps_unsent, options};
use crate::csi::controller::publish::{NODE, READ_ONLY};
use crate::csi::ids::NodeId;

/// How a volume is to be staged.
pub(super) struct Plan {
    at: PathBuf,
    wish: Use,
    options: AttachOptions,
    /// What this node may not have sent of the volume when it had it before is not given up.
    keeps_unsent: bool,
    /// The node that it was published to, if it was.
    node: Option<NodeId>,
}

impl Plan {
    /// What a request says.
    ///
    /// # Errors
    /// If it is none.
    pub fn of(
        at: PathBuf,
        wish: Use,
        published: &HashMap<String, String>,
        context: &HashMap<String, String>,
    ) -> Answer<Self> {
        let read_only = wish.read_only || published.contains_key(READ_ONLY);
        let node = published.get(NODE).map(|node| NodeId::parse(node));
        Ok(Self {
            at,
            wish,
            options: options(context, read_only)?,
            keeps_unsent: keeps_unsent(context)?,
            node: node.transpose()?,
        })
    }
}

impl NodeService {
    pub(super) async fn stage(&self, volume: &VolumeRef, plan: Plan) -> Answer<()> {
        let info = self.show(volume).await?;
        if let Some(node) = &plan.node {
            self.check_is(node).await?;
        }
        let (attached, ours) = self.attach(volume, &info, &plan).await?;
        let staged = self.mount(volume, &plan, &attached).await;
        if ours && staged.is_err() {
            let image = ImageRef::from(volume.clone());
            let undone = match mounts::unmount(&plan.at).await {
                Ok(()) => match self.client.detach(&image).await {
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.into()),
                },
                Err(status) => Err(status),
            };
            if let Err(status) = undone {
                tracing::warn!(%volume, error = status.message(), "not staged, and attached all the same");
            }
        }
        staged
    }

    /// Refuses to take a volume that was published to another daemon than this: the head would name one that nobody
    /// unpublishes it from.
    async fn check_is(&self, node: &NodeId) -> Answer<()> {
        let status = self.client.status().await?;
        if CacheId::parse(&status.cache.id).is_ok_and(|cache| cache == node.cache) {
            return Ok(());
        }
        let message = format!(
            "the volume was published to {node}, and this node's daemon has another cache: delete the driver's pod here, so that the node is registered anew"
        );
        Err(Status::failed_precondition(message))
    }

    /// Attaches it, or finds it attached as it is to be; answers whether this call did.
    async fn attach(
        &self,
        volume: &VolumeRef,
        info: &VolumeInfo,
        plan: &Plan,
    ) -> Answer<(AttachedInfo, bool)> {
        let options = &plan.options;
        if info.attached.is_some() {
            return fitting(volume, info, options).map(|attached| (attached, false));
        }
        let image = ImageRef::from(volume.clone());
        let mut attached = self.client.attach(&image, options).await;
        if let Err(error) = &attached
            && error.kind == Kind::Conflict
            && !options.read_only
            && !plan.keeps_unsent
            && !self.is_attached(volume).await?
        {
            // Where that is not why it is refused, it is refused again. If it is, the volume was taken from this
            // node and has gone on elsewhere: what the node may not have sent by then was lost to it at that
            // moment, and cannot be put back.
            tracing::warn!(%volume, %error, "attaching it without what this host may not have sent of it before, if that is why");
            let options = AttachOptions {
                discard_unsent: true,
                ..options.clone()
            };
            attached = self.client.attach(&image, &options).await;
        }
        match attached {
            Ok(_) => {
                let info = self.show(volume).await?;
                fitting(volume, &info, options).map(|attached| (attached, true))
            }
            // By the daemon itself, which has just started, or by a call before this one.
            Err(error) if error.kind == Kind::Conflict => {
                let info = self.show(volume).await?;
                match info.attached.is_some() {
                    true => fitting(volume, &info, options).map(|attached| (attached, false)),
                    false => Err(error.into()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn is_attached(&self, volume: &VolumeRef) -> Answer<bool> {
        Ok(self.show(volume).await?.attached.is_some())
    }

    async fn mount(&self, volume: &VolumeRef, plan: &Plan, attached: &AttachedInfo) -> Answer<()> {
        let Access::Mount { fs, flags } = &plan.wish.access else {
            return Ok(());
        };
        let read_only = plan.options.read_only;
        let node = attached.device.as_deref().unwrap_or_default();
        let device = Device::at(Path::new(node))
            .map_err(|error| Status::internal(format!("{node} cannot be looked at: {error}")))?;
        if let Some(mount) = Mounts::read().await?.at(&plan.at) {
            let is_same = mount.is_of(&device)
                && mount.read_only == read_only
                && fs.is_none_or(|fs| fs.as_str() == mount.fs);
            if is_same {
                return Ok(());
            }
            let message = format!("something else is mounted at {}", plan.at.display());
            return Err(Status::already_exists(message));
        }
        let fs = match disk::probe(&device).await? {
            Some(found) => match Fs::named(&found).filter(|named| fs.is_none_or(|fs| fs == *named))
            {
                Some(fs) => fs,
                None => {
                    let wanted = fs.map_or("a file system that is known", Fs::as_str);
                    let message = format!("{volume} has {found} on it, not {wanted}");
                    return Err(Status::failed_precondition(message));
                }
            },
            None if read_only => {
                let message = format!("{volume} has no file system, and is not to be written to");
                return Err(Status::failed_precondition(message));
            }
            None => {
                self.check_is_blank(volume).await?;
                let fs = fs.unwrap_or(Fs::Ext4);
                disk::format(&device, fs).await?;
                fs
            }
        };
        if !read_only {
            disk::check(&device, fs).await?;
        }
        disk::mount(&device, fs, &plan.at, flags, read_only).await?;
        let mount = Mounts::read().await?.at(&plan.at);
        match mount.filter(|mount| mount.is_of(&device)) {
            Some(mount) if !read_only => disk::grow(&device, &mount).await,
            Some(_) => Ok(()),
            None => Err(Status::internal("it was mounted and is not")),
        }
    }

    /// Refuses to format what was ever written to. What the probe did not find may be data all the same: of a
    /// database that has the device to itself, or of a file system whose first blocks were lost. That nothing was
    /// written, the daemon knows.
    async fn check_is_blank(&self, volume: &VolumeRef) -> Answer<()> {
        let info = self.show(volume).await?;
        // An older daemon does not tell the newest write.
        let written = info.newest_write > 0
            || info.stored_bytes > 0
            || info.dirty_bytes > 0
            || info.writes > 0;
        let inherited = match &info.parent {
            None => false,
            Some(parent) => {
                let snapshot: SnapRef = format!("{}@{}", parent.volume, parent.snapshot).parse()?;
                // Not by the number of its newest write: what an unwritten clone has is its parent's.
                !self.client.show_snapshot(&snapshot).await?.blank
            }
        };
        if !written && !inherited {
            return Ok(());
        }
        let message = format!(
            "{volume} has no file system that is known, and was written to: it is not formatted. If that is what a broken off formatting left, delete it; \
             if nothing on it is needed, format /dev/quarry/{volume} by hand"
        );
        Err(Status::failed_precondition(message))
    }

    /// Unmounts it and detaches it, everything sent. `volume`: none if there cannot be one of that id.
    pub(super) async fn unstage(&self, volume: Option<&VolumeRef>, at: &Path) -> Answer<()> {
        mounts::unmount(at).await?;
        let Some(volume) = volume else {
            return Ok(());
        };
        let image = ImageRef::from(volume.clone());
        let Some(info) = if_found(self.client.show_volume(&image).await)? else {
            return Ok(());
        };
        if info.attached.is_none() {
            match (info.state, &info.owner) {
                (State::Detached, Some(_)) => {}
                // It cannot be attached as it was, so its device goes; what was not sent is next.
                (State::Attaching, _) if info.problem.is_some() => {
                    match self.client.detach(&image).await {
                        Err(error) if error.kind != Kind::Conflict => return Err(error.into()),
                        _ => {}
                    }
                }
                (State::Detached | State::AttachedElsewhere | State::Failed, _) => return Ok(()),
                // By the daemon itself, which has just started and may have to send what is written; or to its end.
                _ => {
                    let message = format!("{volume} is {}", info.state.as_str());
                    return Err(Status::aborted(message));
                }
            }
            // It was detached, and not all of its writes could be sent: once more, or whoever has it next has it
            // without them.
            let options = AttachOptions {
                via: Some(Via::Nbd),
                ..AttachOptions::default()
            };
            self.client.attach(&image, &options).await?;
        }
        if_found(self.client.detach(&image).await)?;
        Ok(())
    }
}

/// How it is attached, if that is as it is to be.
fn fitting(volume: &VolumeRef, info: &VolumeInfo, options: &AttachOptions) -> Answer<AttachedInfo> {
    let Some(attached) = info.attached.clone() else {
        return Err(Status::unavailable(format!(
            "{volume} is not attached any more"
        )));
    };
    let refuse = |why: String| Err(Status::failed_precondition(format!("{volume} {why}")));
    if info.state != State::Attached {
        let problem = info.problem.as_deref().unwrap_or_default();
        return refuse(format!("is {}: {problem}", info.state.as_str()));
    }
    if attached.device.is_none() {
        return refuse("is attached by NBD: detach it".to_owned());
    }
    if attached.read_only != options.read_only {
        let how = if attached.read_only {
            "reading only"
        } else {
            "writing"
        };
        let message = format!("{volume} is attached for {how}");
        return Err(Status::already_exists(message));
    }
    Ok(attached)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn attached_volume_fits_if_it_is_a_device_in_order_and_as_writable_as_is_asked() {
        let volume = VolumeRef::new("acme", "db").unwrap();
        let attached = AttachedInfo {
            device: Some("/dev/ublkb0".to_owned()),
            ..AttachedInfo::default()
        };
        let mut info = VolumeInfo {
            state: State::Attached,
            attached: Some(attached),
            ..VolumeInfo::default()
        };
        let fits = |info: &VolumeInfo, read_only| {
            let options = options(&HashMap::new(), read_only).unwrap();
            fitting(&volume, info, &options).map_err(|status| status.code())
        };
        assert!(fits(&info, false).is_ok());
        assert_eq!(fits(&info, true), Err(Code::AlreadyExists));
        info.state = State::Fenced;
        assert_eq!(fits(&info, false), Err(Code::FailedPrecondition));
        info.state = State::Attached;
        info.attached.as_mut().unwrap().device = None;
        assert_eq!(fits(&info, false), Err(Code::FailedPrecondition));
    }
}
