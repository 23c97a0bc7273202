//! Whole connections: a client, a socket, a reactor, and a volume that mirrors its cache file.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::admission::ADDRESS_HANDSHAKES_MAX;
use super::client::{Ask, Client, ClientError};
use super::wire::{self, Put, RequestHeader, command, errno, option, reply};
use super::*;
use crate::qos::{TenantGate, VolumeGate};
use crate::reactor::testing::{Mirror, NoBackend, Seen, geometry, reactor, reactor_with};
use crate::reactor::{Machine, PageCache, Reactor, VolumeKey};
use quarry_objfmt::record::{Suspended, TenantSettings};
use quarry_objfmt::{Lba, Sectors};
use quarry_volume::{Event, IoId};

const BYTES: u64 = 64 << 20;

struct Directory(Vec<(String, Export)>);

impl ExportDirectory for Directory {
    fn lookup(&self, name: &str) -> Option<Export> {
        self.0
            .iter()
            .find(|(own, _)| own == name)
            .map(|(_, export)| export.clone())
    }

    fn list(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }
}

/// A served volume and all that is behind it.
pub(super) struct Bench {
    runtime: Option<tokio::runtime::Runtime>,
    reactor: Option<Reactor>,
    cache: Arc<fs::File>,
    key: VolumeKey,
    seen: Arc<Seen>,
    server: NbdServer,
    clients: Arc<Clients>,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(geometry(BYTES, 512), |_| {})
    }

    fn with(shape: Geometry, change: impl FnOnce(&mut Mirror)) -> Self {
        let reactor = reactor(shape.size.bytes().min(BYTES));
        Self::on(reactor, shape, change)
    }

    fn on(
        (reactor, cache): (Reactor, Arc<fs::File>),
        shape: Geometry,
        change: impl FnOnce(&mut Mirror),
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (mut mirror, seen) = Mirror::new(shape);
        change(&mut mirror);
        let handle = reactor.handle();
        let key = runtime
            .block_on(handle.add_volume(Box::new(mirror), Box::new(NoBackend)))
            .unwrap();
        let export = Export {
            reactor: handle,
            volume: key,
            geometry: shape,
            group: 0,
        };
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd");
        let clients = Arc::<Clients>::default();
        let server = NbdServer::new(
            Arc::new(Directory(vec![("acme/db".into(), export)])),
            Arc::clone(&clients),
        );
        let listener = {
            let _inside = runtime.enter();
            listen_unix(&socket).unwrap()
        };
        let serving = server.clone();
        runtime.spawn(async move { serving.serve_unix(listener).await });
        Self {
            runtime: Some(runtime),
            reactor: Some(reactor),
            cache,
            key,
            seen,
            server,
            clients,
            socket,
            _dir: dir,
        }
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket, "acme/db").unwrap()
    }

    fn handle(&self) -> ReactorHandle {
        self.reactor.as_ref().unwrap().handle()
    }

    /// The volume, under whatever name.
    pub fn export(&self) -> Export {
        Export {
            reactor: self.handle(),
            volume: self.key,
            geometry: geometry(BYTES, 512),
            group: 0,
        }
    }

    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        drop(self.runtime.as_ref().unwrap().spawn(task));
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.as_ref().unwrap().block_on(future)
    }

    /// What its volume holds back is done.
    fn release(&self) {
        let drain = Event::Drain {
            io: IoId(0),
            checkpoint: false,
        };
        self.block_on(self.handle().send_event(self.key, drain))
            .unwrap();
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///acme/db?socket={}", self.socket.display())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        drop(self.runtime.take());
        if let Some(reactor) = self.reactor.take() {
            reactor.shutdown();
        }
    }
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

fn within(limit: Duration, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < limit,
            "it does not come true in {limit:?}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn data_written_is_read_back_and_is_in_the_cache_file() {
    let bench = Bench::new();
    let mut client = bench.client();
    assert_eq!(client.size(), BYTES);
    assert_eq!(client.block_size(), 512);
    assert!(!client.read_only());
    for (n, len) in [512, 4096, 65536, 128 << 10, 1 << 20, 5 << 20, 32 << 20]
        .into_iter()
        .enumerate()
    {
        let data = noise(n as u64, len);
        let offset = 512 * (n as u64 + 1);
        client.write_at(offset, &data).unwrap();
        assert!(client.read_at(offset, u32::try_from(len).unwrap()).unwrap() == data);
        let mut raw = vec![0; len];
        bench.cache.read_exact_at(&mut raw, offset).unwrap();
        assert!(raw == data);
    }
    client.write_at_durably(0, &[7; 512]).unwrap();
    assert_eq!(bench.seen.durable_writes.load(Ordering::SeqCst), 1);
    client.flush().unwrap();
    client.trim(0, 1 << 20).unwrap();
    assert!(client.read_at(0, 1 << 20).unwrap().iter().all(|b| *b == 0));
    client.write_zeroes(1 << 20, 1 << 20).unwrap();
    assert!(
        client
            .read_at(1 << 20, 1 << 20)
            .unwrap()
            .iter()
            .all(|b| *b == 0)
    );
    assert_eq!(bench.seen.discards.load(Ordering::SeqCst), 1);
    client.disconnect().unwrap();
}

