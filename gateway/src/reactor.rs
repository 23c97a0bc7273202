//! Reactors: OS threads that carry out what volumes ask for, each on one io_uring.
//!
//! A reactor owns the volumes given to it and all of their front ends. Its loop: wait for
//! completions, turn them into events, let the volumes answer with actions, turn those into ring
//! operations, submit all of it at once. Hits, writes and flushes never leave the thread; what needs
//! the store is handed to the volume's [`BackendSink`], and the answer comes back as a message over
//! a bounded channel with an eventfd for a doorbell.
//!
//! Owns: the ring, the table of operations under way, the requests of each volume, the threads.
//! Does not own: what a volume decides (`quarry-volume`), how requests come in ([`FrontEnd`]s).
//!
//! Invariants:
//! - Every request is completed exactly once, and not before the last ring operation on its buffer.
//! - No call on the thread blocks but the ring's own wait.
//! - A panic on the thread aborts the process: unwinding would free memory that the kernel uses.
//!   To a volume that is a crash, which it survives.

mod core;
pub mod direct;
mod doorbell;
pub(crate) mod errand;
mod execute;
pub mod frontend;
mod hold;
pub(crate) mod memory;
mod op;
mod rate;
mod ring;
mod runs;
mod sync;
mod token;
mod trails;
pub mod ublk_queue;

#[cfg(test)]
pub(crate) mod testing;

use std::any::Any;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;

use quarry_cache::{Geometry as CacheGeometry, SectorCipher, SyncFailure};
use quarry_objfmt::{Generation, Record, Sectors, SegmentId};
use quarry_volume::{Action, Event, IoId};
use tokio::sync::{mpsc, oneshot};

use self::core::Core;
use self::direct::Body;
use self::doorbell::Doorbell;
use self::errand::Errand;
use crate::kept_writes::KeptWrites;
use crate::latency::Timed;
use crate::qos::VolumeGate;
use crate::trace::Trail;

pub use self::frontend::{Buffer, FrontEnd, Geometry, Port};
pub use self::trails::Traced;

/// Messages that wait for a reactor: past it, senders wait.
const MESSAGES_MAX: usize = 4096;

/// Requests a second that a volume may begin to make, by which quiet volumes are spread evenly.
const REQUESTS_EXPECTED: u64 = 100;

/// A volume as a reactor sees it: the state machine, and its shape.
pub trait Machine: Any + Send {
    /// Takes an event and answers with actions.
    fn apply(&mut self, event: Event, out: &mut Vec<Action>);

    /// Takes a batch of events, in order, and leaves `events` empty. For machines that take a lock:
    /// once a batch. `now_ms` is the time of the batch, as in [`Event::Tick`].
    fn apply_all(&mut self, _now_ms: u64, events: &mut Vec<Event>, out: &mut Vec<Action>) {
        for event in events.drain(..) {
            self.apply(event, out);
        }
    }

    /// Takes an [`Action::Journal`]: done before any action that comes after it. For machines that
    /// take no writes: never called.
    fn journal(&mut self, _segment: SegmentId, _generation: Generation, _record: &Record) {}

    /// So many bytes of its requests passed through this process' memory: counted where they do, not
    /// where they should not.
    fn copied(&mut self, _bytes: u64) {}

    /// The kernel moves so many bytes of its requests between their own pages and the cache device.
    fn moved_in_place(&mut self, _bytes: u64) {}

    /// A request of it that ended well, or its waiting for a limit, took so long: from the batch in which it was
    /// taken up to the one in which it was done, in nanoseconds.
    fn took(&mut self, _what: Timed, _ns: u64) {}

    /// Its shape; asked once, when the reactor gets it. From then on only its size changes, by
    /// [`Message::Grow`].
    fn geometry(&self) -> Geometry;

    /// How fast its requests are taken; asked once, like its shape. None: as fast as can be.
    fn gate(&self) -> Option<Arc<VolumeGate>> {
        None
    }

    /// How its requests are traced; asked once, like its shape. None: not at all.
    fn traced(&self) -> Option<Traced> {
        None
    }

    /// Whether it wants an [`Event::Tick`] now.
    fn wants_tick(&self) -> bool {
        true
    }
}

/// Where a volume's actions go that need the store or the operator: `Fetch`, `LoadNodes`, `Upload`,
/// `Checkpoint`, `Drained`, `Warmed`, `Report`; and `FetchDirect`, to be answered by [`Message::Direct`].
pub trait BackendSink: Send {
    /// Takes the action; must not block. The volume itself bounds how many are under way.
    fn submit(&self, action: Action);

