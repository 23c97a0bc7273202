//! Every order of attaching, folding, taking snapshots, rolling back, stalling, taking over and collecting, in a
//! model of `backend/reclaim.rs`, `snapshot.rs` and `snapshot/rollback.rs`: two hosts, a reader, and a store that
//! gets messages late or never.
//!
//! The volume is one place: its map names one object, and a fold gives it another. A map's number says when an
//! object was born and when it died. Heads are replaced on condition; deletes have none, and a host that was
//! fenced and does not know it goes on with both.
//!
//! In every state that can be reached:
//! - each object that the head's map or one of its snapshots needs is there;
//! - so is that of a reader, as long as the horizon lasts for it;
//! - what the head had, each later one is made upon, but for a rollback: no fold that was done is lost.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

type Object = u8;
/// The number of a map.
type Map = u8;

/// An object that maps from `born` on need.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Used {
    object: Object,
    born: Map,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Dead {
    used: Used,
    died: Map,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
struct Head {
    epoch: u8,
    owner: Option<usize>,
    map: Map,
    root: Option<Used>,
    /// As the map's usage says.
    dead: Vec<Dead>,
    /// The map of each, and its object.
    snapshots: Vec<(Map, Used)>,
}

impl Head {
    fn is_pinned(&self, dead: &Dead) -> bool {
        let needs = |map: Map| dead.used.born <= map && map < dead.died;
        self.snapshots.iter().any(|(map, _)| needs(*map))
    }
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Sent {
    Replace { seen: Head, head: Head },
    Delete(Object),
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Message {
    host: usize,
    sent: Sent,
    answer: Option<bool>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Change {
    Raise,
    Fold,
    Snapshot,
    Unmake,
    RollBack,
}

/// A host that has the volume, or believes so.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Serving {
    /// As the store had it when we last wrote or read it.
    head: Head,
    /// What is dead and was not deleted yet.
    dead: Vec<Dead>,
    change: Option<(Change, Head)>,
}

/// How often each thing may still happen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Budget {
    attaches: u8,
    folds: u8,
    snapshots: u8,
    unmakes: u8,
    rollbacks: u8,
    readers: u8,
}

/// The protocol, and what may be left out of it.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// What a fold replaces is dead when the head says so, not when it is planned.
    dies_by_the_head: bool,
    head_is_conditional: bool,
    snapshots_pin: bool,
    waits_for_readers: bool,
    /// A rollback takes what its snapshot needs off the list of the dead.
    rollback_revives: bool,
}

const PROTOCOL: Rules = Rules {
    dies_by_the_head: true,
    head_is_conditional: true,
    snapshots_pin: true,
    waits_for_readers: true,
    rollback_revives: true,
};

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    head: Head,
    objects: BTreeSet<Object>,
    /// What each object was folded upon.
    upon: BTreeMap<Object, Option<Object>>,
    messages: Vec<Message>,
    hosts: [Option<Serving>; 2],
    reader: Option<Used>,
    left: Budget,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Arrives(usize),
    Answered(usize),
    Begins(usize, Change),
    Collects(usize, Object),
    ReaderOpens,
    ReaderReads,
}

impl State {
    fn new(left: Budget) -> Self {
        Self {
            head: Head::default(),
            objects: BTreeSet::new(),
            upon: BTreeMap::new(),
            messages: Vec::new(),
            hosts: [None, None],
            reader: None,
            left,
        }
    }

    fn events(&self, rules: Rules) -> Vec<Event> {
        let mut events = Vec::new();
        for (at, message) in self.messages.iter().enumerate() {
            events.push(match message.answer {
                None => Event::Arrives(at),
                Some(_) => Event::Answered(at),
            });
        }
        for (host, serving) in self.hosts.iter().enumerate() {
            let Some(serving) = serving else {
                if self.left.attaches > 0 {
                    events.push(Event::Begins(host, Change::Raise));
                }
                continue;
            };
            let ours = serving.head.owner == Some(host);
            let mut begin = |left: u8, may: bool, change| {
                if left > 0 && ours && may && serving.change.is_none() {
                    events.push(Event::Begins(host, change));
                }
            };
            let head = &serving.head;
            begin(self.left.folds, true, Change::Fold);
            let is_kept = head.snapshots.iter().any(|(map, _)| *map == head.map);
            begin(
                self.left.snapshots,
                head.root.is_some() && !is_kept,
                Change::Snapshot,
            );
            begin(
                self.left.unmakes,
                !head.snapshots.is_empty(),
                Change::Unmake,
            );
            begin(
                self.left.rollbacks,
                !head.snapshots.is_empty(),
                Change::RollBack,
            );
            for dead in &serving.dead {
                let pinned = rules.snapshots_pin && head.is_pinned(dead);
                // Within the horizon a reader is done that had an older map.
                let read = rules.waits_for_readers && self.reader == Some(dead.used);
                if ours && !pinned && !read {
                    events.push(Event::Collects(host, dead.used.object));
                }
            }
        }
        match self.reader {
            Some(_) => events.push(Event::ReaderReads),
            None if self.left.readers > 0 && self.head.root.is_some() => {
                events.push(Event::ReaderOpens);
            }
            None => {}
        }
        events
    }