#[test]
fn requests_in_any_mix_and_depth_act_like_memory() {
    let bench = Bench::new();
    let mut client = bench.client();
    let mut random = StdRng::seed_from_u64(42);
    let mut model = vec![0_u8; 8 << 20];
    for round in 0..60 {
        // Disjoint blocks within a round, so that their order does not matter.
        let depth = random.random_range(1..100_usize);
        let mut reads = Vec::new();
        for n in 0..depth {
            let slot = (model.len() / 128) * (n % 128);
            let len = 512 * random.random_range(1..=64_usize);
            let at = slot + 512 * random.random_range(0..=64_usize);
            if random.random_bool(0.5) {
                let data = noise(round * 1000 + n as u64, len);
                client
                    .submit(Ask::Write(&data, random.random_bool(0.1)), at as u64)
                    .unwrap();
                model[at..at + len].copy_from_slice(&data);
            } else if random.random_bool(0.1) {
                client
                    .submit(Ask::WriteZeroes(u32::try_from(len).unwrap()), at as u64)
                    .unwrap();
                model[at..at + len].fill(0);
            } else {
                let cookie = client
                    .submit(Ask::Read(u32::try_from(len).unwrap()), at as u64)
                    .unwrap();
                reads.push((cookie, at, len));
            }
        }
        while client.under_way() > 0 {
            let answer = client.reap().unwrap();
            assert_eq!(answer.errno, 0);
            if let Some((_, at, len)) = reads.iter().find(|(cookie, ..)| *cookie == answer.cookie) {
                assert!(answer.data == model[*at..*at + *len], "round {round}");
            }
        }
    }
    assert!(client.read_at(0, 8 << 20).unwrap() == model);
}

#[test]
fn copy_in_and_out_is_the_same() {
    let bench = Bench::new();
    let mut client = bench.client();
    let data = noise(9, (20 << 20) + 777);
    let mut told = 0;
    assert_eq!(
        client
            .copy_in(&mut &data[..], 4096, &mut |n| told = n)
            .unwrap(),
        data.len() as u64
    );
    assert_eq!(told, data.len() as u64);
    let mut back = Vec::new();
    let whole = (data.len() as u64).next_multiple_of(512);
    client
        .copy_out(&mut back, 4096, whole, &mut |n| told = n)
        .unwrap();
    assert_eq!(told, whole);
    assert!(back[..data.len()] == data[..]);
    assert!(back[data.len()..].iter().all(|b| *b == 0));
}

#[test]
fn copy_to_what_is_full_blames_the_output_and_not_the_connection() {
    let bench = Bench::new();
    let mut client = bench.client();
    let mut room = [0; 512];
    let mut full = &mut room[..];
    let copied = client.copy_out(&mut full, 0, 4096, &mut |_| ());
    assert!(matches!(copied, Err(ClientError::Output(_))), "{copied:?}");
    let no_room = ClientError::Request {
        errno: errno::ENOSPC,
    };
    assert!(no_room.to_string().contains("No space left"), "{no_room}");
}

