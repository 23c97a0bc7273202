//! `quarry serve`: from a configuration to a running daemon, and its orderly end.
//!
//! Start: the control socket, the store, which is checked before anything is kept in it, and must be
//! the one of what was attached before; the cache device and what it kept, the reactors; then that
//! is attached again, several at a time: what the store cannot answer is tried until it does, and a volume that cannot
//! be attached is told of and left in the list. End: no more control calls, everything uploaded and
//! folded into the map; the volumes stay ours, and their ublk devices stay for the next daemon to
//! take over.

mod held;
mod notify;
mod replace;
mod same_cache;
mod same_store;
mod watchdog;

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use quarry_objfmt::TenantName;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use self::held::Held;
use self::notify::Manager;
use self::replace::Predecessor;
use crate::clock;
use crate::control::{
    self, ApiError, AttachInfo, Engine, ImageRef, Kind, ListenError, Listeners, Network,
};
use crate::engine::{Daemon, How, StoreNote, Whose, prepare_cache_key};
use crate::fair::{Gate, Place, Share, plain_share};
use crate::nbd::{listen_unix, may_listen_unix};
use crate::provision::{self, ProvisionError};
use crate::store::{Lane, LaneSettings, Store as _, StoreSettings, open_store};
use crate::tls::{Tls, TlsError, TlsFiles};
use crate::trace::export::Exporter;

/// Longest time that a request of the first look at the store waits for an answer.
const PREPARE_DEADLINE: Duration = Duration::from_secs(30);

/// Between two looks at a store that does not answer.
const CHECK_AGAIN_DELAY: Duration = Duration::from_secs(2);

/// Volumes attached again at once: each reads its log.
const ATTACH_AGAIN_AT_ONCE: usize = 8;

/// How long a start waits for a store of a tenant's own: a sound one has answered by then, and control calls wait for four times as long.
const OWN_STORE_WAIT_MAX: Duration = Duration::from_secs(5);

/// Between two tries to attach a volume again, at first and at most.
const ATTACH_AGAIN_DELAY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// What a stop takes at most beyond `daemon.stop_time_max`: calls and clients that are given time, and the last writes.
const STOP_MARGIN: Duration = Duration::from_secs(30);

/// Heaps of the C library at most. By default each of many threads has one of its own, and keeps in it what it has
/// freed: buffers of megabytes, in whichever thread a chunk was made or read.
const HEAPS_MAX: libc::c_int = 2;

/// Bounds the memory that lies freed and unused. To be called before there are threads.
pub fn bound_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number that is read when a thread gets its heap.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, HEAPS_MAX);
    }
}

