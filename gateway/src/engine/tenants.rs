//! Tenants as this daemon knows them: their records, the ways to their stores, and what they did there.
//!
//! A tenant's record is in the daemon's own store; its volumes are there too, or in a store of its own. What is known
//! of a tenant is used for [`KNOWN_FOR`] without asking again, and those with something attached here are asked for
//! every [`REFRESH_INTERVAL`], so that what another host changed is seen.
//!
//! Invariant: a tenant's volumes are looked for in one place at a time: its store changes only while it has none.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::ErrorKind;
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use quarry_config::UploadCheck;
use quarry_objfmt::record::{TENANT_KIND, TenantRecord, TenantStore, decode_record, encode_record};
use quarry_objfmt::{TenantName, TenantSettings, keys};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{CONTROL_DEADLINE, Daemon};
use crate::backend::{Common, DirectWay};
use crate::control::{ApiError, ApiResult, Kind, TenantUsage};
use crate::provision;
use crate::qos::TenantGate;
use crate::store::direct::DirectLane;
use crate::store::{
    Lane, LaneSettings, OpenError, Place, Store, StoreError, StoreSettings, StoreSnapshot,
    StoreStats, Tag, open_store_within,
};

/// How long what is known of a tenant is used without asking again: so long does a change made on another host take to
/// be seen by a control call here.
const KNOWN_FOR: Duration = Duration::from_secs(10);

/// How long what is known is used when the daemon's store did not answer, before it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// How long a store that did not answer is not looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// How old a record may be by which something is made.
const FRESH_FOR: Duration = Duration::from_secs(60);

/// How long a tenant with nothing attached here is remembered.
const REMEMBERED_FOR: Duration = Duration::from_secs(10 * 60);

/// How often the records of tenants with something attached here are read: so long does a change made on another host
/// take to be seen by their devices.
pub(super) const REFRESH_INTERVAL: Duration = Duration::from_secs(30);

/// Tries to change a record that others change too.
const CHANGE_TRIES_MAX: usize = 16;

/// A store, and the way to it.
pub(super) struct Site {
    settings: StoreSettings,
    pub(super) lane: Lane,
    /// It was found fit to keep something in it.
    is_fit: tokio::sync::Mutex<Fitness>,
}

/// What a look at a store found.
enum Fitness {
    Unknown,
    Fit,
    /// It did not answer, and when that was.
    Silent(ApiError, Instant),
}

impl Site {
    /// A store that somebody has looked at already.
    pub(super) fn looked_at(settings: StoreSettings, lane: Lane) -> Arc<Self> {
        Arc::new(Self {
            settings,
            lane,
            is_fit: tokio::sync::Mutex::new(Fitness::Fit),
        })
    }

    /// Opens a store, where a tenant begins or has been. No longer than a control call waits for anything of it.
    async fn open(settings: &StoreSettings, begins: bool) -> Result<Arc<dyn Store>, OpenError> {
        let is_folder = matches!(settings.place()?, Place::Folder(_));
        let settings = StoreSettings {
            // Who gives a tenant a folder says that a store is to be there.
            make_missing: settings.make_missing || (is_folder && begins),
            ..settings.clone()
        };
        open_store_within(&settings, CONTROL_DEADLINE).await
    }

    /// The way to a store; to one of the server of `others` with the places there.
    fn over(settings: StoreSettings, store: Arc<dyn Store>, others: &[&Arc<Self>]) -> Arc<Self> {
        let limits = LaneSettings::default();
        let of_server = |site: &&&Arc<Self>| same_server(&site.settings, &settings);
        let lane = match others.iter().find(of_server) {
            Some(site) => site.lane.beside(store, &limits),
            None => Lane::new(store, &limits),
        };
        Arc::new(Self {
            settings,
            lane,
            is_fit: tokio::sync::Mutex::new(Fitness::Unknown),
        })
    }

    /// How it is reached.
    pub(super) const fn settings(&self) -> &StoreSettings {
        &self.settings
    }

    /// Where it is, for people.
    pub(super) fn url(&self) -> String {
        self.lane.describe()
    }

    /// Looks at the store before anything is kept in it: once, when that was good. Those who waited for a look at one that does
    /// not answer do not wait for another each.
    async fn check(&self) -> ApiResult<()> {
        let mut is_fit = self.is_fit.lock().await;
        match &*is_fit {
            Fitness::Fit => return Ok(()),
            Fitness::Silent(why, at) if at.elapsed() < LOOK_AGAIN => return Err(why.clone()),
            Fitness::Silent(..) | Fitness::Unknown => {}
        }
        let found = self.look().await;
        *is_fit = match &found {
            Ok(()) => Fitness::Fit,
            Err(why) if why.kind == Kind::Unavailable => {
                Fitness::Silent(why.clone(), Instant::now())
            }
            Err(_) => Fitness::Unknown,
        };
        found
    }

