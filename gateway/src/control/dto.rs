//! What goes over the wire: requests refuse fields they do not know, answers gain fields freely.
//!
//! Sizes and counts are bytes unless the name says otherwise; `…_ms` in a point of time is Unix
//! time, else a span.

use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use quarry_objfmt::{
    Compression, Durability, Encryption, KeyName, Sectors, SnapName, TenantName,
    VOLUME_SECTORS_MAX, VolumeId, VolumeName,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::openapi::{CompressionWord, DurabilityWord, EncryptionWord, Name, Uuid};
use super::page::listed;
use super::rates::{LimitsInfo, RatesSpec};
use super::rekey::DataKeyInfo;
use super::retain::check_retain;
use super::tenant::StoreRequests;
use super::{ApiError, ApiResult, DeviceMode, DeviceOwner, ImageRef, VolumeRef};
use crate::ublk::QUEUES_MAX;

/// Largest volume: 1 EiB.
pub const VOLUME_BYTES_MAX: u64 = Sectors::new(VOLUME_SECTORS_MAX).bytes();
/// The logical block sizes there are.
pub const SECTOR_SIZES: [u32; 2] = [512, 4096];

/// How the host reaches an attached volume.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    Debug,
    Default,
    Serialize,
    Deserialize,
    JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// A block device, /dev/ublkbN.
    #[default]
    Ublk,
    /// A network block device on a unix socket.
    Nbd,
}

impl Via {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
        }
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Request: make a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    /// Whose.
    #[schemars(with = "Name")]
    pub tenant: TenantName,
    /// Its name.
    #[schemars(with = "Name")]
    pub name: VolumeName,
    /// Its size; a multiple of the sector size.
    pub size_bytes: u64,
    /// Its logical block size.
    #[serde(default = "default_sector_size")]
    pub sector_size: u32,
    /// What a flush promises.
    #[serde(default)]
    #[schemars(with = "DurabilityWord")]
    pub durability: Durability,
    /// How its data are compressed.
    #[serde(default)]
    #[schemars(with = "CompressionWord")]
    pub compression: Compression,
    /// How long what it needs no more is kept.
    #[serde(default, skip_serializing_if = "is_default")]
    pub retain_ms: u64,
    /// How fast it may be used.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rates: RatesSpec,
    /// The key that wraps its data key; none: the tenant's, if that has one.
    #[schemars(with = "Option<Name>")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyName>,
    /// Do not encrypt it, though the tenant has a key.
    #[serde(default, skip_serializing_if = "is_default")]
    pub no_encryption: bool,
}

/// What is left out of a request: a daemon that does not know it yet takes the request all the same.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

const fn default_sector_size() -> u32 {
    512
}

impl VolumeSpec {
    /// Its two names as one.
    #[must_use]
    pub fn volume(&self) -> VolumeRef {
        VolumeRef {
            tenant: self.tenant.clone(),
            name: self.name.clone(),
        }
    }

    /// Whether `found` is what it would make.
    pub(super) fn is_of(&self, found: &VolumeInfo) -> bool {
        self.size_bytes == found.size_bytes
            && self.sector_size == found.sector_size
            && self.durability == found.durability
            && self.compression == found.compression
            && self.retain_ms == found.retain_ms
            && self.rates == found.rates
            && !(self.no_encryption && found.key.is_some())
            && (self.key.as_ref()).is_none_or(|key| found.key.as_deref() == Some(key.as_str()))
            && found.parent.is_none()
    }

    /// Refuses geometry that no volume has.
    pub(super) fn check(&self) -> ApiResult<()> {
        if !SECTOR_SIZES.contains(&self.sector_size) {
            let message = format!("a sector size of {} is not supported", self.sector_size);
            return Err(ApiError::invalid(message, "use 512 or 4096"));
        }
        check_retain(self.retain_ms)?;
        self.rates.check()?;
        if self.key.is_some() && self.no_encryption {
            let message = "a volume that is not encrypted has no key";
            return Err(ApiError::invalid(message, "leave one of the two out"));
        }
        check_size(self.size_bytes, self.sector_size)
    }
}

