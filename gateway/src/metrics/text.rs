//! The values of one metric, and their text in Prometheus' format.

use prometheus::TextEncoder;
use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};

/// One metric. Its values are turned into text, and dropped, before those of the next are gathered.
pub(super) struct Family<'a> {
    labels: &'static [&'static str],
    family: MetricFamily,
    out: &'a mut String,
}

impl<'a> Family<'a> {
    pub(super) fn begin(
        name: &'static str,
        help: &str,
        kind: MetricType,
        labels: &'static [&'static str],
        out: &'a mut String,
    ) -> Self {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        Self {
            labels,
            family,
            out,
        }
    }

    /// Appends its text; a metric without values is left out.
    pub(super) fn end(self) {
        if self.family.get_metric().is_empty() {
            return;
        }
        if let Err(error) = TextEncoder::new().encode_utf8(&[self.family], self.out) {
            tracing::error!(%error, "a metric cannot be written");
        }
    }

    /// One value; `values` are its labels', in the metric's order.
    pub(super) fn sample(&mut self, values: &[&str], value: f64) {
        let mut metric = self.metric(values);
        if self.family.get_field_type() == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        self.family.mut_metric().push(metric);
    }

    /// One histogram: how many were no larger than each bound, how many there were, and their sum.
    pub(super) fn histogram(
        &mut self,
        values: &[&str],
        bounds: &[f64],
        below: &[u64],
        count: u64,
        sum: f64,
    ) {
        let buckets = bounds.iter().zip(below).map(|(bound, below)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound);
            bucket.set_cumulative_count(*below);
            bucket
        });
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(count);
        histogram.set_sample_sum(sum);
        let mut metric = self.metric(values);
        metric.set_histogram(histogram);
        self.family.mut_metric().push(metric);
    }

    fn metric(&self, values: &[&str]) -> Metric {
        let labels = self.labels.iter().zip(values).map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        });
        Metric::from_label(labels.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn family_without_samples_leaves_nothing() {
        let mut out = "before\n".to_owned();
        Family::begin("x", "X.", MetricType::GAUGE, &[], &mut out).end();
        assert_eq!(out, "before\n");
    }

    #[test]
    fn labels_are_escaped_and_numbers_exact() {
        let mut out = String::new();
        let mut family = Family::begin("x", "X.", MetricType::GAUGE, &["a", "b"], &mut out);
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
        let mut family = Family::begin("x", "X.", MetricType::HISTOGRAM, &["a"], &mut out);
        let bounds = [0.5, 1.0];
        family.histogram(&["v"], &bounds, &[2, 3], 4, 1.75);
        family.end();
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
