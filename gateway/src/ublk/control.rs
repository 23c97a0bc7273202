//! The devices' life cycle: probe, add and start, find and recover, stop and delete.
//!
//! Each command runs on a short-lived thread of its own. libublk's control ring is thread-local, so
//! a control object must not leave its thread; and a command may wait in the kernel for the
//! device's own requests (starting reads the partition table, stopping writes the page cache back),
//! so that one stalled volume must not hold up the others' commands. No control object outlives its
//! command: the kernel and the file under `/run/ublksrvd` are the state. What no signal ends of these waits is a
//! child's ([`super::apart`]).
//!
//! A device is started in this order, and a crash between two steps leaves what is said:
//! 1. add: a dead device without a file, which serves nobody; [`Control::find`] shows it by its word.
//! 2. word to udev, file with the stamp, start: a device that can be recovered.
//! 3. node, udev's turn, owner and mode, link: a recovered device gets them anew.
//!
//! A volume grows before its device does, so a device that is left may be smaller than its volume:
//! [`Control::recover`] takes it over and then grows it.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkFlags, sys};
use quarry_objfmt::{Sectors, TenantName, VolumeId};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::sync::{Semaphore, oneshot};

use super::apart::{self, Answer, Task};
use super::stamp::{self, Stamp};
use super::udev::Udev;
use super::{
    Device, DeviceSpec, Features, IO_BYTES_MAX, LINK_ROOT, Mode, QUEUE_DEPTH, UblkError, link,
    params, run_folder, short_name,
};
use crate::places::Places;
use crate::reactor::ublk_queue::{Running, UblkQueue};

/// The kind of our devices, in libublk's file.
const TARGET: &str = "quarry";

/// The driver's control device.
const CONTROL_PATH: &str = "/dev/ublk-control";

/// Where the kernel lists the devices.
const LIST_PATH: &str = "/sys/class/ublk-char";

/// Commands under way at once; one whose kernel part hangs keeps its place.
const COMMANDS_MAX: usize = 64;

/// Of these, those about a tenant's devices, which may wait for its volumes: never all.
const TENANT_COMMANDS_MAX: usize = 32;

/// How long a reactor may take to give a new queue's commands to the kernel.
const QUEUE_START_MAX: Duration = Duration::from_secs(10);

/// How long a new device's first reads are waited for before its I/O scheduler is taken away all the same.
const IDLE_WAIT_MAX: Duration = Duration::from_secs(5);

/// How long a device's node may take to appear.
const NODE_MAX: Duration = Duration::from_secs(5);

/// The feature of changing the size of a device that is there (Linux 6.16).
const UPDATE_SIZE: u64 = sys::UBLK_F_UPDATE_SIZE as u64;

/// Pause between two looks at something that is about to happen.
const POLL: Duration = Duration::from_millis(5);

/// Gives a queue to the reactor that owns the volume. Called once for each of the device's queues, on
/// a thread that may wait. `Err` says why there is none.
pub type Host = Box<dyn FnMut(UblkQueue) -> Result<(), String> + Send>;

/// What the kernel says of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Added, never started, or stopped.
    Dead,
    /// Served by this process.
    Live {
        /// The process.
        pid: i32,
    },
    /// Its daemon died just now, and the kernel has not yet cleared up after it.
    Orphaned,
    /// Its daemon is gone; its requests wait to be served again.
    Quiesced,
    /// Its daemon is gone; its requests fail.
    Failing,
}

/// A ublk device of this host, ours or not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// N of `/dev/ublkbN`.
    pub id: u32,
    /// What it is doing.
    pub state: State,
    /// The stamp in its file, or else the one that udev was told, if it agrees with the kernel's word.
    pub stamp: Option<Stamp>,
    word: u64,
}

