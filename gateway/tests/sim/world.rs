//! The scheduler: hosts, volumes and a bucket in one thread, on a clock that stands still while
//! anything can be done. Everything random comes from the seed.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use quarry_gateway::backend::open::Claim;
use quarry_objfmt::codec::{Compression, Encryption};
use quarry_objfmt::head::{Durability, Head};
use quarry_objfmt::{Epoch, MapSeq, Sectors, TenantName, WriteSeq, keys};
use quarry_volume::VolumeState;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, sleep};

use super::device::DeviceFaults;
use super::host::{Attach, End, Host, Outer};
use super::oracle::{Digest, Truth};
use super::panics::{note_panics, take_panic};
use super::plan::Plan;
use super::session::{Cx, Died, Session};
use super::store::{SimBucket, Weather};

const FRAME_SECTORS: u32 = 32;
const VOLUME_SECTORS: u64 = 3072;
/// Requests in flight at once, of one session.
const REQUESTS_MAX: usize = 12;
/// By then the end of a run must have come, in simulated time and in steps.
const END_TIME_MAX: Duration = Duration::from_secs(3600);
const END_STEPS_MAX: u32 = 40_000;

/// What a run came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    pub digest: u64,
    pub writes: u64,
    pub crashes: u64,
    pub attaches: u64,
    pub readers: u64,
    pub store_requests: u64,
    pub simulated_ms: u64,
}

impl Outcome {
    /// Adds the counts of another run.
    pub fn add(&mut self, other: &Self) {
        self.writes += other.writes;
        self.crashes += other.crashes;
        self.attaches += other.attaches;
        self.readers += other.readers;
        self.store_requests += other.store_requests;
        self.simulated_ms += other.simulated_ms;
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} crashes, {} attaches, {} readers, {} writes in the end, {} store requests, {} simulated seconds",
            self.crashes,
            self.attaches,
            self.readers,
            self.writes,
            self.store_requests,
            self.simulated_ms / 1_000
        )
    }
}

pub struct World {
    plan: Plan,
    rng: SmallRng,
    bucket: Arc<SimBucket>,
    hosts: Vec<Host>,
    /// When each host dies: after so many more actions.
    fuses: Vec<Option<u32>>,
    /// Those that look at the store from elsewhere; each with its volume.
    readers: Vec<(Host, usize)>,
    truths: Vec<Truth>,
    digest: Digest,
    dir: tempfile::TempDir,
    started: Instant,
    /// Lives of hosts and daemons so far: names and seeds for the next.
    lives: u64,
    outcome: Outcome,
    is_calm: bool,
}

/// Runs a plan on a runtime of its own.
pub fn run(plan: Plan) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    note_panics();
    runtime.block_on(async {
        let mut world = World::new(plan).await;
        for _ in 0..plan.steps {
            world.step().await;
            no_panic();
        }
        world.finish().await
    })
}