/// Serves until SIGTERM or SIGINT. With `replace`, a daemon that serves at the same control socket is
/// stopped first, as late as can be.
///
/// # Errors
/// If something that serving needs cannot be had; each names what and what to do.
pub async fn run(config: quarry_config::Config, replace: bool) -> anyhow::Result<()> {
    // Its first reading takes some milliseconds, which devices' users would wait for once their daemon has been stopped.
    clock::now_ns();
    let manager = Arc::new(Manager::find(|name| std::env::var_os(name)));
    let settings = StoreSettings::from(&config.store);
    // First: opening it makes a folder that is missing.
    let is_where_noted = same_store::check(&config.daemon.data_dir, &settings).await?;
    let store = open_store(&settings)?;
    let lane = Lane::new(store, &LaneSettings::default());
    let cache_key = prepare_cache_key(&config).await?;
    let (listeners, fitness) = if replace {
        // What this one cannot do must not end the other.
        let fitness = match check_store(&settings, &lane).await? {
            Fitness::Unknown(error) if !is_where_noted => {
                return Err(anyhow::Error::new(error).context(
                    "the store does not answer, and is not known to be that of the daemon that serves, which goes on",
                ));
            }
            fitness => fitness,
        };
        Network::check(&config.access)?;
        nbd_certificates(&config.access)?;
        Exporter::check(&config.tracing)?;
        let ends = predecessor(&config.daemon.socket)?;
        let held = Held::of(ends.as_ref());
        may_listen(&config, &held).await?;
        may_listen_nbd(&config, ends.as_ref())?;
        Daemon::may_start(&config, &|file| held.has_file(file))?;
        if ends.is_some() {
            same_cache::check(&config.daemon.data_dir, &config.cache_path(), &held)?;
        }
        // The other attaches until it ends.
        let found = found(&settings, &fitness)?;
        same_store::check_again(&config.daemon.data_dir, &found)?;
        take_over(&config.daemon.socket, &manager).await?;
        // Its devices wait for a daemon that has their store: this one could take their volumes for deleted.
        same_store::check_again(&config.daemon.data_dir, &found).inspect_err(|_| {
            tracing::error!("the daemon that served has ended: what it attached last is in another store than this one's");
        })?;
        let listeners = Listeners::bind(&config.daemon.socket, config.daemon.listen).await?;
        (listeners, fitness)
    } else {
        // From here on clients wait rather than find nobody.
        let listeners = Listeners::bind(&config.daemon.socket, config.daemon.listen).await?;
        (listeners, check_store(&settings, &lane).await?)
    };
    let listeners = listeners.with_network(Network::bind(&config.access).await?);
    let nbd_tls = nbd_certificates(&config.access)?;
    let (nbd_socket, nbd_listen) = (config.nbd_socket(), config.daemon.nbd_listen);
    let stop_time_max = config.daemon.stop_time_max;
    let watched = Arc::new(OnceLock::new());
    let watchdog = manager.is_there().then(|| {
        let pause = watchdog::pause(|name| std::env::var_os(name));
        let rounds = watchdog::run(Arc::clone(&manager), Arc::clone(&watched), pause);
        tokio::spawn(rounds)
    });
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        store = %lane.describe(),
        cache = %config.cache_path().display(),
        socket = %config.daemon.socket.display(),
        listen = config.daemon.listen.map(tracing::field::display),
        network = config.access.listen.map(tracing::field::display),
        "starting"
    );
    let daemon = Daemon::start(config, lane.clone(), cache_key)?;
    let _ = watched.set(Arc::clone(&daemon));
    match fitness {
        Fitness::Fit(id) => note_store(&daemon, &settings, id).await,
        Fitness::Unknown(error) => {
            daemon.set_fit(Err(unchecked(&error)));
            tokio::spawn(check_store_later(
                Arc::clone(&daemon),
                settings,
                lane.clone(),
            ));
        }
    }
    let nbd = daemon.nbd_server();
    let unix = listen_unix(&nbd_socket)?;
    tokio::spawn({
        let nbd = nbd.clone();
        async move { nbd.serve_unix(unix).await }
    });
    if let Some(address) = nbd_listen {
        let tcp = tokio::net::TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen for NBD on {address}"))?;
        tokio::spawn(async move {
            match nbd_tls {
                Some(tls) => nbd.serve_tls(tcp, tls).await,
                None => nbd.serve_tcp(tcp).await,
            }
        });
    }

    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let shutdown = {
        let manager = Arc::clone(&manager);
        async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
                _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
            }
            manager.stopping(stop_time_max.saturating_add(STOP_MARGIN));
        }
    };
    tokio::spawn(Arc::clone(&daemon).keep_index());
    let again = tokio::spawn(attach_again(Arc::clone(&daemon)));
    let follow = tokio::spawn(Arc::clone(&daemon).follow_tenants());
    let trash = tokio::spawn({
        let daemon = Arc::clone(&daemon);
        async move { daemon.empty_trash().await }
    });
    let rates = tokio::spawn({
        let daemon = Arc::clone(&daemon);
        async move { daemon.look_at_rates().await }
    });
    let engine: Arc<dyn Engine> = Arc::clone(&daemon) as _;
    // Who calls from now on is answered, and every signal is minded.
    manager.ready();
    control::serve(engine, daemon.access(), listeners, shutdown).await?;
    again.abort();
    // Wherever it is: the next daemon goes on.
    trash.abort();
    follow.abort();
    rates.abort();
    if tokio::time::timeout(stop_time_max, daemon.drain_all())
        .await
        .is_err()
    {
        tracing::warn!("the store did not take everything in time; the rest stays in the cache");
    }
    if let Some(watchdog) = watchdog {
        watchdog.abort();
    }
    daemon.stop().await;
    daemon.stop_asking();
    Ok(())
}

/// That NBD's socket can be made when the daemon to be replaced has ended. Without one, nothing is lost by finding out.
fn may_listen_nbd(
    config: &quarry_config::Config,
    ends: Option<&Predecessor>,
) -> anyhow::Result<()> {
    let Some(ends) = ends else { return Ok(()) };
    let socket = config.nbd_socket();
    let folder = socket.parent().filter(|folder| !folder.exists());
    // That one is made with the control socket.
    if folder.is_some() && folder == config.daemon.socket.parent() {
        return Ok(());
    }
    Ok(may_listen_unix(&socket, Some(ends.pid()))?)
}

