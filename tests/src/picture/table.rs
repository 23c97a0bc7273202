//! A panel that is a table: a column for each label, a row for each series.

use std::collections::BTreeSet;

use super::{PAD, Panel, text, width_of};

/// Labels that say nothing of one daemon's series.
const UNSAID: [&str; 2] = ["__name__", "job"];
const SIZE: f64 = 11.0;
const BETWEEN: f64 = 10.0;

pub(super) fn table(panel: &Panel) -> String {
    let rows = panel.lines.iter().map(|line| &line.series.labels);
    let labels = rows.clone().flat_map(|row| row.keys().map(String::as_str));
    let labels: BTreeSet<&str> = labels.filter(|label| !UNSAID.contains(label)).collect();
    let mut columns = Vec::new();
    for label in labels {
        let mut cells = vec![label];
        cells.extend(
            rows.clone()
                .map(|row| row.get(label).map_or("", String::as_str)),
        );
        let widths = cells.iter().map(|cell| width_of(cell, SIZE));
        columns.push((widths.fold(0.0, f64::max), cells));
    }
    let room = panel.width - 2.0 * PAD + BETWEEN;
    let taken = |most: f64| {
        let widths = columns.iter().map(|(width, _)| width.min(most) + BETWEEN);
        widths.sum::<f64>()
    };
    // Where there is no room for all, the widest are cut.
    let mut most = room;
    while most > 0.0 && taken(most) > room {
        most -= 1.0;
    }
    let mut drawn = format!("<path d=\"M{PAD} 50H{}\" class=\"g\"/>", panel.width - PAD);
    let mut x = PAD;
    for (width, cells) in columns {
        for (row, cell) in (0_u8..).zip(cells) {
            let class = if row == 0 { "l w" } else { "l" };
            drawn += &text(x, 43.0 + 24.0 * f64::from(row), class, cut(cell, most));
        }
        x += width.min(most) + BETWEEN;
    }
    drawn
}

/// Words, or as much of their beginning as there is room for.
fn cut(words: &str, room: f64) -> String {
    let mut cut = words.to_owned();
    let mut end = "";
    while !cut.is_empty() && width_of(&cut, SIZE) + width_of(end, SIZE) > room {
        cut.pop();
        end = "…";
    }
    cut + end
}