impl World {
    async fn new(plan: Plan) -> Self {
        let mut rng = SmallRng::seed_from_u64(plan.seed);
        let bucket = SimBucket::new(rng.random());
        let truths = (0..plan.volumes)
            .map(|n| {
                let tenant = TenantName::new(["acme", "other"][n % 2]).unwrap();
                let durability = if rng.random_bool(0.3) {
                    Durability::Object
                } else {
                    Durability::Local
                };
                Truth::new(
                    u32::try_from(n).unwrap(),
                    tenant,
                    durability,
                    VOLUME_SECTORS,
                )
            })
            .collect::<Vec<_>>();
        for truth in &truths {
            let key = keys::head_key(&truth.tenant, truth.id);
            bucket.place(&key, head(truth).encode()).await;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut world = Self {
            fuses: vec![None; plan.hosts],
            hosts: Vec::new(),
            readers: Vec::new(),
            digest: Digest::default(),
            started: Instant::now(),
            lives: 0,
            outcome: Outcome::default(),
            is_calm: false,
            plan,
            rng,
            bucket,
            truths,
            dir,
        };
        for index in 0..plan.hosts {
            let host = world.new_host(index);
            world.hosts.push(host);
        }
        world.bucket.set_weather(plan.weather);
        world
    }

    fn new_host(&mut self, index: usize) -> Host {
        self.lives += 1;
        let dir = self.dir.path().join("journals");
        Host::new(index, self.lives, self.rng.random(), &dir)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap()
    }

    fn chance(&mut self, chance: f64) -> bool {
        chance > 0.0 && self.rng.random_bool(chance)
    }

    async fn step(&mut self) {
        self.trouble();
        self.attach_some();
        self.go_on().await;
        self.ask_some();
        let ios = self.rng.random_range(0..16);
        self.work(ios);
        self.pass_time().await;
    }

    /// Breaks something, perhaps.
    fn trouble(&mut self) {
        let plan = self.plan;
        let h = self.rng.random_range(0..self.hosts.len());
        if self.chance(plan.crash) {
            if self.rng.random_bool(0.2) {
                let writes = self.rng.random_range(0..6);
                self.hosts[h].device.die_after_writes(Some(writes));
            }
            self.fuses[h].get_or_insert(self.rng.random_range(0..60));
        }
        if self.chance(plan.lose_cache) {
            self.crash(h, End::PowerCut);
            self.hosts[h] = self.new_host(h);
        }
        if self.chance(plan.outage) {
            let lasting = self.rng.random_range(0..=plan.outage_max.as_millis());
            let lasting = Duration::from_millis(u64::try_from(lasting).unwrap());
            self.bucket.go_away(lasting);
        }
        if self.rng.random_bool(0.01) {
            let calm = self.rng.random_bool(0.5);
            self.bucket.set_weather(if calm {
                Weather::default()
            } else {
                plan.weather
            });
        }
        let Some(daemon) = &self.hosts[h].daemon else {
            return;
        };
        if daemon.is_failed() && self.rng.random_bool(0.05) {
            self.crash(h, End::Killed);
        }
    }

    fn crash(&mut self, h: usize, end: End) {
        self.fuses[h] = None;
        if self.hosts[h].daemon.is_some() {
            self.outcome.crashes += 1;
            self.digest
                .add(("crash", h, end == End::Killed, self.now_ms()));
        }
        self.hosts[h].crash(end, &self.truths, &mut self.rng);
        if self.chance(self.plan.flip) {
            self.hosts[h].flip_a_record();
        }
    }

    fn dies(&mut self, h: usize) {
        let end = if self.rng.random_bool(0.5) {
            End::Killed
        } else {
            End::PowerCut
        };
        self.crash(h, end);
    }

    fn start(&mut self, h: usize) {
        self.lives += 1;
        let seed = self.plan.seed.wrapping_add(self.lives);
        self.hosts[h].start(&self.bucket, seed, self.plan.writeback_delay_ms);
        let faults = if self.is_calm {
            DeviceFaults::default()
        } else {
            self.plan.device
        };
        self.hosts[h].device.set_faults(faults);
    }

    fn claim(&mut self, h: usize, force: bool, discard_unsent: bool) -> Claim {
        Claim {
            cache: self.hosts[h].cache,
            host: self.hosts[h].name.clone(),
            now_ms: self.now_ms(),
            force,
            discard_unsent,
        }
    }

    /// Starts daemons, attaches what is not attached, and sometimes what is.
    fn attach_some(&mut self) {
        let h = self.rng.random_range(0..self.hosts.len());
        if self.hosts[h].daemon.is_none() {
            if self.rng.random_bool(0.1) {
                self.start(h);
            }
            return;
        }
        let n = self.rng.random_range(0..self.truths.len());
        let id = self.truths[n].id;
        let busy = |host: &Host| {
            let daemon = host.daemon.as_ref();
            daemon.is_some_and(|d| d.sessions.contains_key(&n) || d.opening.contains_key(&n))
        };
        let served = self.hosts.iter().any(&busy);
        let here = busy(&self.hosts[h]);
        // Most come back to the cache that has their newest writes.
        let elsewhere = !self.hosts[h].owes(id) && self.hosts.iter().any(|host| host.owes(id));
        let served = served || elsewhere && self.rng.random_bool(0.9);
        if !here && (!served && self.rng.random_bool(0.2) || self.chance(self.plan.fight)) {
            let force = self.rng.random_bool(0.7);
            let discard = self.rng.random_bool(0.3);
            let claim = self.claim(h, force, discard);
            self.hosts[h].attach(n, &self.truths[n], &claim, false);
            self.outcome.attaches += 1;
        } else if here && self.wants_to_leave(h, n) {
            self.hosts[h].detach(n);
        }
        if self.chance(self.plan.read_elsewhere) && self.readers.len() < 2 {
            let index = 100 + self.readers.len();
            let mut host = self.new_host(index);
            self.lives += 1;
            host.start(&self.bucket, self.lives, 0);
            let claim = Claim {
                cache: host.cache,
                host: host.name.clone(),
                now_ms: self.now_ms(),
                force: true,
                discard_unsent: false,
            };
            host.attach(n, &self.truths[n], &claim, true);
            self.readers.push((host, n));
        }
    }

    fn wants_to_leave(&mut self, h: usize, n: usize) -> bool {
        let daemon = self.hosts[h].daemon.as_ref().unwrap();
        let Some(session) = daemon.sessions.get(&n) else {
            return false;
        };
        let fenced = matches!(session.volume.state(), VolumeState::Fenced { .. });
        !session.stopping && (fenced && self.rng.random_bool(0.1) || self.chance(self.plan.detach))
    }

    /// Goes on with attaches, detaches and readers that are under way.
    async fn go_on(&mut self) {
        for h in 0..self.hosts.len() {
            for n in 0..self.truths.len() {
                let Some(daemon) = &self.hosts[h].daemon else {
                    break;
                };
                if daemon.opening.contains_key(&n) {
                    let outer = outer(
                        &mut self.truths[n],
                        &mut self.rng,
                        &mut self.digest,
                        self.started,
                        self.plan.io_ms_max,
                        &mut self.fuses[h],
                    );
                    let came_to = self.hosts[h].go_on(n, outer).await;
                    self.check_refusal(&came_to);
                    if came_to == Attach::Died {
                        self.dies(h);
                    }
                } else if daemon.leaving.contains_key(&n) {
                    let outer = outer(
                        &mut self.truths[n],
                        &mut self.rng,
                        &mut self.digest,
                        self.started,
                        self.plan.io_ms_max,
                        &mut self.fuses[h],
                    );
                    if self.hosts[h].let_go(n, outer).await.is_err() {
                        self.dies(h);
                    }
                }
            }
        }
        self.read_elsewhere().await;
    }

    /// An attach fails for a reason that there is, or not at all.
    fn check_refusal(&self, came_to: &Attach) {
        let Attach::Refused(why) = came_to else {
            return;
        };
        let device = self.plan.device;
        let may = match *why {
            "damaged" => self.plan.weather.wrong > 0.0,
            "cache" => device.write + device.read + device.sync > 0.0,
            _ => true,
        };
        assert!(may, "an attach is refused without a reason: {why}");
    }

    async fn read_elsewhere(&mut self) {
        for (mut host, n) in std::mem::take(&mut self.readers) {
            let mut never = None;
            let mut outer = outer(
                &mut self.truths[n],
                &mut self.rng,
                &mut self.digest,
                self.started,
                self.plan.io_ms_max,
                &mut never,
            );
            if host.daemon.as_ref().unwrap().opening.contains_key(&n) {
                let came_to = host.go_on(n, outer).await;
                self.check_refusal(&came_to);
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
                Ok(session.is_swept() && session.is_idle())
            });
            if read.unwrap() {
                self.outcome.readers += 1;
                host.crash(End::Killed, &self.truths, &mut self.rng);
            } else {
                self.readers.push((host, n));
            }
        }
    }