impl Found {
    /// Of all devices, the one that a dead daemon left for a volume: made for it by the kernel's own word, and not for one of its id
    /// of another tenant's, nor by a daemon with another cache, which has what the device's users were told to be written.
    ///
    /// # Errors
    /// [`UblkError::NotTaken`] if one may be it and cannot be taken over as it is: who uses that would wait for ever if the volume
    /// were given another.
    pub fn left_for(all: &[Self], spec: &DeviceSpec) -> Result<Option<u32>, UblkError> {
        let word = stamp::word(spec.volume);
        let mut not_taken = None;
        let may_be = |found: &&Self| found.word == word && found.state != State::Dead;
        for found in all.iter().filter(may_be) {
            let id = found.id;
            let why = match (&found.stamp, found.state) {
                (Some(stamp), _) if stamp.tenant != spec.tenant || stamp.cache != spec.cache => {
                    continue;
                }
                (Some(_), State::Live { pid }) => format!("process {pid} still serves it"),
                (Some(_), _) => return Ok(Some(id)),
                (None, _) => format!(
                    "{}/{id:04}.json does not say whose it is; if nobody needs it, end its users and delete it",
                    UblkCtrl::run_dir()
                ),
            };
            not_taken = Some(UblkError::NotTaken { id, why });
        }
        not_taken.map_or(Ok(None), Err)
    }

    /// Whether [`Control::recover`] can take it over.
    #[must_use]
    pub fn is_recoverable(&self) -> bool {
        matches!(
            self.state,
            State::Orphaned | State::Quiesced | State::Failing
        )
    }
}

/// Gives commands to the ublk driver. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Control {
    places: Arc<Semaphore>,
    of_tenants: Places<TenantName>,
    link_root: Arc<Path>,
    best: Mode,
    /// Requests' data must pass through this process' memory.
    copied: bool,
}

impl Default for Control {
    fn default() -> Self {
        Self::new(PathBuf::from(LINK_ROOT))
    }
}

impl Control {
    /// With the devices' names under `link_root`.
    #[must_use]
    pub fn new(link_root: PathBuf) -> Self {
        Self {
            places: Arc::new(Semaphore::new(COMMANDS_MAX)),
            of_tenants: Places::default(),
            link_root: link_root.into(),
            best: Mode::ZeroCopy,
            copied: false,
        }
    }

    /// The same, but new devices run in no better mode than this, whatever the driver can do.
    #[must_use]
    pub fn no_better_than(mut self, best: Mode) -> Self {
        self.best = best;
        self
    }

    /// The same, but no request's data go around this process' memory, those of devices that are taken over neither.
    #[must_use]
    pub fn always_copied(mut self) -> Self {
        self.best = self.best.max(Mode::UserCopy);
        self.copied = true;
        self
    }

    /// What the driver can do.
    ///
    /// # Errors
    /// [`UblkError::Absent`] and [`UblkError::Denied`], each with its remedy.
    pub async fn probe(&self) -> Result<Features, UblkError> {
        self.run(None, probe).await
    }

    /// Makes a device of a volume and starts it: when it returns the node is there, with the owner
    /// and the mode that were asked for. `host` gives the queue to the volume's reactor.
    ///
    /// # Errors
    /// Any; nothing is left behind then.
    pub async fn start(&self, spec: DeviceSpec, host: Host) -> Result<Device, UblkError> {
        let root = Arc::clone(&self.link_root);
        let (best, tenant) = (self.best, spec.tenant.clone());
        let command = move || start(&spec, host, best, &root);
        self.run(Some(&tenant), command).await
    }

    /// Clears up after daemons that died: what udev was told of devices that are gone.
    pub fn sweep(&self) {
        Udev::default().sweep(Path::new(LIST_PATH));
    }

    /// The ublk devices of this host.
    ///
    /// # Errors
    /// Only if the driver cannot be asked at all, or not about a device that may be ours; none without a driver.
    pub async fn find(&self) -> Result<Vec<Found>, UblkError> {
        self.run(None, find).await
    }

    /// Takes over the device that a dead daemon left for a volume. Requests that were under way
    /// come again, writes among them perhaps for the second time.
    ///
    /// # Errors
    /// [`UblkError::Foreign`] and [`UblkError::Shape`] if it is not this volume's as it is now (but a
    /// device smaller than its volume is grown, if the driver can);
    /// [`UblkError::Served`] if its daemon lives. The device is not deleted.
    pub async fn recover(
        &self,
        id: u32,
        spec: DeviceSpec,
        host: Host,
    ) -> Result<Device, UblkError> {
        let root = Arc::clone(&self.link_root);
        let (copied, tenant) = (self.copied, spec.tenant.clone());
        let command = move || recover(id, &spec, host, &root, copied);
        self.run(Some(&tenant), command).await
    }

