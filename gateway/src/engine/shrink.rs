//! Shrinking a volume that is attached nowhere: the steps and their order.
//!
//! 1. The volume is attached without a front end, with what the cache kept of it. *Crash, here and up to step 3: it
//!    stays this host's and as large as it was, and the next attach or resize here goes on; others need `--force`.*
//! 2. What lies behind the new end is discarded, as by a user, and that is brought into the store's log. *Crash:
//!    it is as it was, or reads as zeroes.*
//! 3. `head`, by a conditional PUT: the size. *Crash: the volume is as small as it is to be; a call for the same size
//!    does the rest.*
//! 4. It is detached: the discard is folded into the map, which says the new size for a rescue.
//!
//! So whatever ever makes the volume larger again, on whichever host, finds zeroes behind the old end: the head
//! has the smaller size only after the log has the discard. Snapshots keep their size and what they need.
//!
//! An attached volume is not shrunk: a file system or a database that has the device open counts on what lies behind
//! the new end, and a connected NBD client cannot be told.

use quarry_config::Size;
use quarry_objfmt::head::Head;
use quarry_objfmt::{Lba, LbaRange, Owner, Sectors};
use quarry_volume::{IoError, Op};
use tokio::sync::oneshot;

use super::attach::After;
use super::resize::{HEAD_WAIT_MAX, resized};
use super::slot::{Attached, Slot, Stage};
use super::{Daemon, registry};
use crate::backend::open::OpenError;
use crate::control::dto::check_size;
use crate::control::{ApiError, ApiResult, AttachOptions, ImageRef, Kind, ResizeInfo, VolumeRef};
use crate::reactor::Message;
use crate::reactor::frontend::{Buffer, FrontEnd, Port};

/// A volume that is attached keeps its size or grows.
pub(super) fn refuse_attached(volume: &VolumeRef, has: Sectors, size_bytes: u64) -> ApiError {
    let message = format!(
        "{volume} has {} and cannot shrink to {} while it is attached: who has it open counts on what lies behind that, and \
         NBD clients cannot be told",
        Size::new(has.bytes()),
        Size::new(size_bytes)
    );
    let remedy =
        "shrink what is on it, detach it, and resize it with --force; or choose a larger size";
    ApiError::new(Kind::Conflict, message, remedy)
}

/// What a size that is smaller costs, if that was not agreed to.
fn refuse_unasked(volume: &VolumeRef, has: Sectors, size_bytes: u64) -> ApiError {
    let message = format!(
        "{volume} has {}: to shrink it to {} cuts off its last {}, and what is there is lost",
        Size::new(has.bytes()),
        Size::new(size_bytes),
        Size::new(has.bytes() - size_bytes)
    );
    let remedy = "shrink what is on it first, then say --force; a snapshot made before keeps it all; or choose a larger size";
    ApiError::new(Kind::Conflict, message, remedy)
}

impl Daemon {
    /// Makes a volume smaller that is attached nowhere. The caller holds the slot's `change`.
    pub(super) async fn shrink_detached(
        &self,
        slot: &Slot,
        volume: &VolumeRef,
        head: &Head,
        size_bytes: u64,
        force: bool,
    ) -> ApiResult<ResizeInfo> {
        check_size(size_bytes, head.sector_size)?;
        let size = Sectors::from_bytes(size_bytes).expect("whole blocks are whole sectors");
        if head.deleted().is_some() {
            return Err(OpenError::Deleted.into());
        }
        let elsewhere = |o: &&Owner| o.cache != self.common.device.id();
        if let Some(owner) = head.owner.as_ref().filter(elsewhere) {
            let message = format!("{volume} is attached by host {}", owner.shown_host());
            let remedy =
                "detach it there, or, if that host is lost, attach it here with --force first";
            return Err(ApiError::new(Kind::Conflict, message, remedy));
        }
        let image = ImageRef::from(volume.clone());
        // Waited for since the start: a device of it may have been left, with users.
        if self.wanted.contains(&image) {
            return Err(refuse_attached(volume, head.size, size_bytes));
        }
        if !force {
            return Err(refuse_unasked(volume, head.size, size_bytes));
        }
        // Step 1.
        slot.set(Stage::Attaching);
        let served = self.serve(&image, &AttachOptions::default()).await;
        let opening = served.inspect_err(|_| slot.set(Stage::Detached))?;
        let attached = self.without_front_end(&image, &opening);
        // Rates and a suspension are for users, and there are none.
        attached.gate.set_leaving(true);
        let shrunk = self.cut_off(volume, &attached, size).await;
        // Step 4.
        match self.let_go(&attached, After::GiveBack).await {
            Ok(_) => slot.set(Stage::Detached),
            Err(error) => {
                slot.set(Stage::Attached(std::sync::Arc::new(attached)));
                return Err(error);
            }
        }
        shrunk.map(|()| resized(volume, size_bytes, None))
    }

    /// Steps 2 and 3.
    async fn cut_off(
        &self,
        volume: &VolumeRef,
        attached: &Attached,
        size: Sectors,
    ) -> ApiResult<()> {
        let backend = &attached.backend;
        // As it is now that it is ours: somebody may have been quicker.
        let has = backend.head().get().size;
        let tail = LbaRange {
            start: Lba::new(size.get()),
            end: Lba::new(has.get()),
        };
        let stuck = |why: &str| {
            let problem = backend.condition().problem;
            let why = problem.as_deref().unwrap_or(why);
            let message = format!(
                "{volume} has its size still, and what lies behind the new end may be lost: {why}"
            );
            ApiError::new(Kind::Conflict, message, "resize it once more")
        };
        if tail.start < tail.end {
            let (reactor, key) = backend.place();
            let (done, answer) = oneshot::channel();
            let errand = Discard {
                range: tail,
                done: Some(done),
            };
            let front_end = Box::new(errand);
            reactor
                .send(Message::AddFrontEnd { key, front_end })
                .await?;
            match answer.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(stuck(&error.to_string())),
                Err(_) => return Err(stuck("it is not served")),
            }
        }
        if !backend.drain(false).await {
            return Err(stuck("its writes cannot be sent"));
        }
        if has == size {
            return Ok(());
        }
        let store = self.control(&volume.tenant).await?;
        let smaller = backend.head().update(&store, |head| head.size = size);
        let smaller = registry::in_time(volume, HEAD_WAIT_MAX, smaller).await?;
        smaller
            .map(drop)
            .map_err(|error| registry::head_error(volume, &error))
    }
}

/// Discards a range, and is over.
struct Discard {
    range: LbaRange,
    done: Option<oneshot::Sender<Result<(), IoError>>>,
}

impl FrontEnd for Discard {
    fn start(&mut self, port: &mut Port<'_>) {
        port.request(Op::Discard, self.range, Buffer::NONE, 0);
    }

    fn op_done(&mut self, _tag: u32, _result: i32, _flags: u32, _port: &mut Port<'_>) {}

    fn request_done(&mut self, _tag: u32, result: Result<(), IoError>, _port: &mut Port<'_>) {
        if let Some(done) = self.done.take() {
            // Nobody listens if the caller gave up.
            let _ = done.send(result);
        }
    }

    fn stop(&mut self, _port: &mut Port<'_>) {}

    fn is_finished(&self) -> bool {
        self.done.is_none()
    }
}
