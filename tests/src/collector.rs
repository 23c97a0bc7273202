//! An OpenTelemetry collector: takes traces by OTLP over HTTP, as protobuf, and keeps them for the test to look at.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use prost::Message as _;

/// The largest body that is read, in bytes.
const BODY_BYTES_MAX: usize = 64 << 20;

/// A span, its times in nanoseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its name.
    pub name: String,
    /// The name that others call it by, in hexadecimal digits.
    pub id: String,
    /// That of the span it is a part of; empty for a trace's first.
    pub parent: String,
    /// When it began.
    pub begin: u64,
    /// When it ended.
    pub end: u64,
    /// What is noted at it.
    pub attributes: BTreeMap<String, String>,
}

/// A trace.
#[derive(Clone, Debug)]
pub struct Trace {
    /// What it is called, in hexadecimal digits.
    pub id: String,
    /// Who it is of.
    pub resource: BTreeMap<String, String>,
    /// Its spans, as they were sent.
    pub spans: Vec<Span>,
}

impl Trace {
    /// The request.
    ///
    /// # Errors
    /// If there is none, or more than one.
    pub fn root(&self) -> Result<&Span> {
        let mut roots = self.spans.iter().filter(|span| span.parent.is_empty());
        let root = roots.next().context("a trace without a root")?;
        ensure!(roots.next().is_none(), "two roots: {self:?}");
        Ok(root)
    }

    /// The spans right below another.
    #[must_use]
    pub fn below(&self, span: &Span) -> Vec<&Span> {
        let spans = self.spans.iter();
        spans.filter(|other| other.parent == span.id).collect()
    }

    /// The spans of this name.
    #[must_use]
    pub fn named(&self, name: &str) -> Vec<&Span> {
        let spans = self.spans.iter();
        spans.filter(|span| span.name == name).collect()
    }

    /// Of the root's time, the part in which one of the spans right below it went on.
    ///
    /// # Errors
    /// If a span is not within the one that it is a part of, or there is none of that name.
    pub fn explained(&self) -> Result<f64> {
        let root = self.root()?;
        for span in self.spans.iter().filter(|span| !span.parent.is_empty()) {
            let parent = self.spans.iter().find(|other| other.id == span.parent);
            let parent = parent.with_context(|| format!("{span:?} is a part of nothing"))?;
            let is_in =
                parent.begin <= span.begin && span.begin <= span.end && span.end <= parent.end;
            ensure!(is_in, "{span:?} is not within {parent:?}");
        }
        let mut parts = self.below(root);
        parts.sort_by_key(|span| span.begin);
        let (mut sum, mut until) = (0, root.begin);
        for part in parts {
            sum += part.end.saturating_sub(part.begin.max(until));
            until = until.max(part.end);
        }
        #[expect(clippy::cast_precision_loss, reason = "a share, to three digits")]
        Ok(sum as f64 / (root.end - root.begin) as f64)
    }
}

#[derive(Debug, Default)]
struct State {
    stop: AtomicBool,
    hangs: AtomicBool,
    traces: Mutex<Vec<Trace>>,
    /// The heads of the calls.
    heads: Mutex<Vec<String>>,
}

/// A collector on a loopback port; it ends when dropped.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    state: Arc<State>,
}

