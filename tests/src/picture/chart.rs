//! Panels that have a course of time: graphs with scales and a legend, and single figures with a curve below.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};

use super::unit::{clock, times, trimmed};
use super::{COLOURS, Line, PAD, Panel, text, width_of};
use crate::prometheus::{Series, Window};

/// Where a plot begins, below the panel's title, and what is between it and the legend: the times.
const TOP: f64 = 34.0;
const TIMES: f64 = 20.0;
/// A legend's row; a mark with the room on both sides of it; and what is between two entries.
const LEGEND_ROW: f64 = 15.0;
const MARK: f64 = 18.0;
const BETWEEN: f64 = 12.0;

/// Where times and figures are, in pixels.
struct Plot {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    window: Window,
    most: f64,
}

impl Plot {
    fn x(&self, time: f64) -> f64 {
        let (from, to) = (self.window.from as f64, self.window.to as f64);
        self.left + (time - from) / (to - from) * (self.right - self.left)
    }

    fn y(&self, figure: f64) -> f64 {
        self.bottom - figure / self.most * (self.bottom - self.top)
    }

    /// A series as a path: broken where samples are missing, a dot where one stands alone.
    fn path(&self, series: &Series) -> String {
        let reach = self.window.step as f64 * 1.5;
        let ys = series.samples.iter().map(|(_, figure)| self.y(*figure));
        let ys: Vec<String> = ys.map(|y| trimmed(y, 1)).collect();
        let is_joined = |n: usize| match (n.checked_sub(1), series.samples.get(n)) {
            (Some(before), Some((time, _))) => time - series.samples[before].0 < reach,
            _ => false,
        };
        let mut path = String::new();
        for (n, (time, _)) in series.samples.iter().enumerate() {
            let y = &ys[n];
            let (joined, goes_on) = (is_joined(n), is_joined(n + 1));
            // What is level needs but its ends.
            if joined && goes_on && ys[n - 1] == *y && ys[n + 1] == *y {
                continue;
            }
            let step = if joined { "L" } else { "M" };
            let dot = if joined || goes_on { "" } else { "h0" };
            path += &format!("{step}{} {y}{dot}", trimmed(self.x(*time), 1));
        }
        path
    }
}

fn most(lines: &[Line]) -> f64 {
    let samples = lines.iter().flat_map(|line| &line.series.samples);
    samples.fold(0.0, |most, (_, figure)| most.max(*figure))
}

/// A graph with its scales and its legend.
pub(super) fn graph(panel: &Panel, window: Window) -> Result<String> {
    let ticks = panel.unit.ticks(most(&panel.lines));
    let labels: Vec<String> = ticks.iter().map(|tick| panel.unit.written(*tick)).collect();
    let widths = labels.iter().map(|label| width_of(label, 10.0));
    let rows = legend_rows(&panel.lines, panel.width - 2.0 * PAD);
    let legend = panel.height - 8.0 - LEGEND_ROW * rows.len() as f64;
    let plot = Plot {
        left: PAD + widths.fold(0.0, f64::max) + 6.0,
        right: panel.width - PAD - 4.0,
        top: TOP,
        bottom: legend - TIMES,
        window,
        most: *ticks.last().context("ticks")?,
    };
    ensure!(plot.bottom > plot.top, "the legend leaves no room");
    let (left, right, top, bottom) = (plot.left, plot.right, plot.top, plot.bottom);
    let mut drawn = String::new();
    let mut grid = String::new();
    for (tick, label) in ticks.iter().zip(labels) {
        let y = plot.y(*tick);
        write!(grid, "M{left:.0} {y:.0}H{right:.0}")?;
        drawn += &text(left - 6.0, y + 3.5, "a e", label);
    }
    for time in times(window.from, window.to) {
        let x = plot.x(time as f64);
        write!(grid, "M{x:.0} {top:.0}V{bottom:.0}")?;
        let clock = clock(time);
        let label = if time % 60 == 0 { &clock[..5] } else { &clock };
        let x = x.min(panel.width - width_of(label, 5.0) - 2.0);
        drawn += &text(x, bottom + 15.0, "a m", label);
    }
    write!(drawn, "<path d=\"{grid}\" class=\"g\"/>")?;
    for (line, colour) in panel.lines.iter().zip((0..COLOURS).cycle()) {
        let path = plot.path(&line.series);
        write!(drawn, "<path d=\"{path}\" class=\"c{colour}\"/>")?;
    }
    let mut colours = (0..COLOURS).cycle();
    for (row, names) in (0_u8..).zip(rows) {
        let mut x = PAD;
        let y = legend + LEGEND_ROW * f64::from(row) + 12.0;
        for (name, colour) in names.into_iter().zip(&mut colours) {
            let (left, middle) = (x + 1.0, y - 4.0);
            write!(
                drawn,
                "<path d=\"M{left:.0} {middle:.0}h11\" class=\"k c{colour}\"/>"
            )?;
            drawn += &text(x + MARK, y, "l", name);
            x += entry_width(name);
        }
    }
    Ok(drawn)
}