    /// As [`BackendSink::submit`] for a fetch of a single frame that somebody waits for, or gives the work for the reactor
    /// to go on it by itself.
    fn begin(&self, action: Action) -> Option<Errand> {
        self.submit(action);
        None
    }
}

/// A volume's name on its reactor; never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VolumeKey(u32);

/// A name that no volume gets.
const NO_VOLUME: VolumeKey = VolumeKey(u32::MAX);

/// A look at a volume, or at its absence.
pub type Look = Box<dyn FnOnce(Option<&dyn Machine>) + Send>;

/// What a reactor is told by other threads.
pub enum Message {
    /// Serve this volume.
    AddVolume {
        /// From [`ReactorHandle::new_key`].
        key: VolumeKey,
        /// The volume.
        machine: Box<dyn Machine>,
        /// Where its store calls go.
        backend: Box<dyn BackendSink>,
    },
    /// Feed [`Event::Stop`], stop the front ends, wait for all requests and cache I/O, and give the
    /// volume back (`None` if there is none of this name).
    RemoveVolume {
        /// Which.
        key: VolumeKey,
        /// Gets the volume.
        done: oneshot::Sender<Option<Box<dyn Machine>>>,
    },
    /// Stop the volume's front ends and say when the last one is gone. New ones may be added after that; those that come before are dropped.
    StopFrontEnds {
        /// Which.
        key: VolumeKey,
        /// Told at the end.
        done: oneshot::Sender<()>,
    },
    /// Feed an event: the answer of a backend, or a drain. Dropped if the volume is gone.
    VolumeEvent {
        /// Which.
        key: VolumeKey,
        /// What.
        event: Event,
    },
    /// As [`Message::VolumeEvent`], with what the backend did for it.
    Recorded {
        /// Which.
        key: VolumeKey,
        /// What.
        event: Event,
        /// The spans of it.
        trail: Box<Trail>,
    },
    /// Give the volume a larger size: feed [`Event::Grown`], and let front ends bring what reaches up
    /// to the new end.
    Grow {
        /// Which.
        key: VolumeKey,
        /// The size; one that is not larger changes nothing.
        size: Sectors,
        /// Told when requests are taken up to the new end; false if there is no such volume.
        done: oneshot::Sender<bool>,
    },
    /// Add a front end; it is dropped without a call if the volume is gone or going.
    AddFrontEnd {
        /// Of which volume.
        key: VolumeKey,
        /// The front end.
        front_end: Box<dyn FrontEnd>,
    },
    /// The backend's answer to [`Action::FetchDirect`]: exactly one. Dropped if the volume is gone.
    Direct {
        /// Of which volume.
        key: VolumeKey,
        /// The volume's name for the read.
        io: IoId,
        /// What to receive; `None` if it cannot be had this way.
        body: Option<Body>,
    },
    /// Look at the volume (for its statistics, say): `&dyn Machine` is also a `&dyn Any`.
    Inspect {
        /// Which.
        key: VolumeKey,
        /// Called on the reactor's thread; must not block. `None` if there is no such volume.
        look: Look,
    },
}

/// The reactor came to an end, and takes no more messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the reactor has come to an end")]
pub struct ReactorGone;

/// Why [`ReactorHandle::try_send`] did not send.
#[derive(thiserror::Error)]
pub enum TrySendError {
    /// Too many messages wait.
    #[error("the reactor's mailbox is full")]
    Full(Box<Message>),
    /// See [`ReactorGone`].
    #[error("the reactor has come to an end")]
    Gone(Box<Message>),
}

impl std::fmt::Debug for TrySendError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// What reactors count, since they started.
#[derive(Debug, Default)]
pub struct ReactorStats {
    /// Rounds of the loop: one submission each.
    pub batches: AtomicU64,
    /// Completions of ring operations.
    pub completions: AtomicU64,
    /// Requests that were completed.
    pub requests: AtomicU64,
    /// Requests a second, over the last ten seconds or so.
    pub rate: AtomicU64,
    /// Volumes that it serves or is about to.
    pub volumes: AtomicU64,
    /// Errands that it began.
    pub errands: AtomicU64,
    /// Those of them that it handed over.
    pub errands_handed_over: AtomicU64,
}

impl ReactorStats {
    /// How busy it is, or will be, for the choice of a volume's reactor: requests a second, where
    /// each volume counts as if it made some more.
    #[must_use]
    pub fn load(&self) -> u64 {
        let volumes = self.volumes.load(Ordering::Relaxed);
        self.rate.load(Ordering::Relaxed) + volumes * REQUESTS_EXPECTED
    }
}

