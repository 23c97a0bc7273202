//! Requests that were answered, as OpenTelemetry's messages.
//!
//! A trace's first span is the request; below it lie the spans of its own trail, and what it waited for with others, as
//! far as that was while the request waited: what began before it is shown from its beginning on.

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span as Message, Status};
use quarry_objfmt::SECTOR_SIZE;
use quarry_volume::{IoError, Op};
use uuid::Uuid;

use super::span::{Span, Step, Value, notes};
use super::{Finished, SPANS_MAX};

/// Spans of a trace: those of the request's own trail, and of what it waited for.
const TRACE_SPANS_MAX: usize = 2 * SPANS_MAX;

/// A trace as it is sent, and what is logged of it.
pub(super) struct Trace {
    pub(super) id: Uuid,
    pub(super) spans: Vec<Message>,
}

/// The message of some traces; `offset_ns` is what is to be added to their times to have nanoseconds since 1970.
pub(super) fn message(resource: &Resource, traces: Vec<Trace>) -> ExportTraceServiceRequest {
    let scope = InstrumentationScope {
        name: "quarry".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let spans = traces.into_iter().flat_map(|trace| trace.spans);
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource.clone()),
            scope_spans: vec![ScopeSpans {
                scope: Some(scope),
                spans: spans.collect(),
                ..ScopeSpans::default()
            }],
            ..ResourceSpans::default()
        }],
    }
}

/// An attribute with a text.
pub(super) fn text(name: &str, value: impl Into<String>) -> KeyValue {
    attribute(name, any_value::Value::StringValue(value.into()))
}

fn number(name: &str, value: u64) -> KeyValue {
    let value = i64::try_from(value).unwrap_or(i64::MAX);
    attribute(name, any_value::Value::IntValue(value))
}

fn attribute(name: &str, value: any_value::Value) -> KeyValue {
    KeyValue {
        key: name.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

/// What a request is called.
const fn name_of(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write { .. } => "write",
        Op::Flush => "flush",
        Op::Discard => "discard",
        Op::WriteZeroes { .. } => "write zeroes",
        Op::Status => "block status",
    }
}

const fn word_of(error: IoError) -> &'static str {
    match error {
        IoError::Invalid => "EINVAL",
        IoError::ReadOnly => "EROFS",
        IoError::Io => "EIO",
        IoError::ShuttingDown => "ESHUTDOWN",
    }
}

/// Puts a trace together.
struct Builder {
    trace_id: Vec<u8>,
    /// The first span's name; the others' follow it, so that none comes twice.
    first_id: u64,
    offset_ns: u64,
    begin_ns: u64,
    end_ns: u64,
    spans: Vec<Message>,
    left_out: u64,
}

impl Builder {
    fn id(&self, place: usize) -> Vec<u8> {
        // Zero is no name.
        let id = self.first_id.wrapping_add(place as u64).max(1);
        id.to_le_bytes().to_vec()
    }

    /// Adds a span below the one at `parent`, as far as it was in the request's time. Answers its place.
    fn add(&mut self, span: &Span, parent: usize) -> Option<usize> {
        let is_in = span.overlaps(self.begin_ns, self.end_ns);
        if !is_in || self.spans.len() >= TRACE_SPANS_MAX {
            self.left_out += u64::from(is_in);
            return None;
        }
        let error = span.notes.iter().find_map(|(name, value)| match value {
            Value::Word(word) if *name == notes::ERROR_TYPE => Some(*word),
            _ => None,
        });
        let attributes = span.notes.iter().map(|(name, value)| match value {
            Value::Word(word) => text(name, *word),
            Value::Text(value) => text(name, value.clone()),
            Value::Count(count) => number(name, *count),
        });
        let is_call = matches!(span.step, Step::Call(_));
        let place = self.spans.len();
        self.spans.push(Message {
            trace_id: self.trace_id.clone(),
            span_id: self.id(place),
            parent_span_id: self.id(parent),
            name: span.step.as_str().to_owned(),
            kind: kind(if is_call {
                SpanKind::Client
            } else {
                SpanKind::Internal
            }),
            start_time_unix_nano: self.unix_ns(span.begin_ns),
            end_time_unix_nano: self.unix_ns(span.end_ns),
            attributes: attributes.collect(),
            status: error.map(failed),
            ..Message::default()
        });
        Some(place)
    }

