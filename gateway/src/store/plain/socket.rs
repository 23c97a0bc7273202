//! A connection to the store, waited for by whoever polls: the runtime, or a reactor for an [errand](crate::reactor::errand).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use bytes::BufMut;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::TcpStream;

use crate::reactor::errand;

/// A connection, which does not block.
#[derive(Debug)]
pub(in crate::store) enum Socket {
    /// Nobody watches it.
    Idle(std::net::TcpStream),
    /// The runtime does: what comes wakes one of its threads.
    Watched(TcpStream),
}

impl Socket {
    /// As it is best used by whoever polls: a reactor is not to wake the runtime with each answer.
    pub(in crate::store) fn for_this_thread(self) -> io::Result<Self> {
        match self {
            Self::Watched(stream) if errand::is_here() => Ok(Self::Idle(stream.into_std()?)),
            socket => Ok(socket),
        }
    }

    /// As the runtime's.
    pub(in crate::store) fn into_watched(self) -> io::Result<TcpStream> {
        match self {
            Self::Idle(stream) => TcpStream::from_std(stream),
            Self::Watched(stream) => Ok(stream),
        }
    }

    fn watched(&mut self) -> io::Result<&mut TcpStream> {
        if let Self::Idle(stream) = self {
            *self = Self::Watched(TcpStream::from_std(stream.try_clone()?)?);
        }
        match self {
            Self::Watched(stream) => Ok(stream),
            Self::Idle(_) => unreachable!("it was just made the runtime's"),
        }
    }

    /// Sends all of `bytes`.
    pub(in crate::store) async fn send_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if let Self::Idle(stream) = self {
            match send(&*stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
            if bytes.is_empty() {
                return Ok(());
            }
        }
        self.watched()?.write_all(bytes).await
    }

    /// Receives what there is, up to what `into` has room for; 0: the other end is closed.
    pub(in crate::store) async fn receive(&mut self, into: &mut impl BufMut) -> io::Result<usize> {
        // SAFETY: nothing but what is received is written to it.
        let room = unsafe { into.chunk_mut().as_uninit_slice_mut() };
        let count = self.receive_to(room, RecvFlags::empty()).await?;
        // SAFETY: so many bytes of it were received.
        unsafe { into.advance_mut(count) };
        Ok(count)
    }

    /// Looks at what there is and leaves it.
    pub(in crate::store) async fn peek(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // SAFETY: bytes that are there may be taken for bytes that need not be, as only bytes are written to them.
        let room = unsafe { &mut *(std::ptr::from_mut(into) as *mut [MaybeUninit<u8>]) };
        self.receive_to(room, RecvFlags::PEEK).await
    }

