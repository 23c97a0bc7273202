//! What is being fetched, so that several who want the same at once fetch it once.
//!
//! Owns: who fetches what just now. Does not own: what was fetched, or for how long it is kept.
//!
//! **Invariant:** what is under way has a [`Flight`] that somebody holds. One that is dropped unlanded (its task
//! ended early) leaves nothing behind: those who waited find that out, and look again.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash};

use futures::FutureExt as _;
use futures::future::Shared;
use parking_lot::Mutex;
use quarry_cache::NameHasher;
use quarry_volume::DataError;
use tokio::sync::oneshot;

type Landed<V> = Result<V, DataError>;

/// Waits for another's fetch; an error if that was given up.
pub(super) type Waiting<V> = Shared<oneshot::Receiver<Landed<V>>>;

/// The fetches under way, by what they fetch. As many as the volumes have under way, each of which bounds its own.
pub(super) struct Flights<K, V: Clone>(Mutex<Table<K, V>>);

type Table<K, V> = HashMap<K, Waiting<V>, BuildHasherDefault<NameHasher>>;

/// What came of looking.
pub(super) enum Sought<'a, K: Copy + Eq + Hash, V: Clone> {
    /// It is here.
    Held(V),
    /// Nobody fetches it: the caller does from now on.
    Ours(Flight<'a, K, V>),
    /// Somebody does.
    Theirs(Waiting<V>),
}

/// The duty to fetch something.
pub(super) struct Flight<'a, K: Copy + Eq + Hash, V: Clone> {
    flights: &'a Flights<K, V>,
    key: K,
    /// There until it has landed.
    landing: Option<oneshot::Sender<Landed<V>>>,
}

impl<K, V: Clone> Default for Flights<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Copy + Eq + Hash, V: Clone> Flights<K, V> {
    /// Looks who fetches `key`, and if nobody does, whether `held` has it. Whoever fetched it put it there before
    /// landing, so it is not missed in between.
    pub(super) fn seek(&self, key: K, held: impl FnOnce() -> Option<V>) -> Sought<'_, K, V> {
        let mut table = self.0.lock();
        if let Some(waiting) = table.get(&key) {
            return Sought::Theirs(waiting.clone());
        }
        if let Some(value) = held() {
            return Sought::Held(value);
        }
        let (landing, landed) = oneshot::channel();
        table.insert(key, landed.shared());
        Sought::Ours(Flight {
            flights: self,
            key,
            landing: Some(landing),
        })
    }
}

impl<K: Copy + Eq + Hash, V: Clone> Flight<'_, K, V> {
    /// It is fetched, or cannot be. Those who wait have it too; who comes later looks again.
    pub(super) fn land(mut self, landed: Landed<V>) {
        let landing = self.landing.take().expect("a flight lands once");
        self.flights.0.lock().remove(&self.key);
        // Nobody may wait.
        let _ = landing.send(landed);
    }
}

impl<K: Copy + Eq + Hash, V: Clone> Drop for Flight<'_, K, V> {
    fn drop(&mut self) {
        if self.landing.is_some() {
            self.flights.0.lock().remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> Option<u8> {
        None
    }

    fn ours(sought: Sought<'_, u64, u8>) -> Flight<'_, u64, u8> {
        match sought {
            Sought::Ours(flight) => flight,
            _ => panic!("somebody else has it"),
        }
    }

    fn theirs(sought: Sought<'_, u64, u8>) -> Waiting<u8> {
        match sought {
            Sought::Theirs(waiting) => waiting,
            _ => panic!("nobody else fetches it"),
        }
    }

    #[tokio::test]
    async fn what_lands_reaches_all_who_wait_and_is_sought_anew_after() {
        let flights = Flights::default();
        let flight = ours(flights.seek(1, nothing));
        let waiting = [(); 3].map(|()| theirs(flights.seek(1, || panic!("it is under way"))));
        let other = ours(flights.seek(2, nothing));
        flight.land(Ok(7));
        for waiting in waiting {
            assert_eq!(waiting.await, Ok(Ok(7)));
        }
        assert!(matches!(flights.seek(1, || Some(7)), Sought::Held(7)));
        drop(ours(flights.seek(1, nothing)));
        drop(other);
        assert!(flights.0.lock().is_empty());
    }

    #[tokio::test]
    async fn damage_is_told_to_all_who_wait() {
        let flights = Flights::default();
        let flight = ours(flights.seek(1, nothing));
        let waiting = theirs(flights.seek(1, nothing));
        let error = DataError {
            object: "v/1/chunk/2".to_owned(),
            reason: "it is gone".to_owned(),
        };
        flight.land(Err(error.clone()));
        assert_eq!(waiting.await, Ok(Err(error)));
        assert!(flights.0.lock().is_empty());
    }

    #[tokio::test]
    async fn flight_given_up_is_the_next_ones_who_looks() {
        let flights = Flights::default();
        let flight = ours(flights.seek(1, nothing));
        let waiting = theirs(flights.seek(1, nothing));
        drop(flight);
        assert!(waiting.await.is_err());
        ours(flights.seek(1, nothing)).land(Ok(1));
        assert!(flights.0.lock().is_empty());
    }
}
