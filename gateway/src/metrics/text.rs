//! Prometheus' text format, version 0.0.4.

use std::fmt::Write as _;

/// The lines of one metric.
pub(super) struct Family<'a> {
    name: &'static str,
    labels: &'static [&'static str],
    out: &'a mut String,
    /// Where it begins, and where its first sample does.
    begin: usize,
    samples: usize,
}

impl<'a> Family<'a> {
    pub(super) fn begin(
        name: &'static str,
        help: &str,
        kind: &str,
        labels: &'static [&'static str],
        out: &'a mut String,
    ) -> Self {
        let begin = out.len();
        out.extend([
            "# HELP ",
            name,
            " ",
            help,
            "\n# TYPE ",
            name,
            " ",
            kind,
            "\n",
        ]);
        Self {
            name,
            labels,
            begin,
            samples: out.len(),
            out,
        }
    }

    /// A metric without samples is left out.
    pub(super) fn end(&mut self) {
        if self.out.len() == self.samples {
            self.out.truncate(self.begin);
        }
    }

    /// One sample; `values` are its labels', in the metric's order.
    pub(super) fn sample(&mut self, values: &[&str], value: f64) {
        self.line("", values, None, value);
    }

    /// One histogram: how many were no larger than each bound, how many there were, and their sum.
    pub(super) fn histogram(
        &mut self,
        values: &[&str],
        bounds: &[String],
        below: &[u64],
        count: u64,
        sum: f64,
    ) {
        let count = super::definition::count(count);
        for (bound, below) in bounds.iter().zip(below) {
            let below = super::definition::count(*below);
            self.line("_bucket", values, Some(bound), below);
        }
        self.line("_bucket", values, Some("+Inf"), count);
        self.line("_sum", values, None, sum);
        self.line("_count", values, None, count);
    }

    fn line(&mut self, suffix: &str, values: &[&str], le: Option<&str>, value: f64) {
        let out = &mut *self.out;
        out.push_str(self.name);
        out.push_str(suffix);
        let mut between = '{';
        let labels = self.labels.iter().zip(values);
        for (label, value) in labels.chain(le.iter().map(|le| (&"le", le))) {
            out.push(between);
            out.push_str(label);
            out.push_str("=\"");
            escape(value, out);
            out.push('"');
            between = ',';
        }
        if between == ',' {
            out.push('}');
        }
        out.push(' ');
        number(value, out);
        out.push('\n');
    }
}

fn escape(value: &str, out: &mut String) {
    if !value.contains(['\\', '"', '\n']) {
        return out.push_str(value);
    }
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
}

/// Whole numbers are written several times faster as such.
fn number(value: f64, out: &mut String) {
    const EXACT_MAX: f64 = (1_u64 << 53) as f64;
    let written = if value.fract() == 0.0 && (0.0..EXACT_MAX).contains(&value) {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "whole, and in the range"
        )]
        let whole = value as u64;
        write!(out, "{whole}")
    } else {
        write!(out, "{value}")
    };
    written.expect("a string takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn family_without_samples_leaves_nothing() {
        let mut out = "before\n".to_owned();
        Family::begin("x", "X.", "gauge", &[], &mut out).end();
        assert_eq!(out, "before\n");
    }

    #[test]
    fn labels_are_escaped_and_numbers_exact() {
        let mut out = String::new();
        let mut family = Family::begin("x", "X.", "gauge", &["a", "b"], &mut out);
        family.sample(&["q\"\\\n", "ok"], 0.25);
        family.sample(&["1", "2"], 9_007_199_254_740_991.0);
        family.end();
        let lines: Vec<_> = out.lines().collect();
        let expected = [
            "# HELP x X.",
            "# TYPE x gauge",
            r#"x{a="q\"\\\n",b="ok"} 0.25"#,
            r#"x{a="1",b="2"} 9007199254740991"#,
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn histogram_is_cumulative_and_ends_with_all() {
        let mut out = String::new();
        let mut family = Family::begin("x", "X.", "histogram", &["a"], &mut out);
        let bounds = ["0.5".to_owned(), "1".to_owned()];
        family.histogram(&["v"], &bounds, &[2, 3], 4, 1.75);
        let lines: Vec<_> = out.lines().skip(2).collect();
        let expected = [
            r#"x_bucket{a="v",le="0.5"} 2"#,
            r#"x_bucket{a="v",le="1"} 3"#,
            r#"x_bucket{a="v",le="+Inf"} 4"#,
            r#"x_sum{a="v"} 1.75"#,
            r#"x_count{a="v"} 4"#,
        ];
        assert_eq!(lines, expected);
    }
}
