//! Checks a volume in the store against its checksums and its map, and says what of it is hit.
//!
//! Owns: what is looked at, in which order and in how much memory. Does not own: who may ask for it
//! (`crate::engine`), the rules of the formats (`quarry-objfmt`).
//!
//! What is verified is one head, as it was at the start, and the log from its map on up to where it
//! ended then. A writer that goes on meanwhile does no harm: objects are never changed, and none is
//! deleted while its volume is there. What a host has not sent yet is not in the store and not looked at.
//!
//! The order: head; log, header by header; then the map and the log merged as a reader sees them,
//! leaf by leaf, which says what each chunk is needed for; then the chunks, each once.
//!
//! **Invariants.**
//! - What the map needs of chunks is held for [`REFS_MAX`] entries at most: if there are more, the
//!   map is walked again for the chunks that come next. The log's entries are held as an attach holds them.
//! - Nothing is found wrong that was read right once: what seems damaged is asked for again, as a
//!   reader does.
//! - A map names objects of its own volume and, if that is a clone, of those that it comes from.
//! - The ranges named are what a reader of the store cannot have, no more: what newer data hide is not hit.

mod chunk;
mod counted;
mod findings;
mod log;
mod walk;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{StreamExt, TryStreamExt};
use quarry_objfmt::chunk::CHUNK_SECTORS_MAX;
use quarry_objfmt::head::{Head, Parent, SnapshotRef};
use quarry_objfmt::{ChunkId, DataKeys, Location, SnapName, TenantName, VolumeId, keys};

use self::chunk::{Fault, Ref, check_chunk};
use self::counted::Counted;
use self::findings::Findings;
use self::log::Log;
use self::walk::{Walk, lost_by};
use crate::backend::{HeadCell, HeadError, Unsound};
use crate::control::{ImageRef, VerifyProgress, VerifyReport, VerifySpec, VolumeRef};
use crate::keys::copy_problem;
use crate::store::{Store, StoreError};

/// Entries of the map held at once, over all chunks: 64 MiB of them.
const REFS_MAX: usize = (64 << 20) / size_of::<Ref>();

/// Chunks checked side by side; each takes a header and up to [`chunk::GET_BYTES`] of frames, twice.
const CHUNKS_AT_ONCE: usize = 8;

/// How far a check is, for who looks on.
#[derive(Debug, Default)]
pub struct Progress {
    nodes: AtomicU64,
    chunks: AtomicU64,
    chunks_total: AtomicU64,
    frames: AtomicU64,
    read_bytes: AtomicU64,
    findings: AtomicU64,
}

impl Progress {
    /// The counts now.
    pub fn get(&self) -> VerifyProgress {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        VerifyProgress {
            nodes: get(&self.nodes),
            chunks: get(&self.chunks),
            chunks_total: get(&self.chunks_total),
            frames: get(&self.frames),
            read_bytes: get(&self.read_bytes),
            findings: get(&self.findings),
        }
    }
}

fn add(count: &AtomicU64, by: u64) {
    count.fetch_add(by, Ordering::Relaxed);
}

/// What is being checked.
struct Check {
    store: Counted,
    tenant: TenantName,
    head: Head,
    ancestors: Ancestors,
    deep: bool,
    refs_max: usize,
    progress: Arc<Progress>,
    /// Of an encrypted volume, to read frames with.
    keys: Option<Arc<DataKeys>>,
    /// Whether the usage is looked at too, which no read needs.
    usage: bool,
}

/// Whether the answer says that the object is not as it should be, rather than that the store cannot
/// tell now.
const fn is_damage(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::NotFound { .. } | StoreError::WrongLength { .. } | StoreError::Invalid { .. }
    )
}

/// What the answer says of the object, or of the store.
fn unsound(error: StoreError) -> Unsound {
    if is_damage(&error) {
        Unsound::Damaged(error.to_string())
    } else {
        Unsound::Store(error)
    }
}

/// Checks the volume `id`, or a snapshot of it, which is called `image`; none if there is no such snapshot. With `deep`
/// every frame that a reader may need is read; without, only what names and locates it. A snapshot is
/// checked as a volume with its map and no log.
///
/// # Errors
/// What waiting for the store does not mend: nothing can be said of the volume then.
pub async fn run(
    store: Arc<dyn Store>,
    image: &ImageRef,
    id: VolumeId,
    spec: VerifySpec,
    keys: Option<Arc<DataKeys>>,
    progress: Arc<Progress>,
) -> Result<Option<VerifyReport>, StoreError> {
    run_with(store, image, id, spec, keys, progress, REFS_MAX).await
}

