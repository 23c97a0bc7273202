//! The way to the collector: OTLP over HTTP, in batches, by a task of its own.
//!
//! Owns: the queue's other end, the calls and what is done when they fail. Does not own: what is in a trace.
//!
//! **Invariants:**
//! - Nothing waits for the collector but this task; while it waits, traces fill the queue, and those without room are
//!   dropped where they come from.
//! - A batch is tried [`ATTEMPTS_MAX`] times, each within [`ATTEMPT_TIME_MAX`], and then dropped.
//! - What is sent along (the headers' values) is in no log and no error.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message as _;
use quarry_config::Tracing;
use reqwest::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use uuid::Uuid;

use super::headers::{self, HeadersError};
use super::message::{self, text};
use super::{Counts, Finished, Lost, Tracer};
use crate::clock::now_ns;

/// Traces that wait for the collector: some seconds of a store's outage. About 10 KiB each, more where what they waited
/// for was tried again and again.
pub const QUEUED_MAX: usize = 1024;

/// Traces of one call.
const BATCH_MAX: usize = 64;

/// How long a batch is gathered.
const BATCH_TIME: Duration = Duration::from_secs(1);

/// Calls for one batch.
pub const ATTEMPTS_MAX: u32 = 3;

/// How long a call may take: OpenTelemetry's default.
pub const ATTEMPT_TIME_MAX: Duration = Duration::from_secs(10);

/// Between two calls, at first; it doubles, and a collector may ask for more, up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_secs(1);

/// The longest that a collector may have itself waited for.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// The most bytes of an answer: of a sound one some tens.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// How long the daemon's end waits for what is queued. Little: a daemon that takes over waits for that end, and the
/// devices' users for it.
const END_TIME_MAX: Duration = Duration::from_millis(250);

/// What is behind the collector's URL, by OpenTelemetry's convention.
const PATH: &str = "/v1/traces";

