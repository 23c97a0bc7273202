//! `quarry doctor`: what is not as it should be around the daemon, and what to change.
//!
//! Each check looks at one thing and says what it found; none mends anything, and what the store's probe writes it deletes.

mod host;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use quarry_config::Size;
use quarry_objfmt::wrapped::cache_key_context;
use quarry_objfmt::{TenantName, VolumeId};

use super::tenants::Site;
use super::{Daemon, cache_key, registry};
use crate::backend::HeadCell;
use crate::control::{ApiError, Check, Kind, Verdict, VolumeRef};
use crate::provision;
use crate::qos::Passage;
use crate::store::{Lane, Store as _, StoreSettings, StoreState};

/// A sync of the cache device that takes longer is told of: each flush waits for one or two.
const SYNC_TIME_MAX: Duration = Duration::from_millis(50);

/// Open files that a daemon should be allowed: connections, devices, journals.
const FILES_MIN: u64 = 65_536;

/// Stores looked at side by side.
const STORES_AT_ONCE: usize = 8;

/// Longest wait for one answer of a store: so that the first that does not come, and the probe's cleaning up after it, are in
/// time to be told.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

/// Longest look at a store.
const STORE_TIME_MAX: Duration = Duration::from_secs(25);

/// Tenants' records read side by side.
const RECORDS_AT_ONCE: usize = 16;

impl Daemon {
    /// Looks at everything, the slow things side by side.
    pub(super) async fn examine(&self) -> Vec<Check> {
        let mut checks = self.examine_stores().await;
        checks.push(self.examine_sync().await);
        checks.push(self.examine_room());
        checks.extend(self.examine_size());
        let folders = &self.config.daemon;
        checks.push(examine_journals(&folders.journal_dir));
        let used = "each volume that is attached has a journal there";
        checks.push(host::examine_room(&folders.journal_dir, used));
        let used = "the list of what is attached is written there, and the audit log if it has no place of its own";
        checks.push(host::examine_room(&folders.data_dir, used));
        checks.push(host::examine_audit(self.access.audit_problem()));
        checks.extend(self.examine_keyring().await);
        checks.push(match self.ublk.probe().await {
            Ok(_) => Check::ok("ublk", "the kernel can"),
            Err(error) => Check::new(
                "ublk",
                Verdict::Warning,
                error.to_string(),
                "volumes are attached by NBD",
            ),
        });
        checks.push(examine_files());
        checks.extend(self.examine_suspended());
        checks.extend(self.examine_volumes().await);
        checks.extend(self.examine_kept().await);
        checks
    }

    /// The daemon's store and those of tenants, each once.
    async fn examine_stores(&self) -> Vec<Check> {
        let known = self.own_sites();
        let home = examine_store(self.home_settings(), self.lane.clone());
        let (home, of_known) = tokio::join!(home, examine_sites(known.clone()));
        let (mut checks, answers) = home;
        checks.extend(of_known);
        if answers {
            checks.extend(self.examine_tenants().await);
            // Those that were not known before.
            let mut learnt = self.own_sites();
            learnt.retain(|site| !known.iter().any(|other| Arc::ptr_eq(site, other)));
            checks.extend(examine_sites(learnt).await);
        }
        checks
    }

    fn own_sites(&self) -> Vec<Arc<Site>> {
        let mut sites = Vec::new();
        self.tenants
            .each_own_site(|site| sites.push(Arc::clone(site)));
        sites
    }

    /// The records of all tenants, whose stores are known then.
    async fn examine_tenants(&self) -> Vec<Check> {
        let reads = async {
            // That the store does not answer is told of it.
            let names = registry::tenant_names(&self.home).await.unwrap_or_default();
            let reads = names.into_iter().map(|name| async move {
                let error = self.read_tenant(&name).await.err()?;
                // Deleted since.
                if error.kind == Kind::NotFound {
                    return None;
                }
                let what = format!("tenant {name}");
                Some(Check::new(
                    what,
                    Verdict::Failed,
                    error.message,
                    error.remedy,
                ))
            });
            let reads = futures::stream::iter(reads).buffered(RECORDS_AT_ONCE);
            reads.collect::<Vec<Option<Check>>>().await
        };
        match tokio::time::timeout(STORE_TIME_MAX, reads).await {
            Ok(read) => read.into_iter().flatten().collect(),
            Err(_) => {
                let finding = format!("not all records were read within {STORE_TIME_MAX:?}");
                let remedy = "see why the store is slow, and look again";
                vec![Check::new("tenants", Verdict::Failed, finding, remedy)]
            }
        }
    }

    fn home_settings(&self) -> StoreSettings {
        StoreSettings::from(&self.config.store)
    }