/// How other threads reach a reactor. Cheap to clone; the reactor outlives its handles.
#[derive(Clone)]
pub struct ReactorHandle {
    messages: mpsc::Sender<Message>,
    doorbell: Arc<Doorbell>,
    next_key: Arc<AtomicU32>,
    stats: Arc<ReactorStats>,
}

impl ReactorHandle {
    /// A handle to no reactor yet, and the other end, where what is sent comes out: a reactor's, or for
    /// whoever drives volumes without a ring.
    ///
    /// # Errors
    /// If the process has too many descriptors.
    pub fn detached() -> io::Result<(Self, mpsc::Receiver<Message>)> {
        let (messages, receiver) = mpsc::channel(MESSAGES_MAX);
        let handle = Self {
            messages,
            doorbell: Arc::new(Doorbell::new()?),
            next_key: Arc::new(AtomicU32::new(0)),
            stats: Arc::default(),
        };
        Ok((handle, receiver))
    }

    /// A name for a volume about to be added, which is counted from now on.
    ///
    /// # Panics
    /// After 2^32 volumes.
    #[must_use]
    pub fn new_key(&self) -> VolumeKey {
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        assert!(key != NO_VOLUME.0, "a reactor's volume keys are used up");
        self.stats.volumes.fetch_add(1, Ordering::Relaxed);
        VolumeKey(key)
    }

    /// Sends without waiting.
    ///
    /// # Errors
    /// See [`TrySendError`]; both give the message back.
    pub fn try_send(&self, message: Message) -> Result<(), TrySendError> {
        self.messages
            .try_send(message)
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(message) => TrySendError::Full(Box::new(message)),
                mpsc::error::TrySendError::Closed(message) => TrySendError::Gone(Box::new(message)),
            })?;
        self.doorbell.ring();
        Ok(())
    }

    /// Sends, and waits for room first if there is none.
    ///
    /// # Errors
    /// If the reactor has come to an end.
    pub async fn send(&self, message: Message) -> Result<(), ReactorGone> {
        self.messages.send(message).await.map_err(|_| ReactorGone)?;
        self.doorbell.ring();
        Ok(())
    }

    /// Sends, and blocks the thread for room first. Not for tokio's threads.
    ///
    /// # Errors
    /// If the reactor has come to an end.
    pub fn send_blocking(&self, message: Message) -> Result<(), ReactorGone> {
        self.messages
            .blocking_send(message)
            .map_err(|_| ReactorGone)?;
        self.doorbell.ring();
        Ok(())
    }

    /// Sends an event to a volume, as [`ReactorHandle::send`].
    ///
    /// # Errors
    /// If the reactor has come to an end.
    pub async fn send_event(&self, key: VolumeKey, event: Event) -> Result<(), ReactorGone> {
        self.send(Message::VolumeEvent { key, event }).await
    }

    /// Adds a volume and gives its name.
    ///
    /// # Errors
    /// If the reactor has come to an end.
    pub async fn add_volume(
        &self,
        machine: Box<dyn Machine>,
        backend: Box<dyn BackendSink>,
    ) -> Result<VolumeKey, ReactorGone> {
        let key = self.new_key();
        self.send(Message::AddVolume {
            key,
            machine,
            backend,
        })
        .await?;
        Ok(key)
    }

    /// Removes a volume: see [`Message::RemoveVolume`].
    ///
    /// # Errors
    /// If the reactor has come to an end.
    pub async fn remove_volume(
        &self,
        key: VolumeKey,
    ) -> Result<Option<Box<dyn Machine>>, ReactorGone> {
        let (done, answer) = oneshot::channel();
        self.send(Message::RemoveVolume { key, done }).await?;
        answer.await.map_err(|_| ReactorGone)
    }

    /// Stops a volume's front ends: see [`Message::StopFrontEnds`].
    ///
    /// # Errors
    /// If the reactor has come to an end.
    pub async fn stop_front_ends(&self, key: VolumeKey) -> Result<(), ReactorGone> {
        let (done, answer) = oneshot::channel();
        self.send(Message::StopFrontEnds { key, done }).await?;
        answer.await.map_err(|_| ReactorGone)
    }

    /// Grows a volume: see [`Message::Grow`].
    ///
    /// # Errors
    /// If the reactor has come to an end.
    pub async fn grow(&self, key: VolumeKey, size: Sectors) -> Result<bool, ReactorGone> {
        let (done, answer) = oneshot::channel();
        self.send(Message::Grow { key, size, done }).await?;
        answer.await.map_err(|_| ReactorGone)
    }

    /// Calls `look` with the volume on the reactor's thread and gives its answer; `None` if there is
    /// no such volume or it is not an `M`.
    ///
    /// # Errors
    /// If the reactor has come to an end.
    pub async fn inspect<M: Machine, T: Send + 'static>(
        &self,
        key: VolumeKey,
        look: impl FnOnce(&M) -> T + Send + 'static,
    ) -> Result<Option<T>, ReactorGone> {
        let (done, answer) = oneshot::channel();
        let look = Box::new(move |machine: Option<&dyn Machine>| {
            let machine = machine.and_then(|machine| (machine as &dyn Any).downcast_ref::<M>());
            // The asker may have gone: then nobody wants the answer.
            let _ = done.send(machine.map(look));
        });
        self.send(Message::Inspect { key, look }).await?;
        answer.await.map_err(|_| ReactorGone)
    }

    /// Answers when the reactor's thread has: it does not hang.
    ///
    /// # Errors
    /// If the reactor has come to an end.
    pub async fn answer(&self) -> Result<(), ReactorGone> {
        let (done, answer) = oneshot::channel();
        let look = Box::new(move |_: Option<&dyn Machine>| {
            // The asker may have gone.
            let _ = done.send(());
        });
        let key = NO_VOLUME;
        self.send(Message::Inspect { key, look }).await?;
        answer.await.map_err(|_| ReactorGone)
    }

    /// What the reactor counted.
    #[must_use]
    pub fn stats(&self) -> &ReactorStats {
        &self.stats
    }
}

