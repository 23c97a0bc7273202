//! Grafana's units: how a figure is written, and where a scale has its ticks.

use anyhow::{Result, bail};

/// About so many ticks has a scale.
const TICKS: f64 = 4.0;
const KIB: f64 = 1024.0;

/// What a figure is counted in: factors with what is written behind, from the least on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unit(&'static [(f64, &'static str)]);

impl Unit {
    pub(super) fn named(id: &str) -> Result<Self> {
        Ok(Self(match id {
            "short" => &[(1.0, ""), (1e3, " K"), (1e6, " Mil"), (1e9, " Bil")],
            "iops" => &[(1.0, " io/s"), (1e3, "K io/s"), (1e6, "M io/s")],
            "reqps" => &[(1.0, " req/s"), (1e3, "K req/s"), (1e6, "M req/s")],
            "percentunit" => &[(0.01, "%")],
            "Bps" => &[
                (1.0, " B/s"),
                (1e3, " kB/s"),
                (1e6, " MB/s"),
                (1e9, " GB/s"),
            ],
            "bytes" => &[
                (1.0, " B"),
                (KIB, " KiB"),
                (KIB * KIB, " MiB"),
                (KIB * KIB * KIB, " GiB"),
            ],
            "s" => &[
                (1e-6, " µs"),
                (1e-3, " ms"),
                (1.0, " s"),
                (60.0, " min"),
                (3600.0, " hours"),
                (86_400.0, " days"),
            ],
            other => bail!("a figure in {other}"),
        }))
    }

    /// The greatest factor that is no more than the figure; of nothing, the one of the unit itself.
    fn scale(self, figure: f64) -> (f64, &'static str) {
        let figure = if figure == 0.0 { 1.0 } else { figure.abs() };
        let fitting = self.0.iter().rfind(|(factor, _)| *factor <= figure);
        *fitting.unwrap_or(&self.0[0])
    }

    /// As a person reads it: with three digits.
    pub(super) fn written(self, figure: f64) -> String {
        let (factor, behind) = self.scale(figure);
        let number = figure / factor;
        let power = number.abs().max(1e-6).log10().floor();
        let decimals = (0..8_u8).find(|decimals| power + f64::from(*decimals) >= 2.0);
        let digits = trimmed(number, usize::from(decimals.unwrap_or(8)));
        format!("{digits}{behind}")
    }

    /// Round figures from 0 to no less than `most`.
    pub(super) fn ticks(self, most: f64) -> Vec<f64> {
        if most <= 0.0 {
            return vec![0.0, 1.0];
        }
        let (factor, _) = self.scale(most);
        let rough = most / factor / TICKS;
        let round = if self.0.iter().any(|(factor, _)| *factor == KIB) {
            rough.log2().ceil().exp2()
        } else {
            let power = 10_f64.powf(rough.log10().floor());
            let round = [1.0, 2.0, 2.5, 5.0].map(|round| round * power);
            let found = round.into_iter().find(|step| *step >= rough);
            found.unwrap_or(10.0 * power)
        };
        let step = round * factor;
        let count = (most / step - 1e-9).ceil();
        let numbers = (0..).map(f64::from).take_while(|n| *n <= count);
        numbers.map(|n| n * step).collect()
    }
}

/// A number with no more digits than it needs.
pub(super) fn trimmed(number: f64, decimals: usize) -> String {
    let text = format!("{number:.decimals$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    if text == "-0" { "0" } else { text }.to_owned()
}

/// The time of day, of seconds since 1970.
pub(super) fn clock(seconds: u64) -> String {
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}", seconds % 60)
}

/// Round times in a window, a handful at most.
pub(super) fn times(from: u64, to: u64) -> Vec<u64> {
    let steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600];
    let fitting = steps.into_iter().find(|step| (to - from) / step <= 4);
    let step = fitting.unwrap_or(86_400);
    (from.div_ceil(step)..=to / step)
        .map(|n| n * step)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(unit: &str, figure: f64) -> String {
        Unit::named(unit).unwrap().written(figure)
    }

    fn ticks(unit: &str, most: f64) -> Vec<String> {
        let ticks = Unit::named(unit).unwrap().ticks(most);
        ticks.into_iter().map(|tick| written(unit, tick)).collect()
    }

    #[test]
    fn figures_are_written_in_the_unit_that_fits() {
        assert_eq!(written("s", 0.0), "0 s");
        assert_eq!(written("s", 0.000_25), "250 µs");
        assert_eq!(written("s", 90.0), "1.5 min");
        assert_eq!(written("bytes", 1536.0), "1.5 KiB");
        assert_eq!(written("Bps", 12_345_678.0), "12.3 MB/s");
        assert_eq!(written("percentunit", 0.312_6), "31.3%");
        assert_eq!(written("percentunit", 0.0), "0%");
        assert_eq!(written("iops", 1234.0), "1.23K io/s");
        assert_eq!(written("short", 0.002_5), "0.0025");
        assert_eq!(written("short", 1_200_000.0), "1.2 Mil");
    }

    #[test]
    fn ticks_are_round_in_their_unit_and_reach_the_greatest_figure() {
        assert_eq!(ticks("short", 7.0), ["0", "2", "4", "6", "8"]);
        assert_eq!(ticks("short", 8.0), ["0", "2", "4", "6", "8"]);
        assert_eq!(ticks("short", 0.0), ["0", "1"]);
        assert_eq!(ticks("bytes", 3000.0), ["0 B", "1 KiB", "2 KiB", "3 KiB"]);
        assert_eq!(ticks("s", 0.011), ["0 s", "5 ms", "10 ms", "15 ms"]);
        assert_eq!(ticks("s", 130.0), ["0 s", "1 min", "2 min", "3 min"]);
        assert_eq!(ticks("percentunit", 0.6), ["0%", "20%", "40%", "60%"]);
    }

    #[test]
    fn times_are_round_and_few() {
        assert_eq!(times(59, 245), [60, 120, 180, 240]);
        assert_eq!(times(101, 111), [105, 110]);
        assert_eq!(clock(86_400 + 3600 + 62), "01:01:02");
    }
}
