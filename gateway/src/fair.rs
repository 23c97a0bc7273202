//! Places that tenants share: so many at once, handed out in weighted turn, and none of them lost to who hangs.
//!
//! Owns: who holds a place, who waits, and whose turn it is. Does not own: what is done in a place.
//!
//! A place that is held for longer than a gate's time for it ([`SLOW_AFTER`], if nothing else is said) stops counting
//! against the places of all and counts against its own tenant only, who is *slow* from then on: what it begins next takes
//! none of the places of all, and it begins nothing while it holds [`Gate::slow_max`] places. It is slow until something
//! that it began ends in time. So tenants whose store hangs, however many, take places from the others for that time, once.
//! The price: what is held at once is bounded by [`Gate::places`] and as much again for each slow tenant.
//!
//! **Invariants.**
//! - Of all that are not slow, no more than [`Gate::places`] hold a place; a tenant never holds more than that, slow or not.
//! - A free place goes to the tenant that holds the fewest beside its weight, and among equals to the one whose
//!   turn is due by its weight: nobody who waits is passed over for ever.
//! - A tenant's own are served in the order in which they came.
//! - Whoever waits can stop waiting (by dropping the future), and whoever holds a place gives it back by dropping it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use quarry_objfmt::record::WEIGHT_DEFAULT;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

/// How long a place may be held before its holder is taken for slow: longer than a sound store takes for a chunk.
pub const SLOW_AFTER: Duration = Duration::from_secs(5);

/// Of the places, what a slow tenant may hold.
const SLOW_SHARE: usize = 4;

/// What a turn costs a tenant of weight 1.
const TURN: u64 = 1 << 32;

/// A tenant, as gates know it: one for all gates and all that it does.
#[derive(Debug)]
pub struct Share {
    id: u64,
    weight: AtomicU32,
}

impl Share {
    /// One of this weight, beside others'; 0 counts as 1.
    #[must_use]
    pub fn new(weight: u32) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            weight: AtomicU32::new(weight.max(1)),
        })
    }

    /// Gives it another weight, from the next turn on.
    pub fn set_weight(&self, weight: u32) {
        self.weight.store(weight.max(1), Ordering::Relaxed);
    }

    /// Its weight.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
    }
}

/// The share of who has no settings.
#[must_use]
pub fn plain_share() -> Arc<Share> {
    Share::new(WEIGHT_DEFAULT)
}

/// How a gate is used, now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GateCounts {
    /// Places of all that are held.
    pub held: usize,
    /// What slow tenants hold beside them.
    pub slow: usize,
    /// How many wait for a place.
    pub waiting: usize,
}

/// So many places. Cheap to clone: all clones are one gate.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    places: usize,
    slow_after: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By the share's id, so that the order of a look at all is always the same.
    tenants: BTreeMap<u64, Tenant>,
    /// Who holds one of the places, by the number of the holding, which is the order of time.
    held: BTreeMap<u64, (u64, Instant)>,
    /// What slow tenants hold.
    slow: usize,
    waiting: usize,
    /// The number of the next holding, or of who waits next.
    next: u64,
    /// The turn that was served last.
    turn: u64,
}

#[derive(Debug)]
struct Tenant {
    share: Weak<Share>,
    /// Places of all that it holds.
    held: usize,
    /// Places that it holds beside them.
    slow_held: usize,
    is_slow: bool,
    /// When it is its turn again.
    turn: u64,
    line: VecDeque<(u64, oneshot::Sender<Place>)>,
}

impl Tenant {
    fn weight(&self) -> u64 {
        self.share
            .upgrade()
            .map_or(1, |share| share.weight())
            .into()
    }
}

/// A place; given back when dropped.
#[derive(Debug)]
pub struct Place {
    gate: Arc<Inner>,
    share: Arc<Share>,
    number: u64,
    since: Instant,
}

/// Who waits; leaves the line when dropped.
struct Waiting<'a> {
    gate: &'a Inner,
    share: u64,
    number: u64,
}

impl Gate {
    /// A gate of so many places, at least one, each for [`SLOW_AFTER`].
    #[must_use]
    pub fn new(places: usize) -> Self {
        Self::with_time(places, SLOW_AFTER)
    }

    /// One whose places may be held for so long before their holder is slow.
    #[must_use]
    pub fn with_time(places: usize, slow_after: Duration) -> Self {
        Self(Arc::new(Inner {
            places: places.max(1),
            slow_after,
            state: Mutex::default(),
        }))
    }

