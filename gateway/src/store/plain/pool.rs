//! Connections to one server that are kept for the next request.

use std::io;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Socket;
use crate::store::s3::IDLE_TIME_MAX;

/// Most connections kept without use. (In use are no more than the lane has places.)
const IDLE_MAX: usize = 32;

/// The connections without use, the newest last.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<(Socket, Instant)>>);

impl Pool {
    /// One that is still good, as far as can be seen.
    pub(super) fn take(&self) -> Option<Socket> {
        let mut idle = self.0.lock();
        while let Some((socket, since)) = idle.pop() {
            if since.elapsed() >= IDLE_TIME_MAX {
                // All below it are older.
                idle.clear();
                return None;
            }
            if is_quiet(&socket) {
                return Some(socket);
            }
        }
        None
    }

    /// Keeps a connection on which nothing is under way.
    pub(super) fn give(&self, socket: Socket) {
        let mut idle = self.0.lock();
        idle.retain(|(_, since)| since.elapsed() < IDLE_TIME_MAX);
        if idle.len() == IDLE_MAX {
            idle.remove(0);
        }
        idle.push((socket, Instant::now()));
    }
}

/// Connects to `authority` (`host:port`).
pub(super) async fn connect(authority: &str, time_max: Duration) -> io::Result<Socket> {
    let stream = timeout(time_max, TcpStream::connect(authority)).await??;
    stream.set_nodelay(true)?;
    Ok(Socket::Watched(stream))
}

/// Whether nothing has come that nobody asked for: neither the other end's closing, nor more of an
/// answer than it had announced, which the next one would be taken from.
fn is_quiet(socket: &Socket) -> bool {
    let mut byte = [0_u8; 1];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    recv(socket, &mut byte, flags).is_err_and(|error| error == Errno::AGAIN)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    /// A pool that was given so many connections, and their other ends.
    async fn pool_of(count: usize) -> (Pool, Vec<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let (pool, mut there) = (Pool::default(), Vec::new());
        for _ in 0..count {
            pool.give(connect(&authority, Duration::from_secs(5)).await.unwrap());
            there.push(listener.accept().await.unwrap().0);
        }
        (pool, there)
    }

    #[tokio::test]
    async fn pool_gives_no_connection_that_was_closed_or_has_something_to_read() {
        let (pool, mut there) = pool_of(3).await;
        there[2].write_all(b"x").await.unwrap();
        drop(there.remove(1));
        tokio::time::sleep(Duration::from_millis(20)).await;
        let good = pool.take().expect("the oldest is good");
        assert_eq!(
            good.into_watched().unwrap().local_addr().unwrap(),
            there[0].peer_addr().unwrap()
        );
        assert!(pool.take().is_none());
    }

    #[tokio::test]
    async fn pool_keeps_no_more_than_its_bound() {
        let (pool, _there) = pool_of(IDLE_MAX + 3).await;
        assert_eq!(pool.0.lock().len(), IDLE_MAX);
    }
}
