//! A ublk device over a plain file: the ublk front end and the reactor without the rest, for
//! `ublk_smoke.sh`, which runs it under a kernel with ublk and checks what it reads and writes.
//!
//! The device is the file, sector by sector, but for its last 2 MiB, which take no writes: the
//! first of these reads as zeroes (`ZeroFill`), the second as a pattern made here
//! (`CopyToRequest`), so that every way of data into a request is trodden.
//!
//! `ublk_smoke FILE MIB SECTOR_SIZE [recover] [user-copy] [no-table]`; SIGTERM removes the device,
//! SIGINT ends the process and leaves it, `kill -9` is the crash.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use quarry_gateway::reactor::{BackendSink, Geometry, Machine, Message, Reactor, ReactorConfig};
use quarry_gateway::ublk::{Control, DeviceSpec, Host, Permissions};
use quarry_objfmt::{Sectors, TenantName, VolumeId, VolumeName};
use quarry_volume::{Action, Event, IoError, IoId, Op, Request, RequestId};
use tokio::signal::unix::{SignalKind, signal};

/// Bytes of each of the two special runs at the device's end.
const SPECIAL_BYTES: u64 = 1 << 20;

/// Zeroes written at once.
const ZEROES_BYTES: u64 = 1 << 20;

/// The device's volume: always the same, so that a second run finds it.
const VOLUME: [u8; 16] = *b"quarry ublk test";

/// What a request still needs.
struct Work {
    left: u32,
    sync: bool,
    result: Result<(), IoError>,
}

/// A volume that is a file.
struct PlainFile {
    geometry: Geometry,
    next_io: u64,
    ios: HashMap<IoId, RequestId>,
    work: HashMap<RequestId, Work>,
    zeroes: Bytes,
}

impl PlainFile {
    fn io(&mut self, request: RequestId) -> IoId {
        self.next_io += 1;
        let io = IoId(self.next_io);
        self.ios.insert(io, request);
        self.work.entry(request).and_modify(|work| work.left += 1);
        io
    }

    /// Where the special runs start.
    fn special(&self) -> u64 {
        self.geometry.size.bytes() - 2 * SPECIAL_BYTES
    }

    fn request(&mut self, Request { id, op, range }: Request, out: &mut Vec<Action>) {
        let (start, end) = (range.start.get() * 512, range.end.get() * 512);
        let sync = matches!(
            op,
            Op::Flush | Op::Write { fua: true } | Op::WriteZeroes { fua: true }
        );
        self.work.insert(
            id,
            Work {
                left: 0,
                sync,
                result: Ok(()),
            },
        );
        let special = self.special();
        if end > self.geometry.size.bytes() {
            self.work
                .entry(id)
                .and_modify(|work| work.result = Err(IoError::Invalid));
        } else if !matches!(op, Op::Read | Op::Flush) && end > special {
            self.work
                .entry(id)
                .and_modify(|work| work.result = Err(IoError::ReadOnly));
        } else {
            match op {
                Op::Read => self.read(id, start, end, out),
                Op::Write { .. } => {
                    let (io, len) = (self.io(id), (end - start).try_into().unwrap());
                    out.push(Action::CacheWrite {
                        io,
                        request: id,
                        buffer_offset: 0,
                        offset: start,
                        len,
                    });
                }
                Op::Flush => {}
                Op::Discard | Op::WriteZeroes { .. } => {
                    let mut at = start;
                    while at < end {
                        let len = ZEROES_BYTES.min(end - at);
                        let (io, data) = (
                            self.io(id),
                            self.zeroes.slice(..usize::try_from(len).unwrap()),
                        );
                        out.push(Action::FillWrite {
                            io,
                            offset: at,
                            data,
                        });
                        at += len;
                    }
                }
            }
        }
        self.go_on(id, out);
    }

    fn read(&mut self, request: RequestId, start: u64, end: u64, out: &mut Vec<Action>) {
        let special = self.special();
        let runs = [
            (0, special),
            (special, special + SPECIAL_BYTES),
            (special + SPECIAL_BYTES, u64::MAX),
        ];
        for (run, (from, to)) in runs.into_iter().enumerate() {
            let (from, to) = (from.max(start), to.min(end));
            if from >= to {
                continue;
            }
            let io = self.io(request);
            let buffer_offset = u32::try_from(from - start).unwrap();
            let len = u32::try_from(to - from).unwrap();
            out.push(match run {
                0 => Action::CacheRead {
                    io,
                    request,
                    buffer_offset,
                    offset: from,
                    len,
                },
                1 => Action::ZeroFill {
                    io,
                    request,
                    buffer_offset,
                    len,
                },
                _ => Action::CopyToRequest {
                    io,
                    request,
                    buffer_offset,
                    data: pattern(from - special - SPECIAL_BYTES, len),
                },
            });
        }
    }

