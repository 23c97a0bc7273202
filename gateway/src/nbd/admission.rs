//! Who may have a connection: places of those that serve somebody, and of handshakes.
//!
//! Anybody who reaches a socket can begin a handshake and say no more. So handshakes have places of their own, and a newcomer always
//! gets one: when all are taken, the oldest of whoever has the most gives way. Who goes on with its one is not shut out by who has
//! hundreds. A connection's place is given to who has named a volume that it may have.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::negotiate::NegotiationError;
use crate::places::{self, Places, holder};

/// Longest time from a connection to the end of its handshake.
pub(super) const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);

/// Most handshakes at once.
pub(super) const HANDSHAKES_MAX: usize = 512;

/// Of these, an address's, or the unix socket's: a host whose volumes all come back at once has as many.
pub(super) const ADDRESS_HANDSHAKES_MAX: usize = 256;

/// Most connections past their handshake at once.
pub(super) const CONNECTIONS_MAX: usize = 1024;

/// Of these, a tenant's: never all.
pub(super) const TENANT_CONNECTIONS_MAX: usize = 512;

/// What is counted of NBD's clients.
#[derive(Debug, Default)]
pub struct Clients {
    connections: AtomicU64,
    refused: [AtomicU64; Refused::ALL.len()],
}

/// Why a client was sent away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// Its handshake took too long.
    Slow,
    /// Its handshake gave way to a newer one.
    GaveWay,
    /// There are too many connections.
    Connections,
    /// Its tenant has too many connections.
    Tenant,
}

impl Refused {
    /// All of them, in the order in which they are counted.
    pub const ALL: [Self; 4] = [Self::Slow, Self::GaveWay, Self::Connections, Self::Tenant];

    /// Its name, as metrics have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Slow => "slow",
            Self::GaveWay => "gave_way",
            Self::Connections => "connections",
            Self::Tenant => "tenant",
        }
    }
}

/// As [`Clients`], at one time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ClientStats {
    /// Connections past their handshake.
    pub connections: u64,
    /// Clients that were sent away, by [`Refused::ALL`].
    pub refused: [u64; Refused::ALL.len()],
}

impl Clients {
    /// What was counted up to now.
    pub fn stats(&self) -> ClientStats {
        ClientStats {
            connections: self.connections.load(Ordering::Relaxed),
            refused: std::array::from_fn(|n| self.refused[n].load(Ordering::Relaxed)),
        }
    }