    async fn receive_to(
        &mut self,
        room: &mut [MaybeUninit<u8>],
        flags: RecvFlags,
    ) -> io::Result<usize> {
        loop {
            let mut take = |fd: BorrowedFd<'_>| {
                let (_, count) = recv(fd, &mut *room, flags | RecvFlags::DONTWAIT)?;
                Ok(count)
            };
            let taken = match self {
                Self::Idle(stream) => take(stream.as_fd()),
                Self::Watched(stream) => stream.try_io(Interest::READABLE, || take(stream.as_fd())),
            };
            match taken {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                taken => return taken,
            }
        }
    }

    /// Until there may be something to receive.
    async fn readable(&mut self) -> io::Result<()> {
        if let Self::Idle(stream) = self
            && errand::is_here()
        {
            errand::readable(stream.as_raw_fd()).await;
            return Ok(());
        }
        self.watched()?.readable().await
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Idle(stream) => stream.as_fd(),
            Self::Watched(stream) => stream.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream as Blocking};
    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;

    use super::super::tests::{RANGE, answer, body, settings};
    use super::super::{PlainReads, TIMES};
    use crate::reactor::testing::Goer;

    const LIMIT: Duration = Duration::from_secs(10);
    /// Longer than a reactor waits for an errand.
    const LONG: Duration = Duration::from_millis(450);
    const TRIES: usize = 20;

    /// What a reactor brings of a server, where it was done, and that server's end of the connections.
    fn goer() -> (Goer, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(&listener.local_addr().unwrap().to_string());
        let keys = crate::store::credentials(&settings).unwrap();
        let reads = Arc::new(PlainReads::open(&settings, keys, TIMES).unwrap());
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        let goer = Goer::new(runtime, move || {
            let reads = Arc::clone(&reads);
            async move {
                let got = reads.get_parts("t/key", RANGE, &[200, 312], 16).await;
                let thread = std::thread::current();
                let place = thread.name().unwrap_or_default();
                match got {
                    Ok(parts) => Bytes::from(format!("{place}: {}", parts.concat().len())),
                    Err(error) => Bytes::from(format!("{place}: {error}")),
                }
            }
        });
        (goer, listener)
    }

    fn hear(stream: &mut Blocking) {
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            request.push(byte[0]);
        }
    }

    /// The server's end of the connection that the first errand makes, which is the runtime's to make.
    fn connected(goer: &Goer, listener: &TcpListener) -> Blocking {
        goer.send();
        let mut there = listener.accept().unwrap().0;
        there.set_nodelay(true).unwrap();
        hear(&mut there);
        there.write_all(whole().as_bytes()).unwrap();
        assert_eq!(goer.wait(LIMIT).unwrap(), "tokio-rt-worker: 512");
        there
    }

    fn whole() -> String {
        answer(&body())
    }

    /// Has the reactor bring an answer that comes in pieces of this length. On a machine that is busy one may take so long
    /// that it is handed over.
    fn bring_here(goer: &Goer, there: &mut Blocking, piece_len: usize) {
        for _ in 0..TRIES {
            goer.send();
            hear(there);
            for piece in whole().as_bytes().chunks(piece_len) {
                there.write_all(piece).unwrap();
                std::thread::sleep(Duration::from_micros(200));
            }
            match &goer.wait(LIMIT).unwrap()[..] {
                b"reactor-0: 512" => return,
                place => assert_eq!(place, b"tokio-rt-worker: 512"),
            }
        }
        panic!("of {TRIES} reads none was brought by the reactor");
    }

    #[test]
    fn read_on_a_kept_connection_is_waited_for_by_the_reactors_ring_in_whatever_pieces_it_comes() {
        let (goer, listener) = goer();
        let mut there = connected(&goer, &listener);
        for piece_len in [whole().len(), 40, 100, whole().len() - 1] {
            bring_here(&goer, &mut there, piece_len);
        }
        goer.shutdown();
    }

    #[test]
    fn read_that_takes_long_is_handed_over_wherever_it_is_and_the_next_is_the_reactors_again() {
        let (goer, listener) = goer();
        let mut there = connected(&goer, &listener);
        let whole = whole();
        for cut in [0, 20, whole.len() - 300] {
            goer.send();
            hear(&mut there);
            there.write_all(&whole.as_bytes()[..cut]).unwrap();
            assert!(goer.wait(LONG).is_none());
            there.write_all(&whole.as_bytes()[cut..]).unwrap();
            assert_eq!(goer.wait(LIMIT).unwrap(), "tokio-rt-worker: 512");
            // On the connection that the runtime now watches.
            bring_here(&goer, &mut there, whole.len());
        }
        goer.shutdown();
    }

    #[test]
    fn connection_that_the_server_closes_ends_the_read_and_a_reactor_that_ends_leaves_it() {
        let (goer, listener) = goer();
        let mut there = connected(&goer, &listener);
        goer.send();
        hear(&mut there);
        let whole = whole();
        there
            .write_all(&whole.as_bytes()[..whole.len() - 5])
            .unwrap();
        drop(there);
        let end = goer.wait(LIMIT).unwrap();
        assert!(end.ends_with(b": the body was not received"), "{end:?}");
        goer.send();
        goer.shutdown();
    }
}