    /// Grows the device of a volume to `size`; one that is as large already is left as it is. The
    /// volume must take requests up to that end.
    ///
    /// # Errors
    /// [`UblkError::FixedSize`] if the driver cannot; the device then serves on as it is.
    pub async fn grow(&self, id: u32, spec: &DeviceSpec, size: Sectors) -> Result<(), UblkError> {
        let volume = spec.volume;
        let command = move || grow(&open(id, volume)?, size);
        self.run(Some(&spec.tenant), command).await
    }

    /// Stops and deletes a volume's device. What the page cache holds for it is written first, unless `force`, so
    /// the volume must still be served: its front ends are stopped *after* this. A device that is
    /// gone already is fine. Its number is free when the last who has it open has closed it.
    ///
    /// # Errors
    /// [`UblkError::InUse`] unless `force`: with it, whoever uses the device gets errors.
    pub async fn remove(&self, id: u32, spec: DeviceSpec, force: bool) -> Result<(), UblkError> {
        let (root, tenant) = (Arc::clone(&self.link_root), spec.tenant.clone());
        let command = move || remove(id, &Stamp::of(&spec), force, &root);
        self.run(Some(&tenant), command).await
    }

    /// Stops and deletes a device that nobody will recover: who has it open gets errors, rather than
    /// to wait for ever.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub async fn remove_left(&self, id: u32, stamp: Stamp) -> Result<(), UblkError> {
        let (root, tenant) = (Arc::clone(&self.link_root), stamp.tenant.clone());
        let command = move || remove(id, &stamp, true, &root);
        self.run(Some(&tenant), command).await
    }

    /// Runs `command`, about a device of this tenant or about none, on a thread of its own.
    async fn run<T: Send + 'static>(
        &self,
        tenant: Option<&TenantName>,
        command: impl FnOnce() -> Result<T, UblkError> + Send + 'static,
    ) -> Result<T, UblkError> {
        let place = Arc::clone(&self.places)
            .try_acquire_owned()
            .map_err(|_| UblkError::Busy)?;
        let of_tenant = match tenant {
            Some(tenant) => {
                let place = self.of_tenants.take(tenant, TENANT_COMMANDS_MAX);
                Some(place.ok_or_else(|| UblkError::TenantBusy(tenant.clone()))?)
            }
            None => None,
        };
        let (send, answer) = oneshot::channel();
        let work = move || {
            prepare_thread();
            let result = command();
            drop((place, of_tenant));
            // Whoever asked may have gone; the command is carried out all the same.
            let _ = send.send(result);
        };
        std::thread::Builder::new()
            .name("ublk-control".to_owned())
            .spawn(work)
            .map_err(UblkError::Thread)?;
        answer
            .await
            .map_err(|_| UblkError::Thread(io::Error::other("its thread panicked")))?
    }
}

/// Makes the calling thread fit for commands: no signal may end a wait for the kernel early, as
/// libublk would take the command for failed while the kernel still writes into its buffer; and its
/// memory must not be reclaimed through the very device that it stops.
pub(super) fn prepare_thread() {
    let mut all = std::mem::MaybeUninit::uninit();
    // SAFETY: it writes the set it is given.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: the set was just filled, and the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut()) };
    UblkCtrl::init_queue_thread();
}

fn probe() -> Result<Features, UblkError> {
    match fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(CONTROL_PATH)
    {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(UblkError::Absent),
        Err(error) => return Err(UblkError::Denied(error)),
        Ok(_) => {}
    }
    // A driver that does not know the command is older than all we need.
    Ok(Features::from_bits(UblkCtrl::get_features().unwrap_or(0)))
}