    fn refuse(&self, why: Refused) {
        self.refused[why as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// The places. Clones are the same ones.
#[derive(Clone)]
pub(super) struct Admission {
    connections: Arc<Semaphore>,
    of_tenants: Places<u32>,
    handshakes: Arc<Mutex<Handshakes>>,
    clients: Arc<Clients>,
}

/// A connection's place among those that there may be, and among its tenant's.
pub(super) struct Place {
    _of_all: OwnedSemaphorePermit,
    _of_tenant: places::Place<u32>,
    clients: Arc<Clients>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admission {
    pub(super) fn new(clients: Arc<Clients>) -> Self {
        Self {
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            of_tenants: Places::default(),
            handshakes: Arc::default(),
            clients,
        }
    }

    /// A place for a handshake with this address, or on the unix socket, until it has ended.
    pub(super) fn handshake(&self, from: Option<IpAddr>) -> Handshake {
        let from = from.map(holder);
        let (give_way, told) = oneshot::channel();
        let mut all = self.handshakes.lock();
        all.make_room(from);
        let number = all.next;
        all.next += 1;
        all.count += 1;
        all.of.entry(from).or_default().insert(number, give_way);
        Handshake {
            from,
            number,
            told,
            admission: self.clone(),
        }
    }

    /// The place of a connection that is a tenant's from now on, if there is one, and that may have one more.
    pub(super) fn connection(&self, group: u32) -> Option<Arc<Place>> {
        let Ok(of_all) = Arc::clone(&self.connections).try_acquire_owned() else {
            self.clients.refuse(Refused::Connections);
            let max = CONNECTIONS_MAX;
            tracing::warn!(max, "an NBD connection was refused: there are too many");
            return None;
        };
        let max = TENANT_CONNECTIONS_MAX;
        let Some(of_tenant) = self.of_tenants.take(&group, max) else {
            self.clients.refuse(Refused::Tenant);
            tracing::warn!(
                max,
                "an NBD connection was refused: its tenant has too many"
            );
            return None;
        };
        self.clients.connections.fetch_add(1, Ordering::Relaxed);
        Some(Arc::new(Place {
            _of_all: of_all,
            _of_tenant: of_tenant,
            clients: Arc::clone(&self.clients),
        }))
    }
}

/// The handshakes under way.
#[derive(Default)]
struct Handshakes {
    /// By whose they are and in the order in which they began.
    of: HashMap<Option<IpAddr>, BTreeMap<u64, oneshot::Sender<()>>>,
    count: usize,
    next: u64,
}

impl Handshakes {
    /// Has one give way, if there is no room for one more of `from`.
    fn make_room(&mut self, from: Option<IpAddr>) {
        let of = self.of.get(&from).map_or(0, BTreeMap::len);
        let who = if of >= ADDRESS_HANDSHAKES_MAX {
            Some(from)
        } else if self.count >= HANDSHAKES_MAX {
            let most = self.of.iter().max_by_key(|(_, of)| of.len());
            most.map(|(who, _)| *who)
        } else {
            None
        };
        let oldest = who.and_then(|who| Some((who, *self.of.get(&who)?.first_key_value()?.0)));
        if let Some((who, number)) = oldest
            && let Some(told) = self.remove(who, number)
        {
            // It may end by itself just now.
            let _ = told.send(());
        }
    }

    fn remove(&mut self, from: Option<IpAddr>, number: u64) -> Option<oneshot::Sender<()>> {
        let of = self.of.get_mut(&from)?;
        let removed = of.remove(&number)?;
        if of.is_empty() {
            self.of.remove(&from);
        }
        self.count -= 1;
        Some(removed)
    }
}

/// A handshake's place.
pub(super) struct Handshake {
    from: Option<IpAddr>,
    number: u64,
    told: oneshot::Receiver<()>,
    admission: Admission,
}

impl Handshake {
    /// What `handshake` leads to; `None` if to nothing, if it takes too long, or gives way.
    pub(super) async fn carry_out<T>(
        mut self,
        handshake: impl Future<Output = Result<Option<T>, NegotiationError>>,
    ) -> Option<T> {
        let refuse = |why, said| {
            self.admission.clients.refuse(why);
            tracing::debug!("an NBD handshake {said}");
            None
        };
        tokio::select! {
            done = tokio::time::timeout(HANDSHAKE_TIME_MAX, handshake) => match done {
                Ok(Ok(led_to)) => led_to,
                Ok(Err(error)) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::debug!(error, "an NBD handshake failed");
                    None
                }
                Err(_) => refuse(Refused::Slow, "took too long"),
            },
            _ = &mut self.told => refuse(Refused::GaveWay, "gave way to a newer one"),
        }
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.admission
            .handshakes
            .lock()
            .remove(self.from, self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission() -> Admission {
        Admission::new(Arc::default())
    }

    fn address(n: u8) -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, 2, n]))
    }

    fn has_given_way(handshake: &mut Handshake) -> bool {
        handshake.told.try_recv().is_ok()
    }

    #[test]
    fn newcomer_always_gets_in_and_whoever_has_the_most_gives_way() {
        let admission = admission();
        let mut honest = admission.handshake(address(9));
        // Two who are silent, and one of them has more.
        let whose = |n| if n % 5 < 2 { 1 } else { 2 };
        let mut silent: Vec<_> = (0..ADDRESS_HANDSHAKES_MAX * 5 / 3)
            .map(|n| admission.handshake(address(whose(n))))
            .collect();
        let rest = HANDSHAKES_MAX - 1 - silent.len();
        let rest = u8::try_from(rest).unwrap();
        let mut few: Vec<_> = (0..rest)
            .map(|n| admission.handshake(address(10 + n)))
            .collect();
        let mut newcomer = admission.handshake(address(8));
        let gone: Vec<usize> = (0..silent.len())
            .filter(|&n| has_given_way(&mut silent[n]))
            .collect();
        assert_eq!(gone, [2], "the oldest of who has the most");
        assert!(!few.iter_mut().any(has_given_way));
        assert!(!has_given_way(&mut honest) && !has_given_way(&mut newcomer));
    }

    #[test]
    fn address_with_too_many_has_its_own_give_way() {
        let admission = admission();
        let mut others = admission.handshake(None);
        let mut own: Vec<_> = (0..=ADDRESS_HANDSHAKES_MAX)
            .map(|_| admission.handshake(address(1)))
            .collect();
        assert!(has_given_way(&mut own[0]));
        assert!(!has_given_way(&mut own[1]) && !has_given_way(&mut others));
        // What has given way takes nobody's place when it is gone.
        own.remove(0);
        assert_eq!(
            admission.handshakes.lock().count,
            1 + ADDRESS_HANDSHAKES_MAX
        );
        drop((own, others));
        let all = admission.handshakes.lock();
        assert!(all.count == 0 && all.of.is_empty());
    }

    #[tokio::test]
    async fn handshake_that_gives_way_ends_and_is_counted() {
        let admission = admission();
        let first = admission.handshake(address(1));
        let silent = tokio::spawn(
            first.carry_out(std::future::pending::<Result<Option<()>, NegotiationError>>()),
        );
        let _others: Vec<_> = (0..ADDRESS_HANDSHAKES_MAX)
            .map(|_| admission.handshake(address(1)))
            .collect();
        assert_eq!(silent.await.unwrap(), None);
        assert_eq!(admission.clients.stats().refused, [0, 1, 0, 0]);
    }

    #[test]
    fn connections_of_a_tenant_and_of_all_are_bounded_and_counted() {
        let admission = admission();
        let places = |group| {
            let places = (0..CONNECTIONS_MAX).map_while(|_| admission.connection(group));
            places.collect::<Vec<_>>()
        };
        let first = places(1);
        assert_eq!(first.len(), TENANT_CONNECTIONS_MAX);
        let second = places(2);
        assert_eq!(second.len(), CONNECTIONS_MAX - TENANT_CONNECTIONS_MAX);
        assert!(admission.connection(3).is_none());
        let stats = admission.clients.stats();
        assert_eq!(stats.connections, CONNECTIONS_MAX as u64);
        assert_eq!(stats.refused, [0, 0, 2, 1]);
        drop((first, second));
        assert_eq!(admission.clients.stats().connections, 0);
    }
}