/// Refuses a size that no volume of this sector size has.
pub(crate) fn check_size(size_bytes: u64, sector_size: u32) -> ApiResult<()> {
    if size_bytes == 0 || size_bytes > VOLUME_BYTES_MAX {
        let message = format!("a volume of {size_bytes} bytes cannot be made");
        return Err(ApiError::invalid(
            message,
            "choose a size from one sector to 1EiB",
        ));
    }
    if !size_bytes.is_multiple_of(u64::from(sector_size)) {
        let message = format!("{size_bytes} bytes are not whole sectors of {sector_size} bytes");
        return Err(ApiError::invalid(
            message,
            "choose a multiple of the sector size",
        ));
    }
    Ok(())
}

/// Request: change a volume's size.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeSpec {
    /// Its new size; a multiple of its sector size.
    pub size_bytes: u64,
    /// Take a size that is smaller: what lies behind it is lost.
    #[serde(default, skip_serializing_if = "is_default")]
    pub force: bool,
}

/// Answer: a volume's new size.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct ResizeInfo {
    /// `tenant/name`.
    pub volume: String,
    /// What it has now.
    pub size_bytes: u64,
    /// What is left to be done until all who use it see that, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Request: check a volume in the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VerifySpec {
    /// Read every byte that the volume needs, not only what names it.
    pub deep: bool,
    /// Check each of its snapshots too.
    #[serde(skip_serializing_if = "is_default")]
    pub snapshots: bool,
}

/// Request: make a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotSpec {
    /// Its name.
    #[schemars(with = "Name")]
    pub name: SnapName,
}

/// Request: make a volume that starts as a snapshot is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneSpec {
    /// What it is to be called.
    #[schemars(with = "Name")]
    pub name: VolumeName,
}

/// A snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SnapshotInfo {
    /// `tenant/name` of its volume.
    pub volume: String,
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created_ms: u64,
    /// How large its volume was.
    pub size_bytes: u64,
    /// Bytes in the store that are kept for its sake alone, and go when it is deleted; none if that is not known.
    pub unique_bytes: Option<u64>,
    /// The number of the newest write in it.
    pub newest_write: u64,
    /// Neither its volume nor what that was cloned from was ever written to when it was made.
    #[serde(default)]
    pub blank: bool,
    /// Its deletion was begun and not finished: nothing can be made of it any more.
    pub deleting: bool,
    /// The volumes that were cloned from it; none if that was not looked for.
    pub clones: Option<Vec<String>>,
    /// How it is attached here.
    pub attached: Option<AttachedInfo>,
}

/// Answer: snapshots.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotList {
    /// By volume and age.
    pub snapshots: Vec<SnapshotInfo>,
    /// What to ask for the next page after; none: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

listed!(SnapshotList, snapshots);

/// A run of a volume's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct ByteRange {
    /// The first.
    pub start: u64,
    /// The one behind the last.
    pub end: u64,
}

/// Something wrong with an object.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Finding {
    /// Its key in the store.
    pub object: String,
    /// What is wrong, in a sentence.
    pub problem: String,
    /// What of the volume cannot be read for it, in order; none: nothing that reads need.
    pub ranges: Vec<ByteRange>,
    /// How many more ranges there are.
    pub ranges_left_out: u64,
}

/// How far a check of a volume is. Totals grow while the map is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VerifyProgress {
    /// Nodes of the map read.
    pub nodes: u64,
    /// Chunks checked.
    pub chunks: u64,
    /// Chunks known so far.
    pub chunks_total: u64,
    /// Frames read and decoded.
    pub frames: u64,
    /// Bytes read from the store.
    pub read_bytes: u64,
    /// Findings so far.
    pub findings: u64,
}