fn entry_width(name: &str) -> f64 {
    MARK + width_of(name, 11.0) + BETWEEN
}

/// The names of a legend in rows of a width.
fn legend_rows(lines: &[Line], width: f64) -> Vec<Vec<&str>> {
    let mut rows: Vec<Vec<&str>> = Vec::new();
    let mut x = f64::INFINITY;
    for name in lines.iter().map(|line| line.name.as_str()) {
        let wide = entry_width(name);
        match rows.last_mut() {
            Some(row) if x + wide - BETWEEN <= width => row.push(name),
            _ => {
                rows.push(vec![name]);
                x = 0.0;
            }
        }
        x += wide;
    }
    rows
}

/// The last figure of its one series, and its course.
pub(super) fn stat(panel: &Panel, window: Window) -> Result<String> {
    ensure!(panel.lines.len() < 2, "more than one series");
    let series = &panel.lines.first().context("a series")?.series;
    let ((first, _), (_, last)) = series
        .samples
        .first()
        .zip(series.samples.last())
        .context("a sample")?;
    let plot = Plot {
        left: 1.0,
        right: panel.width - 1.0,
        top: panel.height * 0.68,
        bottom: panel.height - 2.0,
        window,
        most: Some(most(&panel.lines))
            .filter(|most| *most > 0.0)
            .unwrap_or(1.0),
    };
    let path = plot.path(series);
    // Below the curve, over what is missing.
    let over = path.replacen('M', "", 1).replace('M', "L");
    let area = format!("M{over}V{:.0}H{:.0}z", plot.bottom, plot.x(*first));
    let figure = panel.unit.written(*last);
    let figure = text(panel.width / 2.0, panel.height * 0.56, "v m", figure);
    let curve = format!("<path d=\"{area}\" class=\"f\"/><path d=\"{path}\" class=\"c0\"/>");
    Ok(curve + &figure)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn series(samples: &[(f64, f64)]) -> Series {
        let (labels, samples) = (BTreeMap::new(), samples.to_vec());
        Series { labels, samples }
    }

    fn path(samples: &[(f64, f64)]) -> String {
        let (left, right, top, bottom, most) = (0.0, 100.0, 0.0, 50.0, 5.0);
        let (from, to, step) = (0, 100, 10);
        let window = Window { from, to, step };
        let plot = Plot {
            left,
            right,
            top,
            bottom,
            window,
            most,
        };
        plot.path(&series(samples))
    }

    #[test]
    fn path_has_the_ends_of_what_is_level_and_breaks_where_samples_are_missing() {
        assert_eq!(path(&[(0.0, 0.0), (10.0, 5.0)]), "M0 50L10 0");
        let level = [(0.0, 1.0), (10.0, 1.0), (20.0, 1.0), (30.0, 2.0)];
        assert_eq!(path(&level), "M0 40L20 40L30 30");
        let broken = [(0.0, 1.0), (10.0, 1.0), (60.0, 1.0)];
        assert_eq!(path(&broken), "M0 40L10 40M60 40h0");
    }

    #[test]
    fn legend_fills_rows_one_after_the_other() {
        let line = |name: &str| Line {
            name: name.to_owned(),
            series: series(&[]),
        };
        let lines = ["one", "two", "a long third", "four"].map(line);
        assert_eq!(
            legend_rows(&lines, 100.0),
            [vec!["one", "two"], vec!["a long third"], vec!["four"]]
        );
        assert!(legend_rows(&[], 100.0).is_empty());
    }
}