    /// The next step of a request none of whose I/O is under way.
    fn go_on(&mut self, request: RequestId, out: &mut Vec<Action>) {
        let work = self
            .work
            .get_mut(&request)
            .expect("a request that is there");
        if work.left > 0 {
            return;
        }
        if work.sync && work.result.is_ok() {
            work.sync = false;
            let io = self.io(request);
            out.push(Action::Sync { io });
            return;
        }
        let result = work.result;
        self.work.remove(&request);
        out.push(Action::Complete { request, result });
    }
}

impl Machine for PlainFile {
    fn apply(&mut self, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Request(request) => self.request(request, out),
            Event::IoDone { io, result } => {
                let request = self.ios.remove(&io).expect("an I/O that was asked for");
                let work = self.work.get_mut(&request).expect("its request");
                work.left -= 1;
                if let Err(errno) = result {
                    eprintln!("I/O of {request:?} failed: errno {errno}");
                    work.result = Err(IoError::Io);
                }
                self.go_on(request, out);
            }
            _ => {}
        }
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }
}

/// What the last run reads as: each 16 bytes their own offset in it, as text.
fn pattern(from: u64, len: u32) -> Bytes {
    let to = from + u64::from(len);
    (from / 16..to / 16)
        .flat_map(|n| format!("{:015}\n", n * 16).into_bytes())
        .collect()
}

struct NoBackend;

impl BackendSink for NoBackend {
    fn submit(&self, action: Action) {
        eprintln!("unexpected: {action:?}");
    }
}

fn open(path: &PathBuf, bytes: u64) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    file.set_len(bytes)?;
    Ok(file)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let mut args = std::env::args().skip(1);
    let file: PathBuf = args.next().context("a file")?.into();
    let bytes = args.next().context("a size in MiB")?.parse::<u64>()? << 20;
    let sector_size = args.next().context("a sector size")?.parse()?;
    let options: Vec<String> = args.collect();
    let has = |name: &str| options.iter().any(|option| option == name);

    let geometry = Geometry {
        size: Sectors::from_bytes(bytes).context("whole sectors")?,
        sector_size,
        read_only: false,
    };
    let spec = DeviceSpec {
        cache: quarry_objfmt::CacheId::from_bytes([1; 16]),
        volume: VolumeId::from_bytes(VOLUME),
        tenant: TenantName::new("smoke")?,
        name: VolumeName::new("plain")?,
        size: geometry.size,
        sector_size,
        read_only: false,
        permissions: Permissions::default(),
    };
    let cache = Arc::new(open(&file, bytes)?);
    let buffer_entries = if has("no-table") { 0 } else { 256 };
    let reactor = Reactor::spawn(ReactorConfig {
        index: 0,
        sync_failure: Default::default(),
        cache,
        buffer_entries,
    })?;
    let handle = reactor.handle();
    let machine = PlainFile {
        geometry,
        next_io: 0,
        ios: HashMap::new(),
        work: HashMap::new(),
        zeroes: vec![0; usize::try_from(ZEROES_BYTES)?].into(),
    };
    let key = handle
        .add_volume(Box::new(machine), Box::new(NoBackend))
        .await?;
    let host: Host = {
        let handle = handle.clone();
        Box::new(move |queue| {
            let message = Message::AddFrontEnd {
                key,
                front_end: Box::new(queue),
            };
            handle
                .send_blocking(message)
                .map_err(|gone| gone.to_string())
        })
    };

    let mut control = Control::default();
    if has("user-copy") {
        control = control.without_zero_copy();
    }
    eprintln!("features {:#x}", control.probe().await?.bits());
    let device = if has("recover") {
        let found = control.find_recoverable().await?;
        eprintln!("found {found:?}");
        let Some(found) = found.into_iter().find(|found| found.is_of(spec.volume)) else {
            bail!("nothing to recover")
        };
        control.recover(found.id, spec.clone(), host).await?
    } else {
        control.start(spec.clone(), host).await?
    };
    let link = device
        .link
        .as_ref()
        .map(|link| link.display().to_string())
        .unwrap_or_default();
    println!("ready {} {link} {}", device.node.display(), device.mode);

    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    tokio::select! {
        _ = terminate.recv() => {
            control.remove(device.id, spec, false).await?;
            handle.remove_volume(key).await?;
        }
        _ = interrupt.recv() => {}
    }
    tokio::task::spawn_blocking(move || reactor.shutdown()).await?;
    println!("ended");
    Ok(())
}