    fn after(&self, event: Event, rules: Rules) -> Result<Self, String> {
        let mut next = self.clone();
        match event {
            Event::Arrives(at) => next.arrive(at, rules)?,
            Event::Answered(at) => next.answered(at),
            Event::Begins(host, change) => next.begin(host, change, rules),
            Event::Collects(host, object) => {
                let serving = next.hosts[host].as_mut().expect("asked only then");
                serving.dead.retain(|dead| dead.used.object != object);
                next.send(host, Sent::Delete(object));
            }
            Event::ReaderOpens => {
                next.left.readers -= 1;
                next.reader = next.head.root;
            }
            Event::ReaderReads => {
                let read = next.reader.take().expect("asked only then");
                if !next.objects.contains(&read.object) {
                    return Err(format!("a reader lacks {read:?}"));
                }
            }
        }
        Ok(next)
    }

    fn send(&mut self, host: usize, sent: Sent) {
        self.messages.push(Message {
            host,
            sent,
            answer: None,
        });
        self.messages.sort();
    }

    fn begin(&mut self, host: usize, change: Change, rules: Rules) {
        let before = self.hosts[host].take();
        // An attach goes by the head of now.
        let mut serving = before.unwrap_or_else(|| Serving {
            head: self.head.clone(),
            dead: self.head.dead.clone(),
            change: None,
        });
        let mut head = serving.head.clone();
        let left = &mut self.left;
        match change {
            Change::Raise => {
                left.attaches -= 1;
                head.epoch += 1;
                head.owner = Some(host);
            }
            Change::Fold => {
                left.folds -= 1;
                // Stored before the head: an orphan, if that is not to be.
                let object = u8::try_from(self.upon.len()).expect("few objects");
                self.objects.insert(object);
                self.upon.insert(object, head.root.map(|root| root.object));
                head.map += 1;
                let born = head.map;
                let used = Used { object, born };
                let before = head.root.replace(used);
                let died = head.map;
                let dead = before.map(|used| Dead { used, died });
                if !rules.dies_by_the_head {
                    serving.dead.extend(dead);
                }
                head.dead = serving.dead.clone();
                head.dead
                    .extend(dead.filter(|dead| !serving.dead.contains(dead)));
            }
            Change::Snapshot => {
                left.snapshots -= 1;
                head.snapshots
                    .push((head.map, head.root.expect("asked only then")));
            }
            Change::Unmake => {
                left.unmakes -= 1;
                head.snapshots.remove(0);
            }
            Change::RollBack => {
                left.rollbacks -= 1;
                let (_, to) = head.snapshots[0];
                head.map += 1;
                head.owner = None;
                let died = head.map;
                let left = head.root.replace(to).filter(|root| *root != to);
                head.dead = serving.dead.clone();
                if rules.rollback_revives {
                    head.dead.retain(|dead| dead.used != to);
                }
                head.dead.extend(left.map(|used| Dead { used, died }));
            }
        }
        let seen = serving.head.clone();
        serving.change = Some((change, head.clone()));
        self.hosts[host] = Some(serving);
        self.send(host, Sent::Replace { seen, head });
    }

    fn arrive(&mut self, at: usize, rules: Rules) -> Result<(), String> {
        let done = match self.messages[at].sent.clone() {
            Sent::Replace { seen, head } => {
                let may = seen == self.head || !rules.head_is_conditional;
                if may {
                    let before = std::mem::replace(&mut self.head, head);
                    // Only a rollback gives a volume to nobody.
                    let lost = before.root.filter(|root| !self.is_upon(root.object));
                    if let Some(lost) = lost.filter(|_| self.head.owner.is_some()) {
                        return Err(format!("{lost:?} is lost by {:?}", self.head));
                    }
                }
                may
            }
            Sent::Delete(object) => {
                self.objects.remove(&object);
                // Nobody needs the answer.
                self.messages.remove(at);
                return Ok(());
            }
        };
        self.messages[at].answer = Some(done);
        self.messages.sort();
        Ok(())
    }