    async fn examine_sync(&self) -> Check {
        let what = format!("cache {}", self.config.cache_path().display());
        let device = std::sync::Arc::clone(&self.common.device);
        let begun = Instant::now();
        let synced = tokio::task::spawn_blocking(move || device.sync()).await;
        let took = begun.elapsed();
        match synced
            .map_err(std::io::Error::other)
            .and_then(|synced| synced)
        {
            Ok(()) if took <= SYNC_TIME_MAX => Check::ok(what, format!("a sync takes {took:.1?}")),
            Ok(()) => Check::new(
                what,
                Verdict::Warning,
                format!("a sync took {took:.1?}, and flushes wait for it"),
                "put the cache on a device with power-loss protection",
            ),
            Err(error) => Check::new(
                what,
                Verdict::Failed,
                format!("a sync failed: {error}"),
                "mend or replace the device, and start the daemon anew",
            ),
        }
    }

    /// Whether the unsent writes leave room.
    fn examine_room(&self) -> Check {
        let counts = self.shared.lock().cache.counts();
        let what = "cache: room for writes";
        let words = format!(
            "{} of {} segments that may be are dirty",
            counts.dirty, counts.dirty_max
        );
        if counts.dirty < counts.dirty_max {
            return Check::ok(what, words);
        }
        let remedy = "see what `quarry volume list` tells of stores that do not take them";
        Check::new(what, Verdict::Failed, words, remedy)
    }

    /// Whether the cache is as large as it is said to be.
    fn examine_size(&self) -> Option<Check> {
        let words = self.other_cache_size.clone()?;
        let remedy = cache_key::OTHER_SIZE_REMEDY;
        Some(Check::new("cache: size", Verdict::Warning, words, remedy))
    }

    /// Whether the keyring still opens what it opened when it was attached: the next start needs it. Programs and services
    /// are not asked, as each key would be a call.
    async fn examine_keyring(&self) -> Vec<Check> {
        let what = match &self.config.keys.keyring {
            Some(path) => format!("keyring {}", path.display()),
            None => return Vec::new(),
        };
        let failed = |of: String, error: ApiError| {
            let finding = format!("{of}{}", error.message);
            Check::new(what.clone(), Verdict::Failed, finding, error.remedy)
        };
        match self.keys.check_keyring().await {
            None => return Vec::new(),
            Some(Err(error)) => return vec![failed(String::new(), error.into())],
            Some(Ok(())) => {}
        }
        let mut checks = Vec::new();
        if let Some(wrapped) = &self.wrapped_cache_key {
            let context = cache_key_context(self.common.device.id());
            let of = "the key of the cache";
            let opened = self
                .keys
                .unwrap(None, &wrapped.by, &context, &wrapped.bytes, of);
            if let Err(error) = opened.await {
                checks.push(failed("the cache: ".to_owned(), error.into()));
            }
        }
        for (image, attached) in self.attached() {
            let fenced = attached.backend.condition().fenced;
            // What does not write goes by the head that it was attached with: the keys may be others by now.
            if attached.read_only || fenced || image.is_past() || image.snapshot.is_some() {
                continue;
            }
            let head = attached.backend.head().get();
            if let Err(error) = self.unlock(&image.volume.tenant, &head).await {
                checks.push(failed(format!("volume {image}: "), error));
            }
        }
        if checks.is_empty() {
            let finding = "it opens all that is encrypted and in use here";
            checks.push(Check::ok(what, finding));
        }
        checks
    }

    /// Tenants that are suspended, of those with something attached here.
    fn examine_suspended(&self) -> Vec<Check> {
        let mut findings = BTreeMap::new();
        for (image, attached) in self.attached() {
            let finding = match attached.gate.passage() {
                Passage::Open => continue,
                Passage::ReadOnly => "it is suspended, and its volumes take no writes",
                Passage::Stalled => "it is suspended, and requests to its volumes wait",
            };
            findings.insert(image.volume.tenant, finding);
        }
        let check = |(tenant, finding): (TenantName, &str)| {
            let what = format!("tenant {tenant}");
            let remedy = format!("`quarry tenant resume {tenant}` lets it go on");
            Check::new(what, Verdict::Warning, finding, remedy)
        };
        findings.into_iter().map(check).collect()
    }

