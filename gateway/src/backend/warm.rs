//! Steps of warming, and who waits for them.

use std::collections::HashMap;

use quarry_objfmt::{Lba, LbaRange};
use quarry_volume::{Event, IoId, WarmEnd};
use tokio::sync::oneshot;

use super::VolumeBackend;

/// What came of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Warmed {
    /// How far it came.
    pub upto: Lba,
    /// Bytes asked of the store for it.
    pub bytes: u64,
    /// How it went.
    pub end: WarmEnd,
}

/// Who waits for which step.
pub(super) struct Warmings(parking_lot::Mutex<Waiting>);

struct Waiting {
    next: u64,
    /// `None`: the volume is gone.
    answers: Option<HashMap<IoId, oneshot::Sender<Warmed>>>,
}

impl Default for Warmings {
    fn default() -> Self {
        Self(parking_lot::Mutex::new(Waiting {
            next: 0,
            answers: Some(HashMap::new()),
        }))
    }
}

impl Warmings {
    fn ask(&self) -> Option<(IoId, oneshot::Receiver<Warmed>)> {
        let mut waiting = self.0.lock();
        let io = IoId(waiting.next);
        waiting.next += 1;
        let (answer, answered) = oneshot::channel();
        waiting.answers.as_mut()?.insert(io, answer);
        Some((io, answered))
    }

    pub(super) fn answer(&self, io: IoId, warmed: Warmed) {
        let mut waiting = self.0.lock();
        let asked = waiting.answers.as_mut().and_then(|all| all.remove(&io));
        if let Some(asked) = asked {
            // Whoever asked may have gone: the step is done all the same.
            let _ = asked.send(warmed);
        }
    }

    pub(super) fn close(&self) {
        self.0.lock().answers = None;
    }
}

impl VolumeBackend {
    /// One step of fetching into the cache what it lacks of `range`; `None` if the volume is gone. Who does
    /// not wait for it lets it run to its end, and the next one is refused as long as it does.
    pub async fn warm(&self, range: LbaRange) -> Option<Warmed> {
        let (io, answered) = self.warmings.ask()?;
        self.tell(Event::Warm { io, range }).await;
        answered.await.ok()
    }
}