/// That the addresses can be listened on, once who is to be replaced has let go of what it has.
async fn may_listen(config: &quarry_config::Config, held: &Held) -> Result<(), ListenError> {
    let wanted = [
        (config.daemon.listen, "daemon.listen"),
        (config.daemon.nbd_listen, "daemon.nbd_listen"),
        (config.access.listen, "access.listen"),
    ];
    for (address, key) in wanted {
        let Some(address) = address else { continue };
        match tokio::net::TcpListener::bind(address).await {
            Ok(_) => {}
            Err(source)
                if source.kind() == std::io::ErrorKind::AddrInUse
                    && !held.others_listen_on(address) => {}
            Err(source) => {
                return Err(ListenError::Tcp {
                    address,
                    key,
                    source,
                });
            }
        }
    }
    Ok(())
}

/// What NBD over TCP is to be served with, if with TLS.
fn nbd_certificates(access: &quarry_config::Access) -> Result<Option<Arc<Tls>>, TlsError> {
    let (Some(cert), Some(key), Some(ca)) = (
        access.tls_cert.clone(),
        access.tls_key.clone(),
        access.nbd_client_ca.clone(),
    ) else {
        return Ok(None);
    };
    let files = TlsFiles {
        cert,
        key,
        client_ca: Some(ca),
    };
    Tls::load(files, &[]).map(Some)
}

/// The daemon that serves at `socket`, if there is one.
fn predecessor(socket: &Path) -> anyhow::Result<Option<Predecessor>> {
    Predecessor::find(socket).with_context(|| {
        format!(
            "the daemon at {} cannot be replaced: stop it by hand",
            socket.display()
        )
    })
}

/// Stops the daemon that serves at `socket`, if there is one, and waits until it has ended.
async fn take_over(socket: &Path, manager: &Manager) -> anyhow::Result<()> {
    let Some(predecessor) = predecessor(socket)? else {
        tracing::info!("no daemon is running that could be replaced");
        return Ok(());
    };
    let pid = predecessor.pid();
    tracing::info!(
        pid,
        "replacing a daemon: it sends what it has to the store, and stops"
    );
    manager.taking_over();
    tokio::task::spawn_blocking(move || predecessor.stop())
        .await?
        .with_context(|| format!("the daemon to be replaced, process {pid}, cannot be stopped"))
}

/// What is known of the store.
enum Fitness {
    /// With the id that its marker gives it, if it does.
    Fit(Option<String>),
    /// It does not answer.
    Unknown(ProvisionError),
}

/// The store as it was found.
fn found(settings: &StoreSettings, fitness: &Fitness) -> anyhow::Result<StoreNote> {
    let place = settings.place()?.describe();
    let id = match fitness {
        Fitness::Fit(id) => id.clone(),
        Fitness::Unknown(_) => None,
    };
    Ok(StoreNote { place, id })
}

/// Looks at the store before anything is kept in it.
async fn check_store(settings: &StoreSettings, lane: &Lane) -> Result<Fitness, ProvisionError> {
    let limited = lane.with_deadline(PREPARE_DEADLINE);
    match provision::prepare(settings, &limited).await {
        Ok(prepared) => {
            for warning in &prepared.warnings {
                tracing::warn!("{warning}");
            }
            if prepared.made_bucket {
                tracing::info!("made the bucket");
            }
            if prepared.probed {
                tracing::info!("the store keeps two writers apart");
            }
            Ok(Fitness::Fit(prepared.id))
        }
        Err(error) if error.is_transient() => {
            tracing::warn!(%error, "the store could not be checked yet");
            Ok(Fitness::Unknown(error))
        }
        Err(error) => Err(error),
    }
}

/// Looks at a store that did not answer, until it does. Nothing is made or attached before.
async fn check_store_later(daemon: Arc<Daemon>, settings: StoreSettings, lane: Lane) {
    loop {
        tokio::time::sleep(CHECK_AGAIN_DELAY).await;
        match check_store(&settings, &lane).await {
            Ok(Fitness::Fit(id)) => {
                // First: what is attached from now on is in this store.
                note_store(&daemon, &settings, id).await;
                return daemon.set_fit(Ok(()));
            }
            Ok(Fitness::Unknown(error)) => daemon.set_fit(Err(unchecked(&error))),
            Err(error) => {
                tracing::error!(%error, "the store cannot be used");
                let remedy = "mend the store and start the daemon anew";
                return daemon.set_fit(Err(ApiError::new(
                    Kind::Unsupported,
                    error.to_string(),
                    remedy,
                )));
            }
        }
    }
}

