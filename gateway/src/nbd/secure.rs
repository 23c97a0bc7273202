//! NBD by TLS: clients that show a certificate, and reach what it names.
//!
//! A reactor serves sockets, and TLS is none: behind the handshake a task of tokio's copies between the TLS
//! stream and a socket pair, whose other end is the reactor's. It costs the encryption, two copies more each way
//! and a wake-up of another thread.
//!
//! Invariants:
//! - before TLS a client is told nothing but that it must begin it;
//! - what came in plain text before the handshake is not taken for what came after: it is read byte-exact;
//! - the task ends with the reactor's end of the pair, and holds the connection's place until then.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::negotiate::{Agreement, Negotiated, NegotiationError, Terms, greet, haggle};
use super::permit::{Permit, Permitted};
use super::{NbdServer, blocking_unix, pause};
use crate::tls::Tls;

/// How long a client that sends no more, or is served no more, may take for its last answers: one that does not read them keeps its
/// place no longer.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(60);

/// Bytes copied at once, each way.
const COPY_BYTES: usize = 128 << 10;

impl NbdServer {
    /// Serves a TCP socket to who shows a certificate, until the future is dropped.
    pub async fn serve_tls(&self, listener: TcpListener, tls: Arc<Tls>) {
        let follow = Arc::clone(&tls).follow();
        let accept = async {
            loop {
                match listener.accept().await {
                    Ok((stream, from)) => self.welcome_tls(stream, from.ip(), &tls),
                    Err(error) => pause(&error).await,
                }
            }
        };
        tokio::join!(follow, accept);
    }

    fn welcome_tls(&self, stream: TcpStream, from: IpAddr, tls: &Tls) {
        super::tune(&stream);
        let handshake = self.admission.handshake(Some(from));
        let (server, acceptor) = (self.clone(), TlsAcceptor::from(tls.config()));
        tokio::spawn(async move {
            let agreed = handshake.carry_out(server.agree(stream, acceptor)).await;
            let Some((stream, negotiated)) = agreed else {
                return;
            };
            let Some(place) = server.admission.connection(negotiated.export.group) else {
                return;
            };
            let pair = UnixStream::pair()
                .and_then(|(ours, theirs)| Ok((ours, blocking_unix(theirs.into_std()?)?)));
            match pair {
                Ok((ours, theirs)) => {
                    let (serves, served) = oneshot::channel();
                    let guard = Box::new((Arc::clone(&place), serves));
                    server.hand_on(theirs, negotiated, guard).await;
                    copy(stream, ours, served).await;
                    drop(place);
                }
                Err(error) => {
                    tracing::warn!(%error, "an NBD connection by TLS cannot be handed on")
                }
            }
        });
    }

    /// From a fresh connection to an export that both sides agree on; `None` if the client ended it.
    async fn agree(
        &self,
        mut stream: TcpStream,
        acceptor: TlsAcceptor,
    ) -> Result<Option<(TlsStream<TcpStream>, Negotiated)>, NegotiationError> {
        let zeroes = greet(&mut stream).await?;
        let nothing = Permitted {
            directory: Arc::clone(&self.directory),
            permit: Permit::default(),
        };
        match haggle(&mut stream, &nothing, zeroes, Terms::TlsFirst).await? {
            Agreement::Tls => {}
            Agreement::Export(_) | Agreement::Ended => return Ok(None),
        }
        let mut stream = acceptor.accept(stream).await?;
        let certs = stream.get_ref().1.peer_certificates();
        let permit = certs.and_then(|certs| certs.first()).map(Permit::of);
        let permitted = Permitted {
            directory: Arc::clone(&self.directory),
            permit: permit.unwrap_or_default(),
        };
        match haggle(&mut stream, &permitted, zeroes, Terms::Secured).await? {
            Agreement::Export(negotiated) => Ok(Some((stream, negotiated))),
            Agreement::Tls | Agreement::Ended => Ok(None),
        }
    }
}

/// Copies both ways until the reactor's end is closed, whose connection `served` ends with. That the client's is, is told to
/// the reactor, which answers what it has and closes its own.
async fn copy(
    stream: impl AsyncRead + AsyncWrite,
    pair: UnixStream,
    served: oneshot::Receiver<()>,
) {
    let (from_client, to_client) = split(stream);
    let (from_reactor, mut to_reactor) = pair.into_split();
    let inward = async {
        let copied = copy_one_way(from_client, &mut to_reactor).await;
        drop(to_reactor.shutdown().await);
        if let Err(error) = copied {
            tracing::debug!(%error, "an NBD client by TLS is gone");
        }
        tokio::time::sleep(CLOSE_TIME_MAX).await;
        Err(io::Error::from(io::ErrorKind::TimedOut))
    };
    let outward = async {
        let mut to_client = to_client;
        copy_one_way(from_reactor, &mut to_client).await?;
        to_client.shutdown().await
    };
    // Seen by neither, while the one waits for a client that takes nothing and the other for what it sends.
    let gone = async {
        drop(served.await);
        tokio::time::sleep(CLOSE_TIME_MAX).await;
        Err(io::Error::from(io::ErrorKind::TimedOut))
    };
    let ended = tokio::select! {
        ended = inward => ended,
        ended = outward => ended,
        ended = gone => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an NBD connection by TLS broke off");
    }
}

async fn copy_one_way(
    mut from: impl AsyncRead + Unpin,
    to: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut room = vec![0; COPY_BYTES];
    loop {
        let len = from.read(&mut room).await?;
        if len == 0 {
            return Ok(());
        }
        to.write_all(&room[..len]).await?;
        // TLS keeps what the socket did not take at once until it is asked again.
        to.flush().await?;
    }
}

#[cfg(test)]
mod tests;