    /// What is attached here, and what waits to be.
    async fn examine_volumes(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        let attached = self.attached();
        for (image, attached) in &attached {
            let what = format!("volume {image}");
            let remedy = format!("see `quarry volume show {image}`");
            if let Some(problem) = attached.backend.condition().problem {
                checks.push(Check::new(what, Verdict::Failed, problem, remedy));
            } else if self.is_stalled(attached).await {
                let finding = "its writes wait for the store";
                checks.push(Check::new(what, Verdict::Warning, finding, remedy));
            }
        }
        for (image, _) in self.wanted.all() {
            let waits = !attached.iter().any(|(here, _)| *here == image);
            let Some(problem) = self.wanted.problem(&image).filter(|_| waits) else {
                continue;
            };
            checks.push(Check::new(
                format!("volume {image}"),
                Verdict::Failed,
                format!("it waits to be attached again: {problem}"),
                format!("mend that, or give it up with `quarry volume detach {image}`"),
            ));
        }
        if checks.is_empty() {
            let finding = "none that is attached, or waits to be, has a problem";
            checks.push(Check::ok("volumes", finding));
        }
        checks
    }

    /// What the cache keeps unsent of volumes that are not attached here to be written to, nor wait to be.
    async fn examine_kept(&self) -> Vec<Check> {
        let until = tokio::time::Instant::now() + ANSWER_TIME_MAX;
        let looks = self.all_kept().into_iter().map(|(tenant, id)| async move {
            let name = tokio::time::timeout_at(until, self.name_of(&tenant, id)).await;
            let volume = name.ok().flatten();
            let how = volume.clone().and_then(|v| self.wanted.how(&v.into()));
            if how.is_some_and(|how| !how.read_only) {
                return None;
            }
            // Unless somebody has taken it up meanwhile.
            let kept = Size::new(self.kept_bytes(&tenant, id)?);
            let what = match &volume {
                Some(volume) => format!("volume {volume}"),
                None => format!("volume {id} of tenant {tenant}"),
            };
            let keeps =
                format!("the cache keeps up to {kept} written to it that may never have been sent");
            let (finding, remedy) = match volume {
                Some(_) => (
                    format!("it is not attached here, and {keeps}"),
                    "attach it here, which sends them, or says why not",
                ),
                None => (
                    format!("{keeps}, and what it is called cannot be had now"),
                    "unless it waits to be attached again: when its store answers, attach it here",
                ),
            };
            Some(Check::new(what, Verdict::Warning, finding, remedy))
        });
        let looks = futures::stream::iter(looks).buffered(RECORDS_AT_ONCE);
        let looks: Vec<Option<Check>> = looks.collect().await;
        looks.into_iter().flatten().collect()
    }

    /// What a volume is called, if its head can be had.
    async fn name_of(&self, tenant: &TenantName, id: VolumeId) -> Option<VolumeRef> {
        let store = self.control(tenant).await.ok()?;
        let (head, _) = HeadCell::read(&store, tenant, id).await.ok()?;
        VolumeRef::new(tenant.as_str(), head.name.as_str()).ok()
    }
}

async fn examine_sites(sites: Vec<Arc<Site>>) -> Vec<Check> {
    let looks = sites
        .into_iter()
        .map(|site| examine_store(site.settings().clone(), site.lane.clone()));
    let looks = futures::stream::iter(looks).buffered(STORES_AT_ONCE);
    let looks: Vec<(Vec<Check>, bool)> = looks.collect().await;
    looks.into_iter().flat_map(|(checks, _)| checks).collect()
}

/// How a store's requests go, what provisioning would find of it, and whether it answered to the end.
async fn examine_store(settings: StoreSettings, lane: Lane) -> (Vec<Check>, bool) {
    let lane = lane.with_deadline(ANSWER_TIME_MAX);
    let place = lane.describe();
    // Before anything is asked: what is asked here is little, and may be answered where a chunk is refused.
    let before = examine_requests(&lane);
    let mut looks = Vec::new();
    let looking = provision::examine(&settings, &lane, &mut looks);
    let ended = tokio::time::timeout(STORE_TIME_MAX, looking).await;
    let answers = matches!(ended, Ok(ControlFlow::Continue(())));
    // Or while it was asked.
    let meanwhile = || answers.then(|| examine_requests(&lane)).flatten();
    let mut checks: Vec<Check> = before.or_else(meanwhile).into_iter().collect();
    checks.extend(looks.into_iter().map(|(what, found)| {
        let what = format!("store {place}: {what}");
        match found {
            Ok(words) => Check::ok(what, words),
            // Its message says what to do.
            Err(error) => Check::new(what, Verdict::Failed, error.to_string(), ""),
        }
    }));
    if ended.is_err() {
        let finding = format!("it was not looked at to the end within {STORE_TIME_MAX:?}");
        let remedy = "see why it is slow, and look again";
        let what = format!("store {place}");
        checks.push(Check::new(what, Verdict::Failed, finding, remedy));
    }
    (checks, answers)
}

/// What all that asks a store has found of it.
fn examine_requests(lane: &Lane) -> Option<Check> {
    let StoreState::Failing {
        lasting,
        attempts,
        last_error,
    } = lane.health().state()
    else {
        return None;
    };
    Some(Check::new(
        format!("store {}: requests", lane.describe()),
        Verdict::Failed,
        format!("they have been failing for {lasting:.0?}, {attempts} in a row: {last_error}"),
        "mend that; if it is mended, look again",
    ))
}