#[test]
fn requests_that_cannot_be_served_get_their_error_and_the_stream_goes_on() {
    let bench = Bench::with(geometry(BYTES, 4096), |_| {});
    let mut client = bench.client();
    assert_eq!(client.block_size(), 4096);
    let cases = [
        (client.write_at(BYTES, &[1; 4096]), errno::ENOSPC),
        (client.write_at(BYTES - 4096, &[1; 8192]), errno::ENOSPC),
        (client.write_at(512, &[1; 4096]), errno::EINVAL),
        (client.write_at(0, &[1; 512]), errno::EINVAL),
        (
            client.write_at(0, &noise(1, (32 << 20) + 4096)),
            errno::EINVAL,
        ),
        (client.read_at(BYTES, 4096).map(drop), errno::EINVAL),
        (
            client.read_at(u64::MAX - 4095, 4096).map(drop),
            errno::EINVAL,
        ),
        (client.read_at(0, u32::MAX).map(drop), errno::EINVAL),
        (client.trim(u64::MAX - 4095, 8192), errno::EINVAL),
    ];
    for (n, (result, wanted)) in cases.into_iter().enumerate() {
        assert!(
            matches!(result, Err(ClientError::Request { errno }) if errno == wanted),
            "case {n}: {result:?}"
        );
    }
    client.write_at(4096, &[3; 4096]).unwrap();
    assert_eq!(client.read_at(4096, 4096).unwrap(), [3; 4096]);
    assert!(client.read_at(0, 4096).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn volume_grown_takes_requests_of_connected_clients_up_to_its_new_end() {
    let bench = Bench::with(geometry(BYTES / 2, 512), |_| {});
    bench.cache.set_len(BYTES).unwrap();
    let mut client = bench.client();
    let behind = BYTES / 2;
    let refused = |result: Result<(), ClientError>, wanted| {
        assert!(
            matches!(result, Err(ClientError::Request { errno }) if errno == wanted),
            "{result:?}"
        );
    };
    refused(client.write_at(behind - 512, &[1; 1024]), errno::ENOSPC);
    let size = Sectors::from_bytes(BYTES).unwrap();
    assert!(
        bench
            .block_on(bench.handle().grow(bench.key, size))
            .unwrap()
    );
    client.write_at(behind - 512, &[2; 1024]).unwrap();
    assert_eq!(client.read_at(behind - 512, 1024).unwrap(), [2; 1024]);
    client.write_at(BYTES - 512, &[3; 512]).unwrap();
    refused(client.write_at(BYTES - 512, &[1; 1024]), errno::ENOSPC);
    refused(client.read_at(BYTES, 512).map(drop), errno::EINVAL);
    let gone = bench.handle().new_key();
    assert!(!bench.block_on(bench.handle().grow(gone, size)).unwrap());
}

#[test]
fn read_that_the_page_cache_fails_is_answered_past_it() {
    let pages = PageCache {
        // Of any place of it there is nothing to read.
        file: Arc::new(tempfile::tempfile().unwrap()),
        geometry: quarry_cache::Geometry {
            data_start: 0,
            segment_size: 1 << 20,
            segments: 64,
        },
    };
    let bench = Bench::on(
        reactor_with(BYTES, Some(pages)),
        geometry(BYTES, 512),
        |_| {},
    );
    let mut client = bench.client();
    let data = noise(1, 64 << 10);
    client.write_at(512, &data).unwrap();
    assert!(client.read_at(512, 64 << 10).unwrap() == data);
}

#[test]
fn export_read_only_refuses_writes() {
    let shape = Geometry {
        read_only: true,
        ..geometry(BYTES, 512)
    };
    let bench = Bench::with(shape, |_| {});
    let mut client = bench.client();
    assert!(client.read_only());
    let result = client.write_at(0, &[1; 512]);
    assert!(matches!(
        result,
        Err(ClientError::Request {
            errno: errno::EPERM
        })
    ));
    client.read_at(0, 512).unwrap();
    client.flush().unwrap();
}

#[test]
fn read_of_holes_and_fetched_bytes_is_put_together_in_memory() {
    let bench = Bench::with(geometry(BYTES, 512), |mirror| mirror.synthetic_from = 2048);
    let mut client = bench.client();
    for _ in 0..300 {
        client.submit(Ask::Read(8192), 1 << 20).unwrap();
    }
    for _ in 0..300 {
        let answer = client.reap().unwrap();
        assert!(answer.data[..4096].iter().all(|b| *b == 0));
        assert!(answer.data[4096..].iter().all(|b| *b == 0x5a));
    }
}

#[test]
fn export_unknown_is_refused_by_name() {
    let bench = Bench::new();
    let result = Client::connect(&bench.socket, "acme/other");
    assert!(
        matches!(result, Err(ClientError::Refused { .. })),
        "{result:?}"
    );
}

#[test]
fn long_read_of_which_a_part_fails_fails_once_and_the_connection_goes_on() {
    let unreadable = 5 << 20;
    let bench = Bench::on(reactor(BYTES), geometry(BYTES, 512), |mirror| {
        mirror.unreadable = Some(Lba::new(unreadable / 512));
    });
    let mut client = bench.client();
    for (offset, len, works) in [
        (512, 32 << 20, false),
        (unreadable - (4 << 20), 4 << 20, true),
        (unreadable - 512, 4 << 20, false),
        (unreadable + 512, 4 << 20, true),
    ] {
        match client.read_at(offset, len) {
            Ok(data) => assert!(works && data.len() == len as usize),
            Err(ClientError::Request { errno: errno::EIO }) => assert!(!works),
            Err(error) => panic!("{error}"),
        }
    }
    client.disconnect().unwrap();
}

#[test]
fn cache_device_that_fails_is_an_io_error() {
    // The volume is larger than its cache file: a read behind the file's end finds nothing.
    let bench = Bench::with(geometry(BYTES + 4096, 512), |_| {});
    let mut client = bench.client();
    let result = client.read_at(BYTES, 4096);
    assert!(
        matches!(result, Err(ClientError::Request { errno: errno::EIO })),
        "{result:?}"
    );
    client.read_at(0, 4096).unwrap();
}

#[test]
fn trim_with_fua_is_followed_by_a_flush() {
    let bench = Bench::new();
    let mut raw = Raw::go(&bench.socket);
    raw.ask(command::TRIM, command::FLAG_FUA, 0, 4096);
    assert_eq!(raw.simple_reply(), 0);
    assert_eq!(bench.seen.discards.load(Ordering::SeqCst), 1);
    assert_eq!(bench.seen.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn client_gone_with_requests_under_way_leaves_nothing_behind() {
    let bench = Bench::with(geometry(BYTES, 512), |mirror| mirror.hold = true);
    let mut client = bench.client();
    for n in 0..50 {
        client
            .submit(Ask::Write(&[1; 4096], false), n * 4096)
            .unwrap();
        client.submit(Ask::Read(4096), n * 4096).unwrap();
    }
    // A write whose payload never comes.
    let header = RequestHeader {
        flags: 0,
        command: command::WRITE,
        cookie: 1,
        offset: 0,
        len: 1 << 20,
    };
    let mut raw = Raw::go(&bench.socket);
    raw.0.write_all(&header.encode()).unwrap();
    raw.0.write_all(&[5; 1000]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(raw);
    drop(client);
    std::thread::sleep(Duration::from_millis(100));
    bench.release();
    let limit = Duration::from_secs(5);
    bench.block_on(async {
        tokio::time::timeout(limit, bench.handle().stop_front_ends(bench.key))
            .await
            .unwrap()
            .unwrap();
    });
    bench.client().read_at(0, 4096).unwrap();
}

/// Their places were kept for as long as the suspension lasted.
#[test]
fn clients_gone_while_their_tenant_is_stalled_give_their_places_back() {
    let tenant = Arc::new(TenantGate::default());
    let gate = VolumeGate::new(Arc::clone(&tenant));
    let suspend = |suspended| {
        tenant.set(&TenantSettings {
            suspended,
            ..TenantSettings::default()
        });
    };
    suspend(Some(Suspended::Stall));
    let bench = Bench::with(geometry(BYTES, 512), |mirror| {
        mirror.gate = Some(Arc::clone(&gate));
    });
    let asking = |count: usize| {
        let mut raw = Raw::go(&bench.socket);
        for _ in 0..count {
            raw.ask(command::READ, 0, 0, 4096);
        }
        raw
    };
    // The second has more requests than are taken of one, so that its socket is read no more.
    let [first, second, mut stays] = [1, 300, 2].map(asking);
    let limit = Duration::from_secs(5);
    within(limit, || gate.stats().held == 1 + 256 + 2);
    drop((first, second));
    within(limit, || bench.clients.stats().connections == 1);
    within(limit, || gate.stats().held == 2);
    suspend(None);
    for _ in 0..2 {
        assert_eq!(stays.simple_reply(), 0);
        stays.0.read_exact(&mut [0; 4096]).unwrap();
    }
}

#[test]
fn client_that_comes_while_the_last_ones_end_is_not_waited_for() {
    let bench = Bench::with(geometry(BYTES, 512), |mirror| mirror.hold = true);
    let mut client = bench.client();
    client.submit(Ask::Read(4096), 0).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let (handle, key) = (bench.handle(), bench.key);
    let (done, stopped) = tokio::sync::oneshot::channel();
    bench.spawn(async move { done.send(handle.stop_front_ends(key).await).unwrap() });
    std::thread::sleep(Duration::from_millis(100));
    // As one whose export was looked up just before it went.
    let mut late = Raw::go(&bench.socket);
    std::thread::sleep(Duration::from_millis(100));
    bench.release();
    let limit = Duration::from_secs(5);
    let stopped = bench.block_on(async { tokio::time::timeout(limit, stopped).await });
    stopped.unwrap().unwrap().unwrap();
    assert_eq!(late.0.read(&mut [0]).unwrap(), 0);
}

#[test]
fn volume_removed_with_requests_under_way_answers_each() {
    let bench = Bench::with(geometry(BYTES, 512), |mirror| mirror.hold = true);
    let mut client = bench.client();
    for n in 0..20 {
        client.submit(Ask::Read(4096), n * 4096).unwrap();
    }
    std::thread::sleep(Duration::from_millis(100));
    let machine = bench
        .block_on(bench.handle().remove_volume(bench.key))
        .unwrap();
    assert!(machine.is_some());
    for _ in 0..20 {
        assert_eq!(client.reap().unwrap().errno, errno::ESHUTDOWN);
    }
    assert!(client.reap().is_err());
    assert!(
        bench
            .block_on(bench.handle().remove_volume(bench.key))
            .unwrap()
            .is_none()
    );
}

#[test]
fn client_that_does_not_read_costs_bounded_memory_and_is_served_later() {
    let bench = Bench::new();
    let mut client = bench.client();
    // Far more than the connection may hold: the server stops reading, and goes on.
    let wanted = 300;
    let stream = UnixStream::connect(&bench.socket).unwrap();
    let mut raw = Raw::negotiated(stream, false);
    let mut sender = Raw(raw.0.try_clone().unwrap());
    let writer = std::thread::spawn(move || {
        for _ in 0..wanted {
            sender.ask(command::READ, 0, 0, 1 << 20);
        }
    });
    std::thread::sleep(Duration::from_millis(300));
    // Others are served meanwhile.
    client.write_at(0, &[9; 512]).unwrap();
    let mut data = vec![0; 1 << 20];
    for _ in 0..wanted {
        assert_eq!(raw.simple_reply(), 0);
        raw.0.read_exact(&mut data).unwrap();
    }
    writer.join().unwrap();
}

/// Together they would have eight times what their tenant may have.
#[test]
fn clients_that_do_not_read_have_bounded_memory_together_and_others_are_served() {
    let bench = Bench::new();
    let wanted = 64;
    let clients: Vec<Raw> = (0..32)
        .map(|_| {
            let mut raw = Raw::negotiated(UnixStream::connect(&bench.socket).unwrap(), false);
            for _ in 0..wanted {
                raw.ask(command::READ, 0, 0, 1 << 20);
            }
            raw
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let mut client = bench.client();
    client.write_at(0, &vec![9; 1 << 20]).unwrap();
    let used = bench.server.memory.used();
    assert!(used <= TENANT_MEMORY_BYTES_MAX + (33 << 20), "{used}");
    let mut data = vec![0; 1 << 20];
    for mut raw in clients {
        for _ in 0..wanted {
            assert_eq!(raw.simple_reply(), 0);
            raw.0.read_exact(&mut data).unwrap();
        }
    }
}

#[test]
fn reactor_shut_down_under_load_ends_and_closes_its_clients() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    for n in 0..100 {
        client
            .submit(Ask::Write(&[1; 4096], false), n * 4096)
            .unwrap();
    }
    let start = Instant::now();
    bench.reactor.take().unwrap().shutdown();
    assert!(start.elapsed() < Duration::from_secs(5));
    while client.reap().is_ok() {}
}

#[test]
fn volume_idle_gets_ticks() {
    let bench = Bench::new();
    within(Duration::from_secs(5), || {
        bench.seen.ticks.load(Ordering::SeqCst) >= 3
    });
    let handle = bench.handle();
    let found = bench
        .block_on(handle.inspect(bench.key, |mirror: &Mirror| mirror.geometry().size.bytes()))
        .unwrap();
    assert_eq!(found, Some(BYTES));
}

/// A client by hand.
struct Raw(UnixStream);

impl Raw {
    fn go(socket: &Path) -> Self {
        Self::negotiated(UnixStream::connect(socket).unwrap(), false)
    }

    fn greeted(stream: UnixStream) -> Self {
        let mut raw = Self(stream);
        raw.0
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut greeting = [0; 18];
        raw.0.read_exact(&mut greeting).unwrap();
        let mut flags = Vec::new();
        flags.put_u32(3);
        raw.0.write_all(&flags).unwrap();
        raw
    }

    fn negotiated(stream: UnixStream, structured: bool) -> Self {
        let mut raw = Self::greeted(stream);
        if structured {
            assert_eq!(
                raw.option(option::STRUCTURED_REPLY, &[]),
                [(reply::ACK, vec![])]
            );
        }
        let answers = raw.option(option::GO, &go_payload("acme/db"));
        assert_eq!(answers.last().unwrap().0, reply::ACK);
        raw
    }

    fn option(&mut self, code: u32, payload: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut out = Vec::new();
        wire::put_option(&mut out, code, payload);
        self.0.write_all(&out).unwrap();
        let mut answers = Vec::new();
        loop {
            let mut head = [0; wire::OPTION_REPLY_LEN];
            self.0.read_exact(&mut head).unwrap();
            let mut reader = wire::Reader::new(&head);
            assert_eq!(reader.u64(), Some(wire::OPTION_REPLY_MAGIC));
            assert_eq!(reader.u32(), Some(code));
            let (kind, len) = (reader.u32().unwrap(), reader.u32().unwrap());
            let mut payload = vec![0; len as usize];
            self.0.read_exact(&mut payload).unwrap();
            answers.push((kind, payload));
            if kind == reply::ACK || kind & reply::ERROR != 0 {
                return answers;
            }
        }
    }

    fn ask(&mut self, command: u16, flags: u16, offset: u64, len: u32) {
        let header = RequestHeader {
            flags,
            command,
            cookie: 77,
            offset,
            len,
        };
        self.0.write_all(&header.encode()).unwrap();
    }

    fn simple_reply(&mut self) -> u32 {
        let mut head = [0; wire::SIMPLE_REPLY_LEN];
        self.0.read_exact(&mut head).unwrap();
        let mut reader = wire::Reader::new(&head);
        assert_eq!(reader.u32(), Some(wire::SIMPLE_REPLY_MAGIC));
        let errno = reader.u32().unwrap();
        assert_eq!(reader.u64(), Some(77));
        errno
    }

    fn closed(&mut self) {
        let mut rest = Vec::new();
        // A reset is a close as well.
        let _ = self.0.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{rest:?}");
    }
}

fn go_payload(name: &str) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.put_u32(u32::try_from(name.len()).unwrap());
    payload.extend_from_slice(name.as_bytes());
    payload.put_u16(0);
    payload
}

#[test]
fn handshake_options_are_answered_one_by_one() {
    let bench = Bench::new();
    let mut raw = Raw::greeted(UnixStream::connect(&bench.socket).unwrap());
    let list = raw.option(option::LIST, &[]);
    assert_eq!(
        list[0],
        (reply::SERVER, [&[0, 0, 0, 7][..], b"acme/db"].concat())
    );
    assert_eq!(list[1].0, reply::ACK);
    assert_eq!(raw.option(option::LIST, &[1])[0].0, reply::ERR_INVALID);
    assert_eq!(raw.option(option::STARTTLS, &[])[0].0, reply::ERR_POLICY);
    assert_eq!(raw.option(11, &[])[0].0, reply::ERR_UNSUP);
    assert_eq!(raw.option(4711, &[0; 16384])[0].0, reply::ERR_UNSUP);
    assert_eq!(
        raw.option(option::GO, &go_payload("none"))[0].0,
        reply::ERR_UNKNOWN
    );
    assert_eq!(raw.option(option::GO, &[0xff; 30])[0].0, reply::ERR_INVALID);
    let mut query = go_payload("acme/db");
    query.put_u16(0);
    assert_eq!(
        raw.option(option::SET_META_CONTEXT, &query)[0].0,
        reply::ERR_INVALID
    );
    assert_eq!(raw.option(option::STRUCTURED_REPLY, &[])[0].0, reply::ACK);
    assert_eq!(
        raw.option(option::SET_META_CONTEXT, &query)[0].0,
        reply::ACK
    );
    assert_eq!(
        raw.option(option::LIST_META_CONTEXT, &query)[0].0,
        reply::META_CONTEXT
    );
    let info = raw.option(option::INFO, &go_payload("acme/db"));
    assert_eq!(
        info.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(),
        [reply::INFO, reply::INFO, reply::ACK]
    );
    assert_eq!(info[0].1.len(), 12);
    assert_eq!(info[1].1.len(), 14);
    assert_eq!(raw.option(option::ABORT, &[])[0].0, reply::ACK);
    raw.closed();
}

#[test]
fn handshake_of_the_old_kind_gets_size_flags_and_zeroes() {
    let bench = Bench::new();
    let mut stream = UnixStream::connect(&bench.socket).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    let mut out = Vec::new();
    out.put_u32(1);
    wire::put_option(&mut out, option::EXPORT_NAME, b"acme/db");
    // Requests may follow at once.
    let header = RequestHeader {
        flags: 0,
        command: command::READ,
        cookie: 77,
        offset: 0,
        len: 512,
    };
    out.extend_from_slice(&header.encode());
    stream.write_all(&out).unwrap();
    let mut answer = [0; 10 + wire::EXPORT_NAME_ZEROES];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(wire::Reader::new(&answer).u64(), Some(BYTES));
    assert!(answer[10..].iter().all(|b| *b == 0));
    let mut raw = Raw(stream);
    assert_eq!(raw.simple_reply(), 0);
}

#[test]
fn handshake_of_nonsense_is_hung_up_on() {
    let bench = Bench::new();
    // Client flags that nobody offered.
    let mut raw = Raw(UnixStream::connect(&bench.socket).unwrap());
    raw.0.read_exact(&mut [0; 18]).unwrap();
    raw.0.write_all(&[0xff; 4]).unwrap();
    raw.closed();
    // No magic.
    let mut raw = Raw::greeted(UnixStream::connect(&bench.socket).unwrap());
    raw.0.write_all(&[0x41; 16]).unwrap();
    raw.closed();
    // An option of 4 GiB.
    let mut raw = Raw::greeted(UnixStream::connect(&bench.socket).unwrap());
    let mut out = Vec::new();
    out.put_u64(wire::OPTION_MAGIC);
    out.put_u32(option::GO);
    out.put_u32(u32::MAX);
    raw.0.write_all(&out).unwrap();
    raw.closed();
    // Options without end.
    let mut raw = Raw::greeted(UnixStream::connect(&bench.socket).unwrap());
    for _ in 0..64 {
        assert_eq!(raw.option(99, &[])[0].0, reply::ERR_UNSUP);
    }
    raw.closed();
    // And an unknown export by the old way.
    let mut raw = Raw::greeted(UnixStream::connect(&bench.socket).unwrap());
    let mut out = Vec::new();
    wire::put_option(&mut out, option::EXPORT_NAME, &[0xff; 20]);
    raw.0.write_all(&out).unwrap();
    raw.closed();
    bench.client().read_at(0, 512).unwrap();
}

#[test]
fn transmission_of_nonsense_is_hung_up_on() {
    let bench = Bench::new();
    for seed in 0..20 {
        let mut raw = Raw::go(&bench.socket);
        // The server may hang up while this side still writes.
        let _ = raw.0.write_all(&noise(seed, 5000));
        raw.closed();
    }
    let mut raw = Raw::go(&bench.socket);
    raw.ask(99, 0, 0, 0);
    assert_eq!(raw.simple_reply(), errno::EINVAL);
    raw.ask(command::READ, 0, 0, 0);
    assert_eq!(raw.simple_reply(), errno::EINVAL);
    raw.ask(command::WRITE, 0x8000, 0, 1024);
    raw.0.write_all(&[0; 1024]).unwrap();
    assert_eq!(raw.simple_reply(), errno::EINVAL);
    raw.ask(command::DISC, 0, 0, 0);
    raw.closed();
}

#[test]
fn reads_with_structured_replies_are_one_chunk_or_an_error() {
    let bench = Bench::new();
    bench.cache.write_all_at(&[0x33; 4096], 8192).unwrap();
    let mut raw = Raw::negotiated(UnixStream::connect(&bench.socket).unwrap(), true);
    raw.ask(command::READ, command::FLAG_DF, 8192, 4096);
    let mut chunk = vec![0; 28 + 4096];
    raw.0.read_exact(&mut chunk).unwrap();
    assert_eq!(chunk[..28], *wire::ReplyHead::data(77, 8192, 4096).bytes());
    assert!(chunk[28..].iter().all(|b| *b == 0x33));
    raw.ask(command::READ, 0, BYTES, 512);
    let mut chunk = vec![0; 26];
    raw.0.read_exact(&mut chunk).unwrap();
    assert_eq!(chunk, wire::ReplyHead::error(77, errno::EINVAL).bytes());
    raw.ask(command::FLUSH, 0, 0, 0);
    assert_eq!(raw.simple_reply(), 0);
}

#[test]
fn block_status_of_a_range_is_its_runs_and_is_refused_without_its_context() {
    let bench = Bench::new();
    let mut client = Client::connect_mapped(&bench.socket, "acme/db").unwrap();
    assert!(client.has_status());
    let run = |zero| client::Run { len: 4096, zero };
    let expected = [run(false), run(true), run(false)];
    assert_eq!(client.status_at(0, 3 << 12).unwrap(), expected);
    // Reads in chunks, errors and all else go on beside it.
    bench.cache.write_all_at(&[0x33; 4096], 8192).unwrap();
    assert_eq!(client.read_at(8192, 4096).unwrap(), [0x33; 4096]);
    assert!(matches!(
        client.status_at(BYTES, 4096),
        Err(ClientError::Request {
            errno: errno::EINVAL
        })
    ));
    client.flush().unwrap();
    // A long range is answered in part.
    let runs = client.status_at(0, 32 << 20).unwrap();
    assert_eq!(runs.len(), wire::STATUS_BYTES_MAX / wire::STATUS_RUN_LEN);

    assert!(!bench.client().has_status());
    let mut raw = Raw::negotiated(UnixStream::connect(&bench.socket).unwrap(), true);
    raw.ask(command::BLOCK_STATUS, 0, 0, 4096);
    let mut chunk = vec![0; 26];
    raw.0.read_exact(&mut chunk).unwrap();
    assert_eq!(chunk, wire::ReplyHead::error(77, errno::EINVAL).bytes());
}

#[test]
fn block_status_of_one_run_is_one() {
    let bench = Bench::new();
    let mut raw = Raw::greeted(UnixStream::connect(&bench.socket).unwrap());
    raw.option(option::STRUCTURED_REPLY, &[]);
    let mut query = Vec::new();
    query.put_u32(7);
    query.extend_from_slice(b"acme/db");
    query.put_u32(1);
    query.put_u32(15);
    query.extend_from_slice(b"base:allocation");
    let answers = raw.option(option::SET_META_CONTEXT, &query);
    assert_eq!(answers[0].1, b"\0\0\0\x01base:allocation");
    raw.option(option::GO, &go_payload("acme/db"));
    raw.ask(command::BLOCK_STATUS, command::FLAG_REQ_ONE, 4096, 1 << 20);
    let mut chunk = [0; 32];
    raw.0.read_exact(&mut chunk).unwrap();
    assert_eq!(chunk[..24], *wire::ReplyHead::status(77, 8).bytes());
    assert_eq!(chunk[24..], [0, 0, 16, 0, 0, 0, 0, 3]);
}

#[test]
fn requests_in_single_bytes_are_served() {
    let bench = Bench::new();
    let mut raw = Raw::go(&bench.socket);
    let header = RequestHeader {
        flags: 0,
        command: command::WRITE,
        cookie: 77,
        offset: 512,
        len: 512,
    };
    for byte in header.encode().into_iter().chain([0x6b; 512]) {
        raw.0.write_all(&[byte]).unwrap();
    }
    assert_eq!(raw.simple_reply(), 0);
    assert_eq!(bench.client().read_at(512, 512).unwrap(), [0x6b; 512]);
}

#[test]
fn socket_of_a_dead_daemon_is_replaced_and_of_a_live_one_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _inside = runtime.enter();
    let first = listen_unix(&path).unwrap();
    assert!(matches!(listen_unix(&path), Err(ListenError::InUse { .. })));
    drop(first);
    drop(listen_unix(&path).unwrap());
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(matches!(
        listen_unix(&file),
        Err(ListenError::NotASocket { .. })
    ));
}

#[test]
fn socket_path_is_refused_before_it_is_needed_unless_who_listens_there_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    may_listen_unix(&path, None).unwrap();
    assert!(!path.exists());
    let here = std::process::id().cast_signed();
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    may_listen_unix(&path, Some(here)).unwrap();
    for ends in [None, Some(here + 1)] {
        let refused = may_listen_unix(&path, ends);
        assert!(matches!(refused, Err(ListenError::InUse { .. })));
    }
    drop(listener);
    may_listen_unix(&path, None).unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let refused = may_listen_unix(&file, Some(here));
    assert!(matches!(refused, Err(ListenError::NotASocket { .. })));
    let long = "x".repeat(120);
    for path in ["none/nbd.sock", "file/nbd.sock", long.as_str()] {
        let refused = may_listen_unix(&dir.path().join(path), None);
        assert!(matches!(refused, Err(ListenError::Io { .. })), "{path}");
    }
}

/// A server on loopback, and its address.
fn over_tcp(bench: &Bench) -> std::net::SocketAddr {
    let directory = Directory(vec![("acme/db".into(), bench.export())]);
    let server = NbdServer::new(Arc::new(directory), Arc::default());
    let listener = bench.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    bench.spawn(async move { server.serve_tcp(listener).await });
    address
}

#[test]
fn client_over_tcp_is_served() {
    let bench = Bench::new();
    let mut stream = std::net::TcpStream::connect(over_tcp(&bench)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    let mut out = Vec::new();
    out.put_u32(3);
    wire::put_option(&mut out, option::EXPORT_NAME, b"acme/db");
    let header = RequestHeader {
        flags: 0,
        command: command::READ,
        cookie: 77,
        offset: 0,
        len: 1 << 20,
    };
    out.extend_from_slice(&header.encode());
    stream.write_all(&out).unwrap();
    let mut answer = vec![0; 10 + 16 + (1 << 20)];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(wire::Reader::new(&answer).u64(), Some(BYTES));
}

#[test]
fn client_is_served_however_many_say_nothing() {
    let bench = Bench::new();
    let address = over_tcp(&bench);
    let greeted = || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream
    };
    let mut silent: Vec<_> = (0..ADDRESS_HANDSHAKES_MAX).map(|_| greeted()).collect();
    let mut stream = greeted();
    // The oldest gave way.
    let limit = Some(Duration::from_secs(5));
    silent[0].set_read_timeout(limit).unwrap();
    assert_eq!(silent[0].read(&mut [0]).unwrap(), 0);
    let mut out = Vec::new();
    out.put_u32(3);
    wire::put_option(&mut out, option::EXPORT_NAME, b"acme/db");
    stream.write_all(&out).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
}

/// Runs a tool; `None`, and a word about it, if it is not installed.
fn tool(name: &str, args: &[&str]) -> Option<String> {
    match Command::new(name).args(args).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{name} {args:?}: {text}{errors}");
            Some(text)
        }
        Err(error) => {
            quarry_tests::skip(&format!("{name}: {error}"));
            None
        }
    }
}

#[test]
fn libnbd_tools_see_and_copy_the_volume() {
    let bench = Bench::new();
    let uri = bench.uri();
    let Some(text) = tool("nbdinfo", &[&uri]) else {
        return;
    };
    assert!(
        text.contains("acme/db") && text.contains(&BYTES.to_string()),
        "{text}"
    );
    let list = format!("nbd+unix:///?socket={}", bench.socket.display());
    let Some(text) = tool("nbdinfo", &["--list", &list]) else {
        return;
    };
    assert!(text.contains("acme/db"), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let (source, back) = (dir.path().join("source"), dir.path().join("back"));
    let data = noise(3, usize::try_from(BYTES).unwrap());
    fs::write(&source, &data).unwrap();
    if tool("nbdcopy", &["--flush", source.to_str().unwrap(), &uri]).is_none() {
        return;
    }
    tool("nbdcopy", &[&uri, back.to_str().unwrap()]);
    assert!(fs::read(&back).unwrap() == data);
}

#[test]
fn qemu_img_converts_there_and_compares() {
    let bench = Bench::new();
    let uri = bench.uri();
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let mut data = noise(4, usize::try_from(BYTES).unwrap());
    data[1 << 20..30 << 20].fill(0);
    fs::write(&source, &data).unwrap();
    let source = source.to_str().unwrap();
    if tool(
        "qemu-img",
        &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri],
    )
    .is_none()
    {
        return;
    }
    let compare = tool(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", source, &uri],
    )
    .unwrap();
    assert!(compare.contains("identical"), "{compare}");
}