    /// How many hold a place at once, the slow not counted; also how many one tenant holds, slow or not.
    #[must_use]
    pub fn places(&self) -> usize {
        self.0.places
    }

    /// With so many places held a slow tenant begins nothing more.
    #[must_use]
    pub fn slow_max(&self) -> usize {
        self.0.slow_max()
    }

    /// How it is used.
    #[must_use]
    pub fn counts(&self) -> GateCounts {
        let state = self.0.state.lock();
        GateCounts {
            held: state.held.len(),
            slow: state.slow,
            waiting: state.waiting,
        }
    }

    /// Waits for a place. May be given up by dropping the future.
    pub async fn enter(&self, share: &Arc<Share>) -> Place {
        let (mut turn, waiting) = match self.0.ask(share) {
            Ok(place) => return place,
            Err(asked) => asked,
        };
        loop {
            // Without a holder who could become slow, only an end of one lets this one in.
            let oldest = self.0.state.lock().oldest();
            let grown_slow = async {
                match oldest {
                    Some(since) => sleep_until(since + self.0.slow_after).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                place = &mut turn => {
                    drop(waiting);
                    return place.expect("who waits is in the line until it has a place");
                }
                () = grown_slow => self.0.serve(),
            }
        }
    }
}

impl State {
    /// Since when one of the places is held that is held longest.
    fn oldest(&self) -> Option<Instant> {
        let (_, (_, since)) = self.held.first_key_value()?;
        Some(*since)
    }

    fn tenant(&mut self, share: &Arc<Share>) -> &mut Tenant {
        if !self.tenants.contains_key(&share.id) {
            // Slow ones are remembered for as long as anybody asks for them.
            self.tenants
                .retain(|_, tenant| tenant.share.strong_count() > 0);
        }
        let turn = self.turn;
        self.tenants.entry(share.id).or_insert_with(|| Tenant {
            share: Arc::downgrade(share),
            held: 0,
            slow_held: 0,
            is_slow: false,
            turn,
            line: VecDeque::new(),
        })
    }

    /// Who has held a place for too long is slow.
    fn age(&mut self, now: Instant, slow_after: Duration) {
        while let Some((number, (share, since))) = self.held.first_key_value()
            && *since + slow_after <= now
        {
            let (number, share) = (*number, *share);
            self.held.remove(&number);
            let tenant = self.tenants.get_mut(&share).expect("who holds is known");
            tenant.held -= 1;
            tenant.slow_held += 1;
            tenant.is_slow = true;
            self.slow += 1;
        }
    }
}

impl Inner {
    const fn slow_max(&self) -> usize {
        self.places.div_ceil(SLOW_SHARE)
    }

    fn may_enter(&self, state: &State, tenant: &Tenant) -> bool {
        let held = tenant.held + tenant.slow_held;
        if tenant.is_slow {
            return held < self.slow_max();
        }
        state.held.len() < self.places && held < self.places
    }

    /// A place at once, or a place in the line.
    fn ask(
        self: &Arc<Self>,
        share: &Arc<Share>,
    ) -> Result<Place, (oneshot::Receiver<Place>, Waiting<'_>)> {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.age(now, self.slow_after);
        let floor = state.turn;
        let tenant = state.tenant(share);
        if tenant.line.is_empty() {
            // Who was away has saved no turns.
            tenant.turn = tenant.turn.max(floor);
        }
        let tenant = &state.tenants[&share.id];
        // A free place that somebody could have is never left free, so nobody is overtaken.
        if tenant.line.is_empty() && self.may_enter(&state, tenant) {
            return Ok(self.grant(&mut state, share, now));
        }
        let number = state.next;
        state.next += 1;
        state.waiting += 1;
        let (tx, rx) = oneshot::channel();
        state.tenant(share).line.push_back((number, tx));
        let waiting = Waiting {
            gate: self,
            share: share.id,
            number,
        };
        Err((rx, waiting))
    }

    fn grant(self: &Arc<Self>, state: &mut State, share: &Arc<Share>, now: Instant) -> Place {
        let number = state.next;
        state.next += 1;
        let tenant = state.tenants.get_mut(&share.id).expect("who asks is known");
        if tenant.is_slow {
            tenant.slow_held += 1;
            state.slow += 1;
        } else {
            tenant.held += 1;
            state.turn = state.turn.max(tenant.turn);
            tenant.turn += TURN / u64::from(share.weight());
            state.held.insert(number, (share.id, now));
        }
        Place {
            gate: Arc::clone(self),
            share: Arc::clone(share),
            number,
            since: now,
        }
    }

