//! A TCP proxy between the daemon and its store that can fail on command, and that counts bytes and reads of chunks.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// What the proxy does at the moment; shared by all of its threads.
#[derive(Debug, Default)]
struct State {
    cut: AtomicBool,
    stop: AtomicBool,
    delay_ms: AtomicU64,
    /// Requests whose line has this in it are held.
    hung: Mutex<Option<String>>,
    /// Told of each change of it, and of the end.
    hung_changed: Condvar,
    upstream_bytes: AtomicU64,
    downstream_bytes: AtomicU64,
    chunk_gets: AtomicU64,
    chunk_bytes: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

/// A proxy on a loopback port; it ends when dropped.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    state: Arc<State>,
}

impl FaultProxy {
    /// Starts a proxy in front of `upstream`.
    ///
    /// # Errors
    /// If no port can be had.
    pub fn start(upstream: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        thread::Builder::new()
            .name("fault-proxy".to_owned())
            .spawn(move || accept(&listener, upstream, &shared))?;
        Ok(Self { address, state })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Breaks all connections, and every new one at once, until [`FaultProxy::heal`].
    pub fn cut(&self) {
        self.state.cut.store(true, Ordering::SeqCst);
        self.state.close_all();
    }

    /// Lets connections through again.
    pub fn heal(&self) {
        self.state.cut.store(false, Ordering::SeqCst);
    }

    /// Holds each piece of what the daemon sends for `delay` before it goes on to the store.
    pub fn delay(&self, delay: Duration) {
        let milliseconds = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.state.delay_ms.store(milliseconds, Ordering::SeqCst);
    }

    /// Holds each request whose line has `words` in it (`/t/acme/`, say), with its connection, until it is called anew.
    pub fn hang(&self, words: Option<&str>) {
        *self.state.hung() = words.map(str::to_owned);
        self.state.hung_changed.notify_all();
    }

    /// Bytes that went to the store so far, protocol included.
    #[must_use]
    pub fn upstream_bytes(&self) -> u64 {
        self.state.upstream_bytes.load(Ordering::SeqCst)
    }

    /// Bytes that came from the store so far, protocol included.
    #[must_use]
    pub fn downstream_bytes(&self) -> u64 {
        self.state.downstream_bytes.load(Ordering::SeqCst)
    }

    /// Reads of chunks that went to the store so far, and the bytes that they asked for.
    #[must_use]
    pub fn chunk_reads(&self) -> (u64, u64) {
        let read = |count: &AtomicU64| count.load(Ordering::SeqCst);
        (read(&self.state.chunk_gets), read(&self.state.chunk_bytes))
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        // With the lock, so that nobody who looks at both begins to wait in between.
        let hung = self.state.hung();
        self.state.hung_changed.notify_all();
        drop(hung);
        self.state.close_all();
        // Wakes the accepting thread, which then sees that it is to stop.
        drop(TcpStream::connect(self.address));
    }
}

impl State {
    fn close_all(&self) {
        let mut open = self.open.lock().expect("no holder of this lock panics");
        for stream in open.drain(..) {
            // It may be closed already, which is what is wanted.
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    fn hung(&self) -> MutexGuard<'_, Option<String>> {
        self.hung.lock().expect("no holder of this lock panics")
    }

    /// Waits for as long as `piece` begins a request that is to be held. Costs others next to nothing, held or not: it is
    /// asked of every piece of every body, and a stopwatch may run beside.
    fn hold(&self, piece: &[u8]) {
        // What is in the middle of a body may look like anything, but begins with no method.
        let is_request = ["GET ", "PUT ", "HEAD ", "POST ", "DELETE "];
        let is_request = is_request
            .iter()
            .any(|method| piece.starts_with(method.as_bytes()));
        if !is_request {
            return;
        }
        let line = piece
            .split(|byte| *byte == b'\r')
            .next()
            .unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let is_held = |hung: &mut Option<String>| {
            let is_hung = hung.as_ref().is_some_and(|words| line.contains(words));
            is_hung && !self.stop.load(Ordering::SeqCst)
        };
        let held = self.hung_changed.wait_while(self.hung(), is_held);
        drop(held.expect("no holder of this lock panics"));
    }

    fn remember(&self, stream: &TcpStream) -> io::Result<()> {
        let copy = stream.try_clone()?;
        self.open
            .lock()
            .expect("no holder of this lock panics")
            .push(copy);
        Ok(())
    }
}

fn accept(listener: &TcpListener, upstream: SocketAddr, state: &Arc<State>) {
    for client in listener.incoming() {
        if state.stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(client) = client else { continue };
        if !state.cut.load(Ordering::SeqCst)
            && let Err(error) = join(client, upstream, state)
        {
            eprintln!("fault proxy: {upstream}: {error}");
        }
    }
}

/// Joins a new connection to the store, a thread for each direction.
fn join(client: TcpStream, upstream: SocketAddr, state: &Arc<State>) -> io::Result<()> {
    let server = TcpStream::connect(upstream)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
        state.remember(stream)?;
    }
    if state.cut.load(Ordering::SeqCst) {
        // A cut came in between and may have missed these two.
        state.close_all();
    }
    let up = (client.try_clone()?, server.try_clone()?, Arc::clone(state));
    let down = (server, client, Arc::clone(state));
    thread::spawn(move || {
        pump(up.0, up.1, &up.2.upstream_bytes, |piece| {
            if let Some(len) = chunk_read(piece) {
                up.2.chunk_gets.fetch_add(1, Ordering::SeqCst);
                up.2.chunk_bytes.fetch_add(len, Ordering::SeqCst);
            }
            up.2.hold(piece);
            let delay = up.2.delay_ms.load(Ordering::SeqCst);
            thread::sleep(Duration::from_millis(delay));
        });
    });
    thread::spawn(move || pump(down.0, down.1, &down.2.downstream_bytes, |_| {}));
    Ok(())
}

/// The bytes that a request asks for, if it is a ranged read of a chunk. The daemon sends the head of a request
/// in one piece, and none before the last one was answered.
fn chunk_read(piece: &[u8]) -> Option<u64> {
    let (line, head) = std::str::from_utf8(piece).ok()?.split_once("\r\n")?;
    if !line.starts_with("GET ") || !line.contains("/chunk/") {
        return None;
    }
    let range = head.lines().find_map(|field| {
        let (name, value) = field.split_once(": bytes=")?;
        name.eq_ignore_ascii_case("range").then_some(value)
    })?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    Some(last + 1 - first)
}

/// Copies until either end closes, then closes both; each piece is shown to `before` first.
fn pump(mut from: TcpStream, mut to: TcpStream, count: &AtomicU64, before: impl Fn(&[u8])) {
    let mut buffer = vec![0; 256 << 10];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        before(&buffer[..len]);
        count.fetch_add(len as u64, Ordering::SeqCst);
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    // Either may be closed already, which is what is wanted.
    drop(from.shutdown(Shutdown::Both));
    drop(to.shutdown(Shutdown::Both));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).is_ok() {
                        stream.write_all(&byte).unwrap();
                    }
                });
            }
        });
        address
    }

    fn call(address: SocketAddr) -> io::Result<u8> {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"x")?;
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    #[test]
    fn chunk_read_is_told_by_its_line_and_range() {
        let request =
            |line: &str| format!("{line} HTTP/1.1\r\nHost: a\r\nRange: bytes=512-1023\r\n\r\n");
        let read = request("GET /b/t/acme/v/1/chunk/2/3");
        assert_eq!(chunk_read(read.as_bytes()), Some(512));
        for line in ["PUT /b/t/acme/v/1/chunk/2/3", "GET /b/t/acme/v/1/map/2/3"] {
            assert_eq!(chunk_read(request(line).as_bytes()), None);
        }
        assert_eq!(chunk_read(b"GET /chunk/1 HTTP/1.1\r\n\r\n"), None);
        assert_eq!(chunk_read(&[0xff; 40]), None);
    }

    #[test]
    fn proxy_cut_and_healed_breaks_and_mends_connections() {
        let proxy = FaultProxy::start(echo()).unwrap();
        let mut old = TcpStream::connect(proxy.address()).unwrap();
        assert_eq!(call(proxy.address()).unwrap(), b'x');
        assert_eq!((proxy.upstream_bytes(), proxy.downstream_bytes()), (1, 1));
        proxy.cut();
        assert!(call(proxy.address()).is_err());
        assert!(!matches!(old.read(&mut [0]), Ok(1..)));
        proxy.heal();
        assert_eq!(call(proxy.address()).unwrap(), b'x');
    }
}