    async fn look(&self) -> ApiResult<()> {
        let control = self.lane.with_deadline(CONTROL_DEADLINE);
        match provision::prepare(&self.settings, &control).await {
            Ok(prepared) => {
                for warning in &prepared.warnings {
                    tracing::warn!("{warning}");
                }
                Ok(())
            }
            Err(error) if error.is_transient() => {
                let message = format!("the store was not found fit yet: {error}");
                let remedy = "try again when the store answers";
                Err(ApiError::new(Kind::Unavailable, message, remedy))
            }
            Err(error) => Err(ApiError::new(Kind::Unsupported, error.to_string(), "")),
        }
    }
}

/// A tenant.
pub(super) struct Tenant {
    pub(super) name: TenantName,
    pub(super) site: Arc<Site>,
    /// The way to its store, with its requests counted.
    lane: Lane,
    account: Arc<StoreStats>,
    /// How fast its volumes may be, and its share.
    gate: Arc<TenantGate>,
    direct: Arc<DirectWay>,
    /// Held by who purges of its trash: one volume at a time.
    pub(super) purging: tokio::sync::Mutex<()>,
    seen: Mutex<Seen>,
    quota_seen: Mutex<QuotaSeen>,
}

/// What this daemon has seen of a tenant's quotas.
#[derive(Clone, Copy, Default)]
pub(super) struct QuotaSeen {
    /// What the tenant had when that was counted last.
    pub(super) usage: Option<TenantUsage>,
    /// What was not made for a quota's sake.
    pub(super) refusals: u64,
}

/// A tenant's record as it was read last.
#[derive(Clone)]
struct Seen {
    record: TenantRecord,
    at: Instant,
    /// When it is read again.
    again: Instant,
}

impl Tenant {
    fn new(
        name: TenantName,
        site: Arc<Site>,
        (account, gate): (Arc<StoreStats>, Arc<TenantGate>),
        seen: Seen,
    ) -> Arc<Self> {
        gate.set(&seen.record.settings);
        let lane = site.lane.of(gate.share());
        let lane = lane.counted_in(Arc::clone(&account));
        let (settings, for_direct) = (site.settings.clone(), lane.clone());
        let open = move || DirectLane::open(&settings, for_direct).map_err(|why| why.to_string());
        Arc::new(Self {
            name,
            site,
            lane,
            account,
            gate,
            direct: Arc::new(LazyLock::new(Box::new(open))),
            purging: tokio::sync::Mutex::default(),
            seen: Mutex::new(seen),
            quota_seen: Mutex::default(),
        })
    }

    /// Its record, as it was read last.
    pub(super) fn record(&self) -> TenantRecord {
        self.seen.lock().record.clone()
    }

    /// Whether its record was read lately: what is made by an older one might be where nobody looks.
    pub(super) fn is_fresh(&self) -> bool {
        self.seen.lock().at.elapsed() < FRESH_FOR
    }

    /// The way to its store for a control call.
    pub(super) fn control(&self) -> Lane {
        self.lane.with_deadline(CONTROL_DEADLINE)
    }

    /// The way to its store for who waits for ever.
    pub(super) fn lane(&self) -> &Lane {
        &self.lane
    }

    /// How fast its volumes may be, and its share.
    pub(super) fn gate(&self) -> &Arc<TenantGate> {
        &self.gate
    }

    /// The way around the daemon's memory.
    pub(super) fn direct(&self) -> &Arc<DirectWay> {
        &self.direct
    }

    /// What was seen of its quotas.
    pub(super) fn quota_seen(&self) -> QuotaSeen {
        *self.quota_seen.lock()
    }

    /// It was counted.
    pub(super) fn note_usage(&self, usage: TenantUsage) {
        self.quota_seen.lock().usage = Some(usage);
    }

    /// Something was not made for a quota's sake.
    pub(super) fn note_refusal(&self) {
        self.quota_seen.lock().refusals += 1;
    }

    /// What it asked of its store.
    pub(super) fn account(&self) -> &Arc<StoreStats> {
        &self.account
    }

    /// What a volume of it is served with, whose requests are counted in `account` too.
    pub(super) fn common(&self, all: &Common, account: Arc<StoreStats>) -> Common {
        let lane = self.lane.counted_in(account);
        Common {
            store: Arc::new(lane.clone()),
            background: Arc::new(lane.background()),
            direct: Arc::clone(&self.direct),
            share: Arc::clone(self.gate.share()),
            group: self.gate.group(),
            ..all.clone()
        }
    }
}

/// Whose what is cached is: a tenant's, as long as it is the same one in the same store. It is remembered for as long as
/// the daemon runs, since what is cached outlives what is known of a tenant that nobody asks for.
#[derive(PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct GroupOf {
    name: TenantName,
    created_ms: u64,
    /// Whether it has a store of its own.
    has_own: bool,
    /// The store's URL.
    url: String,
    /// And its server's.
    endpoint: Option<String>,
}

/// The stores that tenants have of their own.
#[derive(Default)]
struct Sites {
    all: Vec<Arc<Site>>,
    /// What was counted of those that are no longer among them.
    gone: StoreSnapshot,
}

