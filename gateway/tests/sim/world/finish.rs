//! The end of a run: all trouble is over, and everything must come to its end.

use std::time::Duration;

use rand::RngExt;
use tokio::time::{Instant, sleep};

use super::{REQUESTS_MAX, World, no_panic};
use crate::device::DeviceFaults;
use crate::host::Host;
use crate::outcome::Outcome;
use crate::session::Session;
use crate::store::Weather;

/// By then the end of a run must have come, in simulated time and in steps.
const END_TIME_MAX: Duration = Duration::from_secs(3600);
const END_STEPS_MAX: u32 = 40_000;

impl World {
    /// All trouble ends. Every volume is attached on every host once more, read, flushed and sent;
    /// nothing is left behind.
    pub(super) async fn finish(mut self) -> Outcome {
        self.is_calm = true;
        self.plan.cut_short = 0.0;
        self.core.bucket.come_back();
        self.core.bucket.set_weather(Weather::default());
        for h in 0..self.hosts.len() {
            self.fuses[h] = None;
            let failed = self.hosts[h].daemon.as_ref().is_some_and(|d| d.is_failed());
            if failed || self.core.rng.random_bool(0.5) {
                self.dies(h);
            }
            if self.hosts[h].daemon.is_none() {
                self.start(h);
            }
            self.hosts[h].device.set_faults(DeviceFaults::default());
            self.hosts[h].device.die_after_writes(None);
        }
        self.until("what was under way ends", |world| {
            world.take_up_kept();
            world.readers.is_empty() && world.leave_all() && world.is_uncalled()
        })
        .await;
        if self.plan.family.is_some() {
            self.finish_lives().await;
            self.read_lives().await;
        }
        for h in 0..self.hosts.len() {
            self.visit(h, Duration::ZERO).await;
        }
        if self.plan.family.is_some() {
            self.bury_all().await;
        }
        // An upload of a volume that is gone may be about to try again.
        self.until("the memory of uploads is given back", |world| {
            world.hosts.iter().all(Host::has_no_uploads)
        })
        .await;
        for host in &mut self.hosts {
            host.check_budgets();
        }
        let mut outcome = self.core.outcome.clone();
        outcome.digest = self.core.digest.value();
        outcome.runs = 1;
        outcome.writes = self.truths.iter().map(|t| t.len(t.served(u32::MAX))).sum();
        outcome.store_requests = self.core.bucket.requests();
        outcome.simulated_ms = self.core.now_ms();
        outcome.faults = self.core.bucket.happened.counts();
        outcome.coverage.take_branches();
        outcome
    }

    /// Volumes that went elsewhere hold what is unsent here, and may keep others from the cache: an
    /// operator has to give that up.
    fn take_up_kept(&mut self) {
        for h in 0..self.hosts.len() {
            for n in 0..self.truths.len() {
                let daemon = self.hosts[h].daemon.as_ref().unwrap();
                let busy = daemon.sessions.contains_key(&n) || daemon.opening.contains_key(&n);
                let lives = self.truths[n].life.is_there();
                if lives && !busy && daemon.keeps(&self.truths[n]) {
                    let claim = self.claim(h, true, true);
                    self.hosts[h].attach(n, &self.truths[n], &claim, false);
                }
            }
        }
    }

    /// Attaches everything on one host, reads all of it, writes a little, and detaches it after so long.
    pub(super) async fn visit(&mut self, h: usize, stay: Duration) {
        let volumes = (0..self.truths.len()).filter(|n| self.truths[*n].life.is_there());
        let volumes: Vec<usize> = volumes.collect();
        for &n in &volumes {
            let claim = self.claim(h, true, true);
            self.hosts[h].attach(n, &self.truths[n], &claim, false);
        }
        self.until("all is attached and read", |world| {
            let mut volumes = volumes.iter().copied();
            let daemon = world.hosts[h].daemon.as_ref().unwrap();
            let refused = volumes
                .clone()
                .find(|n| !daemon.sessions.contains_key(n) && !daemon.opening.contains_key(n));
            if let Some(n) = refused {
                // A give-back of before came in between.
                let claim = world.claim(h, true, true);
                world.hosts[h].attach(n, &world.truths[n], &claim, false);
                return false;
            }
            volumes.all(|n| daemon.sessions.get(&n).is_some_and(Session::is_swept))
        })
        .await;
        for &n in &volumes {
            self.at(h, n, |session, cx| session.flush(cx).map(|()| true));
        }
        self.wait(stay).await;
        self.until("all is sent and detached", World::leave_all)
            .await;
    }

    /// Detaches whatever is attached; true when nothing is.
    fn leave_all(&mut self) -> bool {
        for (h, n) in self.sessions() {
            let daemon = self.hosts[h].daemon.as_ref().unwrap();
            if !daemon.sessions[&n].stopping && !daemon.has_errand(n) {
                self.hosts[h].detach(n);
            }
        }
        let idle = |host: &Host| {
            let daemon = host.daemon.as_ref().unwrap();
            daemon.sessions.is_empty() && daemon.opening.is_empty() && daemon.leaving.is_empty()
        };
        self.hosts.iter().all(idle)
    }

    /// Goes on until `done`, which must come.
    pub(super) async fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        for _ in 0..END_STEPS_MAX {
            if done(self) {
                return;
            }
            assert!(
                begun.elapsed() < END_TIME_MAX,
                "{what}: not in {END_TIME_MAX:?}: {}",
                self.under_way()
            );
            self.go_on().await;
            let asking = self.sessions();
            for (h, n) in asking {
                self.at(h, n, |session, cx| {
                    let room = session.in_flight() < REQUESTS_MAX;
                    if room && !session.stopping && !session.is_swept() {
                        session.ask_something(cx)?;
                    }
                    Ok(true)
                });
            }
            self.work(20);
            no_panic();
            sleep(Duration::from_millis(self.core.rng.random_range(1..20))).await;
        }
        panic!("{what}: not in {END_STEPS_MAX} steps: {}", self.under_way());
    }

    /// What is not at an end, for people.
    fn under_way(&self) -> String {
        let hosts = self
            .hosts
            .iter()
            .chain(self.readers.iter().map(|(host, _)| host));
        let mut lines = Vec::new();
        for host in hosts {
            let Some(daemon) = &host.daemon else { continue };
            lines.push(format!(
                "{}: attaching {:?}, detaching {:?}",
                host.name,
                daemon.opening.keys(),
                daemon.leaving.keys()
            ));
            lines.push(daemon.cache());
            for (n, session) in &daemon.sessions {
                lines.push(format!("volume {n}: {session:?}"));
            }
        }
        lines.join("\n")
    }
}