    fn answered(&mut self, at: usize) {
        let Message { host, answer, .. } = self.messages.remove(at);
        let serving = self.hosts[host].as_mut().expect("it waits for the answer");
        let (change, head) = serving.change.take().expect("one change at a time");
        if answer != Some(true) || change == Change::RollBack {
            self.hosts[host] = None;
            return;
        }
        if change == Change::Fold {
            let known = |dead: &Dead| serving.head.dead.contains(dead);
            let new = head.dead.iter().filter(|dead| !known(dead)).copied();
            let new: Vec<Dead> = new.filter(|dead| !serving.dead.contains(dead)).collect();
            // What was planned to die and was deleted already is not dead anew.
            serving.dead.extend(new);
        }
        serving.head = head;
    }

    /// Whether the head's object is this one, or was made upon it.
    fn is_upon(&self, fold: Object) -> bool {
        let mut at = self.head.root.map(|root| root.object);
        while let Some(object) = at {
            if object == fold {
                return true;
            }
            at = self.upon[&object];
        }
        false
    }

    /// What must hold.
    fn check(&self) -> Result<(), String> {
        let snapshots = self.head.snapshots.iter().map(|(_, used)| used);
        let needed = self.head.root.iter().chain(snapshots);
        for used in needed {
            if !self.objects.contains(&used.object) {
                return Err(format!("{used:?} is needed, and deleted: {:?}", self.head));
            }
        }
        Ok(())
    }
}

/// Walks all states that can be reached, the nearest first. The count of them, or the way to one
/// that must not be.
fn explore(rules: Rules, budget: Budget) -> Result<usize, String> {
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    let start = State::new(budget);
    let mut known = HashSet::from([hasher.hash_one(&start)]);
    let mut ways: Vec<(usize, String)> = vec![(0, String::new())];
    let mut open = VecDeque::from([(start, 0)]);
    while let Some((state, way)) = open.pop_front() {
        for event in state.events(rules) {
            let next = state.after(event, rules);
            match next.and_then(|next| next.check().map(|()| next)) {
                Ok(next) => {
                    if known.insert(hasher.hash_one(&next)) {
                        ways.push((way, format!("{event:?}")));
                        open.push_back((next, ways.len() - 1));
                    }
                }
                Err(violation) => {
                    let mut text = format!("{event:?}\n{violation}");
                    let mut at = way;
                    while at != 0 {
                        text = format!("{}\n{text}", ways[at].1);
                        at = ways[at].0;
                    }
                    return Err(text);
                }
            }
        }
    }
    Ok(known.len())
}

const TAKEOVER: Budget = Budget {
    attaches: 2,
    folds: 3,
    snapshots: 1,
    unmakes: 0,
    rollbacks: 0,
    readers: 1,
};

/// A snapshot goes, or the volume goes back to it, while somebody stalls.
const SNAPSHOTS: Budget = Budget {
    attaches: 3,
    folds: 2,
    snapshots: 1,
    unmakes: 1,
    rollbacks: 1,
    readers: 0,
};

fn holds(budget: Budget) {
    let mut budget = budget;
    if std::env::var_os("QUARRY_TEST_MODEL_LARGE").is_some() {
        budget.folds += 1;
    }
    let count = explore(PROTOCOL, budget).unwrap_or_else(|way| panic!("{way}"));
    println!("{count} states: {budget:?}");
    assert!(count > 1000, "{count}");
}

#[test]
fn collecting_in_every_order_of_a_takeover_keeps_what_is_needed() {
    holds(TAKEOVER);
}

#[test]
fn collecting_in_every_order_with_snapshots_and_rollbacks_keeps_what_is_needed() {
    holds(SNAPSHOTS);
}

fn fails(rules: Rules, budget: Budget) {
    let way = explore(rules, budget).expect_err("the model does not see what is missing");
    println!("{way}");
}

/// A writer that stalled wakes up, folds, and deletes what that would replace: the head never heard of it.
#[test]
fn collecting_by_memory_without_the_step_of_the_head_is_caught() {
    let rules = Rules {
        dies_by_the_head: false,
        ..PROTOCOL
    };
    fails(rules, TAKEOVER);
}

#[test]
fn collecting_with_an_unconditional_head_is_caught() {
    let rules = Rules {
        head_is_conditional: false,
        ..PROTOCOL
    };
    fails(rules, TAKEOVER);
}

#[test]
fn collecting_that_ignores_snapshots_is_caught() {
    let rules = Rules {
        snapshots_pin: false,
        ..PROTOCOL
    };
    fails(rules, TAKEOVER);
}

#[test]
fn collecting_that_does_not_wait_for_readers_is_caught() {
    let rules = Rules {
        waits_for_readers: false,
        ..PROTOCOL
    };
    fails(rules, TAKEOVER);
}

#[test]
fn rollback_that_revives_nothing_is_caught() {
    let rules = Rules {
        rollback_revives: false,
        ..PROTOCOL
    };
    fails(rules, SNAPSHOTS);
}