fn start(spec: &DeviceSpec, host: Host, best: Mode, link_root: &Path) -> Result<Device, UblkError> {
    let features = probe()?;
    let mode = features.mode(best)?;
    run_folder::secure()?;
    let ctrl = UblkCtrlBuilder::default()
        .name(TARGET)
        .id(-1)
        .nr_queues(spec.queues)
        .depth(QUEUE_DEPTH)
        .io_buf_bytes(IO_BYTES_MAX)
        .ctrl_flags(mode.flags() | features.bits() & UPDATE_SIZE)
        .ctrl_target_flags(stamp::word(spec.volume))
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .map_err(|error| command(u32::MAX, "adding a device", error))?;
    // Until it is disowned, dropping `ctrl` deletes the device again.
    let id = ctrl.dev_info().dev_id;
    let told = Udev::default().tell(id, spec);
    let name = short_name(&spec.name, spec.snapshot.as_ref(), spec.at);
    let started = told.and_then(|()| {
        let mode = serve(&ctrl, spec, host)?;
        let node = wait_for_node(&ctrl)?;
        drop_scheduler(id);
        Udev::default().wait(id, &node, spec, true);
        if let Err(source) = spec.permissions.apply(&node) {
            return Err(UblkError::Permissions { node, source });
        }
        Ok(Device {
            id,
            link: link::make(link_root, &spec.tenant, &name, &node),
            node,
            mode,
            queues: ctrl.dev_info().nr_hw_queues,
            size: spec.size,
        })
    });
    match started {
        Ok(device) => {
            ctrl.disown();
            tracing::info!(device = %device.node.display(), volume = %spec.volume, mode = %device.mode, "device started");
            Ok(device)
        }
        Err(error) => {
            // Takes the commands from the queue, if it has any: the queue ends, the character
            // device is closed, and only then does the deletion return.
            let _ = apart::stop_device(id, spec.volume, false);
            Udev::default().forget(id, spec.volume);
            Err(error)
        }
    }
}

/// Takes the I/O scheduler from a new device, if it has one.
fn drop_scheduler(id: u32) {
    let schedulers = fs::read_to_string(format!("/sys/block/ublkb{id}/queue/scheduler"));
    if schedulers.is_ok_and(|schedulers| schedulers.contains("[none]")) {
        return;
    }
    // The first reads, of a partition table, may wait for the store: a child that waits for them outlives a daemon that
    // dies, and a service manager waits for it.
    let deadline = Instant::now() + IDLE_WAIT_MAX;
    while is_busy(id) && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
    match apart::run(Task::DropScheduler { id }) {
        Ok(Answer::Done) => {}
        answer => tracing::debug!(device = id, ?answer, "the device's I/O scheduler stays"),
    }
}

/// Whether requests of the device are under way.
fn is_busy(id: u32) -> bool {
    let under_way = fs::read_to_string(format!("/sys/block/ublkb{id}/inflight"));
    under_way.is_ok_and(|counts| counts.split_whitespace().any(|count| count != "0"))
}

fn recover(
    id: u32,
    spec: &DeviceSpec,
    host: Host,
    link_root: &Path,
    copied: bool,
) -> Result<Device, UblkError> {
    probe()?;
    let old = open(id, spec.volume)?;
    let left = params_of(&old)?;
    params::check(id, &left, spec)?;
    let info = old.dev_info();
    if copied && Mode::of_flags(info.flags) < Mode::UserCopy {
        return Err(UblkError::ZeroCopy { id });
    }
    drop(old);
    let ctrl = UblkCtrlBuilder::default()
        .name(TARGET)
        .id(i32::try_from(id).map_err(|_| UblkError::Foreign {
            id,
            volume: spec.volume,
        })?)
        .nr_queues(info.nr_hw_queues)
        .depth(info.queue_depth)
        .io_buf_bytes(info.max_io_buf_bytes)
        .dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
        .build()
        .map_err(|error| command(id, "opening it for recovery", error))?;
    // Waits until the kernel has cleared up after the dead daemon.
    match ctrl.start_user_recover() {
        Ok(answer) if answer == -libc::EBUSY => {
            return Err(UblkError::Served {
                id,
                pid: info.ublksrv_pid,
            });
        }
        Ok(_) => {}
        Err(error) => return Err(command(id, "starting its recovery", error)),
    }
    // A failure from here on leaves the device as it is until this process ends: what the reactor
    // has of it by then, the kernel gives back only to a daemon that comes after.
    // But what only its owner or name hang on is no failure: its users want their device first.
    if let Err(error) = Udev::default().tell(id, spec) {
        tracing::error!(%error, "udev is not told of the device");
    }
    let mode = serve(&ctrl, spec, host)?;
    let node = wait_for_node(&ctrl)?;
    Udev::default().wait(id, &node, spec, false);
    if let Err(source) = spec.permissions.apply(&node) {
        let error = UblkError::Permissions {
            node: node.clone(),
            source,
        };
        tracing::error!(%error, "the device is served as it is");
    }
    let name = short_name(&spec.name, spec.snapshot.as_ref(), spec.at);
    let link = link::make(link_root, &spec.tenant, &name, &node);
    tracing::info!(device = %node.display(), volume = %spec.volume, %mode, "device recovered");
    let size = match grow(&ctrl, spec.size) {
        Ok(()) => spec.size,
        // It serves as it did before.
        Err(error) => {
            tracing::warn!(device = %node.display(), %error, "the device stays smaller than its volume until it is attached anew");
            Sectors::new(left.basic.dev_sectors)
        }
    };
    Ok(Device {
        id,
        node,
        link,
        mode,
        queues: info.nr_hw_queues,
        size,
    })
}

