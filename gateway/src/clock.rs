//! The clock of requests and of their steps: one for all threads.
//!
//! A reactor reads it twice for a request that is alone, so it is the CPU's time stamp counter where that is sound: the
//! kernel's clock costs as much at best, and a system call where the kernel has no vDSO or no good clock source for one.
//!
//! **Invariant:** it goes on as the kernel's does. A counter that does not (it begins anew when a machine wakes from
//! hibernation) is found out by [`check`], in a tick of a reactor, and never read again.

use std::fs;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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

/// How far it may be from the kernel's clock: no timer is as short.
const ERROR_MAX: Duration = Duration::from_millis(50);

/// Of the time since the start this part more: how well the counter's rate is known (one thousandth at the worst).
const ERROR_RATE_MAX: u32 = 1000;

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
}

impl Clock {
    fn new(counter: quanta::Clock, is_counted: bool) -> Self {
        Self {
            first: counter.raw(),
            start: Instant::now(),
            counter,
            is_counted: AtomicBool::new(is_counted),
        }
    }

    fn counted_ns(&self) -> u64 {
        self.counter.delta_as_nanos(self.first, self.counter.raw())
    }

    fn kernel_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn now_ns(&self) -> u64 {
        match self.is_counted.load(Ordering::Relaxed) {
            true => self.counted_ns(),
            false => self.kernel_ns(),
        }
    }

    fn check(&self) {
        if !self.is_counted.load(Ordering::Relaxed) {
            return;
        }
        // It may be long from one to the other: the counter is read between two looks at the kernel's clock.
        let before = Duration::from_nanos(self.kernel_ns());
        let counted = Duration::from_nanos(self.counted_ns());
        let after = Duration::from_nanos(self.kernel_ns());
        let error_max = ERROR_MAX + after / ERROR_RATE_MAX;
        if counted + error_max < before || counted > after + error_max {
            self.is_counted.store(false, Ordering::Relaxed);
            tracing::warn!(?counted, kernel = ?after, "the CPU's time stamp counter does not go as the kernel's clock does: the latter is used from now on");
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
    fn counter_that_stands_still_or_runs_is_left_for_the_kernels_clock() {
        for (jumps_by, is_sound) in [(10_000_000, true), (0, false), (20_000_000_000, false)] {
            let (counter, mock) = quanta::Clock::mock();
            let mut clock = Clock::new(counter, true);
            clock.start -= match is_sound {
                true => Duration::from_millis(10),
                false => Duration::from_secs(10),
            };
            mock.increment(jumps_by);
            clock.check();
            assert_eq!(clock.is_counted.into_inner(), is_sound, "{jumps_by}");
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
