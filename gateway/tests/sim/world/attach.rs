//! Who serves which volume: attaches, takeovers, detaches, and readers from elsewhere.

use std::sync::Arc;

use quarry_gateway::backend::open::Claim;
use quarry_volume::IoError;
use rand::RngExt;

use super::World;
use crate::faults::Fault;
use crate::host::{Attach, End, Host};
use crate::outcome::Crash;
use crate::store::BAD_BODIES_BORNE;

impl World {
    /// Starts daemons, attaches what is not attached, and sometimes what is.
    pub(super) fn attach_some(&mut self) {
        let h = self.core.rng.random_range(0..self.hosts.len());
        if self.hosts[h].daemon.is_none() {
            if self.core.rng.random_bool(self.plan.start) {
                self.start(h);
            }
            return;
        }
        let n = self.core.rng.random_range(0..self.truths.len());
        if !self.truths[n].life.is_known() {
            return;
        }
        let id = self.truths[n].id;
        let busy = |host: &Host| host.daemon.as_ref().is_some_and(|d| !d.is_away(n));
        let served = self.hosts.iter().any(&busy);
        let here = busy(&self.hosts[h]);
        // Most come back to the cache that has their newest writes.
        let elsewhere = !self.hosts[h].owes(id) && self.hosts.iter().any(|host| host.owes(id));
        let served = served || elsewhere && self.core.rng.random_bool(0.9);
        if !here
            && (!served && self.core.rng.random_bool(self.plan.attach)
                || self.chance(self.plan.fight))
        {
            let force = self.core.rng.random_bool(0.7);
            let discard = self.core.rng.random_bool(0.3);
            let claim = self.claim(h, force, discard);
            self.hosts[h].attach(n, &self.truths[n], &claim, false);
            self.core.outcome.attaches += 1;
        } else if here && self.wants_to_leave(h, n) {
            self.hosts[h].detach(n);
        }
        if self.chance(self.plan.read_elsewhere) && self.readers.len() < 2 {
            self.read(n, None);
        }
    }

    /// Reads a volume, or a snapshot of it, from elsewhere.
    pub(super) fn read(&mut self, n: usize, snapshot: Option<String>) {
        let index = 100 + self.readers.len();
        let mut host = self.new_host(index);
        self.lives += 1;
        host.start(&self.core.bucket, self.lives, &self.plan);
        let truth = &self.truths[n];
        match snapshot {
            Some(name) => host.attach_snapshot(n, truth, &name),
            None => {
                let claim = Claim {
                    cache: host.cache,
                    host: host.name.clone(),
                    now_ms: self.core.now_ms(),
                    force: true,
                    discard_unsent: false,
                    must_be_ours: false,
                };
                host.attach(n, truth, &claim, true);
            }
        }
        self.readers.push((host, n));
    }

    fn wants_to_leave(&mut self, h: usize, n: usize) -> bool {
        let daemon = self.hosts[h].daemon.as_ref().unwrap();
        let Some(session) = daemon.sessions.get(&n) else {
            return false;
        };
        let fenced = session.is_fenced();
        !session.stopping
            && !daemon.has_errand(n)
            && !daemon.is_called(n)
            && (fenced && self.core.rng.random_bool(0.1) || self.chance(self.plan.detach))
    }

    /// Goes on with attaches, detaches and readers that are under way.
    pub(super) async fn go_on(&mut self) {
        self.hear_heads();
        for h in 0..self.hosts.len() {
            for n in 0..self.truths.len() {
                let Some(daemon) = &self.hosts[h].daemon else {
                    break;
                };
                if daemon.opening.contains_key(&n) {
                    let crash = self.recovered_from(h, n);
                    let outer = self.core.outer(&mut self.truths[n], &mut self.fuses[h]);
                    let came_to = self.hosts[h].go_on(n, crash, outer).await;
                    self.check_refusal(n, &came_to);
                    match came_to {
                        Attach::Serves => self.lost[n] = None,
                        Attach::Died => {
                            if self.hosts[h].device.is_dead() {
                                self.core.bucket.happened.note(Fault::RecoveryCutShort);
                            }
                            self.dies(h);
                        }
                        Attach::UnderWay | Attach::Refused(..) => {}
                    }
                } else if daemon.has_errand(n) {
                    let outer = self.core.outer(&mut self.truths[n], &mut self.fuses[h]);
                    if self.hosts[h].end_errands(n, outer).await.is_err() {
                        self.dies(h);
                    }
                } else if daemon.leaving.contains_key(&n) {
                    let outer = self.core.outer(&mut self.truths[n], &mut self.fuses[h]);
                    if self.hosts[h].let_go(n, outer).await.is_err() {
                        self.dies(h);
                    }
                }
            }
        }
        self.read_elsewhere().await;
        self.end_calls().await;
    }

    /// What a volume is recovered from, if host `h` serves it from now on: who has not the cache with its
    /// newest writes takes it over.
    fn recovered_from(&self, h: usize, n: usize) -> Option<Crash> {
        let id = self.truths[n].id;
        let others = self
            .hosts
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != h);
        let (mut served, mut owed) = (false, false);
        for (_, host) in others {
            let daemon = host.daemon.as_ref();
            served |= daemon.is_some_and(|d| d.sessions.contains_key(&n));
            owed |= host.owes(id);
        }
        match self.lost[n] {
            _ if served => Some(Crash::TakenOver),
            Some(Crash::DaemonKilled | Crash::PowerCut) if owed => Some(Crash::TakenOver),
            lost => lost,
        }
    }

    /// An attach fails for a reason that there is, or not at all.
    fn check_refusal(&self, n: usize, came_to: &Attach) {
        let Attach::Refused(kind, why) = came_to else {
            return;
        };
        let device = self.plan.device;
        let life = &self.truths[n].life;
        let may = match *kind {
            "damaged" => {
                let rough = self.plan.weather.bad_bodies_max > BAD_BODIES_BORNE;
                rough || life.is_condemned()
            }
            "deleted" => life.was_deleted,
            "cache" => device.write + device.read + device.sync > 0.0,
            _ => true,
        };
        assert!(may, "an attach is refused without a reason: {why}");
    }

    async fn read_elsewhere(&mut self) {
        for (mut host, n) in std::mem::take(&mut self.readers) {
            let mut never = None;
            let mut outer = self.core.outer(&mut self.truths[n], &mut never);
            if host.daemon.as_ref().unwrap().opening.contains_key(&n) {
                let came_to = host.go_on(n, None, outer).await;
                self.check_refusal(n, &came_to);
                if matches!(came_to, Attach::UnderWay | Attach::Serves) {
                    self.readers.push((host, n));
                }
                continue;
            }
            let (device, daemon) = (Arc::clone(&host.device), host.daemon.as_mut().unwrap());
            let read = daemon.drive(n, &device, &mut outer, |session, cx| {
                if !session.is_swept() && session.in_flight() < 4 {
                    session.ask_something(cx)?;
                }
                while session.hear(cx)? || session.step_io(cx)? {}
                session.tick(cx)?;
                let done = session.is_swept() && session.is_idle();
                if done {
                    session.flush(cx)?;
                    session.change_in_vain(IoError::ReadOnly, cx)?;
                    session.stop(cx)?;
                }
                Ok(done)
            });
            if read.unwrap() {
                self.core.outcome.readers += 1;
                host.crash(End::Killed, &self.truths, &mut self.core.rng);
            } else {
                self.readers.push((host, n));
            }
        }
    }
}
