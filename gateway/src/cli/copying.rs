//! A copy between an image and a volume, as the one who asked for it sees it: a bar, an end, an error.

use std::future::Future;
use std::time::Duration;

use indicatif::ProgressBar;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Failure;
use super::failure::chain;
use crate::image::qemu::QemuError;
use crate::image::record::RecordError;
use crate::image::{Copy, CopyError, Disk, DiskError, Feed, Progress};
use crate::nbd::client::ClientError;

/// How often the bar moves.
const TURN: Duration = Duration::from_millis(100);

/// The kind of failure of a command that was interrupted.
pub(super) const INTERRUPTED: &str = "interrupted";

/// Why a copy came to no end of its own.
pub(super) enum Broken {
    /// Somebody had enough of it; pieces may still be under way.
    Interrupted,
    /// It failed.
    Copy(CopyError),
    /// What went on beside it failed.
    Beside(Failure),
}

/// What asks a command to end. From when it is listened to, nothing else ends the process so: each wait
/// after that must heed it.
pub(super) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    pub fn listen() -> Result<Self, Failure> {
        let listen = || {
            let interrupt = signal(SignalKind::interrupt())?;
            let terminate = signal(SignalKind::terminate())?;
            Ok(Self {
                interrupt,
                terminate,
            })
        };
        listen().map_err(|error: std::io::Error| {
            let message = format!("signals cannot be awaited: {error}");
            Failure::new("internal", message, "report this")
        })
    }

    /// The next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// What `call` gives, unless an interrupt comes first.
    pub async fn heed<T>(&mut self, call: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            given = call => Some(given),
            () = self.next() => None,
        }
    }
}

/// Starts a copy: see [`Copy::start`].
pub(super) fn started(feed: Feed, pairs: Vec<(Option<Disk>, Disk)>) -> Result<Copy, Failure> {
    Copy::start(feed, pairs).map_err(|error| {
        let message = format!("no threads: {error}");
        Failure::new("internal", message, "give fewer --jobs")
    })
}

/// Waits for a copy's end while `beside` goes on, which ends in an error only.
pub(super) async fn watch(
    copy: Copy,
    bar: &ProgressBar,
    interrupts: &mut Interrupts,
    beside: impl AsyncFnOnce(&Copy) -> Failure,
) -> Result<Progress, Broken> {
    let moving = async {
        while !copy.wait(Duration::ZERO) {
            bar.set_position(copy.progress().done);
            tokio::time::sleep(TURN).await;
        }
    };
    let broken = tokio::select! {
        () = moving => None,
        () = interrupts.next() => Some(Broken::Interrupted),
        failure = beside(&copy) => Some(Broken::Beside(failure)),
    };
    let Some(broken) = broken else {
        return copy.finish().map_err(Broken::Copy);
    };
    // Its workers may wait for the store for as long as it is away: they are not waited for.
    copy.stop();
    Err(broken)
}

/// What a failed copy of `source` to `target` is told as; `go_on` says how it goes on.
pub(super) fn failed(error: CopyError, source: &str, target: &str, go_on: &str) -> Failure {
    let kind = match &error {
        CopyError::Read { source, .. } | CopyError::Write { source, .. } => match source {
            DiskError::Nbd(ClientError::Io(_)) => "unavailable",
            _ => "failed",
        },
        CopyError::TooLong { .. } => "invalid",
        CopyError::Stopped => INTERRUPTED,
    };
    let (who, remedy) = match &error {
        CopyError::Read { .. } | CopyError::Stopped => (source, go_on),
        CopyError::Write { .. } => (target, go_on),
        CopyError::TooLong { .. } => (source, "use a larger volume"),
    };
    let what = chain(&anyhow::Error::new(error));
    Failure::new(kind, format!("{who}: {what}"), remedy)
}

impl From<QemuError> for Failure {
    fn from(error: QemuError) -> Self {
        let (kind, remedy) = match &error {
            QemuError::Missing { .. } => (
                "unsupported",
                "install the package qemu-utils (Debian, Ubuntu), qemu-img (Fedora) or qemu-tools (SUSE)",
            ),
            QemuError::Refers { .. } => (
                "invalid",
                "make one image of both with `qemu-img convert`, if you trust whoever made them",
            ),
            QemuError::Damaged { .. } => (
                "damaged",
                "fetch it anew, or mend a copy with `qemu-img check -r all`",
            ),
            QemuError::Refused { .. } => ("failed", "check the image and its --format"),
            _ => ("failed", ""),
        };
        let message = chain(&anyhow::Error::new(error));
        Self::new(kind, message, remedy)
    }
}

impl From<RecordError> for Failure {
    fn from(error: RecordError) -> Self {
        let (kind, remedy) = match &error {
            RecordError::Busy => ("conflict", "wait for its end"),
            RecordError::Malformed { .. } => ("failed", "remove it, and start with --overwrite"),
            RecordError::Io { .. } => (
                "failed",
                "set XDG_STATE_HOME to a folder that can be written",
            ),
        };
        let message = chain(&anyhow::Error::new(error));
        Self::new(kind, message, remedy)
    }
}
