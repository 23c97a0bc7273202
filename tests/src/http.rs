//! The least HTTP that reads the daemon's unix socket: one GET a connection.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// What a GET was answered with.
#[derive(Clone, Debug)]
pub struct HttpAnswer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// How long the daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// GETs `path` from the HTTP server on the unix socket `socket`.
///
/// # Errors
/// If nothing listens there, or the answer is not HTTP.
pub fn http_get(socket: &Path, path: &str) -> io::Result<HttpAnswer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an HTTP answer"))
}

fn parse(text: &str) -> Option<HttpAnswer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    Some(HttpAnswer {
        status,
        body: body.to_owned(),
    })
}

/// The sum of all samples of the metric `name` whose labels contain `label` (`""`: all), or `None` if
/// there is no such sample.
#[must_use]
pub fn metric_sum(metrics: &str, name: &str, label: &str) -> Option<f64> {
    let samples = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = rest.rsplit_once(' ')?;
        let whole_name = labels.is_empty() || labels.starts_with('{');
        (whole_name && labels.contains(label)).then(|| value.parse::<f64>().ok())?
    });
    samples.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = "# HELP a x\n\
        a_total{op=\"get\",way=\"in\"} 3\na_total{op=\"put\",way=\"out\"} 4.5\na_total_b 9\nplain 7\n";

    #[test]
    fn metric_sum_adds_samples_of_one_name() {
        assert_eq!(metric_sum(METRICS, "a_total", ""), Some(7.5));
        assert_eq!(metric_sum(METRICS, "a_total", "way=\"in\""), Some(3.0));
        assert_eq!(metric_sum(METRICS, "plain", ""), Some(7.0));
        assert_eq!(metric_sum(METRICS, "absent", ""), None);
    }

    #[test]
    fn answer_with_body_is_split() {
        let answer = parse("HTTP/1.0 503 No\r\nA: b\r\n\r\nnot yet").unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (503, "not yet"));
        assert!(parse("garbage").is_none());
    }
}