/// The cache device through the kernel's page cache: hits that are there cost a copy and no I/O. For requests whose
/// data pass through memory of ours (NBD's); those with registered pages are served without a copy, past it.
#[derive(Clone, Debug)]
pub struct PageCache {
    /// An open file of this reactor's own.
    pub file: Arc<File>,
    /// Where segments begin, whose old pages are dropped when they are written anew.
    pub geometry: CacheGeometry,
}

/// How a reactor is set up.
#[derive(Clone, Debug)]
pub struct ReactorConfig {
    /// Its number: the N of its thread's name.
    pub index: usize,
    /// The cache device, opened for direct I/O or not: an open file of this reactor's own, for the
    /// kernel tells of a lost write once for each.
    pub cache: Arc<File>,
    /// The way of reads into memory of ours; none: the same.
    pub page_cache: Option<PageCache>,
    /// Where large writes are kept until their chunk is made; shared by all reactors of the cache device.
    pub kept_writes: Arc<KeptWrites>,
    /// Shared by all reactors of the cache device.
    pub sync_failure: SyncFailure,
    /// What the data on it are encrypted with, if they are: then no request has registered buffers.
    pub cipher: Option<Arc<SectorCipher>>,
    /// Entries of the registered buffer table: one for each tag of each ublk queue; 0 for none.
    pub buffer_entries: u16,
}

/// A running reactor. Dropped, it stops all front ends and volumes, completes every request, and
/// then ends; [`Reactor::shutdown`] also waits for that.
pub struct Reactor {
    handle: ReactorHandle,
    thread: Option<JoinHandle<()>>,
}

impl Reactor {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the kernel refuses a thread or an io_uring.
    pub fn spawn(config: ReactorConfig) -> io::Result<Self> {
        let (handle, receiver) = ReactorHandle::detached()?;
        let (doorbell, stats) = (Arc::clone(&handle.doorbell), Arc::clone(&handle.stats));
        let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("reactor-{}", config.index))
            .spawn(move || {
                set_io_flusher();
                set_priority();
                match Core::new(&config, receiver, doorbell, stats) {
                    Ok(core) => {
                        let _ = ready.send(Ok(()));
                        core.run();
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            })?;
        is_ready
            .recv()
            .map_err(|_| io::Error::other("the reactor's thread ended at once"))??;
        Ok(Self {
            handle,
            thread: Some(thread),
        })
    }

    /// What it counted.
    #[must_use]
    pub fn stats(&self) -> &ReactorStats {
        self.handle.stats()
    }

    /// Runs one on this thread instead, for as long as the process lives: for a process that is nothing
    /// else, and for tools that see one thread better than two. `start` sends the first messages.
    ///
    /// # Errors
    /// If the kernel refuses an io_uring.
    pub fn run_here(config: &ReactorConfig, start: impl FnOnce(ReactorHandle)) -> io::Result<()> {
        let (handle, receiver) = ReactorHandle::detached()?;
        let (doorbell, stats) = (Arc::clone(&handle.doorbell), Arc::clone(&handle.stats));
        let core = Core::new(config, receiver, doorbell, stats)?;
        start(handle);
        core.run();
        Ok(())
    }

    /// How to reach it.
    #[must_use]
    pub fn handle(&self) -> ReactorHandle {
        self.handle.clone()
    }

    /// Stops it as the drop does, and waits until the thread has ended. Blocks: not for tokio's
    /// threads.
    pub fn shutdown(mut self) {
        self.handle.doorbell.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the reactor's thread ended by a panic");
        }
    }

