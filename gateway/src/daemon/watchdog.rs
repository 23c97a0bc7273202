//! The service manager's watchdog: told that the daemon is alive only while it is.
//!
//! A round asks each reactor on its own thread and the engine for its locks, on the runtime that the control plane runs
//! on, and then tells. A round that hangs is the last one: the manager hears no more, and restarts the daemon, whose
//! devices wait and lose nothing. What a store does not answer is no part of a round.

use std::ffi::OsString;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::notify::Manager;
use crate::engine::Daemon;
use crate::reactor::ReactorGone;

/// Between two rounds where the manager did not say how patient it is: a daemon that takes over is started beside the
/// service, and is not told.
const PAUSE: Duration = Duration::from_secs(1);

/// Rounds in the time after which the manager gives up.
const ROUNDS: u32 = 4;

/// What is asked in each round.
pub(super) trait Alive: Send + Sync + 'static {
    /// Answers when everything that must not hang has answered, with a line on how the daemon does.
    fn answer(&self) -> impl Future<Output = Result<String, ReactorGone>> + Send;
}

impl Alive for Daemon {
    async fn answer(&self) -> Result<String, ReactorGone> {
        self.pulse().await
    }
}

/// Between two rounds, as the environment says.
pub(super) fn pause(env: impl Fn(&str) -> Option<OsString>) -> Duration {
    let number = |name: &str| env(name)?.to_str()?.parse::<u64>().ok();
    match (number("WATCHDOG_USEC"), number("WATCHDOG_PID")) {
        // Meant for another process.
        (_, Some(pid)) if pid != u64::from(std::process::id()) => PAUSE,
        (Some(us), _) if us > 0 => PAUSE.min(Duration::from_micros(us) / ROUNDS),
        _ => PAUSE,
    }
}

/// Round after round, until it is dropped or a reactor has ended. While the daemon is being started there is nothing to
/// ask.
pub(super) async fn run<A: Alive>(
    manager: Arc<Manager>,
    daemon: Arc<OnceLock<Arc<A>>>,
    pause: Duration,
) {
    let mut said = String::new();
    loop {
        let mut lines = "WATCHDOG=1".to_owned();
        if let Some(daemon) = daemon.get() {
            let Ok(status) = daemon.answer().await else {
                return;
            };
            if status != said {
                lines += &format!("\nSTATUS={status}");
                said = status;
            }
        }
        manager.tell(&lines);
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixDatagram;

    use super::super::notify::tests::{heard, listener};
    use super::*;
    use crate::reactor::{Message, Reactor, ReactorConfig};

    struct Reactors(Vec<Reactor>);

    impl Alive for Reactors {
        async fn answer(&self) -> Result<String, ReactorGone> {
            for reactor in &self.0 {
                reactor.handle().answer().await?;
            }
            Ok("well".to_owned())
        }
    }

    fn reactors(dir: &tempfile::TempDir) -> Reactors {
        let cache = File::create(dir.path().join("cache")).unwrap();
        let spawn = |index| {
            Reactor::spawn(ReactorConfig {
                index,
                page_cache: None,
                cache: Arc::new(cache.try_clone().unwrap()),
                kept_writes: Default::default(),
                sync_failure: quarry_cache::SyncFailure::default(),
                cipher: None,
                buffer_entries: 0,
            })
        };
        Reactors((0..2).map(|index| spawn(index).unwrap()).collect())
    }

    /// Whether anything is heard within `time`, after what was said before.
    fn hears_within(listener: &UnixDatagram, time: Duration) -> bool {
        listener.set_nonblocking(true).unwrap();
        while heard(listener).is_some() {}
        listener.set_nonblocking(false).unwrap();
        listener.set_read_timeout(Some(time)).unwrap();
        heard(listener).is_some()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn watchdog_falls_silent_while_one_of_two_reactors_hangs() {
        let (dir, listener, manager) = listener();
        let daemon = Arc::new(OnceLock::new());
        let pause = Duration::from_millis(10);
        let dog = tokio::spawn(run(Arc::new(manager), Arc::clone(&daemon), pause));
        let first = heard(&listener).unwrap();
        assert_eq!(first, "WATCHDOG=1", "a daemon that starts is alive");
        let reactors = Arc::new(reactors(&dir));
        let handle = reactors.0[1].handle();
        assert!(daemon.set(Arc::clone(&reactors)).is_ok());
        while heard(&listener).unwrap() != "WATCHDOG=1\nSTATUS=well" {}
        assert_eq!(heard(&listener).unwrap(), "WATCHDOG=1");

        let (release, held) = std::sync::mpsc::channel::<()>();
        let (hangs, is_hanging) = std::sync::mpsc::channel();
        let look = Box::new(move |_: Option<&dyn crate::reactor::Machine>| {
            hangs.send(()).unwrap();
            // Ends by the sender's end.
            let _ = held.recv();
        });
        let key = handle.new_key();
        assert!(handle.send(Message::Inspect { key, look }).await.is_ok());
        is_hanging.recv().unwrap();
        // What was under way at that moment.
        hears_within(&listener, 5 * pause);
        assert!(!hears_within(&listener, Duration::from_millis(500)));
        drop(release);
        assert!(hears_within(&listener, Duration::from_secs(10)));
        dog.abort();
    }

    #[test]
    fn pause_is_a_part_of_the_managers_patience_if_it_is_this_process_that_is_meant() {
        let said = |us: &'static str, pid: Option<u32>| {
            pause(move |name| match name {
                "WATCHDOG_USEC" => Some(us.into()),
                "WATCHDOG_PID" => pid.map(|pid| pid.to_string().into()),
                _ => None,
            })
        };
        assert_eq!(said("2000000", None), Duration::from_millis(500));
        let own = Some(std::process::id());
        assert_eq!(said("2000000", own), Duration::from_millis(500));
        assert_eq!(said("2000000", Some(1)), PAUSE);
        assert_eq!(said("3600000000", None), PAUSE);
        assert_eq!(said("nonsense", None), PAUSE);
        assert_eq!(pause(|_| None), PAUSE);
    }
}
