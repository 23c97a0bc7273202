//! Spans: what took from when to when, and what is known of it.

use crate::store::Operation;

/// What a span is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Waiting for a rate of the volume or its tenant.
    Held,
    /// A write waiting for its place on the cache device.
    Room,
    /// Reading the cache device.
    CacheRead,
    /// Writing data to the cache device.
    CacheWrite,
    /// Copying what was fetched to the request.
    Copy,
    /// Waiting for the answer's head of a direct read.
    Ask,
    /// Receiving a direct read.
    Receive,
    /// Map nodes from the store.
    Nodes,
    /// Frames from the store.
    Fetch,
    /// Waiting for what another request, or readahead, fetches already.
    Joined,
    /// A request to the store, with all its attempts.
    Call(Operation),
    /// Waiting for a place among the requests to a store.
    Place,
    /// One attempt of a request to the store.
    Attempt,
    /// Verifying, decrypting and decompressing.
    Decode,
    /// A chunk on its way to the store.
    Upload,
    /// Waiting for a place among the uploads.
    UploadPlace,
    /// Reading a chunk's data from the cache device, compressing and encrypting them.
    Encode,
    /// The sync of the cache device.
    Sync,
    /// Record pages of writes, or a segment's header, on the cache device.
    Pages,
}

impl Step {
    /// Its span's name.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Held => "wait for rate",
            Self::Room => "wait for room",
            Self::CacheRead => "cache read",
            Self::CacheWrite => "cache write",
            Self::Copy => "copy",
            Self::Ask => "ask for direct read",
            Self::Receive => "receive direct read",
            Self::Nodes => "map nodes",
            Self::Fetch => "fetch",
            Self::Joined => "wait for another's fetch",
            Self::Call(Operation::Get) => "store get",
            Self::Call(Operation::GetRange) => "store get_range",
            Self::Call(Operation::Create) => "store create",
            Self::Call(Operation::Replace) => "store replace",
            Self::Call(Operation::Delete) => "store delete",
            Self::Call(Operation::List) => "store list",
            Self::Place => "wait for place",
            Self::Attempt => "attempt",
            Self::Decode => "decode",
            Self::Upload => "upload",
            Self::UploadPlace => "wait for upload place",
            Self::Encode => "encode",
            Self::Sync => "sync",
            Self::Pages => "write pages",
        }
    }
}

/// Names of what is noted at spans: OpenTelemetry's where it has one, else below `quarry.`.
pub(crate) mod notes {
    /// Attempts of a call.
    pub(crate) const ATTEMPTS: &str = "quarry.store.attempts";
    /// Bytes asked for or sent.
    pub(crate) const BYTES: &str = "quarry.bytes";
    /// How many pages, frames or nodes.
    pub(crate) const COUNT: &str = "quarry.count";
    /// Why a span failed.
    pub(crate) const ERROR_TYPE: &str = "error.type";
    /// The object's key.
    pub(crate) const OBJECT: &str = "quarry.store.object";
    /// How a call or an attempt ended.
    pub(crate) const OUTCOME: &str = "quarry.store.outcome";
    /// What a store, or the way to it, says of an attempt that failed.
    pub(crate) const REASON: &str = "quarry.store.reason";
    /// What a write waited for.
    pub(crate) const WAITS_FOR: &str = "quarry.waits_for";
}

/// What is noted at a span.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    /// A word of a fixed list.
    Word(&'static str),
    /// A text.
    Text(String),
    /// A number.
    Count(u64),
}

/// A span that has ended. Times are of [`now_ns`](crate::clock::now_ns).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Span {
    pub(crate) step: Step,
    pub(crate) begin_ns: u64,
    pub(crate) end_ns: u64,
    /// The span that it is a part of, by its place in the same trail.
    pub(crate) parent: Option<u16>,
    pub(crate) notes: Vec<(&'static str, Value)>,
}

impl Span {
    /// Without notes.
    pub(crate) const fn new(step: Step, begin_ns: u64, end_ns: u64) -> Self {
        Self {
            step,
            begin_ns,
            end_ns,
            parent: None,
            notes: Vec::new(),
        }
    }

    /// With this noted.
    pub(crate) fn with(mut self, name: &'static str, value: Value) -> Self {
        self.notes.push((name, value));
        self
    }

    /// Whether any of it was in this time. One that took none is in it, or not, as a whole.
    pub(crate) const fn overlaps(&self, begin_ns: u64, end_ns: u64) -> bool {
        if self.begin_ns == self.end_ns {
            return begin_ns <= self.begin_ns && self.end_ns <= end_ns;
        }
        self.begin_ns < end_ns && begin_ns < self.end_ns
    }
}

/// What one piece of work of the store's side took: the first span is the whole, and all others' parent in the end.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Trail {
    pub(crate) spans: Vec<Span>,
    /// Spans that there was no room for.
    pub(crate) left_out: u32,
}

impl Trail {
    /// The whole.
    pub(crate) fn whole(&self) -> &Span {
        &self.spans[0]
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn page_names_every_span_and_what_is_noted_at_it() {
        let page = include_str!("../../../docs/TRACING.md");
        let source = include_str!("span.rs");
        let names: Vec<_> = source
            .lines()
            .filter(|line| line.contains("=> \"") || line.contains(": &str = \""))
            .filter_map(|line| line.split('"').nth(1))
            .collect();
        assert!(names.len() > 25, "{names:?}");
        for name in names {
            assert!(page.contains(&format!("`{name}`")), "no `{name}` there");
        }
    }
}
