//! What somebody asks of a volume's reclaiming: to put all of it in order, or to cut its tie to its parent.
//! One at a time; who asks and goes away ends it after its stage.
//!
//! - *Compact*: passes over the volume. Each takes groups of chunks that lie across one another in the order
//!   of addresses, as many as can be read side by side, and makes of each a row of chunks that do not. After
//!   the pass in which all were one group, a read in the order of addresses reads chunk after chunk.
//! - *Flatten*: what the map needs of other volumes goes into chunks of its own, then the map itself into own
//!   tables; the head then names no parent. *Crash before that head: the tie is there, and flattening goes
//!   on. Crash after: the parent's record of the clone is there, and counts for nothing.*

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use quarry_objfmt::head::Head;
use quarry_objfmt::{ChunkSeq, Lba, MapSeq, SECTOR_SIZE, SnapName, keys};
use tokio::sync::oneshot;

use super::VolumeBackend;
use super::checkpoint::{Stopped, merge, refused};
use super::compact::{self, Victims};
use super::objects::{ChunkName, Needed, is_held};

/// Most passes: one merges as many rows of chunks as are read side by side into one.
const PASSES_MAX: u32 = 8;

/// What is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Chore {
    /// Put the volume's data in the order of addresses.
    Compact {
        /// Also what a snapshot needs, which then takes its space twice.
        held: bool,
    },
    /// Make the volume need nothing of its parent.
    Flatten,
}

/// How far it is.
#[derive(Default, Debug)]
pub struct ChoreProgress {
    moved_bytes: AtomicU64,
    total_bytes: AtomicU64,
    passes: AtomicU64,
}

impl ChoreProgress {
    /// Bytes moved, bytes to move in the passes that are begun or done, and how many these are.
    pub fn get(&self) -> (u64, u64, u64) {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        (
            get(&self.moved_bytes),
            get(&self.total_bytes),
            get(&self.passes),
        )
    }

    fn begin(&self, bytes: u64) {
        self.passes.fetch_add(1, Ordering::Relaxed);
        self.total_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn moved(&self, bytes: u64) {
        self.moved_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Why it was not done, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum ChoreError {
    /// Another is under way.
    #[error("it is being compacted or flattened already")]
    Busy,
    /// The volume is detached, or who asked went away.
    #[error("it was ended before it was done; what was moved stays moved")]
    Ended,
    /// The volume is somebody else's.
    #[error("{by} has taken the volume over")]
    Fenced {
        /// Whose.
        by: String,
    },
    /// Something cannot be read or written.
    #[error("{object}: {reason}")]
    Damaged {
        /// What.
        object: String,
        /// Why.
        reason: String,
    },
    /// Snapshots need what the parent has.
    #[error("its snapshots need its parent: {}", .0.join(", "))]
    Snapshots(Vec<String>),
    /// There is no parent.
    #[error("it has no parent")]
    NoParent,
}

impl From<Stopped> for ChoreError {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Fenced { by } => Self::Fenced { by },
            Stopped::Damaged(error) | Stopped::Refused(error) => Self::Damaged {
                object: error.object,
                reason: error.reason,
            },
        }
    }
}

/// What was asked, and who waits.
#[derive(Debug)]
pub(super) struct Asked {
    chore: Chore,
    order: Order,
    answer: oneshot::Sender<Result<(), ChoreError>>,
}

/// What goes with the work: where its progress is told, and whether it is still wanted.
#[derive(Clone, Default, Debug)]
pub(super) struct Order {
    pub(super) progress: Arc<ChoreProgress>,
    unwanted: Arc<AtomicBool>,
}

impl Order {
    pub(super) fn is_unwanted(&self) -> bool {
        self.unwanted.load(Ordering::Relaxed)
    }
}

/// Ends the chore when who asked goes away.
struct Asker(Order);

impl Drop for Asker {
    fn drop(&mut self) {
        self.0.unwanted.store(true, Ordering::Relaxed);
    }
}

/// The chore that is asked for or under way.
#[derive(Default, Debug)]
pub(super) struct Chores(parking_lot::Mutex<State>);

#[derive(Default, Debug)]
enum State {
    #[default]
    Idle,
    Asked(Asked),
    UnderWay(Arc<ChoreProgress>),
    /// Nobody carries out any more.
    Closed,
}

impl Chores {
    fn ask(&self, asked: Asked) -> Result<(), ChoreError> {
        let mut state = self.0.lock();
        match *state {
            State::Idle => *state = State::Asked(asked),
            State::Asked(_) | State::UnderWay(_) => return Err(ChoreError::Busy),
            State::Closed => return Err(ChoreError::Ended),
        }
        Ok(())
    }