impl Sites {
    /// The site of these settings. What no tenant is in any more goes.
    fn in_use(&mut self, settings: &StoreSettings) -> Option<Arc<Site>> {
        let Self { all, gone } = self;
        all.retain(|site| {
            let stays = Arc::strong_count(site) > 1;
            if !stays {
                let mut counted = site.lane.stats().snapshot();
                (counted.waiting, counted.in_flight) = (0, 0);
                gone.add(&counted);
            }
            stays
        });
        let found = all.iter().find(|site| site.settings == *settings);
        found.cloned()
    }
}

/// The tenants that were asked for, and the stores that they are in.
pub(super) struct Tenants {
    home: Arc<Site>,
    known: Mutex<BTreeMap<TenantName, Arc<Tenant>>>,
    groups: Mutex<BTreeMap<GroupOf, u32>>,
    /// Those of all that is attached, also of tenants that are known in another way by now.
    gates: Mutex<BTreeMap<TenantName, Vec<Weak<TenantGate>>>>,
    sites: Mutex<Sites>,
    /// Those with a store of their own that is not opened yet.
    unopened: Mutex<BTreeSet<TenantName>>,
}

impl Tenants {
    pub(super) fn new(home: Arc<Site>) -> Self {
        Self {
            home,
            known: Mutex::default(),
            groups: Mutex::default(),
            gates: Mutex::default(),
            sites: Mutex::default(),
            unopened: Mutex::default(),
        }
    }

    /// The daemon's own store.
    pub(super) fn home(&self) -> &Site {
        &self.home
    }

    /// Calls `look` with each store that tenants have of their own.
    pub(super) fn each_own_site(&self, look: impl FnMut(&Arc<Site>)) {
        self.sites.lock().all.iter().for_each(look);
    }

    /// What was asked of the stores that tenants have or had of their own.
    pub(super) fn own_counts(&self) -> StoreSnapshot {
        let sites = self.sites.lock();
        let mut counts = sites.gone.clone();
        for site in &sites.all {
            counts.add(&site.lane.stats().snapshot());
        }
        counts
    }

    /// Those that are known.
    pub(super) fn all(&self) -> Vec<Arc<Tenant>> {
        self.known.lock().values().cloned().collect()
    }

    fn known(&self, name: &TenantName) -> Option<Arc<Tenant>> {
        self.known.lock().get(name).cloned()
    }

    /// Ends the ways to tenants' own stores, as [`Lane::stop`].
    pub(super) fn stop(&self) {
        for site in &self.sites.lock().all {
            site.lane.stop();
        }
    }

    /// The store of these settings, where a tenant begins or has been; tenants of the same share the way to it.
    async fn site(
        &self,
        store: Option<&TenantStore>,
        begins: bool,
    ) -> Result<Arc<Site>, OpenError> {
        let Some(store) = store else {
            return Ok(Arc::clone(&self.home));
        };
        let settings = settings_of(store, &self.home.settings);
        let found = self.sites.lock().in_use(&settings);
        if let Some(found) = found {
            return Ok(found);
        }
        // Without the lock, which those wait for who want nothing of this store.
        let opened = Site::open(&settings, begins).await?;
        let mut sites = self.sites.lock();
        // Another may have come first.
        if let Some(found) = sites.in_use(&settings) {
            return Ok(found);
        }
        let others: Vec<_> = std::iter::once(&self.home).chain(&sites.all).collect();
        let site = Site::over(settings, opened, &others);
        sites.all.push(Arc::clone(&site));
        Ok(site)
    }

    /// Which group in the cache a tenant is, as it is in its record.
    fn group(&self, name: &TenantName, record: &TenantRecord) -> u32 {
        let own = record.settings.store.as_ref();
        let settings = own.map(|store| settings_of(store, &self.home.settings));
        let settings = settings.as_ref().unwrap_or(&self.home.settings);
        self.group_of(GroupOf {
            name: name.clone(),
            created_ms: record.created_ms,
            has_own: own.is_some(),
            url: settings.url.clone(),
            endpoint: settings.endpoint.clone(),
        })
    }

    fn group_of(&self, of: GroupOf) -> u32 {
        let mut groups = self.groups.lock();
        let next = u32::try_from(groups.len() + 1).expect("fewer tenants than u32 counts");
        *groups.entry(of).or_insert(next)
    }

    /// The names of these groups, by which another daemon knows them.
    pub(super) fn names_of(&self, wanted: &BTreeSet<u32>) -> HashMap<u32, String> {
        let groups = self.groups.lock();
        let name = |(of, group): (&GroupOf, &u32)| Some((*group, serde_json::to_string(of).ok()?));
        let wanted = groups.iter().filter(|(_, group)| wanted.contains(group));
        wanted.filter_map(name).collect()
    }

    /// The group of that name; none if it is none, or one of another store than the daemon has now.
    pub(super) fn group_named(&self, name: &str) -> Option<u32> {
        let of: GroupOf = serde_json::from_str(name).ok()?;
        let home = &self.home.settings;
        let is_here = of.has_own || (of.url == home.url && of.endpoint == home.endpoint);
        is_here.then(|| self.group_of(of))
    }