    /// Gives what is free to those whose turn it is.
    fn serve(self: &Arc<Self>) {
        let now = Instant::now();
        let mut granted = Vec::new();
        let mut state = self.state.lock();
        state.age(now, self.slow_after);
        while let Some(share) = self.next(&state) {
            let tenant = state.tenants.get_mut(&share).expect("just seen");
            let (_, tx) = tenant.line.pop_front().expect("it waits");
            let share = tenant.share.upgrade();
            state.waiting -= 1;
            // Who waits holds its share; without one it has just stopped waiting.
            if let Some(share) = share.filter(|_| !tx.is_closed()) {
                granted.push((tx, self.grant(&mut state, &share, now)));
            }
        }
        drop(state);
        for (tx, place) in granted {
            // Who has stopped waiting just now drops the place, which is given to the next.
            let _ = tx.send(place);
        }
    }

    /// Whose turn it is of those who may enter.
    fn next(&self, state: &State) -> Option<u64> {
        let waits = state
            .tenants
            .iter()
            .filter(|(_, tenant)| !tenant.line.is_empty());
        let may = waits.filter(|(_, tenant)| self.may_enter(state, tenant));
        let by_turn = may.min_by(|(_, a), (_, b)| {
            let (held_a, held_b) = (a.held as u64 * b.weight(), b.held as u64 * a.weight());
            held_a.cmp(&held_b).then(a.turn.cmp(&b.turn))
        });
        by_turn.map(|(share, _)| *share)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        let tenant = state.tenants.get_mut(&self.share);
        let Some(line) = tenant.map(|tenant| &mut tenant.line) else {
            return;
        };
        let before = line.len();
        line.retain(|(number, _)| *number != self.number);
        let left = before - line.len();
        state.waiting -= left;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        let now = Instant::now();
        state.age(now, self.gate.slow_after);
        let was_held = state.held.remove(&self.number).is_some();
        if !was_held {
            state.slow -= 1;
        }
        let tenant = state.tenants.get_mut(&self.share.id);
        let tenant = tenant.expect("who holds is known");
        if was_held {
            tenant.held -= 1;
        } else {
            tenant.slow_held -= 1;
        }
        if now < self.since + self.gate.slow_after {
            tenant.is_slow = false;
        }
        drop(state);
        self.gate.serve();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt as _;
    use futures::stream::{FuturesUnordered, StreamExt as _};
    use tokio::time::{advance, sleep, timeout};

    use super::*;

    const SHORT: Duration = Duration::from_millis(1);

    /// As many places as `share` gets at once, up to `max`.
    fn take(gate: &Gate, share: &Arc<Share>, max: usize) -> Vec<Place> {
        let at_once = |_| gate.enter(share).now_or_never();
        (0..max).map_while(at_once).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn places_go_to_waiting_tenants_by_weight() {
        let gate = Gate::new(8);
        let (heavy, light) = (Share::new(300), Share::new(100));
        let all = take(&gate, &heavy, 99);
        assert_eq!(all.len(), 8);
        let mut waiting = FuturesUnordered::new();
        for (n, share) in [(0, &light), (1, &heavy)] {
            for _ in 0..20 {
                let enter = gate.enter(share);
                waiting.push(async move { (n, enter.await) });
            }
        }
        assert!(waiting.next().now_or_never().is_none());
        let (mut held, mut counts) = (VecDeque::from(all), [0; 2]);
        for _ in 0..40 {
            let free = held.pop_front();
            drop(free);
            let (n, place) = timeout(SHORT, waiting.next()).await.unwrap().unwrap();
            // Both wait for the first half only.
            if counts.iter().sum::<usize>() < 24 {
                counts[n] += 1;
            }
            held.push_back(place);
        }
        assert_eq!(counts[0] + counts[1], 24);
        assert!((5..=8).contains(&counts[0]), "{counts:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_place_is_given_in_weighted_turn() {
        let gate = Gate::new(1);
        let shares = [Share::new(300), Share::new(100)];
        let first = take(&gate, &shares[1], 1);
        let mut waiting = FuturesUnordered::new();
        let wait = |waiting: &mut FuturesUnordered<_>, n: usize| {
            let (gate, share) = (gate.clone(), Arc::clone(&shares[n]));
            waiting.push(async move { (n, gate.enter(&share).await) });
        };
        wait(&mut waiting, 0);
        wait(&mut waiting, 1);
        assert!(waiting.next().now_or_never().is_none());
        drop(first);
        let mut counts = [0; 2];
        for _ in 0..40 {
            let (n, place) = timeout(SHORT, waiting.next()).await.unwrap().unwrap();
            counts[n] += 1;
            wait(&mut waiting, n);
            assert!(waiting.next().now_or_never().is_none());
            drop(place);
        }
        assert!((29..=31).contains(&counts[0]), "{counts:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn hung_tenants_leave_the_others_all_places_after_a_time() {
        let gate = Gate::new(4);
        let hung: Vec<_> = (0..100).map(|_| plain_share()).collect();
        let sound = plain_share();
        let mut held = Vec::new();
        for share in &hung {
            held.push(take(&gate, share, 99));
            let wait = gate.enter(&sound);
            let waited = Instant::now();
            let got = timeout(Duration::from_secs(60), wait).await;
            assert!(got.is_ok());
            assert!(waited.elapsed() <= SLOW_AFTER);
            drop(got);
        }
        assert_eq!(take(&gate, &sound, 99).len(), 4);
        for (share, held) in hung.iter().zip(&held) {
            assert!(held.len() <= gate.places());
            assert!(take(&gate, share, 99).len() + held.len() <= gate.places());
        }
        // What a slow one gives up is not had again at the cost of others.
        let slow = held.swap_remove(0);
        assert_eq!(slow.len(), 4);
        drop(slow);
        let again = take(&gate, &hung[0], 99);
        assert_eq!(again.len(), gate.slow_max());
        assert_eq!(take(&gate, &sound, 99).len(), 4);
        // Until something of it ends in time.
        drop(again);
        assert_eq!(take(&gate, &hung[0], 99).len(), 4);
        drop(held);
        assert_eq!(gate.counts(), GateCounts::default());
    }

    #[tokio::test(start_paused = true)]
    async fn slow_tenant_with_all_places_stuck_goes_on_when_one_ends() {
        let gate = Gate::new(4);
        let share = plain_share();
        let mut stuck = take(&gate, &share, 99);
        advance(SLOW_AFTER).await;
        let mut next = pin!(gate.enter(&share));
        assert!(timeout(SHORT, &mut next).await.is_err());
        stuck.truncate(1);
        assert!(timeout(SHORT, &mut next).await.is_err());
        stuck.clear();
        timeout(SHORT, next).await.unwrap();
        assert_eq!(gate.counts(), GateCounts::default());
    }

    #[tokio::test(start_paused = true)]
    async fn who_stops_waiting_leaves_the_line_and_costs_no_place() {
        let gate = Gate::new(1);
        let (a, b) = (plain_share(), plain_share());
        let held = gate.enter(&a).await;
        for _ in 0..100 {
            assert!(timeout(SHORT, gate.enter(&b)).await.is_err());
        }
        assert_eq!(gate.counts().waiting, 0);
        // Given, but never taken.
        let mut left = Box::pin(gate.enter(&b));
        assert!((&mut left).now_or_never().is_none());
        drop(held);
        assert_eq!(gate.counts().held, 1);
        drop(left);
        assert_eq!(gate.counts(), GateCounts::default());
        gate.enter(&a).await;
    }

    #[tokio::test(start_paused = true)]
    async fn medium_slow_tenant_holds_no_more_than_its_share_while_another_waits() {
        let gate = Gate::new(16);
        let shares = [plain_share(), plain_share()];
        let times = [SLOW_AFTER - SHORT, Duration::from_millis(50)];
        let mut done = [0; 2];
        let mut working = FuturesUnordered::new();
        let begin = |n: usize| {
            let (gate, share) = (gate.clone(), Arc::clone(&shares[n]));
            async move {
                let place = gate.enter(&share).await;
                sleep(times[n]).await;
                drop(place);
                n
            }
        };
        (0..32).for_each(|n| working.push(begin(n % 2)));
        let end = Instant::now() + Duration::from_secs(100);
        while Instant::now() < end {
            let n = working.next().await.unwrap();
            done[n] += 1;
            working.push(begin(n));
        }
        // 8 places, 20 a second each, 100 seconds.
        assert!(done[1] > 14_000, "{done:?}");
        assert!(done[0] > 100, "{done:?}");
    }
}