/// Answer: what a check of a volume found.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VerifyReport {
    /// `tenant/name`, or `tenant/name@snapshot`.
    pub volume: String,
    /// Its id.
    pub id: String,
    /// Whether every byte was read.
    pub deep: bool,
    /// The term of the head that was verified; none if it cannot be read.
    pub epoch: Option<u32>,
    /// The number of the chunk that would have come next in the log.
    pub next_chunk: u64,
    /// The newest write in the store.
    pub last_write: u64,
    /// What was looked at.
    pub checked: VerifyProgress,
    /// What is wrong, by object; as many as are listed.
    pub findings: Vec<Finding>,
    /// How many more findings there are.
    pub findings_left_out: u64,
    /// What of the volume cannot be read, in order, merged.
    pub unreadable: Vec<ByteRange>,
    /// How many more such ranges there are.
    pub unreadable_left_out: u64,
    /// All that cannot be read.
    pub unreadable_bytes: u64,
    /// The same of its snapshots, if that was asked for.
    pub snapshots: Vec<VerifyReport>,
    /// How many snapshots it has that were not looked at.
    pub snapshots_left_out: u64,
}

/// Request: make a lost or damaged head of a volume anew.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RescueSpec {
    /// Its id, if its name is lost too.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Uuid>")]
    pub id: Option<VolumeId>,
    /// Write the head; without, nothing changes.
    pub apply: bool,
    /// What the head alone said: its size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Its logical block size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sector_size: Option<u32>,
    /// What a flush promises.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<DurabilityWord>")]
    pub durability: Option<Durability>,
    /// How its data are compressed from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<CompressionWord>")]
    pub compression: Option<Compression>,
}

/// A run of a volume's log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LogRangeInfo {
    /// The writer's term.
    pub epoch: u32,
    /// The number of its first chunk.
    pub first: u64,
    /// The number behind its last.
    pub end: u64,
}

/// Answer: what a head made anew says, or would say.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RescueReport {
    /// `tenant/name`.
    pub volume: String,
    /// Its id.
    pub id: String,
    /// What is wrong with the head that is there.
    pub lost: String,
    /// Its epoch: far above all that were found.
    pub epoch: u32,
    /// The map object that it starts from; none: the log from its first chunk on.
    pub map: Option<String>,
    /// Newer map objects that it cannot start from, and why; as many as are listed.
    pub passed_over: Vec<Finding>,
    /// The log after that map.
    pub log: Vec<LogRangeInfo>,
    /// Why the log ends where it does.
    pub log_ends: String,
    /// Chunks and seals behind the log's end, which the volume goes on without.
    pub left_behind: u64,
    /// The newest write in it.
    pub last_write: u64,
    /// Bytes that the volume has at least.
    pub size_min_bytes: u64,
    /// Flags that it cannot be written without: what they say is in no other object.
    pub needs: Vec<String>,
    /// Its snapshots that are whole.
    pub snapshots: Vec<String>,
    /// Its data keys, from their newest copy that is whole; 0 if it is not encrypted.
    pub keys: u64,
    /// What it was cloned from.
    pub parent: Option<String>,
    /// Whether it is written.
    pub applied: bool,
}

/// What a volume is doing, seen from this host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub enum State {
    /// Nobody uses it.
    #[default]
    #[serde(rename = "detached")]
    Detached,
    /// It is being attached here, or waits for that since the daemon's start; if it cannot be, `problem` says why.
    #[serde(rename = "attaching")]
    Attaching,
    /// It is in use here.
    #[serde(rename = "attached")]
    Attached,
    /// It is being detached here.
    #[serde(rename = "detaching")]
    Detaching,
    /// Another host uses it.
    #[serde(rename = "attached elsewhere")]
    AttachedElsewhere,
    /// It was in use here until another host took it over.
    #[serde(rename = "fenced")]
    Fenced,
    /// It cannot be used; `problem` says why.
    #[serde(rename = "failed")]
    Failed,
    /// It cannot be told, and `problem` says why; or a state that this client does not know.
    #[serde(other, rename = "unknown")]
    Unknown,
}

