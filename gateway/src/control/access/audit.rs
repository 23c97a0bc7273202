//! The audit log: who changed what by the API, and who was refused; a line of JSON each, in a file of this host.
//!
//! A change has two lines, told together by `call`: `begin` before anything is done, and `end` before its
//! answer is sent. *Crash in between: a `begin` alone; the change was made or was not.* A client that hangs up
//! gets an `end` without a status, for the change goes on. What was refused has one line, `denied`, and so has
//! a look at another tenant's things.
//!
//! Does not sync: lines of the last seconds may be missing after a power cut.
//!
//! **Invariant:** nothing of a request's body is written but the names in it ([`NAMES`]) and what it is to do with them
//! ([`OPTIONS`]), and of its headers nothing: no secret is.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use axum::http::Uri;
use axum::http::request::Parts;
use axum::response::Response;
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use quarry_objfmt::TenantName;
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::super::api::Refused;
use super::super::endpoints::Endpoint;
use super::super::{ApiError, ApiResult, Kind};
use super::tokens::without_secret;
use super::{Caller, Peer};
use crate::engine::now_ms;
pub use crate::metrics::AuditStats;

/// Size at which a file is put aside and a new one begun.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Files kept, the one written to included.
const FILES_MAX: usize = 8;
/// Bytes of a path that are written.
const TARGET_BYTES_MAX: usize = 512;
/// Bytes of names and options that are written of a body.
const BODY_BYTES_MAX: usize = 1024;
/// Refused calls that are written, of nobody and of each tenant, in so much time; the others are counted. What they
/// send must not push out what was done.
const REFUSALS_MAX: (u32, Duration) = (20, Duration::from_secs(1));
/// How long a line may take, with those before it; then it counts as not written, and nobody waits for it.
const WRITE_TIME_MAX: Duration = Duration::from_secs(2);

/// What of a body is written as names.
const NAMES: [&str; 5] = ["tenant", "name", "volume", "id", "role"];

/// What of a body is written as options: what changes what a call does. Keys by their names, and no URL, which may bear
/// credentials.
const OPTIONS: &[&str] = &[
    // Of an attachment, and of what takes or gives up something.
    "via",
    "force",
    "discard_unsent",
    "discard_lost",
    "read_only",
    "queues",
    "device_owner",
    "device_mode",
    "direct_reads",
    "from",
    "apply",
    "all",
    "older_than_ms",
    // Of a volume.
    "size_bytes",
    "sector_size",
    "durability",
    "compression",
    "retain_ms",
    "key",
    "no_encryption",
    "data",
    "rates",
    "iops",
    "iops_burst",
    "bandwidth_bytes",
    "bandwidth_burst_bytes",
    // Of a tenant.
    "how",
    "provisioned_bytes_max",
    "stored_bytes_max",
    "volumes_max",
    "snapshots_max",
    "weight",
    "cache_reserve_bytes",
    "cache_bytes_max",
    "dirty_bytes_max",
    "suspended",
    // Of a token.
    "expires_ms",
];
/// Of these, what has options of its own.
const NESTED: &str = "rates";

/// What a line says of a request.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Told {
    method: &'static str,
    endpoint: &'static str,
    target: String,
    /// What the body names.
    #[serde(skip_serializing_if = "Map::is_empty")]
    names: Map<String, Value>,
    /// What the body says that is to be done.
    #[serde(skip_serializing_if = "Map::is_empty")]
    options: Map<String, Value>,
    /// There were too many of these, or too long ones: some are left out.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    shortened: bool,
    from: String,
    /// None: nobody was known.
    caller: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
    /// The tenants that are asked for.
    #[serde(skip)]
    asked: Vec<String>,
}

/// A line.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    event: &'static str,
    call: String,
    #[serde(flatten)]
    told: &'a Told,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    /// The kind of the error, or `done`.
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ms: Option<u64>,
    /// Refused calls, of nobody or of the tenant, that were not written since the last that was.
    #[serde(skip_serializing_if = "is_zero")]
    left_out: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
const fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl Told {
    pub fn new(endpoint: &'static Endpoint, parts: &Parts) -> Self {
        let target = parts
            .uri
            .path_and_query()
            .map_or("", |target| target.as_str());
        // Somebody may name a token by its whole text.
        let target = match target.rsplit_once('/') {
            Some((path, token)) if token.starts_with("qry_") => {
                format!("{path}/{}", without_secret(token))
            }
            _ => target.to_owned(),
        };
        // A path is ASCII, so that no character is cut.
        let cut = target.len().min(TARGET_BYTES_MAX);
        Self {
            method: endpoint.method_name(),
            endpoint: endpoint.path,
            target: target.get(..cut).unwrap_or_default().to_owned(),
            names: Map::new(),
            options: Map::new(),
            shortened: false,
            from: Peer::of_request(parts).to_string(),
            caller: None,
            tenant: None,
            asked: tenants_in(endpoint.path, &parts.uri),
        }
    }

    pub fn caller(&mut self, caller: &Caller) {
        self.caller = Some(caller.to_string());
        self.tenant = caller.tenant().map(ToString::to_string);
    }

    /// Takes the names and the options in a body.
    pub fn name_what_is_in(&mut self, body: &[u8]) {
        let Ok(Value::Object(fields)) = serde_json::from_slice::<Value>(body) else {
            return;
        };
        let nested = fields.get(NESTED).and_then(Value::as_object);
        let is_name =
            |(key, value): &(&String, &Value)| NAMES.contains(&key.as_str()) && value.is_string();
        let is_option = |(key, value): &(&String, &Value)| {
            OPTIONS.contains(&key.as_str()) && !value.is_array() && !value.is_object()
        };
        let names = fields.iter().filter(is_name).map(|field| (0, field));
        let options = fields.iter().filter(is_option).map(|field| (1, field));
        let inner = nested.into_iter().flatten().filter(is_option);
        let all = names.chain(options).chain(inner.map(|field| (2, field)));
        let mut all: Vec<(usize, usize, &String, &Value)> = all
            .map(|(kind, (key, value))| (key.len() + value.to_string().len(), kind, key, value))
            .collect();
        // The short ones first: no `force` is hidden by texts that fill the line.
        all.sort_by_key(|(bytes, ..)| *bytes);
        let mut kinds = [Map::new(), Map::new(), Map::new()];
        let mut room = BODY_BYTES_MAX;
        for (bytes, kind, key, value) in all {
            let is_long = value.as_str().is_some_and(|t| t.len() > TARGET_BYTES_MAX);
            let Some(rest) = room.checked_sub(bytes).filter(|_| !is_long) else {
                self.shortened = true;
                break;
            };
            room = rest;
            kinds[kind].insert(key.clone(), value.clone());
        }
        let [names, options, inner] = kinds;
        (self.names, self.options) = (names, options);
        if nested.is_some() {
            self.options.insert(NESTED.to_owned(), inner.into());
        }
    }

    /// Whether the path, or what is asked for by it, names another tenant than the caller's.
    pub fn is_of_another(&self, caller: &Caller) -> bool {
        let is_another = |own: &TenantName| self.asked.iter().any(|name| name != own.as_str());
        caller.tenant().is_some_and(is_another)
    }
}

/// The tenants that the path and the query of a request name, read as its handler reads them: whole, and decoded.
fn tenants_in(template: &str, uri: &Uri) -> Vec<String> {
    let mut both = template.split('/').zip(uri.path().split('/'));
    let named = both
        .find(|(template, _)| *template == "{tenant}")
        .map(|(_, name)| percent_decode_str(name).decode_utf8_lossy().into_owned());
    let query = uri.query().unwrap_or_default();
    let asked = url::form_urlencoded::parse(query.as_bytes())
        .filter(|(key, _)| key == "tenant")
        .map(|(_, name)| name.into_owned());
    named.into_iter().chain(asked).collect()
}

/// The file, as it was opened.
struct Open {
    file: File,
    bytes: u64,
    /// The last line was not written whole.
    torn: bool,
}

/// Refused calls of nobody, or of a tenant.
struct Refusals {
    since: Instant,
    written: u32,
    left_out: u32,
}

struct Inner {
    path: PathBuf,
    required: bool,
    file_bytes_max: u64,
    write_time_max: Duration,
    /// Whose line is being written: a file system that hangs keeps one thread.
    turn: Arc<tokio::sync::Mutex<()>>,
    open: Mutex<Option<Open>>,
    problem: Mutex<Option<String>>,
    /// By tenant, those of nobody included; as many as have sent some of late, or some that are yet to be told.
    refusals: Mutex<HashMap<Option<String>, Refusals>>,
    started_ms: u64,
    calls: AtomicU64,
    lines: AtomicU64,
    failures: AtomicU64,
}

/// The audit log. Cheap to clone.
#[derive(Clone)]
pub struct Audit(Arc<Inner>);

impl Audit {
    /// The log at `path`; what cannot be written there is not done, if `required`.
    ///
    /// # Errors
    /// If it cannot be written, and is required.
    pub fn open(path: PathBuf, required: bool) -> ApiResult<Self> {
        Self::with_limits(path, required, FILE_BYTES_MAX, WRITE_TIME_MAX)
    }

