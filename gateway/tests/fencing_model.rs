//! Every order of events of attaching, writing, stalling, taking over, folding and deleting, in a
//! model of the protocol that `backend/open.rs`, `backend/head.rs`, the uploads and the checkpoints
//! follow: two hosts, a reader, and a store that answers late, twice or never.
//!
//! The model has what the protocol rests on and nothing else: a chunk is one write, the map is the
//! list of writes folded into it, and every PUT is a message that arrives some time or never, whether
//! or not its sender lives. What a host does between two messages is one step.
//!
//! In every state that can be reached:
//! - what a reader finds is the history, or a beginning of it, and nothing ever leaves the history;
//! - a write that was told to be in the store is in it for good, and two are never told so of one place;
//! - a write by an epoch that has been sealed off never comes to be seen;
//! - a host that takes its volume up again finds its cache's writes to follow upon the store's.
//!
//! That the model can find what it looks for is shown by leaving parts of the protocol out.
//!
//! What is deleted for good, and when, has a model of its own: [`collecting`].

#[path = "fencing_model/collecting.rs"]
mod collecting;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

/// A write: its number in the volume's order, and which of all writes it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Write {
    number: u8,
    id: u8,
}

/// Epoch and number of a chunk: its name in the store.
type Key = (u8, u8);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Object {
    Chunk { write: Write, by: u8 },
    Seal,
}

/// A run of the log: epoch, first chunk, and the end if it is known.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Range {
    epoch: u8,
    first: u8,
    end: Option<u8>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
struct Head {
    epoch: u8,
    owner: Option<usize>,
    /// Whose cache is the newest.
    lineage: Option<usize>,
    /// The map: the writes folded into it.
    root: Vec<Write>,
    log: Vec<Range>,
}

/// A PUT: `create` of an object, or `replace` of the head that was seen.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Put {
    Create(Key, Object),
    Replace { seen: Head, head: Head },
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Message {
    host: usize,
    /// A host that was started anew does not hear what the one before it asked.
    life: u8,
    put: Put,
    /// Whether it was done, once it has arrived.
    answer: Option<bool>,
}

/// Reading the log of a head, up to its end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Replay {
    head: Head,
    range: usize,
    seq: u8,
    found: Vec<Write>,
}