/// Makes a started device at least `size` large.
fn grow(ctrl: &UblkCtrl, size: Sectors) -> Result<(), UblkError> {
    if params_of(ctrl)?.basic.dev_sectors >= size.get() {
        return Ok(());
    }
    if !probe()?.has(UPDATE_SIZE) {
        return Err(UblkError::FixedSize);
    }
    let id = ctrl.dev_info().dev_id;
    ctrl.update_size(size.bytes())
        .and_then(done)
        .map_err(|error| command(id, "growing it", error))?;
    tracing::info!(device = id, bytes = size.bytes(), "device grown");
    Ok(())
}

fn params_of(ctrl: &UblkCtrl) -> Result<sys::ublk_params, UblkError> {
    let mut params = sys::ublk_params::default();
    ctrl.get_params(&mut params)
        .and_then(done)
        .map_err(|error| command(ctrl.dev_info().dev_id, "reading its parameters", error))?;
    Ok(params)
}

/// Gives the device's queues to the reactor and starts the device, or ends its recovery. Answers the
/// mode of the worst of them.
fn serve(ctrl: &UblkCtrl, spec: &DeviceSpec, mut host: Host) -> Result<Mode, UblkError> {
    let info = ctrl.dev_info();
    let id = info.dev_id;
    let mode = Mode::of_flags(info.flags);
    let dev = UblkDev::new(
        TARGET.to_owned(),
        |dev| {
            dev.tgt.dev_size = spec.size.bytes();
            dev.tgt.params = params::of_spec(spec);
            dev.set_target_json(Stamp::of(spec).to_json());
            Ok(())
        },
        ctrl,
    )
    .map_err(|error| command(id, "opening its character device", error))?;
    let queue = |reason: String| UblkError::Queue { id, reason };
    let mut starting = Vec::new();
    for number in 0..info.nr_hw_queues {
        let cdev = character_device(&dev).map_err(|error| queue(error.to_string()))?;
        let (front_end, started) = UblkQueue::open(id, number, cdev, info.queue_depth, mode)
            .map_err(|error| queue(error.to_string()))?;
        host(front_end).map_err(queue)?;
        starting.push((number, started));
    }
    let mut worst = mode;
    for (number, started) in starting {
        let Running { tid, mode } = started
            .recv_timeout(QUEUE_START_MAX)
            .map_err(|error| queue(format!("its reactor gave no answer ({error})")))?
            .map_err(|error| queue(error.to_string()))?;
        worst = worst.max(mode);
        // libublk waits for it before it starts a device whose data the kernel copies.
        dev.notify_buffer_registration_complete(false);
        ctrl.configure_queue(&dev, number, tid)
            .map_err(|error| command(id, "asking for its queue's processors", error))?;
    }
    ctrl.start_dev(&dev)
        .and_then(done)
        .map_err(|error| command(id, "starting it", error))?;
    Ok(worst)
}

/// A descriptor of our own: the character device can be opened only once.
///
/// Not blocking, it never does: of such a file io_uring does reads and writes, which are copies here, at once, while of
/// others a thread of the kernel's does each.
fn character_device(dev: &UblkDev) -> io::Result<OwnedFd> {
    // SAFETY: entry 0 is the character device, open as long as `dev`.
    let fd = unsafe { BorrowedFd::borrow_raw(dev.tgt.fds[0]) }.try_clone_to_owned()?;
    fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    Ok(fd)
}