impl State {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Detached => "detached",
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
            Self::AttachedElsewhere => "attached elsewhere",
            Self::Fenced => "fenced",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

/// How a volume is attached here.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct AttachedInfo {
    /// By what.
    pub via: Via,
    /// The block device, if one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The link that names the block device for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// The NBD address, if one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    /// How data pass between the kernel and the cache, such as "zero copy".
    #[serde(default)]
    pub mode: String,
    /// ublk: queues of the device.
    #[serde(default)]
    pub queues: u16,
    /// What its device or its export shows of the volume: less than all of it after it has grown and
    /// the kernel could not be told.
    #[serde(default)]
    pub size_bytes: u64,
    /// The writer's term.
    #[serde(default)]
    pub epoch: u32,
    /// When it was attached.
    #[serde(default)]
    pub since_ms: u64,
    /// Whether it takes no writes.
    #[serde(default)]
    pub read_only: bool,
    /// Whose the block device was to be, if that was said: `USER` or `USER:GROUP`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_owner: Option<String>,
    /// Who was to use it, if that was said: an octal mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_mode: Option<String>,
    /// Whether what the cache lacks is received straight into requests' pages.
    #[serde(default)]
    pub direct_reads: bool,
    /// Why it is not, though it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_reads_refused: Option<String>,
}

/// Who may write to a volume.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct OwnerInfo {
    /// The host's name.
    pub host: String,
    /// Its cache's id.
    pub cache: String,
    /// Since when.
    #[serde(default)]
    pub since_ms: u64,
}

/// The snapshot that a volume was cloned from.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ParentInfo {
    /// `tenant/name` of its volume, or that volume's id if its name cannot be had.
    pub volume: String,
    /// Its name.
    pub snapshot: String,
}

/// A volume, or a snapshot as it is attached. The counters are of this attachment, and 0 when it is not attached here.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VolumeInfo {
    /// Whose.
    pub tenant: String,
    /// Its name.
    pub name: String,
    /// The snapshot, or the time, if it is of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Its id, for ever.
    pub id: String,
    /// When it was made.
    pub created_ms: u64,
    /// Its size.
    pub size_bytes: u64,
    /// Its logical block size.
    pub sector_size: u32,
    /// What a flush promises.
    #[schemars(with = "DurabilityWord")]
    pub durability: Durability,
    /// How its data are compressed.
    #[schemars(with = "CompressionWord")]
    pub compression: Compression,
    /// How fast it may be used, wherever it is attached.
    pub rates: RatesSpec,
    /// What limits do to it here.
    pub limits: Option<LimitsInfo>,
    /// How its data are encrypted in the store.
    #[schemars(with = "EncryptionWord")]
    pub encryption: Encryption,
    /// The key that wraps its data key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Its data keys: more than one after `rekey --data`, until nothing is encrypted with the earlier ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_keys: Vec<DataKeyInfo>,
    /// What it was cloned from.
    pub parent: Option<ParentInfo>,
    /// How many snapshots it has.
    pub snapshots: u64,
    /// How long what it needs no more is kept.
    pub retain_ms: u64,
    /// What it is doing.
    pub state: State,
    /// How it is attached here.
    pub attached: Option<AttachedInfo>,
    /// Who may write to it.
    pub owner: Option<OwnerInfo>,
    /// The number of its newest write; 0: it was never written to. Of one that is not attached here, of the newest in its map.
    pub newest_write: u64,
    /// Writes that the store does not have yet.
    pub dirty_bytes: u64,
    /// Age of the oldest write that the store does not have yet: what losing the host now costs.
    pub rpo_ms: u64,
    /// Of one that is not attached here to be written to: bytes at most that this host's cache keeps of what was written here
    /// and may never have been sent; none if it keeps nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_bytes: Option<u64>,
    /// Its data on the cache device.
    pub cached_bytes: u64,
    /// Its chunks in the store.
    pub stored_bytes: u64,
    /// Data that it needs there, before compression, as of the last count.
    pub live_bytes: u64,
    /// Data there that it does not need, before compression, in chunks that it needs a part of.
    pub debt_bytes: u64,
    /// Objects that nobody needs, and that are deleted when the horizon and the retention have passed.
    pub dead_bytes: u64,
    /// Objects that only snapshots need.
    pub pinned_bytes: u64,
    /// Bytes of chunks that compaction has uploaded since it was attached.
    pub compacted_bytes: u64,
    /// Bytes of objects deleted since it was attached.
    pub deleted_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
    /// Bytes read from the cache.
    pub hit_bytes: u64,
    /// Bytes read from the store.
    pub miss_bytes: u64,
    /// Bytes of requests that passed through the daemon's memory: all of NBD's, and of ublk's those
    /// that missed or could not go without a copy.
    pub copied_bytes: u64,
    /// Bytes received from the store straight into requests' pages.
    pub direct_bytes: u64,
    /// Reads that were to be received so, and came the ordinary way.
    pub direct_fallbacks: u64,
    /// Share of bytes read that the cache had; none before the first read.
    pub hit_ratio: Option<f64>,
    /// Bytes of chunks uploaded.
    pub uploaded_bytes: u64,
    /// Whether writes wait for the store.
    pub stalled: bool,
    /// What was asked of the store for it since it was attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<StoreRequests>,
    /// What is wrong with it, in a sentence.
    pub problem: Option<String>,
}

