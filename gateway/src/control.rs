//! The control plane: an HTTP/JSON API on a unix socket, and the client that the command line is.
//!
//! Owns the API's words ([`dto`]), its errors ([`ApiError`]), its routes, the socket's life and the
//! limits on what a client may send. Does not own what the calls do: that is the [`Engine`]'s.
//!
//! Invariants:
//! - a call that changes something runs to its end even if the client hangs up meanwhile;
//! - an engine never sees a tenant's or volume's name, or a geometry, that the rules forbid;
//! - nobody reaches an endpoint but through the table of them ([`endpoints`]) and the guard before each;
//! - one daemon a socket: a lock beside it, held for the daemon's life, decides, not the socket file;
//! - the TCP listener without tokens answers health and metrics, and to its own host what the status page shows.

pub mod access;
mod activity;
mod api;
mod chores;
pub mod client;
mod doctor;
pub mod dto;
mod endpoints;
mod error;
mod name;
mod network;
mod openapi;
mod page;
mod permissions;
mod rates;
mod rekey;
mod release;
mod retain;
mod serve;
mod socket;
mod status_page;
mod tenant;
mod token;
mod trash;
mod warm;

#[cfg(test)]
pub(crate) mod fake;

use async_trait::async_trait;
use quarry_objfmt::{Suspended, TenantName, VolumeName};

pub use access::Access;
pub use activity::{Activity, TimesInfo, VolumeActivity};
pub(crate) use api::place_of;
pub use chores::{CompactSpec, MoveReport};
pub use client::Client;
pub use doctor::{Check, DoctorReport, Verdict};
pub use dto::{
    AttachInfo, AttachOptions, AttachedInfo, ByteRange, CacheStatus, DetachInfo, Finding,
    LogRangeInfo, OwnerInfo, ParentInfo, RescueReport, RescueSpec, ResizeInfo, ResizeSpec,
    SegmentsInfo, SnapshotInfo, State, StatusInfo, StoreStatus, VerifyProgress, VerifyReport,
    VerifySpec, Via, VolumeInfo, VolumeList, VolumeSpec,
};
pub use endpoints::routes;
pub(crate) use error::if_found;
pub use error::{ApiError, Kind, Problem};
pub use name::{ImageRef, SnapRef, VolumeRef};
pub use network::Network;
pub use page::Page;
pub use permissions::{DeviceMode, DeviceOwner};
pub use rates::{LimitsInfo, RatesInfo, RatesSpec};
pub use rekey::{DataKeyInfo, RekeyInfo, RekeySpec};
pub use release::{ReleaseInfo, ReleaseSpec};
pub use retain::{RetainInfo, RetainSpec};
pub use serve::{ListenError, Listeners, serve};
pub use socket::{ControlSocket, SocketError};
pub use tenant::{
    StoreRequests, SuspendSpec, TenantInfo, TenantList, TenantSpec, TenantUsage, patched,
};
pub use token::{TokenInfo, TokenList, TokenMade, TokenRole, TokenSpec};
pub use trash::{PurgeReport, PurgeSpec, RestoreSpec, TrashInfo, TrashList, TrashRef};
pub use warm::{EvictInfo, WarmReport, WarmSpec};

/// What an [`Engine`] answers.
pub type ApiResult<T> = Result<T, ApiError>;