fn find() -> Result<Vec<Found>, UblkError> {
    match probe() {
        Ok(_) => {}
        Err(UblkError::Absent) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    let entries = match fs::read_dir(LIST_PATH) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(UblkError::Denied(error)),
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(id) = name
            .to_str()
            .and_then(|name| name.strip_prefix("ublkc")?.parse().ok())
        else {
            continue;
        };
        let asked = run_folder::secure()
            .and_then(|()| simple(id).map_err(|error| command(id, "asking for it", error)));
        match asked {
            Ok(ctrl) => found.push(describe(&ctrl)),
            // It is gone since it was listed, or is another user's.
            Err(_) if !entry.path().exists() || !Udev::default().knows(id) => {}
            Err(error) => {
                let why = error.to_string();
                return Err(UblkError::NotTaken { id, why });
            }
        }
    }
    found.sort_unstable_by_key(|device| device.id);
    Ok(found)
}

/// Whether a process has ended, if perhaps nobody took note of it yet.
fn is_gone(pid: i32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // The name before the state is in parentheses, and may hold any character.
        Ok(stat) => stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn describe(ctrl: &UblkCtrl) -> Found {
    let info = ctrl.dev_info();
    let state = match u32::from(info.state) {
        sys::UBLK_S_DEV_LIVE if is_gone(info.ublksrv_pid) => State::Orphaned,
        sys::UBLK_S_DEV_LIVE => State::Live {
            pid: info.ublksrv_pid,
        },
        sys::UBLK_S_DEV_QUIESCED => State::Quiesced,
        sys::UBLK_S_DEV_FAIL_IO => State::Failing,
        _ => State::Dead,
    };
    let word = info.ublksrv_flags;
    let id = info.dev_id;
    let json = ctrl.get_target_data_from_json();
    // libublk writes its file in place: a daemon that ends meanwhile leaves it empty.
    let told = || Udev::default().stamp(id);
    Found {
        id,
        state,
        stamp: borne_out(word, json.and_then(Stamp::from_json), told),
        word,
    }
}

/// Of what a device's two files say, what the kernel's word bears out.
fn borne_out(
    word: u64,
    json: Option<Stamp>,
    told: impl FnOnce() -> Option<Stamp>,
) -> Option<Stamp> {
    let agrees = |stamp: &Stamp| stamp::word(stamp.volume) == word;
    json.filter(agrees).or_else(|| told().filter(agrees))
}

fn remove(id: u32, stamp: &Stamp, force: bool, link_root: &Path) -> Result<(), UblkError> {
    let ctrl = match open(id, stamp.volume) {
        Ok(ctrl) => ctrl,
        Err(UblkError::Command { source, .. }) if source.raw_os_error() == Some(libc::ENODEV) => {
            Udev::default().forget(id, stamp.volume);
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let node = PathBuf::from(ctrl.get_bdev_path());
    apart::stop_device(id, stamp.volume, !force)?;
    let name = short_name(&stamp.name, stamp.snapshot.as_ref(), stamp.at);
    link::remove(link_root, &stamp.tenant, &name, &node);
    // While the number is still this device's.
    Udev::default().forget(id, stamp.volume);
    match delete(|| ctrl.del_dev_async(), || ctrl.del_dev()) {
        Ok(()) => {}
        Err(error) if errno(&error) == Some(libc::ENODEV) => {}
        Err(error) => return Err(command(id, "deleting it", error)),
    }
    tracing::info!(device = %node.display(), volume = %stamp.volume, "device removed");
    Ok(())
}

/// Deletes a device that was stopped. Does not wait for who still has it open, whoever that is, where the driver can do
/// so (from Linux 6.9 on; before, it answers by several numbers that it does not know the command).
fn delete(
    without_waiting: impl FnOnce() -> Result<i32, libublk::UblkError>,
    waiting: impl FnOnce() -> Result<i32, libublk::UblkError>,
) -> Result<(), libublk::UblkError> {
    match without_waiting().and_then(done) {
        Err(error) if errno(&error) != Some(libc::ENODEV) => waiting().and_then(done),
        deleted => deleted,
    }
}

/// The control object of a device that exists and is `volume`'s; `ENODEV` if there is none.
fn open(id: u32, volume: VolumeId) -> Result<UblkCtrl, UblkError> {
    run_folder::secure()?;
    let ctrl = simple(id).map_err(|error| {
        // libublk tries an older command then, and tells what the driver thinks of that.
        let gone = !Path::new(LIST_PATH).join(format!("ublkc{id}")).exists();
        let gone = gone.then_some(libublk::UblkError::UringIOError(-libc::ENODEV));
        command(id, "asking for it", gone.unwrap_or(error))
    })?;
    if ctrl.dev_info().ublksrv_flags != stamp::word(volume) {
        return Err(UblkError::Foreign { id, volume });
    }
    Ok(ctrl)
}

/// The control object of a device that exists; after [`run_folder::secure`], by this process or the one that started it.
pub(super) fn simple(id: u32) -> Result<UblkCtrl, libublk::UblkError> {
    UblkCtrl::new_simple(i32::try_from(id).map_err(|_| libublk::UblkError::InvalidVal)?)
}

/// Waits until the block device's node is there, and is this device's.
fn wait_for_node(ctrl: &UblkCtrl) -> Result<PathBuf, UblkError> {
    let node = PathBuf::from(ctrl.get_bdev_path());
    let of_device = params_of(ctrl)?;
    let wanted = rustix::fs::makedev(of_device.devt.disk_major, of_device.devt.disk_minor);
    let deadline = Instant::now() + NODE_MAX;
    loop {
        match fs::metadata(&node) {
            Ok(found) if found.file_type().is_block_device() && found.rdev() == wanted => {
                return Ok(node);
            }
            _ if Instant::now() >= deadline => return Err(UblkError::NoNode { node }),
            _ => std::thread::sleep(POLL),
        }
    }
}

/// libublk counts `EBUSY` among the successes.
pub(super) fn done(answer: i32) -> Result<(), libublk::UblkError> {
    if answer < 0 {
        Err(libublk::UblkError::UringIOError(answer))
    } else {
        Ok(())
    }
}

pub(super) fn errno(error: &libublk::UblkError) -> Option<i32> {
    match error {
        libublk::UblkError::UringIOError(code) | libublk::UblkError::OtherError(code) => {
            Some(code.abs())
        }
        libublk::UblkError::IOError(error) => error.raw_os_error(),
        _ => None,
    }
}

pub(super) fn command(id: u32, doing: &'static str, error: libublk::UblkError) -> UblkError {
    let source = match (errno(&error), error) {
        (Some(code), _) => io::Error::from_raw_os_error(code),
        (None, libublk::UblkError::IOError(error)) => error,
        (None, error) => io::Error::other(error),
    };
    UblkError::Command { id, doing, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_error_keeps_the_kernels_errno() {
        let error = command(
            3,
            "starting it",
            libublk::UblkError::UringIOError(-libc::EPERM),
        );
        let UblkError::Command { source, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(source.raw_os_error(), Some(libc::EPERM));
        assert!(
            error
                .to_string()
                .starts_with("ublk device 3: starting it failed: "),
            "{error}"
        );
    }

    #[test]
    fn busy_answer_is_an_error() {
        assert_eq!(
            done(-libc::EBUSY).map_err(|e| errno(&e)),
            Err(Some(libc::EBUSY))
        );
        assert!(done(0).is_ok());
    }

    #[test]
    fn device_is_deleted_by_the_older_command_where_the_newer_is_not_known() {
        let answer = |code: i32| move || Err(libublk::UblkError::UringIOError(-code));
        // The second is the kernel's own ENOTSUPP.
        for unknown in [libc::EOPNOTSUPP, 524, libc::EINVAL] {
            delete(answer(unknown), || Ok(0)).unwrap();
            assert!(delete(answer(unknown), answer(libc::EBUSY)).is_err());
        }
        let gone = delete(answer(libc::ENODEV), || Ok(0)).unwrap_err();
        assert_eq!(errno(&gone), Some(libc::ENODEV));
    }

    #[test]
    fn process_that_ended_is_gone_before_and_after_it_is_reaped() {
        assert!(!is_gone(std::process::id().cast_signed()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        while !is_gone(pid) {
            std::thread::sleep(POLL);
        }
        child.wait().unwrap();
        assert!(is_gone(pid));
    }

    fn stamp_of(volume: u8) -> Stamp {
        Stamp::of(&DeviceSpec {
            volume: VolumeId::from_bytes([volume; 16]),
            ..DeviceSpec::example()
        })
    }

    #[test]
    fn stamp_that_is_cut_off_is_had_from_what_udev_was_told_of_the_same_device() {
        let (own, others) = (stamp_of(7), stamp_of(6));
        let word = stamp::word(own.volume);
        let stamp = |json: Option<&Stamp>, told: Option<&Stamp>| {
            borne_out(word, json.cloned(), || told.cloned())
        };
        assert_eq!(stamp(Some(&own), None), Some(own.clone()));
        assert_eq!(stamp(None, Some(&own)), Some(own.clone()));
        assert_eq!(stamp(Some(&others), Some(&own)), Some(own.clone()));
        // The number was another device's before.
        assert_eq!(stamp(None, Some(&others)), None);
        assert_eq!(stamp(Some(&others), Some(&others)), None);
    }

    /// A mounted file system was left on the first for ever.
    #[test]
    fn second_device_is_not_made_beside_one_that_may_be_the_volumes() {
        let spec = DeviceSpec::example();
        let own = Stamp::of(&spec);
        let found = |id: u32, state: State, stamp: Option<&Stamp>| Found {
            id,
            state,
            stamp: stamp.cloned(),
            word: stamp::word(spec.volume),
        };
        let other_cache = Stamp::of(&DeviceSpec {
            cache: quarry_objfmt::CacheId::from_bytes([9; 16]),
            ..spec.clone()
        });
        let other_tenant = Stamp::of(&DeviceSpec {
            tenant: TenantName::new("zebra").unwrap(),
            ..spec.clone()
        });
        let live = State::Live { pid: 77 };
        let stranger = Found {
            word: 0,
            ..found(9, State::Quiesced, None)
        };
        let left = |all: &[Found]| Found::left_for(all, &spec);

        let nobodys = [
            stranger,
            found(1, State::Quiesced, Some(&other_cache)),
            found(2, live, Some(&other_cache)),
            found(3, State::Failing, Some(&other_tenant)),
            found(4, State::Dead, None),
            found(5, State::Dead, Some(&own)),
        ];
        assert_eq!(left(&nobodys).unwrap(), None);
        for state in [State::Quiesced, State::Failing, State::Orphaned] {
            let all = [found(6, state, None), found(7, state, Some(&own))];
            assert_eq!(left(&all).unwrap(), Some(7));
            let told = left(&all[..1]).unwrap_err().to_string();
            assert!(
                told.contains("device 6 ") && told.contains("/0006.json"),
                "{told}"
            );
        }
        let told = left(&[found(8, live, Some(&own))]).unwrap_err();
        assert!(told.to_string().contains("process 77"), "{told}");
    }

    #[tokio::test]
    async fn probe_without_a_driver_names_the_remedy() {
        if Path::new(CONTROL_PATH).exists() {
            quarry_tests::skip("this kernel has ublk");
            return;
        }
        let control = Control::default();
        let error = control.probe().await.unwrap_err();
        assert!(matches!(error, UblkError::Absent));
        assert!(error.to_string().contains("--via nbd"), "{error}");
        assert_eq!(control.find().await.unwrap(), Vec::new());
    }

    #[tokio::test]
    async fn commands_past_the_maximum_are_refused() {
        let control = Control::default();
        let _all = Arc::clone(&control.places)
            .acquire_many_owned(COMMANDS_MAX.try_into().unwrap())
            .await
            .unwrap();
        assert!(matches!(control.probe().await, Err(UblkError::Busy)));
    }

    #[tokio::test]
    async fn tenant_whose_commands_hang_leaves_the_others_places() {
        let control = Control::default();
        let tenant = |name: &'static str| TenantName::new(name).unwrap();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let wait = Arc::new(parking_lot::Mutex::new(wait));
        let hang = |control: Control| {
            let wait = Arc::clone(&wait);
            async move {
                let command = move || {
                    let _ = wait.lock().recv();
                    Ok(())
                };
                control.run(Some(&tenant("acme")), command).await
            }
        };
        let hanging: Vec<_> = (0..TENANT_COMMANDS_MAX)
            .map(|_| tokio::spawn(hang(control.clone())))
            .collect();
        while control.places.available_permits() > COMMANDS_MAX - TENANT_COMMANDS_MAX {
            tokio::task::yield_now().await;
        }
        let one_more = control.run(Some(&tenant("acme")), || Ok(())).await;
        assert!(
            matches!(one_more, Err(UblkError::TenantBusy(_))),
            "{one_more:?}"
        );
        control
            .run(Some(&tenant("zebra")), || Ok(()))
            .await
            .unwrap();
        drop(go);
        for hung in hanging {
            hung.await.unwrap().unwrap();
        }
        control.run(Some(&tenant("acme")), || Ok(())).await.unwrap();
    }
}
