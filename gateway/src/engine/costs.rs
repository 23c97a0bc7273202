//! What requests to stores cost, by the configuration's table of prices.

use super::Daemon;
use crate::control::StoreRequests;
use crate::store::{Operation, Outcome, StoreSnapshot, StoreStats};

/// A provider's unit of requests.
const REQUESTS: f64 = 1000.0;
/// A provider's unit of bytes.
const GIB: f64 = (1u64 << 30) as f64;

impl Daemon {
    /// What an account counted, and what that costs.
    pub(super) fn requests(&self, account: &StoreStats) -> StoreRequests {
        requests(&account.snapshot(), &self.config.prices)
    }
}

/// Every attempt counts: a provider takes money for those that it refuses too. Those that nobody answered may have
/// reached it or not, and count.
fn requests(account: &StoreSnapshot, prices: &quarry_config::Prices) -> StoreRequests {
    let count = |operations: &[Operation]| -> u64 {
        let of = |o: &Operation| {
            Outcome::ALL
                .iter()
                .map(|outcome| account.attempts(*o, *outcome))
                .sum::<u64>()
        };
        operations.iter().map(of).sum()
    };
    let mut requests = StoreRequests {
        puts: count(&[Operation::Create, Operation::Replace]),
        gets: count(&[Operation::Get, Operation::GetRange]),
        lists: count(&[Operation::List]),
        deletes: count(&[Operation::Delete]),
        read_bytes: account.bytes_read,
        written_bytes: account.bytes_written,
        cost: 0.0,
    };
    #[allow(clippy::cast_precision_loss, reason = "money for people")]
    let of = |count: u64, price: f64, unit: f64| count as f64 / unit * price;
    requests.cost = of(requests.puts, prices.put, REQUESTS)
        + of(requests.gets, prices.get, REQUESTS)
        + of(requests.lists, prices.list, REQUESTS)
        + of(requests.deletes, prices.delete, REQUESTS)
        + of(requests.read_bytes, prices.read_gib, GIB)
        + of(requests.written_bytes, prices.written_gib, GIB);
    requests
}

#[cfg(test)]
mod tests {
    use super::*;
    use quarry_config::Prices;

    #[test]
    fn nothing_costs_nothing() {
        let none = requests(&StoreSnapshot::default(), &Prices::default());
        assert_eq!(none, StoreRequests::default());
    }
}