impl Collector {
    /// Starts one.
    ///
    /// # Errors
    /// If no port can be had.
    pub fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        thread::Builder::new()
            .name("collector".to_owned())
            .spawn(move || accept(&listener, &shared))?;
        Ok(Self { address, state })
    }

    /// Its URL.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on calls are taken, and never answered.
    pub fn hang(&self) {
        self.state.hangs.store(true, Ordering::SeqCst);
    }

    /// The traces that have come so far.
    #[must_use]
    pub fn traces(&self) -> Vec<Trace> {
        let traces = self.state.traces.lock();
        traces.expect("no holder of this lock panics").clone()
    }

    /// The heads of the calls that have come so far, in lower case.
    #[must_use]
    pub fn heads(&self) -> Vec<String> {
        let heads = self.state.heads.lock();
        heads.expect("no holder of this lock panics").clone()
    }

    /// Waits for so many traces.
    ///
    /// # Errors
    /// If they do not come in time.
    pub fn await_traces(&self, count: usize, patience: Duration) -> Result<Vec<Trace>> {
        let begun = Instant::now();
        loop {
            let traces = self.traces();
            if traces.len() >= count {
                return Ok(traces);
            }
            ensure!(
                begun.elapsed() < patience,
                "{} of {count} traces: {traces:?}",
                traces.len()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, which then sees that it is to stop.
        drop(TcpStream::connect(self.address));
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    for client in listener.incoming() {
        if state.stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(client) = client else { continue };
        let state = Arc::clone(state);
        thread::spawn(move || {
            if let Err(error) = serve(client, &state) {
                eprintln!("collector: {error:#}");
            }
        });
    }
}

/// Takes the calls of one connection.
fn serve(client: TcpStream, state: &State) -> Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut client = client;
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                ensure!(head.is_empty(), "a call that was broken off");
                return Ok(());
            }
        }
        let head = head.to_lowercase();
        let len = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let len: usize = len.context("no length")?.trim().parse()?;
        ensure!(len <= BODY_BYTES_MAX, "a body of {len} bytes");
        let mut body = vec![0; len];
        reader.read_exact(&mut body)?;
        let mut heads = state.heads.lock().expect("no holder of this lock panics");
        heads.push(head.clone());
        drop(heads);
        if state.hangs.load(Ordering::SeqCst) {
            // Until the daemon gives up, and closes.
            while reader.read(&mut [0])? > 0 {}
            return Ok(());
        }
        ensure!(head.starts_with("post /v1/traces "), "{head}");
        let message = ExportTraceServiceRequest::decode(&*body)?;
        let mut traces = state.traces.lock().expect("no holder of this lock panics");
        sort(message, &mut traces);
        drop(traces);
        let answer =
            "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
        client.write_all(answer.as_bytes())?;
    }
}

/// Puts the spans of a call to those of their traces.
fn sort(message: ExportTraceServiceRequest, traces: &mut Vec<Trace>) {
    for of_resource in message.resource_spans {
        let resource = of_resource.resource.unwrap_or_default();
        let resource = table(resource.attributes);
        let spans = of_resource.scope_spans.into_iter();
        for span in spans.flat_map(|of_scope| of_scope.spans) {
            let id = hex(&span.trace_id);
            let found = traces.iter().position(|trace| trace.id == id);
            let place = found.unwrap_or_else(|| {
                traces.push(Trace {
                    id,
                    resource: resource.clone(),
                    spans: Vec::new(),
                });
                traces.len() - 1
            });
            traces[place].spans.push(Span {
                name: span.name,
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                begin: span.start_time_unix_nano,
                end: span.end_time_unix_nano,
                attributes: table(span.attributes),
            });
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn table(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: Value| match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        Value::BoolValue(yes) => yes.to_string(),
        other => format!("{other:?}"),
    };
    let known = |a: KeyValue| Some((a.key, text(a.value?.value?)));
    attributes.into_iter().filter_map(known).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(id: u8, parent: &str, begin: u64, end: u64) -> Span {
        Span {
            name: "a".to_owned(),
            id: id.to_string(),
            parent: parent.to_owned(),
            begin,
            end,
            attributes: BTreeMap::new(),
        }
    }

    fn trace(spans: Vec<Span>) -> Trace {
        Trace {
            id: "1".to_owned(),
            resource: BTreeMap::new(),
            spans,
        }
    }

    #[test]
    fn explained_is_the_part_of_the_root_that_is_covered_once() {
        let root = span(1, "", 100, 200);
        let spans = [(2, 100, 150), (3, 120, 140), (4, 140, 160), (5, 190, 200)];
        let spans = spans.map(|(id, begin, end)| span(id, "1", begin, end));
        let mut all = trace([vec![root], spans.to_vec()].concat());
        assert!((all.explained().unwrap() - 0.7).abs() < 1e-9);
        all.spans.push(span(6, "5", 189, 195));
        assert!(all.explained().is_err());
        all.spans.pop();
        all.spans.push(span(6, "9", 190, 195));
        assert!(all.explained().is_err());
    }
}
