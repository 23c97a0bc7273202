//! How many requests a second a reactor completes, averaged over some time.

/// The time over which it is averaged, in milliseconds: longer than a burst, shorter than anybody
/// waits between two attaches that should not go to the same reactor.
const WINDOW_MS: u64 = 10_000;

/// A running average.
#[derive(Debug, Default)]
pub(super) struct Rate {
    requests: u64,
    at_ms: u64,
    /// In thousandths, so that slow ones do not round to nothing.
    milli_per_second: u64,
}

impl Rate {
    /// Takes the count of all requests so far, and answers the requests a second.
    pub(super) fn update(&mut self, requests: u64, now_ms: u64) -> u64 {
        let elapsed = now_ms.saturating_sub(self.at_ms);
        let new = (requests - self.requests).saturating_mul(1_000_000);
        if let Some(current) = new.checked_div(elapsed) {
            let weight = elapsed.min(WINDOW_MS);
            let kept = self.milli_per_second.saturating_mul(WINDOW_MS - weight);
            self.milli_per_second = (kept + current.saturating_mul(weight)) / WINDOW_MS;
            (self.requests, self.at_ms) = (requests, now_ms);
        }
        self.milli_per_second / 1000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_follows_a_steady_load_and_forgets_it() {
        let mut rate = Rate::default();
        let mut now = 0;
        let mut seen = 0;
        for n in 1..=500 {
            now += 100;
            seen = rate.update(n * 10, now);
        }
        assert!((95..=100).contains(&seen), "{seen}");
        for _ in 0..500 {
            now += 100;
            seen = rate.update(5000, now);
        }
        assert_eq!(seen, 0);
    }

    #[test]
    fn rate_after_a_long_time_is_that_of_the_time() {
        let mut rate = Rate::default();
        rate.update(1000, 100);
        assert_eq!(rate.update(1000 + 50 * 60, 60_100), 50);
    }
}