    pub(super) fn take(&self) -> Option<Asked> {
        let mut state = self.0.lock();
        match std::mem::take(&mut *state) {
            State::Asked(asked) => {
                *state = State::UnderWay(Arc::clone(&asked.order.progress));
                Some(asked)
            }
            other => {
                *state = other;
                None
            }
        }
    }

    fn done(&self) {
        *self.0.lock() = State::Idle;
    }

    /// Who waits is told, and so is who asks from now on.
    pub(super) fn close(&self) {
        *self.0.lock() = State::Closed;
    }
}

impl VolumeBackend {
    /// Does a chore. Who does not wait for it ends it after the stage under way.
    ///
    /// # Errors
    /// [`ChoreError`].
    pub async fn do_chore(&self, chore: Chore) -> Result<Arc<ChoreProgress>, ChoreError> {
        let order = Order::default();
        let progress = Arc::clone(&order.progress);
        let _asker = Asker(order.clone());
        let (answer, answered) = oneshot::channel();
        self.reclaim.chores.ask(Asked {
            chore,
            order,
            answer,
        })?;
        self.reclaim.wake();
        answered.await.unwrap_or(Err(ChoreError::Ended))?;
        Ok(progress)
    }

    /// How far the chore under way is, if there is one.
    pub fn chore_progress(&self) -> Option<Arc<ChoreProgress>> {
        match &*self.reclaim.chores.0.lock() {
            State::UnderWay(progress) => Some(Arc::clone(progress)),
            _ => None,
        }
    }

    /// Does what was asked, in the task of reclaiming.
    pub(super) async fn carry_out_chore(&self, asked: Asked) {
        let order = &asked.order;
        // What an earlier epoch left in the log goes into the map first: see `compact::run`.
        let done = match (self.drain(true).await, asked.chore) {
            (false, _) => Err(ChoreError::Ended),
            (true, Chore::Compact { held }) => self.put_in_order(held, order).await,
            (true, Chore::Flatten) => self.flatten(order).await,
        };
        self.reclaim.chores.done();
        // Nobody listens if the asker went away.
        let _ = asked.answer.send(done);
    }

    async fn put_in_order(&self, held: bool, order: &Order) -> Result<(), ChoreError> {
        let mut first = None;
        for _ in 0..PASSES_MAX {
            let (map, root) = {
                let _right = self.objects.lock().await;
                let map = self.root_ref.lock().map(|root| root.seq);
                (map, self.root.lock().clone())
            };
            let Some(map) = map else {
                return Ok(());
            };
            let Some(needed) = self.recount(map, &root).await? else {
                return Err(ChoreError::Ended);
            };
            // What is written meanwhile is for the next time.
            let upto = *first.get_or_insert(map);
            let groups = self.groups(&needed, upto, map, held).await;
            if groups.is_empty() {
                return Ok(());
            }
            let bytes = |group: &BTreeSet<ChunkName>| -> u64 {
                let sectors = group.iter().map(|name| u64::from(needed[name].sectors));
                sectors.sum::<u64>() * u64::from(SECTOR_SIZE)
            };
            order.progress.begin(groups.iter().map(bytes).sum());
            for group in groups {
                let victims = Victims::Own(group);
                if !compact::run(self, &victims, self.percent(), order).await? {
                    return Err(ChoreError::Ended);
                }
            }
        }
        Ok(())
    }

    /// The chunks that lie across others, in groups that can be read side by side.
    async fn groups(
        &self,
        needed: &Needed,
        upto: MapSeq,
        map: MapSeq,
        held: bool,
    ) -> Vec<BTreeSet<ChunkName>> {
        let snapshots = self.head.get().snapshots;
        let objects = self.objects.lock().await;
        let mut spans: Vec<Span> = objects
            .chunks()
            .filter(|(name, chunk)| {
                let old = chunk.born <= upto || name.1 >= ChunkSeq::COMPACTED;
                let free = held || !is_held(chunk, &snapshots);
                old && chunk.born <= map && free && self.is_sound(name)
            })
            .filter_map(|(name, _)| {
                let need = needed.get(&name)?;
                Some(Span {
                    name,
                    start: need.start,
                    end: need.end,
                })
            })
            .collect();
        drop(objects);
        keep_crossing(&mut spans);
        spans.sort_unstable_by_key(|span| span.name);
        group(&spans, self.fan_in())
    }