/// Notes that the volumes which are attached here from now on are in this store.
async fn note_store(daemon: &Daemon, settings: &StoreSettings, id: Option<String>) {
    let Ok(place) = settings.place() else { return };
    let place = place.describe();
    let noted = daemon.wanted().note_store(StoreNote { place, id }).await;
    if let Err(error) = noted {
        tracing::warn!(%error, "the list of attached volumes cannot be written, and does not say in which store they are");
    }
}

fn unchecked(error: &ProvisionError) -> ApiError {
    let message = format!("the store was not found fit yet: {error}");
    ApiError::new(
        Kind::Unavailable,
        message,
        "try again when the store answers",
    )
}

/// Attaches what was attached when the last daemon of this data folder ended: tenants in turn, and one whose own store
/// hangs leaves the others their places. The daemon is ready when all is attached, or has been tried and waits for a
/// tenant's own store.
async fn attach_again(daemon: Arc<Daemon>) {
    let wanted = daemon.wanted().all();
    let mut left = wanted.len();
    if left > 0 {
        daemon.set_ready(Err(format!("{left} volumes are being attached again")));
        daemon.look_for_left_devices().await;
    }
    let places = Gate::new(ATTACH_AGAIN_AT_ONCE);
    let mut tenants: BTreeMap<TenantName, Arc<Returning>> = BTreeMap::new();
    let (told, mut settled) = tokio::sync::mpsc::unbounded_channel();
    // Dropped with this task, they end.
    let mut tries = tokio::task::JoinSet::new();
    for (volume, how) in wanted {
        let tenant = tenants.entry(volume.volume.tenant.clone());
        let tenant = Arc::clone(tenant.or_default());
        let again = AttachAgain {
            daemon: Arc::clone(&daemon),
            places: places.clone(),
            tenant,
            told: Some(told.clone()),
        };
        tries.spawn(again.run(volume, how));
    }
    drop(told);
    // One for each volume.
    while settled.recv().await.is_some() {
        left -= 1;
        daemon.set_ready(Err(format!("{left} volumes are being attached again")));
    }
    daemon.remove_left_devices().await;
    daemon.set_ready(Ok(()));
    while let Some(ended) = tries.join_next().await {
        if let Err(error) = ended {
            // A defect of ours in one of them, which is not to end the others.
            tracing::error!(%error, "a volume is not attached again any more");
        }
    }
}

/// A tenant whose volumes come back.
struct Returning {
    share: Arc<Share>,
    /// Its own store was found away: none of its volumes is waited for.
    is_away: watch::Sender<bool>,
}

impl Default for Returning {
    fn default() -> Self {
        Self {
            share: plain_share(),
            is_away: watch::Sender::new(false),
        }
    }
}

/// One volume's way back.
struct AttachAgain {
    daemon: Arc<Daemon>,
    places: Gate,
    tenant: Arc<Returning>,
    /// Told once, when the daemon's readiness does not wait for it any more.
    told: Option<tokio::sync::mpsc::UnboundedSender<()>>,
}

impl AttachAgain {
    /// Whether what is not there is gone for good: where its tenant is not either, the store may be another one, such as
    /// the folder that a file system is to be mounted on.
    async fn was_deleted(&self, volume: &ImageRef) -> bool {
        let tenant = &volume.volume.tenant;
        let is_there = self.daemon.show_tenant(tenant).await.is_ok();
        // The tenant's record is in the daemon's store, and says nothing of another.
        is_there
            && (!self.daemon.is_in_own_store(tenant) || self.daemon.has_anything_of(tenant).await)
    }