    /// The same of all of them, which wait for their clients at the same time.
    pub fn shutdown_all(reactors: Vec<Self>) {
        for reactor in &reactors {
            reactor.handle.doorbell.stop();
        }
        reactors.into_iter().for_each(Self::shutdown);
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.handle.doorbell.stop();
    }
}

/// From `linux/prctl.h`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// How much more of a contended CPU a reactor gets than others: it works for microseconds, and all requests wait for it.
const NICE: i32 = -10;

/// Before the threads that compress, encrypt and sign what is uploaded, which else keep a reactor waiting for a time
/// slice. Where it is not allowed (RLIMIT_NICE) all are equal; and on one CPU, which it would take from those who make the
/// requests, after each one: 1.5 for 1.3 context switches a hit, and three quarters of the hits.
fn set_priority() {
    if std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1) {
        return;
    }
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "reactors get no more of the CPU than other threads");
    }
}

/// Keeps the kernel's memory reclaim on this thread from waiting for a device that it serves itself.
pub fn set_io_flusher() {
    // SAFETY: this prctl takes plain numbers and changes a flag of the calling thread only.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!(%error, "PR_SET_IO_FLUSHER was refused (it needs CAP_SYS_RESOURCE)");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::sync::mpsc;

    use quarry_volume::IoError;

    use super::testing::{Mirror, NoBackend, Seen, geometry, reactor};
    use super::{FrontEnd, Message, Port, Reactor};

    /// A front end that comes to an end only when the volume of another reactor was stopped too.
    struct Waits {
        other: Arc<Seen>,
        is_stopped: bool,
        /// At its start, and whether it had come to its end when it is dropped.
        told: mpsc::Sender<bool>,
    }

    impl FrontEnd for Waits {
        fn start(&mut self, _: &mut Port<'_>) {
            self.told.send(false).unwrap();
        }

        fn op_done(&mut self, _: u32, _: i32, _: u32, _: &mut Port<'_>) {}

        fn request_done(&mut self, _: u32, _: Result<(), IoError>, _: &mut Port<'_>) {}

        fn wants_tick(&self) -> bool {
            true
        }

        fn stop(&mut self, _: &mut Port<'_>) {
            self.is_stopped = true;
        }

        fn is_finished(&self) -> bool {
            self.is_stopped && self.other.stops.load(Ordering::SeqCst) > 0
        }
    }

    impl Drop for Waits {
        fn drop(&mut self) {
            let _ = self.told.send(self.is_finished());
        }
    }

    /// One after the other they waited for their clients for 2 s each.
    #[test]
    fn reactors_shut_down_together_are_all_told_before_one_is_waited_for() {
        let shape = geometry(1 << 20, 512);
        let reactors = [(); 2].map(|()| reactor(1 << 20).0);
        let [one, two] = [(); 2].map(|()| Mirror::new(shape));
        let others = [&two.1, &one.1].map(Arc::clone);
        let (told, hear) = mpsc::channel();
        for ((reactor, machine), other) in reactors.iter().zip([one.0, two.0]).zip(others) {
            let handle = reactor.handle();
            let key = handle.new_key();
            let send = |message| handle.send_blocking(message).unwrap();
            send(Message::AddVolume {
                key,
                machine: Box::new(machine),
                backend: Box::new(NoBackend),
            });
            let front_end = Box::new(Waits {
                other,
                is_stopped: false,
                told: told.clone(),
            });
            send(Message::AddFrontEnd { key, front_end });
            assert!(!hear.recv().unwrap(), "it has begun");
        }
        Reactor::shutdown_all(reactors.into());
        assert_eq!([(); 2].map(|()| hear.recv().unwrap()), [true; 2]);
    }
}