    /// Takes up what a record says.
    async fn learn(
        &self,
        name: &TenantName,
        record: TenantRecord,
    ) -> Result<Arc<Tenant>, OpenError> {
        if let Some(known) = newer(self.known(name), &record) {
            return Ok(known);
        }
        let at = Instant::now();
        if record.settings.store.is_some() {
            self.unopened.lock().insert(name.clone());
        }
        let site = self.site(record.settings.store.as_ref(), false).await?;
        self.unopened.lock().remove(name);
        let mut known = self.known.lock();
        // Overtaken while the store was being opened.
        if let Some(newer) = newer(known.get(name).cloned(), &record) {
            return Ok(newer);
        }
        let again = at + KNOWN_FOR;
        let seen = Seen { record, at, again };
        let group = self.group(name, &seen.record);
        let is_same = |had: &&Arc<Tenant>| had.record().created_ms == seen.record.created_ms;
        let before = known.get(name).filter(is_same);
        if let Some(tenant) = before.filter(|had| Arc::ptr_eq(&had.site, &site)) {
            self.tell_gates(name, &seen.record.settings);
            *tenant.seen.lock() = seen;
            return Ok(Arc::clone(tenant));
        }
        // New, reached in another way, or moved, and then with another gate.
        let account = before.map(|had| Arc::clone(&had.account));
        let gate = before.map(|had| Arc::clone(&had.gate));
        let gate = gate.filter(|gate| gate.group() == group);
        let gate = gate.unwrap_or_else(|| Arc::new(TenantGate::new(group)));
        self.keep_gate(name, &gate);
        self.tell_gates(name, &seen.record.settings);
        let kept = (account.unwrap_or_default(), gate);
        let new = Tenant::new(name.clone(), site, kept, seen);
        known.insert(name.clone(), Arc::clone(&new));
        Ok(new)
    }

    fn keep_gate(&self, name: &TenantName, gate: &Arc<TenantGate>) {
        let mut all = self.gates.lock();
        all.retain(|_, gates| {
            gates.retain(|gate| gate.strong_count() > 0);
            !gates.is_empty()
        });
        let gates = all.entry(name.clone()).or_default();
        let is_kept = |kept: &Weak<TenantGate>| Weak::as_ptr(kept) == Arc::as_ptr(gate);
        if !gates.iter().any(is_kept) {
            gates.push(Arc::downgrade(gate));
        }
    }

    /// What a record says is for all that is attached of its tenant, also from before it was made anew.
    fn tell_gates(&self, name: &TenantName, settings: &TenantSettings) {
        let gates = self.gates.lock();
        let gates = gates.get(name).into_iter().flatten();
        gates
            .filter_map(Weak::upgrade)
            .for_each(|gate| gate.set(settings));
    }
}

/// What is known, if it is newer: an answer that was overtaken by a change made here says nothing, least of all
/// where the tenant's volumes are.
fn newer(known: Option<Arc<Tenant>>, record: &TenantRecord) -> Option<Arc<Tenant>> {
    known.filter(|known| {
        let seen = known.seen.lock();
        seen.record.created_ms == record.created_ms && seen.record.revision > record.revision
    })
}

/// Whether two stores are on one S3 server, as far as their settings tell.
fn same_server(a: &StoreSettings, b: &StoreSettings) -> bool {
    let is_s3 = |of: &StoreSettings| of.url.starts_with("s3:");
    let server = |of: &StoreSettings| match &of.endpoint {
        Some(endpoint) => (Some(endpoint.clone()), None),
        None => (None, of.region.clone()),
    };
    is_s3(a) && is_s3(b) && server(a) == server(b)
}

/// What the daemon's own store is reached by stands in where a tenant's is silent.
fn settings_of(store: &TenantStore, home: &StoreSettings) -> StoreSettings {
    let own_server = store.endpoint.is_some();
    let by_home = store.credentials.is_none();
    let of_home = |text: &Option<String>| text.clone().filter(|_| by_home);
    StoreSettings {
        url: store.url.clone(),
        endpoint: store.endpoint.clone().or_else(|| home.endpoint.clone()),
        region: store.region.clone().or_else(|| home.region.clone()),
        access_key: of_home(&home.access_key),
        secret_key: home.secret_key.clone().filter(|_| by_home),
        session_token: home.session_token.clone().filter(|_| by_home),
        credentials: store
            .credentials
            .clone()
            .or_else(|| home.credentials.clone()),
        credentials_file: home.credentials_file.clone(),
        path_style: store
            .path_style
            .or_else(|| home.path_style.filter(|_| !own_server)),
        // What was set for one server says nothing of another.
        upload_check: match home.upload_check {
            UploadCheck::Crc64Nvme | UploadCheck::None if own_server => UploadCheck::Auto,
            check => check,
        },
        make_missing: home.make_missing,
    }
}