impl VolumeInfo {
    /// `tenant/name`, or `tenant/name@snapshot`.
    #[must_use]
    pub fn image(&self) -> String {
        let snapshot = self.snapshot.as_ref().map(|s| format!("@{s}"));
        format!(
            "{}/{}{}",
            self.tenant,
            self.name,
            snapshot.unwrap_or_default()
        )
    }
}

/// Answer: volumes.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct VolumeList {
    /// By tenant and name.
    pub volumes: Vec<VolumeInfo>,
    /// What to ask for the next page after; none: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// Why some may be missing: of a store that does not answer only what is attached on this host, or waits to be, is listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incomplete: Option<String>,
}

impl super::page::Listed for VolumeList {
    fn next(&mut self) -> Option<String> {
        self.next.take()
    }

    fn append(&mut self, mut page: Self) {
        self.volumes.append(&mut page.volumes);
        self.next = page.next;
        self.incomplete = self.incomplete.take().or(page.incomplete);
    }
}

/// Request: attach a volume.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AttachOptions {
    /// By what; none: ublk where the kernel has it, else NBD.
    pub via: Option<Via>,
    /// Take it over from the host that has it.
    pub force: bool,
    /// Give up writes that this host's cache has and the store does not.
    pub discard_unsent: bool,
    /// Give up writes that this host's cache has, where they come after one that the cache device has lost, or may have lost when
    /// a sync of it failed.
    pub discard_lost: bool,
    /// Take no writes.
    pub read_only: bool,
    /// ublk: queues of the device, from 1 to 16; none: 1.
    pub queues: Option<u16>,
    /// ublk: whose the block device is to be; none: as the kernel or udev has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub device_owner: Option<DeviceOwner>,
    /// ublk: the block device's permission bits; none: as the kernel or udev has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub device_mode: Option<DeviceMode>,
    /// Receive what the cache lacks straight into requests' pages, unverified, where that is possible.
    pub direct_reads: bool,
    /// As it was before the daemon's start, by itself: only if the volume is this host's still. None of the API's.
    #[serde(skip)]
    #[schemars(skip)]
    pub again: bool,
    /// It stays this host's if it cannot be attached now: a device of it may wait here. None of the API's.
    #[serde(skip)]
    #[schemars(skip)]
    pub stays: bool,
}

impl AttachOptions {
    /// Whether it says anything that only a block device can have.
    #[must_use]
    pub fn wants_a_device(&self) -> bool {
        self.queues.is_some() || self.device_owner.is_some() || self.device_mode.is_some()
    }

    /// Refuses what no device has, and what cannot be had together.
    pub(super) fn check(&self) -> ApiResult<()> {
        if self.via == Some(Via::Nbd) && self.wants_a_device() {
            return Err(ApiError::invalid(
                "there is no block device by NBD that could have an owner, a mode or queues",
                "leave --owner, --mode and --queues out, or use --via ublk",
            ));
        }
        match self.queues {
            Some(queues) if queues == 0 || queues > QUEUES_MAX => {
                let message = format!("a device of {queues} queues cannot be made");
                let remedy = format!("choose from 1 to {QUEUES_MAX}");
                Err(ApiError::invalid(message, remedy))
            }
            _ => Ok(()),
        }
    }
}