/// Why traces cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The headers.
    #[error(transparent)]
    Headers(#[from] HeadersError),
    /// The authorities' certificates.
    #[error("tracing.ca = {}: {reason}; it must hold certificates in PEM", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The HTTP client.
    #[error("the HTTP client for traces cannot start: {0}")]
    Client(#[source] reqwest::Error),
}

/// The task that exports, and what tells it to end.
#[derive(Debug)]
pub struct Exporter {
    ending: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Exporter {
    /// Starts to export as `config` says, if it names a collector; on the runtime at hand.
    ///
    /// # Errors
    /// If a file that it names cannot be used.
    pub fn start(config: &Tracing, host: &str) -> Result<Option<(Arc<Tracer>, Self)>, ExportError> {
        let Some(endpoint) = &config.endpoint else {
            return Ok(None);
        };
        let collector = Collector::new(endpoint, config)?;
        let slow_ns = u64::try_from(config.slow.as_nanos()).unwrap_or(u64::MAX);
        let (tracer, finished) = Tracer::new(slow_ns, config.sample_misses, QUEUED_MAX);
        let (ending, is_ending) = watch::channel(false);
        let work = Work {
            collector,
            resource: resource(config, host),
            finished,
            is_ending,
            counts: Arc::clone(tracer.counts()),
            is_failing: false,
        };
        let task = tokio::spawn(work.run());
        tracing::info!(%endpoint, slow = ?config.slow, "slow requests are traced");
        Ok(Some((tracer, Self { ending, task })))
    }

    /// Whether [`Exporter::start`] could, as far as can be known before.
    ///
    /// # Errors
    /// If a file that `config` names cannot be used.
    pub fn check(config: &Tracing) -> Result<(), ExportError> {
        let collector = config.endpoint.as_ref();
        let collector = collector.map(|endpoint| Collector::new(endpoint, config));
        collector.transpose().map(|_| ())
    }

    /// Sends what is queued, for a moment, and ends.
    pub async fn end(self) {
        self.ending.send_replace(true);
        let Self { mut task, .. } = self;
        if timeout(END_TIME_MAX, &mut task).await.is_err() {
            task.abort();
        }
    }
}

/// What the traces are of: the daemon, and nothing secret.
fn resource(config: &Tracing, host: &str) -> Resource {
    let mut attributes = vec![
        text("service.name", &config.service_name),
        text("service.version", env!("CARGO_PKG_VERSION")),
        text("service.instance.id", Uuid::new_v4().to_string()),
        text("host.name", host),
    ];
    for (name, value) in &config.resource {
        attributes.retain(|attribute| attribute.key != *name);
        attributes.push(text(name, value));
    }
    Resource {
        attributes,
        ..Resource::default()
    }
}

/// Why a call failed.
struct Failure {
    why: String,
    /// When another may succeed; none: never.
    again: Option<Duration>,
}

impl Failure {
    const fn passing(why: String) -> Self {
        let again = Some(Duration::ZERO);
        Self { why, again }
    }

    const fn for_good(why: String) -> Self {
        Self { why, again: None }
    }
}

/// The collector.
struct Collector {
    url: String,
    headers: Option<PathBuf>,
    http: reqwest::Client,
}

impl Collector {
    fn new(endpoint: &str, config: &Tracing) -> Result<Self, ExportError> {
        crate::store::install_crypto();
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("quarry/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .timeout(ATTEMPT_TIME_MAX);
        if let Some(path) = &config.ca {
            http = http.tls_certs_only(authorities(path)?);
        }
        if let Some(path) = &config.headers_file {
            headers::read(path)?;
        }
        let base = endpoint.trim_end_matches('/');
        let path = if base.ends_with(PATH) { "" } else { PATH };
        Ok(Self {
            url: format!("{base}{path}"),
            headers: config.headers_file.clone(),
            http: http.build().map_err(ExportError::Client)?,
        })
    }

    /// One call. Answers how many spans the collector did not take, and its words for why.
    async fn call(&self, body: Bytes) -> Result<(u64, String), Failure> {
        let mut call = self.http.post(&self.url);
        if let Some(path) = self.headers.clone() {
            // Read anew: tokens are changed.
            let read = tokio::task::spawn_blocking(move || headers::read(&path)).await;
            let read = read.map_err(|error| Failure::passing(error.to_string()))?;
            call = call.headers(read.map_err(|error| Failure::passing(error.to_string()))?);
        }
        let protobuf = HeaderValue::from_static("application/x-protobuf");
        let sent = call.header(CONTENT_TYPE, protobuf).body(body).send().await;
        // Without the URL, which is told anyway.
        let lost = |error: reqwest::Error| Failure::passing(told(&error.without_url()));
        let mut answer = sent.map_err(lost)?;
        let status = answer.status();
        if !status.is_success() {
            let why = format!("it answers {status}");
            // Those of the protocol's that pass.
            if !matches!(status.as_u16(), 429 | 502 | 503 | 504) {
                return Err(Failure::for_good(why));
            }
            let seconds = answer.headers().get(RETRY_AFTER);
            let seconds = seconds.and_then(|value| value.to_str().ok()?.trim().parse().ok());
            let again = Duration::from_secs(seconds.unwrap_or(0)).min(PAUSE_MAX);
            let again = Some(again);
            return Err(Failure { why, again });
        }
        let mut body = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(lost)? {
            if body.len() + part.len() > ANSWER_BYTES_MAX {
                let why = format!("it answers more than {ANSWER_BYTES_MAX} bytes");
                return Err(Failure::for_good(why));
            }
            body.extend_from_slice(&part);
        }
        let answer = ExportTraceServiceResponse::decode(&*body)
            .map_err(|_| Failure::for_good("its answer is not OTLP".to_owned()))?;
        let partial = answer.partial_success.unwrap_or_default();
        let rejected = u64::try_from(partial.rejected_spans).unwrap_or(0);
        Ok((rejected, partial.error_message))
    }
}

/// An error and its causes, in a line.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn authorities(path: &PathBuf) -> Result<Vec<reqwest::Certificate>, ExportError> {
    let wrong = |reason: String| ExportError::Authorities {
        path: path.clone(),
        reason,
    };
    let pem = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let all = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| wrong(told(&error)))?;
    if all.is_empty() {
        return Err(wrong("there is no certificate in it".to_owned()));
    }
    Ok(all)
}

/// The task.
struct Work {
    collector: Collector,
    resource: Resource,
    finished: mpsc::Receiver<Finished>,
    is_ending: watch::Receiver<bool>,
    counts: Arc<Counts>,
    /// The last batch was not taken; told once.
    is_failing: bool,
}

impl Work {
    async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        while self.gather(&mut batch).await {
            self.export(std::mem::take(&mut batch)).await;
        }
    }

    /// The next traces; false: the end, with none left.
    async fn gather(&mut self, batch: &mut Vec<Finished>) -> bool {
        let mut is_ending = self.is_ending.clone();
        let first = tokio::select! {
            biased;
            first = self.finished.recv() => first,
            // Gone with its exporter: that is the end too.
            _ = is_ending.wait_for(|ending| *ending) => None,
        };
        let Some(first) = first else {
            return false;
        };
        batch.push(first);
        let due = Instant::now() + BATCH_TIME;
        while batch.len() < BATCH_MAX {
            let next = tokio::select! {
                biased;
                next = timeout_at(due, self.finished.recv()) => next,
                _ = is_ending.wait_for(|ending| *ending) => return true,
            };
            match next {
                Ok(Some(next)) => batch.push(next),
                _ => break,
            }
        }
        true
    }

    async fn export(&mut self, batch: Vec<Finished>) {
        let traces = batch.len() as u64;
        let offset_ns = unix_ns().saturating_sub(now_ns());
        let batch = batch.iter().map(|finished| {
            let trace = message::trace(finished, offset_ns);
            let (whose, took) = (&finished.whose, finished.end_ns - finished.begin_ns);
            tracing::debug!(
                volume = format_args!("{}/{}", whose.tenant, whose.volume),
                request = finished.kind,
                took = ?Duration::from_nanos(took),
                trace_id = %trace.id.simple(),
                "slow request"
            );
            trace
        });
        let message = message::message(&self.resource, batch.collect());
        let body = Bytes::from(message.encode_to_vec());
        drop(message);
        match self.insist(body).await {
            Ok((0, _)) => {
                self.counts.exported.fetch_add(traces, Ordering::Relaxed);
                if std::mem::take(&mut self.is_failing) {
                    tracing::info!("traces are exported again");
                }
            }
            // Whose they are is not said: each may be of another trace.
            Ok((rejected, why)) => {
                let lost = rejected.min(traces);
                let exported = &self.counts.exported;
                exported.fetch_add(traces - lost, Ordering::Relaxed);
                self.lost(lost, &format!("it rejects {rejected} spans: {why}"));
            }
            Err(failure) => self.lost(traces, &failure.why),
        }
    }

    fn lost(&mut self, traces: u64, why: &str) {
        self.counts.dropped(Lost::Collector, traces);
        if !std::mem::replace(&mut self.is_failing, true) {
            let collector = &self.collector.url;
            tracing::warn!(%collector, why, "traces are dropped: the collector does not take them");
        }
    }

    /// Calls until it is taken, or is not going to be.
    async fn insist(&self, body: Bytes) -> Result<(u64, String), Failure> {
        let mut pause = PAUSE;
        for attempt in 1.. {
            let failure = match self.collector.call(body.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            self.counts.failures.fetch_add(1, Ordering::Relaxed);
            let Some(again) = failure.again.filter(|_| attempt < ATTEMPTS_MAX) else {
                return Err(failure);
            };
            sleep(again.max(pause)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        unreachable!("the last attempt has returned")
    }
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Mutex;

    use axum::http::{HeaderMap, StatusCode};
    use opentelemetry_proto::tonic::collector::trace::v1::{
        ExportTracePartialSuccess, ExportTraceServiceRequest,
    };
    use opentelemetry_proto::tonic::common::v1::any_value::Value;

    use super::super::message::tests::finished;
    use super::*;

    type Calls = Arc<Mutex<Vec<(HeaderMap, Bytes)>>>;

    /// A collector that answers with these, and then with the last of them again.
    async fn collector(answers: &[(u16, &[u8])]) -> (SocketAddr, Calls) {
        let calls = Calls::default();
        let (seen, answers) = (Arc::clone(&calls), answers.to_vec());
        let answers: Vec<_> = answers.iter().map(|(s, b)| (*s, b.to_vec())).collect();
        let take = move |headers: HeaderMap, body: Bytes| async move {
            let mut calls = seen.lock().unwrap();
            calls.push((headers, body));
            let (status, body) = answers[calls.len().min(answers.len()) - 1].clone();
            (StatusCode::from_u16(status).unwrap(), body)
        };
        let take = axum::routing::post(take);
        let router = axum::Router::new().route("/v1/traces", take);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        (address, calls)
    }

    fn exporter(address: SocketAddr) -> (Arc<Tracer>, Exporter) {
        let config = Tracing {
            endpoint: Some(format!("http://{address}/")),
            ..Tracing::default()
        };
        Exporter::start(&config, "host-7").unwrap().unwrap()
    }

    /// What was counted when so many traces had been exported or dropped.
    async fn settled(tracer: &Tracer, count: u64) -> TraceStats {
        loop {
            let stats = tracer.stats();
            if stats.exported + stats.dropped.iter().sum::<u64>() >= count {
                return stats;
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    use super::super::TraceStats;

    #[tokio::test]
    async fn traces_reach_the_collector_with_who_they_are_of() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "Authorization: Bearer hunter2\n").unwrap();
        let (address, calls) = collector(&[(200, b"")]).await;
        let config = Tracing {
            endpoint: Some(format!("http://{address}")),
            headers_file: Some(file.path().to_owned()),
            resource: vec![("host.name".to_owned(), "rack-9".to_owned())],
            ..Tracing::default()
        };
        let (tracer, exporter) = Exporter::start(&config, "host-7").unwrap().unwrap();
        (0..3).for_each(|_| tracer.submit(finished()));
        exporter.end().await;
        let stats = tracer.stats();
        assert_eq!(
            (stats.exported, stats.failures, stats.dropped),
            (3, 0, [0; 2])
        );
        let calls = calls.lock().unwrap();
        let (headers, body) = &calls[0];
        assert_eq!(headers["authorization"], "Bearer hunter2");
        assert_eq!(headers["content-type"], "application/x-protobuf");
        let message = ExportTraceServiceRequest::decode(&**body).unwrap();
        let all = &message.resource_spans[0];
        assert_eq!(all.scope_spans[0].spans.len(), 3);
        let attributes = &all.resource.as_ref().unwrap().attributes;
        let of = |name: &str| {
            let mut found = attributes.iter().filter(|a| a.key == name);
            let value = found.next()?.value.clone()?.value?;
            assert!(found.next().is_none(), "{name} is there twice");
            Some(value)
        };
        let words = |text: &str| Some(Value::StringValue(text.to_owned()));
        assert_eq!(of("service.name"), words("quarry"));
        assert_eq!(of("service.version"), words(env!("CARGO_PKG_VERSION")));
        assert_eq!(of("host.name"), words("rack-9"));
    }

    #[tokio::test]
    async fn collector_that_is_busy_is_called_again_and_one_that_refuses_is_not() {
        let (address, calls) = collector(&[(503, b"hunter2"), (200, b"")]).await;
        let (tracer, _exporter) = exporter(address);
        tracer.submit(finished());
        let stats = settled(&tracer, 1).await;
        assert_eq!((stats.exported, stats.failures), (1, 1));
        assert_eq!(calls.lock().unwrap().len(), 2);
        let (address, calls) = collector(&[(401, b"")]).await;
        let (tracer, _exporter) = exporter(address);
        tracer.submit(finished());
        let stats = settled(&tracer, 1).await;
        assert_eq!((stats.exported, stats.failures), (0, 1));
        assert_eq!(stats.dropped[Lost::Collector as usize], 1);
        assert_eq!(calls.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn answers_that_are_wrong_or_partial_are_counted() {
        let partial = ExportTraceServiceResponse {
            partial_success: Some(ExportTracePartialSuccess {
                rejected_spans: 1,
                error_message: "too old".to_owned(),
            }),
        };
        let long = vec![0; ANSWER_BYTES_MAX + 1];
        let partial = partial.encode_to_vec();
        for (answer, exported, dropped) in
            [(&partial[..], 1, 1), (b"<html>", 0, 2), (&long[..], 0, 2)]
        {
            let (address, calls) = collector(&[(200, answer)]).await;
            let (tracer, exporter) = exporter(address);
            (0..2).for_each(|_| tracer.submit(finished()));
            exporter.end().await;
            let stats = tracer.stats();
            assert_eq!(stats.exported, exported);
            assert_eq!(stats.dropped, [0, dropped]);
            assert_eq!(calls.lock().unwrap().len(), 1);
        }
    }

    #[tokio::test]
    async fn collector_that_hangs_fills_the_queue_and_keeps_nobody_waiting() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (tracer, exporter) = exporter(listener.local_addr().unwrap());
        let begun = Instant::now();
        let more = 100;
        for _ in 0..QUEUED_MAX + BATCH_MAX + more {
            tracer.submit(finished());
            // Lets the exporter take its batch.
            tokio::task::yield_now().await;
        }
        let dropped = tracer.stats().dropped;
        let dropped = usize::try_from(dropped[Lost::Queue as usize]).unwrap();
        assert!((more..=more + BATCH_MAX).contains(&dropped), "{dropped}");
        exporter.end().await;
        assert!(begun.elapsed() < END_TIME_MAX + Duration::from_secs(5));
    }

    #[tokio::test]
    async fn files_that_cannot_be_used_are_named_at_the_start() {
        let with = |headers: Option<&str>, ca: Option<&str>| Tracing {
            endpoint: Some("http://127.0.0.1:4318".to_owned()),
            headers_file: headers.map(PathBuf::from),
            ca: ca.map(PathBuf::from),
            ..Tracing::default()
        };
        for config in [
            with(Some("/nowhere/h"), None),
            with(None, Some("/nowhere/ca")),
        ] {
            let error = Exporter::start(&config, "h").unwrap_err().to_string();
            assert!(error.contains("/nowhere/"), "{error}");
        }
        let none = Exporter::start(&Tracing::default(), "h").unwrap();
        assert!(none.is_none());
    }
}