async fn run_with(
    store: Arc<dyn Store>,
    image: &ImageRef,
    id: VolumeId,
    spec: VerifySpec,
    data_keys: Option<Arc<DataKeys>>,
    progress: Arc<Progress>,
    refs_max: usize,
) -> Result<Option<VerifyReport>, StoreError> {
    let store = Counted::new(store, Arc::clone(&progress));
    let mut findings = Findings::new(Arc::clone(&progress));
    let (volume, deep) = (&image.volume, spec.deep);
    let begun = |image: &ImageRef| VerifyReport {
        volume: image.to_string(),
        id: id.to_string(),
        deep,
        ..VerifyReport::default()
    };
    let mut report = begun(image);
    let key = keys::head_key(&volume.tenant, id);
    match read_head(&store, &volume.tenant, id).await? {
        Err(reason) => {
            findings.add(&key, format!("{reason}; the volume cannot be attached"));
        }
        Ok(head) => {
            if let Some(problem) = called_otherwise(&head, volume) {
                findings.add(&key, problem);
            }
            let copy = copy_problem(&store, &volume.tenant, &head).await?;
            if let Some((copy, problem)) = copy {
                // Of a volume whose keys change just now it may be the copy of before.
                let now = read_head(&store, &volume.tenant, id).await?;
                if now.is_ok_and(|now| now.keys == head.keys) {
                    findings.add(&copy, problem);
                }
            }
            let ancestors = Ancestors::find(&store, volume, &head, &mut findings).await?;
            let check = |head| {
                let (store, ancestors) = (store.clone(), ancestors.clone());
                Check {
                    keys: data_keys.clone(),
                    usage: true,
                    ..Check::new(store, volume, head, ancestors, deep, refs_max, &progress)
                }
            };
            if let Some(name) = &image.snapshot {
                let mut all = head.snapshots.iter();
                let Some(snapshot) = all.find(|s| s.name == name.as_str()) else {
                    return Ok(None);
                };
                let check = check(then(&head, snapshot));
                check.all(&mut report, &mut findings).await?;
            } else {
                check(head.clone()).all(&mut report, &mut findings).await?;
                report.snapshots_left_out = head.snapshots.len() as u64;
            }
            if image.snapshot.is_none() && spec.snapshots {
                for snapshot in &head.snapshots {
                    let name = SnapName::new(snapshot.name.clone());
                    let image = ImageRef {
                        snapshot: name.ok(),
                        ..image.clone()
                    };
                    let mut report_of = begun(&image);
                    let mut found = Findings::new(Arc::clone(&progress));
                    let check = check(then(&head, snapshot));
                    check.all(&mut report_of, &mut found).await?;
                    found.tell(&mut report_of);
                    report.snapshots.push(report_of);
                }
                report.snapshots_left_out = 0;
            }
        }
    }
    report.checked = progress.get();
    findings.tell(&mut report);
    Ok(Some(report))
}

/// The head of a volume that is what its snapshot is.
fn then(head: &Head, snapshot: &SnapshotRef) -> Head {
    Head {
        size: snapshot.size,
        root: snapshot.root,
        root_write: snapshot.root_write,
        log: Vec::new(),
        ..head.clone()
    }
}

/// The volumes whose objects a clone's map may name: what it was cloned from, and what that was.
#[derive(Clone, Default, Debug)]
enum Ancestors {
    /// These, which may be none.
    #[default]
    None,
    These(BTreeSet<VolumeId>),
    /// The row of heads is broken: any.
    Unknown,
}