    fn with_limits(
        path: PathBuf,
        required: bool,
        file_bytes_max: u64,
        write_time_max: Duration,
    ) -> ApiResult<Self> {
        let audit = Self(Arc::new(Inner {
            path,
            required,
            file_bytes_max,
            write_time_max,
            turn: Arc::default(),
            open: Mutex::default(),
            problem: Mutex::default(),
            refusals: Mutex::default(),
            started_ms: now_ms(),
            calls: AtomicU64::new(0),
            lines: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        }));
        let opened = audit.0.opened(&mut audit.0.open.lock()).map(drop);
        if let Err(error) = opened {
            audit.0.failed(&error);
            if required {
                return Err(audit.0.refusal());
            }
        }
        Ok(audit)
    }

    /// What it counts.
    #[must_use]
    pub fn stats(&self) -> AuditStats {
        AuditStats {
            lines: self.0.lines.load(Ordering::Relaxed),
            failures: self.0.failures.load(Ordering::Relaxed),
        }
    }

    /// Why it cannot be written, if it cannot.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.0.problem.lock().clone()
    }

    fn call(&self) -> String {
        let number = self.0.calls.fetch_add(1, Ordering::Relaxed);
        format!("{:x}-{number}", self.0.started_ms)
    }

    /// Notes that a change is to be made.
    ///
    /// # Errors
    /// If that cannot be written, and must be.
    pub(super) async fn begin(&self, told: Told) -> ApiResult<Entry> {
        let call = self.call();
        let written = self.write(&Line::new("begin", &call, &told)).await;
        if written.is_err() && self.0.required {
            return Err(self.0.refusal());
        }
        Ok(Entry {
            audit: self.clone(),
            call,
            told,
            begun: Instant::now(),
            ended: false,
        })
    }

    /// Notes that somebody was refused.
    pub(super) async fn denied(&self, told: Told, refused: &Refused) {
        let Some(left_out) = self.0.left_out_before(&told) else {
            return;
        };
        let call = self.call();
        let line = Line {
            status: Some(refused.0.as_u16()),
            outcome: serde_json::to_value(refused.1.kind).ok(),
            left_out,
            ..Line::new("denied", &call, &told)
        };
        // Nothing was done: who is refused is refused whether it can be written or not.
        drop(self.write(&line).await);
    }

    /// Notes that a tenant looked at what is another's, or at nobody's.
    pub(super) async fn asked_for_anothers(&self, told: Told, outcome: Outcome) {
        let Some(left_out) = self.0.left_out_before(&told) else {
            return;
        };
        let call = self.call();
        let line = Line {
            status: Some(outcome.status),
            outcome: outcome.word,
            left_out,
            ..Line::new("denied", &call, &told)
        };
        drop(self.write(&line).await);
    }

    async fn write(&self, line: &Line<'_>) -> io::Result<()> {
        let inner = Arc::clone(&self.0);
        // Its own task: who hangs up leaves no line unwritten.
        let written = tokio::spawn(inner.write_in_turn(line.text())).await;
        written.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Audit").field(&self.0.path).finish()
    }
}

/// What a call was answered with.
pub(super) struct Outcome {
    status: u16,
    word: Option<Value>,
}

impl Outcome {
    pub fn of(response: &Response) -> Self {
        let kind = response.extensions().get::<Kind>();
        Self {
            status: response.status().as_u16(),
            word: kind.map_or(Some("done".into()), |kind| serde_json::to_value(kind).ok()),
        }
    }
}

impl<'a> Line<'a> {
    fn new(event: &'static str, call: &str, told: &'a Told) -> Self {
        Self {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            event,
            call: call.to_owned(),
            told,
            status: None,
            outcome: None,
            duration_ms: None,
            left_out: 0,
        }
    }

    fn text(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).expect("a line has texts and numbers only");
        text.push(b'\n');
        text
    }
}