    /// Lets a session do something. False if its host has died of it.
    fn at(
        &mut self,
        h: usize,
        n: usize,
        step: impl FnOnce(&mut Session, &mut Cx<'_>) -> Result<bool, Died>,
    ) -> bool {
        let mut outer = outer(
            &mut self.truths[n],
            &mut self.rng,
            &mut self.digest,
            self.started,
            self.plan.io_ms_max,
            &mut self.fuses[h],
        );
        let host = &mut self.hosts[h];
        let daemon = host.daemon.as_mut().unwrap();
        match daemon.drive(n, &host.device, &mut outer, step) {
            Ok(done) => done,
            Err(Died) => {
                self.dies(h);
                false
            }
        }
    }

    fn sessions(&self) -> Vec<(usize, usize)> {
        let of_host = |(h, host): (usize, &Host)| {
            let daemon = host.daemon.as_ref();
            let volumes: Vec<usize> =
                daemon.map_or(Vec::new(), |d| d.sessions.keys().copied().collect());
            volumes.into_iter().map(move |n| (h, n))
        };
        self.hosts.iter().enumerate().flat_map(of_host).collect()
    }

    fn has(&self, h: usize, n: usize) -> bool {
        let daemon = self.hosts[h].daemon.as_ref();
        daemon.is_some_and(|d| d.sessions.contains_key(&n))
    }

    fn ask_some(&mut self) {
        for (h, n) in self.sessions() {
            for _ in 0..self.rng.random_range(0..4) {
                if !self.has(h, n) {
                    break;
                }
                self.at(h, n, |session, cx| {
                    if !session.stopping && session.in_flight() < REQUESTS_MAX {
                        session.ask_something(cx)?;
                    }
                    Ok(true)
                });
            }
        }
    }

    /// I/O, messages and ticks.
    fn work(&mut self, ios: u32) {
        for (h, n) in self.sessions() {
            for _ in 0..ios {
                if !self.has(h, n) || !self.at(h, n, Session::step_io) {
                    break;
                }
            }
            if self.has(h, n) && self.rng.random_bool(0.7) {
                while self.has(h, n) && self.at(h, n, Session::hear) {}
            }
            if self.has(h, n) {
                self.at(h, n, |session, cx| session.tick(cx).map(|()| true));
            }
        }
    }

    async fn pass_time(&mut self) {
        match self.rng.random_range(0..20) {
            0..8 => tokio::task::yield_now().await,
            8..19 => sleep(Duration::from_micros(self.rng.random_range(0..8_000))).await,
            _ => {
                let nap_ms = u64::try_from(self.plan.nap_max.as_millis()).unwrap();
                let nap_ms = nap_ms >> self.rng.random_range(0..8);
                sleep(Duration::from_millis(nap_ms)).await;
            }
        }
    }

    /// All trouble ends. Every volume is attached on every host once more, read, flushed and sent;
    /// nothing is left behind.
    async fn finish(mut self) -> Outcome {
        self.is_calm = true;
        self.plan.crash = 0.0;
        self.bucket.come_back();
        self.bucket.set_weather(Weather::default());
        for h in 0..self.hosts.len() {
            self.fuses[h] = None;
            let failed = self.hosts[h].daemon.as_ref().is_some_and(|d| d.is_failed());
            if failed || self.rng.random_bool(0.5) {
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
            world.readers.is_empty() && world.leave_all()
        })
        .await;
        for h in 0..self.hosts.len() {
            self.visit(h).await;
        }
        // An upload of a volume that is gone may be about to try again.
        self.until("the memory of uploads is given back", |world| {
            world.hosts.iter().all(Host::has_no_uploads)
        })
        .await;
        for host in &self.hosts {
            host.check_budgets();
        }
        self.outcome.digest = self.digest.value();
        self.outcome.writes = self.truths.iter().map(|t| t.len(t.served(u32::MAX))).sum();
        self.outcome.store_requests = self.bucket.requests();
        self.outcome.simulated_ms = self.now_ms();
        self.outcome
    }

    /// Volumes that went elsewhere hold what is unsent here, and may keep others from the cache: an
    /// operator has to give that up.
    fn take_up_kept(&mut self) {
        for h in 0..self.hosts.len() {
            for n in 0..self.truths.len() {
                let daemon = self.hosts[h].daemon.as_ref().unwrap();
                let busy = daemon.sessions.contains_key(&n) || daemon.opening.contains_key(&n);
                if !busy && daemon.keeps(&self.truths[n]) {
                    let claim = self.claim(h, true, true);
                    self.hosts[h].attach(n, &self.truths[n], &claim, false);
                }
            }
        }
    }

    /// Attaches everything on one host, reads all of it, writes a little, and detaches it.
    async fn visit(&mut self, h: usize) {
        let volumes = 0..self.truths.len();
        for n in volumes.clone() {
            let claim = self.claim(h, true, true);
            self.hosts[h].attach(n, &self.truths[n], &claim, false);
        }
        self.until("all is attached and read", |world| {
            let mut volumes = 0..world.truths.len();
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
        for n in volumes {
            self.at(h, n, |session, cx| session.flush(cx).map(|()| true));
        }
        self.until("all is sent and detached", World::leave_all)
            .await;
    }

    /// Detaches whatever is attached; true when nothing is.
    fn leave_all(&mut self) -> bool {
        for (h, n) in self.sessions() {
            let daemon = self.hosts[h].daemon.as_ref().unwrap();
            if !daemon.sessions[&n].stopping {
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
    async fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
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
            sleep(Duration::from_millis(self.rng.random_range(1..20))).await;
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

/// A panic of a task shows only as silence.
fn no_panic() {
    if let Some(said) = take_panic() {
        panic!("a task panicked: {said}");
    }
}

fn outer<'a>(
    truth: &'a mut Truth,
    rng: &'a mut SmallRng,
    digest: &'a mut Digest,
    started: Instant,
    io_ms_max: u64,
    fuse: &'a mut Option<u32>,
) -> Outer<'a> {
    Outer {
        truth,
        rng,
        digest,
        now_ms: u64::try_from(started.elapsed().as_millis()).unwrap(),
        io_ms_max,
        fuse,
    }
}

fn head(truth: &Truth) -> Head {
    Head {
        volume: truth.id,
        tenant: truth.tenant.to_string(),
        name: format!("v{}", truth.index),
        created_ms: 0,
        sector_size: 512,
        frame_sectors: FRAME_SECTORS,
        compression: match truth.index % 3 {
            0 => Compression::None,
            1 => Compression::Lz4,
            _ => Compression::Zstd,
        },
        encryption: Encryption::None,
        durability: truth.durability,
        size: Sectors::new(truth.size),
        epoch: Epoch::ZERO,
        owner: None,
        lineage: None,
        log: Vec::new(),
        root: None,
        root_write: WriteSeq::ZERO,
        next_map: MapSeq::ZERO,
        stored_bytes: 0,
    }
}
