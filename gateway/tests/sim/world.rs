//! The scheduler: hosts, volumes and a bucket in one thread, on a clock that stands still while
//! anything can be done. Everything random comes from the seed.

mod attach;
mod family_end;
mod finish;
mod life;

use std::sync::Arc;
use std::time::Duration;

use quarry_cache::Branch;
use quarry_gateway::backend::open::Claim;
use quarry_objfmt::codec::Compression;
use quarry_objfmt::head::{Durability, Head};
use quarry_objfmt::record::NAME_KIND;
use quarry_objfmt::{Encryption, KeysCopy, NameRecord, Sectors, TenantName, encode_record, keys};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, sleep};

use super::device::DeviceFaults;
use super::faults::Faults;
use super::host::{End, Host, Outer, name_of};
use super::oracle::{Digest, Truth};
use super::outcome::{Crash, Outcome};
use super::panics::{note_panics, take_panic};
use super::plan::Plan;
use super::secrets;
use super::session::{Cx, Died, Session};
use super::store::{BAD_BODIES_BORNE, SimBucket, Weather};

const FRAME_SECTORS: u32 = 32;
/// Requests in flight at once, of one session.
const REQUESTS_MAX: usize = 12;

/// The longest time in which nothing is done at all, in milliseconds.
const NAP_PART_MS_MAX: u64 = 20_000;

/// The longest step while nothing is served.
const WAIT_US_MAX: u64 = 50_000;

pub struct World {
    plan: Plan,
    core: Core,
    hosts: Vec<Host>,
    /// When each host dies: after so many more actions.
    fuses: Vec<Option<u32>>,
    /// Those that look at the store from elsewhere; each with its volume.
    readers: Vec<(Host, usize)>,
    truths: Vec<Truth>,
    /// For each volume, what ended its service, until it is served again.
    lost: Vec<Option<Crash>>,
    dir: tempfile::TempDir,
    /// Lives of hosts and daemons so far: names and seeds for the next.
    lives: u64,
    is_calm: bool,
}

/// What every step uses.
struct Core {
    rng: SmallRng,
    digest: Digest,
    started: Instant,
    io_ms_max: u64,
    direct: Option<f64>,
    damage: bool,
    bucket: Arc<SimBucket>,
    outcome: Outcome,
}

impl Core {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap()
    }

    /// A step of volume `truth`, whose host dies by `fuse`.
    fn outer<'a>(&'a mut self, truth: &'a mut Truth, fuse: &'a mut Option<u32>) -> Outer<'a> {
        Outer {
            truth,
            now_ms: self.now_ms(),
            rng: &mut self.rng,
            digest: &mut self.digest,
            io_ms_max: self.io_ms_max,
            direct: self.direct,
            damage: self.damage,
            bucket: &self.bucket,
            outcome: &mut self.outcome,
            fuse,
        }
    }
}