/// The journals are best in memory: what is in them outlives the daemon only.
fn examine_journals(dir: &Path) -> Check {
    let what = format!("journals {}", dir.display());
    match rustix::fs::statfs(dir) {
        Ok(found) if found.f_type == libc::TMPFS_MAGIC => Check::ok(what, "they are in memory"),
        Ok(_) => Check::new(
            what,
            Verdict::Warning,
            "they are on a disk, which each write touches",
            "set daemon.journal_dir to a folder on a tmpfs, such as /run/quarry/journal",
        ),
        Err(errno) => Check::new(
            what,
            Verdict::Failed,
            std::io::Error::from(errno).to_string(),
            "make the folder, or set daemon.journal_dir",
        ),
    }
}

fn examine_files() -> Check {
    let what = "open files";
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    match most {
        Some(most) if most < FILES_MIN => Check::new(
            what,
            Verdict::Warning,
            format!("the daemon may have {most}"),
            format!("allow {FILES_MIN}: LimitNOFILE= in its unit, or ulimit -n"),
        ),
        Some(most) => Check::ok(what, format!("the daemon may have {most}")),
        None => Check::ok(what, "there is no limit"),
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use async_trait::async_trait;
    use bytes::Bytes;

    use super::*;
    use crate::store::{FolderStore, LaneSettings, Operation, Store, StoreError, Tag};

    /// A store whose disk is all but full; one without a folder hangs.
    #[derive(Debug)]
    struct Ill(Option<FolderStore>);

    /// What it has room for.
    const ROOM: usize = 1024;

    impl Ill {
        async fn folder(&self) -> &FolderStore {
            match &self.0 {
                Some(folder) => folder,
                None => std::future::pending().await,
            }
        }
    }

    #[async_trait]
    impl Store for Ill {
        async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
            self.folder().await.get(key).await
        }
        async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
            self.folder().await.get_range(key, range).await
        }
        async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
            self.folder().await.get_prefix(key, len).await
        }
        async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
            let folder = self.folder().await;
            if body.len() > ROOM {
                return Err(StoreError::Unavailable {
                    operation: Operation::Create,
                    key: key.to_owned(),
                    reason: "no space left".to_owned(),
                });
            }
            folder.create(key, body).await
        }
        async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
            self.folder().await.replace(key, body, seen).await
        }
        async fn delete(&self, key: &str) -> Result<(), StoreError> {
            self.folder().await.delete(key).await
        }
        async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
            self.folder().await.list(prefix).await
        }
        fn describe(&self) -> String {
            "file:///ill".to_owned()
        }
    }

    fn lane(folder: Option<FolderStore>) -> (StoreSettings, Lane) {
        let settings = StoreSettings {
            url: "file:///ill".to_owned(),
            ..StoreSettings::default()
        };
        let lane = Lane::new(Arc::new(Ill(folder)), &LaneSettings::default());
        (settings, lane)
    }

    fn failed(checks: &[Check]) -> Vec<&Check> {
        let failed = checks.iter().filter(|c| c.verdict == Verdict::Failed);
        failed.collect()
    }

    #[tokio::test(start_paused = true)]
    async fn store_that_hangs_is_given_up_at_its_first_check() {
        let (settings, lane) = lane(None);
        let begun = tokio::time::Instant::now();
        let (checks, answers) = examine_store(settings, lane).await;
        assert!(begun.elapsed() <= STORE_TIME_MAX, "{:?}", begun.elapsed());
        assert!(!answers);
        assert_eq!(checks.len(), 1, "{checks:?}");
        assert_eq!(checks[0].verdict, Verdict::Failed);
        assert!(checks[0].finding.contains("no answer within"), "{checks:?}");
    }

    #[tokio::test]
    async fn store_that_takes_what_is_little_and_no_chunk_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let (settings, lane) = lane(Some(FolderStore::open(dir.path(), true).unwrap()));
        let (checks, answers) = examine_store(settings.clone(), lane.clone()).await;
        assert!(answers && failed(&checks).is_empty(), "{checks:?}");

        let upload = lane.with_deadline(Duration::from_millis(50));
        let chunk = Bytes::from(vec![7; 2 * ROOM]);
        upload.create("chunk", chunk).await.unwrap_err();
        let (checks, answers) = examine_store(settings, lane).await;
        assert!(answers);
        let failed = failed(&checks);
        assert_eq!(failed.len(), 1, "{checks:?}");
        assert_eq!(failed[0].what, "store file:///ill: requests");
        assert!(failed[0].finding.contains("no space left"), "{checks:?}");
    }
}