impl Ancestors {
    async fn find(
        store: &Counted,
        volume: &VolumeRef,
        head: &Head,
        findings: &mut Findings,
    ) -> Result<Self, StoreError> {
        let mut found = BTreeSet::new();
        let mut parent = head.parent.clone();
        while let Some(Parent {
            volume: id,
            snapshot,
        }) = parent
        {
            if !found.insert(id) {
                break;
            }
            let key = keys::head_key(&volume.tenant, id);
            let head = match read_head(store, &volume.tenant, id).await? {
                Ok(head) => head,
                Err(reason) => {
                    let problem = "of a volume that this one was cloned from";
                    findings.add(&key, format!("{problem}: {reason}"));
                    return Ok(Self::Unknown);
                }
            };
            if !head.snapshots.iter().any(|s| s.name == snapshot) {
                let problem =
                    format!("snapshot {snapshot}, which this volume was cloned from, is not in it");
                findings.add(&key, problem);
            }
            parent = head.parent;
        }
        Ok(match found.is_empty() {
            true => Self::None,
            false => Self::These(found),
        })
    }

    fn have(&self, volume: VolumeId) -> bool {
        match self {
            Self::None => false,
            Self::These(these) => these.contains(&volume),
            Self::Unknown => true,
        }
    }
}

async fn read_head(
    store: &Counted,
    tenant: &TenantName,
    volume: VolumeId,
) -> Result<Result<Head, String>, StoreError> {
    match HeadCell::read(store, tenant, volume).await {
        Ok((head, _)) => Ok(Ok(head)),
        Err(HeadError::Store(error)) => Err(error),
        Err(HeadError::Damaged { reason, .. }) => Ok(Err(reason)),
        Err(other) => Ok(Err(other.to_string())),
    }
}

/// That a volume's head does not say the name that it was found by.
fn called_otherwise(head: &Head, volume: &VolumeRef) -> Option<String> {
    let is_called = head.tenant == volume.tenant.as_str() && head.name == volume.name.as_str();
    let (tenant, name) = (&head.tenant, &head.name);
    (!is_called).then(|| format!("it says that the volume is called {tenant}/{name}"))
}

/// Checks what a volume would be with this head, which need not be in the store: without reading
/// frames, nor what no read needs.
///
/// # Errors
/// As [`run`].
pub(crate) async fn check_head(
    store: Arc<dyn Store>,
    volume: &VolumeRef,
    head: Head,
) -> Result<VerifyReport, StoreError> {
    let progress = Arc::<Progress>::default();
    let store = Counted::new(store, Arc::clone(&progress));
    let mut findings = Findings::new(Arc::clone(&progress));
    let mut report = VerifyReport::default();
    let ancestors = Ancestors::find(&store, volume, &head, &mut findings).await?;
    let check = Check::new(store, volume, head, ancestors, false, REFS_MAX, &progress);
    check.all(&mut report, &mut findings).await?;
    findings.tell(&mut report);
    Ok(report)
}

/// Walks the map of a head without its log, and gives `each` the chunks that it names, of whichever volume.
/// Answers the first thing wrong with the map, if there is one.
///
/// # Errors
/// As [`run`].
pub(crate) async fn walk_map(
    store: Arc<dyn Store>,
    volume: &VolumeRef,
    head: Head,
    mut each: impl FnMut(ChunkId) + Send,
) -> Result<Option<String>, StoreError> {
    let progress = Arc::<Progress>::default();
    let store = Counted::new(store, Arc::clone(&progress));
    let mut findings = Findings::new(Arc::clone(&progress));
    let ancestors = Ancestors::Unknown;
    let check = Check::new(store, volume, head, ancestors, false, REFS_MAX, &progress);
    if let Some(root) = walk::load_root(&check, &mut findings).await? {
        let mut walk = Walk::new(&check, &root, Vec::new(), true);
        while let Some(entry) = walk.next(&mut findings).await? {
            match entry.location {
                Location::Data(data) if lost_by(&data).is_none() => each(data.chunk),
                _ => {}
            }
        }
    }
    let mut report = VerifyReport::default();
    findings.tell(&mut report);
    let first = report.findings.into_iter().next();
    Ok(first.map(|finding| format!("{}: {}", finding.object, finding.problem)))
}

impl Check {
    fn new(
        store: Counted,
        volume: &VolumeRef,
        head: Head,
        ancestors: Ancestors,
        deep: bool,
        refs_max: usize,
        progress: &Arc<Progress>,
    ) -> Self {
        Self {
            store,
            tenant: volume.tenant.clone(),
            head,
            ancestors,
            deep,
            refs_max,
            progress: Arc::clone(progress),
            keys: None,
            usage: false,
        }
    }

