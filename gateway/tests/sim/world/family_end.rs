//! The end of a family: what was left half done is finished, all is read once more when nothing that is not
//! needed is left, and then all is deleted.

use std::time::Duration;

use quarry_objfmt::{Epoch, MapSeq, keys};
use tokio::time::sleep;

use super::World;
use super::life::AHEAD_MS;
use crate::host::{Ask, HORIZON};
use crate::life::{GRACE_MS, Stage};
use crate::outcome::Deed;

/// By then everything that was ever sent has arrived.
const SETTLED: Duration = Duration::from_millis(GRACE_MS);

/// Longer than dead objects are kept, and than it takes to look for them.
const RECLAIMED: Duration = Duration::from_secs(HORIZON.as_secs() + 70);

/// The parts of a long wait.
const PART: Duration = Duration::from_secs(10);

impl World {
    /// Whether no daemon is asked for anything.
    pub(super) fn is_uncalled(&self) -> bool {
        let mut daemons = self.hosts.iter().filter_map(|host| host.daemon.as_ref());
        daemons.all(|daemon| daemon.calls.is_empty())
    }

    /// All go on for so long, with nothing asked of them.
    pub(super) async fn wait(&mut self, time: Duration) {
        let mut left = time;
        while !left.is_zero() {
            let part = left.min(PART);
            sleep(part).await;
            left -= part;
            for _ in 0..20 {
                self.work(20);
                self.go_on().await;
                sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// Host 0 is asked, and answers.
    async fn ask(&mut self, n: usize, ask: Ask) {
        let ahead_ms = match &ask {
            Ask::Unmake(name) => {
                self.truths[n].life.unmaking.insert(name.clone());
                AHEAD_MS
            }
            // What was begun is given up.
            Ask::Purge => AHEAD_MS,
            _ => 0,
        };
        self.call(0, n, ask, ahead_ms);
        self.until("a call is answered", |world| world.is_uncalled())
            .await;
    }

    /// What was begun is ended: nothing is half deleted, and no cache keeps anything of what is deleted.
    pub(super) async fn finish_lives(&mut self) {
        self.wait(SETTLED).await;
        for truth in &mut self.truths {
            // Whoever looks for them finds them.
            truth.life.hidden = false;
        }
        for n in 0..self.truths.len() {
            let life = &self.truths[n].life;
            if matches!(life.stage, Stage::InTrash { .. }) && n % 2 == 0 {
                self.ask(n, Ask::Restore).await;
            }
            if self.truths[n].life.stage == Stage::Purging {
                self.ask(n, Ask::Purge).await;
            }
        }
        for h in 0..self.hosts.len() {
            // A start finds them again.
            if self.hosts[h]
                .daemon
                .as_ref()
                .is_some_and(|d| d.is_unsettled())
            {
                self.dies(h);
                self.start(h);
            }
            for n in 0..self.truths.len() {
                let id = self.truths[n].id;
                if !self.truths[n].life.is_there() {
                    self.hosts[h].forget(id);
                }
            }
        }
    }

    /// With everything deleted that nobody needs, all is read once more.
    pub(super) async fn read_lives(&mut self) {
        self.visit(0, RECLAIMED).await;
        // It is given back.
        self.wait(PART).await;
        for n in 0..self.truths.len() {
            let life = &self.truths[n].life;
            let closing = life
                .snaps
                .iter()
                .filter(|(_, snap)| snap.closing && !snap.gone);
            let closing: Vec<String> = closing.map(|(name, _)| name.clone()).collect();
            if !life.is_there() {
                continue;
            }
            for name in closing {
                self.ask(n, Ask::Unmake(name)).await;
            }
        }
        let before = self.core.outcome.deeds.of(Deed::SnapshotRead as usize);
        let mut read = 0;
        for n in 0..self.truths.len() {
            let life = &self.truths[n].life;
            if !life.is_there() {
                continue;
            }
            for name in life.names() {
                assert!(
                    !self.truths[n].life.snaps[&name].closing,
                    "{name} stays closing"
                );
                self.read(n, Some(name));
                read += 1;
                self.until("a snapshot is read", |world| world.readers.is_empty())
                    .await;
            }
        }
        let after = self.core.outcome.deeds.of(Deed::SnapshotRead as usize);
        assert_eq!(after - before, read, "a snapshot cannot be read");
    }

    /// Everything is deleted, clones before what they were made of; and then nothing is left.
    pub(super) async fn bury_all(&mut self) {
        let gone_before: Vec<usize> = (0..self.truths.len())
            .filter(|n| self.truths[*n].life.is_condemned())
            .collect();
        self.wait(PART).await;
        // Of a row of clones only the last can go at a time.
        for _ in 0..self.truths.len() {
            for n in (0..self.truths.len()).rev() {
                if self.truths[n].life.is_there() {
                    for name in self.truths[n].life.names() {
                        self.ask(n, Ask::Unmake(name)).await;
                    }
                }
                // Also one that was deleted by half: then it has no record in the trash.
                if self.truths[n].life.is_needy() {
                    self.ask(n, Ask::Delete).await;
                }
            }
            self.wait(SETTLED).await;
            for n in (0..self.truths.len()).rev() {
                let stage = self.truths[n].life.stage;
                if matches!(stage, Stage::InTrash { .. } | Stage::Never) {
                    self.ask(n, Ask::Purge).await;
                }
            }
        }
        for (n, truth) in self.truths.iter().enumerate() {
            let stage = truth.life.stage;
            let gone = matches!(stage, Stage::Gone | Stage::Never | Stage::ToBe);
            assert!(gone, "volume {n} is {stage:?}");
        }
        // A record that was stored late, when its volume was gone: a daemon that looks into the trash finds it.
        self.wait(SETTLED).await;
        for n in 0..self.truths.len() {
            let key = keys::trash_key(&self.truths[n].tenant, self.truths[n].id);
            if self.core.bucket.keys().into_iter().any(|left| left == key) {
                self.ask(n, Ask::Purge).await;
            }
        }
        // A writer that was fenced may have left orphans when its volume was gone already, and whoever made a clone that was
        // given up its first map and its keys.
        let late = self
            .truths
            .iter()
            .filter(|truth| truth.life.parent.is_some());
        let late = late.map(|truth| {
            let map = keys::map_key(&truth.tenant, truth.id, Epoch::ZERO, MapSeq::ZERO);
            [map, keys::keys_key(&truth.tenant, truth.id, 1)]
        });
        let orphans: Vec<String> = gone_before
            .iter()
            .map(|n| keys::volume_prefix(&self.truths[*n].tenant, self.truths[*n].id))
            .flat_map(|prefix| [format!("{prefix}chunk/"), format!("{prefix}map/")])
            .chain(late.flatten())
            .collect();
        let left = self.core.bucket.keys().into_iter();
        let left: Vec<String> = left
            .filter(|key| !orphans.iter().any(|prefix| key.starts_with(prefix)))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "left when all is deleted");
    }
}
