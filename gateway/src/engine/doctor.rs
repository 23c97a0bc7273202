//! `quarry doctor`: what is not as it should be around the daemon, and what to change.
//!
//! Each check looks at one thing and says what it found; none mends anything, and what the store's probe writes it deletes.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::StreamExt as _;

use super::{CONTROL_DEADLINE, Daemon, registry};
use crate::control::{Check, Verdict};
use crate::provision;
use crate::store::{Lane, Store as _, StoreSettings};

/// A sync of the cache device that takes longer is told of: each flush waits for one or two.
const SYNC_TIME_MAX: Duration = Duration::from_millis(50);

/// Open files that a daemon should be allowed: connections, devices, journals.
const FILES_MIN: u64 = 65_536;

/// Stores looked at side by side.
const STORES_AT_ONCE: usize = 8;

impl Daemon {
    /// Looks at everything, the slow things side by side.
    pub(super) async fn examine(&self) -> Vec<Check> {
        let mut checks = self.examine_stores().await;
        checks.push(self.examine_sync().await);
        checks.push(self.examine_room());
        checks.push(examine_journals(&self.config.daemon.journal_dir));
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
        checks.extend(self.examine_volumes());
        checks
    }

    /// The daemon's store and those of tenants, each once.
    async fn examine_stores(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        let names = registry::tenant_names(&self.home).await.unwrap_or_default();
        for name in &names {
            // So that it is known; what is wrong with its store is told below, or here.
            if let Err(error) = self.tenant(name).await {
                let what = format!("tenant {name}");
                let remedy = error.remedy.clone();
                checks.push(Check::new(what, Verdict::Failed, error.message, remedy));
            }
        }
        let mut sites = vec![(self.home_settings(), self.home.clone())];
        self.tenants.each_own_site(|site| {
            let lane = site.lane.with_deadline(CONTROL_DEADLINE);
            sites.push((site.settings().clone(), lane));
        });
        let looks = sites
            .into_iter()
            .map(|(settings, lane)| examine_store(settings, lane));
        let looks = futures::stream::iter(looks).buffered(STORES_AT_ONCE);
        let looks: Vec<Vec<Check>> = looks.collect().await;
        checks.extend(looks.into_iter().flatten());
        checks
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

    fn examine_volumes(&self) -> Vec<Check> {
        let failing = self.attached().into_iter().filter_map(|(image, attached)| {
            let problem = attached.backend.condition().problem?;
            let remedy = format!("see `quarry volume show {image}`");
            Some(Check::new(
                format!("volume {image}"),
                Verdict::Failed,
                problem,
                remedy,
            ))
        });
        let mut checks: Vec<Check> = failing.collect();
        if checks.is_empty() {
            checks.push(Check::ok("volumes", "none that is attached has a problem"));
        }
        checks
    }
}

/// What provisioning would find of a store.
async fn examine_store(settings: StoreSettings, lane: Lane) -> Vec<Check> {
    let place = lane.describe();
    let looks = provision::examine(&settings, &lane).await.into_iter();
    let told = looks.map(|(what, found)| {
        let what = format!("store {place}: {what}");
        match found {
            Ok(words) => Check::ok(what, words),
            // Its message says what to do.
            Err(error) => Check::new(what, Verdict::Failed, error.to_string(), ""),
        }
    });
    told.collect()
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
