//! The clock of requests and of their steps: one for all threads.
//!
//! A reactor reads it twice for a request that is alone, so it is the CPU's time stamp counter where that is sound: the
//! kernel's clock costs as much at best, and a system call where the kernel has no vDSO or no good clock source for one.
//!
//! **Invariant:** it goes on as the kernel's does, and never back. A counter that does not (it begins anew when a machine wakes
//! from hibernation, and counts the time of a sleep that the kernel's clock leaves out) is found out by [`check`], in a tick
//! of a reactor, and never read again: from there on time goes as the kernel's does.

use std::fs;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// What the kernel lists its clock sources in.
const CLOCK_SOURCES: &str = "/sys/devices/system/clocksource/clocksource0/available_clocksource";

/// Clock sources of x86 machines beside the counter (`tsc`): a kernel that lists them and not it has found it unsound.
const OTHER_SOURCES: [&str; 5] = [
    "hpet",
    "acpi_pm",
    "kvm-clock",
    "xen",
    "hyperv_clocksource_tsc_page",
];

/// How far both may have gone apart since they were compared last.
const ERROR_MAX: Duration = Duration::from_millis(50);

/// Of the time since then this part more: how well the counter's rate is known (one thousandth at the worst).
const ERROR_RATE_MAX: u32 = 1000;

/// They are compared from here on for so long: a wrong rate shows in it, and a small error does not add up.
const COMPARED_FOR: Duration = Duration::from_secs(10);

static CLOCK: LazyLock<Clock> = LazyLock::new(|| {
    let sources = fs::read_to_string(CLOCK_SOURCES).unwrap_or_default();
    Clock::new(quanta::Clock::new(), !has_withdrawn_the_counter(&sources))
});

struct Clock {
    counter: quanta::Clock,
    /// What it showed at the start.
    first: u64,
    start: Instant,
    is_counted: AtomicBool,
    /// How far the counter was before the kernel's clock when it was given up.
    ahead_ns: AtomicU64,
    compared: Mutex<Compared>,
}

/// What both showed at one time: the counter was read between two looks at the kernel's clock.
#[derive(Clone, Copy, Default)]
struct Compared {
    before: Duration,
    counted: Duration,
    after: Duration,
}

impl Compared {
    /// Whether both went alike from here to `now`.
    fn agrees_with(&self, now: &Self) -> bool {
        let counted = now.counted.saturating_sub(self.counted);
        let at_least = now.before.saturating_sub(self.after);
        let at_most = now.after.saturating_sub(self.before);
        let error_max = ERROR_MAX + at_most / ERROR_RATE_MAX;
        counted + error_max >= at_least && counted <= at_most + error_max
    }
}

impl Clock {
    fn new(counter: quanta::Clock, is_counted: bool) -> Self {
        Self {
            first: counter.raw(),
            start: Instant::now(),
            counter,
            is_counted: AtomicBool::new(is_counted),
            ahead_ns: AtomicU64::new(0),
            compared: Mutex::default(),
        }
    }

    fn counted_ns(&self) -> u64 {
        self.counter.delta_as_nanos(self.first, self.counter.raw())
    }

    fn kernel_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn now_ns(&self) -> u64 {
        match self.is_counted.load(Ordering::Acquire) {
            true => self.counted_ns(),
            false => self.kernel_ns() + self.ahead_ns.load(Ordering::Relaxed),
        }
    }

    fn check(&self) {
        // Another thread compares them in this moment.
        let Some(mut compared) = self.compared.try_lock() else {
            return;
        };
        if !self.is_counted.load(Ordering::Acquire) {
            return;
        }
        let now = Compared {
            before: Duration::from_nanos(self.kernel_ns()),
            counted: Duration::from_nanos(self.counted_ns()),
            after: Duration::from_nanos(self.kernel_ns()),
        };
        if !compared.agrees_with(&now) {
            let ahead = now.counted.saturating_sub(now.after);
            let ahead_ns = u64::try_from(ahead.as_nanos()).unwrap_or(u64::MAX);
            self.ahead_ns.store(ahead_ns, Ordering::Relaxed);
            self.is_counted.store(false, Ordering::Release);
            tracing::warn!(counter = ?now.counted, kernel = ?now.after, "the CPU's time stamp counter does not go as the kernel's clock does: the latter is used from now on");
        } else if now.before.saturating_sub(compared.after) >= COMPARED_FOR {
            *compared = now;
        }
    }
}

/// Nanoseconds since the process first asked.
pub(crate) fn now_ns() -> u64 {
    CLOCK.now_ns()
}

/// Compares it with the kernel's clock: to be called now and then.
pub(crate) fn check() {
    CLOCK.check();
}

fn has_withdrawn_the_counter(sources: &str) -> bool {
    let lists = |name: &str| sources.split_whitespace().any(|source| source == name);
    !lists("tsc") && OTHER_SOURCES.into_iter().any(lists)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_goes_as_the_kernels_does() {
        let (begun, begun_ns) = (Instant::now(), now_ns());
        std::thread::sleep(Duration::from_millis(100));
        let within = Duration::from_nanos(now_ns() - begun_ns);
        let around = begun.elapsed();
        assert!(within >= Duration::from_millis(100), "{within:?}");
        // A thousandth of 100 ms, and as much for what lies between the looks.
        assert!(
            within <= around + Duration::from_micros(200),
            "{within:?} of {around:?}"
        );
    }

    #[test]
    fn counter_that_stands_still_or_runs_is_left_for_the_kernels_clock_without_a_step_back() {
        const SECOND: u64 = 1_000_000_000;
        // The last is right but for a rate within what is allowed, since a long time.
        for (counted_s, kernel_s, is_sound) in [
            (10, 10, true),
            (0, 10, false),
            (3610, 10, false),
            (12, 10, false),
            (100_050, 100_000, true),
        ] {
            let (counter, mock) = quanta::Clock::mock();
            let mut clock = Clock::new(counter, true);
            clock.start -= Duration::from_secs(kernel_s);
            mock.increment(counted_s * SECOND);
            let before = clock.now_ns();
            clock.check();
            assert_eq!(
                clock.is_counted.load(Ordering::Relaxed),
                is_sound,
                "{counted_s}"
            );
            assert!(clock.now_ns() >= before);
            assert!(clock.now_ns() >= kernel_s * SECOND);
            if is_sound {
                // Compared from here on: what was within the limit of that time is not of this.
                clock.start -= Duration::from_secs(10);
                mock.increment(11 * SECOND);
                clock.check();
                assert!(!clock.is_counted.load(Ordering::Relaxed), "{counted_s}");
            }
        }
        let mut clock = Clock::new(quanta::Clock::mock().0, false);
        clock.start -= Duration::from_secs(10);
        assert!(clock.now_ns() >= 10_000_000_000);
    }

    #[test]
    fn counter_that_an_x86_kernel_does_not_list_is_withdrawn() {
        for (sources, is_withdrawn) in [
            ("tsc hpet acpi_pm \n", false),
            ("kvm-clock tsc acpi_pm", false),
            ("hpet acpi_pm", true),
            ("kvm-clock", true),
            // Not an x86 kernel's, whatever the CPU is: quanta knows that.
            ("arch_sys_counter", false),
            ("", false),
        ] {
            assert_eq!(
                has_withdrawn_the_counter(sources),
                is_withdrawn,
                "{sources}"
            );
        }
    }
}