/// A tenant's record and its state in the store.
pub(crate) async fn read(store: &dyn Store, tenant: &TenantName) -> ApiResult<(TenantRecord, Tag)> {
    let key = keys::tenant_key(tenant);
    let mut damaged = None;
    // A second look tells damage from a bit flipped on its way.
    for _ in 0..2 {
        let (bytes, tag) = match store.get(&key).await {
            Ok(found) => found,
            Err(StoreError::NotFound { .. }) => return Err(ApiError::no_tenant(tenant)),
            Err(error) => return Err(error.into()),
        };
        match decode_record(TENANT_KIND, &bytes) {
            Ok(record) => return Ok((record, tag)),
            Err(error) => damaged = Some(error),
        }
    }
    let why = damaged.map(|error| error.to_string()).unwrap_or_default();
    Err(ApiError::new(
        Kind::Damaged,
        format!("{key}: {why}"),
        "make the tenant anew with `quarry tenant create` and its settings; its volumes stay",
    ))
}

fn encoded(record: &TenantRecord) -> ApiResult<Bytes> {
    let bytes = encode_record(TENANT_KIND, record);
    Ok(bytes
        .map_err(|error| ApiError::internal(error.to_string()))?
        .into())
}

/// Writes the record of a tenant that there is none of, or one that cannot be read; [`Kind::Exists`] if there is one.
async fn write_first(store: &dyn Store, name: &TenantName, record: &TenantRecord) -> ApiResult<()> {
    let (key, bytes) = (keys::tenant_key(name), encoded(record)?);
    match store.create(&key, bytes.clone()).await {
        Ok(_) => return Ok(()),
        Err(StoreError::Exists { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let (found, tag) = store.get(&key).await?;
    if found == bytes {
        // Our own, whose answer was lost.
        return Ok(());
    }
    if decode_record::<TenantRecord>(TENANT_KIND, &found).is_ok() {
        let message = format!("there is a tenant {name} already");
        let remedy = "choose another name, or change it with `quarry tenant update`";
        return Err(ApiError::new(Kind::Exists, message, remedy));
    }
    tracing::warn!(tenant = %name, "its record was damaged, and is made anew");
    store.replace(&key, bytes, &tag).await?;
    Ok(())
}

/// What becomes of a record that is as it is to be already.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Same {
    /// It is left alone.
    Left,
    /// It is written all the same. Who commands is told that it is so: a PUT that was given up before, and arrives
    /// later, is to find another record than it was made for.
    Written,
}

/// Changes a tenant's record, as [`Daemon::change_tenant`].
async fn change_record(
    store: &dyn Store,
    name: &TenantName,
    same: Same,
    change: impl Fn(&mut TenantRecord) -> ApiResult<()>,
) -> ApiResult<TenantRecord> {
    let key = keys::tenant_key(name);
    for _ in 0..CHANGE_TRIES_MAX {
        let (before, tag) = read(store, name).await?;
        let mut record = before.clone();
        change(&mut record)?;
        if record == before && same == Same::Left {
            return Ok(record);
        }
        record.revision += 1;
        match store.replace(&key, encoded(&record)?, &tag).await {
            Ok(_) => return Ok(record),
            // Somebody quicker, or our own lost answer: what is there tells, and the change is made of that.
            Err(StoreError::Changed { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let message = format!("tenant {name} is being changed by many others");
    Err(ApiError::new(Kind::Conflict, message, "try again"))
}

impl Daemon {
    /// A tenant, as it was at most [`KNOWN_FOR`] ago; while the daemon's store does not answer, as it was last.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none; what is wrong with its store.
    pub(super) async fn tenant(&self, name: &TenantName) -> ApiResult<Arc<Tenant>> {
        let known = self.tenants.known(name);
        if let Some(tenant) = &known
            && Instant::now() < tenant.seen.lock().again
        {
            tenant.site.check().await?;
            return Ok(Arc::clone(tenant));
        }
        let tenant = match (self.read_tenant(name).await, known) {
            // Its own store may do well while the daemon's does not.
            (Err(error), Some(known)) if error.kind != Kind::NotFound => {
                known.seen.lock().again = Instant::now() + ASK_AGAIN;
                known
            }
            (read, _) => read?,
        };
        tenant.site.check().await?;
        Ok(tenant)
    }

    /// A tenant, as its record says now.
    pub(super) async fn read_tenant(&self, name: &TenantName) -> ApiResult<Arc<Tenant>> {
        // One that is not there is remembered all the same: what is attached of it holds on to what is known.
        let (record, _) = read(&self.home, name).await?;
        self.learn_tenant(name, record).await
    }

    /// Whether a tenant has not been deleted since it was looked up.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if the daemon's store does not tell.
    pub(super) async fn is_still_there(&self, tenant: &Tenant) -> ApiResult<bool> {
        let name = &tenant.name;
        match read(&self.home, name).await {
            Ok((now, _)) => Ok(now.created_ms == tenant.record().created_ms),
            Err(error) if error.kind == Kind::NotFound => Ok(false),
            Err(error) => {
                let message = format!("whether tenant {name} is still there is not known: {error}");
                Err(ApiError::new(Kind::Unavailable, message, "try again"))
            }
        }
    }

    /// Puts back a record of a tenant whose deletion came to nothing.
    pub(super) async fn restore_tenant(
        &self,
        name: &TenantName,
        mut record: TenantRecord,
    ) -> ApiResult<()> {
        record.revision += 1;
        write_first(&self.home, name, &record).await?;
        self.learn_tenant(name, record).await.map(drop)
    }

    /// What was changed is, whether or not the tenant's store can be used.
    async fn learn_change(&self, name: &TenantName, record: TenantRecord) {
        if let Err(error) = self.learn_tenant(name, record).await {
            tracing::warn!(tenant = %name, %error, "the tenant was changed, and cannot be used");
        }
    }

    async fn learn_tenant(
        &self,
        name: &TenantName,
        record: TenantRecord,
    ) -> ApiResult<Arc<Tenant>> {
        let learnt = self.tenants.learn(name, record).await;
        let tenant = learnt.map_err(|error| cannot_open(name, &error))?;
        self.set_cache_share(&tenant);
        Ok(tenant)
    }

    /// A tenant as it is known now: what holds on to it since it was attached may know one whose record nobody reads any more.
    pub(super) fn now_of(&self, tenant: &Arc<Tenant>) -> Arc<Tenant> {
        let known = self.tenants.known(&tenant.name);
        known.unwrap_or_else(|| Arc::clone(tenant))
    }

    /// Whether the store that a tenant's volumes are looked for in has anything of the tenant: an empty one may be another, such as
    /// the folder that a file system is to be mounted on.
    pub async fn has_anything_of(&self, tenant: &TenantName) -> bool {
        let Ok(store) = self.control(tenant).await else {
            return false;
        };
        let found = store.list_some(&keys::tenant_prefix(tenant), 1).await;
        found.is_ok_and(|found| !found.is_empty())
    }

    /// Whether a tenant is known to have a store of its own.
    pub fn is_in_own_store(&self, name: &TenantName) -> bool {
        match self.tenants.known(name) {
            Some(tenant) => !Arc::ptr_eq(&tenant.site, &self.tenants.home),
            None => self.tenants.unopened.lock().contains(name),
        }
    }

    /// The way to a tenant's store for a control call.
    pub(super) async fn control(&self, tenant: &TenantName) -> ApiResult<Lane> {
        Ok(self.tenant(tenant).await?.control())
    }

    /// Makes a tenant, whose store is looked at first.
    pub(super) async fn make_tenant(
        &self,
        name: &TenantName,
        settings: TenantSettings,
    ) -> ApiResult<TenantRecord> {
        let record = TenantRecord {
            name: name.to_string(),
            created_ms: super::now_ms(),
            settings,
            ..TenantRecord::default()
        };
        self.check_store_of(name, record.settings.store.as_ref(), true)
            .await?;
        write_first(&self.home, name, &record).await?;
        self.learn_tenant(name, record.clone()).await?;
        Ok(record)
    }

    /// Looks at a store that a tenant is to have, and begins in or has been in.
    pub(super) async fn check_store_of(
        &self,
        name: &TenantName,
        store: Option<&TenantStore>,
        begins: bool,
    ) -> ApiResult<()> {
        let site = self.tenants.site(store, begins).await;
        let site = site.map_err(|error| cannot_open(name, &error))?;
        site.check().await
    }

    /// The way to a store that a tenant is to have, for a control call.
    pub(super) async fn store_for_control(
        &self,
        name: &TenantName,
        store: Option<&TenantStore>,
    ) -> ApiResult<Lane> {
        let site = self.tenants.site(store, false).await;
        let site = site.map_err(|error| cannot_open(name, &error))?;
        Ok(site.lane.with_deadline(CONTROL_DEADLINE))
    }

    /// Changes a tenant's record, where it was seen; done again while others change it too. `change` may be called
    /// more than once.
    pub(super) async fn change_tenant(
        &self,
        name: &TenantName,
        same: Same,
        change: impl Fn(&mut TenantRecord) -> ApiResult<()>,
    ) -> ApiResult<TenantRecord> {
        let record = change_record(&self.home, name, same, change).await?;
        self.learn_change(name, record.clone()).await;
        Ok(record)
    }

    /// Forgets a tenant that is no more.
    pub(super) fn forget_tenant(&self, name: &TenantName) {
        self.tenants.unopened.lock().remove(name);
        let known = self.tenants.known.lock().remove(name);
        if let Some(tenant) = known {
            self.give_up_cache_share(&tenant);
        }
    }

    /// Forgets tenants that nothing was wanted of for a while, but for those with something attached here.
    pub(super) fn forget_idle_tenants(&self, has_slots: impl Fn(&TenantName) -> bool) {
        let is_idle = |tenant: &Arc<Tenant>| {
            let seen = tenant.seen.lock().at;
            seen.elapsed() > REMEMBERED_FOR && !has_slots(&tenant.name)
        };
        for tenant in self.tenants.all() {
            // One in the table, one here.
            if is_idle(&tenant) && Arc::strong_count(&tenant) == 2 {
                self.forget_tenant(&tenant.name);
            }
        }
    }
}

fn cannot_open(tenant: &TenantName, error: &OpenError) -> ApiError {
    let message = format!("the store of tenant {tenant}: {error}");
    let kind = match error {
        OpenError::Folder { source, .. } => match source.kind() {
            // Such as the folder of a file system that is not mounted: it may come, and nobody is to take what is in it for gone.
            ErrorKind::NotFound | ErrorKind::PermissionDenied => Kind::Denied,
            ErrorKind::NotADirectory => Kind::Unsupported,
            _ if source.raw_os_error() == Some(libc::ELOOP) => Kind::Unsupported,
            // A file system whose server is away answers all kinds of errors.
            _ => Kind::Unavailable,
        },
        _ => Kind::Unsupported,
    };
    ApiError::new(kind, message, "")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::pin::pin;

    use super::*;
    use crate::store::{FolderStore, HANGS, Operation, Outcome, open_store};
    use quarry_config::Secret;
    use quarry_objfmt::Suspended;

    fn home() -> StoreSettings {
        StoreSettings {
            url: "s3://home/q".to_owned(),
            endpoint: Some("http://127.0.0.1:1".to_owned()),
            access_key: Some("id".to_owned()),
            secret_key: Some(Secret::new("hunter2")),
            ..StoreSettings::default()
        }
    }

    fn store(credentials: Option<&str>) -> TenantStore {
        TenantStore {
            url: "s3://acme".to_owned(),
            credentials: credentials.map(str::to_owned),
            ..TenantStore::default()
        }
    }

    #[test]
    fn keys_of_the_daemon_are_not_used_where_a_tenant_has_its_own() {
        let shared = settings_of(&store(None), &home());
        assert!(shared.secret_key.is_some() && shared.endpoint.is_some());
        let own = settings_of(&store(Some("profile:acme")), &home());
        assert!(own.secret_key.is_none() && own.access_key.is_none());
        assert_eq!(own.credentials.as_deref(), Some("profile:acme"));
    }

    fn tenants() -> Tenants {
        let store = open_store(&home()).unwrap();
        let lane = Lane::new(store, &LaneSettings::default());
        Tenants::new(Site::looked_at(home(), lane))
    }

    fn record(revision: u64, store: Option<TenantStore>) -> TenantRecord {
        TenantRecord {
            name: "acme".to_owned(),
            created_ms: 1,
            revision,
            settings: TenantSettings {
                store,
                ..TenantSettings::default()
            },
            ..TenantRecord::default()
        }
    }

    #[tokio::test]
    async fn record_overtaken_by_a_change_made_here_is_not_believed() {
        let (all, name) = (tenants(), TenantName::new("acme").unwrap());
        all.learn(&name, record(2, None)).await.unwrap();
        let tenant = all.learn(&name, record(1, None)).await.unwrap();
        assert_eq!(tenant.record().revision, 2);
        let again = TenantRecord {
            created_ms: 9,
            ..record(0, None)
        };
        let again = all.learn(&name, again).await.unwrap();
        assert_eq!(again.record().created_ms, 9);
    }

    /// A store in a folder that hangs while it is opened, until [`HANGS`] is gone.
    fn hanging(dir: &Path) -> TenantStore {
        fs::write(dir.join(provision::MARKER_KEY), "{}").unwrap();
        fs::write(dir.join(HANGS), "").unwrap();
        TenantStore {
            url: format!("file://{}", dir.display()),
            ..TenantStore::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn folder_that_hangs_while_it_is_opened_holds_up_no_other_tenant() {
        let (all, dir) = (tenants(), tempfile::tempdir().unwrap());
        let folder = hanging(dir.path());
        let (hung, other) = (
            TenantName::new("hung").unwrap(),
            TenantName::new("other").unwrap(),
        );
        {
            let mut hangs = pin!(all.learn(&hung, record(1, Some(folder.clone()))));
            tokio::select! {
                biased;
                _ = &mut hangs => panic!("it does not hang"),
                learnt = all.learn(&other, record(1, Some(store(None)))) => drop(learnt.unwrap()),
            }
            let mut sites = 0;
            all.each_own_site(|_| sites += 1);
            assert_eq!(sites, 1);
            assert!(all.unopened.lock().contains(&hung));
            tokio::time::advance(CONTROL_DEADLINE + Duration::from_secs(1)).await;
            let refused = hangs.await.err().unwrap();
            assert_eq!(cannot_open(&hung, &refused).kind, Kind::Unavailable);
        }
        tokio::time::resume();
        fs::remove_file(dir.path().join(HANGS)).unwrap();
        all.learn(&hung, record(1, Some(folder))).await.unwrap();
        assert!(all.unopened.lock().is_empty());
    }

    /// A folder of a file system whose server was away had its volumes given up by a start.
    #[test]
    fn folder_that_may_answer_later_is_not_told_to_be_none_for_good() {
        let tenant = TenantName::new("acme").unwrap();
        for (errno, kind) in [
            (libc::EIO, Kind::Unavailable),
            (libc::ENOTCONN, Kind::Unavailable),
            (libc::ESTALE, Kind::Unavailable),
            (libc::EMFILE, Kind::Unavailable),
            (libc::ENOENT, Kind::Denied),
            (libc::EACCES, Kind::Denied),
            (libc::ENOTDIR, Kind::Unsupported),
            (libc::ELOOP, Kind::Unsupported),
        ] {
            let error = OpenError::Folder {
                path: "/mnt".into(),
                remedy: "",
                source: std::io::Error::from_raw_os_error(errno),
            };
            assert_eq!(cannot_open(&tenant, &error).kind, kind, "{error}");
        }
    }

    #[tokio::test]
    async fn record_overtaken_while_its_store_is_opened_is_not_believed() {
        let (all, dir) = (tenants(), tempfile::tempdir().unwrap());
        let name = TenantName::new("acme").unwrap();
        let mut opening = pin!(all.learn(&name, record(1, Some(hanging(dir.path())))));
        tokio::select! {
            biased;
            _ = &mut opening => panic!("it does not hang"),
            learnt = all.learn(&name, record(2, None)) => drop(learnt.unwrap()),
        }
        fs::remove_file(dir.path().join(HANGS)).unwrap();
        assert_eq!(opening.await.unwrap().record().revision, 2);
    }

    fn suspended(how: Option<Suspended>) -> impl Fn(&mut TenantRecord) -> ApiResult<()> {
        move |record: &mut TenantRecord| {
            record.settings.suspended = how;
            Ok(())
        }
    }

    /// Who resumed it was told that it goes on, and then the command to suspend it arrived.
    #[tokio::test]
    async fn tenant_set_to_what_it_is_outdoes_a_change_given_up_before_that_arrives_later() {
        for how in [None, Some(Suspended::Stall)] {
            let dir = tempfile::tempdir().unwrap();
            let store = FolderStore::open(dir.path(), true).unwrap();
            let name = TenantName::new("acme").unwrap();
            let mut first = record(0, None);
            first.settings.suspended = how;
            write_first(&store, &name, &first).await.unwrap();
            let (mut late, seen) = read(&store, &name).await.unwrap();
            late.settings.suspended = match how {
                None => Some(Suspended::Stall),
                Some(_) => None,
            };
            late.revision += 1;
            let left = change_record(&store, &name, Same::Left, suspended(how)).await;
            assert_eq!(left.unwrap(), first);
            let written = change_record(&store, &name, Same::Written, suspended(how)).await;
            let late = encoded(&late).unwrap();
            let arrived = store.replace(&keys::tenant_key(&name), late, &seen).await;
            assert!(matches!(arrived, Err(StoreError::Changed { .. })));
            let (now, _) = read(&store, &name).await.unwrap();
            assert_eq!(now, written.unwrap());
            assert_eq!(now.settings.suspended, how);
        }
    }

    #[tokio::test]
    async fn tenants_of_one_store_share_the_way_and_one_that_moves_keeps_its_account() {
        let all = tenants();
        let (one, two) = (
            TenantName::new("one").unwrap(),
            TenantName::new("two").unwrap(),
        );
        let own = || record(0, Some(store(None)));
        let first = all.learn(&one, own()).await.unwrap();
        let second = all.learn(&two, own()).await.unwrap();
        assert!(Arc::ptr_eq(&first.site, &second.site));
        let moved = all.learn(&one, record(1, None)).await.unwrap();
        assert!(Arc::ptr_eq(&moved.site, &all.home));
        assert!(Arc::ptr_eq(moved.account(), first.account()));
        // What it cached is of where it was; and of the one that is there again.
        assert_ne!(moved.gate().group(), first.gate().group());
        let back = all.learn(&one, record(2, Some(store(None)))).await.unwrap();
        assert_eq!(back.gate().group(), first.gate().group());
    }

    /// The metrics of the daemon's stores went back then.
    #[tokio::test]
    async fn what_was_asked_of_a_store_counts_when_its_tenant_is_forgotten() {
        let (all, dir) = (tenants(), tempfile::tempdir().unwrap());
        let own = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join(provision::MARKER_KEY), "{}").unwrap();
            TenantStore {
                url: format!("file://{}", path.display()),
                ..TenantStore::default()
            }
        };
        let names = ["one", "two"].map(|name| TenantName::new(name).unwrap());
        let one = record(0, Some(own("one")));
        let one = all.learn(&names[0], one).await.unwrap();
        let prefix = keys::tenant_prefix(&names[0]);
        drop(one.control().list(&prefix).await.unwrap());
        let asked = all.own_counts();
        assert!(asked.attempts(Operation::List, Outcome::Ok) > 0);
        drop(one);
        all.known.lock().remove(&names[0]);
        all.learn(&names[1], record(0, Some(own("two"))))
            .await
            .unwrap();
        let mut sites = 0;
        all.each_own_site(|_| sites += 1);
        assert_eq!(sites, 1, "the first is forgotten");
        let list = |counts: &StoreSnapshot| counts.attempts(Operation::List, Outcome::Ok);
        assert!(list(&all.own_counts()) >= list(&asked));
    }
}