/// Runs a plan on a runtime of its own.
pub fn run(plan: Plan) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    note_panics();
    Branch::take_counts();
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
        let bucket = SimBucket::new(rng.random(), plan.way_max, Faults::default());
        let mut truths = (0..plan.volumes)
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
                    plan.volume_sectors,
                )
            })
            .collect::<Vec<_>>();
        // By themselves: all else of a seed is the same with keys and without.
        let mut keys_rng = SmallRng::seed_from_u64(plan.seed ^ 0x6b65_7973);
        for truth in &mut truths {
            truth.encrypted = keys_rng.random_bool(plan.encrypted);
            let key = keys::head_key(&truth.tenant, truth.id);
            let mut head = head(truth);
            if truth.encrypted {
                head.encryption = Encryption::Aes256Gcm;
                head.keys = secrets::first(truth.id, keys_rng.random());
                let copy = KeysCopy {
                    volume: truth.id,
                    keys: head.keys.clone(),
                };
                let key = keys::keys_key(&truth.tenant, truth.id, head.keys.revision);
                bucket.place(&key, copy.encode()).await;
            }
            bucket.place(&key, head.encode()).await;
            truth.life.head = Some(head);
            if plan.family.is_some() {
                place_name(&bucket, truth).await;
            }
        }
        if plan.family.is_some() {
            bucket.watch_heads();
        }
        let dir = tempfile::tempdir().unwrap();
        let mut world = Self {
            fuses: vec![None; plan.hosts],
            hosts: Vec::new(),
            readers: Vec::new(),
            lost: vec![None; plan.volumes],
            lives: 0,
            is_calm: false,
            plan,
            core: Core {
                rng,
                digest: Digest::default(),
                started: Instant::now(),
                io_ms_max: plan.io_ms_max,
                direct: plan.direct,
                damage: plan.weather.bad_bodies_max > BAD_BODIES_BORNE,
                bucket,
                outcome: Outcome::default(),
            },
            truths,
            dir,
        };
        for index in 0..plan.hosts {
            let host = world.new_host(index);
            world.hosts.push(host);
        }
        world.core.bucket.set_weather(plan.weather);
        world
    }

    fn new_host(&mut self, index: usize) -> Host {
        self.lives += 1;
        let dir = self.dir.path().join("journals");
        let happened = &self.core.bucket.happened;
        Host::new(index, self.lives, self.core.rng.random(), &dir, happened)
    }

    fn chance(&mut self, chance: f64) -> bool {
        chance > 0.0 && self.core.rng.random_bool(chance)
    }

    async fn step(&mut self) {
        self.hear_heads();
        self.trouble();
        self.live();
        self.attach_some();
        self.go_on().await;
        self.ask_some();
        let ios = self.core.rng.random_range(0..self.plan.ios_max);
        self.work(ios);
        self.pass_time().await;
    }

    /// Breaks something, perhaps.
    fn trouble(&mut self) {
        let plan = self.plan;
        let h = self.core.rng.random_range(0..self.hosts.len());
        if self.chance(plan.crash) && (self.has_read_all(h) || self.chance(plan.hasty)) {
            self.fuses[h].get_or_insert(self.core.rng.random_range(0..plan.fuse_max));
        }
        if self.chance(plan.lose_cache) {
            self.crash(h, End::PowerCut, Crash::CacheLost);
            self.hosts[h] = self.new_host(h);
        }
        if self.chance(plan.outage) {
            let lasting = self.core.rng.random_range(0..=plan.outage_max.as_millis());
            let lasting = Duration::from_millis(u64::try_from(lasting).unwrap());
            self.core.bucket.go_away(lasting);
        }
        if self.core.rng.random_bool(0.01) {
            let calm = self.core.rng.random_bool(0.5);
            self.core.bucket.set_weather(if calm {
                Weather::default()
            } else {
                plan.weather
            });
        }
        self.errand(h);
        let Some(daemon) = &self.hosts[h].daemon else {
            return;
        };
        if daemon.is_failed() && self.core.rng.random_bool(0.05) {
            self.crash(h, End::Killed, Crash::DaemonKilled);
        }
    }

    /// An operator asks something of a volume that a host serves.
    fn errand(&mut self, h: usize) {
        let (drains, grows) = (self.chance(self.plan.drain), self.chance(self.plan.grow));
        let rotates = self.chance(self.plan.rotate);
        if !drains && !grows && !rotates {
            return;
        }
        let n = self.core.rng.random_range(0..self.truths.len());
        let daemon = self.hosts[h].daemon.as_ref();
        if !daemon
            .and_then(|d| d.sessions.get(&n))
            .is_some_and(|s| !s.stopping && !s.is_fenced())
        {
            return;
        }
        if drains {
            let checkpoint = self.core.rng.random_bool(0.3);
            self.hosts[h].drain(n, checkpoint);
        }
        if grows {
            let mut outer = self.core.outer(&mut self.truths[n], &mut self.fuses[h]);
            self.hosts[h].grow(n, &mut outer);
        }
        if rotates && self.truths[n].encrypted {
            let mut outer = self.core.outer(&mut self.truths[n], &mut self.fuses[h]);
            self.hosts[h].rotate(n, &mut outer);
        }
    }

    fn crash(&mut self, h: usize, end: End, kind: Crash) {
        self.fuses[h] = None;
        self.note_lost(h, kind);
        if self.hosts[h].daemon.is_some() {
            self.core.outcome.crashes += 1;
            self.core
                .digest
                .add(("crash", h, end == End::Killed, self.core.now_ms()));
        }
        self.forget_calls(h);
        self.hosts[h].crash(end, &self.truths, &mut self.core.rng);
        if self.chance(self.plan.flip) {
            self.hosts[h].flip_a_record();
        }
    }

    /// Volumes that this host served, or that only it can recover, are to be recovered.
    fn note_lost(&mut self, h: usize, kind: Crash) {
        for (n, truth) in self.truths.iter().enumerate() {
            let elsewhere = self.hosts.iter().enumerate();
            let elsewhere = elsewhere.filter(|(other, _)| *other != h);
            let mut serving = elsewhere.filter_map(|(_, host)| host.daemon.as_ref());
            if serving.any(|daemon| daemon.sessions.contains_key(&n)) {
                continue;
            }
            if self.hosts[h].matters_to(n, truth.id) {
                self.lost[n] = Some(kind);
            }
        }
        if let Some(daemon) = &self.hosts[h].daemon {
            let unread = daemon.sessions.values().filter(|s| s.history.is_some());
            self.core.outcome.cut_short += unread.count() as u64;
        }
    }

    fn dies(&mut self, h: usize) {
        if self.core.rng.random_bool(0.5) {
            self.crash(h, End::Killed, Crash::DaemonKilled);
        } else {
            self.crash(h, End::PowerCut, Crash::PowerCut);
        }
    }

    fn start(&mut self, h: usize) {
        self.lives += 1;
        let seed = self.plan.seed.wrapping_add(self.lives);
        self.hosts[h].start(&self.core.bucket, seed, &self.plan);
        let faults = if self.is_calm {
            DeviceFaults::default()
        } else {
            self.plan.device
        };
        self.hosts[h].device.set_faults(faults);
        if self.chance(self.plan.cut_short) {
            let writes = self.core.rng.random_range(0..6);
            self.hosts[h].device.die_after_writes(Some(writes));
        }
    }

    fn claim(&mut self, h: usize, force: bool, discard_unsent: bool) -> Claim {
        Claim {
            cache: self.hosts[h].cache,
            host: self.hosts[h].name.clone(),
            now_ms: self.core.now_ms(),
            force,
            discard_unsent,
            must_be_ours: false,
        }
    }

    /// Lets a session do something. False if its host has died of it.
    fn at(
        &mut self,
        h: usize,
        n: usize,
        step: impl FnOnce(&mut Session, &mut Cx<'_>) -> Result<bool, Died>,
    ) -> bool {
        let mut outer = self.core.outer(&mut self.truths[n], &mut self.fuses[h]);
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
            for _ in 0..self.core.rng.random_range(0..4) {
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
        self.work_and_hear(ios, 0.7);
    }

    /// Lets each session do something, and hear what it is told with this chance.
    fn work_and_hear(&mut self, ios: u32, chance: f64) {
        self.hear_heads();
        for (h, n) in self.sessions() {
            for _ in 0..ios {
                if !self.has(h, n) || !self.at(h, n, Session::step_io) {
                    break;
                }
            }
            if self.has(h, n) && self.core.rng.random_bool(chance) {
                while self.has(h, n) && self.at(h, n, Session::hear) {}
            }
            if self.has(h, n) {
                self.at(h, n, |session, cx| session.tick(cx).map(|()| true));
            }
        }
    }

    /// Whether a host serves something, and has read all of it.
    fn has_read_all(&self, h: usize) -> bool {
        let daemon = self.hosts[h].daemon.as_ref();
        let sessions = daemon.map(|daemon| &daemon.sessions);
        sessions.is_some_and(|s| !s.is_empty() && s.values().all(|s| s.history.is_none()))
    }

    async fn pass_time(&mut self) {
        if self.sessions().is_empty() {
            let wait_us = self.core.rng.random_range(0..WAIT_US_MAX);
            return sleep(Duration::from_micros(wait_us)).await;
        }
        match self.core.rng.random_range(0..20) {
            0..8 => tokio::task::yield_now().await,
            8..19 => sleep(Duration::from_micros(self.core.rng.random_range(0..8_000))).await,
            _ => {
                let nap_ms = u64::try_from(self.plan.nap_max.as_millis()).unwrap();
                let nap_ms = nap_ms >> self.core.rng.random_range(0..8);
                // A reactor never sleeps, nor is deaf, for so long that it goes by a map of a horizon ago.
                let parts = nap_ms.div_ceil(NAP_PART_MS_MAX).max(1);
                for _ in 0..parts {
                    sleep(Duration::from_millis(nap_ms / parts)).await;
                    self.work_and_hear(20, 1.0);
                    self.go_on().await;
                }
            }
        }
    }
}

/// A panic of a task shows only as silence.
fn no_panic() {
    if let Some(said) = take_panic() {
        panic!("a task panicked: {said}");
    }
}

/// Gives a volume its name.
async fn place_name(bucket: &SimBucket, truth: &Truth) {
    let name = name_of(truth);
    let record = encode_record(NAME_KIND, &NameRecord::new(truth.id, 0)).unwrap();
    bucket
        .place(&keys::name_key(&name.tenant, &name.name), record)
        .await;
}

/// The head of a volume that nobody has attached yet.
pub fn head(truth: &Truth) -> Head {
    let name = name_of(truth).name;
    Head {
        frame_sectors: FRAME_SECTORS,
        compression: match truth.index % 3 {
            0 => Compression::None,
            1 => Compression::Lz4,
            _ => Compression::Zstd,
        },
        durability: truth.durability,
        ..Head::fresh(truth.id, &truth.tenant, &name, Sectors::new(truth.size), 0)
    }
}