    /// Adds spans of which those without a parent lie below the request.
    fn add_all(&mut self, spans: &[Span]) {
        let mut places: Vec<Option<usize>> = Vec::with_capacity(spans.len());
        for span in spans {
            let parent = match span.parent {
                None => Some(0),
                // Parents come before what is below them.
                Some(parent) => places.get(usize::from(parent)).copied().flatten(),
            };
            places.push(parent.and_then(|parent| self.add(span, parent)));
        }
    }

    fn unix_ns(&self, ns: u64) -> u64 {
        self.offset_ns + ns.clamp(self.begin_ns, self.end_ns)
    }
}

const fn kind(kind: SpanKind) -> i32 {
    kind as i32
}

fn failed(why: &str) -> Status {
    Status {
        message: why.to_owned(),
        code: StatusCode::Error as i32,
    }
}

/// The trace of a request; `offset_ns` makes its times nanoseconds since 1970.
pub(super) fn trace(finished: &Finished, offset_ns: u64) -> Trace {
    let id = Uuid::new_v4();
    let mut builder = Builder {
        trace_id: id.as_bytes().to_vec(),
        first_id: Uuid::new_v4().as_u64_pair().0,
        offset_ns,
        begin_ns: finished.begin_ns,
        end_ns: finished.end_ns,
        spans: Vec::new(),
        left_out: finished.left_out.into(),
    };
    let range = finished.range;
    let mut attributes = vec![
        text("quarry.tenant", &finished.whose.tenant),
        text("quarry.volume", &finished.whose.volume),
        text("quarry.operation", finished.kind),
        text("quarry.front_end", finished.front_end),
        number("quarry.tag", finished.tag.into()),
    ];
    if finished.op != Op::Flush {
        // Not checked yet, if it was refused.
        let bytes = |sectors: u64| sectors.saturating_mul(SECTOR_SIZE.into());
        attributes.push(number("quarry.offset", bytes(range.start.get())));
        attributes.push(number("quarry.length", bytes(range.len().get())));
    }
    if let Op::Write { fua: true } | Op::WriteZeroes { fua: true } = finished.op {
        attributes.push(attribute("quarry.fua", any_value::Value::BoolValue(true)));
    }
    let error = finished.result.err().map(word_of);
    attributes.extend(error.map(|word| text(notes::ERROR_TYPE, word)));
    let span_id = builder.id(0);
    builder.spans.push(Message {
        trace_id: builder.trace_id.clone(),
        span_id,
        name: name_of(finished.op).to_owned(),
        kind: kind(SpanKind::Server),
        start_time_unix_nano: builder.unix_ns(finished.begin_ns),
        end_time_unix_nano: builder.unix_ns(finished.end_ns),
        attributes,
        status: error.map(failed),
        ..Message::default()
    });
    builder.add_all(&finished.spans);
    for trail in &finished.trails {
        builder.add_all(&trail.spans);
        builder.left_out += u64::from(trail.left_out);
    }
    let left_out = builder.left_out;
    if left_out > 0 {
        builder.spans[0]
            .attributes
            .push(number("quarry.spans_left_out", left_out));
    }
    Trace {
        id,
        spans: builder.spans,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use quarry_objfmt::{Lba, LbaRange, Sectors};

    use super::super::Whose;
    use super::super::span::Trail;
    use super::*;
    use crate::store::Operation;

    /// A read of 4 KiB that missed, from 1,000 to 2,000 ns.
    pub(in super::super) fn finished() -> Finished {
        Finished {
            whose: Arc::new(Whose {
                tenant: "acme".to_owned(),
                volume: "db".to_owned(),
            }),
            op: Op::Read,
            kind: "read_miss",
            range: LbaRange::new(Lba::new(16), Sectors::new(8)).unwrap(),
            result: Ok(()),
            front_end: "nbd",
            tag: 3,
            begin_ns: 1_000,
            end_ns: 2_000,
            spans: Vec::new(),
            trails: Vec::new(),
            left_out: 0,
        }
    }

    fn below(parent: u16, span: Span) -> Span {
        Span {
            parent: Some(parent),
            ..span
        }
    }

    fn value<'a>(span: &'a Message, name: &str) -> Option<&'a any_value::Value> {
        let found = span.attributes.iter().find(|a| a.key == name)?;
        found.value.as_ref()?.value.as_ref()
    }

    fn words(text: &str) -> any_value::Value {
        any_value::Value::StringValue(text.to_owned())
    }

    #[test]
    fn trace_has_the_request_and_below_it_what_it_waited_for_within_its_time() {
        let call = Step::Call(Operation::GetRange);
        let trail = Trail {
            spans: vec![
                Span::new(Step::Fetch, 400, 1_900),
                // Over before the request came: not its business, nor what is below.
                below(0, Span::new(call, 410, 900)),
                below(1, Span::new(Step::Attempt, 420, 900)),
                below(
                    0,
                    Span::new(call, 950, 1_800).with(notes::ERROR_TYPE, Value::Word("denied")),
                ),
                below(3, Span::new(Step::Attempt, 960, 1_790)),
            ],
            left_out: 2,
        };
        let mut finished = finished();
        finished.spans = vec![Span::new(Step::Copy, 1_900, 1_990)];
        finished.trails = vec![Arc::new(trail)];
        let spans = trace(&finished, 5_000_000).spans;
        let names: Vec<_> = spans.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(
            names,
            ["read", "copy", "fetch", "store get_range", "attempt"]
        );
        let root = &spans[0];
        assert!(root.parent_span_id.is_empty() && root.kind == kind(SpanKind::Server));
        assert_eq!(root.start_time_unix_nano, 5_001_000);
        assert_eq!(value(root, "quarry.operation"), Some(&words("read_miss")));
        let offset = Some(&any_value::Value::IntValue(8192));
        assert_eq!(value(root, "quarry.offset"), offset);
        let left_out = Some(&any_value::Value::IntValue(2));
        assert_eq!(value(root, "quarry.spans_left_out"), left_out);
        let ids: HashSet<_> = spans.iter().map(|s| s.span_id.clone()).collect();
        assert_eq!(ids.len(), spans.len());
        for span in &spans[1..] {
            assert_eq!((span.trace_id.len(), span.span_id.len()), (16, 8));
            assert_eq!(span.trace_id, root.trace_id);
            let parent = spans.iter().find(|p| p.span_id == span.parent_span_id);
            let parent = parent.unwrap();
            assert!(
                parent.start_time_unix_nano <= span.start_time_unix_nano,
                "{span:?}"
            );
            assert!(
                span.end_time_unix_nano <= parent.end_time_unix_nano,
                "{span:?}"
            );
        }
        assert_eq!(spans[3].kind, kind(SpanKind::Client));
        assert_eq!(
            spans[3].status.as_ref().unwrap().code,
            StatusCode::Error as i32
        );
        assert_eq!(spans[4].parent_span_id, spans[3].span_id);
    }

    #[test]
    fn failed_flush_says_why_and_has_no_place() {
        let mut finished = finished();
        (finished.op, finished.result) = (Op::Flush, Err(IoError::Io));
        let spans = trace(&finished, 0).spans;
        assert_eq!(value(&spans[0], "error.type"), Some(&words("EIO")));
        assert_eq!(value(&spans[0], "quarry.offset"), None);
        assert_eq!(spans[0].status.as_ref().unwrap().message, "EIO");
    }

    #[test]
    fn spans_past_the_most_are_counted_at_the_request() {
        let mut finished = finished();
        finished.spans = vec![Span::new(Step::CacheRead, 1_100, 1_200); 300];
        let spans = trace(&finished, 0).spans;
        assert_eq!(spans.len(), TRACE_SPANS_MAX);
        let left_out = any_value::Value::IntValue(301 - TRACE_SPANS_MAX as i64);
        assert_eq!(value(&spans[0], "quarry.spans_left_out"), Some(&left_out));
    }
}