    async fn all(
        &self,
        report: &mut VerifyReport,
        findings: &mut Findings,
    ) -> Result<(), StoreError> {
        report.epoch = Some(self.head.epoch.get());
        let log = log::walk(self, findings).await?;
        (report.next_chunk, report.last_write) = (log.end.get(), log.last_write.get());
        self.map_and_chunks(log, findings).await
    }

    /// The whole volume: what cannot be read if it cannot be attached.
    fn whole(&self) -> (u64, u64) {
        (0, self.head.size.get())
    }

    /// Walks the map, and checks what it names; as often as memory asks for.
    async fn map_and_chunks(&self, log: Log, findings: &mut Findings) -> Result<(), StoreError> {
        let Some(root) = walk::load_root(self, findings).await? else {
            return Ok(());
        };
        let mut from: Option<ChunkId> = None;
        // Once is enough: where one is there are many.
        let (size, mut behind_told) = (log.size.get(), false);
        loop {
            let first_pass = from.is_none();
            let mut walk = Walk::new(self, &root, log.entries.clone(), first_pass);
            let mut batch = Batch::default();
            while let Some(entry) = walk.next(findings).await? {
                let Location::Data(data) = entry.location else {
                    continue;
                };
                let (start, end) = (entry.start.get(), entry.end().get());
                if let Some(finding) = lost_by(&data) {
                    // What is lost of a node behind the end of a volume that was shrunk is nobody's.
                    let inside = end.min(size).saturating_sub(start);
                    if first_pass && inside > 0 {
                        findings.hit(finding, start, inside);
                    }
                    continue;
                }
                if end > size && first_pass && !std::mem::replace(&mut behind_told, true) {
                    let problem = format!(
                        "data lie behind the volume's end, at sector {start} and on, and would come back if it grew"
                    );
                    findings.add(&keys::chunk_key(&self.tenant, data.chunk), problem);
                }
                if from.is_none_or(|from| data.chunk >= from) {
                    batch.push(data.chunk, Ref::new(&entry, &data), self.refs_max);
                }
            }
            let Batch {
                chunks,
                above,
                excess,
                ..
            } = batch;
            if let Some(chunk) = excess {
                let problem = "the map names more of it than a chunk can hold";
                findings.add(&keys::chunk_key(&self.tenant, chunk), problem);
            }
            self.chunks(chunks, findings).await?;
            if above.is_none() {
                return Ok(());
            }
            from = above;
        }
    }

    async fn chunks(
        &self,
        chunks: BTreeMap<ChunkId, Vec<Ref>>,
        findings: &mut Findings,
    ) -> Result<(), StoreError> {
        add(&self.progress.chunks_total, chunks.len() as u64);
        let mut checks = Box::pin(
            futures::stream::iter(chunks)
                .map(|(id, refs)| check_chunk(self, id, refs))
                .buffer_unordered(CHUNKS_AT_ONCE),
        );
        while let Some(faults) = checks.try_next().await? {
            add(&self.progress.chunks, 1);
            for Fault {
                object,
                problem,
                ranges,
            } in faults
            {
                let finding = findings.add(&object, problem);
                for (start, len) in ranges {
                    findings.hit(finding, start, len.into());
                }
            }
        }
        Ok(())
    }
}

/// What the map needs of the chunks that come next, by chunk, within a bound.
#[derive(Default)]
struct Batch {
    chunks: BTreeMap<ChunkId, Vec<Ref>>,
    held: usize,
    /// The first chunk that is left for the next walk.
    above: Option<ChunkId>,
    /// A chunk of which the map names more than it can hold; what is too much was left out.
    excess: Option<ChunkId>,
}

impl Batch {
    fn push(&mut self, chunk: ChunkId, needed: Ref, max: usize) {
        if self.above.is_some_and(|above| chunk >= above) {
            return;
        }
        let refs = self.chunks.entry(chunk).or_default();
        if refs.len() >= CHUNK_SECTORS_MAX as usize {
            self.excess = Some(chunk);
            return;
        }
        refs.push(needed);
        self.held += 1;
        // One chunk always stays, so that each walk gets further.
        while self.held > max && self.chunks.len() > 1 {
            let (last, refs) = self.chunks.pop_last().expect("there are two");
            self.held -= refs.len();
            self.above = Some(last);
        }
    }
}