    async fn flatten(&self, order: &Order) -> Result<(), ChoreError> {
        let head = self.head.get();
        let Some(parent) = head.parent.clone() else {
            return Err(ChoreError::NoParent);
        };
        if !head.snapshots.is_empty() {
            let names = head.snapshots.iter().map(|s| s.name.clone());
            return Err(ChoreError::Snapshots(names.collect()));
        }
        order.progress.begin(0);
        if !compact::run(self, &Victims::Foreign, self.percent(), order).await? {
            return Err(ChoreError::Ended);
        }
        // The whole map as one run of own tables. No parent is named from then on, unless a snapshot was made meanwhile.
        let cut = |head: &mut Head| {
            if head.snapshots.is_empty() {
                head.parent = None;
            }
        };
        let wanted = || !self.reclaim.is_stopping() && !order.is_unwanted();
        let mut objects = self.objects.lock().await;
        let runs = self.root.lock().runs().len();
        if !merge(self, &mut objects, runs, cut, &wanted).await? {
            return Err(ChoreError::Ended);
        }
        drop(objects);
        let now = self.head.get();
        if now.parent.is_some() {
            let names = now.snapshots.into_iter().map(|s| s.name);
            return Err(ChoreError::Snapshots(names.collect()));
        }
        if let Ok(snapshot) = SnapName::new(&parent.snapshot) {
            let key = keys::clone_key(self.head.tenant(), parent.volume, &snapshot, self.volume);
            let deleted = self.common.background.delete(&key).await;
            deleted.map_err(|error| refused(&key, &error))?;
        }
        Ok(())
    }
}

/// Where in the volume the data of a chunk lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Span {
    name: ChunkName,
    start: Lba,
    end: Lba,
}

/// Keeps those that lie across another.
fn keep_crossing(spans: &mut Vec<Span>) {
    spans.sort_unstable_by_key(|span| (span.start, span.end));
    let mut reached = Lba::ZERO;
    let mut crossing = vec![false; spans.len()];
    let mut furthest = 0;
    for (number, span) in spans.iter().enumerate() {
        if number > 0 && span.start < reached {
            crossing[number] = true;
            crossing[furthest] = true;
        }
        if span.end > reached {
            (reached, furthest) = (span.end, number);
        }
    }
    let mut crossing = crossing.into_iter();
    spans.retain(|_| crossing.next() == Some(true));
}

/// Spans, in the order of their chunks' numbers, cut into groups of at most `rows` rows: in a row no two lie
/// across one another. Chunks that one sweep made are numbered in the order of addresses, so they are a row.
fn group(spans: &[Span], rows: usize) -> Vec<BTreeSet<ChunkName>> {
    let mut groups = Vec::new();
    let mut group = BTreeSet::new();
    let mut ends: Vec<Lba> = Vec::new();
    for span in spans {
        let row = ends.iter().position(|end| *end <= span.start);
        match row {
            Some(row) => ends[row] = span.end,
            None if ends.len() < rows => ends.push(span.end),
            None => {
                groups.push(std::mem::take(&mut group));
                ends = vec![span.end];
            }
        }
        group.insert(span.name);
    }
    if !group.is_empty() {
        groups.push(group);
    }
    groups
}

#[cfg(test)]
mod tests {
    use quarry_objfmt::Epoch;

    use super::*;

    fn span(seq: u64, start: u64, end: u64) -> Span {
        Span {
            name: (Epoch::new(1), ChunkSeq::new(seq)),
            start: Lba::new(start),
            end: Lba::new(end),
        }
    }

    #[test]
    fn spans_that_lie_across_no_other_are_left_alone() {
        let mut spans = vec![
            span(1, 0, 10),
            span(2, 10, 20),
            span(3, 30, 60),
            span(4, 35, 40),
            span(5, 45, 50),
            span(6, 60, 70),
            span(7, 69, 80),
        ];
        keep_crossing(&mut spans);
        let kept: Vec<u64> = spans.iter().map(|s| s.name.1.get()).collect();
        assert_eq!(kept, [3, 4, 5, 6, 7]);
    }

    #[test]
    fn groups_have_no_more_rows_than_can_be_read_side_by_side() {
        // Two rows of three, then one chunk across all.
        let spans = [
            span(1, 0, 10),
            span(2, 10, 20),
            span(3, 20, 30),
            span(4, 5, 12),
            span(5, 12, 22),
            span(6, 22, 25),
            span(7, 0, 30),
        ];
        let sizes = |rows| {
            group(&spans, rows)
                .iter()
                .map(BTreeSet::len)
                .collect::<Vec<_>>()
        };
        assert_eq!(sizes(3), [7]);
        assert_eq!(sizes(2), [6, 1]);
        assert_eq!(sizes(1), [3, 3, 1]);
        assert!(group(&[], 2).is_empty());
    }
}
