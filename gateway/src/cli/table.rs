//! Aligned columns, and numbers for people. A cell may hold what somebody else wrote: it is shown as [`printable`] has it.

use std::time::{Duration, UNIX_EPOCH};

use quarry_config::Size;
use quarry_objfmt::printable;

/// Space between two columns.
const GAP: &str = "  ";

/// Rows under a header, each column as wide as its widest cell; nothing after a row's last cell.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|&cell| cell.to_owned()).collect();
    let lines = || std::iter::once(&header).chain(rows);
    let width = |column: usize| {
        lines()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..header.len())
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in lines() {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{:width$}", printable(cell)))
            .collect();
        text.push_str(cells.join(GAP).trim_end());
        text.push('\n');
    }
    text
}

/// Names and values under each other; values that are not there are left out.
pub(super) fn fields(fields: &[(&str, Option<String>)]) -> String {
    let there = || {
        fields
            .iter()
            .filter_map(|(name, value)| Some((name, value.as_ref()?)))
    };
    let width = there().map(|(name, _)| name.len()).max().unwrap_or(0);
    there()
        .map(|(name, value)| format!("{name:width$}{GAP}{}\n", printable(value)))
        .collect()
}

/// A count of bytes.
pub(super) fn bytes(count: u64) -> String {
    Size::new(count).human()
}

/// A span of time, to a tenth of a second or, from a minute on, to the second.
pub(super) fn span_ms(ms: u64) -> String {
    let step = if ms < 60_000 { 100 } else { 1000 };
    humantime::format_duration(Duration::from_millis(ms / step * step)).to_string()
}

/// A point of time; none for 0.
pub(super) fn time_ms(ms: u64) -> Option<String> {
    let time = UNIX_EPOCH
        .checked_add(Duration::from_millis(ms))
        .filter(|_| ms != 0)?;
    // Beyond the year 9999 the formatter fails, and so would `to_string`.
    (ms < 253_402_300_800_000).then(|| humantime::format_rfc3339_seconds(time).to_string())
}

/// A share in per cent.
pub(super) fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_of_uneven_cells_is_aligned() {
        let rows = [
            vec!["acme/db".to_owned(), "1GiB".to_owned()],
            vec!["a/b".to_owned(), String::new()],
        ];
        assert_eq!(
            table(&["VOLUME", "SIZE"], &rows),
            "VOLUME   SIZE\nacme/db  1GiB\na/b\n"
        );
    }

    #[test]
    fn words_of_others_begin_no_line_and_do_nothing_to_the_terminal() {
        let word = || "attached on b\n\x1b[2Jc".to_owned();
        assert_eq!(
            table(&["STATE", "SIZE"], &[vec![word(), "1GiB".to_owned()]]),
            "STATE                SIZE\nattached on b  [2Jc  1GiB\n"
        );
        assert_eq!(
            fields(&[("state", Some(word()))]),
            "state  attached on b  [2Jc\n"
        );
    }

    #[test]
    fn fields_without_a_value_are_left_out() {
        assert_eq!(
            fields(&[
                ("a", Some("1".to_owned())),
                ("longer", None),
                ("bc", Some("2".to_owned()))
            ]),
            "a   1\nbc  2\n"
        );
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(span_ms(1578), "1s 500ms");
        assert_eq!(span_ms(61_999), "1m 1s");
        assert_eq!(span_ms(0), "0s");
        assert_eq!(time_ms(0), None);
        assert_eq!(time_ms(u64::MAX), None);
        assert_eq!(time_ms(1000).unwrap(), "1970-01-01T00:00:01Z");
        assert_eq!(percent(0.756), "75.6%");
    }
}