impl Replay {
    fn of(head: Head) -> Self {
        Self {
            seq: head.log.first().map_or(1, |range| range.first),
            found: head.root.clone(),
            range: 0,
            head,
        }
    }
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Phase {
    Idle,
    /// Step 1 of an attach: the raised head is sent.
    Raising(Head),
    /// Step 2; `true` while a seal is sent.
    Replaying(Replay, bool),
    /// Step 3, and every later change: the head as it was last seen, and as it is to be.
    Serving(Serving),
    /// A newer writer was met.
    Fenced,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Serving {
    /// As the store had it when we last wrote or read it.
    head: Head,
    /// What is sent to take its place.
    change: Option<(Change, Head)>,
    next: u8,
    /// Chunks on their way: number, write, whether it is stored.
    sent: Vec<(u8, Write, bool)>,
    /// Writes told to be in the store.
    committed: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Change {
    /// Records the end of the log before ours: nothing is served yet.
    Begin { end: u8, first: u8 },
    /// Folds so many writes, and with them the chunks before `after`.
    Fold { writes: usize, after: u8 },
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Host {
    life: u8,
    phase: Phase,
    /// All writes that it knows of, in order: the volume as its users see it. Survives it, in its cache.
    known: Vec<Write>,
}

/// How often each thing may still happen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Budget {
    attaches: u8,
    writes: u8,
    retries: u8,
    crashes: u8,
    folds: u8,
    readers: u8,
}

/// The protocol, and what may be left out of it.
#[derive(Clone, Copy, Debug)]
struct Rules {
    seals: bool,
    epoch_in_key: bool,
    head_is_conditional: bool,
    /// A chunk that exists is looked at before it is taken for one's own.
    existing_is_read: bool,
    commits_in_order: bool,
    /// Nothing is deleted that somebody who stalls may still come for.
    deletion_waits: bool,
    deletes: bool,
}

const PROTOCOL: Rules = Rules {
    seals: true,
    epoch_in_key: true,
    head_is_conditional: true,
    existing_is_read: true,
    commits_in_order: true,
    deletion_waits: true,
    deletes: false,
};

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    head: Head,
    objects: BTreeMap<Key, Object>,
    messages: Vec<Message>,
    hosts: [Host; 2],
    reader: Option<Replay>,
    left: Budget,
    /// Told to be in the store, by place.
    told: BTreeMap<u8, u8>,
}

/// A write in the history, the epoch that wrote it and the epoch of its range; 0 for both in the map.
type Seen = (Write, u8, u8);
/// Why a state must not be.
type Violation = String;

#[derive(Clone, Copy, Debug)]
enum Event {
    /// The store gets the message of this place.
    Arrives(usize),
    /// Its sender gets the answer.
    Answered(usize),
    SentAgain(usize),
    Attaches(usize),
    Crashes(usize),
    Replays(usize),
    Writes(usize),
    Folds(usize),
    Deletes(Key),
    ReaderOpens,
    ReaderReads,
}

impl State {
    fn new(left: Budget) -> Self {
        let host = || Host {
            life: 0,
            phase: Phase::Idle,
            known: Vec::new(),
        };
        Self {
            head: Head::default(),
            objects: BTreeMap::new(),
            messages: Vec::new(),
            hosts: [host(), host()],
            reader: None,
            left,
            told: BTreeMap::new(),
        }
    }

    /// The history: what a reader would find that looked at all at once.
    fn visible(&self, rules: Rules) -> Result<Vec<Seen>, Violation> {
        let mut all: Vec<_> = self.head.root.iter().map(|write| (*write, 0, 0)).collect();
        for range in &self.head.log {
            for seq in range.first..range.end.unwrap_or(u8::MAX) {
                match self.objects.get(&rules.key(range.epoch, seq)) {
                    Some(Object::Chunk { write, by }) => all.push((*write, *by, range.epoch)),
                    None if range.end.is_some() => {
                        return Err(format!("chunk {seq} of {range:?} is missing"));
                    }
                    Some(Object::Seal) | None => break,
                }
            }
        }
        match (1..)
            .zip(&all)
            .find(|(number, (write, ..))| write.number != *number)
        {
            Some((number, (write, ..))) => Err(format!("{write:?} in the place of {number}")),
            None => Ok(all),
        }
    }

    fn send(&mut self, host: usize, put: Put) {
        let life = self.hosts[host].life;
        self.messages.push(Message {
            host,
            life,
            put,
            answer: None,
        });
        self.messages.sort();
    }

    /// All that can happen next.
    fn events(&self, rules: Rules) -> Vec<Event> {
        let mut events = Vec::new();
        for (at, message) in self.messages.iter().enumerate() {
            if at > 0 && self.messages[at - 1] == *message {
                continue;
            }
            let is_waited_for = message.life == self.hosts[message.host].life;
            match message.answer {
                None => events.push(Event::Arrives(at)),
                Some(_) => events.push(Event::Answered(at)),
            }
            if self.left.retries > 0 && is_waited_for {
                events.push(Event::SentAgain(at));
            }
        }
        for host in 0..self.hosts.len() {
            self.host_events(host, rules, &mut events);
        }
        if self.reader.is_some() {
            events.push(Event::ReaderReads);
        } else if self.left.readers > 0 {
            events.push(Event::ReaderOpens);
        }
        events
    }

    fn host_events(&self, host: usize, rules: Rules, events: &mut Vec<Event>) {
        let phase = &self.hosts[host].phase;
        if matches!(phase, Phase::Idle | Phase::Fenced) {
            if self.left.attaches > 0 {
                events.push(Event::Attaches(host));
            }
        } else if self.left.crashes > 0 {
            events.push(Event::Crashes(host));
        }
        match phase {
            Phase::Replaying(_, false) => events.push(Event::Replays(host)),
            Phase::Serving(serving)
                if !matches!(serving.change, Some((Change::Begin { .. }, _))) =>
            {
                if self.left.writes > 0 {
                    events.push(Event::Writes(host));
                }
                let is_new = serving.committed > serving.head.root.len();
                if self.left.folds > 0 && serving.change.is_none() && is_new {
                    events.push(Event::Folds(host));
                }
                if rules.deletes {
                    let garbage = self.garbage(&serving.head, rules);
                    events.extend(garbage.into_iter().map(Event::Deletes));
                }
            }
            _ => {}
        }
    }

    fn after(&self, event: Event, rules: Rules) -> Result<Self, Violation> {
        let mut next = self.clone();
        match event {
            Event::Arrives(at) => next.arrive(at, rules),
            Event::Answered(at) => next.answered(at, rules)?,
            Event::SentAgain(at) => {
                // The lane sends again what it has no answer to; the first may still be on its way.
                next.left.retries -= 1;
                let Message { host, put, .. } = next.messages[at].clone();
                next.send(host, put);
            }
            Event::Attaches(host) => next.attach(host),
            Event::Crashes(host) => {
                next.left.crashes -= 1;
                next.hosts[host].life += 1;
                next.hosts[host].phase = Phase::Idle;
            }
            Event::Replays(host) => next.replay(host, rules)?,
            Event::Writes(host) => next.write(host, rules),
            Event::Folds(host) => next.fold(host),
            Event::Deletes(key) => {
                next.objects.remove(&key);
            }
            Event::ReaderOpens => {
                next.left.readers -= 1;
                next.reader = Some(Replay::of(next.head.clone()));
            }
            Event::ReaderReads => next.read_on(rules)?,
        }
        // Answers that nobody listens to make no difference.
        let hosts = &next.hosts;
        let listens = |message: &Message| {
            let host = &hosts[message.host];
            let is_deaf = matches!(host.phase, Phase::Idle | Phase::Fenced);
            message.answer.is_none() || (message.life == host.life && !is_deaf)
        };
        next.messages.retain(listens);
        Ok(next)
    }

    /// Step 1: the head is read and, one epoch higher, sent.
    fn attach(&mut self, host: usize) {
        self.left.attaches -= 1;
        let mut head = self.head.clone();
        head.epoch += 1;
        head.owner = Some(host);
        if head.lineage != Some(host) {
            // What its cache holds is of a history that went on elsewhere: given up.
            head.lineage = Some(host);
            self.hosts[host].known.clear();
        }
        self.hosts[host].phase = Phase::Raising(head.clone());
        let seen = self.head.clone();
        self.send(host, Put::Replace { seen, head });
    }

    /// Step 2, one object.
    fn replay(&mut self, host: usize, rules: Rules) -> Result<(), Violation> {
        let Phase::Replaying(replay, _) = &mut self.hosts[host].phase else {
            unreachable!("asked only then")
        };
        let Some(range) = replay.head.log.get(replay.range).copied() else {
            return self.begin(host, rules);
        };
        let key = rules.key(range.epoch, replay.seq);
        let is_end = range.end == Some(replay.seq);
        match self.objects.get(&key) {
            _ if is_end => replay.next_range(),
            Some(Object::Chunk { write, .. }) => replay.take(*write)?,
            Some(Object::Seal) if range.end.is_none() => replay.next_range(),
            None if range.end.is_none() => {
                if !rules.seals {
                    replay.next_range();
                    return Ok(());
                }
                let Phase::Replaying(_, sealing) = &mut self.hosts[host].phase else {
                    unreachable!("matched above")
                };
                *sealing = true;
                self.send(host, Put::Create(key, Object::Seal));
            }
            found => {
                return Err(format!(
                    "host {host} finds {found:?} at {key:?} of {range:?}"
                ));
            }
        }
        Ok(())
    }

    /// Step 3: the end is recorded, with a range of our own.
    fn begin(&mut self, host: usize, rules: Rules) -> Result<(), Violation> {
        let Phase::Replaying(replay, _) = &self.hosts[host].phase else {
            unreachable!("asked only then")
        };
        let (stored, end, seen) = (replay.found.clone(), replay.seq, replay.head.clone());
        // Without epochs in keys the seal takes the number.
        let first = end + u8::from(!rules.epoch_in_key);
        let known = &mut self.hosts[host].known;
        if known.is_empty() {
            known.clone_from(&stored);
        } else if !known.starts_with(&stored) {
            return Err(format!("the store has {stored:?}, the cache {known:?}"));
        }
        self.hosts[host].phase = Phase::Serving(Serving {
            head: seen,
            change: None,
            next: first,
            sent: Vec::new(),
            committed: stored.len(),
        });
        self.change(host, Change::Begin { end, first });
        Ok(())
    }

    fn change(&mut self, host: usize, change: Change) {
        let known = self.hosts[host].known.clone();
        let Phase::Serving(serving) = &mut self.hosts[host].phase else {
            unreachable!("asked only then")
        };
        let mut head = serving.head.clone();
        match change {
            Change::Begin { end, first } => {
                if let Some(last) = head.log.last_mut() {
                    last.end = Some(end);
                }
                head.log.retain(|range| range.end != Some(range.first));
                head.log.push(Range {
                    epoch: head.epoch,
                    first,
                    end: None,
                });
            }
            Change::Fold { writes, after } => {
                head.root = known[..writes].to_vec();
                head.log
                    .retain(|range| range.end.is_none_or(|end| end > after));
                for range in &mut head.log {
                    range.first = range.first.max(after);
                }
            }
        }
        serving.change = Some((change, head.clone()));
        let seen = serving.head.clone();
        self.send(host, Put::Replace { seen, head });
    }

    /// A user's write: acknowledged, cut and sent.
    fn write(&mut self, host: usize, rules: Rules) {
        let id = self.left.writes;
        self.left.writes -= 1;
        let known = &mut self.hosts[host].known;
        let number = u8::try_from(known.len() + 1).expect("few writes");
        known.push(Write { number, id });
        self.upload(host, rules);
    }

    /// Sends what is known and neither in the store nor on its way.
    fn upload(&mut self, host: usize, rules: Rules) {
        let known = self.hosts[host].known.clone();
        let Phase::Serving(serving) = &mut self.hosts[host].phase else {
            unreachable!("asked only then")
        };
        let by = serving.head.epoch;
        let mut puts = Vec::new();
        for write in &known[serving.committed + serving.sent.len()..] {
            serving.sent.push((serving.next, *write, false));
            let chunk = Object::Chunk { write: *write, by };
            puts.push(Put::Create(rules.key(by, serving.next), chunk));
            serving.next += 1;
        }
        for put in puts {
            self.send(host, put);
        }
    }

    fn fold(&mut self, host: usize) {
        self.left.folds -= 1;
        let Phase::Serving(serving) = &self.hosts[host].phase else {
            unreachable!("asked only then")
        };
        let after = serving.sent.first().map_or(serving.next, |sent| sent.0);
        let writes = serving.committed;
        self.change(host, Change::Fold { writes, after });
    }

    /// What a writer may delete: what its head does not name. With patience, only what nobody who
    /// stalls may still write over, or read.
    fn garbage(&self, head: &Head, rules: Rules) -> Vec<Key> {
        let named = |epoch: u8, seq: u8| {
            let is_in = |range: &Range| {
                rules.key(range.epoch, 0).0 == epoch
                    && seq >= range.first
                    && range.end.is_none_or(|end| seq < end)
            };
            epoch >= head.epoch || head.log.iter().any(is_in)
        };
        let before = |seq| head.log.first().is_some_and(|first| seq < first.first);
        let keys = self.objects.keys().copied();
        keys.filter(|(epoch, seq)| !named(*epoch, *seq) || before(*seq))
            .filter(|key| !rules.deletion_waits || !self.may_still_come(*key))
            .collect()
    }

    fn may_still_come(&self, key: Key) -> bool {
        let is_sent = |message: &Message| matches!(&message.put, Put::Create(at, _) if *at == key);
        let stalls = |host: &Host| match &host.phase {
            Phase::Idle | Phase::Fenced => false,
            Phase::Raising(head) => head.epoch <= self.head.epoch,
            Phase::Replaying(..) => true,
            Phase::Serving(serving) => serving.head.epoch < self.head.epoch,
        };
        self.messages.iter().any(is_sent) || self.hosts.iter().any(stalls) || self.reader.is_some()
    }

    /// The store gets a message.
    fn arrive(&mut self, at: usize, rules: Rules) {
        let done = match &self.messages[at].put {
            Put::Create(key, object) => {
                let free = !self.objects.contains_key(key);
                if free {
                    self.objects.insert(*key, *object);
                }
                free
            }
            Put::Replace { seen, head } => {
                let may = *seen == self.head || !rules.head_is_conditional;
                if may {
                    self.head = head.clone();
                }
                may
            }
        };
        self.messages[at].answer = Some(done);
        self.messages.sort();
    }

    /// A host gets an answer.
    fn answered(&mut self, at: usize, rules: Rules) -> Result<(), Violation> {
        let Message {
            host, put, answer, ..
        } = self.messages.remove(at);
        let done = answer == Some(true);
        match put {
            Put::Create(key, Object::Seal) => self.sealed(host, key, done),
            Put::Create(key, Object::Chunk { write, .. }) => {
                self.uploaded(host, key, write, done, rules)
            }
            Put::Replace { head, .. } => {
                self.replaced(host, &head, done, rules);
                Ok(())
            }
        }
    }

    fn sealed(&mut self, host: usize, key: Key, done: bool) -> Result<(), Violation> {
        let found = self.objects.get(&key).copied();
        let Phase::Replaying(replay, sealing) = &mut self.hosts[host].phase else {
            return Ok(());
        };
        // The answer to one that was sent twice.
        let is_here = *sealing && replay.seq == key.1;
        if !is_here
            || replay
                .head
                .log
                .get(replay.range)
                .is_none_or(|range| range.end.is_some())
        {
            return Ok(());
        }
        *sealing = false;
        match found {
            _ if done => replay.next_range(),
            Some(Object::Seal) => replay.next_range(),
            Some(Object::Chunk { write, .. }) => replay.take(write)?,
            None => return Err(format!("{key:?} exists, and does not")),
        }
        Ok(())
    }

    fn uploaded(
        &mut self,
        host: usize,
        key: Key,
        write: Write,
        done: bool,
        rules: Rules,
    ) -> Result<(), Violation> {
        let found = self.objects.get(&key).copied();
        let Phase::Serving(serving) = &mut self.hosts[host].phase else {
            return Ok(());
        };
        let Some(sent) = serving
            .sent
            .iter_mut()
            .find(|sent| (sent.0, sent.1) == (key.1, write))
        else {
            return Ok(());
        };
        let is_ours = matches!(found, Some(Object::Chunk { write: at, .. }) if at == write);
        if !done && !is_ours && rules.existing_is_read {
            self.hosts[host].phase = Phase::Fenced;
            return Ok(());
        }
        sent.2 = true;
        while let Some(stored) = serving.sent.iter().position(|sent| sent.2) {
            if stored > 0 && rules.commits_in_order {
                break;
            }
            let (_, write, _) = serving.sent.remove(stored);
            serving.committed += 1;
            let told = self.told.insert(write.number, write.id);
            if told.is_some_and(|id| id != write.id) {
                return Err(format!("two writes are told to be number {}", write.number));
            }
        }
        Ok(())
    }

    /// A head was written, or another stands there: then it is read.
    fn replaced(&mut self, host: usize, sent: &Head, done: bool, rules: Rules) {
        let now = self.head.clone();
        match &mut self.hosts[host].phase {
            Phase::Raising(wanted) if wanted == sent => {
                self.hosts[host].phase = if done || now == *sent {
                    Phase::Replaying(Replay::of(sent.clone()), false)
                } else {
                    Phase::Idle
                };
            }
            Phase::Serving(serving) => {
                let Some((change, wanted)) = serving.change.clone() else {
                    return;
                };
                if wanted != *sent {
                    return;
                }
                serving.change = None;
                if done || now == *sent {
                    serving.head = wanted;
                    self.upload(host, rules);
                } else if (now.epoch, now.owner) == (serving.head.epoch, serving.head.owner) {
                    serving.head = now;
                    self.change(host, change);
                } else {
                    self.hosts[host].phase = Phase::Fenced;
                }
            }
            _ => {}
        }
    }

    fn read_on(&mut self, rules: Rules) -> Result<(), Violation> {
        let Some(mut replay) = self.reader.take() else {
            return Ok(());
        };
        let Some(range) = replay.head.log.get(replay.range).copied() else {
            let history = self.visible(rules)?;
            let is_beginning = replay.found.len() <= history.len()
                && replay.found.iter().zip(&history).all(|(a, (b, ..))| a == b);
            return match is_beginning {
                true => Ok(()),
                false => Err(format!("a reader found {:?} of {history:?}", replay.found)),
            };
        };
        match self.objects.get(&rules.key(range.epoch, replay.seq)) {
            _ if range.end == Some(replay.seq) => replay.next_range(),
            Some(Object::Chunk { write, .. }) => replay.take(*write)?,
            Some(Object::Seal) | None if range.end.is_none() => replay.next_range(),
            found => return Err(format!("a reader finds {found:?} in {range:?}")),
        }
        self.reader = Some(replay);
        Ok(())
    }

    /// What must hold after a history of `before`.
    fn check(&self, before: &[Seen], rules: Rules) -> Result<(), Violation> {
        let history = self.visible(rules)?;
        if let Some(lost) =
            (0..before.len()).find(|at| history.get(*at).map(|h| h.0) != Some(before[*at].0))
        {
            return Err(format!(
                "{:?} left the history, which is {history:?}",
                before[lost]
            ));
        }
        if let Some(late) = history[before.len()..]
            .iter()
            .find(|(_, by, range)| by != range)
        {
            return Err(format!("{late:?} comes after its epoch was sealed off"));
        }
        let is_there = |(number, id): (&u8, &u8)| {
            let at = history.get(usize::from(*number) - 1);
            at.is_some_and(|(write, ..)| write.id == *id)
        };
        match self.told.iter().find(|told| !is_there(*told)) {
            Some(told) => Err(format!(
                "{told:?} was told to be in the store, which has {history:?}"
            )),
            None => Ok(()),
        }
    }
}

impl Replay {
    fn take(&mut self, write: Write) -> Result<(), Violation> {
        if usize::from(write.number) != self.found.len() + 1 {
            return Err(format!("{write:?} follows upon {:?}", self.found));
        }
        self.found.push(write);
        self.seq += 1;
        Ok(())
    }

    fn next_range(&mut self) {
        self.range += 1;
        if let Some(range) = self.head.log.get(self.range) {
            self.seq = range.first;
        }
    }
}

impl Rules {
    fn key(self, epoch: u8, seq: u8) -> Key {
        (if self.epoch_in_key { epoch } else { 0 }, seq)
    }
}

/// Walks all states that can be reached, the nearest first. The count of them, or the way to one
/// that must not be.
fn explore(rules: Rules, budget: Budget) -> Result<usize, String> {
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    let start = State::new(budget);
    // States by their hashes of 64 bits: some of a million are one by chance once in 30 million runs.
    let mut known = HashSet::from([hasher.hash_one(&start)]);
    let mut ways: Vec<(usize, Option<Event>)> = vec![(0, None)];
    let mut open = VecDeque::from([(start, 0)]);
    while let Some((state, way)) = open.pop_front() {
        let history = state.visible(rules)?;
        for event in state.events(rules) {
            let next = state.after(event, rules);
            match next.and_then(|next| next.check(&history, rules).map(|()| next)) {
                Ok(next) => {
                    if known.insert(hasher.hash_one(&next)) {
                        ways.push((way, Some(event)));
                        open.push_back((next, ways.len() - 1));
                    }
                }
                Err(violation) => {
                    let mut events = vec![event];
                    let mut at = way;
                    while let (before, Some(event)) = ways[at] {
                        events.push(event);
                        at = before;
                    }
                    events.reverse();
                    return Err(tell(rules, budget, &events) + &violation);
                }
            }
        }
    }
    Ok(known.len())
}

/// The events in words, a line each.
fn tell(rules: Rules, budget: Budget, events: &[Event]) -> String {
    let mut state = State::new(budget);
    let mut text = String::new();
    for event in events {
        let about = match event {
            Event::Arrives(at) | Event::Answered(at) | Event::SentAgain(at) => {
                format!("{:?}", state.messages[*at])
            }
            _ => String::new(),
        };
        text += &format!("{event:?} {about}\n");
        if let Ok(next) = state.after(*event, rules) {
            state = next;
        }
    }
    text
}

/// A takeover with all that the new and the old owner do about it.
const TAKEOVER: Budget = Budget {
    attaches: 2,
    writes: 2,
    retries: 0,
    crashes: 0,
    folds: 1,
    readers: 1,
};

/// A takeover where PUTs arrive twice.
const TWICE: Budget = Budget {
    retries: 1,
    folds: 0,
    readers: 0,
    ..TAKEOVER
};

/// A host dies, and one of the two takes the volume up, and then one of them again.
const RETURN: Budget = Budget {
    attaches: 3,
    crashes: 1,
    folds: 0,
    readers: 0,
    ..TAKEOVER
};

/// Explores, and says what it came to.
fn holds(rules: Rules, budget: Budget) {
    let mut budget = budget;
    if std::env::var_os("QUARRY_TEST_MODEL_LARGE").is_some() {
        budget.retries += 1;
        budget.crashes += 1;
    }
    let count = explore(rules, budget).unwrap_or_else(|way| panic!("{way}"));
    println!("{count} states: {budget:?}");
    assert!(count > 1000, "{count}");
}

#[test]
fn takeover_in_every_order_keeps_one_history() {
    holds(PROTOCOL, TAKEOVER);
}

#[test]
fn takeover_with_puts_that_arrive_twice_keeps_one_history() {
    holds(PROTOCOL, TWICE);
}

#[test]
fn host_that_comes_back_in_every_order_keeps_one_history() {
    holds(PROTOCOL, RETURN);
}

#[test]
fn deletion_that_waits_in_every_order_keeps_one_history() {
    let rules = Rules {
        deletes: true,
        ..PROTOCOL
    };
    holds(rules, TAKEOVER);
}

/// What the model must find when a part of the protocol is left out.
fn fails(rules: Rules, budget: Budget) {
    let way = explore(rules, budget).expect_err("the model does not see what is missing");
    println!("{way}");
}

#[test]
fn protocol_without_a_seal_is_caught() {
    let rules = Rules {
        seals: false,
        ..PROTOCOL
    };
    fails(rules, TAKEOVER);
}

#[test]
fn protocol_without_the_epoch_in_keys_is_caught() {
    let rules = Rules {
        epoch_in_key: false,
        ..PROTOCOL
    };
    fails(rules, TAKEOVER);
}

#[test]
fn protocol_with_an_unconditional_head_is_caught() {
    let rules = Rules {
        head_is_conditional: false,
        ..PROTOCOL
    };
    fails(rules, TAKEOVER);
}

#[test]
fn protocol_that_takes_what_exists_for_its_own_is_caught() {
    let rules = Rules {
        existing_is_read: false,
        ..PROTOCOL
    };
    fails(rules, TAKEOVER);
}

#[test]
fn protocol_that_commits_out_of_order_is_caught() {
    let rules = Rules {
        commits_in_order: false,
        ..PROTOCOL
    };
    fails(rules, TAKEOVER);
}

#[test]
fn deletion_that_does_not_wait_is_caught() {
    let rules = Rules {
        deletes: true,
        deletion_waits: false,
        ..PROTOCOL
    };
    fails(rules, TAKEOVER);
}
