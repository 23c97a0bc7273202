//! How much of something each of many may have at once, so that no one of them has it all.
//!
//! Owns: the counts, of those who have any. Does not own: how much there is for all together.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

/// Who has how many places. Clones are the same places.
#[derive(Clone, Debug)]
pub(crate) struct Places<K>(Counts<K>);

type Counts<K> = Arc<Mutex<HashMap<K, usize>>>;

impl<K> Default for Places<K> {
    fn default() -> Self {
        Self(Counts::default())
    }
}

/// A place; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place<K: Eq + Hash> {
    of: K,
    counts: Counts<K>,
}

impl<K: Eq + Hash + Clone> Places<K> {
    /// One more for `of`; `None` if it has `max` already.
    pub(crate) fn take(&self, of: &K, max: usize) -> Option<Place<K>> {
        let mut counts = self.0.lock();
        let count = counts.entry(of.clone()).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(Place {
            of: of.clone(),
            counts: Arc::clone(&self.0),
        })
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.of);
            }
        }
    }
}

/// Whose an address is: of IPv6 the first half, for who has one address there has 2^64 of them.
pub(crate) fn holder(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(six) => IpAddr::V6((six.to_bits() & (u128::MAX << 64)).into()),
        four @ IpAddr::V4(_) => four,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_each_are_bounded_and_given_back() {
        let places = Places::default();
        let mut taken: Vec<_> = (0..3).map(|_| places.take(&"acme", 3)).collect();
        assert!(taken.iter().all(Option::is_some));
        assert!(places.take(&"acme", 3).is_none());
        assert!(places.take(&"other", 3).is_some());
        taken.pop();
        assert!(places.clone().take(&"acme", 3).is_some());
        drop(taken);
        assert!(places.0.lock().is_empty());
    }

    #[test]
    fn addresses_of_one_network_are_one_holders() {
        let of = |text: &str| holder(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::2:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }
}