/// Answer: where an attached volume is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
pub struct AttachInfo {
    /// `tenant/name`, or `tenant/name@snapshot`.
    pub volume: String,
    /// By what.
    pub via: Via,
    /// ublk: the block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// ublk: the link that names it for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// NBD: the address, such as `nbd+unix:///acme/db?socket=/run/quarry/quarry-nbd.sock`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    /// What was asked for and is not so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

impl AttachInfo {
    /// A volume that is a block device.
    #[must_use]
    pub fn ublk(volume: &ImageRef, device: impl Into<String>, link: Option<String>) -> Self {
        Self {
            volume: volume.to_string(),
            via: Via::Ublk,
            device: Some(device.into()),
            link,
            uri: None,
            warning: None,
        }
    }

    /// A volume that is exported on the NBD server's unix socket.
    #[must_use]
    pub fn nbd(volume: &ImageRef, socket: &Path) -> Self {
        let uri = format!("nbd+unix:///{volume}?socket={}", escaped(socket));
        Self {
            volume: volume.to_string(),
            via: Via::Nbd,
            device: None,
            link: None,
            uri: Some(uri),
            warning: None,
        }
    }
}

/// Answer: a volume was detached, and not all of it was sent; there is no answer where all was.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
pub struct DetachInfo {
    /// `tenant/name`, or `tenant/name@snapshot`.
    pub volume: String,
    /// Bytes written here that were not sent, as somebody else has the volume now. They stay in this host's cache, and the next
    /// attach here is refused until it is told to give them up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsent_bytes: Option<u64>,
}

impl DetachInfo {
    /// A volume that is detached.
    #[must_use]
    pub fn new(volume: &ImageRef, unsent_bytes: Option<u64>) -> Self {
        Self {
            volume: volume.to_string(),
            unsent_bytes,
        }
    }
}

/// A path as the value in a URL's query; slashes stay, which both sides allow and people can read.
fn escaped(path: &Path) -> String {
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'~' | b'-' => {
                text.push(char::from(*byte))
            }
            _ => text += &format!("%{byte:02X}"),
        }
    }
    text
}

/// The object store, as the daemon sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct StoreStatus {
    /// Its URL.
    pub url: String,
    /// Whether the last call succeeded.
    pub healthy: bool,
    /// For how long calls have been failing.
    pub failing_ms: Option<u64>,
    /// Why the last one failed.
    pub last_error: Option<String>,
}

/// The cache device.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct CacheStatus {
    /// Where it is.
    pub path: String,
    /// Its id.
    pub id: String,
    /// Its size.
    pub size_bytes: u64,
    /// Writes that the store does not have yet.
    pub dirty_bytes: u64,
    /// How much that may be.
    pub dirty_max_bytes: u64,
    /// Data that the store has too.
    pub clean_bytes: u64,
    /// Whether the data on it are encrypted.
    pub encrypted: bool,
    /// Size of a segment.
    pub segment_bytes: u64,
    /// Its segments.
    pub segments: SegmentsInfo,
}

/// Segments of the cache device by state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SegmentsInfo {
    /// Nothing is in them.
    pub free: u64,
    /// Written or being written, and the store lacks something of them.
    pub dirty: u64,
    /// What was fetched is put into them.
    pub filling: u64,
    /// The store has all of them too.
    pub clean: u64,
}