impl Refusals {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            written: 0,
            left_out: 0,
        }
    }

    /// How many were left out before this one; `None` if it is to be left out too.
    fn next(&mut self) -> Option<u32> {
        let (max, time) = REFUSALS_MAX;
        if self.since.elapsed() >= time {
            self.since = Instant::now();
            self.written = 0;
        }
        if self.written >= max {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

impl Inner {
    /// How many refused calls of the same tenant, or of nobody, were left out before this one; `None` if it is to be
    /// left out too. An operator's are all written.
    fn left_out_before(&self, told: &Told) -> Option<u32> {
        if told.caller.is_some() && told.tenant.is_none() {
            return Some(0);
        }
        let mut all = self.refusals.lock();
        let (_, time) = REFUSALS_MAX;
        all.retain(|_, of_one| of_one.left_out > 0 || of_one.since.elapsed() < time);
        let of_one = all.entry(told.tenant.clone());
        of_one.or_insert_with(Refusals::new).next()
    }

    fn refusal(&self) -> ApiError {
        let message = self.problem.lock().clone().unwrap_or_default();
        let remedy = "mend that, or set access.audit_required to false";
        ApiError::new(
            Kind::Unavailable,
            format!("nothing is changed: {message}"),
            remedy,
        )
    }

    fn failed(&self, error: &io::Error) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let message = format!(
            "the audit log {} cannot be written: {error}",
            self.path.display()
        );
        let mut problem = self.problem.lock();
        if problem.as_ref() != Some(&message) {
            tracing::error!("{message}");
            *problem = Some(message);
        }
    }

    /// Writes a line after those before it. *Too late: it may yet be written, if it was begun.*
    async fn write_in_turn(self: Arc<Self>, line: Vec<u8>) -> io::Result<()> {
        let this = Arc::clone(&self);
        let written = async move {
            let turn = Arc::clone(&this.turn).lock_owned().await;
            let write = move || {
                let written = this.write(&line);
                drop(turn);
                written
            };
            let written = tokio::task::spawn_blocking(write).await;
            written.unwrap_or_else(|error| Err(io::Error::other(error)))
        };
        let Ok(written) = timeout(self.write_time_max, written).await else {
            let error = io::Error::new(io::ErrorKind::TimedOut, "its file system takes too long");
            self.failed(&error);
            return Err(error);
        };
        written
    }

    fn write(&self, line: &[u8]) -> io::Result<()> {
        let written = self.try_write(line);
        match &written {
            Ok(()) => {
                self.lines.fetch_add(1, Ordering::Relaxed);
                if self.problem.lock().take().is_some() {
                    tracing::info!("the audit log can be written again");
                }
            }
            Err(error) => self.failed(error),
        }
        written
    }

    fn try_write(&self, line: &[u8]) -> io::Result<()> {
        let mut slot = self.open.lock();
        let mut open = self.opened(&mut slot)?;
        if open.bytes > 0 && open.bytes + line.len() as u64 > self.file_bytes_max {
            self.put_aside()?;
            *slot = None;
            open = self.opened(&mut slot)?;
        }
        let mut text = Vec::with_capacity(line.len() + 1);
        if open.torn {
            text.push(b'\n');
        }
        text.extend_from_slice(line);
        open.torn = true;
        open.file.write_all(&text)?;
        open.torn = false;
        open.bytes += text.len() as u64;
        Ok(())
    }

    /// The file at the path: anew if it is another by now, for somebody may have moved it away.
    fn opened<'a>(&self, slot: &'a mut Option<Open>) -> io::Result<&'a mut Open> {
        let same = |open: &Open| {
            let (there, ours) = (fs::symlink_metadata(&self.path)?, open.file.metadata()?);
            io::Result::Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino()))
        };
        if slot
            .as_ref()
            .is_some_and(|open| !same(open).unwrap_or(false))
        {
            *slot = None;
        }
        if slot.is_none() {
            *slot = Some(open(&self.path)?);
        }
        slot.as_mut()
            .ok_or_else(|| io::Error::other("it was just opened"))
    }

    /// Makes room for a new file: each gets the next number, the oldest goes. *Crash in between: a number is
    /// left out.*
    fn put_aside(&self) -> io::Result<()> {
        let numbered = |number: usize| {
            let mut name = self.path.clone().into_os_string();
            if number > 0 {
                name.push(format!(".{number}"));
            }
            PathBuf::from(name)
        };
        for number in (0..FILES_MAX - 1).rev() {
            match fs::rename(numbered(number), numbered(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<Open> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .read(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    file.set_permissions(Permissions::from_mode(0o600))?;
    let bytes = found.len();
    let mut last = [b'\n'];
    if let Some(at) = bytes.checked_sub(1) {
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut last, at)?;
    }
    Ok(Open {
        file,
        bytes,
        torn: last != [b'\n'],
    })
}

/// A change under way.
pub(super) struct Entry {
    audit: Audit,
    call: String,
    told: Told,
    begun: Instant,
    ended: bool,
}

impl Entry {
    /// Notes what became of it, before that is told.
    pub async fn end(mut self, outcome: Outcome) {
        self.ended = true;
        let line = Line {
            status: Some(outcome.status),
            outcome: outcome.word,
            duration_ms: Some(self.duration_ms()),
            ..Line::new("end", &self.call, &self.told)
        };
        // It is done; that it cannot be written is told by status and metrics.
        drop(self.audit.write(&line).await);
    }

    fn duration_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Nobody waits for the answer any more.
impl Drop for Entry {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let line = Line {
            outcome: Some("not waited for".into()),
            duration_ms: Some(self.duration_ms()),
            ..Line::new("end", &self.call, &self.told)
        };
        let (text, inner) = (line.text(), Arc::clone(&self.audit.0));
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(inner.write_in_turn(text))),
            Err(_) => drop(inner.write(&text)),
        }
    }
}

#[cfg(test)]
mod tests;