/// What the daemon can do for its operator. Names and geometry are checked before they get here.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// Makes a tenant, whose store is found fit first; [`Kind::Exists`] if there is one.
    async fn create_tenant(&self, spec: TenantSpec) -> ApiResult<TenantInfo>;
    /// All tenants, by name.
    async fn list_tenants(&self) -> ApiResult<Vec<TenantInfo>>;
    /// A tenant, with what it has.
    async fn show_tenant(&self, tenant: &TenantName) -> ApiResult<TenantInfo>;
    /// Changes what a tenant may have, as [`patched`] says; [`Kind::Conflict`] if its store is to be another while it
    /// has something in it.
    async fn update_tenant(
        &self,
        tenant: &TenantName,
        patch: &serde_json::Map<String, serde_json::Value>,
    ) -> ApiResult<TenantInfo>;
    /// Holds a tenant's volumes up, or lets them go on.
    async fn suspend_tenant(
        &self,
        tenant: &TenantName,
        how: Option<Suspended>,
    ) -> ApiResult<TenantInfo>;
    /// Removes a tenant, and purges its trash if `purge`; [`Kind::Conflict`] while it has volumes, or
    /// trash that is to stay.
    async fn delete_tenant(&self, tenant: &TenantName, purge: bool) -> ApiResult<()>;
    /// Makes a volume that reads as zeroes; [`Kind::Exists`] if there is one of that name.
    async fn create_volume(&self, spec: VolumeSpec) -> ApiResult<VolumeInfo>;
    /// All volumes, of one tenant if one is named, by tenant and name.
    async fn list_volumes(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<VolumeInfo>>;
    /// A page of these, and where the next one begins; while a store does not answer, of what is known without it.
    async fn page_of_volumes(
        &self,
        tenant: Option<&TenantName>,
        page: &Page,
    ) -> ApiResult<VolumeList> {
        let all = self.list_volumes(tenant).await?;
        let (volumes, next) = page.cut(all, |volume| place_of(&volume.image()));
        Ok(VolumeList {
            volumes,
            next,
            incomplete: None,
        })
    }
    /// One volume, or a snapshot, or the volume as it was at a time, as that is attached here.
    async fn show_volume(&self, image: &ImageRef) -> ApiResult<VolumeInfo>;
    /// Makes a volume usable on this host, or a snapshot, or what it was at a time, readable; answers when it
    /// is.
    async fn attach(&self, image: &ImageRef, options: AttachOptions) -> ApiResult<AttachInfo>;
    /// Takes a volume off this host, everything uploaded first; of one that was fenced it says what could not be.
    async fn detach(&self, image: &ImageRef) -> ApiResult<DetachInfo>;
    /// Gives a volume another size, for good, and shows a larger one to whoever uses the volume here;
    /// [`Kind::Conflict`] if it is somebody else's, or if the size is smaller and the volume attached or
    /// `force` not set. A size that the volume's own sector size forbids is the engine's to refuse.
    async fn resize(&self, volume: &VolumeRef, spec: ResizeSpec) -> ApiResult<ResizeInfo>;
    /// Sets how long what a volume needs no more is kept; [`Kind::Conflict`] if it is somebody else's.
    async fn retain(&self, volume: &VolumeRef, retain_ms: u64) -> ApiResult<RetainInfo>;
    /// Sets how fast a volume may be used, whoever has it: at once if it is attached here.
    async fn set_rates(&self, volume: &VolumeRef, rates: RatesSpec) -> ApiResult<RatesInfo>;
    /// Wraps the data keys of a volume anew; [`Kind::Conflict`] if it is somebody else's or not encrypted.
    async fn rekey(&self, volume: &VolumeRef, spec: &RekeySpec) -> ApiResult<RekeyInfo>;
    /// Takes the right to write from the host with this cache, and gives it to nobody; [`Kind::Conflict`] if another
    /// host has it, or this one.
    async fn release(&self, volume: &VolumeRef, spec: ReleaseSpec) -> ApiResult<ReleaseInfo>;
    /// Answers when all that was acknowledged before the call is in the object store.
    async fn sync(&self, volume: &VolumeRef) -> ApiResult<()>;
    /// Checks a volume or a snapshot in the store, attached or not; what is wrong is in the answer. Ends
    /// early when its caller goes away. [`Kind::Conflict`] while it is being checked already.
    async fn verify(&self, image: &ImageRef, spec: VerifySpec) -> ApiResult<VerifyReport>;
    /// How far the check under way is; [`Kind::NotFound`] if there is none.
    async fn verify_progress(&self, image: &ImageRef) -> ApiResult<VerifyProgress>;
    /// Makes a lost or damaged head anew from the volume's other objects, or says what it would be;
    /// [`Kind::Conflict`] if the head is sound or the volume attached here.
    async fn rescue(&self, volume: &VolumeRef, spec: RescueSpec) -> ApiResult<RescueReport>;
    /// Gives the state of a volume, with all that was acknowledged before the call, a name;
    /// [`Kind::Conflict`] if another host has the volume.
    async fn create_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo>;
    /// The snapshots of a volume, or all, by volume and age.
    async fn list_snapshots(&self, volume: Option<&VolumeRef>) -> ApiResult<Vec<SnapshotInfo>>;
    /// One snapshot, with the volumes that were cloned from it.
    async fn show_snapshot(&self, snapshot: &SnapRef) -> ApiResult<SnapshotInfo>;
    /// Takes a snapshot's name away; [`Kind::Conflict`] while it has clones, is attached here, or another
    /// host has the volume.
    async fn delete_snapshot(&self, snapshot: &SnapRef) -> ApiResult<()>;
    /// Makes a volume of the same tenant that starts as the snapshot is; the snapshot's volume is not
    /// touched, whoever has it.
    async fn clone_snapshot(&self, snapshot: &SnapRef, name: &VolumeName) -> ApiResult<VolumeInfo>;
    /// Makes a detached volume what its snapshot is; what was written since is lost, the snapshots stay.
    async fn rollback(&self, snapshot: &SnapRef) -> ApiResult<VolumeInfo>;
    /// Fetches what the cache lacks of an attached volume into it. Ends early when its caller goes away.
    /// [`Kind::Conflict`] while it is being warmed already.
    async fn warm(&self, volume: &VolumeRef, spec: &WarmSpec) -> ApiResult<WarmReport>;
    /// Puts the data of an attached volume in the order of addresses; ends where it is when it is not waited
    /// for any more.
    async fn compact(&self, volume: &VolumeRef, spec: &CompactSpec) -> ApiResult<MoveReport>;
    /// Makes an attached clone need nothing of its parent; [`Kind::Conflict`] if it is no clone, or has
    /// snapshots.
    async fn flatten(&self, volume: &VolumeRef) -> ApiResult<MoveReport>;
    /// How far the compacting or flattening under way is; [`Kind::NotFound`] if there is none.
    async fn move_progress(&self, volume: &VolumeRef) -> ApiResult<MoveReport>;
    /// How far the warming under way is; [`Kind::NotFound`] if there is none.
    async fn warm_progress(&self, volume: &VolumeRef) -> ApiResult<WarmReport>;
    /// Drops what this host's cache has of a volume and the store has too.
    async fn evict(&self, volume: &VolumeRef) -> ApiResult<EvictInfo>;
    /// Puts a volume into the trash; [`Kind::Conflict`] while it is attached or has clones, or while this
    /// host's cache may hold writes that the store lacks, unless they are to be given up.
    async fn delete_volume(&self, volume: &VolumeRef, discard_unsent: bool)
    -> ApiResult<TrashInfo>;
    /// What is in the trash, of one tenant if one is named.
    async fn list_trash(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<TrashInfo>>;
    /// Brings a volume back from the trash, under another name if one is given.
    async fn restore(&self, which: &TrashRef, name: Option<&VolumeName>) -> ApiResult<VolumeInfo>;
    /// Deletes volumes of the trash and their data for ever; answers when that is done.
    async fn purge_trash(&self, spec: &PurgeSpec) -> ApiResult<PurgeReport>;
    /// Looks for what is not as it should be around the daemon.
    async fn doctor(&self) -> ApiResult<DoctorReport>;
    /// How the daemon does.
    async fn status(&self) -> ApiResult<StatusInfo>;
    /// What goes on; of one tenant, and nothing of the daemon, if one is named.
    async fn activity(&self, tenant: Option<&TenantName>) -> ApiResult<Activity>;
    /// Whether the daemon can serve; if not, why, in words that end a sentence begun "not ready:".
    async fn ready(&self) -> Result<(), String>;
    /// All metrics in Prometheus' text format.
    async fn metrics_text(&self) -> String;
}