    /// Tries until it works or cannot.
    async fn run(mut self, volume: ImageRef, how: How) {
        let mut delay = ATTACH_AGAIN_DELAY.0;
        // Who detaches it meanwhile takes it out of the list.
        while self.daemon.wanted().contains(&volume) {
            let place = self.place().await;
            let attached = self.attach(&volume, &how).await;
            drop(place);
            let attached = match attached {
                // It was detached while it waited for its turn.
                Err(_) if !self.daemon.wanted().contains(&volume) => break,
                attached => attached,
            };
            let mut error = match attached {
                Ok(info) => {
                    tracing::info!(%volume, device = ?info.device, uri = ?info.uri, "attached again");
                    break;
                }
                Err(error) => error,
            };
            if error.kind == Kind::Conflict && self.daemon.is_attached(&volume) {
                tracing::info!(%volume, "attached by somebody else meanwhile");
                break;
            }
            // Its claim has found that out; here is asked why it was refused, which alone decides what becomes of the device.
            let writes = !how.read_only && !volume.is_past();
            if error.kind == Kind::Conflict && writes {
                match self.daemon.whose_is(&volume, &how).await {
                    Ok(Whose::Ours) => {}
                    // The configuration may name the wrong one. That is not to end what users of its device wait for.
                    Ok(Whose::OtherCache(cache)) => {
                        error = ApiError::new(
                            Kind::Conflict,
                            format!(
                                "it was attached with cache {cache}, which is not this daemon's"
                            ),
                            "set `cache.path` to that; if that is lost, attach it with --force, or detach it",
                        );
                    }
                    Ok(Whose::Others) => {
                        tracing::error!(%volume, "it was taken from this host: it is not attached again, and a device that it had is removed");
                        self.unlist(&volume).await;
                        break;
                    }
                    Err(unknown) => error = unknown,
                }
            }
            if error.kind == Kind::NotFound && self.was_deleted(&volume).await {
                tracing::error!(%volume, %error, "it was deleted: it is not attached again, and a device that it had is removed");
                self.unlist(&volume).await;
                break;
            }
            self.daemon.wanted().note(&volume, Some(error.to_string()));
            match error.kind {
                Kind::Unavailable if !self.daemon.is_in_own_store(&volume.volume.tenant) => {}
                // A tenant's own store is not waited for by others.
                Kind::Unavailable => {
                    self.tenant.is_away.send_replace(true);
                    self.settle();
                }
                // A key may come back, or a right, or the file system that the store is on.
                Kind::Denied | Kind::NotFound => self.settle(),
                // Descriptors or threads may be had again.
                Kind::Internal if !self.daemon.is_attached(&volume) => self.settle(),
                _ => {
                    tracing::error!(%volume, %error, "cannot be attached again");
                    break;
                }
            }
            tracing::warn!(%volume, %error, "cannot be attached again yet");
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(ATTACH_AGAIN_DELAY.1);
        }
        self.settle();
    }

    /// Tries once, and does not let the daemon wait for a store of its tenant's own that does not answer soon.
    async fn attach(&mut self, volume: &ImageRef, how: &How) -> control::ApiResult<AttachInfo> {
        let daemon = Arc::clone(&self.daemon);
        let mut attached = pin!(daemon.attach_again(volume, how));
        loop {
            tokio::select! {
                attached = &mut attached => return attached,
                () = tokio::time::sleep(OWN_STORE_WAIT_MAX), if self.told.is_some() => {
                    if daemon.is_in_own_store(&volume.volume.tenant) {
                        self.tenant.is_away.send_replace(true);
                        self.settle();
                    }
                }
            }
        }
    }

    /// It is not attached again; a device of it goes too, with those of others that nobody wants, or now if those are gone.
    async fn unlist(&self, volume: &ImageRef) {
        if let Err(error) = self.daemon.wanted().remove(volume).await {
            tracing::error!(%volume, %error, "the list of attached volumes cannot be written");
            let problem =
                format!("it is not attached again, but the list cannot be written: {error}");
            self.daemon.wanted().note(volume, Some(problem));
            return;
        }
        if self.told.is_none() {
            self.daemon.remove_device_of_unlisted(volume).await;
        }
    }

    /// Waits for its turn, and does not let the daemon wait for it if its tenant's store is away.
    async fn place(&mut self) -> Place {
        let (places, tenant) = (self.places.clone(), Arc::clone(&self.tenant));
        let mut turn = pin!(places.enter(&tenant.share));
        let mut is_away = tenant.is_away.subscribe();
        loop {
            tokio::select! {
                place = &mut turn => return place,
                // Its sender is the tenant's, which lives.
                _ = is_away.wait_for(|away| *away), if self.told.is_some() => self.settle(),
            }
        }
    }

    fn settle(&mut self) {
        if let Some(told) = self.told.take() {
            // Nobody listens when the daemon ends.
            let _ = told.send(());
        }
    }
}