/// How the daemon does.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct StatusInfo {
    /// Its version.
    pub version: String,
    /// The host's name.
    pub host: String,
    /// Its process.
    pub pid: u32,
    /// Since when it runs.
    pub started_ms: u64,
    /// Whether it can serve.
    pub ready: bool,
    /// Why it cannot.
    pub not_ready: Option<String>,
    /// The object store.
    pub store: StoreStatus,
    /// Stores of tenants' own that do not answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tenant_stores: Vec<StoreStatus>,
    /// Calls to the stores under way.
    pub store_calls: u64,
    /// Calls to the stores that wait for a place.
    pub store_calls_waiting: u64,
    /// Chunks being uploaded.
    pub uploads: u64,
    /// Chunks that wait for that.
    pub uploads_waiting: u64,
    /// The cache device.
    pub cache: CacheStatus,
    /// Volumes attached here.
    pub volumes_attached: u64,
    /// What is to be attached here and is not yet.
    pub volumes_waiting: u64,
    /// Of those, how many have a problem.
    pub volumes_failing: u64,
    /// What the kernel's ublk can do, or why there is none.
    pub ublk: String,
    /// The NBD server's unix socket.
    pub nbd_socket: String,
    /// Why the audit log cannot be written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit_problem: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(text: &str) -> ImageRef {
        text.parse().unwrap()
    }

    fn spec(json: &str) -> Result<VolumeSpec, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn spec_with_a_size_alone_gets_the_defaults() {
        let spec = spec(r#"{"tenant":"acme","name":"db","size_bytes":1048576}"#).unwrap();
        assert_eq!(
            (spec.sector_size, spec.durability, spec.compression),
            (512, Durability::Local, Compression::Lz4)
        );
        spec.check().unwrap();
    }

    #[test]
    fn spec_with_an_unknown_field_is_refused() {
        assert!(spec(r#"{"tenant":"acme","name":"db","size_bytes":1,"shape":"round"}"#).is_err());
    }

    #[test]
    fn spec_with_impossible_geometry_is_refused() {
        check_size(VOLUME_BYTES_MAX, 4096).unwrap();
        for (size_bytes, sector_size) in [
            (0, 512),
            (513, 512),
            (512, 4096),
            (512, 520),
            ((1 << 60) + 4096, 4096),
        ] {
            let spec = VolumeSpec {
                tenant: "t".parse().unwrap(),
                name: "v".parse().unwrap(),
                size_bytes,
                sector_size,
                durability: Durability::Local,
                compression: Compression::Lz4,
                retain_ms: 0,
                rates: RatesSpec::default(),
                key: None,
                no_encryption: false,
            };
            assert!(spec.check().is_err(), "{size_bytes} {sector_size}");
        }
    }

    #[test]
    fn list_with_an_incomplete_page_is_incomplete() {
        use crate::control::page::Listed as _;

        let mut list = VolumeList::default();
        list.append(VolumeList {
            incomplete: Some("no store".to_owned()),
            ..VolumeList::default()
        });
        list.append(VolumeList::default());
        assert_eq!(list.incomplete.as_deref(), Some("no store"));
        let whole = serde_json::to_value(VolumeList::default()).unwrap();
        assert_eq!(whole, serde_json::json!({ "volumes": [] }));
    }

    #[test]
    fn attach_info_has_the_fields_of_its_kind_only() {
        let nbd = serde_json::to_value(AttachInfo::nbd(
            &volume("acme/db"),
            Path::new("/run/n.sock"),
        ))
        .unwrap();
        let expected = serde_json::json!({
            "volume": "acme/db", "via": "nbd", "uri": "nbd+unix:///acme/db?socket=/run/n.sock"
        });
        assert_eq!(nbd, expected);
        let ublk = serde_json::to_value(AttachInfo::ublk(
            &volume("a/b"),
            "/dev/ublkb0",
            Some("/dev/quarry/a/b".to_owned()),
        ));
        let expected = serde_json::json!({
            "volume": "a/b", "via": "ublk", "device": "/dev/ublkb0", "link": "/dev/quarry/a/b"
        });
        assert_eq!(ublk.unwrap(), expected);
    }

    #[test]
    fn nbd_address_with_an_odd_socket_path_is_escaped() {
        let info = AttachInfo::nbd(&volume("a/b"), Path::new("/my dir/50%&.sock"));
        assert_eq!(
            info.uri.unwrap(),
            "nbd+unix:///a/b?socket=/my%20dir/50%25%26.sock"
        );
    }

    #[test]
    fn words_are_the_same_in_json_and_in_text() {
        for (state, word) in [
            (State::AttachedElsewhere, "attached elsewhere"),
            (State::Fenced, "fenced"),
        ] {
            assert_eq!(serde_json::to_value(state).unwrap(), word);
            assert_eq!(state.as_str(), word);
        }
        assert_eq!(
            serde_json::from_str::<State>("\"molten\"").unwrap(),
            State::Unknown
        );
        assert_eq!(
            serde_json::to_value(Via::Ublk).unwrap(),
            Via::Ublk.to_string()
        );
    }
}
